"""Several processes: torchrun --nproc_per_node=N train_*.py.

Each process holds all networks and works on its own shard of every batch. Gradients and means are summed over the
processes, so that all of them take the same step. With one process every function here does nothing.
"""

import torch
import torch.distributed as dist


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


def sum_gradients(model):
    """Sums the gradients of all processes, in one message. A process without rows adds zeros."""
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    total = all_sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for parameter, gradient in zip(parameters, total.split([parameter.numel() for parameter in parameters])):
        parameter.grad.copy_(gradient.view_as(parameter))
