"""The benchmarks of tests/bench still run on our side, and the memory by arithmetic is what steps really take."""

import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_ppo
import train_sft
from minirlhf.data import Example, Row
from minirlhf.generate import micro_batches
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from small_world import CPU

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


# ---- memory: the peak is counted by a mode that sees every tensor's storage appear and disappear ------------------------

class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as memory:` memory.peak is the most bytes of tensors made inside that lived at one time."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for storage in {x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)}:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def gone(self, key, size):
        self.known.discard(key)
        self.live -= size


def gpt2_5m(scalar=False):
    model = GPT2(GPT2Config(vocab_size=5000, n_positions=512, n_embd=192, n_layer=6, n_head=6))
    return ScalarHeadModel(model) if scalar else model


def sft_steps(cfg, examples):
    model = gpt2_5m()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        for part in micro_batches(examples, cfg.micro_batch):
            train_sft.sft_loss(model, part, CPU)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [model]


def ppo_steps(cfg, examples):
    models = [gpt2_5m(), gpt2_5m().requires_grad_(False), gpt2_5m(True).requires_grad_(False), gpt2_5m(True)]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in (models[0], models[3])]
    tokenizer = SimpleNamespace(eot_token=-1, n_vocab=5000, decode=str)      # no token ends a response
    for iteration in range(2):
        rollout = train_ppo.make_rollout(examples, *models, tokenizer, (-1, 0), cfg, cfg.beta, iteration)
        train_ppo.update(rollout, models[0], models[3], *optimizers, cfg, iteration)
    return models


SFT, PPO = (sft_steps, train_sft.Config), (ppo_steps, train_ppo.Config)


@pytest.mark.slow
@pytest.mark.parametrize("script, tokens, options", [
    (SFT, 100, dict(batch_size=16, micro_batch=8)),
    (PPO, 64, dict(batch_size=64, micro_batch=8, epochs=1, minibatches=1, max_response=24))])      # the rollout's peak
def test_the_memory_by_arithmetic_is_what_steps_take(monkeypatch, script, tokens, options):
    monkeypatch.syspath_prepend(str(BENCH))
    from memory import peak_bytes
    (steps, Config), ids = script, list(range(97, 97 + tokens))
    cfg = Config(**options, temperature=1.0, stop="")
    examples = [Example(Row("x:1", "x"), ids, [] if script is PPO else [ids])] * cfg.batch_size
    with LiveBytes() as memory:
        models = steps(cfg, examples)
    ratio = peak_bytes(cfg, examples, models) / memory.peak
    print(f"{Config.__module__}, {options}: {memory.peak / 1e9:.3f} GB taken, {ratio:.2f} times that by arithmetic")
    assert 0.8 < ratio < 1.25
