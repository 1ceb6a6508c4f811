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
DTYPES = ("float32", "float32_exact", "bfloat16")


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
    T = max(map(len, sequences))                                # not lengths.max(), for which the host would wait
    ids = torch.tensor([list(ids) + [0] * (T - len(ids)) for ids in sequences], device=device)
    return ids, torch.arange(T, device=device) < lengths[:, None]


def left_pad(sequences, device="cpu"):
    """The same with the pads first, so that every response starts in the same column."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    T = max(map(len, sequences))
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


def bfloat16_copy(model):
    """A copy to sample from. Autocast would convert every matrix again for every token; the copy's are bfloat16."""
    copied = copy.deepcopy(model)
    for module in copied.h.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    return copied


# ---- memory ----------------------------------------------------------------------------------------------------------

def memory(cfg, examples, device, *models):
    """What the run will need, as text for the line that a script begins with: "4.1 GB of memory at most".

    cfg, examples, device, models: the script's. The policy is the first of PPO's models. If a GPU has less free, the
    text says so.
    """
    need = peak_bytes(cfg, examples, models)
    said = f"{need / 1e9:.2g} GB of memory at most"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
        if need > free:
            said += f", but {free / 1e9:.2g} GB are free: try a lower --micro_batch or --batch_size"
    return said


def peak_bytes(cfg, examples, models):
    """The most bytes of tensors at one time: in an optimizer step's largest micro-batch or, in PPO, in a rollout."""
    models = [model for model in models if isinstance(model, nn.Module)]            # a reward may be a function
    trained = {model: sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models}
    weights = sum(p.numel() for model in models for p in model.parameters())
    passes = [4 * n + pass_bytes(cfg, examples, model) for model, n in trained.items() if n]        # n gradients
    rollout = [rollout_bytes(cfg, examples, models[0])] if hasattr(cfg, "minibatches") else []
    return 4 * (weights + 2 * sum(trained.values())) + max(passes + rollout)        # Adam's two moments of each weight


def longest(cfg, examples):
    """Most tokens of a prompt, of a response, and of both together. PPO samples the responses."""
    prompts = [len(e.prompt) for e in examples]
    responses = [max(map(len, e.responses), default=getattr(cfg, "max_response", 0)) for e in examples]
    return max(prompts), max(responses), max(map(sum, zip(prompts, responses)))


def pass_bytes(cfg, examples, model):
    """What the forward pass of a micro-batch keeps for the way back, if the longest sequences meet in it (gpt2.py).

    With C = n_embd each block keeps per token, in the precision of the products, the inputs of its four matrices (C, C,
    C, 4C), queries, keys and values (3C) and the input of the GELU (4C), and in float32 the inputs of two layer norms.
    Attention over at most 256 positions also keeps its weights. Of the logits there are four copies at a time.
    """
    c, width = model.config, 2 if cfg.dtype == "bfloat16" else 4
    _, R, T = longest(cfg, examples)
    rows = min(cfg.micro_batch or cfg.batch_size, -(-cfg.batch_size // getattr(cfg, "minibatches", 1)))
    rows *= max([len(e.responses) for e in examples] + [1])                         # K answers are K sequences
    transformer = getattr(model, "transformer", model)
    blocks = [block for block in transformer.h if any(p.requires_grad for p in block.parameters())]
    attention = T * (c.n_head * (4 if width == 4 else 6) if T <= 256 else width)
    kept = rows * T * (len(blocks) * (c.n_embd * (8 + 14 * width) + attention) + 8 * c.n_embd)
    if width == 2:                                                                  # the matrices in bfloat16
        kept += 2 * sum(p.numel() for block in blocks for p in block.parameters())
    has_logits = transformer is model or getattr(cfg, "lm_coef", 0)
    return kept + has_logits * 4 * c.vocab_size * (4 * rows * R + c.n_embd)         # and the gradient of the head


def rollout_bytes(cfg, examples, policy):
    """The cache, and the largest of what comes and goes beside it.

    That is a second cache while finished rows leave, the pass over the prompts, or four copies of a token's logits.
    """
    c, width = policy.config, 2 if cfg.dtype == "bfloat16" else 4
    P, R, _ = longest(cfg, examples)
    cache = 2 * c.n_layer * c.n_embd * (P + R) * width
    prompts = P * (c.n_embd * (8 + 8 * width) + 3 * c.n_head * P * width)
    copied = width == 2 and 2 * sum(p.numel() for p in policy.h.parameters()) + 4 * c.vocab_size * c.n_embd
    return copied + cfg.batch_size * (cache + max(cache, prompts, 16 * c.vocab_size))


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
