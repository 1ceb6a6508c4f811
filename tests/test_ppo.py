"""The mathematics of PPO against brute force: enumeration, definitions, finite differences. The traps are in
test_traps.py; here is what must hold of each function of minirlhf/ppo.py."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from minirlhf import ppo
from mutation import assert_notices
from small_world import ragged_mask

LENGTHS, R = [5, 1, 7, 3], 7



def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distributions(seed, V=3):
    """Two distributions over V tokens, as logits in float64."""
    return randn(V, seed=seed), randn(V, seed=seed + 100)


# ---- statistics over tokens ------------------------------------------------------------------------------------------

def test_whitening_is_whitening_of_the_compacted_vector():
    mask, x = ragged_mask(LENGTHS, R), randn(4, R) * 3 + 5
    compact = x[mask].numpy()
    white = ppo.whiten(x, mask)
    np.testing.assert_allclose(white[mask], (compact - compact.mean()) / compact.std(), rtol=1e-7)
    assert (white[~mask] == 0).all()


def test_the_mean_is_over_tokens_and_not_over_rows():
    x = torch.tensor([[1.0, 1, 1], [4, 9, 9]])
    assert ppo.masked_mean(x, ragged_mask([3, 1], 3)) == 7 / 4


def test_the_variance_is_over_tokens_too():
    """Of the compacted vector, divided by n. For one token alone it is 0."""
    mask, x = ragged_mask(LENGTHS, R), randn(4, R) * 3 + 5
    assert math.isclose(ppo.masked_variance(x, mask), np.var(x[mask].numpy()), rel_tol=1e-9)
    assert ppo.masked_variance(x[:1], ragged_mask([1], R)) == 0


def test_the_sequence_mean_is_that_of_a_loop():
    """Against a loop over the responses and their tokens. Other rows hold no response and do not count."""
    mask, x = ragged_mask([*LENGTHS, 0], R), randn(5, R)
    sums = [sum(x[b, t].item() for t in range(length)) for b, length in enumerate(LENGTHS)]
    assert math.isclose(ppo.sequence_mean(x, mask), sum(sums) / 4, rel_tol=1e-9)
    assert math.isclose(ppo.sequence_mean(torch.ones_like(x), mask), sum(LENGTHS) / 4)


# ---- log-probabilities, KL, entropy: a world of three tokens ---------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_log_probabilities_and_entropy_are_those_of_the_tempered_distribution(temperature):
    logits = randn(5, 3)
    weights = np.exp(logits.numpy() / temperature)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    for token in range(3):
        logprobs = ppo.token_logprobs(logits, torch.full((5,), token), temperature)
        np.testing.assert_allclose(logprobs.exp(), probabilities[:, token], rtol=1e-12)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=1)
    np.testing.assert_allclose(ppo.token_entropy(logits, temperature), entropy, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_the_gradients_of_log_probabilities_and_entropy_are_finite_differences(temperature):
    """In float64 from end to end."""
    tokens, logits = torch.tensor([0, 5, 2, 2]), randn(4, 6).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: ppo.token_logprobs(z, tokens, temperature), (logits,))
    assert torch.autograd.gradcheck(lambda z: ppo.token_entropy(z, temperature), (logits,))


@pytest.mark.parametrize("seed", range(5))
def test_approx_kl_tends_to_the_exact_kl_for_small_steps(seed):
    old, direction = distributions(seed)
    for step in (1e-1, 1e-2, 1e-3):
        old_logprobs, logprobs = old.log_softmax(0), (old + step * direction).log_softmax(0)
        exact = (old_logprobs.exp() * (old_logprobs - logprobs)).sum()
        estimate = (old_logprobs.exp() * ppo.policy_stats(logprobs, old_logprobs, 0.2)["policy/approxkl"]).sum()
        assert abs(estimate / exact - 1) < 3 * step


# ---- rewards, values, advantages -------------------------------------------------------------------------------------

def gae_by_definition(rewards, values, lengths, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_(t+l), row by row, in O(T^2)."""
    advantages = np.zeros(rewards.shape)
    for b, T in enumerate(lengths):
        r, v = rewards[b, :T].tolist(), values[b, :T].tolist() + [0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(T)]
        for t in range(T):
            advantages[b, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.5), (1, 0), (1, 1)])
def test_gae_is_the_quadratic_definition_on_ragged_rows(gamma, lam):
    mask, rewards, values = ragged_mask(LENGTHS, R), randn(4, R), randn(4, R, seed=1)
    expected = gae_by_definition(rewards, values, LENGTHS, gamma, lam)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns[mask], (torch.tensor(expected) + values)[mask], atol=1e-12)


def test_with_lambda_one_the_return_is_the_reward_to_go_whatever_the_values():
    mask, rewards = ragged_mask(LENGTHS, R), randn(4, R)
    _, returns = ppo.gae(rewards, 100 * randn(4, R, seed=1), mask, gamma=1, lam=1)
    for b, T in enumerate(LENGTHS):
        for t in range(T):
            assert math.isclose(returns[b, t], rewards[b, t:T].sum(), abs_tol=1e-9)


def test_the_kl_is_paid_at_every_token_and_the_score_comes_at_the_last():
    mask, kl, scores = ragged_mask(LENGTHS, R), randn(4, R), randn(4, seed=1)
    rewards = ppo.token_rewards(kl, scores, mask, beta=0.3)
    for b, t in itertools.product(range(4), range(R)):
        expected = -0.3 * kl[b, t] if t < LENGTHS[b] else 0
        assert math.isclose(rewards[b, t], expected + scores[b] * (t == LENGTHS[b] - 1), abs_tol=1e-12)


@pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
def test_what_stands_under_the_mask_reaches_no_statistic_reward_or_advantage(poison):
    mask, x, y, scores = ragged_mask(LENGTHS, R), randn(4, R), randn(4, R, seed=1), randn(4, seed=2)
    px, py = x.masked_fill(~mask, poison), y.masked_fill(~mask, poison)
    assert ppo.masked_sum(px, mask) == ppo.masked_sum(x, mask)
    for statistic in (ppo.masked_mean, ppo.masked_variance, ppo.sequence_mean):
        assert statistic(px, mask) == statistic(x, mask)
    assert torch.equal(ppo.token_rewards(px, scores, mask, 0.1), ppo.token_rewards(x, scores, mask, 0.1))
    assert torch.equal(ppo.whiten(px, mask), ppo.whiten(x, mask))
    for poisoned, clean in zip(ppo.gae(px, py, mask), ppo.gae(x, y, mask)):
        assert torch.equal(poisoned, clean)


# ---- losses ----------------------------------------------------------------------------------------------------------

def check_gradient(loss, x, h=1e-6):
    """autograd against central differences, in float64."""
    x = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(x), x)
    x = x.detach()
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = h
        difference = (loss(x + step) - loss(x - step)) / (2 * h)
        assert abs(gradient.view(-1)[i] - difference) < 1e-6


def clipping_cases():
    """Log-ratios on both sides of both edges of the clip 0.2, each with both signs of the advantage."""
    ratios = torch.tensor([[0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0]] * 2, dtype=torch.float64)
    advantages = torch.tensor([[1.5], [-0.7]], dtype=torch.float64).expand(2, 7)
    return ratios.log(), advantages


def check_policy_gradient():
    logprobs, advantages = clipping_cases()
    old = randn(2, 7)
    check_gradient(lambda x: ppo.policy_losses(x, old, advantages, 0.2).sum(), old + logprobs)


def check_policy_bound():
    """The loss is never below that of the plain ratio, is it inside the clip, and is flat where a step has gone far
    enough: above 1.2 for a good token, below 0.8 for a bad one."""
    logprobs, advantages = clipping_cases()
    x = logprobs.clone().requires_grad_()
    losses, plain = ppo.policy_losses(x, torch.zeros_like(x), advantages, 0.2), -logprobs.exp() * advantages
    gradient, = torch.autograd.grad(losses.sum(), x)
    inside = (logprobs.exp() - 1).abs() < 0.2
    assert (losses >= plain).all() and torch.equal(losses[inside], plain[inside])
    assert (gradient == 0).tolist() == [[False] * 5 + [True] * 2, [True] * 2 + [False] * 5]


def check_value_gradient():
    returns, old = randn(4, R), randn(4, R, seed=1)
    check_gradient(lambda x: ppo.value_losses(x, old, returns, 0.2).sum(), old + 0.3 * randn(4, R, seed=2))


def check_value_bound():
    """Within the clip it is half the squared error; outside it is the worse of two, so never less than that."""
    returns, old, change = randn(4, R), randn(4, R, seed=1), 0.3 * randn(4, R, seed=2)
    losses, plain = ppo.value_losses(old + change, old, returns, 0.2), (old + change - returns) ** 2 / 2
    inside = change.abs() < 0.2
    assert (losses >= plain).all()
    torch.testing.assert_close(losses[inside], plain[inside])
    stuck = 0.5 * (old + 0.2 * change.sign() - returns) ** 2           # what the loss would be at the edge of the clip
    torch.testing.assert_close(losses[~inside], torch.maximum(plain, stuck)[~inside])
    torch.testing.assert_close(ppo.value_losses(old + change, old, returns, math.inf), plain)       # no clip


@pytest.mark.parametrize("check", [check_policy_gradient, check_policy_bound, check_value_gradient, check_value_bound])
def test_losses_and_their_gradients(check):
    check()


def test_the_gradient_of_the_first_step_is_the_policy_gradient():
    """At ratio 1 the clipped loss has the gradient of -A log p: by enumeration, that of the expected advantage."""
    logits, advantages = randn(3).requires_grad_(), torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    expected, = torch.autograd.grad(-(logits.softmax(0) * advantages).sum(), logits)
    logprobs, probabilities = logits.log_softmax(0), logits.softmax(0).detach()
    losses = ppo.policy_losses(logprobs, logprobs.detach(), advantages, 0.2)
    actual, = torch.autograd.grad((probabilities * losses).sum(), logits)
    torch.testing.assert_close(actual, expected)


def test_the_statistics_of_an_update_in_absolute_values():
    """approxkl is half the squared log-ratio, 0.5 at a log-ratio of 1; clipfrac says which ratios are clipped."""
    logprobs, old = clipping_cases()[0][0], randn(7)
    stats = ppo.policy_stats(old + logprobs, old, 0.2)
    assert stats["policy/clipfrac"].tolist() == [1, 1, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(stats["policy/ratio"], [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
    for log_ratio, expected in ((1.0, 0.5), (-1.0, 0.5), (2.0, 2.0), (0.0, 0.0)):
        assert ppo.policy_stats(torch.tensor([log_ratio]), torch.zeros(1), 0.2)["policy/approxkl"] == expected


def test_adaptive_beta_in_absolute_values():
    """One iteration of 100 sequences at twice the target raises beta by 0.2 * 100 / 10,000, no more."""
    for kl, factor in ((12.0, 1.002), (6.6, 1.001), (6.0, 1.0), (5.4, 0.999), (0.0, 0.998)):
        assert math.isclose(ppo.adaptive_beta(0.1, kl, 6.0, 100), 0.1 * factor, rel_tol=1e-9)


# ---- a wrong formula is noticed --------------------------------------------------------------------------------------

WHITENING = test_whitening_is_whitening_of_the_compacted_vector
STATISTICS = test_the_statistics_of_an_update_in_absolute_values
GAE = partial(test_gae_is_the_quadratic_definition_on_ragged_rows, 0.9, 0.5)


@pytest.mark.parametrize("check, name, old, new", [
    (WHITENING, "whiten", "masked_mean(x, mask)", "x.mean()"),
    (WHITENING, "whiten", "masked_variance(x, mask)", "x[mask].var()"),    # n - 1
    (test_the_variance_is_over_tokens_too, "masked_variance", "x - masked_mean(x, mask)", "x"),
    (test_the_sequence_mean_is_that_of_a_loop, "sequence_mean", "mask.any(dim=1).sum()", "mask.sum()"),
    (GAE, "gae", "gamma * lam * next_advantage", "lam * next_advantage"),
    (GAE, "gae", "+ gamma * next_value - values", "+ gamma * values[:, -1] - values"),
    (GAE, "gae", "values.masked_fill(~response_mask, 0)", "values"),                      # bootstraps off a pad
    (GAE, "gae", "return advantages, advantages + values", "return advantages, advantages"),
    (check_policy_gradient, "policy_losses", "* advantages)", "* advantages).detach() + new_logprobs"),
    (check_policy_bound, "policy_losses", "-torch.min(", "-torch.max("),
    (check_policy_bound, "policy_losses", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
    (check_value_gradient, "value_losses", "(new_values - values).clamp", "(new_values - values).detach().clamp"),
    (check_value_bound, "value_losses", "torch.max(", "torch.min("),
    (STATISTICS, "policy_stats", "0.5 * log_ratio ** 2", "log_ratio ** 2"),
    (STATISTICS, "policy_stats", "= new_logprobs - logprobs", "= logprobs - new_logprobs"),
])
def test_another_formula_is_noticed(check, name, old, new):
    assert_notices(check, (ppo, name, old, new))
