"""The traps: each is a real defect of a real project, most of them silent. For each one a check that holds for this
code, and the same check failing once the defect is put in. The numbers are those of minirlhf/DETAILS.md."""

import copy
import math
import types

import numpy as np
import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf.running.processes import all_sum
from minirlhf import generate as sampling, gpt2, ppo, reward
from minirlhf.data import Example, Row, encode_rows
from minirlhf.reward_functions import TINY_GOLD, load_function
from minirlhf.generate import generate, left_pad, response_logits, right_pad
from minirlhf.reward import ScalarHeadModel, at_last_token
from minirlhf.running import compute, health, runs
from minirlhf.files.errors import UserError
from minirlhf.weights import from_pretrained, scalar_from_pretrained
from mutation import mutant
from small_world import (CPU, EOS, TOKENIZER, GivenScores, Networks, config, examples, generate_with_logprobs,
                         letters_gpt2, move_away, ppo_flags, ragged_mask, read_metrics, roll_out, run_ppo, script_flags,
                         skip_first_ratio_check, small_world, tiny_gpt2)
from test_ppo import LENGTHS, gae_by_definition, randn


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


# ---- 1 to 4: rollout and update must see the same thing --------------------------------------------------------------

def check_first_minibatch(world, patch, dtype, temperature=0.7):
    """Through the real script: on the first minibatch the ratio is 1 and the clip fraction 0."""
    seen = []
    def note(sums, n_tokens, dtype):
        seen.append({name: float(x / n_tokens) for name, x in sums.items()})
    patch.setattr(health, "check_first_ratio", note)
    run_ppo(world, "--temperature", temperature, "--dtype", dtype, out="first")
    first, = seen
    assert first["policy/clipfrac"] == 0
    assert abs(first["policy/ratio"] - 1) < 1e-4
    assert math.sqrt(2 * first["policy/approxkl"]) < (1e-5 if dtype == "float32" else 5e-4)          # of the log-ratio


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trap_01_the_ratio_is_one_on_the_first_minibatch(world, monkeypatch, dtype):
    check_first_minibatch(world, monkeypatch, dtype)


@pytest.mark.parametrize("old, new", [
    ("r.ids[:, r.P:], cfg.temperature)", "r.ids[:, r.P:])"),
    ("policy, r.ids, r.token_mask, r.P)", "policy, r.ids, None, r.P)"),
    ("r.ids[:, r.P:], cfg.temperature)", "r.ids[:, r.P:].roll(1, 1), cfg.temperature)"),
])
def test_trap_01_an_update_that_sees_something_else_is_noticed_by_test_and_script(world, monkeypatch, old, new):
    monkeypatch.setattr(train_ppo, "update", mutant(train_ppo.update, old, new))
    with pytest.raises(UserError, match="before the first update the log-ratio is"):
        run_ppo(world, "--temperature", 0.7)
    with pytest.raises(AssertionError):
        check_first_minibatch(world, monkeypatch, "float32")


def test_trap_01_cached_sampling_draws_from_the_log_probabilities_that_are_computed_later(world, monkeypatch):
    """In float32 the sampler's own log-probabilities would do. In bfloat16 they can differ by 1e-2."""
    sampled, real = [], train_ppo.make_experience

    def watched(*args):
        *responses, logprobs = generate_with_logprobs(generate, *args)
        sampled.append(logprobs)
        return responses

    def with_sampled_logprobs(rollout, *args):
        real(rollout, *args)
        rollout.logprobs = sampled[-1]
    monkeypatch.setattr(train_ppo, "generate", watched)
    monkeypatch.setattr(train_ppo, "make_experience", with_sampled_logprobs)
    check_first_minibatch(world, monkeypatch, "float32")


def check_left_padding():
    """Pads before a prompt leave the next-token distribution where it was, in total variation."""
    model, prompt = tiny_gpt2(), [1, 2, 3, 4]
    alone = model.logits(model(torch.tensor([prompt])))[0, -1].softmax(0)
    for pads in (1, 5):
        ids, mask = left_pad([prompt, [0] * (4 + pads)])
        padded = model.logits(model(ids, mask))[0, -1].softmax(0)
        assert (padded - alone).abs().sum() / 2 < 1e-5


def test_trap_02_left_padding_moves_no_position(monkeypatch):
    check_left_padding()
    monkeypatch.setattr(gpt2, "position_ids", mutant(gpt2.position_ids, "mask.long().cumsum(dim=1) - mask.long()",
                                                     "torch.ones_like(mask).long().cumsum(dim=1) - 1"))
    with pytest.raises(AssertionError):
        check_left_padding()


def check_training_mode_changes_nothing():
    model, ids = tiny_gpt2(), torch.arange(9)[None]
    assert torch.equal(model.train()(ids), model.eval()(ids))


def test_trap_03_there_is_no_dropout_in_the_update(world, monkeypatch):
    check_training_mode_changes_nothing()
    dropout = mutant(gpt2.Block.forward, "self.mlp(self.ln_2(x))",
                     "F.dropout(self.mlp(self.ln_2(x)), 0.1, self.training)")
    monkeypatch.setattr(gpt2.Block, "forward", dropout)
    with pytest.raises(AssertionError):
        check_training_mode_changes_nothing()
    with pytest.raises(UserError, match="before the first update"):
        run_ppo(world)


def check_sampler_and_scorer_agree(patch, generate, B=10_000):
    """In a world of 15 responses each is sampled as often as make_experience says, at a temperature that is not 1.

    Chi-square with at most 14 degrees of freedom stays under 36.1 with probability 0.999.
    """
    patch.setattr(train_ppo, "generate", generate)
    r = three_token_rollout(tiny_gpt2(V=3, seed=0), tiny_gpt2(V=3, seed=5), B, temperature=0.7)[0]
    drawn, probabilities = {}, {}
    for ids, mask, logprobs in zip(r.ids[:, r.P:], r.mask, r.logprobs):
        response = tuple(ids[mask].tolist())
        drawn[response] = drawn.get(response, 0) + 1
        probabilities[response] = math.exp(logprobs[mask].sum())
    assert sum((drawn[each] - B * p) ** 2 / (B * p) for each, p in probabilities.items()) < 36.1
    assert sum(probabilities.values()) > 0.99                           # nothing is left out that should come up


def test_trap_04_responses_are_scored_under_the_distribution_they_were_sampled_from(monkeypatch):
    top_k = "logits.masked_fill(logits < logits.topk(2).values[:, -1:], -1e9) / max(temperature, 1e-9)"
    with monkeypatch.context() as patch:
        check_sampler_and_scorer_agree(patch, generate)
    for defect in ("logits", top_k):
        changed = mutant(generate, "logits / max(temperature, 1e-9)", defect)
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            check_sampler_and_scorer_agree(patch, changed)


# ---- 5 to 7: the KL is the KL ----------------------------------------------------------------------------------------

LOGGED = "ppo.sequence_mean(r.kl, r.mask)"                              # in rollout_metrics


def three_token_rollout(policy, reference, B, temperature=1.0):
    """Steps 1 to 6 with B responses to the prompt [0, 1]. 2 is the EOS, beta is 0.1. Returns rollout and metrics."""
    tokenizer = types.SimpleNamespace(eot_token=2, decode=str)
    cfg = config(max_response=3, micro_batch=0, batch_size=B, temperature=temperature)
    batch = [Example(Row("x:1", "ab"), [0, 1], [])] * B
    rollout = train_ppo.roll_out(policy, batch, tokenizer, (2, 0), cfg, 0, CPU)
    reward, value = GivenScores(torch.ones(B)), ScalarHeadModel(reference)
    train_ppo.make_experience(rollout, policy, reference, reward, cfg, 0.1)
    train_ppo.estimate_advantages(rollout, value, cfg)
    return rollout, train_ppo.rollout_metrics(rollout, 0.1)


def sequences(model, eos=2, longest=3):
    """All responses of a world of two letters and an EOS to the prompt [0, 1], with their log-probabilities."""
    done, open_ = {}, {(): 0.0}
    while open_:
        ids, logprob = open_.popitem()
        if len(ids) == longest or ids[-1:] == (eos,):
            done[ids] = logprob
            continue
        step = model.logits(model(torch.tensor([[0, 1, *ids]])))[0, -1].double().log_softmax(0).tolist()
        open_ |= {ids + (token,): logprob + step[token] for token in range(3)}
    return done


def check_sequence_kl(B=4000):
    """The logged KL of sampled responses against the exact one by enumeration, within 4 standard errors; and what PPO
    is paid is the score minus beta times the KL that is logged."""
    policy, reference = tiny_gpt2(V=3, seed=0), tiny_gpt2(V=3, seed=5)
    with torch.no_grad():
        policy.ln_f.bias += 1.5 * policy.wte.weight[2]                  # a policy that ends early
    p, q = sequences(policy), sequences(reference)
    exact = sum(math.exp(p[ids]) * (p[ids] - q[ids]) for ids in p)
    variance = sum(math.exp(p[ids]) * (p[ids] - q[ids] - exact) ** 2 for ids in p)
    rollout, metrics = three_token_rollout(policy, reference, B)
    for name in ("objective/kl", "objective/kl_k3"):
        assert abs(metrics[name] - exact) < (4 * math.sqrt(variance / B) if name == "objective/kl" else 0.1)
    paid = metrics["objective/scores"] - 0.1 * metrics["objective/kl"]
    assert math.isclose(rollout.rewards.sum() / B, paid, rel_tol=1e-4)
    assert math.isclose(metrics["objective/rlhf_reward"], paid, rel_tol=1e-4)


def test_trap_05_the_logged_kl_is_the_exact_kl_and_the_one_that_is_paid():
    check_sequence_kl()


@pytest.mark.parametrize("name, old, new", [
    ("generate", "logits / max(", "(logits - torch.eye(3)[stop_token] * 1e9 * (t < 2)) / max("),    # minimum length
    ("rollout_metrics", LOGGED, "ppo.sequence_mean(r.kl, torch.ones_like(r.mask))"),                # padding counted
    ("make_experience", "ppo.token_rewards(r.kl,", "ppo.token_rewards(2 * r.kl,"),                  # another KL is paid
    ("make_experience", "r.logprobs - r.ref_logprobs", "r.ref_logprobs - r.logprobs"),
])
def test_trap_05_a_forced_length_counted_padding_and_another_kl_are_noticed(monkeypatch, name, old, new):
    monkeypatch.setattr(train_ppo, name, mutant(getattr(train_ppo, name), old, new))
    with pytest.raises(AssertionError):
        check_sequence_kl()


def check_estimates_kl(estimator, never_negative):
    """In a world of three tokens its expectation is the exact KL."""
    for seed in range(5):
        p, q = randn(3, seed=seed).log_softmax(0), randn(3, seed=seed + 100).log_softmax(0)
        exact = sum(math.exp(p[i]) * math.log(math.exp(p[i]) / math.exp(q[i])) for i in range(3))
        estimates = estimator(p, q)
        assert math.isclose((p.exp() * estimates).sum(), exact, rel_tol=1e-9)
        assert not never_negative or (estimates >= 0).all()


def test_trap_06_k1_and_k3_estimate_the_exact_kl():
    check_estimates_kl(lambda logprobs, ref_logprobs: logprobs - ref_logprobs, never_negative=False)
    check_estimates_kl(ppo.kl_k3, never_negative=True)


def test_trap_06_another_sign_is_noticed():
    for old, new in (("= ref_logprobs - logprobs", "= logprobs - ref_logprobs"), ("- log_ratio", "+ log_ratio")):
        changed = mutant(ppo.kl_k3, old, new)
        with pytest.raises(AssertionError):
            check_estimates_kl(changed, never_negative=True)


def check_reference_stays(world, patch, main):
    """After two updates the reference is still the SFT model, none of the four networks shares memory with another, and
    the KL is no longer 0."""
    seen, real, values, real_advantages = [], train_ppo.make_experience, [], train_ppo.estimate_advantages
    patch.setattr(train_ppo, "make_experience", lambda *args: seen.append(args) or real(*args))
    patch.setattr(train_ppo, "estimate_advantages", lambda *args: values.append(args[1]) or real_advantages(*args))
    main(ppo_flags(world, "--iterations", 3))
    networks = (*seen[-1][1:4], values[-1])                             # policy, reference, reward, value
    reference = networks[1]
    sft = from_pretrained(f"{world}/sft").state_dict()
    assert all(torch.equal(tensor, sft[name]) for name, tensor in reference.state_dict().items())
    memory = [{p.data_ptr() for p in model.parameters()} for model in networks]
    assert sum(map(len, memory)) == len(set.union(*memory))
    metrics = read_metrics(world / "ppo")
    assert metrics[0]["objective/kl"] == 0 and metrics[-1]["objective/kl_k3"] > 1e-3


def test_trap_07_the_policy_is_not_its_own_reference(world, monkeypatch):
    with monkeypatch.context() as patch:
        check_reference_stays(world, patch, train_ppo.main)
    same = mutant(train_ppo.main, "examples, heldout = load", "reference = policy; examples, heldout = load")
    shared = mutant(train_ppo.main, "examples, heldout = load", "policy.wte = reference.wte; examples, heldout = load")
    for changed in (same, shared):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            check_reference_stays(world, patch, changed)


# ---- 8 to 11: where a response ends ----------------------------------------------------------------------------------

def check_learns_to_stop():
    """Three demonstrations of different lengths, learned by heart, come back with their ends."""
    model, prompts = letters_gpt2(), [[97, 98], [99], [100, 97, 98]]
    answers = [[97, EOS], [98, 99, 97, 100, EOS], [99, 99, EOS]]
    batch = [Example(None, prompt, [answer]) for prompt, answer in zip(prompts, answers)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss, n_tokens = train_sft.sft_loss(model, batch, "cpu")
        (loss / n_tokens).backward()
        optimizer.step()
    ids, mask, finished = generate(model, *left_pad(prompts), torch.zeros(3, 8), (EOS, 0), temperature=0)
    assert finished.all() and [row[own].tolist() for row, own in zip(ids, mask)] == answers


def test_trap_08_the_eos_is_among_the_labels(monkeypatch):
    check_learns_to_stop()
    hidden = mutant(sampling.response_logprobs, "[len(p) for p in prompts])[:, 1:]",
                    f"[len(p) for p in prompts])[:, 1:] & (ids[:, 1:] != {EOS})")
    monkeypatch.setattr(train_sft, "response_logprobs", hidden)
    with pytest.raises(AssertionError):
        check_learns_to_stop()


def check_eos_gets_gradient():
    """An advantage on the EOS alone makes ending there likelier."""
    n = Networks(config(epochs=1, minibatches=1))
    ends = torch.zeros_like(n.rollout.mask)
    ends[n.rollout.finished, (n.rollout.ids[:, n.rollout.P:] == EOS).long().argmax(1)[n.rollout.finished]] = True
    assert 3 < ends.sum() == n.rollout.finished.sum()
    n.rollout.advantages = ends.float()
    n.update()
    logits = response_logits(n.policy, n.rollout.ids, n.rollout.token_mask, n.rollout.P)
    after = ppo.token_logprobs(logits, n.rollout.ids[:, n.rollout.P:], n.cfg.temperature)
    assert (after > n.rollout.logprobs + 1e-3)[ends].all()


def test_trap_09_the_eos_is_in_the_ppo_mask(monkeypatch):
    check_eos_gets_gradient()
    losses = "r.advantages, cfg.clip)"
    dropped = mutant(train_ppo.update, losses, f"{losses} * (r.ids[:, r.P:] != {EOS})")
    monkeypatch.setattr(train_ppo, "update", dropped)
    with pytest.raises(AssertionError):
        check_eos_gets_gradient()


def check_score_position(token_rewards):
    rewards = token_rewards(torch.zeros(4, 8), torch.arange(1.0, 5), ragged_mask(LENGTHS, 8), 0.1)
    assert [row.nonzero().flatten().tolist() for row in rewards] == [[length - 1] for length in LENGTHS]
    assert rewards.sum(dim=1).tolist() == [1, 2, 3, 4]


def test_trap_10_the_score_is_on_the_last_token_and_not_on_the_pad_after_it():
    check_score_position(ppo.token_rewards)
    last = "mask.sum(dim=1, keepdim=True) - 1"
    for defect in ("mask.sum(dim=1, keepdim=True)", "torch.full((len(mask), 1), mask.shape[1] - 1)"):
        changed = mutant(ppo.token_rewards, last, defect)
        with pytest.raises(AssertionError):
            check_score_position(changed)


def check_missing_eos():
    """Whatever the reward model says, a response that does not end gets exactly the fixed score, and no other does."""
    r = Networks(config(missing_eos=-3.0), B=40, reward=GivenScores(torch.full((40,), 7.0))).rollout
    ended = torch.tensor([EOS in row for row in r.ids[:, r.P:].tolist()])
    assert 5 < ended.sum() < 35
    assert torch.equal(r.scores, torch.where(ended, 7.0, -3.0))


def test_trap_10_the_missing_eos_score_fires(monkeypatch):
    check_missing_eos()
    for name, old, new in (("generate", "finished[rows] = ended", "finished[rows] = True"),
                           ("make_experience", "torch.where(r.finished", "torch.where(~r.finished")):
        changed = mutant(getattr(train_ppo, name), old, new)
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(train_ppo, name, changed)
            check_missing_eos()


def check_reward_position(patch, at_last_token):
    """Pads on the left, on the right or on both sides, and what stands in them, change no reward."""
    patch.setattr(reward, "at_last_token", at_last_token)
    model, rows = ScalarHeadModel(tiny_gpt2()).requires_grad_(False), [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 1, 2]]
    alone = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
    both = [torch.cat([torch.zeros_like(x), x, torch.zeros_like(x)], dim=1) for x in right_pad(rows)]
    for ids, mask in (left_pad(rows), right_pad(rows), both):
        for filler in (0, 9):
            torch.testing.assert_close(model.normalised_scores(ids.masked_fill(~mask, filler), mask), alone, rtol=1e-5, atol=1e-5)


def test_trap_11_the_reward_is_read_at_the_last_token_wherever_the_pads_are(monkeypatch):
    check_reward_position(monkeypatch, at_last_token)
    mean = mutant(at_last_token, "x.gather(1, last).squeeze(1)", "x.mean(dim=1)")
    fixed = mutant(at_last_token, "x.gather(1, last).squeeze(1)", "x[:, -1]")
    count = mutant(at_last_token, "mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1, keepdim=True)",
                   "mask.sum(dim=1, keepdim=True) - 1")                 # right only while the pads are on the right
    for changed in (mean, fixed, count):
        with pytest.raises(AssertionError):
            check_reward_position(monkeypatch, changed)


# ---- 12 to 15: statistics --------------------------------------------------------------------------------------------

FIELDS = ("logprobs", "ref_logprobs", "entropy", "kl", "rewards", "values", "advantages", "returns")


def poison_pads(patch, n, poison):
    """Something else in what the networks say about every pad: in the logits that predict it, and in its value."""
    def poisoned_logits(model, ids, mask, P):
        return response_logits(model, ids, mask, P).masked_fill(~mask[:, P:, None], poison)

    def poisoned_values(_, inputs, values):
        next_is_pad = ~inputs[1].roll(-1, dims=1)
        return values.masked_fill(next_is_pad, poison)
    patch.setattr(train_ppo, "response_logits", poisoned_logits)
    n.value.register_forward_hook(poisoned_values)


def check_experience_under_poison(patch, poison):
    """Something else in the networks' output at every pad changes no metric, and no field where there is a token."""
    clean, other = Networks(config()), Networks(config())
    with patch.context() as with_poison:
        poison_pads(with_poison, other, poison)
        other.rollout = roll_out(other, examples(12), other.cfg)
    mask, metrics = clean.rollout.mask, [train_ppo.rollout_metrics(n.rollout, 0.05) for n in (clean, other)]
    assert 0.2 < (~mask).float().mean() and metrics[0] == metrics[1]
    for name in FIELDS:
        assert torch.equal(getattr(other.rollout, name)[mask], getattr(clean.rollout, name)[mask]), name


def check_update_under_poison(poison):
    """Something else in every masked slot of a rollout changes no metric, no gradient and so no weight."""
    results = []
    for n in (Networks(config()), Networks(config())):
        if results:
            for name in FIELDS:
                setattr(n.rollout, name, getattr(n.rollout, name).masked_fill(~n.rollout.mask, poison))
        results.append((n.update(), n.weights()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("poison", [1e6, -1e6, math.nan])
def test_trap_12_nothing_under_the_mask_reaches_a_metric_a_gradient_or_a_weight(monkeypatch, poison):
    check_experience_under_poison(monkeypatch, poison)
    check_update_under_poison(poison)


@pytest.mark.parametrize("module, name, old, new, poison", [
    (ppo, "masked_sum", "x.masked_fill(~mask, 0).sum()", "(x * mask).sum()", math.nan),
    (ppo, "masked_mean", "all_sum(masked_sum(x, mask))", "x.sum()", 1e6),
    (ppo, "gae", "values.masked_fill(~mask, 0)", "values", 1e6),
    (train_ppo, "rollout_metrics", "ppo.sequence_mean(r.entropy, r.mask)", "r.entropy.sum()", 1e6),
])
def test_trap_12_experience_that_reads_pads_is_noticed(monkeypatch, module, name, old, new, poison):
    monkeypatch.setattr(module, name, mutant(getattr(module, name), old, new))
    with pytest.raises(AssertionError):
        check_experience_under_poison(monkeypatch, poison)


@pytest.mark.parametrize("poison", [-1e6, math.nan])
def test_trap_12_an_update_that_reads_pads_is_noticed(monkeypatch, poison):
    """masked_sum alone will not do: the loss is right, and the gradient of exp at a pad is 0 * inf.

    Either of the two lines below prevents that, so both are taken out.
    """
    monkeypatch.setattr(train_ppo.Rollout, "parts", mutant(train_ppo.Rollout.parts, '.masked_fill(~part["mask"], 0)', ""))
    monkeypatch.setattr(train_ppo, "update", mutant(
        train_ppo.update, "new_logprobs = new_logprobs.masked_fill(~r.mask, 0)", "pass"))
    with pytest.raises((AssertionError, UserError)):                    # or the script: "the gradient is nan"
        check_update_under_poison(poison)


def check_signal_between_episodes():
    """Of two responses with the scores +1 and -1, every token of the one is encouraged and of the other discouraged."""
    n, scores = Networks(config(beta=0.0), B=40), torch.tensor([1.0, -1.0]).repeat(20)
    n.rollout.finished = torch.ones(40, dtype=torch.bool)
    torch.nn.init.zeros_(n.value.score.weight)
    train_ppo.make_experience(n.rollout, n.policy, n.reference, GivenScores(scores), n.cfg, 0.0)
    train_ppo.estimate_advantages(n.rollout, n.value, n.cfg)
    signs = (n.rollout.advantages.sign() * scores[:, None])[n.rollout.mask]
    assert (signs == 1).all()


def test_trap_13_advantages_are_not_normalised_per_sequence(monkeypatch):
    check_signal_between_episodes()
    per_row = mutant(ppo.whiten, "masked_mean(x, mask)",
                     "x.masked_fill(~mask, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)")
    monkeypatch.setattr(ppo, "whiten", per_row)
    with pytest.raises(AssertionError):
        check_signal_between_episodes()


def check_returns(patch, estimate_advantages):
    """Returns are the unwhitened advantages plus the values, by the quadratic definition of GAE."""
    patch.setattr(train_ppo, "estimate_advantages", estimate_advantages)
    r = Networks(config()).rollout
    lengths = r.mask.sum(dim=1).tolist()
    advantages = gae_by_definition(r.rewards, r.values, lengths, 1.0, 0.95)
    np.testing.assert_allclose(r.returns[r.mask], (torch.tensor(advantages) + r.values)[r.mask], atol=1e-4)
    white = (advantages - advantages[r.mask].mean()) / advantages[r.mask].std()
    np.testing.assert_allclose(r.advantages[r.mask], white[r.mask], atol=1e-4)


def test_trap_14_returns_come_before_whitening(monkeypatch):
    check_returns(monkeypatch, train_ppo.estimate_advantages)
    after = mutant(train_ppo.estimate_advantages, "r.advantages = ppo.whiten(advantages, r.mask)",
                   "r.advantages = ppo.whiten(advantages, r.mask); r.returns = r.advantages + r.values")
    with pytest.raises(AssertionError):
        check_returns(monkeypatch, after)


def check_every_row_attends(attention_mask):
    """Since 2.5 PyTorch's own attention turns a softmax over nothing into 0, others still into NaN."""
    mask = torch.tensor([[False] * 5, [False, False, True, True, False]])
    for T in (5, 2, 1):
        visible = attention_mask(mask, T)
        scores = torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
        assert scores.softmax(dim=-1).isfinite().all()


def test_trap_15_no_nan_from_a_row_that_sees_nothing():
    check_every_row_attends(gpt2.attention_mask)
    blind = mutant(gpt2.attention_mask, "(mask[:, None, None, :] | causal.triu(S - T))", "mask[:, None, None, :]")
    with pytest.raises(AssertionError):
        check_every_row_attends(blind)


def check_small_batches_are_finite(rollout_metrics):
    """A batch of one response; responses of one token; responses that all earn the same."""
    same = Networks(config(beta=0.0, lam=1.0, missing_eos=1.0), reward=GivenScores(torch.ones(12)))
    for n in (Networks(config(minibatches=1), B=1), Networks(config(max_response=1, minibatches=1), B=1), same):
        metrics = rollout_metrics(n.rollout, 0.05) | n.update()
        assert all(math.isfinite(x) for x in metrics.values())
        assert n.weights().isfinite().all()


@pytest.mark.filterwarnings("ignore:std")
def test_trap_15_no_nan_from_the_deviation_of_one():
    check_small_batches_are_finite(train_ppo.rollout_metrics)
    unbiased = mutant(train_ppo.rollout_metrics, "ppo.masked_variance(r.scores, all_rows).sqrt()", "r.scores.std()")
    with pytest.raises(AssertionError):
        check_small_batches_are_finite(unbiased)


# ---- 16 and 17: the step ---------------------------------------------------------------------------------------------

class PlainDescent(torch.optim.SGD):
    """In the place of Adam, which would blow rounding errors of vanishing gradients up to whole steps."""

    def __init__(self, params, **_):
        super().__init__(params)


SCRIPTS = {
    "sft": (train_sft.main, ["--batch_size", 16, "--lr", 15, "--epochs", 1]),
    "rm": (train_rm.main, ["--batch_size", 16, "--lr", 0.3, "--epochs", 1]),
    "ppo": (train_ppo.main, ["--lr", 0.3, "--value_lr", 0.1]),
}
DATA = {"sft": "demonstrations", "rm": "comparisons"}


def trained_weights(world, name, main, micro_batch):
    flags = [*SCRIPTS[name][1], "--micro_batch", micro_batch]
    if name == "ppo":
        main(ppo_flags(world, *flags))
    else:
        main(script_flags(world, name + "1", "--data", f"{world}/{DATA[name]}.jsonl", *flags))
    state = torch.load(world / ("ppo" if name == "ppo" else name + "1") / "state.pt", weights_only=True)
    parts = [state["policy"], state["value"]] if name == "ppo" else [state["model"]]
    return torch.cat([tensor.flatten() for part in parts for tensor in part.values()])


def check_accumulation(world, name, main):
    whole = trained_weights(world, name, main, 0)
    for micro_batch in (1, 5):
        assert (trained_weights(world, name, main, micro_batch) - whole).abs().max() < 1e-6


@pytest.mark.parametrize("name", SCRIPTS)
def test_trap_16_micro_batches_do_not_change_the_step(world, monkeypatch, name):
    monkeypatch.setattr(torch.optim, "AdamW", PlainDescent)
    monkeypatch.setattr(train_rm, "SAMPLES", 8)
    check_accumulation(world, name, SCRIPTS[name][0])


@pytest.mark.parametrize("name, function, old, new", [
    ("sft", "main", "[0] / n_tokens", "[0] / sum(len(e.responses[0]) for e in part)"),
    ("rm", "main", "(loss / len(batch))", "(loss / len(part))"),
    ("rm", "reward_model_loss", "(scores, ranks) * len(examples)", "(scores, ranks)"),
    ("rm", "language_loss", "logprobs / tokens.repeat_interleave(tokens)", "logprobs / len(logprobs) * len(examples)"),
    ("ppo", "update", "losses = ppo.policy_losses(", "n_tokens = r.mask.sum(); losses = ppo.policy_losses("),
    ("ppo", "update", "losses = ppo.value_losses(", "n_tokens = r.mask.sum(); losses = ppo.value_losses("),
])
def test_trap_16_dividing_by_the_micro_batch_is_noticed(world, monkeypatch, name, function, old, new):
    monkeypatch.setattr(torch.optim, "AdamW", PlainDescent)
    monkeypatch.setattr(train_rm, "SAMPLES", 8)
    script = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}[name]
    monkeypatch.setattr(script, function, mutant(getattr(script, function), old, new))
    with pytest.raises(AssertionError):
        check_accumulation(world, name, script.main)


def check_gradient_is_clipped(patch, step):
    """With plain descent and learning rate 1 the step is as long as the gradient, but at most 1."""
    patch.setattr(compute, "step", step)
    for scale in (1e4, 2e4, 1e-4, 2e-4):
        n = Networks(config(epochs=1, minibatches=1, clip=1e9))
        n.rollout.advantages = n.rollout.advantages * scale
        n.rollout.returns = n.rollout.values + scale * (n.rollout.returns - n.rollout.values)
        before = copy.deepcopy((n.policy, n.value))
        n.update(lr=1.0)
        for old, new in zip(before, (n.policy, n.value)):
            length = sum(((a - b) ** 2).sum() for a, b in zip(old.parameters(), new.parameters())).sqrt().item()
            assert math.isclose(length, 1, rel_tol=1e-2) if scale > 1 else 0 < length < 0.1


def test_trap_17_gradients_are_clipped_after_backward(monkeypatch):
    check_gradient_is_clipped(monkeypatch, compute.step)
    clip = "norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))"
    too_late = mutant(compute.step, clip, "norm = 0.0", "optimizer.step()", f"optimizer.step(); {clip}")
    with pytest.raises(AssertionError):
        check_gradient_is_clipped(monkeypatch, too_late)


def check_no_gradient_is_left(patch, step):
    patch.setattr(compute, "step", step)
    n = Networks(config())
    n.update()
    assert all(p.grad is None or (p.grad == 0).all() for model in (n.policy, n.value) for p in model.parameters())


def test_trap_17_no_stale_gradient_is_left_for_the_next_rollout(monkeypatch):
    check_no_gradient_is_left(monkeypatch, compute.step)
    stale = mutant(compute.step, "optimizer.zero_grad()", "pass")
    with pytest.raises(AssertionError):
        check_no_gradient_is_left(monkeypatch, stale)


def check_optimizer(world, patch, name, main):
    """The two betas are two, and nothing decays the weights."""
    made, AdamW = [], torch.optim.AdamW
    patch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: made.append(AdamW(*args, **kwargs)) or made[-1])
    trained_weights(world, name, main, 0)
    assert len(made) == (2 if name == "ppo" else 1)
    for optimizer in made:
        assert optimizer.defaults["betas"] in ((0.9, 0.999), (0.9, 0.95)) and optimizer.defaults["weight_decay"] == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_trap_17_the_betas_of_adam_are_two(world, monkeypatch, name):
    main = SCRIPTS[name][0]
    with monkeypatch.context() as patch:
        check_optimizer(world, patch, name, main)
    old, new = ("weight_decay=", "betas=(0.9, 0.9), weight_decay=") if name == "ppo" else ("0.95", "0.9")
    changed = mutant(main, old, new)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        check_optimizer(world, patch, name, changed)


# Trap 18, the number of pairs divided by twice: tests/test_reward.py, test_each_loss_is_what_its_name_says.

# ---- 19 to 21: the script --------------------------------------------------------------------------------------------

def check_controller(target=4.0, B=40):
    """A plant: a policy that strays from the reference the further, the smaller beta is. The controller, fed with what
    the script logs, must lead its KL per sequence to the target from either side."""
    cfg = config(micro_batch=0, batch_size=B)
    reference, policy = letters_gpt2(0).requires_grad_(False), letters_gpt2(0).requires_grad_(False)
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in policy.parameters()]
    networks = types.SimpleNamespace(policy=policy, reference=reference, reward=GivenScores(torch.zeros(B)),
                                     value=ScalarHeadModel(letters_gpt2(2)))
    for beta in (0.02, 0.5):
        kls = []
        for iteration in range(40):
            for p, start, d in zip(policy.parameters(), reference.parameters(), direction):
                p.copy_(start + 0.04 * beta ** -0.5 * d)
            rollout = roll_out(networks, examples(B), cfg, iteration, beta)
            metrics = train_ppo.rollout_metrics(rollout, beta)
            kl = (rollout.logprobs - rollout.ref_logprobs)[rollout.mask].sum() / B          # measured apart
            kls.append(float(kl))
            beta = ppo.adaptive_beta(beta, metrics["objective/kl"], target, B, horizon=80)
        assert abs(np.mean(kls[-10:]) / target - 1) < 0.25


def test_trap_19_the_controller_reaches_its_target_in_the_unit_that_is_logged(monkeypatch):
    check_controller()
    per_token = mutant(train_ppo.rollout_metrics, LOGGED, "ppo.masked_mean(r.kl, r.mask)")
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(train_ppo, "rollout_metrics", per_token)
        check_controller()
    monkeypatch.setattr(ppo, "adaptive_beta", mutant(ppo.adaptive_beta, "max(kl / target - 1", "max(1 - kl / target"))
    with pytest.raises(AssertionError):
        check_controller()


def check_scores_are_the_reward_models(world, patch):
    """Through the command line: the scores are those of the model in --reward, of each response alone and unpadded."""
    rollouts, real = [], train_ppo.update
    patch.setattr(train_ppo, "update", lambda rollout, *args: rollouts.append(rollout) or real(rollout, *args))
    run_ppo(world)
    r, model = rollouts[0], scalar_from_pretrained(world / "rm").requires_grad_(False)
    assert (model.reward_mean, model.reward_std) == (0.3, 2.0)
    for row, real_tokens, score, finished in zip(r.ids, r.token_mask, r.scores, r.finished):
        raw = float(model(row[real_tokens][None])[0, -1])
        assert math.isclose(score, (raw - 0.3) / 2 if finished else -3, abs_tol=1e-4)


def test_trap_20_ppo_loads_the_reward_model_that_was_trained(world, monkeypatch):
    with monkeypatch.context() as patch:
        check_scores_are_the_reward_models(world, patch)
    loaded = "reward = scalar_from_pretrained(cfg.reward, cfg.dtype)"
    again = "getattr(part, 'reset_parameters', lambda: None)()"
    fresh = mutant(train_ppo.main, loaded, f"{loaded}.apply(lambda part: {again})")
    raw = mutant(train_ppo.make_experience, "[reward.normalised_scores(", "[0.3 + 2 * reward.normalised_scores(")
    for changed in (fresh, raw):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(train_ppo, changed.__name__, changed)
            check_scores_are_the_reward_models(world, patch)


class PowerCut(Exception):
    pass


def check_resume(world, patch, main):
    """Six iterations at a stretch, and six with a power cut in the fifth: the same metrics and weights, bit for bit."""
    flags = ["--iterations", 6, "--target_kl", 1, "--batch_size", 16]
    patch.setattr(runs, "SAVING", math.inf)                     # a checkpoint after every iteration
    torch.manual_seed(0)                                        # as in a new process
    main(ppo_flags(world, *flags, out="straight"))
    real = train_ppo.update

    def update(*args):
        if args[6] == 4:
            raise PowerCut
        return real(*args)
    with patch.context() as cut, pytest.raises(PowerCut):
        cut.setattr(train_ppo, "update", update)
        torch.manual_seed(0)
        main(ppo_flags(world, *flags, out="cut"))
    torch.manual_seed(0)
    main(ppo_flags(world, *flags, "--resume", out="cut"))
    assert read_metrics(world / "cut") == read_metrics(world / "straight")
    files = [(world / name / "model.safetensors").read_bytes() for name in ("cut", "straight")]
    assert files[0] == files[1]


def test_trap_21_a_resumed_run_is_the_run(world, monkeypatch):
    check_resume(world, monkeypatch, train_ppo.main)


@pytest.mark.slow
@pytest.mark.parametrize("old, new", [
    ("run.restore(**saved)", "run.restore(policy=policy, value=value)"),                        # a new optimizer
    ('run.state.get("beta", cfg.beta)', "cfg.beta"),
    ("cfg.batch_size, iteration, cfg.seed", "cfg.batch_size, iteration - run.state.get('step', 0), cfg.seed"),
    ("stop, cfg, iteration, device)", "stop, cfg, int(torch.randint(99, ())), device)"),  # a global stream
])
def test_trap_21_a_resume_that_forgets_is_noticed(world, monkeypatch, old, new):
    changed = mutant(train_ppo.main, old, new)
    with pytest.raises(AssertionError):
        check_resume(world, monkeypatch, changed)


# ---- 22 to 25 --------------------------------------------------------------------------------------------------------

def check_gelu():
    """Through an MLP that passes its input on: Gaussian error linear units in the tanh form of OpenAI's code."""
    mlp, x = gpt2.MLP(gpt2.GPT2Config(n_embd=32)), torch.linspace(-5, 5, 32, dtype=torch.float64)
    for linear in (mlp.c_fc, mlp.c_proj):
        linear.weight.data, linear.bias.data = torch.eye(*linear.weight.shape), torch.zeros_like(linear.bias)
    expected = [u / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3))) for u in x.tolist()]
    np.testing.assert_allclose(mlp.double()(x).detach(), expected, atol=1e-9)


def test_trap_22_gelu_is_the_tanh_form(monkeypatch):
    check_gelu()
    monkeypatch.setattr(gpt2.MLP, "forward", mutant(gpt2.MLP.forward, 'approximate="tanh"', 'approximate="none"'))
    with pytest.raises(AssertionError):
        check_gelu()


def check_nothing_is_cut(encode_rows, capsys):
    """Two answers that differ only after the limit, and one that fits: an error, or dropped and counted; never cut."""
    rows = [Row(where, "p", answers, (1, 2), (True, True))
            for where, answers in (("c:1", ("abcdefgh", "abcdefgi")), ("c:2", ("ab", "c")))]
    with pytest.raises(UserError, match="c:1: response of 9 tokens, more than 4"):
        encode_rows(rows, TOKENIZER, 48, max_response=4)
    kept = encode_rows(rows, TOKENIZER, 48, max_response=4, drop_long=True)
    assert "dropped 1 of 2" in capsys.readouterr().out
    assert [example.responses for example in kept] == [[[97, 98, EOS], [99, EOS]]]


def test_trap_23_what_does_not_fit_is_never_cut(capsys):
    check_nothing_is_cut(encode_rows, capsys)
    cuts = mutant(encode_rows, "encode(tokenizer, row.prompt, *each)[1]",
                  "encode(tokenizer, row.prompt, *each)[1][:max_response or None]")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_nothing_is_cut(cuts, capsys)


DIALOGUES = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 2 + 2?\n\nAssistant: It is 4.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 2 + 2?\n\nAssistant: No idea.",
}


def check_split(comparison):
    """Of a dialogue of two turns only the last answer is judged, and both sides share all that comes before it."""
    row = comparison(DIALOGUES, "x:1")
    for side, dialogue in DIALOGUES.items():
        assert row["prompt"] + row[side] == dialogue and "Assistant:" not in row[side]
    assert row["prompt"].endswith("What is 2 + 2?\n\nAssistant:")
    other = DIALOGUES | {"rejected": DIALOGUES["rejected"].replace("Hello", "Hey")}
    assert isinstance(comparison(other, "x:1"), str)                    # another conversation: a reason to drop it


def test_trap_24_a_dialogue_is_split_at_its_last_answer():
    comparison = load_function(f"{TINY_GOLD.parents[1]}/hh_rlhf/prepare.py:comparison")
    check_split(comparison)
    for old, new in ((".rpartition(ASSISTANT)", ".partition(ASSISTANT)"), ("if prompt != other:", "if False:")):
        changed = mutant(comparison, old, new)
        with pytest.raises(AssertionError):
            check_split(changed)

def naive_metrics(n):
    """The metrics of update() with the learning rate 0: every token of every response once, each response alone."""
    r, cfg, sums, n_tokens = n.rollout, n.cfg, {}, 0
    for b in range(len(r.ids)):
        length, ids = int(r.mask[b].sum()), r.ids[b][r.token_mask[b]][None]
        start = ids.shape[1] - length
        logprobs = n.policy.logits(n.policy(ids))[0, start - 1:-1].div(cfg.temperature).log_softmax(-1)
        logprobs = logprobs.gather(1, ids[0, start:, None])[:, 0]
        values, n_tokens = n.value(ids)[0, start - 1:-1], n_tokens + length
        old, old_values, returns = (x[b, :length] for x in (r.logprobs, r.values, r.returns))
        for name, x in {
                        "loss/value": ppo.value_losses(values, old_values, returns, cfg.clip),
                        "policy/approxkl": 0.5 * (logprobs - old) ** 2,
                        "policy/clipfrac": ((logprobs - old).exp() - 1).abs() > cfg.clip,
                        "value/clipfrac": (values - old_values).abs() > cfg.clip,
                        "policy/ratio": (logprobs - old).exp()}.items():
            sums[name] = sums.get(name, 0.0) + x.sum().item()
    return {name: total / n_tokens for name, total in sums.items()}


def check_metrics(patch, temperature=0.7):
    skip_first_ratio_check(patch)
    n = Networks(config(temperature=temperature, minibatches=3, micro_batch=3, epochs=2))
    move_away(n.rollout)
    expected, metrics = naive_metrics(n), n.update(lr=0.0)
    assert expected["policy/clipfrac"] > 0.2 and expected["value/clipfrac"] > 0.2
    for name in expected:
        assert math.isclose(metrics[name], expected[name], rel_tol=1e-3, abs_tol=1e-5), name


def test_trap_25_metrics_are_means_over_every_token_of_the_update(monkeypatch):
    check_metrics(monkeypatch)


@pytest.mark.parametrize("changes", [
    ("sums[name] += ", "sums[name] = "),                                                # the last micro-batch's
    ("sums = defaultdict(float)", "sums = {}",                                          # the last minibatch's
     "for r in rollout.parts(rows, cfg.micro_batch):\n            logits", "sums = defaultdict(float)\n"
     "        for r in rollout.parts(rows, cfg.micro_batch):\n            logits"),
    ("all_sum(rollout.mask.sum())", "rollout.mask.numel()"),                    # pads counted
    (" * cfg.epochs", ""),
    ("ppo.masked_sum(x, r.mask)", "x.sum()"),
])
def test_trap_25_other_averages_are_noticed(monkeypatch, changes):
    monkeypatch.setattr(train_ppo, "update", mutant(train_ppo.update, *changes))
    with pytest.raises(AssertionError):
        check_metrics(monkeypatch)
