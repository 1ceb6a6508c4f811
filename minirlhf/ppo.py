"""The mathematics of PPO for language models: functions of tensors, no model inside.

Shapes: B batch    R response length    V vocabulary
Every (B, R) tensor is aligned with the response's tokens. A mask (B, R) bool is True at sampled
tokens, the EOS included. Pads may hold anything, and every function ignores them. Only the two
losses have a value there, too: mask it before you add them up.
The numbers are the steps of train_ppo.py. Log-probabilities, KL and entropy are in nats.

Sources: Ziegler 2019 (arXiv 1909.08593) and its code, openai/lm-human-preferences; Stiennon 2020;
Schulman 2015 (GAE, arXiv 1506.02438) and 2017 (PPO, arXiv 1707.06347); Huang 2024 (arXiv
2403.17031).
"""

import torch

from minirlhf.running.processes import all_sum


# ---- statistics over tokens ----------------------------------------------------------------------

def masked_sum(x, mask):
    """Sum of x where mask is True. masked_fill rather than x * mask, because nan * 0 is nan."""
    return x.masked_fill(~mask, 0).sum()


def masked_mean(x, mask):
    """Mean of x over all True positions together, not a mean of row means.

    Several processes each hold some rows of a rollout. all_sum adds up over all of them, and does
    nothing when there is only one.
    """
    return all_sum(masked_sum(x, mask)) / all_sum(mask.sum())


def sequence_mean(x, mask):
    """Per-token x summed over each response, then averaged over the responses."""
    return all_sum(masked_sum(x, mask)) / all_sum(mask.any(dim=1).sum())


def masked_variance(x, mask):
    """Population variance of x over all True positions together."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask):
    """x shifted and scaled to mean 0 and variance 1 over the True positions, and 0 elsewhere.

    Advantages then have the same scale in every rollout, so --lr need not follow the scores. Taking
    the mean away also means that one constant added to all of them changes nothing. (A constant
    value in gae() is such a constant only at lambda 1.) Population variance, eps 1e-8 (Ziegler
    2019).
    """
    scale = torch.rsqrt(masked_variance(x, mask) + 1e-8)
    return ((x - masked_mean(x, mask)) * scale).masked_fill(~mask, 0)


# ---- 3. Log-probabilities ------------------------------------------------------------------------

def token_logprobs(logits, tokens, temperature=1.0):
    """Log-probability of each token: logits (..., V), tokens (...) int64 -> (...), in nats.

    The one function for SFT, rollout, reference and update. Where the tokens were sampled the
    temperature must be the sampling temperature: PPO's ratio compares the distribution that acted,
    not the one at temperature 1.
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


def token_entropy(logits, temperature=1.0):
    """Entropy of the next-token distribution: (..., V) -> (...), in nats."""
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


# ---- 4. Reward per token -------------------------------------------------------------------------

def kl_k3(logprobs, ref_logprobs):
    """(ref/p - 1) - log(ref/p), per token: unbiased, never negative, less noisy (Schulman 2020).

    Only for the log: the reward uses k1, the log-ratio itself, which may be negative at a token.
    As a loss its gradient is that of KL(ref || p).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(kl, scores, response_mask, beta):
    """-beta * KL at every token, plus the score at the last: kl (B, R), scores (B,) -> (B, R)."""
    rewards = (-beta * kl).masked_fill(~response_mask, 0)
    last = response_mask.sum(dim=1, keepdim=True) - 1                   # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


# ---- 5. Values and advantages --------------------------------------------------------------------

def gae(rewards, values, response_mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation: all (B, R) -> advantages, returns (B, R), 0 at pads.

    delta_t = reward_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}
    returns = A + V, before whitening. The episode ends with the response, so the value after the
    last token is 0. lam 0 trusts the value model after one token: little noise, but biased. lam 1
    uses the whole return: unbiased, but noisy. Defaults as in Ziegler 2019.
    """
    rewards = rewards.masked_fill(~response_mask, 0)
    values = values.masked_fill(~response_mask, 0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])       # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


# Step 6, whitening the advantages, is whiten() above.


# ---- 7. Losses per token: the caller sums over the mask and divides by the minibatch's tokens ----

def policy_losses(new_logprobs, logprobs, advantages, clip):
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), PPO equation 7: (B, R) -> (B, R).

    The minimum means that a token gains nothing more once its ratio has left the clip range in the
    direction of its advantage. A ratio that moved the wrong way still has a gradient back.
    """
    ratio = torch.exp(new_logprobs - logprobs)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_losses(new_values, values, returns, clip):
    """0.5 max((V - return)^2, (V_clipped - return)^2) per token, all (B, R).

    V_clipped = V_old + clamp(V - V_old, -clip, clip). values: V_old, that of the rollout.
    The larger of the two, so that a value gains nothing by moving further than clip.
    """
    clipped_values = values + (new_values - values).clamp(-clip, clip)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped_values - returns) ** 2)


# ---- 8. Log, and adjust beta ---------------------------------------------------------------------

def policy_stats(new_logprobs, logprobs, clip):
    """What to log about each token of an update, all (B, R).

    approxkl 0.5 (log p_new - log p)^2: how far the update has moved, in nats (Ziegler 2019);
    clipfrac 1 where the ratio is outside [1 - clip, 1 + clip]; the ratio itself.
    """
    log_ratio = new_logprobs - logprobs
    ratio = log_ratio.exp()
    return {"policy/approxkl": 0.5 * log_ratio ** 2,
            "policy/clipfrac": ((ratio - 1).abs() > clip).float(),
            "policy/ratio": ratio}


def adaptive_beta(beta, kl, target, n, horizon=10_000):
    """The KL controller of Ziegler 2019: beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    kl and target in nats per *sequence*, n = sequences in this batch, horizon in sequences. A KL
    per token would always look below target, and beta would shrink to nothing.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * n / horizon)
