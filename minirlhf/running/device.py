"""The device and its precision, and the other processes that torchrun started."""

import atexit
import copy
import functools
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minirlhf.files.errors import require
from minirlhf.running.cpu import fast_cpu, packed
from minirlhf.running.processes import is_first

DEVICES = ("cuda", "mps", "cpu")
DTYPES = ("float32", "float32_exact", "bfloat16")


def pick_device(name):
    """The device of this name; without a name cuda, mps or cpu, whichever there is first."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(device for device in DEVICES if available[device])
    require(name in DEVICES, f"--device {name}: must be one of {', '.join(DEVICES)}")
    require(available[name],
            f"--device {name}: there is none here. Leave --device out, or install a PyTorch that has it")
    if name == "cpu":
        fast_cpu()
    if name == "cuda":                                          # of several processes each takes its own GPU
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


def start(cfg):
    """Checks --dtype and --minibatches, picks the device, and meets the other processes that torchrun started."""
    require(cfg.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, not {cfg.dtype}")
    device = pick_device(cfg.device)
    set_precision(device, cfg.dtype)
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if not is_first():
            sys.stdout = open(os.devnull, "w")                  # only the first process prints
    processes, minibatches = dist.get_world_size() if dist.is_initialized() else 1, getattr(cfg, "minibatches", 0)
    require(minibatches * processes <= cfg.batch_size,
            f"--batch_size {cfg.batch_size} is too few for --minibatches {minibatches}: each minibatch needs "
            f"a row for each of {processes} process{'es' * (processes > 1)}")
    return device


def set_precision(device, dtype):
    """On a GPU products of float32 matrices run in TF32, several times as fast. "float32_exact" does without.

    TF32 reads numbers with 10 bits after the point, where bfloat16 has 7 and float32 has 23. Sums are in float32.
    """
    on_gpu = device.type == "cuda"
    torch.set_float32_matmul_precision("high" if on_gpu and dtype != "float32_exact" else "highest")
    if on_gpu and dtype == "bfloat16":
        require(torch.cuda.get_device_capability(device) >= (8, 0),
                f"--dtype bfloat16: {torch.cuda.get_device_name(device)} is older than Ampere and cannot compute in "
                "bfloat16. Use --dtype float32")


def sampling_copy(model):
    """A copy of a language model to sample from, in which every matrix is prepared once, and not again for every token.

    Under bfloat16 the matrices of the blocks are converted. On a CPU they are put into the order in which oneDNN reads
    them. All other parameters are shared with the model.
    """
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    for module in copied.h.modules():
        if isinstance(module, torch.nn.Linear):
            weight, bias = packed(module.weight.detach().to(dtype)), module.bias
            bias = bias if bias is None else torch.nn.Parameter(bias.detach().to(dtype), requires_grad=False)
            if "weight" not in dict(module.named_parameters(recurse=False)):    # computed from others, as LoRA's is
                module.forward = functools.partial(F.linear, weight=weight, bias=bias)
                continue
            module.weight, module.bias = torch.nn.Parameter(weight, requires_grad=False), bias
    return copied
