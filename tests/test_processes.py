"""Two processes that share the work are one process that does it all: torchrun --nproc_per_node=2, gloo, on the CPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf.running.device import start
from minirlhf.running.processes import all_sum, is_first, shard, sum_gradients
from minirlhf.running import compute
from minirlhf.files.errors import UserError
from minirlhf.weights import load
from small_world import ppo_flags, read_metrics, script_flags, small_world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


def flags(world, name, out):
    """Five steps of each script; micro-batches leave a smaller last part. PPO has one minibatch: each process permutes its
    own rows, so that of several minibatches each would hold other rows than those of a single process."""
    if name == "ppo":
        return ppo_flags(world, "--iterations", 5, "--batch_size", 16, "--micro_batch", 3, "--minibatches", 1,
                         "--target_kl", 1, out=out)
    data = {"sft": "demonstrations", "rm": "comparisons"}[name]
    size, passes = {"sft": (20, 3), "rm": (16, 2)}[name]        # 40 rows: some batches span two passes
    return script_flags(world, out, "--data", f"{world}/{data}.jsonl", "--epochs", passes, "--batch_size", size,
                        "--micro_batch", 7, "--heldout", f"{world}/{data}.jsonl",
                        *(["--lr", 0.01] if name == "sft" else []))             # the warm-up lasts longer than these steps


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
        for metrics in (row, other):                            # each process counts different pairs in its own rows
            metrics.pop("rollout/distinct_2", None)
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    if script is not train_ppo:
        assert done.stdout.count("done: ") == 1                 # only one of them prints
    assert done.stdout.count("GB of memory at most") == 1


@pytest.mark.slow
def test_more_processes_than_rows_are_refused(world):
    done = torchrun(2, "train_ppo.py", flags(world, "ppo", "refused") + ["--batch_size", "3", "--minibatches", "2"])
    assert done.returncode != 0
    assert "--batch_size 3" in done.stderr and "--minibatches 2" in done.stderr and "2 processes" in done.stderr
    assert not (world / "refused").exists()


class TwoOf:
    """torch.distributed as one of several processes sees it."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count

    def is_initialized(self):
        return True

    def get_rank(self):
        return self.rank

    def get_world_size(self):
        return self.count


def test_shards_are_a_partition_of_a_batch(monkeypatch):
    """Of a list and of a tensor, also of fewer rows than processes."""
    for n in (10, 2):
        lists, tensors = [], []
        for rank in range(3):
            monkeypatch.setattr(compute, "dist", TwoOf(rank, 3))
            lists.append(shard(list(range(n))))
            tensors.append(shard(torch.arange(n)).tolist())
        assert lists == tensors and sorted(sum(lists, [])) == list(range(n))
        assert max(map(len, lists)) - min(map(len, lists)) <= 1


def test_a_single_process_has_the_whole_batch():
    rows = list(range(5))
    assert shard(rows) == rows and is_first() and all_sum(torch.tensor(3.0)) == 3


def test_gradients_are_summed_over_processes_and_a_process_without_rows_adds_zeros(monkeypatch):
    """The other process' gradient is all ones."""
    monkeypatch.setattr(compute, "dist", TwoOf(0, 2))
    monkeypatch.setattr(compute, "all_sum", lambda x: x + 1)
    first, second = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
    second.grad = torch.arange(4.0)
    sum_gradients([first, second])
    assert torch.equal(first.grad, torch.ones(2, 3)) and torch.equal(second.grad, torch.arange(4.0) + 1)


@dataclasses.dataclass
class Asked:
    """The options that start looks at."""
    batch_size: int
    minibatches: int
    dtype: str = "float32"
    device: str = "cpu"


@pytest.mark.parametrize("processes, batch_size, minibatches, fits", [
    (1, 16, 16, True), (1, 15, 16, False), (4, 16, 4, True), (4, 15, 4, False), (4, 3, 1, False), (2, 2, 1, True)])
def test_each_minibatch_needs_a_row_for_each_process(monkeypatch, processes, batch_size, minibatches, fits):
    monkeypatch.setattr(compute, "dist", TwoOf(0, processes))
    if fits:
        assert start(Asked(batch_size, minibatches)).type == "cpu"
    else:
        with pytest.raises(UserError, match=f"--batch_size {batch_size}.*--minibatches {minibatches}.*{processes} process"):
            start(Asked(batch_size, minibatches))
