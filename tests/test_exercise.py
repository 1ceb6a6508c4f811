"""The exercises: our own solution passes each check, the blank and plausible wrong solutions fail it."""

import ast
import subprocess
from types import SimpleNamespace

import pytest

from minirlhf.files.errors import UserError
from minirlhf.tools import exercise
from minirlhf.tools.exercise import EXERCISES, ROOT

LAST = "mask.sum(dim=1, keepdim=True) - 1"
MASKED = "rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)"
WRONG = [   # (function, a piece of our solution, what a learner may write in its place)
    ("position_ids", "mask.long().cumsum(dim=1) - mask.long()", "torch.arange(mask.shape[1]).expand(mask.shape)"),
    ("attention_mask", ".tril(S - T)", ".tril()"),
    ("attention_mask", "(mask[:, None, None, :] | causal.triu(S - T))", "mask[:, None, None, :]"),
    ("KVCache.extend", "end = self.length + T", "end = T"),
    ("KVCache.extend", "return keys[:, :, :end], values[:, :, :end]", "return k, v"),
    ("sample_token", "torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)",
     "logits.argmax(dim=-1, keepdim=True)"),
    ("sample_token", ", right=True", ""),
    ("response_logprobs", "for p in prompts])[:, 1:]", "for p in prompts])[:, :-1]"),
    ("response_logprobs", ", temperature)     # (N,)", ")"),
    ("sft_loss", "-logprobs.sum()", "-logprobs.mean()"),
    ("encode", "[tokenizer.eot_token] if finished else []", "[tokenizer.eot_token]"),
    ("encode", "tokenizer.encode_ordinary(response) + eos",
     "tokenizer.encode(response, allowed_special='all') + eos"),
    ("preferred", "(ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])",
     "ranks[:, :, None] < ranks[:, None, :]"),
    ("preferred", "< ranks[:, None, :]", "<= ranks[:, None, :]"),
    ("at_last_token", "mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1, keepdim=True)", LAST),
    ("pair_loss", "/ better.sum(dim=(1, 2))).mean()", ").sum() / better.sum()"),
    ("pair_loss", "scores[:, :, None] - scores[:, None, :]", "scores[:, None, :] - scores[:, :, None]"),
    ("choice_losses", "(better | itself)", "better"),
    ("plackett_luce_loss", ".sum(dim=1).mean()", ".mean()"),
    ("normalise", "float(scores.mean()), float(scores.std()) or 1.0", "float(scores.mean()), 1.0"),
    ("normalise", "at_last_token(model(ids), mask)", "model(ids)[:, -1]"),
    ("token_rewards", LAST, "torch.full_like(mask[:, :1], mask.shape[1] - 1, dtype=torch.long)"),
    ("token_rewards", "-beta * kl", "beta * kl"),
    ("token_rewards", ".masked_fill(~mask, 0)", ""),
    ("kl_k3", "ref_logprobs - logprobs", "logprobs - ref_logprobs"),
    ("gae", "reversed(range(rewards.shape[1]))", "reversed(range(rewards.shape[1] - 1))"),
    ("gae", MASKED, "rewards.masked_fill(~mask, 0), values"),
    ("gae", "gamma * next_value - values[:, t]", "gamma * next_value"),
    ("whiten", "masked_mean(x, mask)", "x.mean()"),
    ("whiten", "masked_mean(x, mask)", "x.masked_fill(~mask, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)"),
    ("policy_losses", "-torch.min(", "-torch.max("),
    ("policy_losses", "-torch.min(", "torch.min("),
    ("value_losses", "torch.max(", "torch.min("),
    ("adaptive_beta", "min(max(kl / target - 1, -0.2), 0.2)", "kl / target - 1"),
]
TWO = {"gae", "whiten", "policy_losses", "token_rewards"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def learners_file(name):
    return exercise.FOLDER / name / EXERCISES[name].file


def solve(name, old="", new=""):
    """Puts our solution with one piece replaced into the learner's file."""
    source, function = exercise.read_function(ROOT / EXERCISES[name].file, name)
    text = ast.get_source_segment(source, function)
    assert not old or text.count(old) == 1, f"{name}: {old!r} is in it {text.count(old)} times, not once"
    learners_file(name).parent.mkdir(parents=True)
    learners_file(name).write_text(source.replace(text, text.replace(old, new)))


def check(name):
    """The exit code of `check`."""
    with pytest.raises(SystemExit) as ended:
        exercise.main(["check", name])
    return ended.value.code


# ---- the table -------------------------------------------------------------------------------------------------------

def test_there_are_enough_exercises_each_with_a_wrong_solution():
    assert len(EXERCISES) >= 14
    assert all(each.minutes > 0 and each.difficulty in ("easy", "medium", "hard") for each in EXERCISES.values())
    wrong = [name for name, *_ in WRONG]
    assert set(wrong) == set(EXERCISES) and all(wrong.count(name) >= 2 for name in TWO)


def test_the_list_has_every_exercise_in_its_order(capsys):
    exercise.main(["blank", "gae"])
    capsys.readouterr()
    exercise.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXERCISES)
    assert [line.split()[0] for line in lines if line.endswith("begun")] == ["gae"]
    assert max(map(len, lines)) <= 80


# ---- blank and solution ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EXERCISES)
def test_a_blank_keeps_everything_but_the_body(name):
    original = (ROOT / EXERCISES[name].file).read_bytes()
    exercise.main(["blank", name])
    assert (ROOT / EXERCISES[name].file).read_bytes() == original
    ours, theirs = (exercise.read_function(path, name) for path in (ROOT / EXERCISES[name].file, learners_file(name)))
    for what in (lambda f: f.name, lambda f: ast.dump(f.args), lambda f: ast.get_docstring(f, clean=False),
                 lambda f: list(map(ast.dump, f.decorator_list))):
        assert what(ours[1]) == what(theirs[1])
    assert ast.get_docstring(ours[1])
    todo = ast.unparse(theirs[1].body[1:])
    assert todo.startswith("raise NotImplementedError(") and "\n" not in todo
    before, rest = ours[0].splitlines(), theirs[0].splitlines()
    first = theirs[1].end_lineno
    assert rest[:first - 1] == before[:first - 1] and rest[first:] == before[ours[1].end_lineno:]


def test_a_second_blank_keeps_the_learners_file(capsys):
    for n in range(3):
        exercise.main(["blank", "gae"])
        learners_file("gae").write_text(f"# attempt {n}\n")
    assert learners_file("gae").read_text() == "# attempt 2\n"
    for n, folder in enumerate(("gae.1", "gae.2")):
        assert (exercise.FOLDER / folder / "minirlhf/ppo.py").read_text() == f"# attempt {n}\n"
    assert "moved to out/exercises/gae.2" in capsys.readouterr().out


def test_the_solution_is_the_difference(capsys):
    exercise.main(["blank", "adaptive_beta"])
    exercise.main(["solution", "adaptive_beta"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("-")][1:] == [
        '-    raise NotImplementedError("your code replaces this line")']
    assert "+    return beta * (1 + error * n / horizon)" in lines
    learners_file("adaptive_beta").write_bytes((ROOT / "minirlhf/ppo.py").read_bytes())
    exercise.main(["solution", "adaptive_beta"])
    assert "the same as ours" in capsys.readouterr().out


# ---- what is wrong with the command or the file ----------------------------------------------------------------------

@pytest.mark.parametrize("command", ["blank", "check", "solution"])
@pytest.mark.parametrize("name", ["GAE", "extend", "", "../gae"])
def test_an_unknown_name_is_told_the_known_ones(command, name):
    with pytest.raises(UserError, match="invalid choice.*gae.*adaptive_beta"):
        exercise.main([command, name])


@pytest.mark.parametrize("command", ["check", "solution"])
@pytest.mark.parametrize("text, said", [
    (None, "blank gae"),
    (b"x = 1\ndef gae(:\n", r"ppo.py: .*line 2"),
    (b"def other():\n    pass\n", "gae is gone"),
    (b"x = '\xff'\n", "ppo.py: .*utf-8"),
    (b"x = '\0'\n", "ppo.py.*null byte"),
])
def test_a_file_that_cannot_be_tested_gets_one_line(command, text, said):
    if text is not None:
        exercise.main(["blank", "gae"])
        learners_file("gae").write_bytes(text)
    with pytest.raises(UserError, match=said):
        exercise.main([command, "gae"])


def test_without_pytest_one_line_names_the_file_that_has_it(monkeypatch):
    none = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(stdout="", stderr="No module named pytest\n"),
                           TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(exercise, "subprocess", none)
    exercise.main(["blank", "gae"])
    with pytest.raises(UserError, match=r"No module named pytest. .*pip install -r tests/requirements.txt"):
        exercise.main(["check", "gae"])


# ---- check -----------------------------------------------------------------------------------------------------------

def test_our_own_solution_passes(capsys):
    solve("adaptive_beta")
    assert check("adaptive_beta") == 0
    out = capsys.readouterr().out
    assert "passes  adaptive beta in absolute values\n" in out and "FAILS" not in out


def test_a_wrong_solution_fails_and_the_first_failure_has_its_numbers(capsys):
    """At KL 12 and target 6 the factor is 1.002. Without the clip it is 1.01."""
    solve(*next(wrong for wrong in WRONG if wrong[0] == "adaptive_beta"))
    assert check("adaptive_beta") == 1
    out = capsys.readouterr().out
    assert "FAILS   adaptive beta in absolute values\n" in out and "isclose>(0.101, (0.1 * 1.002)" in out


def test_tests_that_never_end_are_stopped(capsys, monkeypatch):
    monkeypatch.setattr(exercise, "TIME_LIMIT", 0.2)
    solve("gae")
    assert check("gae") == 1
    assert "not within 0.2 seconds" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KVCache.extend", "plackett_luce_loss", "gae", "sft_loss"])
def test_our_own_solution_passes(name, capsys):
    """One exercise of each file, since the tests of all of them pass on our code anyway."""
    original = (ROOT / EXERCISES[name].file).read_bytes()
    solve(name)
    assert check(name) == 0
    assert (ROOT / EXERCISES[name].file).read_bytes() == original
    passed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("passes  ")]
    assert len(passed) == len(EXERCISES[name].tests.split()) - 1 - ("best" in EXERCISES[name].only)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXERCISES)
def test_the_blank_of_each_fails(name, capsys):
    exercise.main(["blank", name])
    assert check(name) == 1
    assert "NotImplementedError: your code replaces this line" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name, old, new", WRONG)
def test_a_plausible_wrong_solution_of_each_fails(name, old, new, capsys):
    solve(name, old, new)
    assert check(name) == 1
    shown = capsys.readouterr().out.split("The first failure: ")[1]
    assert "\nE " in shown and any(character.isdigit() for character in shown)
