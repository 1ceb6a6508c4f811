"""A device that does not exist: what runs on it shows, without a GPU, what would go wrong on one.

Its tensors hold ordinary CPU tensors, so the numbers are real. As on a GPU, an operation that mixes them with tensors
of the CPU is an error. Copies from one to the other are allowed, and so are indices on the CPU and zero-dimensional
tensors. The device counts how often the host waits for it, and can refuse float64, which MPS does not have.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")            # once for the whole process
DEVICE, CPU, aten = torch.device("pretended:0"), torch.device("cpu"), torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# The host reads a value, or has to know the values to know the size of the result.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim,
         aten.unique_consecutive, aten.bincount, aten.repeat_interleave}


class Pretended(torch.Tensor):
    """A tensor of the device; `inner` is the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                   dtype=inner.dtype, device=DEVICE)

    def __init__(self, inner):
        self.inner = inner

    def __reduce_ex__(self, protocol):                          # torch.save writes it as the CPU tensor that it is
        return self.inner.__reduce_ex__(protocol)

    def tolist(self):                                           # PyTorch refuses it to subclasses
        return self.cpu().tolist()

    def __format__(self, spec):                                 # likewise
        return format(self.item(), spec)

    def __repr__(self):
        return f"pretended {self.inner}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} on a pretended tensor, outside of `with PretendedDevice()`")


class PretendedDevice(TorchDispatchMode):
    """`with PretendedDevice() as device:` executes what is done to pretended tensors.

    waits: a Counter, {what the host waited for: how often}; sent: how many tensors it copied to the device; operations:
    all that ran on the device.
    """

    def __init__(self, float64=True):
        super().__init__()
        self.float64, self.waits, self.sent, self.operations = float64, Counter(), 0, set()

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)               # torch.tensor(..., device=...) copies, where we see it
        return super().__enter__()

    def __exit__(self, *raised):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves, structure = tree_flatten((args, kwargs or {}))
        made_here = any(isinstance(x, torch.device) and x.type == DEVICE.type for x in leaves)
        own = {id(x.inner): x for x in leaves if isinstance(x, Pretended)}
        if not own and not made_here:
            return function(*args, **kwargs or {})
        others = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Pretended)]
        copied = function.overloadpacket in COPIES
        to_cpu = not made_here and (CPU in leaves or copied and not isinstance(args[0], Pretended))
        if not copied:
            self.check(function, args, others)
        self.count(function, args, others, to_cpu)
        inner = [x.inner if isinstance(x, Pretended) else CPU if isinstance(x, torch.device) else x for x in leaves]
        args, kwargs = tree_unflatten(inner, structure)
        result = function(*args, **kwargs)
        return result if to_cpu else tree_map_only(torch.Tensor, lambda x: self.wrap(function, x, own), result)

    def check(self, function, args, others):
        """RuntimeError for an operation that a GPU would refuse."""
        indices = args[1] if function.overloadpacket in INDEXED and isinstance(args[0], Pretended) else ()
        for x in others:
            if x.dim() and not any(x is index for index in indices):
                raise RuntimeError(f"{function}: a CPU tensor of shape {tuple(x.shape)} among those of the device")

    def count(self, function, args, others, to_cpu):
        packet = function.overloadpacket
        indices = args[1] if packet in INDEXED else ()
        masked = any(isinstance(index, Pretended) and index.dtype == torch.bool for index in indices)
        if to_cpu or masked or packet in WAITS:                 # an index that is a mask counts its True values first
            self.waits[packet.__name__] += 1
        self.sent += sum(x.dim() > 0 for x in others if not to_cpu)
        self.operations.add(str(function).removeprefix("aten.").removesuffix(".default"))

    def wrap(self, function, x, own):
        if x.dtype == torch.float64 and not self.float64:
            raise RuntimeError(f"{function}: float64, which this device does not have")
        return own[id(x)] if id(x) in own else Pretended(x)     # in place: the same tensor again
