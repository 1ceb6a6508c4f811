"""What makes PyTorch fast on a CPU: one call, fast_cpu(). The models use nn.Linear and F.linear and need no change.

1. Products. PyTorch hands a float32 product to MKL, which on processors that are not Intel's leaves half the width of
   an AVX-512 vector idle. oneDNN, which PyTorch brings along for bfloat16, uses all of it. Both are plain float32.
   In training this pays where the processor computes 512 bits at once, which AMD's do from Zen 5 on. On others the
   gradients of oneDNN are slower than MKL's, so that it is used only where no gradient is needed.
2. Memory. A fresh tensor costs a page fault for each 4 KB that is written first, which can take ten times as long as
   the writing. Huge pages of 2 MB avoid that. PyTorch asks for them if THP_MEM_ALLOC_ENABLE is set before its first
   tensor.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

pytorch_linear = F.linear
# x (..., I), weight (O, I), bias (O,) or None -> x weight^T + bias (..., O). "mkldnn" is oneDNN's old name.
product = functools.partial(torch.ops.mkldnn._linear_pointwise, attr="none", scalars=[], algorithm="")
AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def is_zen5(cpuinfo="/proc/cpuinfo"):
    """True if Linux says that this is an AMD processor of family 26 (Zen 5) or later."""
    lines = Path(cpuinfo).read_text().splitlines() if Path(cpuinfo).exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    return fields.get("vendor_id") == "AuthenticAMD" and int(fields.get("cpu family", 0)) >= 26


TRAINING = is_zen5()        # oneDNN also where a gradient is needed


def fast_cpu():
    """Replaces F.linear, which nn.Linear calls too, by oneDNN's product where that is faster."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if AVX512:
        F.linear = linear


def packed(weight):
    """The weight (O, I), where oneDNN is used in the order in which it reads it, for products without a gradient."""
    if F.linear is not linear or weight.device.type != "cpu":
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 32)     # best for 32 rows, and good for others


def linear(x, weight, bias=None):
    """F.linear: x (..., I), weight (O, I) as it is or packed, bias (O,) or None -> (..., O)."""
    if weight.is_mkldnn:
        return product(x.to(weight.dtype), weight, bias if bias is None else bias.to(weight.dtype))
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    # One output column gains nothing. PyTorch's own function reports operands that do not fit.
    fits = x.dim() > 1 and x.numel() > 0 and x.shape[-1] == weight.shape[1] and len(weight) > 1
    if not plain or not fits or torch.is_autocast_enabled("cpu"):
        return pytorch_linear(x, weight, bias)
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return product(x, weight, bias)
    return OneDNN.apply(x, weight, bias) if TRAINING else pytorch_linear(x, weight, bias)


class OneDNN(torch.autograd.Function):
    """y = x W^T + b, and its gradients: dx = dy W, dW = dy^T x, db = the sum of dy. A second derivative is an error."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)                                                                    # (N, O)
        return (product(dy, weight.t(), None) if ctx.needs_input_grad[0] else None,
                product(rows.t(), x.flatten(0, -2).t(), None) if ctx.needs_input_grad[1] else None,
                rows.sum(dim=0) if ctx.needs_input_grad[2] else None)
