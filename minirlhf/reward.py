"""Reward model and value model: a language model that gives one number per position.

Shapes: B batch    T time    C n_embd    N prompts    K answers per prompt

The reward model is read at the last token. The value of a response token is read one token before
it: the reward still expected before that token is chosen.
"""

import math

import torch.nn as nn
import torch.nn.functional as F


class ScalarHeadModel(nn.Module):
    """GPT-2 and a linear layer to one scalar per position. No bias: the normalisation absorbs it.

    reward_mean and reward_std are those of the raw scores of samples from the SFT model. They are
    kept in config.json. With them one unit of reward, and so beta, means the same for every reward
    model (Ziegler 2019: gain and bias; Huang 2024: mean only).
    """

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.config = transformer.config
        C = self.config.n_embd
        self.score = nn.Linear(C, 1, bias=False)
        # Scores start with variance near 1 (Ziegler 2019, Huang 2023).
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(C + 1))
        self.reward_mean, self.reward_std = 0.0, 1.0

    def forward(self, ids, attention_mask=None):
        """ids (B, T) int64, attention_mask (B, T) bool as in GPT2.forward -> (B, T) float32."""
        return self.score(self.transformer(ids, attention_mask)).squeeze(-1)

    def normalised_scores(self, ids, attention_mask):
        """The normalised score of each sequence, (B,): the scalar at its last real token."""
        raw_scores = at_last_token(self(ids, attention_mask), attention_mask)
        return (raw_scores - self.reward_mean) / self.reward_std


def at_last_token(x, attention_mask):
    """x (B, T) at the last real token of each row -> (B,), wherever the pads are."""
    # Read backwards, the first True is the last token. argmax finds the first of equal values.
    pads_after = attention_mask.flip(1).long().argmax(dim=1, keepdim=True)          # (B, 1)
    return x.gather(1, x.shape[1] - 1 - pads_after).squeeze(1)


# ---- losses on comparisons -----------------------------------------------------------------------
# scores (N, K) are raw, not normalised. ranks (N, K) int64: 1 is best, ties form no pair, 0 marks
# padding. Every prompt must prefer something. Each loss is a mean over prompts, so that a prompt
# with many answers counts no more than one with few. For K = 2 all of them are equal.

def preferred(ranks):
    """(N, K) -> (N, K, K) bool: [n, i, j] is True where answer i is better than answer j."""
    return (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])


def pair_loss(scores, ranks):
    """-log sigmoid(score_i - score_j), a mean over the pairs of a prompt (Ouyang 2022, eq. 1)."""
    better = preferred(ranks)
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :])               # (N, K, K)
    return (losses.masked_fill(~better, 0).sum(dim=(1, 2)) / better.sum(dim=(1, 2))).mean()


def best_loss(scores, ranks):
    """-log of the softmax probability of the best answer, or of the best ones (Ziegler 2019)."""
    everything = scores.masked_fill(ranks == 0, -math.inf).logsumexp(dim=1)        # (N,)
    best = scores.masked_fill(ranks != 1, -math.inf).logsumexp(dim=1)
    return (everything - best).mean()


LOSSES = {"pairs": pair_loss, "best": best_loss}


# ---- accuracy ------------------------------------------------------------------------------------

def pairs_right(scores, ranks):
    """Pairs that the scores order as the ranks do (equal counts half), and all pairs: two sums."""
    better = preferred(ranks)
    difference = scores[:, :, None] - scores[:, None, :]                          # (N, K, K)
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return right.masked_fill(~better, 0).sum(), better.sum()
