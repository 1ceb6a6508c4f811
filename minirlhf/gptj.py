"""GPT-J 6B (Wang and Komatsuzaki 2021) with the same interface as GPT2. Read gpt2.py first.

What is different from GPT-2:
  1. No learned positions: queries and keys are rotated by an angle that grows with their position
     (Su 2021, arXiv 2104.09864).
  2. Attention and MLP run side by side on one layer norm: x + attn(ln(x)) + mlp(ln(x)).
  3. The head is a matrix of its own, with a bias, and it has more rows than there are tokens.
Tensor names are those of the official checkpoint. Shapes as in gpt2.py, and:
    r rotary_dim
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.gpt2 import attention, autocast, split_heads, visible_and_positions


@dataclass
class GPTJConfig:
    """The defaults are GPT-J 6B. Field names are the official config.json's, except n_tokens.

    It has GPT-2's 50,257 tokens and was padded to 50,400 rows.
    """
    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int = 64
    n_tokens: int = 50257
    layer_norm_epsilon: float = 1e-5


def rotary_frequencies(r, device, theta=10000):
    """The angles by which the r/2 pairs turn with each position: theta^(-2i/r), in radians."""
    return 1 / theta ** (torch.arange(0, r, 2, device=device) / r)                      # (r/2,)


def rotary_angles(positions, frequencies):
    """positions (..., T) int64, frequencies (r/2,) -> cos and sin of all angles (..., T, r/2)."""
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns each neighbouring pair (2i, 2i + 1) of the first r dimensions of x (B, nh, T, hs).

    This is the interleaved form. Many newer models pair i with i + r/2 instead, and weights made
    for one form give nonsense in the other.
    """
    r = 2 * cos.shape[-1]
    even, odd = x[..., 0:r:2], x[..., 1:r:2]                                # (B, nh, T, r/2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    turned = turned.flatten(-2).type_as(x)                                  # (B, nh, T, r)
    return torch.cat([turned, x[..., r:]], dim=-1)                          # (B, nh, T, hs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, angles, visible, cache, layer):
        q, k, v = (split_heads(projection(x), self.n_head)                  # 3 x (B, nh, T, hs)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                # (B, nh, S, hs)
        y = attention(q, k, v, visible)                                     # (B, nh, T, hs)
        return self.out_proj(y.transpose(1, 2).reshape(x.shape))            # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc_in = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.fc_out = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, angles, visible, cache, layer):
        normed = self.ln_1(x)
        return x + self.attn(normed, angles, visible, cache, layer) + self.mlp(normed)


class GPTJ(nn.Module):
    dtype = "float32"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids, attention_mask=None, cache=None):
        """Arguments, result and errors as in GPT2.forward."""
        visible, positions = visible_and_positions(self.config, ids, attention_mask, cache)
        frequencies = rotary_frequencies(self.config.rotary_dim, ids.device)
        angles = rotary_angles(positions[:, None], frequencies)             # 2 x (B, 1, T, r/2)
        x = self.wte(ids)                                                   # (B, T, C)
        with autocast(self.dtype, ids.device):
            for layer, block in enumerate(self.h):
                x = block(x, angles, visible, cache, layer)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) to logits (..., n_tokens), float32, without the padding rows."""
        n = self.config.n_tokens
        return F.linear(hidden, self.lm_head.weight[:n], self.lm_head.bias[:n])
