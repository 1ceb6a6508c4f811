"""minirlhf/patches: every patch applies to the tree as it is, and the changed scripts run."""

import re
import subprocess

import pytest

from test_documents import ROOT, copy_of_the_tree, hunks, run

PATCHES = sorted((ROOT / "minirlhf/patches").glob("*.patch"))
SHORT = {   # flags with which a script takes a few seconds on eight rows
    "train_sft.py": ["--epochs", "1"],
    "train_rm.py": ["--epochs", "1"],
    "train_ppo.py": ["--iterations", "2", "--batch_size", "8", "--max_response", "8"],
}


def parts(patch):
    """(header, diff) of a patch."""
    header, _, diff = patch.read_text().partition("--- a/")
    return header, "--- a/" + diff


def apply(patch, folder):
    """As a reader does it."""
    done = subprocess.run(["git", "apply", patch], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_has_a_header_applies_and_compiles(patch, tmp_path):
    header, diff = parts(patch)
    assert all(f"{name}: " in header for name in ("Source", "Expect", "Question", "run"))
    folder = copy_of_the_tree(tmp_path)
    apply(patch, folder)
    for file in hunks(diff):
        assert (folder / file).read_text() != (ROOT / file).read_text()
        compile((folder / file).read_text(), file, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patched_script_runs(patch, tmp_path):
    header, diff = parts(patch)
    folder = copy_of_the_tree(tmp_path)
    apply(patch, folder)
    changed = re.search(r"^run: (.*)$", header, flags=re.MULTILINE)[1].split(", ")
    for script, flags in SHORT.items():             # all three, in order: each needs what the one before it writes
        run(folder, script, *flags)
    assert set(changed) <= set(hunks(diff))


def test_grpo_is_a_short_patch():
    """The idea and nothing else: no value model is left as dead weight, and at most 25 lines of code are added."""
    _, diff = parts(ROOT / "minirlhf/patches/algo_grpo.patch")
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++") and line[1:].strip()]
    assert len(added) <= 25
