"""GPT-2, written out: the architecture of Radford et al. 2019 with the tensor names of the official checkpoint.

The alphabet of shapes, the same in every file:
    B batch    T time (tokens)    C n_embd    nh heads    hs head size (C / nh)    V vocabulary    S past + T

There is no dropout. SFT, reward model and PPO all compare log-probabilities of the same tokens at different times, and
dropout makes that comparison noise (arXiv 2403.17031 turns it off in SFT as well).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.running.cpu import Linear, linear32


@dataclass
class GPT2Config:
    """The shape of a model; the defaults are GPT-2 124M. Field names are those of the official config.json."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02


class KVCache:
    """Keys and values of the positions a model has seen, so that the next token costs one position and not all.

    Room for S positions is taken at the first call; `length` of them are filled.
    """

    def __init__(self, n_layer, S):
        self.S, self.length = S, 0
        self.layers = [None] * n_layer                          # each (keys, values), both (B, nh, S, hs)

    def extend(self, layer, k, v):
        """Appends k, v (B, nh, T, hs) of one layer; returns all keys and values so far, (B, nh, past + T, hs)."""
        B, nh, T, hs = k.shape
        if self.layers[layer] is None:
            self.layers[layer] = k.new_zeros(B, nh, self.S, hs), v.new_zeros(B, nh, self.S, hs)
        keys, values = self.layers[layer]
        end = self.length + T
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows):
        """Drops all rows of the batch but `rows` (a LongTensor): finished responses cost nothing more."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]


def position_ids(mask):
    """(B, S) bool -> (B, S) int64: how many real tokens stand before each one, so that pads take no position."""
    return mask.long().cumsum(dim=1) - mask.long()


def attention_mask(mask, T, S, device):
    """Which of S positions each of the last T may look at: (T, S) bool, or (B, 1, T, S) when pads are to be hidden.

    A pad still sees itself: a row of attention with nothing in it would be a softmax over nothing, NaN.
    """
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if mask is None:
        return causal
    itself = causal.triu(S - T)
    return causal & (mask[:, None, None, :] | itself)           # (B, 1, T, S)


def attention(q, k, v, attend):
    """softmax(q k^T / sqrt(hs)) v: q (B, nh, T, hs), k and v (B, nh, S, hs) -> (B, nh, T, hs); causal if attend is None."""
    if q.shape[2] == 1 and attend is not None:
        # One new token, by hand: PyTorch's kernel is made for many, and takes up to seven times as long on a CPU.
        weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])                                     # (B, nh, 1, S)
        return weights.masked_fill(~attend, -math.inf).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, attend, cache, layer):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)                # 3 x (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                    # (B, nh, S, hs)
        y = attention(q, k, v, attend)                          # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # GPT-2 was trained with the tanh approximation; the exact erf form is off by up to 4.7e-4 per activation.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, attend, cache, layer):
        x = x + self.attn(self.ln_1(x), attend, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):    # "scale the weights of residual layers by 1/sqrt(N)", N = 2 n_layer
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)

    def forward(self, ids, mask=None, cache=None):
        """Token ids to hidden states after the final layer norm.

        ids (B, T) int64; mask (B, past + T) bool, True at real tokens; returns (B, T, C).
        Without a mask every token counts. That is also right for right-padded batches: attention is causal, no real
        token sees a pad to its right, and the hidden states of pads are for the caller to ignore.
        With a cache, ids are the T tokens after those the cache holds. ValueError beyond n_positions.
        """
        T, past = ids.shape[1], cache.length if cache is not None else 0
        S = past + T
        if S > self.config.n_positions:
            raise ValueError(f"{S} tokens do not fit this model's {self.config.n_positions} positions")
        if mask is None:
            positions = torch.arange(past, S, device=ids.device)                                # (T,)
        else:
            positions = position_ids(mask)[:, past:]                                            # (B, T)
        attend = None if mask is None and past == 0 else attention_mask(mask, T, S, ids.device)
        x = self.wte(ids) + self.wpe(positions)                                                 # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, attend, cache, layer)
        if cache is not None:
            cache.length = S
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) to logits over the vocabulary (..., V), float32; the head is the token embedding, tied.

        Under autocast too: official GPT-2's logits lie near -100, where bfloat16 can only tell steps of 0.5 apart.
        """
        return linear32(hidden, self.wte.weight)

    def new_cache(self, S):
        """An empty cache with room for S positions."""
        return KVCache(self.config.n_layer, S)
