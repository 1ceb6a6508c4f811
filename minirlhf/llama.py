"""Llama (Touvron 2023), also SmolLM2's and Qwen2's architecture. Read gpt2.py and gptj.py first.

What is different from GPT-2:
  1. RMSNorm: a layer norm that neither subtracts the mean nor adds a bias (Zhang 2019).
  2. Rotary positions as in GPT-J, but over the whole head, and in the other pairing.
  3. Grouped-query attention: several query heads share one key-value head (Ainslie 2023). The
     cache holds only the key-value heads, a third of the memory in SmolLM2-135M.
  4. SwiGLU: a third matrix in the MLP gates the activation (Shazeer 2020).
  5. No biases, except those of queries, keys and values in Qwen2.
Tensor names are those of the official checkpoints. Shapes as in gpt2.py, and:
    nkv key-value heads    g query heads to each (nh / nkv)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.gpt2 import attention, autocast, split_heads, visible_and_positions
from minirlhf.gptj import rotary_angles, rotary_frequencies


@dataclass
class LlamaConfig:
    """Field names are the official config.json's, except n_tokens, which is as in GPT2Config.

    rope_scaling: None, or Llama 3's four numbers as a dict.
    """
    model_type: str                 # "llama", or "qwen2", which has three biases
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = False
    rope_scaling: dict = None
    n_tokens: int = None

    # The names by which the rest of the code knows these.
    n_positions = property(lambda self: self.max_position_embeddings)
    n_embd = property(lambda self: self.hidden_size)
    n_layer = property(lambda self: self.num_hidden_layers)
    n_head = property(lambda self: self.num_attention_heads)


def scaled(frequencies, rope_scaling):
    """Llama 3.1's frequencies for texts longer than those it was first trained on (Meta 2024).

    A pair that turns often within the original length stays as it was. One that turns seldom is
    slowed down by the factor. In between there is a linear blend.
    """
    low, high = rope_scaling["low_freq_factor"], rope_scaling["high_freq_factor"]
    turns = rope_scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)                       # (hs/2,)
    return kept * frequencies + (1 - kept) * frequencies / rope_scaling["factor"]


def rotate(x, cos, sin):
    """Turns each pair (i, i + hs/2) of x (B, heads, T, hs). GPT-J pairs neighbours instead."""
    first, second = x.chunk(2, dim=-1)                                      # (B, heads, T, hs/2)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.nh, self.nkv = config.n_embd, config.n_head, config.num_key_value_heads
        narrow, bias = C // self.nh * self.nkv, config.model_type == "qwen2"
        self.q_proj = nn.Linear(C, C, bias=bias)
        self.k_proj = nn.Linear(C, narrow, bias=bias)
        self.v_proj = nn.Linear(C, narrow, bias=bias)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, angles, visible, cache, layer):
        q = rotate(split_heads(self.q_proj(x), self.nh), *angles)           # (B, nh, T, hs)
        k = rotate(split_heads(self.k_proj(x), self.nkv), *angles)          # (B, nkv, T, hs)
        v = split_heads(self.v_proj(x), self.nkv)                           # (B, nkv, T, hs)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                # (B, nkv, S, hs)
        # The g query heads of a key-value head become more rows of one head: nothing is copied.
        q = q.unflatten(1, (self.nkv, -1)).flatten(2, 3)                    # (B, nkv, g * T, hs)
        y = attention(q, k, v, visible)                                     # (B, nkv, g * T, hs)
        y = y.unflatten(2, (-1, x.shape[1])).flatten(1, 2)                  # (B, nh, T, hs)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))              # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, angles, visible, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), angles, visible, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama is loaded, never new, so no initial weights are drawn here."""
    dtype = "float32"
    h = property(lambda self: self.layers)          # the blocks, by GPT-2's name

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.rms_norm_eps)
        self.lm_head = (None if config.tie_word_embeddings else
                        nn.Linear(config.n_embd, config.vocab_size, bias=False))

    def forward(self, ids, attention_mask=None, cache=None):
        """Arguments, result and errors as in GPT2.forward."""
        config = self.config
        visible, positions = visible_and_positions(config, ids, attention_mask, cache)
        visible = visible.repeat(1, 1, config.n_head // config.num_key_value_heads, 1)
        frequencies = rotary_frequencies(config.n_embd // config.n_head, ids.device,
                                         config.rope_theta)                 # (hs/2,)
        if config.rope_scaling:
            frequencies = scaled(frequencies, config.rope_scaling)
        angles = rotary_angles(positions[:, None], frequencies)             # 2 x (B, 1, T, hs/2)
        x = self.embed_tokens(ids)                                          # (B, T, C)
        with autocast(self.dtype, ids.device):
            for layer, block in enumerate(self.layers):
                x = block(x, angles, visible, cache, layer)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    def logits(self, hidden):
        """Hidden states (..., C) to logits (..., n_tokens), float32, without the padding rows."""
        head = self.lm_head or self.embed_tokens        # tied, where there is no head
        return F.linear(hidden, head.weight[:self.config.n_tokens])
