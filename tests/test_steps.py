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
from minirlhf.answers import respond
from minirlhf.generate import generate, response_logits, right_pad
from minirlhf.running.device import sampling_copy
from minirlhf import ppo
from minirlhf.data import batch_at, Example, Row
from minirlhf.reward_functions import FunctionReward
from minirlhf.ppo import masked_sum, token_logprobs
from minirlhf.reward import ScalarHeadModel
from minirlhf.running import compute
from minirlhf.files.errors import UserError
from minirlhf.weights import from_pretrained, scalar_from_pretrained
from mutation import mutant
from small_world import (CPU, EOS, TOKENIZER, Networks, config, examples, generate_with_logprobs, letters_gpt2,
                         move_away, ppo_flags, run_ppo, script_flags, skip_first_ratio_check, small_world)
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

PER_TOKEN = ("logprobs", "ref_logprobs", "entropy", "kl", "rewards", "values", "advantages", "returns")


def check_update_gradient():
    """What update() backpropagates, in float64, against finite differences of the losses that it reports.

    Along random directions. The rollout is moved a little away, so that some ratios and values are clipped.
    """
    n = Networks(config(epochs=1, minibatches=1))
    for name in PER_TOKEN:
        setattr(n.rollout, name, getattr(n.rollout, name).double())
    move_away(n.rollout)
    for model, loss in ((n.policy.double(), "loss/policy"), (n.value.double(), "loss/value")):
        parameters = [p for p in model.parameters()]
        gradients = [torch.zeros_like(p) for p in parameters]
        hooks = [p.register_hook(total.add_) for p, total in zip(parameters, gradients)]    # before they are clipped
        n.update(lr=0.0)
        for hook in hooks:
            hook.remove()
        for seed in range(3):
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


def test_the_gradient_of_the_update_is_that_of_finite_differences(monkeypatch):
    skip_first_ratio_check(monkeypatch)
    check_update_gradient()


@pytest.mark.parametrize("old, new", [
    ("response_logits(policy, r.ids, r.token_mask, r.P)",
     "response_logits(policy, r.ids, r.token_mask, r.P).detach() + policy.wte.weight.sum() * 0"),
    ("value(r.ids, r.token_mask)",
     "(value(r.ids, r.token_mask).detach() * value.score.weight.sum() / value.score.weight.sum().detach())"),
    ("= ppo.policy_losses(new_logprobs", "= ppo.policy_losses(new_logprobs + new_logprobs - new_logprobs.detach()"),
])
def test_a_cut_or_doubled_gradient_is_noticed(monkeypatch, old, new):
    skip_first_ratio_check(monkeypatch)
    monkeypatch.setattr(train_ppo, "update", mutant(train_ppo.update, old, new))
    with pytest.raises(AssertionError):
        check_update_gradient()


# ---- rewards and advantages ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lam", [0.95, 0.5, 1.0])
def test_advantages_are_those_of_gae_with_gamma_one_and_whitened(lam):
    r = Networks(config(lam=lam)).rollout
    expected = advantages_of(r, gamma=1.0, lam=lam)[r.mask]
    np.testing.assert_allclose((r.returns - r.values)[r.mask], expected, atol=1e-4)
    white = (expected - expected.mean()) / expected.std(correction=0)
    np.testing.assert_allclose(r.advantages[r.mask], white, atol=1e-4)
    assert (r.advantages[~r.mask] == 0).all()


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

def rows_read_by(model):
    """A list that fills with the rows, as tuples of their tokens without pads, that the model reads from now on."""
    rows = []
    model.register_forward_hook(lambda _, inputs, __: rows.extend(rows_of(*inputs)))
    return rows


def rows_of(ids, mask):
    return [tuple(row[own].tolist()) for row, own in zip(ids, mask)]


@pytest.mark.parametrize("epochs", [1, 4])
def test_every_pass_is_a_fresh_permutation_of_all_rows(epochs):
    n = Networks(config(epochs=epochs, minibatches=3))
    all_rows = sorted(rows_of(n.rollout.ids, n.rollout.token_mask))
    assert len(set(all_rows)) == 12
    seen = [rows_read_by(model) for model in (n.policy, n.value)]
    n.update()
    for rows in seen:                                                   # of the policy and of the value model
        passes = [rows[i:i + 12] for i in range(0, len(rows), 12)]
        assert len(passes) == epochs and all(sorted(each) == all_rows for each in passes)
        assert len({frozenset(each[:4]) for each in passes}) == epochs  # rows of a minibatch are sorted by length


def optimizer_steps(action):
    """The learning rates of all optimizer steps during action(), in their order."""
    rates = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        action()
    finally:
        hook.remove()
    return rates


@pytest.mark.parametrize("rows, minibatches", [(12, 4), (9, 4), (12, 1), (12, 12)])
def test_a_pass_has_as_many_steps_as_it_is_told_on_minibatches_of_equal_size(rows, minibatches):
    n = Networks(config(epochs=1, minibatches=minibatches, micro_batch=0), B=rows)
    sizes = []
    for model in (n.policy, n.value):
        model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    assert len(optimizer_steps(n.update)) == 2 * minibatches == len(sizes)
    assert sum(sizes) == 2 * rows and max(sizes) - min(sizes) <= 1


def check_clip(update, patch):
    """Values moved by 3 towards the returns: each is clipped, and the loss is more than the plain squared error."""
    patch.setattr(train_ppo, "update", update)
    for clip, clipped in ((0.2, 1), (100.0, 0)):
        n = Networks(config(epochs=1, clip=clip))
        r = n.rollout
        r.values = r.values + 3 * (r.returns - r.values).sign()
        metrics = n.update(lr=0.0)
        values = n.value(r.ids, r.token_mask)[:, r.P - 1:-1].detach()
        plain = float((0.5 * (values - r.returns) ** 2)[r.mask].mean())
        assert metrics["value/clipfrac"] == clipped
        if clipped:
            assert metrics["loss/value"] > 1.1 * plain
        else:
            assert math.isclose(metrics["loss/value"], plain, rel_tol=1e-4)


def test_clip_is_the_limit_of_the_values_change(monkeypatch):
    check_clip(train_ppo.update, monkeypatch)
    unclipped = mutant(train_ppo.update, "r.returns, cfg.clip)", "r.returns, 1e9)")
    with pytest.raises(AssertionError):
        check_clip(unclipped, monkeypatch)


def test_clip_is_the_policys_limit():
    clipped = {clip: Networks(config(clip=clip)).update()["policy/clipfrac"] for clip in (0.01, 0.2, 100.0)}
    assert clipped[0.01] > clipped[0.2] > clipped[100.0] == 0


# ---- parts of a rollout, batches, the optimizer step -----------------------------------------------------------------

def check_parts(parts, micro_batch):
    """Every row comes once, with its own fields, cut to the longest response of its part, with 0 off the mask."""
    r = Networks(config(), B=12).rollout
    clean = {name: getattr(r, name).masked_fill(~r.mask, 0) for name in PER_TOKEN}
    for name in PER_TOKEN:                                              # whatever the pads hold
        setattr(r, name, getattr(r, name).masked_fill(~r.mask, math.nan))
    rows = torch.tensor([11, 2, 3, 5, 7, 0, 1, 9])
    own_rows = {row: i for i, row in enumerate(rows_of(r.ids, r.token_mask))}
    found = []
    for part in parts(r, rows, micro_batch):
        indices = [own_rows.get(row, -1) for row in rows_of(part.ids, part.token_mask)]
        assert -1 not in indices
        found += indices
        R = int(r.mask[indices].sum(dim=1).max())
        assert 0 < len(indices) <= (micro_batch or len(rows)) and part.P == r.P
        assert part.mask.shape == (len(indices), R) and part.ids.shape == (len(indices), r.P + R)
        assert torch.equal(part.mask, r.mask[indices, :R])
        assert torch.equal(part.token_mask[:, r.P:], part.mask)
        for name in PER_TOKEN:
            assert torch.equal(getattr(part, name), clean[name][indices, :R]), name
    assert sorted(found) == sorted(rows.tolist())
    assert r.ids.shape[1] == r.P + r.mask.shape[1] and r.logprobs.isnan().any()         # the rollout stays as it was


@pytest.mark.parametrize("micro_batch", [0, 1, 3, 8, 100])
def test_parts_have_every_row_once_cut_to_its_longest_response_and_zeros_off_the_mask(micro_batch):
    check_parts(train_ppo.Rollout.parts, micro_batch)


@pytest.mark.parametrize("old, new", [
    ('.masked_fill(~part["mask"], 0)', ""),
    ("rows = rows[self", "rows = rows[:-1][self.mask.sum(dim=1)[rows[:-1]].argsort()] if True else rows[self"),           # one row is lost
    ("sum(dim=1).max())", "sum(dim=1).min())"),                                       # cut to the shortest
    ('part["mask"].sum(dim=1).max())', "self.mask.sum(dim=1).max())"), # cut to the longest of the rollout
    ("part[name][:, :self", "part[name].flip(0)[:, :self"),
])
def test_other_parts_are_noticed(old, new):
    changed = mutant(train_ppo.Rollout.parts, old, new)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_parts(changed, 3)


def test_cutting_a_rollout_into_parts_changes_no_loss(monkeypatch):
    skip_first_ratio_check(monkeypatch)
    n, reported = Networks(config()), {}
    move_away(n.rollout)
    for n.cfg.micro_batch in (0, 1, 5):
        reported[n.cfg.micro_batch] = n.update(lr=0.0)
    for name, x in reported[0].items():
        for micro_batch in (1, 5):
            assert math.isclose(reported[micro_batch][name], x, rel_tol=1e-4, abs_tol=1e-5), name


def check_batches(batch_at, size, n=10):
    """An endless stream of passes: each has every item once, in an order of its own. Every batch is full."""
    items = [f"item {i}" for i in range(n)]
    batches = [batch_at(items, size, step, 1) for step in range(4 * n)]
    assert all(len(batch) == size for batch in batches)
    stream = [item for batch in batches for item in batch]
    passes = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n)]
    assert all(sorted(each) == sorted(items) for each in passes)
    assert len(set(map(tuple, passes))) == len(passes)
    assert batch_at(items, size, 7, 1) == batches[7]                    # depends on nothing that ran before
    other_seed = [item for step in range(4 * n) for item in batch_at(items, size, step, 2)]
    assert other_seed != stream


@pytest.mark.parametrize("size", [1, 3, 5, 10, 24])
def test_batches_cover_every_pass_exactly_once(size):
    check_batches(batch_at, size)


@pytest.mark.parametrize("old, new", [
    ("[row % len(items)]", "[(row + row // len(items)) // 2 % len(items)]"),
    ("generator=generator(*numbers, epoch)", "generator=generator(*numbers)"),
    ("generator=generator(*numbers, epoch)", "generator=generator(epoch)"),
    ("generator=generator(*numbers, epoch)", "generator=generator(*numbers, step, epoch)"),     # with replacement
])
def test_other_batches_are_noticed(old, new):
    changed = mutant(batch_at, old, new)
    with pytest.raises(AssertionError):
        check_batches(changed, 3)


def check_step(step):
    """A gradient longer than 1 is scaled to length 1, a shorter one is left alone, then none is left. NaN stops before
    it reaches a weight."""
    for gradient, expected in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        model = torch.nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([gradient])
        step(model, optimizer, 0.5, "step 7")
        torch.testing.assert_close(before - model.weight.detach(), 0.5 * torch.tensor([expected]), atol=1e-5, rtol=1e-5)
        assert model.weight.grad is None or (model.weight.grad == 0).all()
    for bad in (math.nan, math.inf):
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([[1.0, bad]])
        with pytest.raises(UserError, match="step 7: the gradient is (nan|inf)"):
            step(model, optimizer, 0.5, "step 7")
        assert torch.equal(model.weight, before)


@pytest.mark.parametrize("old, new", [
    ("model.parameters(), max_grad_norm", "model.parameters(), math.inf"),
    ("model.parameters(), max_grad_norm", "model.parameters(), 0.1"),
    ("if not math.isfinite(norm)", "if False"),
    ('group["lr"] = lr', "pass"),
    ("optimizer.zero_grad()", "pass"),
])
def test_the_optimizer_step_clips_checks_and_clears_the_gradient(old, new):
    check_step(compute.step)
    changed = mutant(compute.step, old, new)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_step(changed)


# ---- what main() sets up ---------------------------------------------------------------------------------------------

def networks_of(world, monkeypatch, *flags):
    """Policy and value model as main() hands them to each update, and the reward; and the metrics."""
    seen, update, make_experience, rewards = [], train_ppo.update, train_ppo.make_experience, []

    def watched(rollout, policy, value, *args):
        seen.append((*copy.deepcopy((policy, value)), rewards[-1]))
        return update(rollout, policy, value, *args)

    def watched_experience(rollout, policy, reference, reward, *args):
        rewards.append(reward)
        return make_experience(rollout, policy, reference, reward, *args)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "update", watched)
        patch.setattr(train_ppo, "make_experience", watched_experience)
        metrics = run_ppo(world, *flags)
    return seen, metrics


def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("reward, start", [("rm", "rm"), ("reward.py:share_of_a", "sft")])
def test_the_value_model_starts_with_a_head_of_zeros_on_the_right_trunk(world, monkeypatch, reward, start):
    (policy, value, used), = networks_of(world, monkeypatch, "--reward", f"{world}/{reward}")[0]
    trunk = scalar_from_pretrained(world / "rm").transformer if start == "rm" else from_pretrained(world / "sft")
    assert isinstance(value, ScalarHeadModel) and same_weights(value.transformer, trunk)
    assert (value.score.weight == 0).all() and all(p.requires_grad for p in value.parameters())
    assert same_weights(policy, from_pretrained(world / "sft"))
    if start == "rm":                                                   # the reward model keeps its own head
        assert same_weights(used, scalar_from_pretrained(world / "rm"))
        assert not any(p.requires_grad for p in used.parameters())
    else:
        assert isinstance(used, FunctionReward)


def check_who_moves(world, main):
    """After one iteration policy and value model have moved, each by its own learning rate alone."""
    for flags, expected in (([], [True, True]), (["--lr", 0], [False, True]), (["--value_lr", 0], [True, False])):
        main(ppo_flags(world, *flags))
        state = torch.load(world / "ppo/state.pt", weights_only=True)
        start = from_pretrained(world / "sft"), scalar_from_pretrained(world / "rm").transformer
        end = state["policy"], {name.removeprefix("transformer."): x for name, x in state["value"].items()}
        assert [any(not torch.equal(x, after[name]) for name, x in before.state_dict().items())
                for before, after in zip(start, end)] == expected


def test_each_optimizer_moves_its_own_network(world):
    check_who_moves(world, train_ppo.main)
    frozen = mutant(train_ppo.main, "for model in (policy, value))", "for model in (policy, policy))")
    with pytest.raises(AssertionError):
        check_who_moves(world, frozen)


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
    target = run_ppo(world, "--iterations", 3, "--lr", 5e-3)[1]["objective/kl"]
    _, now, after = run_ppo(world, "--iterations", 3, "--lr", 5e-3, "--target_kl", target)
    assert 0.9 < now["objective/kl"] / target < 1.1                     # so near that the error is not clipped
    expected = ppo.adaptive_beta(now["objective/beta"], now["objective/kl"], target, 12)
    assert math.isclose(after["objective/beta"], expected, rel_tol=1e-9)


def test_a_function_as_the_reward_is_normalised_over_samples_of_the_sft_model(world):
    metrics = run_ppo(world, "--reward", f"{world}/reward.py:share_of_a", "--batch_size", 256, "--missing_eos", 0,
                      "--micro_batch", 0, "--max_response", 30, "--lr", 0)
    assert abs(metrics[0]["objective/scores"]) < 0.25 and abs(metrics[0]["rollout/score_std"] - 1) < 0.25


@pytest.mark.parametrize("flags", [[], ["--target_kl", 6, "--lam", 1, "--clip", 0.1], ["--dtype", "bfloat16"]])
def test_ppo_learns_to_write_what_is_rewarded_whatever_the_options(world, flags):
    metrics = run_ppo(world, "--reward", f"{world}/reward.py:share_of_a", "--iterations", 15, "--batch_size", 32,
                      "--lr", 2e-3, "--micro_batch", 0, *flags)
    scores = [row["objective/scores"] for row in metrics]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.8
    assert metrics[-1]["rollout/eos_rate"] > metrics[0]["rollout/eos_rate"]


def test_with_nothing_to_gain_the_policy_stays(world, monkeypatch):
    """A constant reward, no penalty and no value to learn: no advantage, no step."""
    (world / "same.py").write_text("def same(prompts, responses):\n    return [1.0] * len(responses)\n")
    run_ppo(world, "--reward", f"{world}/same.py:same", "--missing_eos", 0, "--beta", 0, "--iterations", 2)
    before, after = from_pretrained(world / "sft").state_dict(), from_pretrained(world / "ppo").state_dict()
    assert max((after[name] - before[name]).abs().max() for name in before) < 1e-6


@pytest.mark.parametrize("script, flags, named", [
    (train_ppo, ["--value_lr", 1e30], r"iteration 0.*: the gradient is (inf|nan)"),
    (train_sft, ["--lr", 1e30], r"step \d: the gradient is (inf|nan)"),
    (train_rm, ["--lr", 1e30], r"step \d: the gradient is (inf|nan)"),
])
def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_step(world, script, flags, named):
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


def test_a_loss_on_the_prompts_is_noticed():
    with pytest.raises(AssertionError):
        check_sft_loss(mutant(train_sft.sft_loss, "[e.prompt for e in examples]", "[e.prompt[:1] for e in examples]",
                              "[e.responses[0] for e", "[e.prompt[1:] + e.responses[0] for e"))


def check_reward_model_loss():
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


def test_the_loss_of_the_reward_model_by_hand(monkeypatch):
    check_reward_model_loss()
    for old, new in (("tokens.repeat_interleave(tokens)", "tokens.sum()"),              # long answers weigh more
                     ("[len(e.prompt) for", "[1 for"),                                  # prompts are learned too
                     ("hidden[:, :-1]", "hidden[:, 1:]")):
        changed = mutant(train_rm.language_loss, old, new)
        with monkeypatch.context() as patch, pytest.raises((AssertionError, RuntimeError)):     # other lengths
            patch.setattr(train_rm, "language_loss", changed)
            check_reward_model_loss()


def check_reward_model_normalised(world, main):
    """Fresh samples of the SFT model earn 0 on average, give or take 1. Before training its trunk is the SFT model.

    The answers of the comparisons have at most 9 letters and an EOS, and the samples are as long.
    """
    main(script_flags(world, "new_rm", "--data", f"{world}/comparisons.jsonl", "--lr", 0, "--epochs", 1))
    model, sft = scalar_from_pretrained(world / "new_rm").requires_grad_(False), from_pretrained(world / "sft")
    assert same_weights(model.transformer, sft)
    prompts = [example.prompt for example in examples(40)] * 40
    answers = respond(sft, prompts, 10, (EOS, 0), torch.Generator().manual_seed(7))
    rewards = model.normalised_scores(*right_pad([prompt + ids for prompt, (ids, _) in zip(prompts, answers)]))
    assert abs(rewards.mean()) < 0.15 and abs(rewards.std() - 1) < 0.15


def test_the_reward_model_starts_as_the_sft_model_and_is_normalised_on_its_samples(world):
    check_reward_model_normalised(world, train_rm.main)
    raw = mutant(train_rm.main, "normalise(model", "(lambda *_: None)(model")
    with pytest.raises(AssertionError):
        check_reward_model_normalised(world, raw)


# ---- bfloat16 --------------------------------------------------------------------------------------------------------

def check_logits_far_from_zero(logits):
    """Official GPT-2's logits lie near -100. What all of them share changes no probability, in bfloat16 either."""
    model, tokens = letters_gpt2(0).requires_grad_(False), torch.arange(6)[None]
    model.dtype = "bfloat16"
    model.ln_f.weight[0], model.ln_f.bias[0], model.wte.weight[:, 0] = 0, 1, -100
    hidden = model(tokens + 97)
    expected = torch.log_softmax(hidden.double() @ model.wte.weight.double().T, dim=-1)
    expected = expected.gather(-1, tokens[..., None]).squeeze(-1)
    found = token_logprobs(logits(model, hidden), tokens)
    assert hidden.dtype == found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-3


def test_bfloat16_leaves_logits_alone_that_lie_far_from_zero():
    check_logits_far_from_zero(lambda model, hidden: model.logits(hidden))
    with pytest.raises(AssertionError):
        check_logits_far_from_zero(lambda model, hidden: hidden.bfloat16() @ model.wte.weight.bfloat16().T)


def test_scores_and_values_are_float32_in_bfloat16():
    model, ids = ScalarHeadModel(letters_gpt2(1)).requires_grad_(False), torch.arange(97, 105)[None]
    exact = model(ids)
    model.transformer.dtype = "bfloat16"
    assert model(ids).dtype == torch.float32 and 0 < (model(ids) - exact).abs().max() < 0.2


def check_sampler(patch, roll_out):
    """In bfloat16 responses come from a copy in bfloat16, as near to the policy as autocast is. The policy stays."""
    cfg, policy, seen = config(dtype="bfloat16", batch_size=64), letters_gpt2(0), []
    policy.dtype = "bfloat16"
    before = copy.deepcopy(policy.state_dict())

    def watched(model, *args):
        *sampled, logprobs = generate_with_logprobs(generate, model, *args)
        seen.append((model, logprobs))
        return sampled
    patch.setattr(train_ppo, "generate", watched)
    with torch.no_grad():
        r = roll_out(policy, examples(64), TOKENIZER, (EOS, 0), cfg, 0, CPU)
        logits = response_logits(policy, r.ids, r.token_mask, r.P)
        logprobs = token_logprobs(logits, r.ids[:, r.P:], cfg.temperature)
    (sampler, sampled), = seen
    assert all(p.dtype == torch.bfloat16 for p in sampler.h.parameters() if p.dim() == 2)
    assert sampler.wte.weight.dtype == torch.float32
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in policy.state_dict().items())
    difference = (sampled - logprobs)[r.mask]
    assert difference.pow(2).mean().sqrt() < 0.05 and difference.mean().abs() < 0.01


def test_in_bfloat16_a_rollout_is_sampled_from_a_copy_of_the_policy(monkeypatch):
    check_sampler(monkeypatch, train_ppo.roll_out)


@pytest.mark.parametrize("new", ["__import__('copy').deepcopy(policy)", "policy.bfloat16()", "sampling_copy(another)"])
def test_sampling_from_anything_else_is_noticed(monkeypatch, new):
    changed = mutant(train_ppo.roll_out, "sampling_copy(policy)", new)
    another = letters_gpt2(1)
    another.dtype = "bfloat16"
    monkeypatch.setattr(train_ppo, "another", another, raising=False)
    with pytest.raises(AssertionError):
        check_sampler(monkeypatch, changed)
