"""The mathematics of PPO for language models: pure functions of tensors, no model inside.

Shapes: B batch    R response length    V vocabulary. Every (B, R) tensor is aligned with the response's tokens and comes
with a mask (B, R) bool, True at sampled tokens (the EOS included). What stands under False never reaches a result.
The numbers are the steps of train_ppo.py; 1 is in generate.py. Units: log-probabilities, KL and entropy in nats.

Sources: Ziegler et al. 2019 and its code openai/lm-human-preferences ("A"); Stiennon et al. 2020; Schulman et al. 2015
(GAE, arXiv 1506.02438) and 2017 (PPO, arXiv 1707.06347); summarize_from_feedback_details ("C", arXiv 2403.17031).
"""

import torch
from torch.autograd.function import once_differentiable


# ---- statistics over tokens ------------------------------------------------------------------------------------------

def masked_sum(x, mask):
    """Sum of x where mask is True. masked_fill and not x * mask: nan * 0 is nan."""
    return x.masked_fill(~mask, 0).sum()


def masked_mean(x, mask):
    """Mean of x over all True positions together (not a mean of row means)."""
    return masked_sum(x, mask) / mask.sum()


def whiten(x, mask, shift_mean=True):
    """x to variance 1 over the True positions, and to mean 0 if shift_mean; False positions become 0.

    Population variance and eps 1e-8, as in A.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean).masked_fill(~mask, 0)


# ---- 2. Score: what a response without an EOS gets -------------------------------------------------------------------

def penalise_unfinished(scores, finished, missing_eos):
    """scores (B,) with a fixed low score where finished (B,) bool is False.

    A gave -1 to answers without a period; when scores have variance 1 that is better than what a sixth of all finished
    responses get, so the default here is lower.
    """
    return torch.where(finished, scores, missing_eos)


# ---- 3. Log-probabilities --------------------------------------------------------------------------------------------

class TokenLogprobs(torch.autograd.Function):
    """log softmax(z)[token], whose gradient is one_hot(token) - softmax(z): z (N, V), tokens (N,) -> (N,).

    Written out, for left to itself PyTorch makes one more tensor of the size of the logits on the way back.
    """

    @staticmethod
    def forward(ctx, z, tokens):
        logprobs = torch.log_softmax(z, dim=1)                  # (N, V)
        ctx.save_for_backward(logprobs, tokens)
        return logprobs.gather(1, tokens[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        logprobs, tokens = ctx.saved_tensors
        dz = logprobs.exp().mul_(-gradient[:, None])            # (N, V)
        return dz.scatter_add_(1, tokens[:, None], gradient[:, None]), None


def token_logprobs(logits, tokens, temperature=1.0):
    """Log-probability of each token: logits (..., V), tokens (...) int64 -> (...) float32, in nats.

    The one function for SFT, rollout, reference and update. The temperature must be the sampling temperature wherever
    the tokens were sampled: PPO's ratio compares the distribution that acted, not the one at temperature 1.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return TokenLogprobs.apply(logits.flatten(0, -2), tokens.flatten()).view(tokens.shape)


def token_entropy(logits, temperature=1.0):
    """Entropy of the next-token distribution, (..., V) -> (...) float32, in nats."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


# ---- 4. Reward per token ---------------------------------------------------------------------------------------------

def kl_k1(logprobs, ref_logprobs):
    """log p - log ref of the sampled tokens: an unbiased estimate of KL(p || ref) that may be negative."""
    return logprobs - ref_logprobs


def kl_k3(logprobs, ref_logprobs):
    """(ref/p - 1) - log(ref/p): unbiased too, never negative, less noisy (Schulman, "Approximating KL divergence").

    Only for the log: the reward uses k1. With the ratio the other way round it estimates another divergence.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(kl, scores, mask, beta):
    """-beta * KL at every token, plus the score at the last one: kl (B, R), scores (B,) -> (B, R)."""
    rewards = (-beta * kl).masked_fill(~mask, 0)
    last = mask.sum(dim=1, keepdim=True) - 1                    # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


# ---- 5. Values and advantages ----------------------------------------------------------------------------------------

def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation, all (B, R) -> advantages, returns (B, R), 0 under the mask.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  returns = A + V, before whitening.
    The episode ends with the response: the value after the last token is 0. gamma 1 and lambda 0.95 as in A.
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])   # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


# 6. Whiten the advantages: whiten(), above.


# ---- 7. Losses, per token: the caller sums over the mask and divides by the tokens of the minibatch -------------------

def policy_losses(logprobs, old_logprobs, advantages, clip):
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), PPO equation 7: (B, R) -> (B, R)."""
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_losses(values, old_values, returns, clip):
    """0.5 max((V - R)^2, (V_clipped - R)^2), V_clipped within clip of the rollout's value: (B, R) -> (B, R)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


# ---- 8. Watch and steer ----------------------------------------------------------------------------------------------

def approx_kl(logprobs, old_logprobs):
    """0.5 (log p - log p_old)^2: how far an update has moved, per token, nats (A)."""
    return 0.5 * (logprobs - old_logprobs) ** 2


def clipped(logprobs, old_logprobs, clip):
    """True where the ratio lies outside [1 - clip, 1 + clip]."""
    return (torch.exp(logprobs - old_logprobs) - 1).abs() > clip


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over the True positions: 1 is a perfect critic, 0 is none (A)."""
    error = returns - values
    residual = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    return 1 - residual / (masked_mean((returns - masked_mean(returns, mask)) ** 2, mask) + 1e-8)


def adaptive_beta(beta, kl, target, n, horizon):
    """The KL controller of A: beta (1 + clip(kl / target - 1, +-0.2) n / horizon).

    kl and target in nats per *sequence*, n = sequences in this batch, horizon in sequences (10,000 in A).
    Fed with a KL per token it would believe itself below target for ever, and let beta fall to nothing.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * n / horizon)
