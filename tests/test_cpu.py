"""Products on a CPU by oneDNN, against float64 and finite differences."""

import pytest
import torch

from minirlhf.running import cpu
from small_world import tiny_gpt2

on_wide_vectors = pytest.mark.skipif(not cpu.AVX512, reason="this processor has no AVX-512: F.linear is used as it is")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_linear(function, bias, shape=(3, 5, 24), O=17):
    """Values and gradients of a product against the same in float64, of transposed and frozen tensors too."""
    for frozen in ("", "x", "weight"):
        x, weight, b = randn(*shape), randn(shape[-1], O, seed=1).t(), randn(O, seed=2) if bias else None
        exact = [None if t is None else t.double() for t in (x, weight, b)]
        for name, *pair in zip(("x", "weight", "bias"), (x, weight, b), exact):
            for t in pair:
                if t is not None:
                    t.requires_grad_(name != frozen)
        y, expected, dy = function(x, weight, b), cpu.pytorch_linear(*exact), randn(*shape[:-1], O, seed=3)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        y.backward(dy)
        expected.backward(dy.double())
        for ours, theirs in zip((x, weight, b), exact):
            if ours is not None:
                assert (ours.grad is None) == (theirs.grad is None)
                if ours.grad is not None:
                    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias, shape", [(True, (3, 5, 24)), (False, (7, 24)), (True, (1, 1, 24))])
def test_linear_and_its_gradients_are_those_in_float64(bias, shape):
    check_linear(cpu.linear, bias, shape)


@on_wide_vectors
def test_float32_goes_to_onednn_and_nothing_else_does(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "product", lambda *tensors: calls.append(tensors) or cpu.pytorch_linear(*tensors))
    x, weight = randn(2, 4), randn(3, 4)
    cpu.linear(x, weight)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.linear(x, weight).dtype == torch.bfloat16
    assert cpu.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert cpu.linear(x.double(), weight.double()).dtype == torch.float64
    assert len(calls) == 1


@pytest.mark.parametrize("x, weight", [(randn(3, 5), randn(4, 6)), (randn(3, 5).double(), randn(4, 5))])
def test_what_does_not_fit_is_pytorchs_own_error(x, weight):
    with pytest.raises(RuntimeError):
        cpu.pytorch_linear(x, weight)
    with pytest.raises(RuntimeError):
        cpu.linear(x, weight)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5)])
def test_one_row_without_a_batch_and_no_rows_at_all(shape):
    x = randn(*shape).requires_grad_(True)
    y = cpu.linear(x, randn(4, 5))
    assert torch.equal(y, cpu.pytorch_linear(x, randn(4, 5)))
    y.sum().backward()
    assert x.grad.shape == x.shape


@on_wide_vectors
def test_fast_cpu_reaches_every_linear_layer_and_the_output_head(monkeypatch):
    """nn.Linear and the head, which is F.linear on the token embedding: both must find the replaced function."""
    model, calls = tiny_gpt2(), []
    monkeypatch.setattr(torch.nn.functional, "linear", cpu.pytorch_linear)     # put back at the end
    ids = torch.tensor([[1, 2, 3]])
    expected = model.logits(model(ids))
    cpu.fast_cpu()
    monkeypatch.setattr(cpu, "TRAINING", True)
    monkeypatch.setattr(cpu, "product", lambda *tensors: calls.append(tensors) or cpu.pytorch_linear(*tensors))
    ours = model.logits(model(ids))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4 * model.config.n_layer + 1
