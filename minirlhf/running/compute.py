"""How the three scripts compute, apart from RLHF: seeds and batches, device and precision, several processes, the optimizer."""

import atexit
import contextlib
import copy
import os
import sys

import torch
import torch.distributed as dist
import torch.nn as nn

from minirlhf.running.errors import UserError


# ---- seeds, batches, device, precision -------------------------------------------------------------------------------

def generator(*numbers):
    """A CPU generator for (seed, purpose, step, ...). Nothing draws from a global stream, so a draw depends on its own
    numbers only: not on what ran before, and a resumed run needs no saved state of the generator."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(mixed)


def epoch_batch(items, size, step, *numbers):
    """The batch of this step, and whether it is the last of its pass over the items; every pass is a fresh permutation
    seeded by the numbers and the pass. The last batch of a pass may be smaller."""
    n_batches = -(-len(items) // size)
    epoch, position = divmod(step, n_batches)
    order = torch.randperm(len(items), generator=generator(*numbers, epoch))
    return [items[i] for i in order[position * size:(position + 1) * size]], position == n_batches - 1


def in_parts(rows, size):
    """Micro-batches: a list cut into lists of `size` rows, or in one piece if size is 0."""
    size = size or max(len(rows), 1)
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def pick_device(name):
    """cuda, then mps, then cpu; a name overrides. Of several processes each takes the GPU with its own number."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: must be cuda, mps or cpu")
    return device


def precision(device, dtype):
    """float32, or autocast to bfloat16 for the forward passes; parameters, losses and optimizer stay in float32."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, not {dtype}")
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def bfloat16_copy(model):
    """A copy to sample from under autocast, which would cast every matrix for every token: those of the blocks are bfloat16.

    It is as near to the model as autocast is, about 0.01 nats a token; what needs the exact log-probabilities computes them anew.
    """
    copied = copy.deepcopy(model)
    for module in copied.h.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    return copied


def eos_of(config, tokenizer):
    """The token that ends a response: the tokenizer's EOS, unless --stop_token says otherwise."""
    return tokenizer.eot_token if config.stop_token < 0 else config.stop_token


# ---- several processes -----------------------------------------------------------------------------------------------
# torchrun --nproc_per_node=N train_*.py. Each process holds all networks, draws the same batches and the same random
# numbers, and works on every N-th row of a batch. What they find is added up before it is used, so each knows the whole
# batch and takes the same step: N processes do what one does. Alone, all of this is nothing.

def ranks():
    """Which process this is and how many there are: (0, 1) unless torchrun started it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device):
    """If torchrun started this process, it meets the others here. Returns the device."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if ranks()[0] > 0:
            sys.stdout = open(os.devnull, "w")                  # only process 0 talks
    return device


def share(rows):
    """The rows of a batch, a list or a tensor, that this process works on."""
    rank, n = ranks()
    return rows[rank::n]


def check_shares(n_rows, batch_size, minibatches):
    """UserError if a minibatch, those of the last batch of a pass included, would have fewer rows than there are processes."""
    smallest = (n_rows % batch_size or batch_size) // minibatches
    if smallest < ranks()[1] > 1:
        raise UserError(f"{n_rows} rows in batches of {batch_size} leave minibatches of {smallest} for {ranks()[1]} processes: "
                        "start fewer of them, or choose another --batch_size or --minibatches")


def all_sum(x):
    """A tensor, added up over all processes in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_gradients(model):
    """Adds up the gradients of all processes, in one message; call after the last micro-batch. One without rows adds zeros."""
    if dist.is_initialized():
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        whole = all_sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        for parameter, part in zip(parameters, whole.split([parameter.numel() for parameter in parameters])):
            parameter.grad.copy_(part.view_as(parameter))


def spread(function, size, *tensors):
    """function over the rows of tensors (B, ...), each process its share, `size` rows at a time so that memory does not
    grow with the batch -> (B, ...) numbers, known to all processes."""
    mine = torch.cat([function(*chunk) for chunk in zip(*(share(tensor).split(size) for tensor in tensors))])
    rank, n = ranks()
    if n == 1:
        return mine
    whole = mine.new_zeros(len(tensors[0]), *mine.shape[1:])
    whole[rank::n] = mine
    return all_sum(whole)


# ---- the optimizer ---------------------------------------------------------------------------------------------------

def freeze(model, share):
    """Freezes the embeddings and the first `share` of the blocks, and returns the parameters that are left to train.

    A 6B model fits one GPU this way; a small one keeps what it knows. share 0 freezes nothing.
    """
    body = getattr(model, "transformer", model)
    frozen = round(share * len(body.h))
    if share:
        model.requires_grad_(False)
        for part in (*body.h[frozen:], body.ln_f, getattr(model, "score", None), getattr(body, "lm_head", None)):
            if part is not None:
                part.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def memory(*models):
    """GB of weights, gradients and Adam's two moments in float32: 16 bytes a parameter that trains, 4 one that does not."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in parameters) / 1e9


def set_lr(optimizer, lr, step, steps, warmup=0):
    """Linear warm-up over the first `warmup` steps, then linearly to 0 at `steps` (A, B: linear decay)."""
    factor = min((step + 1) / warmup, 1.0) if warmup else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr * factor * (1 - step / steps)


def set_tf_epsilon(optimizer, eps):
    """TensorFlow's Adam divides by sqrt(v) + eps before the bias correction of v, PyTorch's after it. They are equal when
    PyTorch's eps is eps / sqrt(1 - beta2^t); without it early updates are several times larger (B). Call before step()."""
    t = 1 + max((int(state["step"]) for state in optimizer.state.values()), default=0)
    for group in optimizer.param_groups:
        group["eps"] = eps / (1 - group["betas"][1] ** t) ** 0.5
