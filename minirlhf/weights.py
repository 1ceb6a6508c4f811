"""The official weights: what their files look like, and how they become our parameters and back.

A model is a folder with config.json, its sizes, and model.safetensors, its tensors. Our modules
have the names that OpenAI gave the tensors in 2019, so there is little to translate. GPT-2 124M:

    name                           shape in the file      C = n_embd = 768
    wte.weight                     (50257, C)             token embedding, also used as the head
    wpe.weight                     (1024, C)              position embedding
    h.0.ln_1.weight, .bias         (C,), (C,)             the first of the blocks h.0 to h.11
    h.0.attn.c_attn.weight, .bias  (C, 3 * C), (3 * C,)   Conv1D: queries, keys and values
    h.0.attn.c_proj.weight, .bias  (C, C), (C,)           Conv1D
    h.0.attn.bias                  (1, 1, 1024, 1024)     not a parameter: the causal mask
    h.0.ln_2.weight, .bias         (C,), (C,)
    h.0.mlp.c_fc.weight, .bias     (C, 4 * C), (4 * C,)   Conv1D
    h.0.mlp.c_proj.weight, .bias   (4 * C, C), (C,)       Conv1D
    ln_f.weight, .bias             (C,), (C,)

Four things differ from our modules, or between files:
    1. OpenAI's linear layer, Conv1D, stores its matrix as (in, out), nn.Linear as (out, in).
    2. Older files store the causal masks, which we skip.
    3. Most files put "transformer." before each name. The file of the official "gpt2" does not.
    4. The head is tied: logits = hidden @ wte.weight.T. Some files have a copy, lm_head.weight.
A reward model has score.weight, (1, C), and no other head. GPT-J has no Conv1D and an untied head.
Llama and Qwen2 have no Conv1D, "model." before each name, and a head that may be tied.

A model with a few wrong weights still writes text, only worse. So a model is returned only if
config.json asks for nothing that our code does not implement, and if every tensor found its place.
"""

import re
from pathlib import Path

import torch

from minirlhf.files.download import OFFICIAL, fetch_official, model_folder
from minirlhf.files.json_files import write_json
from minirlhf.files.tensors import (IMPLEMENTED, LLAMA, check_finite, check_names_and_shapes,
                                    check_tied_head, read_config, read_normalisation, read_tensors,
                                    write_safetensors)
from minirlhf.files.tokenizer import own_tokens
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.gptj import GPTJ, GPTJConfig
from minirlhf.llama import Llama, LlamaConfig
from minirlhf.reward import ScalarHeadModel

CONFIGS = {"gpt2": GPT2Config, "gptj": GPTJConfig,              # by the "model_type" in config.json
           "llama": LlamaConfig, "qwen2": LlamaConfig}
MODELS = {GPT2Config: GPT2, GPTJConfig: GPTJ, LlamaConfig: Llama}
NO_PARAMETER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq")
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def official_name(name):
    """The name as in the table above, or None for a causal mask or rotary frequencies."""
    name = name.removeprefix("transformer.").removeprefix("model.")
    return None if NO_PARAMETER.fullmatch(name) else name


def transpose_conv1d(name, tensor):
    """(in, out) to (out, in) when loading, and the same call turns it back when saving."""
    return tensor.t() if name.endswith(CONV1D) else tensor


# ---- loading -------------------------------------------------------------------------------------

def from_pretrained(name_or_folder, dtype="float32"):
    """An official name or a model folder -> GPT2, GPTJ or Llama on the CPU.

    An official model is downloaded once, to $MINIRLHF_CACHE or ~/.cache/minirlhf. "gpt2" always
    means the official model; write "./gpt2" for a folder of yours. With dtype "bfloat16" the
    forward pass computes in bfloat16. The weights are float32 in either case.
    """
    official = name_or_folder in OFFICIAL
    folder = fetch_official(name_or_folder) if official else model_folder(name_or_folder)
    return load(folder, scalar=False, dtype=dtype)


def scalar_from_pretrained(folder, dtype="float32"):
    """The folder of a reward model -> ScalarHeadModel with its reward_mean and reward_std."""
    folder = model_folder(folder)
    model = load(folder, scalar=True, dtype=dtype)
    model.reward_mean, model.reward_std = read_normalisation(folder / "config.json")
    return model


def load(folder, scalar, dtype="float32"):
    """A model folder -> GPT2, GPTJ or Llama, or with scalar=True a ScalarHeadModel around it."""
    tensors = read_tensors(folder, official_name)               # {official name: (tensor, file)}
    config = read_config(folder / "config.json", CONFIGS, max_layers=len(tensors),
                         n_tokens=own_tokens(folder))
    with torch.device("meta"):                                  # shapes only, no memory yet
        transformer = MODELS[type(config)](config)
        model = ScalarHeadModel(transformer) if scalar else transformer
    if scalar:                                                  # scores do not depend on a head
        tensors = {name: t for name, t in tensors.items() if not name.startswith("lm_head.")}
        transformer.lm_head = None
    transformer.dtype = dtype
    copy_tensors(tensors, model, folder)
    return model.eval()             # a dropout that somebody adds acts in train_sft.py only


def copy_tensors(tensors, model, folder):
    """Gives each parameter of a model its tensor, as float32 and in memory of its own."""
    parameters = model.state_dict()
    shapes = {official_name(name): transpose_conv1d(name, parameter).shape
              for name, parameter in parameters.items()}
    embedding = "wte.weight" if "wte.weight" in shapes else "embed_tokens.weight"
    if "lm_head.weight" in tensors:
        shapes["lm_head.weight"] = shapes[embedding]            # if it is tied, it is checked below
    check_names_and_shapes(folder, tensors, shapes)
    for name in parameters:
        tensor, file = tensors[official_name(name)]
        tensor = transpose_conv1d(name, tensor)
        parameters[name] = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
        check_finite(parameters[name], f"{file}: tensor {official_name(name)} has NaN or infinity "
                                       "in it. Use an earlier export")
    model.load_state_dict(parameters, assign=True)
    if "lm_head.weight" not in parameters:
        check_tied_head(tensors, *(p for name, p in parameters.items() if name.endswith(embedding)))


# ---- saving --------------------------------------------------------------------------------------

def save_pretrained(model, folder, extra_config={}):
    """A GPT2, GPTJ, Llama or ScalarHeadModel -> config.json and model.safetensors.

    transformers loads the folder as well. extra_config is added to config.json. If a weight is NaN
    or infinite, nothing is written. There is no pad token, because GPT-2 has none. transformers
    needs one to score several rows with a reward model: set model.config.pad_token_id.
    """
    folder, scalar = Path(folder), isinstance(model, ScalarHeadModel)
    tensors = {}
    for name, parameter in model.state_dict().items():
        check_finite(parameter, f"{folder}: the last step left NaN or infinity in {name}; "
                                "nothing is exported. A lower --lr may help")
        name = official_name(name)
        prefix = "model." if isinstance(model.config, LlamaConfig) else "transformer."
        prefix = "" if name.startswith(("lm_head.", "score.")) else prefix
        if not (scalar and name.startswith("lm_head.")):        # scores do not depend on a head
            tensors[prefix + name] = transpose_conv1d(name, parameter)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config_values(model, scalar) | extra_config)


def config_values(model, scalar):
    """The contents of config.json, under the names that transformers expects.

    A GPT's EOS is its last token, unless save_tokenizer, which knows better, writes another.
    """
    config, n_tokens = model.config, model.config.n_tokens or model.config.vocab_size
    if isinstance(config, LlamaConfig):
        kind, head = config.model_type.capitalize(), "ForCausalLM"
        others = LLAMA | {"bos_token_id": None, "eos_token_id": None}
    else:
        kind = "GPTJ" if isinstance(config, GPTJConfig) else "GPT2"
        head = "ForCausalLM" if kind == "GPTJ" else "LMHeadModel"
        others = IMPLEMENTED | {
            "tie_word_embeddings": kind == "GPT2",
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,   # our code has no dropout
            "bos_token_id": n_tokens - 1, "eos_token_id": n_tokens - 1}
    values = {"model_type": kind.lower(),
              "architectures": [kind + ("ForSequenceClassification" if scalar else head)],
              **vars(config), **others, "n_tokens": n_tokens}
    values = {name: value for name, value in values.items() if value is not None}
    if scalar:
        values |= {"num_labels": 1,
                   "reward_mean": model.reward_mean, "reward_std": model.reward_std}
    return values
