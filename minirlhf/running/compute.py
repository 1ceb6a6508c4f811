"""How the scripts compute, apart from RLHF: seeds and batches, the device, several processes, the optimizer step."""

import atexit
import copy
import math
import os
import sys

from minirlhf.running.cpu import fast_cpu     # before torch: it sets how threads wait

import torch
import torch.distributed as dist
import torch.nn as nn

from minirlhf.running.errors import UserError, require

DEVICES = ("cuda", "mps", "cpu")


# ---- seeds and batches -----------------------------------------------------------------------------------------------

ORDER, NORMALISE, SAMPLE, MINIBATCH = 2, 3, 4, 5       # what a draw is for, so that no two kinds share a stream


def generator(*numbers):
    """A CPU generator seeded by (seed, purpose, step, ...).

    Nothing draws from a global stream. A draw depends on its own numbers and not on what ran before, so a resumed run
    needs no saved generator state.
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(mixed)


def batch_at(items, size, step, *numbers):
    """The batch of this step: `size` items from an endless stream of permutations, one per pass, seeded by numbers."""
    rows = range(step * size, (step + 1) * size)
    order = {epoch: torch.randperm(len(items), generator=generator(*numbers, epoch))
             for epoch in {row // len(items) for row in rows}}
    return [items[order[row // len(items)][row % len(items)]] for row in rows]


def in_parts(rows, size):
    """Micro-batches: a list cut into lists of `size` rows, or in one piece if size is 0."""
    size = size or max(len(rows), 1)
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def right_pad(sequences, device="cpu"):
    """B lists of ids -> ids (B, T) int64 and mask (B, T) bool, T being the longest."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    T = int(lengths.max())
    ids = torch.tensor([list(ids) + [0] * (T - len(ids)) for ids in sequences], device=device)
    return ids, torch.arange(T, device=device) < lengths[:, None]


def left_pad(sequences, device="cpu"):
    """The same with the pads first, so that every response starts in the same column."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    T = int(lengths.max())
    ids = torch.tensor([[0] * (T - len(ids)) + list(ids) for ids in sequences], device=device)
    return ids, torch.arange(T, device=device) >= T - lengths[:, None]


def response_mask(mask, prompt_lengths):
    """mask (B, T) of a right-padded batch -> (B, T), True at the tokens of the response only."""
    lengths = torch.tensor(prompt_lengths, device=mask.device)
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= lengths[:, None])


# ---- device ----------------------------------------------------------------------------------------------------------

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
    require(cfg.dtype in ("float32", "bfloat16"), f"--dtype must be float32 or bfloat16, not {cfg.dtype}")
    device = pick_device(cfg.device)
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


def bfloat16_copy(model):
    """A copy to sample from. Autocast would convert every matrix again for every token; the copy's are bfloat16."""
    copied = copy.deepcopy(model)
    for module in copied.h.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    return copied


def memory(*models):
    """GB of weights, gradients and Adam's two moments in float32: 16 bytes per trained parameter, 4 per frozen one."""
    parameters = [parameter for model in models if isinstance(model, nn.Module) for parameter in model.parameters()]
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in parameters) / 1e9


# ---- several processes -----------------------------------------------------------------------------------------------
# torchrun --nproc_per_node=N train_*.py. Each process holds all networks and works on its own shard of every batch.
# Gradients and means are summed over processes, so all of them take the same step. With one process these are no-ops.

def is_first():
    """True in the one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shard(rows):
    """The rows of a batch (a list or a tensor) that belong to this process."""
    return rows[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else rows


def all_sum(x):
    """A tensor, summed over all processes in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_gradients(parameters):
    """Sums the gradients of all processes, in one message. A process without rows adds zeros."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    total = all_sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for parameter, gradient in zip(parameters, total.split([parameter.numel() for parameter in parameters])):
        parameter.grad.copy_(gradient.view_as(parameter))


# ---- the optimizer step ----------------------------------------------------------------------------------------------

def step(model, optimizer, lr, where, max_grad_norm=1.0):
    """One optimizer step on the gradients of all processes, scaled down to max_grad_norm if they are longer.

    Raises UserError before a NaN or an infinity reaches a weight; `where` begins its message.
    """
    if dist.is_initialized():
        sum_gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if not math.isfinite(norm):
        raise UserError(f"{where}: the gradient is {norm}. A lower learning rate may help")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
