"""GPT-2, written out: the architecture of Radford 2019 with the official checkpoint's tensor names.

Letters for shapes:
    B batch    T time (tokens)    C n_embd    nh heads    hs head size (C / nh)    V vocabulary
    S past + T: what is in the key-value cache, and the T new tokens

There is no dropout. PPO compares the log-probabilities that one model gives the same tokens before
and after an update, and dropout would turn that comparison into noise (DETAILS.md, detail 6).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPT2Config:
    """Field names are those of the official config.json; the defaults are GPT-2 124M.

    n_tokens: how many of the vocab_size rows are tokens. Others, such as those that round a
    vocabulary up to a multiple of 64, must never be sampled nor enter the sum of a softmax.
    """
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    n_tokens: int = None            # None: all of them


class KVCache:
    """Keys and values of the positions seen so far: a new token costs one position, not all.

    Memory for `room` positions is taken at the first call. `length` of them are filled.
    """

    def __init__(self, n_layer, room):
        self.room, self.length = room, 0
        self.layers = [None] * n_layer              # each (keys, values), both (B, nh, room, hs)

    def extend(self, layer, k, v):
        """Appends k, v (B, nh, T, hs) of one layer; returns all so far, (B, nh, S, hs)."""
        B, nh, T, hs = k.shape
        if self.layers[layer] is None:
            self.layers[layer] = [x.new_zeros(B, nh, self.room, hs) for x in (k, v)]
        keys, values = self.layers[layer]
        S = self.length + T
        keys[:, :, self.length:S], values[:, :, self.length:S] = k, v
        return keys[:, :, :S], values[:, :, :S]

    def keep(self, rows):
        """Drops all rows but `rows` (a LongTensor): finished responses cost nothing more."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]


def position_ids(attention_mask):
    """(B, S) bool -> (B, S) int64: how many real tokens precede each, so pads take no position."""
    return attention_mask.long().cumsum(dim=1) - attention_mask.long()


def visible_positions(attention_mask, T):
    """Which of S positions each of the last T tokens sees: (B, S) bool -> (B, 1, T, S) bool.

    Real tokens at or before its own position. A pad still sees itself: an attention row that sees
    nothing would be a softmax over nothing, which is NaN.
    """
    S = attention_mask.shape[1]                     # new token t has position S - T + t
    causal = torch.ones(T, S, dtype=torch.bool, device=attention_mask.device).tril(S - T)
    # causal.triu(S - T) is the diagonal of causal: each new token, seen by itself.
    return causal & (attention_mask[:, None, None, :] | causal.triu(S - T))


def attention(q, k, v, visible):
    """softmax(q k^T / sqrt(hs)) v: q (B, nh, T, hs), k and v (B, nh, S, hs) -> (B, nh, T, hs).

    visible: the result of visible_positions.
    """
    # PyTorch's fused kernel stores no (T, S) weights. That saves memory and time for long texts.
    # For short ones, and for one new token, the three lines below are faster on a CPU.
    if q.shape[2] > 1 and k.shape[2] > 256:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])     # (B, nh, T, S)
    weights = weights.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return weights @ v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, visible, cache, layer):
        q, k, v = (split_heads(t, self.n_head)                  # 3 x (B, nh, T, hs)
                   for t in self.c_attn(x).chunk(3, dim=2))     # 3 x (B, T, C)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                    # (B, nh, S, hs)
        y = attention(q, k, v, visible)                         # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))  # (B, T, C)


def split_heads(x, n_head):
    """(B, T, C) -> (B, nh, T, hs)."""
    return x.unflatten(2, (n_head, -1)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # GPT-2 was trained with the tanh form. The exact erf form differs by up to 4.7e-4.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, visible, cache, layer):
        x = x + self.attn(self.ln_1(x), visible, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    # "bfloat16" means autocast in the blocks. Weights, logits and losses stay in float32.
    dtype = "float32"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(self._init)

    def _init(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):
            # "scale the weights of residual layers by 1/sqrt(N)" (Radford 2019): N = 2 n_layer
            nn.init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def forward(self, ids, attention_mask=None, cache=None):
        """Token ids to hidden states after the final layer norm: (B, T) int64 -> (B, T, C) float32.

        attention_mask (B, S) bool, True at real tokens. Without it every token counts. That is also
        right for right-padded batches: attention is causal, so no real token sees a pad to its
        right, and the caller ignores the hidden states of pads. With a cache, ids are the T tokens
        after those the cache holds. Raises ValueError beyond n_positions.
        """
        visible, positions = visible_and_positions(self.config, ids, attention_mask, cache)
        x = self.wte(ids) + self.wpe(positions)                 # (B, T, C)
        with autocast(self.dtype, ids.device):
            for layer, block in enumerate(self.h):
                x = block(x, visible, cache, layer)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) to logits (..., n_tokens), float32. The head is the embedding.

        Float32 also when the blocks run in bfloat16: the logits of official GPT-2 lie near -100,
        where bfloat16 moves in steps of 0.5.
        """
        return F.linear(hidden, self.wte.weight[:self.config.n_tokens])


def visible_and_positions(config, ids, attention_mask, cache):
    """For T new tokens: what each of them sees, (B, 1, T, S) bool, and their positions, (B, T)."""
    B, T = ids.shape
    S = T if cache is None else cache.length + T
    if S > config.n_positions:
        raise ValueError(f"{S} tokens do not fit this model's {config.n_positions} positions")
    if attention_mask is None:
        attention_mask = torch.ones(B, S, dtype=torch.bool, device=ids.device)
    return visible_positions(attention_mask, T), position_ids(attention_mask)[:, S - T:]


def autocast(dtype, device):
    """A context in which matrix products run in bfloat16, if that is the dtype."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
