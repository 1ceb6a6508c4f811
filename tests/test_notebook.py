"""data/gathering_human_feedback.ipynb: its committed outputs, its first cell, and (slow) a run from top to bottom."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "data/gathering_human_feedback.ipynb"
FILMS = Path(os.environ.get("MINIRLHF_REAL_DATA") or "nowhere") / "hutto_ICWSM_2014.tar.gz"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(cell):
    """What a code cell printed."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def test_the_committed_outputs_are_those_of_one_run_without_an_error():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = code_cells(json.loads(text))
    assert len(text) <= 250_000 and [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"] and all(output["output_type"] != "error" for output in cell["outputs"]), cell["source"]
    assert not re.search(r"/tmp/|/home/|/root/|Traceback|error: ", "".join(map(text_of, cells)))


def test_the_first_cell_clones_and_installs_only_where_there_is_no_clone(tmp_path, monkeypatch, capsys):
    """In Colab, whose git and pip are replaced: the folder that a clone would make is made here."""
    ran = []

    def run(command, check):
        ran.append(command[0] if command[0] == "git" else command[1:4])
        (Path.cwd() / "repository/minirlhf").mkdir(parents=True, exist_ok=True)
    source = "".join(code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))[0]["source"])
    monkeypatch.setenv("MINIRLHF_REPOSITORY", "https://example.org/minirlhf")
    monkeypatch.setattr(subprocess, "run", run)
    for folder, expected in ((ROOT, []), (ROOT / "data", []), (tmp_path, ["git", ["-m", "pip", "install"]])):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.path", [])
        code = compile(source.replace('Path("out/notebook")', f"Path({str(tmp_path / 'out')!r})"), "cell", "exec")
        exec(code, {})
        assert ran == expected
    assert Path.cwd() == tmp_path / "repository"


@pytest.mark.slow
@pytest.mark.skipif(not FILMS.is_file(), reason="$MINIRLHF_REAL_DATA has no hutto_ICWSM_2014.tar.gz")
def test_it_runs_from_top_to_bottom_and_its_numbers_are_those_that_are_committed(tmp_path):
    """Counts and kappas to the digit. What is trained may end elsewhere on another processor: within 0.1."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name in ("minirlhf", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, tmp_path)
    notebook = nbformat.read(NOTEBOOK, 4)
    committed = [text_of(cell) for cell in code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    again = [text_of(cell) for cell in code_cells(notebook)]
    exact = [n for n, text in enumerate(committed) if "kappa" in text or "rated by" in text]
    assert len(exact) >= 3
    for n in exact:
        numbers = [re.findall(r"-?\d+\.?\d*", re.sub("half within.*|consensus_.*", "", text)) for text in (committed[n], again[n])]
        assert numbers[0] == numbers[1]
    accuracies = [[float(x) for text in texts for x in re.findall(r"at 40 s each: (0\.\d+)", text)]
                  for texts in (committed, again)]
    assert len(accuracies[0]) == 3 and accuracies[1] == pytest.approx(accuracies[0], abs=0.1)
