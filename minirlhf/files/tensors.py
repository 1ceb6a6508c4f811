"""Files of named tensors, read and written by hand: model.safetensors, in one piece or several, and pytorch_model.bin.

A safetensors file is 8 bytes with the length of its header (little-endian), the header, and the numbers. The header is
JSON: {name: {"dtype": "F32", "shape": [...], "data_offsets": [start, end]}}, with offsets counted from its end.

What is read here may have been written by anyone. Every offset and size is checked against the length of the file
before it is used, nothing in a file is ever executed, and a file in which something is off gives no tensors at all.
"""

import collections
import contextlib
import itertools
import json
import math
import mmap
import os
import pickle
import zipfile
from pathlib import Path

import torch

from minirlhf.running.errors import UserError, shown

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}   # those that weights may have
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def strict_json(data):
    """Bytes -> the value they are in JSON and UTF-8. ValueError says what is wrong, a key that is there twice included:
    json.loads would silently keep the last."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_key_twice)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def no_key_twice(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        (name, _), = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f'"{name}" is there twice')
    return values


def read_json(file, data=None):
    """A file that holds one JSON object (or the bytes of one, from that file) -> dict."""
    try:
        values, problem = strict_json(file.read_bytes() if data is None else data), "a list or a single value"
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: a model folder has config.json and model.safetensors") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        values, problem = None, error
    if not isinstance(values, dict):
        raise UserError(f"{file}: damaged, no JSON object where one belongs ({problem}); fetch or export it again")
    return values


def read_tensors(folder):
    """All tensors of a model folder: {name: (tensor, file)}, views of the files, not yet copied to memory."""
    readers = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_pickle}
    for name, read in readers.items():
        index = folder / f"{name}.index.json"
        if not (folder / name).exists() and not index.exists():
            continue
        tensors = {}
        for file in [folder / name] if (folder / name).exists() else shards(index):
            for tensor_name, tensor in read(file).items():
                if tensor_name in tensors:
                    raise UserError(f"{file}: tensor {tensor_name} is in {tensors[tensor_name][1]} too")
                tensors[tensor_name] = tensor, file
        return tensors
    raise UserError(f"{folder}: no weights: neither {' nor '.join(readers)}, nor an .index.json of theirs")


def shards(index):
    """The files of a model in several pieces, from its index: {"weight_map": {tensor: file}}."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: has no weight_map; fetch it again")
    names = sorted(set(map(str, names.values())))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index}: names the file {name}, which is not in the folder; fetch it too")
    return [index.parent / name for name in names]


def read_safetensors(file):
    """{name: tensor} of one .safetensors file. The tensors must tile it: no gap, no overlap, nothing after the last."""
    if not file.is_file():
        raise UserError(f"{file}: is not a file")
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size <= 8 or length > size - 8:
            raise UserError(f"{file}: cut off or no safetensors: a header of {length} in {size} bytes; fetch again")
        header = read_json(file, f.read(length))
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)        # "copy": nothing is ever written to the file
    header.pop("__metadata__", None)
    size, expected, tensors = size - 8 - length, 0, {}
    for start, end, name, dtype, shape in sorted(layout(file, name, entry) for name, entry in header.items()):
        if start != expected:
            raise UserError(f"{file}: tensor {name} begins at {start}, the one before ends at {expected}; fetch again")
        if end > size:
            raise UserError(f"{file}: cut off: tensor {name} ends at byte {end}, the file at {size}; fetch it again")
        expected = end
        if dtype in DTYPES and start < end:
            flat = torch.frombuffer(data, dtype=DTYPES[dtype], count=math.prod(shape), offset=8 + length + start)
            tensors[name] = flat.view(shape)
        else:
            tensors[name] = torch.empty(0, dtype=torch.bool, device="meta")         # for the caller to skip or refuse
    if expected != size:
        raise UserError(f"{file}: the last {size - expected} bytes belong to no tensor; fetch it again")
    return tensors


def layout(file, name, entry):
    """One entry of the header -> (start, end, name, dtype, shape), once they are known to agree with each other."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        agree = type(shape) is list and len(shape) <= 64                        # as many as torch can handle
        agree = agree and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
        agree = agree and end - start == math.prod(shape) * SIZES[dtype]
    except (KeyError, TypeError, ValueError):
        agree = False
    if not agree:
        raise UserError(f"{file}: tensor {name}: its dtype, shape and offsets do not agree: {shown(entry)}")
    return start, end, name, dtype, shape


def read_pickle(file):
    """{name: tensor} of one pytorch_model.bin. weights_only: a pickle can carry code, and none of it is run."""
    try:
        zipped = zipfile.is_zipfile(file)           # as torch writes since 1.6; only these can be mapped into memory
        if zipped and sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()) > file.stat().st_size:
            raise UserError(f"{file}: is compressed, which torch.save never does; not read")
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: damaged, or more in it than tensors, which can be code; nothing was read") from None
    except UserError:
        raise
    except Exception as error:                      # a damaged file fails in many ways inside torch
        raise UserError(f"{file}: cut off or damaged ({type(error).__name__}); fetch it again") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{file}: holds a {type(tensors).__name__}, not a dict of tensors")
    for name, t in tensors.items():
        plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu"
        if not plain or type(name) is not str:
            raise UserError(f"{file}: {name} is a {type(t).__name__} and not an ordinary tensor")
    return tensors


def write_safetensors(file, tensors):
    """{name: tensor} -> one file, whole or not at all, in the dtypes the tensors have."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.itemsize
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)             # so that the numbers begin at a multiple of 8
    body = (t.detach().cpu().contiguous().view(torch.uint8).numpy() for t in tensors.values())
    write_whole(file, itertools.chain([len(header).to_bytes(8, "little"), header], body))


def write_whole(file, parts):
    """Pieces of bytes -> file, whole or not at all."""
    with whole_file(file) as f:
        f.writelines(parts)


@contextlib.contextmanager
def whole_file(file, previous=None):
    """A file to write bytes to that gets its name when all of it is on the disk: a crash, or a disk that is full, leaves
    the old one as it was. `previous` is another name that the old one then goes by. UserError if it cannot be written.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if previous and file.exists():
            os.replace(file, previous)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:                    # torch.save makes a RuntimeError of a disk that is full
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        first = error
        while not isinstance(first, OSError) and first.__context__:
            first = first.__context__
        reason = getattr(first, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{file} cannot be written: {reason}; what was there before is whole") from None
