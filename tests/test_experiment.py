"""tools/experiment.py: patches fit or are refused, runs are measured once, and the table is the textbook's."""

import json
import math
import subprocess

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
@@ -2,3 +2,4 @@
 two
-three
+drei
+
 four
@@ -6,2 +7,3 @@
 six
+sechs
 seven
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


def test_a_patch_is_read(patches):
    patch = experiment.read_patch("algo_idea")
    assert patch.runs == [("train_rm.py", ["--lr", "1"]), ("train_ppo.py", [])]
    assert patch.field("Expect") == "much, and\n  more on a second line." and patch.field("Hope") == ""


@pytest.mark.parametrize("more", [0, 3])
def test_a_patch_is_applied_as_git_does_it_also_when_lines_have_moved(patches, more):
    lines = ["zero"] * more + BEFORE
    for folder in (patches / "ours", patches / "gits"):
        folder.mkdir()
        (folder / "a.py").write_text("\n".join(lines) + "\n")
    experiment.apply_patch(experiment.read_patch("algo_idea"), patches / "ours")
    subprocess.run(["git", "apply", patches / "patches/algo_idea.patch"], cwd=patches / "gits", check=True)
    assert (patches / "ours/a.py").read_text() == (patches / "gits/a.py").read_text()
    assert (patches / "ours/a.py").read_text().splitlines() == ["zero"] * more + AFTER


@pytest.mark.parametrize("lines, said", [
    (["one", "two", "THREE", "four", "five", "six", "seven"], "what it changes at line 2 is not there"),
    (["one", "two", "three", "four", "five", "SIX", "seven"], "what it changes at line 6 is not there")])
def test_a_patch_that_does_not_fit_names_file_and_line_and_changes_nothing(patches, lines, said):
    (patches / "a.py").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"algo_idea does not fit a.py: .*{said}"):
        experiment.apply_patch(experiment.read_patch("algo_idea"), patches)
    assert (patches / "a.py").read_text().splitlines() == lines


def test_every_patch_of_ours_is_applied_as_git_does_it(tmp_path):
    for name in experiment.names():
        patch, files = experiment.read_patch(name), experiment.hunks_of(experiment.read_patch(name))
        for kind in ("ours", "gits"):
            for file in files:
                (tmp_path / name / kind / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name / kind / file).write_text((ROOT / file).read_text())
        experiment.apply_patch(patch, tmp_path / name / "ours")
        if patch.diff:
            file = experiment.PATCHES / f"{name}.patch"
            subprocess.run(["git", "apply", file], cwd=tmp_path / name / "gits", check=True)
        for file in files:
            assert (tmp_path / name / "ours" / file).read_text() == (tmp_path / name / "gits" / file).read_text()


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
    (["mystery"], "needs a number"), (["mystery", "0"], "there are mysteries 1 to"), (["reveal", "x"], "needs a number")])
def test_bad_input_gets_one_line(tmp_path, argv, said):
    with pytest.raises(UserError, match=said):
        experiment.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_changed_tree_is_reported_before_anything_is_trained(patches, capsys):
    """The patch is for a file that does not exist here."""
    with pytest.raises(UserError, match="algo_idea: there is no a.py"):
        experiment.main(["run", "algo_idea", "--out", str(patches / "out")])
    assert not (patches / "out/models").exists()


def test_mysteries_are_all_bugs_once_and_reveal_shows_the_diff(capsys):
    bugs = [name for name in experiment.names() if name.startswith("bug_")]
    found = [experiment.hidden_bug(number + 1).name for number in range(len(bugs))]
    assert sorted(found) == bugs and found != bugs
    experiment.main(["reveal", "1"])
    shown = capsys.readouterr().out
    assert found[0] in shown and experiment.read_patch(found[0]).diff in shown


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    """Runs are replaced by rows. The second command adds what is missing, the third nothing."""
    ran = []
    monkeypatch.setattr(experiment, "shared_models", lambda *_: (tmp_path, tmp_path))
    monkeypatch.setattr(experiment, "run_job",
                        lambda job: ran.append((job.row["patch"], job.row["seed"]))
                        or rows_of(job.row["patch"], {job.row["seed"]: 0.5})[0] | job.row)
    for seeds in (["1"], ["1", "2"], ["1", "2"]):
        experiment.main(["run", "algo_grpo", "--seeds", *seeds, "--out", str(tmp_path / "out")])
    assert ran == [("default", 1), ("algo_grpo", 1), ("default", 2), ("algo_grpo", 2)]
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "out/trees").exists()


def test_a_run_counts_for_the_code_that_it_was_made_with(tmp_path, monkeypatch):
    codes = iter(["a", "b", "a", "c", "a", "c"])
    ran = []
    monkeypatch.setattr(experiment, "copy_tree", lambda patch, tree: tree.mkdir(parents=True) or next(codes))
    monkeypatch.setattr(experiment, "shared_models", lambda *_: (tmp_path, tmp_path))
    monkeypatch.setattr(experiment, "run_job", lambda job: ran.append(job.row["code"])
                        or rows_of(job.row["patch"], {job.row["seed"]: 0.5})[0] | job.row)
    for _ in range(3):
        experiment.main(["run", "algo_grpo", "--out", str(tmp_path / "out")])
    assert ran == ["a", "b", "c"]


@pytest.mark.slow
def test_an_experiment_with_a_patch_and_one_that_fails(tmp_path, monkeypatch, capsys):
    """The real scripts, two iterations of PPO: default, GRPO, and a script that ends with an error.

    The shared models are there already, after one pass over a part of the data.
    """
    few = tmp_path / "few.jsonl"
    few.write_text("".join(open(ROOT / "data/tiny/comparisons.jsonl").readlines()[:200]))
    models = tmp_path / "lab/models/1"
    experiment.run_script(ROOT, "train_sft.py", ["--epochs", 1, "--out", models / "sft"], tmp_path / "log.txt")
    experiment.run_script(ROOT, "train_rm.py", ["--epochs", 1, "--data", few, "--heldout", "", "--model", models / "sft",
                                                "--out", models / "rm"], tmp_path / "log.txt")
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches/algo_grpo.patch").write_text((ROOT / "minirlhf/patches/algo_grpo.patch").read_text())
    (tmp_path / "patches/bug_none.patch").write_text("Nothing.\nrun: train_ppo.py --temperature x\n")
    monkeypatch.setattr(experiment, "PATCHES", tmp_path / "patches")
    monkeypatch.chdir(tmp_path)
    experiment.main(["run", "algo_grpo", "bug_none", "--iterations", "2", "--jobs", "2", "--out", "lab"])
    rows = {row["patch"]: row for row in map(json.loads, open(tmp_path / "lab/results.jsonl"))}
    assert 0 < rows["default"]["gold"] < 0.9 and 0 < rows["algo_grpo"]["gold"] < 0.9
    assert rows["default"]["code"] != rows["algo_grpo"]["code"]
    assert "--temperature" in rows["bug_none"]["failed"]
    assert "--temperature" in capsys.readouterr().out
    assert "algo_grpo_2/1/ppo" in (tmp_path / "lab/bug_none.html").read_text()
