"""GPT-J 6B (Wang and Komatsuzaki 2021) behind the interface of GPT2; read gpt2.py first, or never read this.

What is different from GPT-2:
  1. No learned positions: queries and keys are turned by an angle that grows with their position (arXiv 2104.09864).
  2. Attention and MLP stand side by side on one layer norm: x + attn(ln(x)) + mlp(ln(x)).
  3. The head is a matrix of its own, with a bias, and it has more rows than there are tokens.
Tensor names are those of the official checkpoint. The alphabet of shapes is that of gpt2.py, and:
    r rotary_dim
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.running.cpu import Linear, linear32
from minirlhf.gpt2 import KVCache, attention, attention_mask, position_ids


@dataclass
class GPTJConfig:
    """The defaults are GPT-J 6B; field names are those of the official config.json, but for n_tokens.

    n_tokens: how many of the vocab_size rows are tokens. GPT-J speaks GPT-2's 50,257 and was padded to 50,400 rows,
    for its TPUs; a row that is no token must never be sampled, nor be in the sum of a softmax.
    """
    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int = 64
    n_tokens: int = 50257
    layer_norm_epsilon: float = 1e-5


def rotary_angles(positions, r):
    """positions (..., T) int64 -> cos and sin (..., T, r/2) float32: pair i turns by position / 10000^(2i/r)."""
    frequencies = 1 / 10000 ** (torch.arange(0, r, 2, device=positions.device) / r)    # (r/2,)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns each neighbouring pair (2i, 2i + 1) of the first r dimensions of x (B, nh, T, hs) by its angle.

    "Interleaved": many newer models pair i with i + r/2 instead, and weights of one kind are nonsense in the other.
    """
    r = 2 * cos.shape[-1]
    even, odd = x[..., 0:r:2], x[..., 1:r:2]                                        # (B, nh, T, r/2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)  # (B, nh, T, r/2, 2)
    return torch.cat([turned.flatten(-2).type_as(x), x[..., r:]], dim=-1)           # (B, nh, T, hs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.q_proj = Linear(C, C, bias=False)
        self.k_proj = Linear(C, C, bias=False)
        self.v_proj = Linear(C, C, bias=False)
        self.out_proj = Linear(C, C, bias=False)

    def forward(self, x, turn, attend, cache, layer):
        B, T, C = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)                    # 3 x (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                        # (B, nh, S, hs)
        y = attention(q, k, v, attend)                                              # (B, nh, T, hs)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc_in = Linear(config.n_embd, 4 * config.n_embd)
        self.fc_out = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, turn, attend, cache, layer):
        normed = self.ln_1(x)
        return x + self.attn(normed, turn, attend, cache, layer) + self.mlp(normed)


class GPTJ(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids, mask=None, cache=None):
        """Token ids to hidden states after the final layer norm: arguments, result and errors as GPT2.forward."""
        T, past = ids.shape[1], cache.length if cache is not None else 0
        S = past + T
        if S > self.config.n_positions:
            raise ValueError(f"{S} tokens do not fit this model's {self.config.n_positions} positions")
        if mask is None:
            positions = torch.arange(past, S, device=ids.device)                    # (T,)
        else:
            positions = position_ids(mask)[:, None, past:]                          # (B, 1, T)
        turn = rotary_angles(positions, self.config.rotary_dim)                     # 2 x (T, r/2) or (B, 1, T, r/2)
        attend = None if mask is None and past == 0 else attention_mask(mask, T, S, ids.device)
        x = self.wte(ids)                                                           # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, turn, attend, cache, layer)
        if cache is not None:
            cache.length = S
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) to logits (..., n_tokens), float32: the rows that are no token are not even computed."""
        n = self.config.n_tokens
        return linear32(hidden, self.lm_head.weight[:n], self.lm_head.bias[:n])

    def new_cache(self, S):
        """An empty cache with room for S positions."""
        return KVCache(self.config.n_layer, S)
