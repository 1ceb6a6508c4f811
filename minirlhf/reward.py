"""A reward model and a value model are one thing: a language model with one number per position instead of a vocabulary.

Shapes: B batch    T time    C n_embd    N prompts    K answers per prompt

The reward model reads the number at the last token, the value model reads it everywhere.
"""

import importlib.util
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.config import UserError

TINY_GOLD = Path(__file__).parent.parent / "data/tiny/gold.py"


class ScalarHeadModel(nn.Module):
    """GPT-2 and a linear layer to one scalar per position. No bias: the normalisation absorbs it.

    reward_mean and reward_std are of the raw scores of samples from the SFT model; they travel in config.json. With
    them a unit of reward, and so beta, means the same for every reward model (A: gain and bias; C: mean).
    """

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        C = transformer.config.n_embd
        self.score = nn.Linear(C, 1, bias=False)
        # N(0, 1/sqrt(d + 1)) is the initialisation of A and B: the score starts with variance near 1.
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(C + 1))
        self.reward_mean, self.reward_std = 0.0, 1.0

    @property
    def config(self):
        return self.transformer.config

    def forward(self, ids, mask=None):
        """ids (B, T) int64, mask (B, T) bool as in GPT2.forward -> (B, T) float32, one scalar per position."""
        return self.score(self.transformer(ids, mask)).squeeze(-1).float()

    def reward(self, ids, mask):
        """The normalised score of each sequence, (B,): the scalar at its last real token, wherever the pads are."""
        return (at_last_token(self(ids, mask), mask) - self.reward_mean) / self.reward_std


def at_last_token(x, mask):
    """x (B, T) at the last True column of mask (B, T) -> (B,)."""
    T = mask.shape[1]
    last = T - 1 - mask.flip(1).long().argmax(dim=1, keepdim=True)                  # (B, 1)
    return x.gather(1, last).squeeze(1)


# ---- losses on comparisons -------------------------------------------------------------------------------------------
# rewards (N, K) are raw scores. ranks (N, K) int64: 1 is best, equal is a tie (which says nothing), 0 is no answer.
# Each loss is the mean over prompts: a prompt with six pairs weighs as much as a prompt with one.

def preferred(ranks):
    """(N, K) -> (N, K, K) bool: [n, i, j] is True where answer i is better than answer j."""
    first, second = ranks[:, :, None], ranks[:, None, :]
    return (first > 0) & (first < second)


def pair_loss(rewards, ranks):
    """-log sigmoid(r_i - r_j), the mean over all pairs of a prompt (InstructGPT equation 1; a single pair: Stiennon)."""
    better = preferred(ranks)
    losses = -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])               # (N, K, K)
    n_pairs = better.sum(dim=(1, 2))
    return (losses.masked_fill(~better, 0).sum(dim=(1, 2)) / n_pairs).mean()


def pair_accuracy(rewards, ranks):
    """Per prompt: how many pairs the rewards order as the ranks do (ties count half), and how many pairs there are."""
    better = preferred(ranks)
    difference = rewards[:, :, None] - rewards[:, None, :]                          # (N, K, K)
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return right.masked_fill(~better, 0).sum(dim=(1, 2)), better.sum(dim=(1, 2))


# ---- a reward without a model ----------------------------------------------------------------------------------------

def load_function(spec):
    """"path/to/file.py:name" -> that function, f(prompts: list[str], responses: list[str]) -> list[float].

    This runs the file: the only code that any command of this project executes from a path it was given.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"{spec}: not FILE.py:function with a file that exists")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name!r}")
    return getattr(module, name)


def load_gold(spec, data_file):
    """The true preference, which is only ever measured: a function's spec, 'auto' or 'none'. 'auto' is the embedded
    world's own gold.py for its own data and nothing for any other. Returns the function, or None."""
    if spec == "auto":
        embedded = Path(data_file).resolve().parent == TINY_GOLD.parent
        return load_function(f"{TINY_GOLD}:gold") if embedded else None
    return None if spec == "none" else load_function(spec)


def call_reward(function, prompts, responses):
    """Calls a reward function and checks what it returns -> (B,) float32. UserError names the response at fault."""
    scores = function(prompts, responses)
    if not isinstance(scores, (list, tuple)) or len(scores) != len(prompts):
        raise UserError(f"the reward function must return a list of {len(prompts)} numbers, not {repr(scores)[:60]}")
    for prompt, response, score in zip(prompts, responses, scores):
        if type(score) not in (int, float) or not math.isfinite(score):
            raise UserError(f"the reward function gave {score!r} for the prompt {prompt!r} and response {response!r}")
    return torch.tensor(scores, dtype=torch.float32)
