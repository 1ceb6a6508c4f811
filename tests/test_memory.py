"""The memory that a script announces, against what its steps take.

The peak is counted by a dispatch mode that sees every tensor's storage appear and disappear. It is the same on every
run, while the resident size of a process also holds PyTorch itself, and pages that the allocator keeps for later.
"""

import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_ppo
import train_rm
import train_sft
from minirlhf.data import Example, Row
from minirlhf.generate import micro_batches
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.running import compute
from small_world import CPU

ROOT = Path(__file__).resolve().parents[1]

SIZES = {"tiny": dict(vocab_size=768, n_positions=128, n_embd=96, n_layer=3, n_head=4),
         "5M": dict(vocab_size=5000, n_positions=512, n_embd=192, n_layer=6, n_head=6),
         "124M": dict()}


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


def model_of(size, dtype, scalar=False):
    model = GPT2(GPT2Config(**SIZES[size]))
    model.dtype = dtype
    return ScalarHeadModel(model) if scalar else model


def examples_of(n, prompt, responses, size):
    """n Examples of equal length, random ids: a prompt and responses of these lengths."""
    V, rng = SIZES[size].get("vocab_size", 50257), torch.Generator().manual_seed(0)
    ids = lambda length: torch.randint(V, (length,), generator=rng).tolist()
    row = Row("x:1", "x", ("y",) * len(responses), tuple(range(1, 1 + len(responses))), (True,) * len(responses))
    return [Example(row, ids(prompt), [ids(length) for length in responses]) for _ in range(n)]


def adam(model):
    return torch.optim.AdamW(model.parameters(), fused=True)


def sft_steps(cfg, size, prompt, response):
    examples, model = examples_of(cfg.batch_size, prompt, [response], size), model_of(size, cfg.dtype)
    optimizer = adam(model)
    for _ in range(2):
        for part in micro_batches(examples, cfg.micro_batch):
            train_sft.sft_loss(model, part, CPU)[0].backward()
        compute.step(model, optimizer, 1e-5, "")
    return examples, [model]


def rm_steps(cfg, size, prompt, response):
    examples = examples_of(cfg.batch_size, prompt, [response] * 4, size)
    model, sft = model_of(size, cfg.dtype, scalar=True), model_of(size, cfg.dtype).requires_grad_(False)
    optimizer = adam(model)
    for _ in range(2):
        for part in micro_batches(examples, cfg.micro_batch):
            train_rm.reward_model_loss(model, part, cfg, CPU)[0].backward()
        compute.step(model, optimizer, 1e-5, "")
    return examples, [model, sft]


def ppo_steps(cfg, size, prompt, response):
    examples = examples_of(cfg.batch_size, prompt, [], size)
    policy, reference = model_of(size, cfg.dtype), model_of(size, cfg.dtype).requires_grad_(False)
    reward, value = (model_of(size, cfg.dtype, scalar=True) for _ in range(2))
    reward.requires_grad_(False)
    optimizers = [adam(model) for model in (policy, value)]
    for iteration in range(2):
        tokenizer = SimpleNamespace(eot_token=-1, decode=str)
        rollout = train_ppo.roll_out(policy, examples, tokenizer, (-1, 0), cfg, iteration, CPU)
        train_ppo.make_experience(rollout, policy, reference, reward, cfg, 0.05)
        train_ppo.estimate_advantages(rollout, value, cfg)
        train_ppo.update(rollout, policy, value, *optimizers, cfg, iteration)
    return examples, [policy, reference, reward, value]


SFT, RM, PPO = (sft_steps, train_sft.Config), (rm_steps, train_rm.Config), (ppo_steps, train_ppo.Config)
CASES = [       # what, size, tokens of prompt and response, options
    (SFT, "tiny", 20, 30, {}),
    (RM, "tiny", 20, 30, {}),
    (PPO, "tiny", 20, 48, {}),
    (PPO, "tiny", 20, 48, dict(dtype="bfloat16")),
    (SFT, "5M", 100, 100, dict(batch_size=32, micro_batch=8)),
    (SFT, "5M", 200, 200, dict(batch_size=16, micro_batch=8, dtype="bfloat16")),
    (RM, "5M", 100, 60, dict(batch_size=8, micro_batch=4, lm_coef=0.0)),
    (PPO, "5M", 64, 24, dict(batch_size=128, micro_batch=16, epochs=1, minibatches=1)),             # the rollout's peak
    (PPO, "5M", 64, 64, dict(batch_size=16, micro_batch=0, epochs=1, minibatches=2)),
    (PPO, "5M", 64, 64, dict(batch_size=32, micro_batch=4, epochs=1, minibatches=2, dtype="bfloat16")),
    (SFT, "124M", 64, 64, dict(batch_size=4, micro_batch=2)),
    (RM, "124M", 64, 64, dict(batch_size=2, micro_batch=1, dtype="bfloat16")),
    (PPO, "124M", 16, 16, dict(batch_size=4, micro_batch=2, epochs=1, minibatches=1, dtype="bfloat16")),
]


@pytest.mark.slow
@pytest.mark.parametrize("script, size, prompt, response, options", CASES)
def test_the_announced_memory_is_what_is_taken(script, size, prompt, response, options):
    steps, Config = script
    cfg = Config(**options | ({"max_response": response} if script is PPO else {}))
    with LiveBytes() as memory:
        examples, models = steps(cfg, size, prompt, response)
    ratio = compute.peak_bytes(cfg, examples, models) / memory.peak
    print(f"{Config.__module__}, {size}, {options}: {memory.peak / 1e9:.3f} GB taken, {ratio:.2f} times that announced")
    assert 0.8 < ratio < 1.25


# ---- what is said ----------------------------------------------------------------------------------------------------

def announced(monkeypatch, free, device="cuda:0", **options):
    """compute.memory() and peak_bytes() of SFT on a GPU with `free` bytes left and a gigabyte of our own tensors."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    with torch.device("meta"):
        model = model_of("124M", "float32")
    cfg = train_sft.Config(**dict(batch_size=64, micro_batch=16) | options)
    examples = [Example(Row("x:1", "x"), [0] * 100, [[0] * 100])]
    return compute.memory(cfg, examples, torch.device(device), model), compute.peak_bytes(cfg, examples, [model])


def test_a_gpu_with_too_little_memory_is_named(monkeypatch):
    said, need = announced(monkeypatch, 80e9)
    assert said == f"{need / 1e9:.2g} GB of memory at most" and need > 16 * 124e6
    for free, enough in ((need + 1, True), (need - 1, False)):
        said, _ = announced(monkeypatch, free - 1e9)
        assert ("--micro_batch" in said) != enough and (f"{free / 1e9:.2g} GB are free" in said) != enough
    assert announced(monkeypatch, 80e9, micro_batch=8)[1] < need < announced(monkeypatch, 80e9, micro_batch=0)[1]


def test_without_a_gpu_there_is_no_advice(monkeypatch):
    said, _ = announced(monkeypatch, 0, device="cpu")
    assert said.endswith("GB of memory at most")


def test_frozen_blocks_need_neither_gradients_nor_activations(monkeypatch):
    model = model_of("5M", "float32")
    cfg, examples = train_sft.Config(), [Example(Row("x:1", "x"), [0] * 10, [[0] * 10])]
    whole = compute.peak_bytes(cfg, examples, [model])
    model.h[:3].requires_grad_(False)
    frozen = sum(p.numel() for p in model.h[:3].parameters())
    assert compute.peak_bytes(cfg, examples, [model]) < whole - 12 * frozen


@pytest.mark.slow
def test_the_readme_has_the_table_that_the_command_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests/bench"))
    importlib.import_module("memory").main()
    assert capsys.readouterr().out in (ROOT / "minirlhf/running/README.md").read_text()
