"""What makes PyTorch fast on a CPU. Reading the model you may take Linear and linear for nn.Linear and F.linear.

1. Products. PyTorch hands a float32 product to MKL, which on processors that are not Intel's leaves half the width of an
   AVX-512 vector idle. oneDNN, which PyTorch brings along for bfloat16, uses all of it. Both are plain float32.
2. Memory. A fresh tensor costs a page fault for each 4 KB that is written first, which can take ten times as long as the
   writing. In huge pages of 2 MB it does not; Linux gives them to who asks, and PyTorch asks if this variable is set.
"""

import contextlib
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")              # read when the first tensor is made: this import comes before
WIDE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x, weight, bias=None):
    """x (..., I), weight (O, I), bias (O,) or None -> x weight^T + bias (..., O). "mkldnn" is the old name of oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


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
        return (product(dy, weight.t()) if ctx.needs_input_grad[0] else None,
                product(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None,
                rows.sum(dim=0) if ctx.needs_input_grad[2] else None)


def linear(x, weight, bias=None):
    """F.linear: x (..., I), weight (O, I), bias (O,) or None -> (..., O)."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    # One column gains nothing; of what does not fit F.linear knows what to say.
    fits = x.dim() > 1 and x.numel() > 0 and x.shape[-1] == weight.shape[1] and len(weight) > 1
    wide = WIDE and plain and fits and not torch.is_autocast_enabled("cpu")
    return OneDNN.apply(x, weight, bias) if wide else F.linear(x, weight, bias)


def linear32(x, weight, bias=None):
    """The same in float32 (in float64 if x is), whatever the dtypes and autocast say: for results whose bits count."""
    x, weight, bias = (t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, weight, bias))
    available = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if available else contextlib.nullcontext():
        return linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)
