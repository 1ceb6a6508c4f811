"""tools/experiment.py: patches fit or are refused, runs are measured once, and the table is the textbook's."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest

from minirlhf.files.errors import UserError
from minirlhf.tools import experiment
from test_documents import ROOT

DIFF = """An idea.
Source: nobody.
Expect: much, and
  more on a second line.
run: train_rm.py --lr 1, train_ppo.py

--- a/a.py
+++ b/a.py
@@ -3 +3,2 @@
-three
+drei
+
@@ -6 +7,2 @@
 six
+sechs
"""
BEFORE = ["one", "two", "three", "four", "five", "six", "seven"]
AFTER = ["one", "two", "drei", "", "four", "five", "six", "sechs", "seven"]


@pytest.fixture
def patches(tmp_path, monkeypatch):
    """A folder of patches with one in it, and a file that it fits."""
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches/algo_idea.patch").write_text(DIFF)
    monkeypatch.setattr(experiment, "PATCHES", tmp_path / "patches")
    (tmp_path / "a.py").write_text("\n".join(BEFORE) + "\n")
    return tmp_path


def test_a_patch_is_read_and_another_may_share_its_diff(patches):
    patch = experiment.read_patch("algo_idea")
    assert patch.runs == [("train_rm.py", ["--lr", "1"]), ("train_ppo.py", [])]
    assert patch.field("Expect") == "much, and\n  more on a second line." and patch.field("Hope") == ""
    (patches / "patches/algo_flag.patch").write_text("The same.\nrun: train_ppo.py --lam 0\ndiff: algo_idea\n")
    flag = experiment.read_patch("algo_flag")
    assert flag.diff == patch.diff and flag.runs == [("train_ppo.py", ["--lam", "0"])]


@pytest.mark.parametrize("more", [0, 3])
def test_a_patch_is_applied_also_when_lines_have_moved(patches, more):
    (patches / "a.py").write_text("\n".join(["zero"] * more + BEFORE) + "\n")
    experiment.apply_patch(experiment.read_patch("algo_idea"), patches)
    assert (patches / "a.py").read_text().splitlines() == ["zero"] * more + AFTER


def test_a_patch_is_applied_to_a_folder_of_a_repository():
    """`git apply` below a repository's root leaves out what lies outside, unless it is told not to look for one."""
    folder = ROOT / "out/test_experiment"
    folder.mkdir(parents=True)
    try:
        (folder / "train_ppo.py").write_text((ROOT / "train_ppo.py").read_text())
        experiment.apply_patch(experiment.read_patch("algo_grpo"), folder)
        assert "K = 4" in (folder / "train_ppo.py").read_text()
    finally:
        shutil.rmtree(folder)


def test_a_patch_that_does_not_fit_names_file_and_line_and_changes_nothing(patches):
    lines = [*BEFORE[:5], "SIX", "seven"]
    (patches / "a.py").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"^algo_idea does not fit .*: patch failed: a.py:6, a.py: .*[^\n]$"):
        experiment.apply_patch(experiment.read_patch("algo_idea"), patches)
    assert (patches / "a.py").read_text().splitlines() == lines


def test_a_patch_without_a_header_is_left_out_with_one_line_that_says_what_it_needs(patches, capsys):
    (patches / "patches/algo_mine.patch").write_text("diff --git a/a.py b/a.py\n" + DIFF.partition("\n\n")[2])
    experiment.main(["list"])
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["algo_idea"]
    assert shown.err.startswith("warning: ") and shown.err.count("\n") == 1
    with pytest.raises(UserError, match='algo_mine.patch: above the diff it needs the idea and a line like "run: '):
        experiment.main(["run", "algo_mine"])


def rows_of(patch, golds):
    return [{"patch": patch, "seed": seed, "iterations": 0, **dict.fromkeys(experiment.FIGURES, 0.5), "seconds": 9,
             "gold": gold} for seed, gold in golds.items()]


def test_the_table_has_the_paired_difference_of_the_textbook(capsys):
    """Five pairs with a mean of 0.03: t = 4.243 with 4 degrees of freedom, p 0.013, and the limit is 2.776."""
    rows = rows_of("default", {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.9, 5: 0.8})
    rows += rows_of("x", {1: 0.95, 2: 0.83, 3: 0.71, 4: 0.94, 5: 0.82})
    gaps = [0.05, 0.03, 0.01, 0.04, 0.02]
    error = math.sqrt(sum((gap - 0.03) ** 2 for gap in gaps) / 4 / 5)
    line = experiment.table(rows, ["default", "x"])[-1]
    assert f"+0.030 [{0.03 - 2.776 * error:+.3f}, {0.03 + 2.776 * error:+.3f}]" in line
    assert "p 0.013" in line


def test_one_seed_has_no_interval_and_a_failure_is_told(capsys):
    rows = rows_of("default", {1: 0.9}) + rows_of("x", {1: 0.7}) + [
        {"patch": "y", "seed": 1, "iterations": 0, "failed": "train_ppo.py: the ratio is 2"}]
    lines = experiment.table(rows, ["default", "x", "y"])
    assert "-0.200" in lines[-2] and "±" not in lines[-2] and "the ratio is 2" in lines[-1]


@pytest.mark.parametrize("argv, said", [
    (["run"], "needs the names of patches"), (["run", "algo_nothing"], "no such patch"),
    (["mystery"], "needs a number"), (["reveal", "x"], "there are the mysteries 1, 2, 3, .*, not x")])
def test_bad_input_gets_one_line(tmp_path, argv, said):
    with pytest.raises(UserError, match=said):
        experiment.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_patch_of_another_tree_is_reported_before_anything_is_trained(patches):
    with pytest.raises(UserError, match="algo_idea does not fit .*a.py"):
        experiment.main(["run", "algo_idea", "--out", str(patches / "out")])
    assert not (patches / "out").exists()


def test_reveal_shows_the_diff(capsys):
    experiment.main(["reveal", "2"])
    bug = experiment.hidden_bug("2")
    shown = capsys.readouterr().out
    assert bug.name in shown and bug.diff in shown


def test_the_mysteries_keep_their_numbers_when_somebody_adds_a_bug(patches):
    """A new bug comes first in the alphabet and has no number, or takes the next one."""
    known = ROOT / "minirlhf/patches"
    for file in known.glob("bug_*.patch"):
        shutil.copy(file, patches / "patches")
    numbers = {str(n): experiment.hidden_bug(str(n)).name for n in range(1, 16)}
    (patches / "patches/bug_a.patch").write_text("Mine.\nrun: train_ppo.py\n")
    (patches / "patches/bug_b.patch").write_text("Mine too.\nmystery: 16\nrun: train_ppo.py\n")
    assert {n: experiment.hidden_bug(n).name for n in numbers} == numbers
    assert len(set(numbers.values())) == 15 and experiment.hidden_bug("16").name == "bug_b"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A lab whose runs are ready: the log of a PPO run with a warning in it, and no seconds of training."""
    def run_patch(patch, row, models, folder, log):
        healthy = {"objective/scores": 0.0, "objective/entropy": 9.0, "objective/beta": 0.05, "rollout/length": 20.0,
                   "rollout/eos_rate": 1.0, "rollout/score_std": 1.0, "rollout/distinct_2": 0.1}
        rows = [healthy | {"step": n, "objective/kl": 30.0 * n * (row["patch"] != "default")} for n in range(10)]
        (folder / "ppo").mkdir(parents=True)
        (folder / "ppo/run.json").write_text(json.dumps({"config": {"iterations": 10}}))
        (folder / "ppo/metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        print("   0   0.1\n[9] warning: far away\n   9   0.9", file=open(log, "w") if log else None)
        return rows_of(row["patch"], {1: 0.5})[0] | row
    monkeypatch.setattr(experiment, "copy_tree", lambda patch, tree: patch.name)
    monkeypatch.setattr(experiment, "shared_models", lambda *_: {})
    monkeypatch.setattr(experiment, "run_patch", run_patch)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("flags, answer, warned, revealed", [
    ([], "", True, False), (["--blind"], "the score", True, True), (["--blind"], "", False, False)])
def test_a_blind_mystery_shows_no_warning_before_the_diagnosis(trained, monkeypatch, capsys, flags, answer, warned,
                                                               revealed):
    asked = []
    monkeypatch.setattr(experiment.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(capsys.readouterr().out) or answer)
    experiment.main(["mystery", "2", *flags, "--out", "lab"])
    before, after = "".join(asked), capsys.readouterr().out
    blind = bool(flags)
    assert len(asked) == blind and "warning" not in before and ("   9   0.9" in before) == blind
    assert ("warning: " in after) == warned and (experiment.hidden_bug("2").name in before + after) == revealed
    text = open("lab/mystery_2.html").read()
    assert '"title":"default, mystery 2"' in text and ('"warnings":[]' in text) == blind


def test_a_script_that_fails_is_one_line_and_its_log_has_the_rest(tmp_path):
    with pytest.raises(UserError, match=r"^train_rm.py stopped with exit code 2: --loss must be one of [^\n]*$"):
        experiment.run_script("train_rm.py", log=tmp_path / "log.txt", loss="nonsense")
    assert "$ python train_rm.py --loss=nonsense" in (tmp_path / "log.txt").read_text()
    assert "--loss must be one of" in (tmp_path / "log.txt").read_text()


def test_finished_runs_are_not_run_again_unless_the_code_changed(tmp_path, monkeypatch):
    """Runs are replaced by rows. The second command adds what is missing, the third nothing, the fourth the new code."""
    ran, code = [], {"default": "a", "algo_grpo": "b"}
    monkeypatch.setattr(experiment, "copy_tree", lambda patch, tree: code[patch.name])
    monkeypatch.setattr(experiment, "shared_models", lambda *_: {"sft": tmp_path, "rm": tmp_path})
    monkeypatch.setattr(experiment, "run_patch", lambda patch, row, *_: ran.append((row["code"], row["seed"]))
                        or rows_of(row["patch"], {row["seed"]: 0.5})[0] | row)
    monkeypatch.setattr(experiment.page, "write_page", lambda *_, **__: None)
    (tmp_path / "out").mkdir()
    for seeds, changed in ((["1"], {}), (["1", "2"], {}), (["1", "2"], {}), (["1"], {"algo_grpo": "c"})):
        code |= changed
        experiment.main(["run", "algo_grpo", "--seeds", *seeds, "--out", str(tmp_path / "out")])
    assert ran == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("c", 1)]
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
def test_an_experiment_with_a_patch_and_one_that_fails(tmp_path, monkeypatch, capsys):
    """The real scripts, two iterations of PPO: default, GRPO, and a script that ends with an error.

    The shared models are there already, after one pass over a part of the data.
    """
    few = tmp_path / "few.jsonl"
    few.write_text("".join(open(ROOT / "data/tiny/comparisons.jsonl").readlines()[:200]))
    models, log = tmp_path / "lab/models/1", tmp_path / "log.txt"
    experiment.run_script("train_sft.py", folder=ROOT, log=log, epochs=1, out=models / "sft")
    experiment.run_script("train_rm.py", folder=ROOT, log=log, epochs=1, data=few, heldout="", model=models / "sft",
                          out=models / "rm")
    (tmp_path / "patches").mkdir()
    shutil.copy(ROOT / "minirlhf/patches/algo_grpo.patch", tmp_path / "patches")
    (tmp_path / "patches/bug_none.patch").write_text("Nothing.\nrun: train_ppo.py --temperature x\n")
    monkeypatch.setattr(experiment, "PATCHES", tmp_path / "patches")
    monkeypatch.chdir(tmp_path)
    experiment.main(["run", "algo_grpo", "bug_none", "--iterations", "2", "--jobs", "2", "--out", "lab"])
    rows = {row["patch"]: row for row in map(json.loads, open(tmp_path / "lab/results.jsonl"))}
    assert 0 < rows["default"]["gold"] < 0.9 and 0 < rows["algo_grpo"]["gold"] < 0.9
    assert rows["default"]["code"] != rows["algo_grpo"]["code"]
    assert "--temperature" in rows["bug_none"]["failed"]
    assert "--temperature" in capsys.readouterr().out
    assert '"title":"default, algo grpo"' in (tmp_path / "lab/bug_none.html").read_text()
