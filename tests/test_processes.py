"""Two processes that share the work are one process that does it all: torchrun --nproc_per_node=2, gloo, on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf.running import compute
from minirlhf.running.errors import UserError
from minirlhf.weights import load
from small_world import ppo_flags, read_metrics, script_flags, small_world, write_jsonl

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


def flags(world, name, out):
    """Five steps of each script. Batches of 16 and 32 leave a smaller last one, micro-batches a smaller last part."""
    if name == "ppo":
        return ppo_flags(world, "--iterations", 5, "--batch_size", 16, "--micro_batch", 3, "--target_kl", 1, "--horizon", 40,
                         "--stop_kl", 0.02, "--whiten_rewards", out=out)
    data = {"sft": "demonstrations", "rm": "comparisons"}[name]
    own = ["--warmup", 0] if name == "sft" else ["--normalise", 16, "--sample_tokens", 8]
    return script_flags(world, out, "--data", f"{world}/{data}.jsonl", "--epochs", 5, "--batch_size", 32 if name == "rm" else 160,
                        "--micro_batch", 7, "--heldout", f"{world}/{data}.jsonl", *own)


def torchrun(n, script, argv):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", script, *argv],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)


def weights_of(folder):
    """All trained weights of a run but those that no loss depends on: a constant added to all keys changes no attention, one
    added to all scores changes no ranking (this model's hidden channel 0 is constant). Their gradient is 0 but for rounding,
    of which Adam, who divides a gradient by its own size, makes steps as long as any other."""
    state = torch.load(folder / "state.pt", weights_only=True)
    weights = {}
    for name, weight in state.get("policy", state.get("model")).items():
        queries_and_values = torch.arange(len(weight)) // 16 != 1
        weights[name.removeprefix("transformer.")] = (weight[queries_and_values] if name.endswith("c_attn.bias") else
                                                      weight[:, 1:] if name == "score.weight" else weight)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo])
def test_two_processes_do_what_one_does(world, script):
    name = script.__name__.removeprefix("train_")
    script.main(flags(world, name, f"{name}_one"))
    done = torchrun(2, f"{script.__name__}.py", flags(world, name, f"{name}_two"))
    assert done.returncode == 0, done.stderr
    one, two = weights_of(world / f"{name}_one"), weights_of(world / f"{name}_two")
    assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    before = load(world / "sft", scalar=False).state_dict()
    assert max((one[key] - before[key]).abs().max() for key in before if "c_attn.bias" not in key) > 1e-3
    for row, other in zip(*(read_metrics(world / f"{name}_{n}") for n in ("one", "two")), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    assert done.stdout.count("done: ") == 1                     # only one of them talks


@pytest.mark.slow
def test_more_processes_than_rows_are_refused(world):
    write_jsonl(world / "three.jsonl", [{"prompt": p} for p in "abc"])
    done = torchrun(2, "train_ppo.py", flags(world, "ppo", "refused") + ["--data", f"{world}/three.jsonl", "--minibatches", "2"])
    assert done.returncode != 0 and "3 rows in batches of 16 leave minibatches of 1 for 2 processes" in done.stderr
    assert not (world / "refused").exists()


def test_shares_are_a_partition_and_spread_puts_the_rows_back(monkeypatch):
    """The pieces that three processes make of ten rows, added up, are what one makes."""
    rows, wholes = torch.arange(1., 21).view(10, 2), []
    monkeypatch.setattr(compute, "all_sum", lambda x: wholes.append(x) or x)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(compute, "ranks", lambda: (rank, 3))
        parts += compute.share(list(range(10)))
        compute.spread(lambda x: x * 2, 2, rows)
    assert sorted(parts) == list(range(10))
    assert torch.equal(sum(wholes), rows * 2)


def test_minibatches_too_small_for_the_processes_are_named(monkeypatch):
    monkeypatch.setattr(compute, "ranks", lambda: (0, 4))
    compute.check_shares(100, 32, 1)                            # the last batch has 4 rows
    with pytest.raises(UserError, match="99 rows in batches of 32 leave minibatches of 3 for 4 processes"):
        compute.check_shares(99, 32, 1)
    monkeypatch.setattr(compute, "ranks", lambda: (0, 1))
    compute.check_shares(99, 32, 16)
