"""The traps: each is a real defect of a real project, most of them silent. For each one a check that holds for this
code, and the same check failing once the defect is put in. The numbers are those of minirlhf/DETAILS.md."""

import math
import types
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_ppo
import train_rm
import train_sft
from minirlhf import answers, data, gpt2, health, ppo, reward
from minirlhf.data import Example, Row
from minirlhf.files.errors import UserError
from minirlhf.files.formats import last_answer
from minirlhf.generate import generate, left_pad, response_logits, right_pad
from minirlhf.reward import ScalarHeadModel
from minirlhf.reward_functions import TINY_GOLD, load_function
from minirlhf.running import runs
from minirlhf.weights import from_pretrained, scalar_from_pretrained
from mutation import assert_notices, mutant
from small_world import (EOS, TOKENIZER, GivenScores, Networks, config, generate_with_logprobs, letters_gpt2,
                         move_away, ppo_flags, ragged_mask, read_metrics, recorded, rows_of, run_ppo, script_flags,
                         skip_first_ratio_check, small_world, tiny_gpt2)
from test_ppo import LENGTHS, randn
from test_steps import check_advantages


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


# ---- 1 to 4: rollout and update must see the same thing --------------------------------------------------------------

def check_first_minibatch(world, dtype):
    """Through the real script: on the first minibatch the ratio is 1 and the clip fraction 0."""
    with pytest.MonkeyPatch.context() as patch:
        first = {}
        patch.setattr(health, "check_first_ratio",
                      lambda sums, n, _: first.update({name: float(x / n) for name, x in sums.items()}))
        run_ppo(world, "--temperature", 0.7, "--dtype", dtype, out="first")
    assert first["policy/clipfrac"] == 0
    assert abs(first["policy/ratio"] - 1) < 1e-4
    assert math.sqrt(2 * first["policy/approxkl"]) < (1e-5 if dtype == "float32" else 5e-4)          # of the log-ratio


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trap_01_the_ratio_is_one_on_the_first_minibatch(world, dtype):
    check_first_minibatch(world, dtype)


def test_trap_01_an_update_that_sees_something_else_is_noticed_by_test_and_script(world):
    logits, tokens = "policy, ids, rollout.attention_mask[part, :P + R], P)", "ids[:, P:], cfg.temperature)"
    defects = [(train_ppo, "update", old, new) for old, new in (
        (tokens, "ids[:, P:])"), (logits, "policy, ids, None, P)"),
        (tokens, "ids[:, P:].roll(1, 1), cfg.temperature)"))]
    assert_notices(lambda: check_first_minibatch(world, "float32"), *defects)
    assert_notices(lambda: run_ppo(world, "--temperature", 0.7), *defects, errors=UserError)


def test_trap_01_cached_sampling_draws_from_the_log_probabilities_that_are_computed_later(world, monkeypatch):
    """In float32 the sampler's own log-probabilities would do. In bfloat16 they can differ by 1e-2."""
    sampled, make_rollout = [], train_ppo.make_rollout

    def watched(*args):
        *responses, logprobs = generate_with_logprobs(generate, *args)
        sampled.append(logprobs)
        return responses
    monkeypatch.setattr(train_ppo, "generate", watched)
    monkeypatch.setattr(train_ppo, "make_rollout", lambda *args: make_rollout(*args)._replace(logprobs=sampled[-1]))
    check_first_minibatch(world, "float32")


def check_left_padding():
    """Pads before a prompt leave the next-token distribution where it was, in total variation."""
    model, prompt = tiny_gpt2(), [1, 2, 3, 4]
    alone = model.logits(model(torch.tensor([prompt])))[0, -1].softmax(0)
    for pads in (1, 5):
        ids, mask = left_pad([prompt, [0] * (4 + pads)])
        padded = model.logits(model(ids, mask))[0, -1].softmax(0)
        assert (padded - alone).abs().sum() / 2 < 1e-5


def test_trap_02_left_padding_moves_no_position():
    assert_notices(check_left_padding, (
        gpt2, "position_ids", "attention_mask.long().cumsum(dim=1) - attention_mask.long()",
        "torch.ones_like(attention_mask).long().cumsum(dim=1) - 1"))


def test_trap_03_there_is_no_dropout_in_the_update(world, monkeypatch):
    """Dropout that somebody adds to a Block is trained with in SFT. All else is as without it, to the last bit."""
    def metrics():
        for name, script, kind in (("sft", train_sft, "demonstrations"), ("rm", train_rm, "comparisons")):
            file = f"{world}/{kind}.jsonl"
            flags = "--data", file, "--heldout", file, "--lr", 0, "--epochs", 2
            script.main(script_flags(world, f"{name}_dropout", *flags))
        return [read_metrics(world / f"{name}_dropout") for name in ("sft", "rm")] + [run_ppo(world)]

    monkeypatch.setattr(answers, "SAMPLES", 8)
    sft, *others = metrics()
    monkeypatch.setattr(gpt2.Block, "forward", mutant(gpt2.Block.forward, "self.mlp(self.ln_2(x))",
                                                      "F.dropout(self.mlp(self.ln_2(x)), 0.1, self.training)"))
    sft_with_dropout, *others_with_dropout = metrics()
    assert sft[-1]["loss/heldout"] == sft_with_dropout[-1]["loss/heldout"] and others == others_with_dropout
    assert all(a["loss/train"] != b["loss/train"] for a, b in zip(sft, sft_with_dropout))
    start = "sums = defaultdict(float)"
    monkeypatch.setattr(train_ppo, "update", mutant(train_ppo.update, start, f"{start}; policy.train()"))
    with pytest.raises(UserError, match="before the first update.*dropout"):
        run_ppo(world)


def check_sampler_and_scorer_agree(B=4000):
    """In a world of 15 responses each is sampled as often as its log-probability says, at a temperature that is not 1.

    Chi-square with at most 14 degrees of freedom stays under 36.1 with probability 0.999.
    """
    rollout = three_token_rollout(tiny_gpt2(V=3, seed=0), tiny_gpt2(V=3, seed=5), B, temperature=0.7)
    drawn, probabilities = {}, {}
    for response, logprob in zip(rows_of(rollout.ids[:, rollout.P:], rollout.response_mask),
                                 rollout.logprobs.masked_fill(~rollout.response_mask, 0).sum(dim=1)):
        drawn[response] = drawn.get(response, 0) + 1
        probabilities[response] = math.exp(logprob)
    assert sum((drawn.get(each, 0) - B * p) ** 2 / (B * p) for each, p in probabilities.items()) < 36.1
    assert sum(probabilities.values()) > 0.99                           # nothing is left out that should come up


def test_trap_04_responses_are_scored_under_the_distribution_they_were_sampled_from():
    top_k = "logits.masked_fill(logits < logits.topk(2).values[:, -1:], -1e9) / max(temperature, 1e-9)"
    assert_notices(check_sampler_and_scorer_agree, *[
        (train_ppo, "generate", "logits / max(temperature, 1e-9)", new) for new in ("logits", top_k)])


# ---- 5 to 7: the KL is the KL ----------------------------------------------------------------------------------------

LOGGED = "ppo.sequence_mean(rollout.logprobs - rollout.ref_logprobs, mask)"     # in rollout_metrics


def three_token_rollout(policy, reference, B, temperature):
    """A rollout of B responses to the prompt [0, 1]. 2 is the EOS, beta is 0.1."""
    tokenizer = types.SimpleNamespace(eot_token=2, decode=str)
    cfg = config(max_response=3, micro_batch=0, batch_size=B, temperature=temperature)
    batch = [Example(Row("x:1", "ab"), [0, 1], [])] * B
    return train_ppo.make_rollout(batch, policy, reference, GivenScores(torch.ones(B)), ScalarHeadModel(reference),
                                  tokenizer, (2, 0), cfg, 0.1, 0)


def sequences(model, temperature, eos=2, longest=3):
    """All responses of a world of two letters and an EOS to the prompt [0, 1], with their log-probabilities."""
    done, open_ = {}, {(): 0.0}
    while open_:
        ids, logprob = open_.popitem()
        if len(ids) == longest or ids[-1:] == (eos,):
            done[ids] = logprob
            continue
        logits = model.logits(model(torch.tensor([[0, 1, *ids]])))[0, -1].double() / temperature
        step = logits.log_softmax(0).tolist()
        open_ |= {ids + (token,): logprob + step[token] for token in range(3)}
    return done


def check_sequence_kl(B=4000, temperature=0.7):
    """The logged KL of sampled responses against the exact one by enumeration, within 4 standard errors; and what PPO
    is paid is the score minus beta times the KL that is logged."""
    policy, reference = tiny_gpt2(V=3, seed=0), tiny_gpt2(V=3, seed=5)
    with torch.no_grad():
        policy.ln_f.bias += 1.5 * policy.wte.weight[2]                  # a policy that ends early
    p, q = sequences(policy, temperature), sequences(reference, temperature)
    exact = sum(math.exp(p[ids]) * (p[ids] - q[ids]) for ids in p)
    variance = sum(math.exp(p[ids]) * (p[ids] - q[ids] - exact) ** 2 for ids in p)
    rollout = three_token_rollout(policy, reference, B, temperature)
    metrics = health.rollout_metrics(rollout, 0.1, None)
    assert abs(metrics["objective/kl"] - exact) < 4 * math.sqrt(variance / B)
    assert abs(metrics["objective/kl_k3"] - exact) < 0.1
    paid = metrics["objective/scores"] - 0.1 * metrics["objective/kl"]
    assert math.isclose(rollout.rewards.sum() / B, paid, rel_tol=1e-4)
    assert math.isclose(metrics["objective/rlhf_reward"], paid, rel_tol=1e-4)


def test_trap_05_the_logged_kl_is_the_exact_kl_and_the_one_that_is_paid():
    paid = "token_rewards(logprobs - ref_logprobs,"
    reference = "ref_logprobs[part] = ppo.token_logprobs(logits, responses[part]"
    assert_notices(
        check_sequence_kl,
        (train_ppo, "generate", "logits / max(", "(logits - torch.eye(3)[stop_token] * 1e9 * (t < 2)) / max("),
        (health, "rollout_metrics", LOGGED, LOGGED.replace("mask)", "torch.ones_like(mask))")),     # padding counted
        (train_ppo, "make_rollout", paid, "token_rewards(2 * (logprobs - ref_logprobs),"),
        (train_ppo, "make_rollout", paid, "token_rewards(ref_logprobs - logprobs,"),
        (train_ppo, "make_rollout", f"{reference}, cfg.temperature)", f"{reference})"))


def check_estimates_kl(never_negative, estimator=None):
    """In a world of three tokens its expectation is the exact KL."""
    for seed in range(5):
        p, q = randn(3, seed=seed).log_softmax(0), randn(3, seed=seed + 100).log_softmax(0)
        exact = sum(math.exp(p[i]) * math.log(math.exp(p[i]) / math.exp(q[i])) for i in range(3))
        estimates = (estimator or ppo.kl_k3)(p, q)
        assert math.isclose((p.exp() * estimates).sum(), exact, rel_tol=1e-9)
        assert not never_negative or (estimates >= 0).all()


def test_trap_06_k1_and_k3_estimate_the_exact_kl():
    check_estimates_kl(False, lambda logprobs, ref_logprobs: logprobs - ref_logprobs)
    check_estimates_kl(True)


def test_trap_06_another_sign_is_noticed():
    assert_notices(partial(check_estimates_kl, True),
                   (ppo, "kl_k3", "= ref_logprobs - logprobs", "= logprobs - ref_logprobs"),
                   (ppo, "kl_k3", "- log_ratio", "+ log_ratio"))


def check_reference_stays(world):
    """After an update the reference is still the SFT model, none of the four networks shares memory with another, and
    the KL is no longer 0."""
    with pytest.MonkeyPatch.context() as patch:
        rollouts = recorded(patch, train_ppo, "make_rollout")
        metrics = run_ppo(world, "--iterations", 2)
    networks = rollouts[-1][0][1:5]                                     # policy, reference, reward, value
    sft = from_pretrained(f"{world}/sft").state_dict()
    assert all(torch.equal(tensor, sft[name]) for name, tensor in networks[1].state_dict().items())
    memory = [{p.data_ptr() for p in model.parameters()} for model in networks]
    assert sum(map(len, memory)) == len(set.union(*memory))
    assert metrics[0]["objective/kl"] == 0 and metrics[-1]["objective/kl_k3"] > 1e-3


def test_trap_07_the_policy_is_not_its_own_reference(world):
    assert_notices(partial(check_reference_stays, world), *[
        (train_ppo, "main", "examples, heldout = load", f"{change}; examples, heldout = load")
        for change in ("reference = policy", "policy.wte = reference.wte")])


# ---- 8 to 11: where a response ends ----------------------------------------------------------------------------------

def check_learns_to_stop():
    """Three demonstrations of different lengths, learned by heart, come back with their ends."""
    model, prompts = letters_gpt2(), [[97, 98], [99], [100, 97, 98]]
    responses = [(97, EOS), (98, 99, 97, 100, EOS), (99, 99, EOS)]
    batch = [Example(None, prompt, [list(response)]) for prompt, response in zip(prompts, responses)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss, n_tokens = train_sft.sft_loss(model, batch, "cpu")
        (loss / n_tokens).backward()
        optimizer.step()
    ids, mask, finished = generate(model, *left_pad(prompts), torch.zeros(3, 8), (EOS, 0), temperature=0)
    assert finished.all() and rows_of(ids, mask) == responses


def test_trap_08_the_eos_is_among_the_labels():
    labels = "list(map(len, prompts)))[:, 1:]"
    assert_notices(check_learns_to_stop, (train_sft, "response_logprobs", labels, f"{labels} & (ids[:, 1:] != {EOS})"))


def check_eos_gets_gradient():
    """An advantage on the EOS alone makes ending there likelier."""
    n = Networks(config(epochs=1, minibatches=1))
    rollout, responses = n.rollout, n.rollout.ids[:, n.rollout.P:]
    ends = rollout.response_mask & (responses == EOS)
    assert 3 < ends.sum() == rollout.finished.sum()
    n.rollout = rollout._replace(advantages=ends.float())
    n.update()
    logits = response_logits(n.policy, rollout.ids, rollout.attention_mask, rollout.P)
    after = ppo.token_logprobs(logits, responses, n.cfg.temperature)
    assert (after > rollout.logprobs + 1e-3)[ends].all()


def test_trap_09_the_eos_is_in_the_ppo_mask():
    losses = "logprobs, advantages, cfg.clip)"
    assert_notices(check_eos_gets_gradient, (train_ppo, "update", losses, f"{losses} * (ids[:, P:] != {EOS})"))


def check_score_position():
    rewards = ppo.token_rewards(torch.zeros(4, 8), torch.arange(1.0, 5), ragged_mask(LENGTHS, 8), 0.1)
    assert [row.nonzero().flatten().tolist() for row in rewards] == [[length - 1] for length in LENGTHS]
    assert rewards.sum(dim=1).tolist() == [1, 2, 3, 4]


def test_trap_10_the_score_is_on_the_last_token_and_not_on_the_pad_after_it():
    assert_notices(check_score_position, *[
        (ppo, "token_rewards", "response_mask.sum(dim=1, keepdim=True) - 1", column)
        for column in ("response_mask.sum(dim=1, keepdim=True)", "torch.full((len(kl), 1), kl.shape[1] - 1)")])


def check_missing_eos():
    """Whatever the reward model says, a response that does not end gets exactly the fixed score, and no other does."""
    rollout = Networks(config(missing_eos=-3.0), 40, GivenScores(torch.full((40,), 7.0))).rollout
    ended = torch.tensor([EOS in row for row in rollout.ids[:, rollout.P:].tolist()])
    assert 5 < ended.sum() < 35
    assert torch.equal(rollout.scores, torch.where(ended, 7.0, -3.0))


def test_trap_10_the_missing_eos_score_fires():
    assert_notices(check_missing_eos, (train_ppo, "generate", "finished[rows] = ended", "finished[rows] = True"),
                   (train_ppo, "make_rollout", "torch.where(finished,", "torch.where(~finished,"))


def check_reward_position():
    """Pads on the left, on the right or on both sides, and what stands in them, change no reward."""
    model, rows = ScalarHeadModel(tiny_gpt2()).requires_grad_(False), [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 1, 2]]
    alone = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
    both = [torch.cat([torch.zeros_like(x), x, torch.zeros_like(x)], dim=1) for x in right_pad(rows)]
    for ids, mask in (left_pad(rows), right_pad(rows), both):
        for filler in (0, 9):
            scores = model.normalised_scores(ids.masked_fill(~mask, filler), mask)
            torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)


def test_trap_11_the_reward_is_read_at_the_last_token_wherever_the_pads_are():
    last = "x.shape[1] - 1 - pads_after"
    assert_notices(
        check_reward_position,
        (reward, "at_last_token", f"x.gather(1, {last}).squeeze(1)", "x.mean(dim=1)"),
        (reward, "at_last_token", f"x.gather(1, {last}).squeeze(1)", "x[:, -1]"),
        (reward, "at_last_token", last, "attention_mask.sum(dim=1, keepdim=True) - 1"))     # wrong after left pads


# ---- 12 to 15: statistics --------------------------------------------------------------------------------------------

FIELDS = ("logprobs", "ref_logprobs", "entropy", "rewards", "values", "advantages", "returns")


def poison_pads(patch, n, poison):
    """Something else in what the networks say about every pad: in the logits that predict it, and in its value."""
    def poisoned_logits(model, ids, mask, P):
        return response_logits(model, ids, mask, P).masked_fill(~mask[:, P:, None], poison)

    def poisoned_values(_, inputs, values):
        next_is_pad = ~inputs[1].roll(-1, dims=1)
        return values.masked_fill(next_is_pad, poison)
    patch.setattr(train_ppo, "response_logits", poisoned_logits)
    n.value_model.register_forward_hook(poisoned_values)


def check_rollout_under_poison(poison):
    """Something else in the networks' output at every pad changes no metric, and no field where there is a token."""
    clean, other = Networks(config()), Networks(config())
    with pytest.MonkeyPatch.context() as patch:
        poison_pads(patch, other, poison)
        other.rollout = other.make_rollout()
    mask = clean.rollout.response_mask
    assert 0.2 < (~mask).float().mean()
    assert health.rollout_metrics(clean.rollout, 0.05, None) == health.rollout_metrics(other.rollout, 0.05, None)
    for name in FIELDS:
        assert torch.equal(getattr(other.rollout, name)[mask], getattr(clean.rollout, name)[mask]), name


def check_update_under_poison(poison):
    """Something else in every masked slot of a rollout changes no metric, no gradient and so no weight."""
    results = []
    for n in (Networks(config()), Networks(config())):
        if results:
            pads = ~n.rollout.response_mask
            n.rollout = n.rollout._replace(**{x: getattr(n.rollout, x).masked_fill(pads, poison) for x in FIELDS})
        results.append((n.update(), n.weights()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_trap_12_nothing_under_the_mask_reaches_a_metric_a_gradient_or_a_weight():
    """Of the update masked_sum alone will not do: the loss is right, and the gradient of exp at a pad is 0 * inf.
    Either of two lines prevents that, so both are taken out."""
    assert_notices(partial(check_rollout_under_poison, math.nan),
                   (ppo, "masked_sum", "x.masked_fill(~mask, 0).sum()", "(x * mask).sum()"))
    assert_notices(partial(check_rollout_under_poison, 1e6),
                   (ppo, "masked_mean", "all_sum(masked_sum(x, mask))", "x.sum()"),
                   (ppo, "gae", "values.masked_fill(~response_mask, 0)", "values"),
                   (health, "rollout_metrics", "ppo.sequence_mean(rollout.entropy, mask)", "rollout.entropy.sum()"))
    check_update_under_poison(1e6)
    new, old = "new_logprobs = new_logprobs", "rollout.logprobs[part, :R]"
    assert_notices(partial(check_update_under_poison, -1e6), (
        train_ppo, "update", f"{new}.masked_fill(~mask, 0)", new, f"{old}.masked_fill(~mask, 0)", old),
        errors=(AssertionError, RuntimeError))                          # "the total norm is non-finite"


def check_signal_between_episodes():
    """Of two responses with the scores +1 and -1, every token of the one is encouraged and of the other discouraged."""
    scores = torch.tensor([1.0, -1.0]).repeat(20)
    n = Networks(config(beta=0.0), 40, GivenScores(scores))
    torch.nn.init.zeros_(n.value_model.score.weight)
    with pytest.MonkeyPatch.context() as patch:
        all_end = torch.ones(40, dtype=torch.bool)
        patch.setattr(train_ppo, "generate", lambda *args: (*generate(*args)[:2], all_end))
        rollout = n.make_rollout()
    assert ((rollout.advantages.sign() * scores[:, None])[rollout.response_mask] == 1).all()


def test_trap_13_advantages_are_not_normalised_per_sequence():
    per_row = "x.masked_fill(~mask, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)"
    assert_notices(check_signal_between_episodes, (ppo, "whiten", "(x - masked_mean(x, mask))", f"(x - {per_row})"))


def test_trap_14_returns_come_before_whitening():
    whitening = "advantages = ppo.whiten(advantages, response_mask)"
    after = f"{whitening}; returns = advantages + values"
    assert_notices(check_advantages, (train_ppo, "make_rollout", whitening, after))


def check_every_row_attends():
    """Since 2.5 PyTorch's own attention turns a softmax over nothing into 0, others still into NaN."""
    mask = torch.tensor([[False] * 5, [False, False, True, True, False]])
    for T in (5, 2, 1):
        visible = gpt2.visible_positions(mask, T)
        scores = torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
        assert scores.softmax(dim=-1).isfinite().all()


def test_trap_15_no_nan_from_a_row_that_sees_nothing():
    seen = "(attention_mask[:, None, None, :] | causal.triu(S - T))"
    assert_notices(check_every_row_attends, (gpt2, "visible_positions", seen, "attention_mask[:, None, None, :]"))


def check_small_batches_are_finite():
    """A batch of one response; responses of one token; responses that all earn the same."""
    same = Networks(config(beta=0.0, lam=1.0, missing_eos=1.0), 12, GivenScores(torch.ones(12)))
    for n in (Networks(config(minibatches=1), B=1), Networks(config(max_response=1, minibatches=1), B=1), same):
        metrics = health.rollout_metrics(n.rollout, 0.05, None) | n.update()
        assert all(math.isfinite(x) for x in metrics.values())
        assert n.weights().isfinite().all()


@pytest.mark.filterwarnings("ignore:std")
def test_trap_15_no_nan_from_the_deviation_of_one():
    assert_notices(check_small_batches_are_finite, (
        health, "rollout_metrics", "ppo.masked_variance(rollout.scores, all_rows).sqrt()", "rollout.scores.std()"))


# ---- 16 and 17: the step ---------------------------------------------------------------------------------------------

class PlainDescent(torch.optim.SGD):
    """In the place of Adam, which would blow rounding errors of vanishing gradients up to whole steps."""

    def __init__(self, params, **_):
        super().__init__(params)


SCRIPTS = {
    "sft": (train_sft, ["--batch_size", 16, "--lr", 15, "--epochs", 1]),
    "rm": (train_rm, ["--batch_size", 16, "--lr", 0.3, "--epochs", 1]),
    "ppo": (train_ppo, ["--lr", 0.3, "--value_lr", 0.1]),
}
DATA = {"sft": "demonstrations", "rm": "comparisons"}


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(answers, "SAMPLES", 8)


def trained_weights(world, name, *flags):
    (script, options), out = SCRIPTS[name], f"{name}_trained"
    if name == "ppo":
        script.main(ppo_flags(world, *options, *flags, out=out))
    else:
        script.main(script_flags(world, out, "--data", f"{world}/{DATA[name]}.jsonl", *options, *flags))
    state = torch.load(world / out / "state.pt", weights_only=True)
    parts = [state["policy"], state["value"]] if name == "ppo" else [state["model"]]
    return torch.cat([tensor.flatten() for part in parts for tensor in part.values()])


def check_accumulation(world, name):
    whole = trained_weights(world, name, "--micro_batch", 0)
    for micro_batch in (1, 5):
        assert (trained_weights(world, name, "--micro_batch", micro_batch) - whole).abs().max() < 1e-6


DEFECTS = {     # the loss divided by the micro-batch
    "sft": [("main", "[0] / n_tokens", "[0] / sum(len(example.responses[0]) for example in part)")],
    "rm": [("main", "(loss / len(batch)).backward()", "(loss / len(part)).backward()"),
           ("language_loss", "/ tokens.repeat_interleave(tokens)", "/ len(logprobs) * len(examples)")],
    "ppo": [("update", f"losses = ppo.{loss}(", f"n_tokens = mask.sum(); losses = ppo.{loss}(")
            for loss in ("policy_losses", "value_losses")],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_trap_16_micro_batches_do_not_change_the_step(world, monkeypatch, few_samples, name):
    monkeypatch.setattr(torch.optim, "AdamW", PlainDescent)
    assert_notices(partial(check_accumulation, world, name), *[(SCRIPTS[name][0], *defect) for defect in DEFECTS[name]])


def steps_of(world, name):
    """Trains; returns the length of the gradient at each optimizer step, and all optimizers that took one."""
    lengths, optimizers = [], set()

    def watch(optimizer, *_):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        lengths.append(float(torch.cat(gradients).norm()))
        optimizers.add(optimizer)
    hook = register_optimizer_step_pre_hook(watch)
    try:
        trained_weights(world, name, *["--lm_coef", 5] * (name == "rm"))        # long gradients
    finally:
        hook.remove()
    return lengths, optimizers


def check_gradient_is_clipped(world, name):
    lengths, _ = steps_of(world, name)
    assert max(lengths) < 1.0001 and any(abs(length - 1) < 1e-4 for length in lengths)


def check_no_gradient_is_left(world, name):
    _, optimizers = steps_of(world, name)
    for optimizer in optimizers:
        assert all(p.grad is None or (p.grad == 0).all() for p in optimizer.param_groups[0]["params"])


def check_optimizer(world, name):
    """The two betas are two, and nothing decays the weights."""
    _, optimizers = steps_of(world, name)
    assert len(optimizers) == (2 if name == "ppo" else 1)
    for optimizer in optimizers:
        assert optimizer.defaults["betas"] in ((0.9, 0.999), (0.9, 0.95)) and optimizer.defaults["weight_decay"] == 0


STEPS = {"sft": ("main", "model", "optimizer"), "rm": ("main", "reward_model", "optimizer"),
         "ppo": ("update", "value_model", "value_optimizer")}           # a function of the script, and names in it


@pytest.mark.parametrize("name", SCRIPTS)
def test_trap_17_gradients_are_clipped_after_backward(world, few_samples, name):
    function, model, optimizer = STEPS[name]
    clip = f"torch.nn.utils.clip_grad_norm_({model}.parameters(), 1.0, error_if_nonfinite=True)"
    too_late = f"{optimizer}.step()", f"{optimizer}.step(); {clip}"
    assert_notices(partial(check_gradient_is_clipped, world, name),
                   (SCRIPTS[name][0], function, clip, "pass", *too_late))


@pytest.mark.parametrize("name", SCRIPTS)
def test_trap_17_no_stale_gradient_is_left_for_the_next_rollout(world, few_samples, name):
    function, _, optimizer = STEPS[name]
    assert_notices(partial(check_no_gradient_is_left, world, name),
                   (SCRIPTS[name][0], function, f"{optimizer}.zero_grad()", "pass"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_trap_17_the_betas_of_adam_are_two(world, few_samples, name):
    change = ("lr=cfg.value_lr,", "lr=cfg.value_lr, betas=(0.9, 0.9),") if name == "ppo" else ("0.95", "0.9")
    assert_notices(partial(check_optimizer, world, name), (SCRIPTS[name][0], "main", *change))


# Trap 18, the number of pairs divided by twice: tests/test_reward.py, test_each_loss_is_what_its_name_says.

# ---- 19 to 21: the script --------------------------------------------------------------------------------------------

def check_controller(target=4.0, B=24):
    """A plant: a policy that strays from the reference the further, the smaller beta is. The controller, fed with what
    the script logs, must lead its KL per sequence to the target from either side."""
    n = Networks(config(micro_batch=0), B, GivenScores(torch.zeros(B)))
    n.policy.requires_grad_(False)
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in n.policy.parameters()]
    for beta in (0.02, 0.5):
        kls = []
        for iteration in range(24):
            for p, start, d in zip(n.policy.parameters(), n.reference.parameters(), direction):
                p.copy_(start + 0.04 * beta ** -0.5 * d)
            rollout = n.make_rollout(beta, iteration)
            metrics = health.rollout_metrics(rollout, beta, None)
            kls.append(float((rollout.logprobs - rollout.ref_logprobs)[rollout.response_mask].sum() / B))    # by hand
            beta = ppo.adaptive_beta(beta, metrics["objective/kl"], target, B, horizon=B)
        assert abs(np.mean(kls[-8:]) / target - 1) < 0.25


def test_trap_19_the_controller_reaches_its_target_in_the_unit_that_is_logged():
    assert_notices(check_controller,
                   (health, "rollout_metrics", LOGGED, LOGGED.replace("sequence_mean", "masked_mean")),
                   (ppo, "adaptive_beta", "max(kl / target - 1", "max(1 - kl / target"))


def check_scores_are_the_reward_models(world):
    """Through the command line: the scores are those of the model in --reward, of each response alone and unpadded."""
    with pytest.MonkeyPatch.context() as patch:
        rollouts = recorded(patch, train_ppo, "make_rollout")
        run_ppo(world)
    rollout, model = rollouts[0][1], scalar_from_pretrained(world / "rm").requires_grad_(False)
    assert (model.reward_mean, model.reward_std) == (0.3, 2.0)
    for row, score, finished in zip(rows_of(rollout.ids, rollout.attention_mask), rollout.scores, rollout.finished):
        raw = float(model(torch.tensor([row]))[0, -1])
        assert math.isclose(score, (raw - 0.3) / 2 if finished else -3, abs_tol=1e-4)


def test_trap_20_ppo_loads_the_reward_model_that_was_trained(world):
    loaded, used = "reward_model = scalar_from_pretrained(cfg.reward, cfg.dtype)", "[reward_model.normalised_scores("
    fresh = f"{loaded}.apply(lambda part: getattr(part, 'reset_parameters', lambda: None)())"
    assert_notices(partial(check_scores_are_the_reward_models, world), (train_ppo, "main", loaded, fresh),
                   (train_ppo, "make_rollout", used, used.replace("[", "[0.3 + 2 * ")))


class PowerCut(Exception):
    pass


def check_resume(world):
    """Four iterations at a stretch, and four with a power cut in the third: the same metrics and weights to the bit."""
    flags = ["--iterations", 4, "--target_kl", 1, "--batch_size", 16]
    torch.manual_seed(0)                                        # as in a new process
    train_ppo.main(ppo_flags(world, *flags, out="straight"))
    real = train_ppo.update

    def update(*args):
        if args[6] == 2:
            raise PowerCut
        return real(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SAVING", math.inf)                 # a checkpoint after every iteration
        patch.setattr(train_ppo, "update", update)
        torch.manual_seed(0)
        with pytest.raises(PowerCut):
            train_ppo.main(ppo_flags(world, *flags, out="cut"))
    torch.manual_seed(0)
    train_ppo.main(ppo_flags(world, *flags, "--resume", out="cut"))
    assert read_metrics(world / "cut") == read_metrics(world / "straight")
    files = [(world / name / "model.safetensors").read_bytes() for name in ("cut", "straight")]
    assert files[0] == files[1]


def test_trap_21_a_resumed_run_is_the_run(world):
    check_resume(world)


@pytest.mark.slow
def test_trap_21_a_resume_that_forgets_is_noticed(world):
    assert_notices(partial(check_resume, world), *[(train_ppo, "main", old, new) for old, new in (
        ("run.restore(**saved)", "run.restore(policy=policy, value=value_model)"),                  # a new optimizer
        ('run.state.get("beta", cfg.beta)', "cfg.beta"),
        ("cfg.batch_size, iteration, cfg.seed", "cfg.batch_size, iteration - run.state.get('step', 0), cfg.seed"),
        ("beta, iteration)", "beta, int(torch.randint(99, ())))"))])                                # a global stream


# ---- 22 to 25 --------------------------------------------------------------------------------------------------------

def check_gelu():
    """Through an MLP that passes its input on: Gaussian error linear units in the tanh form of OpenAI's code."""
    mlp, x = gpt2.MLP(gpt2.GPT2Config(n_embd=32)), torch.linspace(-5, 5, 32, dtype=torch.float64)
    for linear in (mlp.c_fc, mlp.c_proj):
        linear.weight.data, linear.bias.data = torch.eye(*linear.weight.shape), torch.zeros_like(linear.bias)
    expected = [u / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3))) for u in x.tolist()]
    np.testing.assert_allclose(mlp.double()(x).detach(), expected, atol=1e-9)


def test_trap_22_gelu_is_the_tanh_form():
    assert_notices(check_gelu, (gpt2.MLP, "forward", 'approximate="tanh"', 'approximate="none"'))


def check_nothing_is_cut(capsys):
    """Two answers that differ only after the limit, and one that fits: an error, or dropped and counted; never cut."""
    rows = [Row(where, "p", texts, (1, 2), (True, True))
            for where, texts in (("c:1", ("abcdefgh", "abcdefgi")), ("c:2", ("ab", "c")))]
    with pytest.raises(UserError, match="c:1: response of 9 tokens, more than 4"):
        data.encode_rows(rows, TOKENIZER, 48, max_response=4)
    kept = data.encode_rows(rows, TOKENIZER, 48, max_response=4, drop_long=True)
    assert "dropped 1 of 2" in capsys.readouterr().out
    assert [example.responses for example in kept] == [[[97, 98, EOS], [99, EOS]]]


def test_trap_23_what_does_not_fit_is_never_cut(capsys):
    ids = "encode(tokenizer, row.prompt, *each)[1]"
    assert_notices(partial(check_nothing_is_cut, capsys), (data, "encode_rows", ids, f"{ids}[:max_response or None]"),
                   errors=pytest.fail.Exception)


DIALOGUES = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 2 + 2?\n\nAssistant: It is 4.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 2 + 2?\n\nAssistant: No idea.",
}


def check_split(comparison):
    """Of a dialogue of two turns only the last answer is judged, and both sides share all that comes before it."""
    row = comparison(DIALOGUES, "x:1", Counter())
    for side, dialogue in DIALOGUES.items():
        assert row["prompt"] + row[side] == dialogue and "Assistant:" not in row[side]
    assert row["prompt"].endswith("What is 2 + 2?\n\nAssistant:")
    other = DIALOGUES | {"rejected": DIALOGUES["rejected"].replace("Hello", "Hey")}
    assert isinstance(comparison(other, "x:1", Counter()), str)                    # another conversation: a reason to drop it


def test_trap_24_a_dialogue_is_split_at_its_last_answer(monkeypatch):
    comparison = load_function(f"{TINY_GOLD.parents[1]}/hh_rlhf/prepare.py:comparison")
    check_split(comparison)
    with pytest.raises(AssertionError):
        check_split(mutant(comparison, "if prompt != other:", "if False:"))
    at_the_first = mutant(last_answer, ".rpartition(ASSISTANT)", ".partition(ASSISTANT)")
    monkeypatch.setitem(comparison.__globals__, "last_answer", at_the_first)
    with pytest.raises(AssertionError):
        check_split(comparison)


def naive_metrics(n):
    """The metrics of update() with the learning rate 0: every token of every response once, each response alone."""
    rollout, cfg, sums, n_tokens = n.rollout, n.cfg, {}, 0
    for b, row in enumerate(rows_of(rollout.ids, rollout.attention_mask)):
        length, ids = int(rollout.response_mask[b].sum()), torch.tensor([row])
        start = len(row) - length
        logprobs = n.policy.logits(n.policy(ids))[0, start - 1:-1].div(cfg.temperature).log_softmax(-1)
        logprobs = logprobs.gather(1, ids[0, start:, None])[:, 0]
        values, n_tokens = n.value_model(ids)[0, start - 1:-1], n_tokens + length
        old, old_values, returns = (x[b, :length] for x in (rollout.logprobs, rollout.values, rollout.returns))
        for name, x in {"loss/value": ppo.value_losses(values, old_values, returns, cfg.clip),
                        "policy/approxkl": 0.5 * (logprobs - old) ** 2,
                        "policy/clipfrac": ((logprobs - old).exp() - 1).abs() > cfg.clip,
                        "value/clipfrac": (values - old_values).abs() > cfg.clip,
                        "policy/ratio": (logprobs - old).exp()}.items():
            sums[name] = sums.get(name, 0.0) + x.sum().item()
    return {name: total / n_tokens for name, total in sums.items()}


def check_metrics():
    with pytest.MonkeyPatch.context() as patch:
        skip_first_ratio_check(patch)
        n = Networks(config(temperature=0.7, minibatches=3, micro_batch=3, epochs=2))
        n.rollout = move_away(n.rollout)
        expected, metrics = naive_metrics(n), n.update(lr=0.0)
    assert expected["policy/clipfrac"] > 0.2 and expected["value/clipfrac"] > 0.2
    for name in expected:
        assert math.isclose(metrics[name], expected[name], rel_tol=1e-3, abs_tol=1e-5), name


def test_trap_25_metrics_are_means_over_every_token_of_the_update():
    assert_notices(check_metrics, *[(train_ppo, "update", old, new) for old, new in (
        ("sums[name] += ", "sums[name] = "),                                        # the last micro-batch's
        ("n_tokens = all_sum(", "sums = defaultdict(float); n_tokens = all_sum("),  # the last minibatch's
        ("all_sum(rollout.response_mask.sum())", "rollout.response_mask.numel()"),  # pads counted
        (" * cfg.epochs", ""),
        ("ppo.masked_sum(x, mask)", "x.sum()"))])
