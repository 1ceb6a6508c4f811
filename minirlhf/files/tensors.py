"""Reading, checking and writing the files of a model by hand: config.json and its weights.

The weights are model.safetensors or pytorch_model.bin, in one file or several.

A safetensors file is 8 bytes with the length of its header (little-endian), the header, and the numbers. The header is
JSON: {name: {"dtype": "F32", "shape": [...], "data_offsets": [start, end]}}. Offsets count from the end of the header.

A file may come from anyone. So every offset and size is checked against the length of the file before it is used, and
nothing in a file is ever executed. A file with anything wrong in it is refused as a whole.
"""

import dataclasses
import itertools
import json
import math
import mmap
import pickle
import zipfile

import torch

from minirlhf.files.errors import UserError, require, shown
from minirlhf.files.json_files import json_object, read_json, write_whole

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}       # the types that weights can have
# Bytes of one number. Files can also hold types that are not weights.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# What config.json can ask for, each with the only value that our code implements. It is also the default.
IMPLEMENTED = {"activation_function": "gelu_new", "n_inner": None, "scale_attn_weights": True,
               "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "add_cross_attention": False}
LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
         "rope_interleaved": False, "head_dim": None, "layer_types": None}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
GPT2_TOKENS = 50257
TOO_LARGE = 2 ** 29         # with sizes below this no matrix of a model has 2 ** 63 bytes, which PyTorch cannot count


# ---- reading tensors -------------------------------------------------------------------------------------------------

def read_tensors(folder, rename):
    """All tensors of a model folder: {name: (tensor, file)}. They are views of the files, not yet copied to memory.

    rename(the name in a file) gives the name to use, or None for a tensor to skip.
    """
    tensors = {}
    for file, read in weight_files(folder):
        for name_in_file, tensor in read(file).items():
            name = rename(name_in_file)
            require(name not in tensors, f"{file}: tensor {name} is there twice, here or in another file of the model")
            if name is not None:
                tensors[name] = tensor, file
    return tensors


def weight_files(folder):
    """[(file, the function that reads it)] of a model folder. Large models are split into several files."""
    for pattern, read in (("model.safetensors", read_safetensors), ("model-*.safetensors", read_safetensors),
                          ("pytorch_model.bin", read_pickle), ("pytorch_model-*.bin", read_pickle)):
        if files := [file for file in sorted(folder.glob(pattern)) if file.is_file()]:
            return [(file, read) for file in files]
    raise UserError(f"{folder}: no weights: neither model.safetensors nor pytorch_model.bin, in one file or several")


def read_safetensors(file):
    """{name: tensor} of one .safetensors file. The tensors must fill it: no gap, no overlap, nothing at the end."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        require(size > 8 and length <= size - 8,
                f"{file}: cut off, or not safetensors: a header of {length} bytes in {size}. Download it again")
        header = json_object(f.read(length), file, "header")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)        # changes to the tensors never reach the file
    header.pop("__metadata__", None)
    nothing = torch.empty(0, dtype=torch.bool, device="meta")           # to be skipped or refused by the caller
    body, tensors, expected = 8 + length, dict.fromkeys(header, nothing), 0
    for start, end, name, dtype, shape in sorted(layout(file, name, entry) for name, entry in header.items()):
        require(start == expected and body + end <= size,
                f"{file}: cut off or damaged: tensor {name} has the bytes {start} to {end}, but the one before it ends "
                f"at {expected} and the file at {size - body}. Download it again")
        expected = end
        if dtype in DTYPES and start < end:
            flat = torch.frombuffer(data, dtype=DTYPES[dtype], count=math.prod(shape), offset=body + start)
            tensors[name] = flat.view(shape)
    require(body + expected == size,
            f"{file}: the last {size - body - expected} bytes belong to no tensor. Download it again")
    return tensors


def layout(file, name, entry):
    """An entry of the header -> (start, end, name, dtype, shape), which must agree with each other."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if (
                dtype in SIZES and len(shape) <= 64             # as many dimensions as PyTorch can have
                and all(type(n) is int and 0 <= n < 2**63 for n in [*shape, start, end])
                and end - start == math.prod(shape) * SIZES[dtype]):
            return start, end, name, dtype, shape
    raise UserError(f"{file}: tensor {name}: dtype, shape and offsets do not agree: {shown(entry)}")


def read_pickle(file):
    """{name: tensor} of one pytorch_model.bin. A pickle can contain code. With weights_only none of it is executed."""
    try:
        zipped = zipfile.is_zipfile(file)           # PyTorch's format since 1.6, and the only one that mmap can read
        if zipped and sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()) > file.stat().st_size:
            raise zipfile.BadZipFile                # compressed: torch.save never does this, and it could be a bomb
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: damaged, or more in it than tensors, which can be code; nothing was read") from None
    except Exception as error:                      # a damaged file fails in many ways inside torch.load
        raise UserError(f"{file}: cut off or damaged ({type(error).__name__}). Download it again") from None
    require(isinstance(tensors, dict), f"{file}: holds a {type(tensors).__name__}, not a dict of tensors")
    for name, x in tensors.items():
        # Dense, on the CPU, and with all its numbers in the file, not one number expanded to a huge shape.
        ordinary = (isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu"
                    and x.numel() * x.itemsize <= x.untyped_storage().nbytes())
        require(type(name) is str and ordinary,
                f"{file}: {name} is a {type(x).__name__}, not an ordinary tensor with a name")
    return tensors


# ---- checking: config.json asks only for what our code implements, and the tensors fit it ----------------------------

def read_config(file, config_classes, max_layers, n_tokens=None):
    """config.json -> an instance of the class in config_classes, {"gpt2": class, ...}, that its "model_type" names.

    max_layers is the number of tensors: without it, an absurd n_layer could keep the caller busy for hours. n_tokens:
    of the tokenizer in the folder, None if there is none.
    """
    values = read_json(file)
    kind = values.get("model_type")
    require(kind in list(config_classes),
            f"{file}: model_type is {shown(kind)}, but it must be {' or '.join(config_classes)}")
    is_llama, fields = kind in ("llama", "qwen2"), config_classes[kind].__dataclass_fields__
    values |= rope(values, file) if is_llama else {}
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    require(not missing, f"{file}: {', '.join(missing)} is missing")
    config = config_classes[kind](**{name: values[name] for name in fields if name in values})
    for name, field in fields.items():
        value = getattr(config, name)
        require(field.type not in (int, float) or name == "n_tokens"
                or type(value) in (int, field.type) and 0 < value < TOO_LARGE,
                f"{file}: {name} is {shown(value)}, but it must be of type {field.type.__name__}, above 0 and below "
                f"{TOO_LARGE}")
    require(config.n_layer <= max_layers,
            f"{file}: n_layer is {config.n_layer}, but the weights are only {max_layers} tensors")
    require(config.n_embd % config.n_head == 0,
            f"{file}: n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
    head = config.n_embd // config.n_head
    # n_tokens is our own. In a file from elsewhere the other rows, beyond those of the tokenizer, are padding.
    n_tokens = n_tokens or (config.vocab_size if is_llama else GPT2_TOKENS)
    config.n_tokens = values.get("n_tokens", min(n_tokens, config.vocab_size))
    require(type(config.n_tokens) is int and 0 < config.n_tokens <= config.vocab_size,
            f"{file}: n_tokens is {shown(config.n_tokens)}, but it must be from 1 to vocab_size, {config.vocab_size}")
    if kind == "gptj":
        require(config.rotary_dim <= head and config.rotary_dim % 2 == 0,
                f"{file}: rotary_dim is {config.rotary_dim}, but it must be even and not larger than a head")
    if is_llama:
        require(config.n_head % config.num_key_value_heads == 0 and head % 2 == 0,
                f"{file}: num_attention_heads {config.n_head} is not divisible by num_key_value_heads "
                f"{config.num_key_value_heads}, or a head has an odd size")
    allowed = {"n_inner": 4 * config.n_embd, "head_dim": head, "layer_types": ["full_attention"] * config.n_layer,
               "tie_word_embeddings": is_llama or kind == "gpt2"}
    for name, ours in {**(LLAMA if is_llama else IMPLEMENTED), "tie_word_embeddings": kind == "gpt2"}.items():
        value = values.get(name, ours)
        require(value in [ours, allowed.get(name, ours)],
                f"{file}: {name} is {shown(value)}, but only {ours!r} is implemented here")
    return config


def rope(values, file):
    """config.json of a Llama -> its rope_theta and rope_scaling. transformers 5 has both in rope_parameters."""
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = isinstance(found, dict) and found.get("rope_type", found.get("type", "default"))
    require(kind in ("default", "llama3") and found.keys() <= {"rope_type", "type", "rope_theta", *LLAMA3_ROPE},
            f"{file}: rope_scaling is {shown(found)}, but only Llama 3's, of the type llama3, is implemented here")
    numbers = {name: found.get(name) for name in LLAMA3_ROPE} if kind == "llama3" else {}
    require(all(type(x) in (int, float) and 0 < x < TOO_LARGE for x in numbers.values()),
            f"{file}: rope_scaling needs {', '.join(LLAMA3_ROPE)} above 0, not {shown(numbers)}")
    return {"rope_theta": found.get("rope_theta", values.get("rope_theta", 10000)),
            "rope_scaling": {"rope_type": kind, **numbers} if numbers else None}


def read_normalisation(file):
    """config.json of a reward model -> its reward_mean and reward_std, or 0 and 1 if it does not say."""
    values = read_json(file)
    mean, std = values.get("reward_mean", 0.0), values.get("reward_std", 1.0)
    are_numbers = all(type(x) in (int, float) and abs(x) < 1e30 for x in (mean, std))       # NaN < 1e30 is False
    require(are_numbers and std > 0, f"{file}: reward_mean is {shown(mean)} and reward_std is {shown(std)}, but they "
                                     "must be numbers, and reward_std above 0")
    return float(mean), float(std)


def check_names_and_shapes(folder, tensors, shapes):
    """tensors {name: (tensor, file)} must be exactly those of shapes {name: shape}."""
    problems = [f"tensor {name} is missing from the weights" for name in shapes if name not in tensors]
    for name, (tensor, file) in tensors.items():
        if name not in shapes:
            problems.append(f"{file.name}: tensor {name} is not part of this model")
        elif tensor.dtype not in DTYPES.values() or tensor.numel() == 0:
            problems.append(f"{file.name}: tensor {name} holds no numbers of the types {', '.join(DTYPES)}")
        elif tensor.shape != shapes[name]:
            problems.append(f"{file.name}: tensor {name} has the shape {tuple(tensor.shape)}, but by config.json it "
                            f"should be {tuple(shapes[name])}")
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    hint = "Do config.json and the weights belong together?"
    if ("score.weight" in tensors) != ("score.weight" in shapes):
        hint = ("A language model is needed here, and this is a reward model" if "score.weight" in tensors else
                "A reward model is needed here, and this is a language model")
    require(not problems, f"{folder}: {'; '.join(problems[:5])}{more}. {hint}")


def check_finite(tensor, message):
    require(torch.stack(tensor.aminmax()).isfinite().all(), message)        # the minimum is NaN if any number is


def check_tied_head(tensors, embedding):
    """A file may hold the tied head under a name of its own. It must equal the token embedding."""
    head, file = tensors.get("lm_head.weight", (embedding, None))
    require(torch.equal(head.float(), embedding),
            f"{file}: lm_head.weight differs from the token embedding, but an untied head is not implemented here")


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_safetensors(file, tensors):
    """Writes {name: tensor} to one file, each tensor in its own dtype."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.itemsize
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)                         # so that the numbers begin at a multiple of 8
    body = (t.detach().cpu().contiguous().view(torch.uint8).numpy() for t in tensors.values())
    write_whole(file, itertools.chain([len(header).to_bytes(8, "little"), header], body))
