"""The scripts' steps as a whole: what each option does, and the gradient of the update through the networks."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_ppo
import train_rm
import train_sft
from minirlhf import ppo
from minirlhf.answers import reference_answers, respond
from minirlhf.data import Example, Row
from minirlhf.generate import at_response, generate, right_pad
from minirlhf.reward import ScalarHeadModel
from minirlhf.reward_functions import FunctionReward
from minirlhf.weights import from_pretrained, scalar_from_pretrained
from small_world import (EOS, Networks, config, examples, generate_with_logprobs, letters_gpt2, move_away, ppo_flags,
                         recorded, rows_of, run_ppo, script_flags, skip_first_ratio_check, small_world)
from test_ppo import gae_by_definition


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = small_world(tmp_path_factory.mktemp("world"))
    (folder / "reward.py").write_text('def share_of_a(prompts, responses):\n'
                                      '    return [text.count("a") / (len(text) + 1) for text in responses]\n')
    return folder


# ---- the gradient ----------------------------------------------------------------------------------------------------

def test_the_gradient_of_the_update_is_that_of_finite_differences(monkeypatch):
    """What update() backpropagates, in float64, against finite differences of the losses that it reports.

    Along random directions. The rollout is moved a little away, so that some ratios and values are clipped.
    """
    skip_first_ratio_check(monkeypatch)
    n = Networks(config(epochs=1, minibatches=1), B=6)
    n.rollout = move_away(n.rollout._replace(**{
        name: x.double() for name, x in n.rollout._asdict().items() if getattr(x, "dtype", None) == torch.float32}))
    for model, loss in ((n.policy.double(), "loss/policy"), (n.value_model.double(), "loss/value")):
        parameters = list(model.parameters())
        gradients = [torch.zeros_like(p) for p in parameters]
        hooks = [p.register_hook(total.add_) for p, total in zip(parameters, gradients)]    # before they are clipped
        n.update(lr=0.0)
        for hook in hooks:
            hook.remove()
        for seed in range(2):
            torch.manual_seed(seed)
            direction = [1e-6 * torch.randn_like(p) for p in parameters]
            expected = sum((g * d).sum() for g, d in zip(gradients, direction))
            ends = []
            for sign in (1, -2, 1):                                     # there, back through the start, to the start
                with torch.no_grad():
                    for p, d in zip(parameters, direction):
                        p += sign * d
                ends.append(n.update(lr=0.0)[loss])
            assert math.isclose((ends[0] - ends[1]) / 2, expected, rel_tol=1e-4)


# ---- rewards and advantages ------------------------------------------------------------------------------------------

def check_advantages(lam=0.95):
    """Returns are the advantages of GAE with gamma 1, by its quadratic definition, plus the values; then whitening."""
    rollout = Networks(config(lam=lam)).rollout
    mask, lengths = rollout.response_mask, rollout.response_mask.sum(dim=1).tolist()
    expected = gae_by_definition(rollout.rewards, rollout.values, lengths, 1.0, lam)[mask]
    np.testing.assert_allclose((rollout.returns - rollout.values)[mask], expected, atol=1e-4)
    white = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(rollout.advantages[mask], white, atol=1e-4)
    assert (rollout.advantages[~mask] == 0).all()


@pytest.mark.parametrize("lam", [0.95, 0.5])
def test_advantages_are_those_of_gae_with_gamma_one_and_whitened(lam):
    check_advantages(lam)


def sequence_kl(rollout):
    return (rollout.logprobs - rollout.ref_logprobs).masked_fill(~rollout.response_mask, 0).sum(dim=1)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_is_the_price_of_a_nat(beta):
    rollout = Networks(config(beta=beta, missing_eos=-3.0)).rollout
    torch.testing.assert_close(rollout.rewards.sum(dim=1), rollout.scores - beta * sequence_kl(rollout))


def test_the_kl_is_paid_by_unfinished_responses_too():
    n = Networks(config(missing_eos=-5.0), B=40)
    rollout, cut = n.rollout, ~n.rollout.finished
    assert (rollout.scores[cut] == -5).all() and (rollout.scores[~cut] > -5).all()
    torch.testing.assert_close(rollout.rewards.sum(dim=1)[cut], -5 - n.cfg.beta * sequence_kl(rollout)[cut])


# ---- the passes over a rollout ---------------------------------------------------------------------------------------

def rows_read_by(model):
    """A list that fills with the rows, as tuples of their tokens without pads, that the model reads from now on."""
    rows = []
    model.register_forward_hook(lambda _, inputs, __: rows.extend(rows_of(*inputs)))
    return rows


def test_every_pass_is_a_fresh_permutation_of_all_rows():
    """In the passes over one rollout, and from one rollout to the next."""
    n = Networks(config(epochs=4, minibatches=3, micro_batch=0))
    all_rows = sorted(rows_of(n.rollout.ids, n.rollout.attention_mask))
    assert len(set(all_rows)) == 12
    seen = [rows_read_by(model) for model in (n.policy, n.value_model)]
    for iteration in (0, 1):
        n.update(lr=0.0, iteration=iteration)
    for rows in seen:                                                   # of the policy and of the value model
        passes = [rows[i:i + 12] for i in range(0, len(rows), 12)]
        assert len(passes) == 8 and all(sorted(each) == all_rows for each in passes)
        assert len({frozenset(each[:4]) for each in passes}) == 8       # rows of a minibatch are sorted by length


def optimizer_steps(action):
    """The learning rates of all optimizer steps during action(), in their order."""
    rates = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        action()
    finally:
        hook.remove()
    return rates


@pytest.mark.parametrize("rows, minibatches", [(9, 4), (12, 1)])
def test_a_pass_has_as_many_steps_as_it_is_told_on_minibatches_of_equal_size(rows, minibatches):
    n = Networks(config(epochs=1, minibatches=minibatches, micro_batch=0), B=rows)
    sizes = []
    for model in (n.policy, n.value_model):
        model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    assert len(optimizer_steps(n.update)) == 2 * minibatches == len(sizes)
    assert sum(sizes) == 2 * rows and max(sizes) - min(sizes) <= 1


def test_clip_is_the_limit_of_the_values_change():
    """Values moved by 3 towards the returns: each is clipped, and the loss is more than the plain squared error."""
    for clip, clipped in ((0.2, 1), (100.0, 0)):
        n = Networks(config(epochs=1, clip=clip))
        rollout, mask = n.rollout, n.rollout.response_mask
        n.rollout = rollout._replace(values=rollout.values + 3 * (rollout.returns - rollout.values).sign())
        metrics = n.update(lr=0.0)
        values = at_response(n.value_model(rollout.ids, rollout.attention_mask), rollout.P).detach()
        plain = float((0.5 * (values - rollout.returns) ** 2)[mask].mean())
        assert metrics["value/clipfrac"] == clipped
        if clipped:
            assert metrics["loss/value"] > 1.1 * plain
        else:
            assert math.isclose(metrics["loss/value"], plain, rel_tol=1e-4)


def test_clip_is_the_policys_limit():
    clipped = {clip: Networks(config(clip=clip)).update()["policy/clipfrac"] for clip in (0.01, 0.2, 100.0)}
    assert clipped[0.01] > clipped[0.2] > clipped[100.0] == 0


OUR_LOOP = {    # three iterations of the script with the flags below. The size of the micro-batches moves them by 1e-6
    "objective/scores": [-0.1033, -0.3439, 0.5608],
    "objective/kl": [0, 0.0527, 0.2431],
    "objective/entropy": [17.9566, 16.6783, 12.4736],
    "policy/approxkl": [0.0180, 0.0019, 0.0024],
    "policy/clipfrac": [0.2625, 0.0219, 0.0242],
    "loss/policy": [-0.0366, -0.0182, -0.0175],
    "loss/value": [0.5131, 0.4806, 0.3625],
    "value/clipfrac": [0, 0.2022, 0.3623],
    "value/explained_variance": [0, 0.0101, 0.0274],
}


def test_three_iterations_of_ppo_are_those_of_our_own_loop(world):
    """A run of make_rollout() and update() together, in numbers: nothing else tests what they hand to each other."""
    metrics = run_ppo(world, *"--iterations 3 --batch_size 24 --epochs 3 --lr 1e-3 --value_lr 1e-2 --beta 0.1 "
                      "--lam 0.9 --missing_eos -2 --temperature 0.9 --minibatches 2 --seed 1".split())
    for name, expected in OUR_LOOP.items():
        found = [row[name] for row in metrics]
        np.testing.assert_allclose(found, expected, rtol=0.003, atol=3e-4, err_msg=f"{name} of three iterations")


# ---- what main() sets up ---------------------------------------------------------------------------------------------

def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("reward, start", [("rm", "rm"), ("reward.py:share_of_a", "sft")])
def test_the_value_model_starts_with_a_head_of_zeros_on_the_right_trunk(world, monkeypatch, reward, start):
    rollouts = recorded(monkeypatch, train_ppo, "make_rollout")
    run_ppo(world, "--reward", f"{world}/{reward}", "--lr", 0, "--value_lr", 0)
    _, policy, _, reward_model, value_model, *_ = rollouts[0][0]
    trunk = scalar_from_pretrained(world / "rm").transformer if start == "rm" else from_pretrained(world / "sft")
    assert isinstance(value_model, ScalarHeadModel) and same_weights(value_model.transformer, trunk)
    assert (value_model.score.weight == 0).all() and all(p.requires_grad for p in value_model.parameters())
    assert same_weights(policy, from_pretrained(world / "sft"))
    if start == "rm":                                                   # the reward model keeps its own head
        assert same_weights(reward_model, scalar_from_pretrained(world / "rm"))
        assert not any(p.requires_grad for p in reward_model.parameters())
    else:
        assert isinstance(reward_model, FunctionReward)


def test_each_optimizer_moves_its_own_network(world):
    """After one iteration policy and value model have moved, each by its own learning rate alone."""
    for flags, expected in (([], [True, True]), (["--lr", 0], [False, True]), (["--value_lr", 0], [True, False])):
        run_ppo(world, *flags)
        state = torch.load(world / "ppo/state.pt", weights_only=True)
        start = from_pretrained(world / "sft"), scalar_from_pretrained(world / "rm").transformer
        end = state["policy"], {name.removeprefix("transformer."): x for name, x in state["value"].items()}
        assert [any(not torch.equal(x, after[name]) for name, x in before.state_dict().items())
                for before, after in zip(start, end)] == expected


def test_learning_rates_fall_in_a_line_to_zero(world):
    flags = ["--iterations", 4, "--lr", 4e-4, "--value_lr", 8e-4, "--epochs", 1, "--minibatches", 1]
    ppo_rates = optimizer_steps(lambda: run_ppo(world, *flags))
    np.testing.assert_allclose(ppo_rates, [4e-4, 8e-4, 3e-4, 6e-4, 2e-4, 4e-4, 1e-4, 2e-4])
    rm_rates = optimizer_steps(lambda: train_rm.main(script_flags(
        world, "rates", "--data", f"{world}/comparisons.jsonl", "--lr", 1e-3, "--batch_size", 10, "--epochs", 2)))
    np.testing.assert_allclose(rm_rates, np.linspace(1e-3, 0, len(rm_rates) + 1)[:-1])


def test_sft_warms_up_then_falls_in_a_line_to_zero(world):
    rates = optimizer_steps(lambda: train_sft.main(script_flags(
        world, "rates", "--data", f"{world}/demonstrations.jsonl", "--lr", 1e-3, "--batch_size", 1, "--epochs", 4)))
    peak = int(np.argmax(rates))
    assert len(rates) == 160 and 0 < peak < 80 and 0 < rates[0] < 1e-4 and max(rates) <= 1e-3
    assert all(a < b for a, b in zip(rates[:peak], rates[1:peak + 1]))
    falling = rates[peak:]
    np.testing.assert_allclose(falling, np.linspace(falling[0], 0, len(falling) + 1)[:-1])


def test_beta_is_fixed_unless_there_is_a_target(world):
    fixed = run_ppo(world, "--iterations", 3)
    assert {row["objective/beta"] for row in fixed} == {fixed[0]["objective/beta"]}
    steered = run_ppo(world, "--iterations", 4, "--target_kl", 6, "--beta", 0.2)
    assert steered[0]["objective/beta"] == 0.2 and steered[1]["objective/beta"] < 0.2
    for now, after in zip(steered, steered[1:]):
        expected = ppo.adaptive_beta(now["objective/beta"], now["objective/kl"], 6, 12)
        assert math.isclose(after["objective/beta"], expected, rel_tol=1e-9)


def test_a_function_as_the_reward_is_normalised_over_samples_of_the_sft_model(world):
    metrics = run_ppo(world, "--reward", f"{world}/reward.py:share_of_a", "--batch_size", 256, "--missing_eos", 0,
                      "--micro_batch", 0, "--max_response", 30, "--lr", 0)
    assert abs(metrics[0]["objective/scores"]) < 0.25 and abs(metrics[0]["rollout/score_std"] - 1) < 0.25


@pytest.mark.parametrize("flags", [["--target_kl", 6, "--lam", 1, "--clip", 0.1], ["--dtype", "bfloat16"]])
def test_ppo_learns_to_write_what_is_rewarded_whatever_the_options(world, flags):
    metrics = run_ppo(world, "--reward", f"{world}/reward.py:share_of_a", "--iterations", 15, "--batch_size", 32,
                      "--lr", 2e-3, "--micro_batch", 0, *flags)
    scores = [row["objective/scores"] for row in metrics]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.8
    assert metrics[-1]["rollout/eos_rate"] > metrics[0]["rollout/eos_rate"]


def test_with_nothing_to_gain_the_policy_stays(world):
    """A constant reward, no penalty and no value to learn: no advantage, no step."""
    (world / "same.py").write_text("def same(prompts, responses):\n    return [1.0] * len(responses)\n")
    run_ppo(world, "--reward", f"{world}/same.py:same", "--missing_eos", 0, "--beta", 0, "--iterations", 2)
    before, after = from_pretrained(world / "sft").state_dict(), from_pretrained(world / "ppo").state_dict()
    assert max((after[name] - before[name]).abs().max() for name in before) < 1e-6


@pytest.mark.parametrize("script, flags", [(train_ppo, ["--value_lr", 1e30]), (train_sft, ["--lr", 1e30]),
                                           (train_rm, ["--lr", 1e30])])
def test_a_gradient_that_is_not_finite_ends_the_run(world, script, flags):
    if script is train_ppo:
        argv = ppo_flags(world, *flags)
    else:
        data = "demonstrations" if script is train_sft else "comparisons"
        argv = script_flags(world, "burst", "--data", f"{world}/{data}.jsonl", "--batch_size", 16, *flags)
    with pytest.raises(RuntimeError, match="non-finite"):
        script.main(argv)


# ---- the other two scripts -------------------------------------------------------------------------------------------

def test_sft_learns_the_response_and_its_eos_and_not_the_prompt():
    """The negative log-likelihood of the response and its EOS, not of the prompt, by hand in float64."""
    model, batch = letters_gpt2(), [Example(None, [97, 98], [[99, EOS]]), Example(None, [100], [[97, 98, 99, EOS]])]
    loss, n_tokens = train_sft.sft_loss(model, batch, "cpu")
    exact, expected = copy.deepcopy(model).double(), 0.0
    for example in batch:
        ids, start = example.prompt + example.responses[0], len(example.prompt)
        logprobs = exact.logits(exact(torch.tensor([ids])))[0].log_softmax(-1)
        expected -= sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids)))
    assert n_tokens == 6 and math.isclose(loss.item(), expected, rel_tol=1e-5)


def test_the_loss_of_the_reward_model_by_hand():
    """The pair loss of each prompt, plus lm_coef times the mean loss of its answers' tokens: by hand, without pads."""
    model, cfg = ScalarHeadModel(letters_gpt2()), train_rm.Config(lm_coef=0.3)
    answers = [[[97, EOS], [98, 99, 100, EOS]], [[99, 97, EOS], [100, EOS], [EOS]]]
    batch = [Example(Row("x:1", "p", (), (1, 2, 3)[:len(a)]), [101, 97 + i][i:], a) for i, a in enumerate(answers)]
    exact, expected, n_right = copy.deepcopy(model).double(), 0.0, 0
    for example in batch:
        scores, nll, start = [], [], len(example.prompt)
        for response in example.responses:
            ids = torch.tensor([example.prompt + response])
            hidden = exact.transformer(ids)
            scores.append(exact.score(hidden)[0, -1, 0].item())
            logprobs = exact.transformer.logits(hidden)[0].log_softmax(-1)
            nll += [-logprobs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]
        pairs = [scores[i] - scores[j] for i in range(len(scores)) for j in range(i + 1, len(scores))]
        n_right += sum(difference > 0 for difference in pairs)
        expected += sum(math.log1p(math.exp(-d)) for d in pairs) / len(pairs) + 0.3 * sum(nll) / len(nll)
    loss, right, n_pairs = train_rm.reward_model_loss(model, batch, cfg, "cpu")
    assert math.isclose(loss.item(), expected, rel_tol=1e-5) and (right, n_pairs) == (n_right, 4)


def test_the_reward_model_starts_as_the_sft_model_and_is_normalised_on_its_samples(world):
    """Fresh samples of the SFT model earn 0 on average, give or take 1. Before training its trunk is the SFT model.

    The answers of the comparisons have at most 9 letters and an EOS, and the samples are as long.
    """
    train_rm.main(script_flags(world, "new_rm", "--data", f"{world}/comparisons.jsonl", "--lr", 0, "--epochs", 1))
    model, sft = scalar_from_pretrained(world / "new_rm").requires_grad_(False), from_pretrained(world / "sft")
    assert same_weights(model.transformer, sft)
    prompts = [example.prompt for example in examples(40)] * 40
    answers = respond(sft, prompts, 10, (EOS, 0), torch.Generator().manual_seed(7))
    scores = model.normalised_scores(*right_pad([prompt + ids for prompt, (ids, _) in zip(prompts, answers)]))
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.15


def test_scores_are_normalised_at_the_temperature_and_length_of_ppo():
    """On samples at --temperature that are as long as the longest compared answer: by hand, one after another."""
    sft, model, cfg = letters_gpt2(0), ScalarHeadModel(letters_gpt2(1)), train_rm.Config(temperature=0.4)
    compared = [Example(None, [97 + i], [[98] * 3, [99] * (4 + i)]) for i in range(3)]
    train_rm.normalise(model, sft, compared, (EOS, 0), cfg, "cpu")
    chosen, answers = reference_answers(sft, compared, 6, (EOS, 0), cfg)
    scores = [model(torch.tensor([example.prompt + ids]))[0, -1] for example, (ids, _) in zip(chosen, answers)]
    mean, std = torch.stack(scores).mean().item(), torch.stack(scores).std().item()
    np.testing.assert_allclose([model.reward_mean, model.reward_std], [mean, std], rtol=1e-3)


# ---- bfloat16 --------------------------------------------------------------------------------------------------------

def test_in_bfloat16_a_rollout_is_sampled_from_a_copy_of_the_policy(monkeypatch):
    """The copy is in bfloat16, as near to the policy as autocast is. The policy stays."""
    def watched(model, *args):
        *sampled, logprobs = generate_with_logprobs(generate, model, *args)
        seen.append((model, logprobs))
        return sampled
    monkeypatch.setattr(train_ppo, "generate", watched)
    seen = []
    n = Networks(config(dtype="bfloat16"), B=64)
    before = copy.deepcopy(n.policy.state_dict())
    rollout = n.make_rollout()
    sampler, sampled = seen[-1]
    assert all(p.dtype == torch.bfloat16 for p in sampler.h.parameters() if p.dim() == 2)
    assert sampler.wte.weight.dtype == torch.float32
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in n.policy.state_dict().items())
    difference = (sampled - rollout.logprobs)[rollout.response_mask]
    assert difference.pow(2).mean().sqrt() < 0.05 and difference.mean().abs() < 0.01
