"""The scripts' steps as a whole: what each option does, and the gradient of the update through the networks."""

import copy
import math

import numpy as np
import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf.running.compute import set_tf_epsilon
from minirlhf.running.errors import UserError
from minirlhf.data import Example, right_pad
from minirlhf.generate import generate, respond
from minirlhf.ppo import token_logprobs
from minirlhf.reward import ScalarHeadModel
from minirlhf.weights import from_pretrained, scalar_from_pretrained
from mutation import mutant
from small_world import EOS, TOKENIZER, Networks, config, examples, letters_gpt2, ppo_flags, run_ppo, script_flags, small_world
from test_ppo import gae_by_definition


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = small_world(tmp_path_factory.mktemp("world"))
    (folder / "reward.py").write_text('def share_of_a(prompts, responses):\n'
                                      '    return [text.count("a") / (len(text) + 1) for text in responses]\n')
    return folder


def advantages_of(rollout, gamma=1.0, lam=0.95):
    lengths = rollout.mask.sum(dim=1).tolist()
    return torch.tensor(gae_by_definition(rollout.rewards, rollout.values, lengths, gamma, lam))


# ---- the gradient ----------------------------------------------------------------------------------------------------

def check_update_gradient(patch):
    """Backpropagation through the policy and the value model against finite differences in float64, along random
    directions; the rollout is moved a little away, so that some ratios and values are clipped."""
    n = Networks(config())
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)           # or the losses would be rounded to float32
    r, R = n.rollout, n.rollout.mask.shape[1]
    for name in ("logprobs", "values"):
        x = getattr(r, name).double()
        setattr(r, name, x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    networks = [copy.deepcopy(model).double() for model in (n.policy, n.value)]

    def loss():
        rows = torch.arange(12)
        return (train_ppo.policy_terms(r, rows, R, networks[0], n.cfg)["loss/policy_avg"]
                + train_ppo.value_terms(r, rows, R, networks[1], n.cfg)["loss/value_avg"])
    loss().backward()
    for seed, model in enumerate(networks * 3):
        torch.manual_seed(seed)
        step = [1e-6 * torch.randn_like(p) for p in model.parameters()]
        expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), step) if p.grad is not None)
        with torch.no_grad():
            ends = []
            for sign in (1, -2, 1):                                     # there, back through the start, to the start
                for p, d in zip(model.parameters(), step):
                    p += sign * d
                ends.append(loss())
        assert math.isclose((ends[0] - ends[1]) / 2, expected, rel_tol=1e-4)


def test_the_gradient_of_the_update_is_that_of_finite_differences(monkeypatch):
    check_update_gradient(monkeypatch)


@pytest.mark.parametrize("name, old, new", [
    ("policy_terms", "attend, r.P), ids[:, r.P:], cfg", "attend, r.P).detach() + policy.wte.weight.sum() * 0, ids[:, r.P:], cfg"),
    ("value_terms", "values = response_values(value, ids, attend, r.P)", "values = response_values(value, ids, attend, r.P).detach() * "
                                                                         "value.score.weight.sum() / value.score.weight.sum().detach()"),
])
def test_a_cut_gradient_is_noticed(monkeypatch, name, old, new):
    monkeypatch.setattr(train_ppo, name, mutant(getattr(train_ppo, name), old, new))
    with pytest.raises(AssertionError):
        check_update_gradient(monkeypatch)


# ---- rewards and advantages ------------------------------------------------------------------------------------------

def test_whiten_advantages_can_be_switched_off():
    white, plain = Networks(config()).rollout, Networks(config(whiten_advantages=False)).rollout
    mask = plain.mask
    np.testing.assert_allclose(plain.advantages[mask], advantages_of(plain)[mask], atol=1e-4)
    assert abs(white.advantages[mask].mean()) < 1e-5
    assert math.isclose(white.advantages[mask].std(correction=0), 1, rel_tol=1e-4)
    assert torch.equal(white.returns, plain.returns)


def test_whiten_rewards_gives_them_variance_one_and_leaves_their_mean():
    white, plain = Networks(config(whiten_rewards=True)).rollout, Networks(config()).rollout
    mask = plain.mask
    assert math.isclose(white.rewards[mask].std(correction=0), 1, rel_tol=1e-4)
    assert math.isclose(white.rewards[mask].mean(), plain.rewards[mask].mean(), abs_tol=1e-5)
    assert abs(plain.rewards[mask].std(correction=0) - 1) > 0.1
    np.testing.assert_allclose((white.returns - white.values)[mask], advantages_of(white)[mask], atol=1e-4)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.5), (1.0, 1.0)])
def test_gamma_and_lambda_reach_the_advantages(gamma, lam):
    r = Networks(config(gamma=gamma, lam=lam)).rollout
    np.testing.assert_allclose((r.returns - r.values)[r.mask], advantages_of(r, gamma, lam)[r.mask], atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_beta_is_the_price_of_a_nat(beta):
    n = Networks(config(beta=beta, missing_eos=-3.0))
    kl = (n.rollout.logprobs - n.rollout.ref_logprobs).masked_fill(~n.rollout.mask, 0).sum(dim=1)
    torch.testing.assert_close(n.rollout.rewards.sum(dim=1), n.rollout.scores - beta * kl)


def test_the_kl_is_paid_by_unfinished_responses_too():
    n = Networks(config(missing_eos=-5.0), B=40)
    r = n.rollout
    r_kl = (r.logprobs - r.ref_logprobs).masked_fill(~r.mask, 0).sum(dim=1)
    cut = ~r.finished
    assert (r.scores[cut] == -5).all() and (r.scores[~cut] > -5).all()
    torch.testing.assert_close(r.rewards.sum(dim=1)[cut], -5 - n.cfg.beta * r_kl[cut])


# ---- the passes over a rollout ---------------------------------------------------------------------------------------

def rows_of_passes(monkeypatch, cfg, lr=0.1):
    """The rows of each pass, in the order in which they were used."""
    n, rows, real = Networks(cfg), [], train_ppo.policy_terms

    def policy_terms(rollout, part, *args):
        rows.extend(part.tolist())
        return real(rollout, part, *args)
    monkeypatch.setattr(train_ppo, "policy_terms", policy_terms)
    n.update(lr=lr)
    return [rows[i:i + 12] for i in range(0, len(rows), 12)]


@pytest.mark.parametrize("epochs", [1, 4])
def test_every_pass_is_a_fresh_permutation_of_all_rows(monkeypatch, epochs):
    passes = rows_of_passes(monkeypatch, config(epochs=epochs, minibatches=3))
    assert len(passes) == epochs and all(sorted(rows) == list(range(12)) for rows in passes)
    halves = {frozenset(rows[:4]) for rows in passes}                   # rows of a minibatch are sorted by length
    assert len(halves) == epochs


def test_stop_kl_ends_the_passes_after_the_one_that_went_too_far(monkeypatch):
    assert len(rows_of_passes(monkeypatch, config(epochs=4, stop_kl=1e-6))) == 1
    assert len(rows_of_passes(monkeypatch, config(epochs=4, stop_kl=10.0))) == 4


def test_a_value_clip_of_zero_is_no_clip():
    def value_loss(**changes):
        n = Networks(config(epochs=1, **changes))
        n.rollout.values = n.rollout.values + 3 * (n.rollout.returns - n.rollout.values).sign()
        metrics, r = n.update(lr=0.0), n.rollout
        values = train_ppo.response_values(n.value, r.ids, r.attend, r.P)
        return metrics, float((0.5 * (values - r.returns) ** 2)[r.mask].mean().detach())
    metrics, plain = value_loss(value_clip=0.0)
    assert metrics["val/clipfrac_avg"] == 0 and math.isclose(metrics["loss/value_avg"], plain, rel_tol=1e-4)
    metrics, plain = value_loss(value_clip=0.2)
    assert metrics["val/clipfrac_avg"] == 1 and metrics["loss/value_avg"] > 1.1 * plain


def test_clip_is_the_policys_limit():
    clipped = {clip: Networks(config(clip=clip)).update()["policy/clipfrac_avg"] for clip in (0.01, 0.2, 100.0)}
    assert clipped[0.01] > clipped[0.2] > clipped[100.0] == 0


# ---- what main() sets up ---------------------------------------------------------------------------------------------

def networks_of(world, monkeypatch, *flags):
    """Policy, value model and their learning rates as main() hands them to each update; and the metrics."""
    seen, real = [], train_ppo.update

    def update(rollout, policy, value, optimizers, *args):
        seen.append((*copy.deepcopy((policy, value)), [o.param_groups[0]["lr"] for o in optimizers]))
        return real(rollout, policy, value, optimizers, *args)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "update", update)
        metrics = run_ppo(world, *flags)
    return seen, metrics


def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("flags, start", [(["--value_from", "reward"], "rm"), (["--value_from", "sft"], "sft")])
def test_the_value_model_starts_from_the_model_it_is_told_with_its_head_at_zero(world, monkeypatch, flags, start):
    (policy, value, _), = networks_of(world, monkeypatch, *flags)[0]
    trunk = scalar_from_pretrained(world / "rm").transformer if start == "rm" else from_pretrained(world / "sft")
    assert isinstance(value, ScalarHeadModel) and same_weights(value.transformer, trunk)
    assert (value.score.weight == 0).all() and value.score.weight.requires_grad
    assert same_weights(policy, from_pretrained(world / "sft"))


def test_both_learning_rates_fall_in_a_line_to_zero(world, monkeypatch):
    seen, _ = networks_of(world, monkeypatch, "--iterations", 4, "--lr", 4e-4, "--value_lr", 8e-4)
    np.testing.assert_allclose([rates for *_, rates in seen], [[4e-4, 8e-4], [3e-4, 6e-4], [2e-4, 4e-4], [1e-4, 2e-4]])


def test_tf_adam_sets_the_epsilon_of_every_step(world, monkeypatch):
    steps = []

    def set_and_note(optimizer, eps):
        set_tf_epsilon(optimizer, eps)
        steps.append(optimizer.param_groups[0]["eps"])
    monkeypatch.setattr(train_ppo, "set_tf_epsilon", set_and_note)
    run_ppo(world, "--iterations", 2, "--tf_adam")
    assert len(steps) == 2 * 4 * 2 * 2                                  # iterations, passes, minibatches, networks
    np.testing.assert_allclose(steps[::2], [1e-5 / math.sqrt(1 - 0.999 ** t) for t in range(1, 17)])
    steps.clear()
    run_ppo(world)
    assert not steps


def test_beta_is_fixed_unless_there_is_a_target(world):
    fixed = run_ppo(world, "--iterations", 3)
    assert {row["objective/beta"] for row in fixed} == {fixed[0]["objective/beta"]}
    steered = run_ppo(world, "--iterations", 4, "--target_kl", 6, "--horizon", 100, "--beta", 0.2)
    betas = [row["objective/beta"] for row in steered]
    assert betas[0] == 0.2 and all(abs(row["objective/kl"]) < 4.8 for row in steered)
    np.testing.assert_allclose(betas, [0.2 * (1 - 0.2 * 12 / 100) ** t for t in range(4)])      # as fast as it may fall


def test_a_function_as_the_reward_is_normalised_over_samples_of_the_sft_model(world):
    metrics = run_ppo(world, "--reward", f"{world}/reward.py:share_of_a", "--batch_size", 256, "--missing_eos", 0,
                      "--micro_batch", 0, "--max_response", 30, "--lr", 0)
    assert abs(metrics[0]["objective/scores"]) < 0.25 and abs(metrics[0]["val/score_std"] - 1) < 0.25


@pytest.mark.parametrize("flags", [[], ["--tf_adam", "--value_from", "sft", "--stop_kl", 0.05],
                                   ["--whiten_rewards", "--no-whiten_advantages", "--value_clip", 0]])
def test_ppo_learns_to_write_what_is_rewarded_whatever_the_options(world, flags):
    metrics = run_ppo(world, "--reward", f"{world}/reward.py:share_of_a", "--iterations", 15, "--batch_size", 32,
                      "--lr", 2e-3, "--micro_batch", 0, *flags)
    scores = [row["objective/scores"] for row in metrics]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.8
    assert metrics[-1]["val/eos_rate"] > metrics[0]["val/eos_rate"]


def test_with_nothing_to_gain_the_policy_stays(world, monkeypatch):
    """A constant reward, no penalty and no value to learn: no advantage, no step."""
    (world / "same.py").write_text("def same(prompts, responses):\n    return [1.0] * len(responses)\n")
    run_ppo(world, "--reward", f"{world}/same.py:same", "--missing_eos", 0, "--beta", 0, "--iterations", 2)
    before, after = from_pretrained(world / "sft").state_dict(), from_pretrained(world / "ppo").state_dict()
    assert max((after[name] - before[name]).abs().max() for name in before) < 1e-6


@pytest.mark.parametrize("script, flags, named", [
    (train_ppo, ["--value_lr", 1e30], r"iteration 0: the loss is (inf|nan); among its responses is '\w*' to '\w+'"),
    (train_sft, ["--lr", 1e30, "--warmup", 0], r"step \d: the loss is .*demonstrations.jsonl:\d+"),
    (train_rm, ["--lr", 1e30], r"step \d: the loss is .*comparisons.jsonl:\d+"),
])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_sample(world, script, flags, named):
    if script is train_ppo:
        argv = ppo_flags(world, *flags)
    else:
        data = "demonstrations" if script is train_sft else "comparisons"
        argv = script_flags(world, "burst", "--data", f"{world}/{data}.jsonl", "--batch_size", 16, *flags)
    with pytest.raises(UserError, match=named):
        script.main(argv)


# ---- the other two scripts -------------------------------------------------------------------------------------------

def check_sft_loss(sft_loss):
    """The negative log-likelihood of the response and its EOS, not of the prompt, by hand in float64."""
    model, batch = letters_gpt2(), [Example(None, [97, 98], [[99, EOS]]), Example(None, [100], [[97, 98, 99, EOS]])]
    loss, n_tokens = sft_loss(model, batch, "cpu")
    exact, expected = copy.deepcopy(model).double(), 0.0
    for example in batch:
        ids, start = example.prompt + example.responses[0], len(example.prompt)
        logprobs = exact.logits(exact(torch.tensor([ids])))[0].log_softmax(-1)
        expected -= sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids)))
    assert n_tokens == 6 and math.isclose(loss.item(), expected, rel_tol=1e-5)


def test_sft_learns_the_response_and_its_eos_and_not_the_prompt():
    check_sft_loss(train_sft.sft_loss)
    with pytest.raises(AssertionError):                                 # prompts learned too
        check_sft_loss(mutant(train_sft.sft_loss, "[e.prompt for e in examples]", "[e.prompt[:1] for e in examples]",
                              "[e.responses[0] for e", "[e.prompt[1:] + e.responses[0] for e"))


def check_reward_model_normalised(world, main):
    """Fresh samples of the SFT model earn 0 on average, give or take 1. Before training its trunk is the SFT model."""
    main(script_flags(world, "new_rm", "--data", f"{world}/comparisons.jsonl", "--lr", 0, "--epochs", 1,
                      "--sample_tokens", 12))
    model, sft = scalar_from_pretrained(world / "new_rm").requires_grad_(False), from_pretrained(world / "sft")
    assert same_weights(model.transformer, sft)
    prompts = [example.prompt for example in examples(40)] * 10
    answers = respond(sft, prompts, 12, EOS, torch.Generator().manual_seed(7))
    rewards = model.reward(*right_pad([prompt + ids for prompt, (ids, _) in zip(prompts, answers)]))
    assert abs(rewards.mean()) < 0.15 and abs(rewards.std() - 1) < 0.15


def test_the_reward_model_starts_as_the_sft_model_and_is_normalised_on_its_samples(world):
    check_reward_model_normalised(world, train_rm.main)
    raw = mutant(train_rm.main, "normalise(model, sft, examples, cfg, tokenizer)", "pass")
    with pytest.raises(AssertionError):
        check_reward_model_normalised(world, raw)


@pytest.mark.parametrize("rows, minibatches", [(12, 4), (9, 4), (3, 4), (12, 1)])
def test_a_pass_has_as_many_steps_as_it_is_told_or_as_there_are_rows(monkeypatch, rows, minibatches):
    n, steps, real = Networks(config(epochs=1, minibatches=minibatches), B=rows), [], train_ppo.gradients
    monkeypatch.setattr(train_ppo, "gradients", lambda terms, *args: steps.append(len(args[2])) or real(terms, *args))
    n.update()
    assert sum(steps) == 2 * rows and len(steps) == 2 * min(rows, minibatches) and max(steps) - min(steps) <= 1


# ---- bfloat16 --------------------------------------------------------------------------------------------------------

def check_logits_far_from_zero(logits):
    """Official GPT-2's logits lie near -100. What all of them share changes no probability, under autocast either."""
    model = letters_gpt2(0)
    hidden = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    hidden[:, 0], model.wte.weight.data[:, 0] = 1, -100
    expected = torch.log_softmax(hidden.double() @ model.wte.weight.double().T, dim=1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = token_logprobs(logits(model, hidden), torch.arange(6))
    assert (found - expected[torch.arange(6), torch.arange(6)]).abs().max() < 1e-3


def test_bfloat16_leaves_logits_alone_that_lie_far_from_zero():
    check_logits_far_from_zero(lambda model, hidden: model.logits(hidden))
    with pytest.raises(AssertionError):
        check_logits_far_from_zero(lambda model, hidden: hidden @ model.wte.weight.T)


def check_sampler(patch, roll_out):
    """In bfloat16 responses come from a copy in bfloat16, which is as near to the policy as autocast is; the policy stays."""
    cfg, policy, seen = config(dtype="bfloat16"), letters_gpt2(0), []
    before = copy.deepcopy(policy.state_dict())
    patch.setattr(train_ppo, "generate", lambda model, *args: seen.append((model, generate(model, *args))) or seen[-1][1])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        r = roll_out(policy, examples(64), TOKENIZER, cfg, 0, torch.device("cpu"))
        logprobs = token_logprobs(train_ppo.response_logits(policy, r.ids, r.attend, r.P), r.ids[:, r.P:], cfg.temperature)
    (sampler, sampled), = seen
    assert all(p.dtype == torch.bfloat16 for p in sampler.h.parameters() if p.dim() == 2) and sampler.wte.weight.dtype == torch.float32
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in policy.state_dict().items())
    difference = (sampled.logprobs[:, :r.mask.shape[1]] - logprobs)[r.mask]
    assert difference.pow(2).mean().sqrt() < 0.05 and difference.mean().abs() < 0.01


def test_in_bfloat16_a_rollout_is_sampled_from_a_copy_of_the_policy(monkeypatch):
    check_sampler(monkeypatch, train_ppo.roll_out)


@pytest.mark.parametrize("new", ["copy.deepcopy(policy)", "policy.bfloat16()", "bfloat16_copy(letters_gpt2(1))"])
def test_sampling_from_anything_else_is_noticed(monkeypatch, new):
    changed = mutant(train_ppo.roll_out, "bfloat16_copy(policy)", new)
    monkeypatch.setitem(changed.__globals__, "letters_gpt2", letters_gpt2)
    with pytest.raises(AssertionError):
        check_sampler(monkeypatch, changed)
