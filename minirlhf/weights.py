"""Models from and to folders in the official layout: config.json and model.safetensors, with the official names.

transformers loads what is written here (GPT2LMHeadModel.from_pretrained("out/sft"), for a reward model
GPT2ForSequenceClassification), and what transformers wrote is read here. Whatever our code does not do is refused by
name, and a model comes out only if every tensor found its place: never one that is slightly or half wrong.
"""

import json
import re
import sys
from pathlib import Path

import torch

from minirlhf.running.errors import UserError, shown
from minirlhf.files.download import fetch_official, is_official, model_folder
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.gptj import GPTJ, GPTJConfig
from minirlhf.reward import ScalarHeadModel
from minirlhf.files.tensors import DTYPES, read_json, read_tensors, write_safetensors, write_whole

# OpenAI's Conv1D keeps its matrix as [in, out], nn.Linear as [out, in].
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")   # older files store it with the weights
# What config.json can ask for, each with the one value that is implemented here, which is also the default.
IMPLEMENTED = {"activation_function": "gelu_new", "n_inner": None, "scale_attn_weights": True,
               "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "add_cross_attention": False}


def from_pretrained(name_or_folder):
    """An official name or a model folder -> GPT2 or GPTJ, in fp32 on the CPU. UserError names file and tensor.

    A name like gpt2 is always the official model (a folder of yours with that name is ./gpt2, or a Path). It is
    downloaded once, into $MINIRLHF_CACHE or ~/.cache/minirlhf.
    """
    if not is_official(name_or_folder):
        return load(model_folder(name_or_folder), scalar=False)
    if Path(name_or_folder).is_dir():
        print(f"note: {name_or_folder} is the official model; your folder is ./{name_or_folder}", file=sys.stderr)
    return load(fetch_official(name_or_folder), scalar=False)


def scalar_from_pretrained(folder):
    """The folder of a reward model -> ScalarHeadModel with its reward_mean and reward_std. UserError as above."""
    folder = model_folder(folder)
    model, values = load(folder, scalar=True), read_json(folder / "config.json")
    mean, std = values.get("reward_mean", 0.0), values.get("reward_std", 1.0)
    if not all(type(x) in (int, float) and abs(x) < 1e30 for x in (mean, std)) or std <= 0:     # NaN is not < 1e30
        raise UserError(f"{folder / 'config.json'}: reward_mean {shown(mean)}, reward_std {shown(std)}: no normalisation")
    model.reward_mean, model.reward_std = float(mean), float(std)
    return model


def load(folder, scalar):
    """Builds the model on the meta device, where it takes no memory, and gives it the tensors of the folder."""
    config = read_config(folder / "config.json")
    tensors = plain_names(read_tensors(folder))
    if config.n_layer > len(tensors):               # else a number in config.json could keep us building for hours
        raise UserError(f"{folder}: n_layer is {config.n_layer} in config.json, the weights are {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            model = GPTJ(config) if isinstance(config, GPTJConfig) else GPT2(config)
            model = ScalarHeadModel(model) if scalar else model
    except RuntimeError:
        raise UserError(f"{folder / 'config.json'}: no tensor can be this large: {config}") from None
    if scalar and isinstance(config, GPTJConfig):
        model.transformer.lm_head = None            # 0.2 billion parameters a reward model has no use for
    fill(model, tensors, folder)
    return model


def plain_names(tensors):
    """{name: (tensor, file)} without the prefix "transformer.", which files have or not, and without causal masks."""
    plain = {}
    for name, (t, file) in tensors.items():
        name = name.removeprefix("transformer.")
        if name in plain:
            raise UserError(f"{file}: tensor {name} is there twice, with the prefix 'transformer.' and without")
        if CAUSAL_MASK.fullmatch(name):
            continue
        if t.dtype not in DTYPES.values() or t.numel() == 0:
            raise UserError(f"{file}: tensor {name} has no numbers in it of the types {', '.join(DTYPES)}")
        plain[name] = t, file
    return plain


def read_config(file):
    """config.json -> GPT2Config or GPTJConfig. UserError names the first thing that is not implemented here.

    Without "n_tokens", which is ours, a GPT-J has as many tokens as GPT-2: its other rows are padding.
    """
    values = read_json(file)
    classes = {"gpt2": GPT2Config, "gptj": GPTJConfig}
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in classes:
        raise UserError(f"{file}: model_type is {shown(kind)}; known here are {' and '.join(classes)}")
    config_class = classes[kind]
    fields = config_class.__dataclass_fields__
    config = config_class(**{name: values[name] for name in fields if name in values})
    for name, field in fields.items():
        value = getattr(config, name)
        if type(value) not in (int, field.type) or not 0 < value < 2 ** 31:
            raise UserError(f"{file}: {name} is {shown(value)}, not a {field.type.__name__} above 0")
    for name, ours in {**IMPLEMENTED, "tie_word_embeddings": config_class is GPT2Config}.items():
        value = values.get(name, ours)
        if value != ours and not (name == "n_inner" and value == 4 * config.n_embd):
            raise UserError(f"{file}: {name} is {shown(value)}; implemented here is only {ours!r}")
    if config.n_embd % config.n_head:
        raise UserError(f"{file}: n_embd {config.n_embd} cannot be divided among n_head {config.n_head}")
    if config_class is GPTJConfig:
        config.n_tokens = values.get("n_tokens", min(config.n_tokens, config.vocab_size))
        hs = config.n_embd // config.n_head
        if config.n_tokens > config.vocab_size or config.rotary_dim > hs or config.rotary_dim % 2:
            raise UserError(f"{file}: n_tokens or rotary_dim do not fit the other sizes: {config}")
    return config


def fill(model, tensors, folder):
    """Copies tensors {name: (tensor, file)} into a model on the meta device: each has its match, or UserError.

    The parameters are fp32, contiguous and in memory of their own: training never writes to a file.
    """
    scalar, parameters = isinstance(model, ScalarHeadModel), model.state_dict()
    wanted = {name.removeprefix("transformer."): name for name in parameters}
    spare = ("lm_head.weight", "lm_head.bias") if scalar else ("lm_head.weight",)
    heads = [tensors.pop(name) for name in spare if name in tensors and name not in wanted]
    check_match(tensors, {name: on_disk(name, parameters[full].shape) for name, full in wanted.items()}, folder)
    state = {}
    for name, (t, file) in tensors.items():
        t = t.t() if name.endswith(CONV1D) else t
        state[wanted[name]] = torch.empty(t.shape, dtype=torch.float32).copy_(t)
        if not torch.stack(state[wanted[name]].aminmax()).isfinite().all():         # aminmax lets NaN through
            raise UserError(f"{file}: tensor {name} has NaN or infinity in it; an earlier export may be whole")
    model.load_state_dict(state, assign=True)
    for head, file in heads if not scalar else []:
        if not torch.equal(head.float(), model.wte.weight):
            raise UserError(f"{file}: lm_head.weight differs from wte.weight, and a head of its own is not implemented")


def on_disk(name, shape):
    return tuple(shape)[::-1] if name.endswith(CONV1D) else tuple(shape)


def check_match(tensors, shapes, folder):
    """UserError unless tensors {name: (tensor, file)} are those of shapes {name: shape}, all of them and no others."""
    files = {file: file.stat().st_size for _, file in tensors.values()}
    names = ", ".join(file.name for file in files)
    problems = [f"tensor {name} is missing from {names}" for name in shapes if name not in tensors]
    for name, (t, file) in tensors.items():
        if name not in shapes:
            problems.append(f"{file.name}: tensor {name} is no part of this model")
        elif tuple(t.shape) != shapes[name]:
            problems.append(f"{file.name}: tensor {name} is {tuple(t.shape)}, and {shapes[name]} by config.json")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        hint = "a reward model has score.weight, a language model has not" if "score.weight" in str(problems) else \
               "export it again, or give it the config.json it was made with"
        raise UserError(f"{folder}: {'; '.join(problems[:5])}{more} ({hint})")
    if sum(t.numel() * t.itemsize for t, _ in tensors.values()) > sum(files.values()):
        raise UserError(f"{folder}: the tensors claim more bytes than {names} has; fetch it again")


def save_pretrained(model, folder, extra_config={}):
    """A GPT2, GPTJ or ScalarHeadModel -> config.json and model.safetensors, each whole or not at all.

    extra_config is added to config.json. EOS is the last token of the vocabulary. There is no pad token, GPT-2 has
    none; transformers' sequence classification wants one (model.config.pad_token_id) for more than one row at a time.
    """
    scalar = isinstance(model, ScalarHeadModel)
    config = model.config
    kind, official = ("gptj", "GPTJ") if isinstance(config, GPTJConfig) else ("gpt2", "GPT2")
    task = "ForSequenceClassification" if scalar else "ForCausalLM" if kind == "gptj" else "LMHeadModel"
    eos = getattr(config, "n_tokens", min(config.vocab_size, GPT2Config.vocab_size)) - 1
    values = {"model_type": kind, "architectures": [official + task], **vars(config), **IMPLEMENTED,
              "tie_word_embeddings": kind == "gpt2", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
              "bos_token_id": eos, "eos_token_id": eos}
    if scalar:
        values |= {"num_labels": 1, "reward_mean": model.reward_mean, "reward_std": model.reward_std}
    tensors = {}
    for name, t in model.state_dict().items():
        name = name.removeprefix("transformer.")
        if not (scalar and name.startswith("lm_head.")):
            official = name if name.startswith(("lm_head.", "score.")) else "transformer." + name
            tensors[official] = t.t() if name.endswith(CONV1D) else t
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    write_whole(folder / "config.json", [(json.dumps(values | extra_config, indent=2) + "\n").encode()])
