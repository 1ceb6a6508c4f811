"""The benchmarks of tests/bench still run on our side; the peers' side needs environments of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.mark.slow
@pytest.mark.parametrize("script, dtype", [("generate.py", "float32"), ("train_step.py", "bfloat16"),
                                           ("ppo_iteration.py", "float32"), ("ppo_iteration.py", "bfloat16")])
def test_our_side_of_the_benchmarks(script, dtype):
    done = subprocess.run([sys.executable, BENCH / script, "--worker=ours", "--size=tiny", "--batch=4", f"--dtype={dtype}",
                           "--threads=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["peak_bytes"] > 1e8


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_as_a_toy_on_the_cpu(tmp_path):
    done = subprocess.run([sys.executable, BENCH / "gpu.py", "--device=cpu", "--toy", f"--out={tmp_path}/gpu.json"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["failed"] and all(row[0] in done.stdout for row in found["rows"])
    measured = {row[0].split(",")[0].split(" ")[0] for row in found["rows"]}
    assert {"logits", "one", "a", "embedded", "generate", "forward", "PPO"} <= measured
