"""A reward model and a value model are one thing: a language model with one number per position instead of a vocabulary.

Shapes: B batch    T time    C n_embd    N prompts    K answers per prompt

The reward model reads the number at the last token, the value model reads it everywhere.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.running.cpu import linear32


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
        return self.scores(self.transformer(ids, mask))

    def scores(self, hidden):
        """Hidden states (B, T, C) -> (B, T) float32, also under autocast: in bfloat16 scores near 3 come in steps of 0.016."""
        return linear32(hidden, self.score.weight).squeeze(-1)

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
# Every prompt must prefer something. Each loss is the mean over prompts, and all of them are equal for K = 2.

def preferred(ranks):
    """(N, K) -> (N, K, K) bool: [n, i, j] is True where answer i is better than answer j."""
    first, second = ranks[:, :, None], ranks[:, None, :]
    return (first > 0) & (first < second)


def pair_loss(rewards, ranks):
    """-log sigmoid(r_i - r_j), the mean over all pairs of a prompt (InstructGPT equation 1; a single pair: Stiennon)."""
    better = preferred(ranks)
    losses = -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])               # (N, K, K)
    return (losses.masked_fill(~better, 0).sum(dim=(1, 2)) / better.sum(dim=(1, 2))).mean()


def choice_losses(rewards, ranks):
    """-log of the chance that each answer is chosen out of itself and all that are worse: (N, K), 0 where none is."""
    better = preferred(ranks)
    candidates = better | torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)          # (N, K, K)
    rivals = rewards[:, None, :].masked_fill(~candidates, -math.inf).logsumexp(dim=2)               # (N, K)
    return (rivals - rewards).masked_fill(~better.any(dim=2), 0)


def best_loss(rewards, ranks):
    """Softmax cross-entropy of the best answer among all (A: best of 4); several best ones are averaged."""
    best = ranks == 1
    return (choice_losses(rewards, ranks).masked_fill(~best, 0).sum(dim=1) / best.sum(dim=1)).mean()


def plackett_luce_loss(rewards, ranks):
    """-log likelihood of the whole ranking: the best is chosen, then the best of the rest, and so on (Luce, Plackett)."""
    return choice_losses(rewards, ranks).sum(dim=1).mean()


LOSSES = {"pairs": pair_loss, "best": best_loss, "plackett_luce": plackett_luce_loss}


def pair_accuracy(rewards, ranks):
    """Per prompt: how many pairs the rewards order as the ranks do (equal rewards count half), and how many there are."""
    better = preferred(ranks)
    difference = rewards[:, :, None] - rewards[:, None, :]                          # (N, K, K)
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return right.masked_fill(~better, 0).sum(dim=(1, 2)), better.sum(dim=(1, 2))
