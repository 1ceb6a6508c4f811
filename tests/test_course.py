"""The course: what its lessons show is what their commands print, within ranges, and its exercises are those we have.

Digits differ between machines, so outputs are compared by shape and range. tests/course_outputs.py makes them anew.
"""

import re
import sys

import pytest

from course_outputs import COURSE, MODELS, ROOT, RUN, lessons, make_folder, run
from minirlhf.tools import experiment
from minirlhf.tools.exercise import EXERCISES

TEXT = COURSE.read_text()
LESSONS = lessons(TEXT)
OUTPUTS = [(number, found["command"], found["output"].splitlines())
           for number, lesson in LESSONS.items() for found in RUN.finditer(lesson)]


def numbers(line):
    return [float(x) for x in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", line)]


def row(lines, start):
    """The numbers of the first line that begins like this, without those of its beginning."""
    found = [line.strip() for line in lines if line.strip().startswith(start)]
    assert found, f"no line begins with {start!r}"
    return numbers(found[0].removeprefix(start))


def rows(lines, columns):
    """The lines that are nothing but this many numbers."""
    return [numbers(line) for line in lines if re.fullmatch(r"[\s\d.+-]+", line) and len(numbers(line)) == columns]


# ---- what each command must print ------------------------------------------------------------------------------------

def check_explain(lines):
    header = next(i for i, line in enumerate(lines) if line.startswith("token "))
    table = [[float(x) for x in re.findall(r"[-+]\d+\.\d{3}", line)] for line in lines[header + 1:]]
    logp, ref_logp, kl, reward, value, advantage, returns = zip(*(each for each in table if len(each) == 7))
    score = row(lines, "score")[0]
    assert lines[0].split()[-4:] == ["V(state)", "reward", "return", "advantage"]
    assert 12 <= len(logp) <= 40 and -25 < sum(logp) < -2 and sum(ref_logp) < sum(logp)
    assert abs(sum(reward) - (score - 0.05 * sum(kl))) < 0.03 and 0.5 < score < 3.2
    assert abs(max(reward) - score) < 0.2 and reward[-1] == max(reward)     # the score is at the end


def check_sft(lines):
    losses = [numbers(line) for line in lines if re.fullmatch(r"[\s\d.]+", line)]
    assert 6.6 < losses[0][1] < 7.2 and 0.9 < losses[-1][1] < 1.5 and 0.9 < losses[-1][2] < 1.5
    assert all(a[1] > b[1] for a, b in zip(losses[:10], losses[1:10]))


def check_stats(lines):
    agreements = [numbers(line.split(": ")[1])[0] for line in lines if line.strip().startswith("agreement")]
    assert agreements == [0.774, 0.779, 0.777]                  # of a committed file


def check_reward_model(lines):
    labels, gold, single, annotators, length, claimed = (row(lines, start)[0] for start in (
        "the labels", "true preference (gold)", "single annotators", "one annotator against another",
        "length alone (shorter is better)", "what it claims, on average"))
    assert 0.8 < labels < 0.9 and 0.84 < gold < 0.95 and labels < gold
    assert annotators < single < labels and 0.55 < length < 0.6 and abs(claimed - labels) < 0.06


def check_calm(lines):
    first, *_, last = rows(lines, 8)            # step, score, gold, KL, entropy, length, EOS rate, seconds
    assert 0.55 < first[2] < 0.7 and first[3] == 0 and 23 < first[5] < 26
    assert last[2] < 0.2 and last[1] > first[1] + 2 and last[5] < 10
    assert any("the score rises while the true preference falls" in line for line in lines)


def check_beta(lines):
    first, *_, last = rows(lines, 8)
    assert 0.55 < first[2] < 0.7 and first[3] == 0
    assert last[1] > 0.9 and last[3] > 7


def check_mystery(lines):
    table = [line.split("|") for line in lines if line.startswith("| ")][1:]
    assert [cells[1].strip().rstrip("0123456789") for cells in table] == ["default", "mystery_"]
    assert 0.8 < float(table[0][3]) <= 1 and len(rows(lines, 8)) >= 12


def check_assessment(lines):
    gap, perplexity, rude = (row(lines, f"{name}  ") for name in ("stereotype_gap", "perplexity", "rude"))
    assert 0.1 < gap[0] < 0.4 and abs(gap[3]) < 0.1
    assert 1.8 < perplexity[0] < 2.1 and perplexity[3] > 2.5 and rude[0] > 0.2 and rude[3] < 0.02
    probe = [row(lines, f"out/{name}  ")[0] for name in ("sft", "ppo")]
    assert 1 < probe[0] < 3 and 0 < probe[1] < probe[0]


CHECKS = {      # {what a command has in it: what must hold of its lines}
    "--explain": check_explain,
    "train_sft.py": check_sft,
    "stats": check_stats,
    "evaluate out/sft --": check_reward_model,
    "calm.py": check_calm,
    "--beta 0": check_beta,
    "mystery": check_mystery,
    "evaluate out/sft out/ppo": check_assessment,
}


def check_output(command, lines):
    check, = [check for part, check in CHECKS.items() if part in command]
    check(lines)


# ---- the document ----------------------------------------------------------------------------------------------------

def test_every_lesson_runs_a_command_whose_output_is_checked():
    assert LESSONS and {number for number, *_ in OUTPUTS} == set(LESSONS)


def test_every_exercise_is_in_one_paragraph_in_the_order_of_the_list_with_its_minutes():
    named = [(name, int(minutes)) for paragraph in TEXT.split("**Exercises.**")[1:] for name, minutes in re.findall(
        r"`([\w.]+)` \((\d+)", paragraph.split("\n\n")[0])]
    assert named == [(name, exercise.minutes) for name, exercise in EXERCISES.items()]
    table = [name for line in TEXT.splitlines() if line.startswith("| [") for name in re.findall(r"`([\w.]+)`", line)]
    assert table == list(EXERCISES)


@pytest.mark.parametrize("number, command, lines", OUTPUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_outputs_in_the_lessons_are_in_their_ranges(number, command, lines):
    check_output(command, lines)


def test_what_the_introduction_says_of_two_threads_is_in_the_output_of_lesson_6():
    lines, = [lines for number, _, lines in OUTPUTS if number == 6]
    kl = {row[0]: round(row[3]) for row in rows(lines, 8)}
    assert f"At iteration 10 the KL is {kl[10]} nats" in TEXT and f"at iteration 18 it is {kl[18]} and" in TEXT


def test_an_output_out_of_range_is_noticed():
    for _, command, lines in OUTPUTS:
        with pytest.raises((AssertionError, StopIteration, ValueError, IndexError)):
            check_output(command, [re.sub(r"\d", "9", line) for line in lines])


def test_the_mysteries_of_lesson_7_show_in_the_log():
    """A reader can only solve those that leave the range of good runs in some column."""
    numbers_named = set(re.findall(r"(?:mystery|reveal|Mysteries|and) (\d+)", LESSONS[7]))
    seen = {row["patch"] for row in experiment.read_results(experiment.PATCHES / "signs.jsonl") if "column" in row}
    assert numbers_named and {experiment.hidden_bug(number).name for number in numbers_named} <= seen


# ---- the commands ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    missing = [name for name in MODELS if not (ROOT / "out" / name / "report.json").exists()]
    if missing:
        pytest.skip(f"out/{missing[0]} is not there: run the quick start of README.md first")
    folder = tmp_path_factory.mktemp("course")
    make_folder(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number, command, lines", OUTPUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_of_a_lesson_prints_what_the_lesson_shows(number, command, lines, folder):
    """In the order of the course: lesson 8 needs what lesson 4 trained."""
    now = run(command, folder)
    check_output(command, now)
    assert abs(len(now) - len(lines)) <= 8                      # a story may have more tokens, a run another warning


@pytest.mark.slow
def test_the_code_of_lesson_3_prints_what_the_lesson_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(re.search(r"^```python\n(.*?)^```$", LESSONS[3], flags=re.MULTILINE | re.DOTALL)[1], {})
    assert capsys.readouterr().out == "0.855\n" and "0.855" in LESSONS[3]
