"""Which numbers are in which precision, and what a GPU is asked for. There is no GPU here: torch.cuda is pretended."""

import re

import pytest
import torch
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

import train_ppo
import train_rm
import train_sft
from minirlhf import answers, health
from minirlhf import generate as sampling
from minirlhf.files.errors import UserError, run_main
from minirlhf.gpt2 import GPT2
from minirlhf.running import cpu
from minirlhf.running.device import sampling_copy, start
from minirlhf.weights import from_pretrained
from small_world import CPU, Networks, config, examples, letters_gpt2, ppo_flags, script_flags, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.set_float32_matmul_precision("highest")


def pretend_gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


# ---- the settings ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, dtype, precision", [
    ("cuda", "float32", "high"), ("cuda", "bfloat16", "high"), ("cuda", "float32_exact", "highest"),
    ("cpu", "float32", "highest"), ("cpu", "bfloat16", "highest")])
def test_float32_products_are_tf32_on_a_gpu_and_nowhere_else(monkeypatch, device, dtype, precision):
    pretend_gpu(monkeypatch)
    start(config(device=device, dtype=dtype))
    assert torch.get_float32_matmul_precision() == precision


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch):
    pretend_gpu(monkeypatch, capability=(7, 5))
    with pytest.raises(UserError, match="--dtype bfloat16: Some GPU .*--dtype float32"):
        start(config(device="cuda", dtype="bfloat16"))
    assert start(config(device="cuda", dtype="float32")).type == "cuda"
    pretend_gpu(monkeypatch, capability=(8, 0))
    assert start(config(device="cuda", dtype="bfloat16")).type == "cuda"


@torch.no_grad()
def test_exact_float32_is_plain_float32_on_a_cpu(world):
    plain, exact = (from_pretrained(world / "sft", dtype) for dtype in ("float32", "float32_exact"))
    ids = torch.arange(97, 107)[None]
    assert torch.equal(plain.logits(plain(ids)), exact.logits(exact(ids)))


# ---- the first ratio -------------------------------------------------------------------------------------------------

class TF32(TorchDispatchMode):
    """Products whose operands are rounded to the 10 bits of TF32, to nearest, ties to even."""

    OPERANDS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "_linear_pointwise": (0, 1)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args = list(args)
        for i in self.OPERANDS.get(function.overloadpacket.__name__, ()):
            bits = args[i].contiguous().view(torch.int32)
            args[i] = ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_tf32_lies_between_float32_and_bfloat16():
    """TF32 keeps 11 bits of 24, bfloat16 8: an eighth of its error. So the tolerance is an eighth of bfloat16's."""
    model, exact = letters_gpt2(), letters_gpt2().double()
    texts = [example.prompt for example in examples(40)]
    logprobs = lambda model: sampling.response_logprobs(model, texts, texts, CPU)[0]
    error = lambda: float((logprobs(model) - logprobs_exact).pow(2).mean().sqrt())
    logprobs_exact = logprobs(exact)
    plain = error()
    with TF32():
        middle = error()
    model.dtype = "bfloat16"
    coarse = error()
    print(f"errors of log-probabilities: float32 {plain:.2g}, TF32 {middle:.2g}, bfloat16 {coarse:.2g}")
    assert 100 * plain < middle and 4 * middle < coarse < 16 * middle


@pytest.mark.parametrize("dtype, precision, accepted, refused", [
    ("float32", "highest", 5e-4, 2e-3), ("float32", "high", 5e-3, 0.02), ("bfloat16", "high", 0.04, 0.06)])
def test_the_first_ratio_may_be_off_by_what_the_precision_allows(dtype, precision, accepted, refused):
    """Log-ratios of this size at every one of 10 tokens."""
    torch.set_float32_matmul_precision(precision)
    sums = lambda ratio: {"policy/approxkl": torch.tensor(10 * 0.5 * ratio**2), "policy/clipfrac": torch.tensor(0.0)}
    health.check_first_ratio(sums(accepted), torch.tensor(10), dtype)
    with pytest.raises(UserError, match="before the first update"):
        health.check_first_ratio(sums(refused), torch.tensor(10), dtype)


# ---- bfloat16 --------------------------------------------------------------------------------------------------------

def test_under_bfloat16_weights_logits_and_losses_stay_in_float32(world, monkeypatch):
    """Every call of some functions is watched, in all three scripts."""
    seen, clip, backward = set(), torch.nn.utils.clip_grad_norm_, torch.Tensor.backward

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            seen.add((name, result.dtype))
            return result
        monkeypatch.setattr(owner, name, watched)

    def watched_clip(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.update(("weight", x.dtype) for p in parameters for x in (p, p.grad))
        return clip(parameters, *args, **kwargs)

    watch(GPT2, "forward")
    watch(GPT2, "logits")
    monkeypatch.setattr(answers, "SAMPLES", 8)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (seen.add(("loss", loss.dtype)), backward(loss)))
    short = "--epochs", 1, "--dtype", "bfloat16"
    train_sft.main(script_flags(world, "s", "--data", f"{world}/demonstrations.jsonl", *short))
    train_rm.main(script_flags(world, "r", "--data", f"{world}/comparisons.jsonl", "--gold", "none", *short))
    train_ppo.main(ppo_flags(world, *short, out="p"))
    assert seen == {(name, torch.float32) for name in ("forward", "logits", "weight", "loss")}


def test_under_bfloat16_the_matrices_of_the_blocks_compute_in_it(monkeypatch):
    model, seen = letters_gpt2(), set()
    model.dtype = "bfloat16"
    for module in model.h.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, result: seen.add(result.dtype))
    model(torch.zeros(2, 5, dtype=torch.long))
    assert seen == {torch.bfloat16}


def test_under_bfloat16_the_sampler_holds_bfloat16_matrices_and_samples_from_float32_logits(monkeypatch):
    held, drawn = [], set()
    generate, sample_token = sampling.generate, sampling.sample_token
    monkeypatch.setattr(train_ppo, "generate", lambda model, *args: (held.append(model), generate(model, *args))[1])
    monkeypatch.setattr(sampling, "sample_token",
                        lambda logits, uniform: (drawn.add(logits.dtype), sample_token(logits, uniform))[1])
    networks = Networks(config(dtype="bfloat16"))
    dtypes = {name: p.dtype for name, p in held[0].named_parameters()}
    matrices = {name for name in dtypes if ".attn." in name or ".mlp." in name}
    assert {dtypes[name] for name in matrices} == {torch.bfloat16} and networks.rollout.response_mask.any()
    assert {dtype for name, dtype in dtypes.items() if name not in matrices} == drawn == {torch.float32}
    assert {p.dtype for p in networks.policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_to_sample_from_says_the_same_as_the_model(dtype, monkeypatch):
    """With oneDNN's order of the weights, where there is an AVX-512, and without; and one weight is computed."""
    model, ids = letters_gpt2(), torch.arange(12).view(2, 6)
    register_parametrization(model.h[0].mlp.c_fc, "weight", torch.nn.Tanh())
    model.dtype = dtype
    for product in (torch.nn.functional.linear, cpu.linear if cpu.AVX512 else torch.nn.functional.linear):
        monkeypatch.setattr(torch.nn.functional, "linear", product)
        copied = sampling_copy(model)
        with torch.no_grad():
            torch.testing.assert_close(copied.logits(copied(ids)), model.logits(model(ids)), rtol=1e-5, atol=1e-5)


# ---- errors of PyTorch that become one line ----------------------------------------------------------------------------

CUDA = ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.00 GiB is "
        "free. Including non-PyTorch memory, this process has 78.00 GiB in use.\nSee the documentation.")
MPS = "MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 2 GB on private pool. Use x."


def raises(error):
    raise error


def infinite_gradient():
    weight = torch.nn.Parameter(torch.ones(2))
    (weight * float("inf")).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("main, said", [
    (lambda: raises(torch.OutOfMemoryError(CUDA)), "CUDA out of memory. Tried to allocate 20.00 GiB. A lower --micro_batch"),
    (lambda: raises(RuntimeError(MPS)), "Tried to allocate 2 GB on private pool. A lower --micro_batch"),
    (lambda: torch.empty(2**50), "you tried to allocate .* bytes.* A lower --micro_batch"),
    (infinite_gradient, "the gradient is not finite. A lower --lr")])
def test_memory_that_runs_out_and_a_gradient_that_is_not_finite_are_one_line_that_says_what_to_do(main, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.count("\n") == 1 and not out
    assert re.match(f"error: .*{said}", err)


def test_another_error_of_pytorch_is_not_hidden():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_main(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
