"""The warnings in words: each fires on a history that deserves it, and none on a healthy run."""

import math

import numpy as np
import pytest
import torch

import train_ppo
from minirlhf import stats
from minirlhf.health import WINDOW, complaints, judge_reward_model, rollout_metrics
from minirlhf.weights import save_pretrained
from mutation import mutant
from small_world import Networks, config, letters_gpt2, rows_of, run_ppo, small_world

N = 25                                                          # iterations of the healthy run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = small_world(tmp_path_factory.mktemp("world"))
    (folder / "reward.py").write_text('def early_letters(prompts, texts):\n'
                                      '    return [sum(c < "f" for c in text) / (len(text) + 1) for text in texts]\n'
                                      'def same(prompts, responses):\n'
                                      '    return [1.0] * len(responses)\n')
    return folder


@pytest.fixture(scope="module")
def healthy(world):
    """The metrics of a real run, in which the true preference is what is rewarded."""
    spec = f"{world}/reward.py:early_letters"
    return run_ppo(world, "--reward", spec, "--gold", spec, "--iterations", N, "--batch_size", 32, "--lr", 2e-3,
                   "--value_lr", 3e-3, "--micro_batch", 0)


def signs(history):
    return [sign for sign, _ in complaints(history)]


def changed(history, name, function):
    """The history with function(iteration, value) in place of one metric. The KL's other estimate, which is never
    negative, goes with it."""
    rows = [row | {name: function(i, row[name])} for i, row in enumerate(history)]
    return [row | {"objective/kl_k3": abs(row["objective/kl"])} for row in rows] if name == "objective/kl" else rows


def test_a_healthy_run_is_not_complained_about_at_any_iteration(healthy):
    assert healthy[-1]["objective/gold"] > healthy[0]["objective/gold"] + 0.2           # it did learn
    assert healthy[-1]["objective/kl"] > 1
    for n in range(1, N + 1):
        assert signs(healthy[:n]) == []


def test_a_run_without_gold_is_judged_by_the_rest(healthy):
    history = [{name: x for name, x in row.items() if name != "objective/gold"} for row in healthy]
    assert signs(history) == []
    assert signs(changed(history, "rollout/eos_rate", lambda i, x: 1 - i / N)) == ["EOS falls"]


SICK = {    # sign: the metric, and what becomes of it
    "negative KL": ("objective/kl", lambda i, x: -1.5),
    "no KL": ("objective/kl", lambda i, x: 0.0),
    "two KLs": ("objective/kl_k3", lambda i, x: 0.0),
    "no score": ("objective/scores", lambda i, x: 0.1),
    "KL climbs": ("objective/kl", lambda i, x: 2.0 * i),
    "entropy": ("objective/entropy", lambda i, x: x if i < N - WINDOW else 0.02 * x),
    "alike": ("rollout/distinct_2", lambda i, x: 0.9 if i < N - WINDOW else 0.2),
    "short": ("rollout/length", lambda i, x: 2.0 if i > N - WINDOW else x),
    "value model": ("value/explained_variance", lambda i, x: -0.1),
    "equal scores": ("rollout/score_std", lambda i, x: 0.0),
    "EOS falls": ("rollout/eos_rate", lambda i, x: 1 - 0.02 * i),
    "over-optimisation": ("objective/gold", lambda i, x: 0.9 - 0.01 * i),
    "value loss": ("loss/value", lambda i, x: 0.1 if i < N - WINDOW else 2.0),
    "clipping": ("policy/clipfrac", lambda i, x: 0.5),
}


@pytest.mark.parametrize("sign", SICK)
def test_each_complaint_fires_when_it_should_and_alone(healthy, sign):
    if sign == "over-optimisation":
        healthy = changed(healthy, "objective/scores", lambda i, x: 0.1 * i)
    history = changed(healthy, *SICK[sign])
    assert signs(history) == [sign]


@pytest.mark.parametrize("name, function", [
    ("objective/kl", lambda i, x: -0.8),                        # k1 is noisy: a little below 0 is no news
    ("rollout/eos_rate", lambda i, x: 0.9 + 0.05 * (-1) ** i),      # goes up and down
    ("objective/kl", lambda i, x: 0.0 if i < 3 else x),
    ("objective/kl", lambda i, x: 2.0 * i if i < 12 else 24.0),             # far away, but it no longer climbs
    ("objective/entropy", lambda i, x: 0.3 * x),
    ("value/explained_variance", lambda i, x: 0.2 if i == N - 8 else -0.01),
    ("loss/value", lambda i, x: 0.1 if i < N - WINDOW else 0.5),
    ("policy/clipfrac", lambda i, x: 0.3),
    ("value/explained_variance", lambda i, x: -1.5 + 0.06 * i),             # nothing yet, but it learns
    ("value/explained_variance", lambda i, x: -3.0 if i < N - WINDOW else 0.2),
    ("rollout/eos_rate", lambda i, x: 0.3 + 0.4 * (N - 2 * WINDOW <= i < N - WINDOW) + 0.2 * (i >= N - WINDOW)),
])
def test_what_is_still_normal_is_not_complained_about(healthy, name, function):
    assert signs(changed(healthy, name, function)) == []


def noisy(seed, size, fall):
    """A metric of 0.6 that falls by so much at each iteration, in batches whose mean has this standard deviation."""
    draws = np.random.default_rng(seed).normal(0, size, N)
    return lambda i, x: 0.6 - fall * i + float(draws[i])


@pytest.mark.parametrize("metric, sign, size", [("objective/gold", "over-optimisation", 0.035),
                                                ("rollout/eos_rate", "EOS falls", 0.08)])
def test_a_fall_is_one_only_beyond_the_noise_of_its_batches(healthy, metric, sign, size):
    """0.2 / sqrt(32) is the noise of a mean preference in a batch of 32."""
    history = changed(healthy, "objective/scores", lambda i, x: 0.1 * i)
    fires = {fall: sum(sign in signs(changed(history, metric, noisy(seed, size, fall))) for seed in range(100))
             for fall in (0, size / 2)}
    assert fires[0] <= 3 and fires[size / 2] >= 40


@pytest.mark.parametrize("approxkl, clipped, expected", [(0.0, 0.1, ["no ratio"]), (1e-12, 0.1, []), (0.0, 0.0, [])])
def test_a_ratio_that_is_always_one_is_right_with_one_step_per_rollout_only(healthy, approxkl, clipped, expected):
    """After several steps some values have moved further than the clip."""
    history = changed(healthy, "policy/approxkl", lambda i, x: approxkl)
    history = changed(history, "value/clipfrac", lambda i, x: clipped)
    assert signs(history) == expected


def test_trends_need_two_windows_of_iterations(healthy):
    n = 2 * WINDOW
    history = changed(healthy, "rollout/eos_rate", lambda i, x: 1 - 0.04 * i)
    assert signs(history[:n - 1]) == [] and signs(history[:n]) == ["EOS falls"]


@pytest.mark.parametrize("spread, fires", [(0.2, True), (0.7, False), (1.0, False), (1.8, False), (4.0, True)])
def test_the_scale_of_the_scores_is_judged_at_the_first_rollout_only(healthy, spread, fires):
    history = changed(healthy, "rollout/score_std", lambda i, x: spread)
    assert signs(history[:1]) == ["score scale"] * fires and signs(history) == []


def test_a_diverged_metric_does_not_hide_the_others(healthy):
    history = changed(healthy, "loss/value", lambda i, x: math.nan)
    assert signs(changed(history, "objective/kl", lambda i, x: -9.0)) == ["negative KL"]


def test_shorter_responses_with_the_same_entropy_per_token_have_not_lost_it(healthy):
    history = changed(healthy, "rollout/length", lambda i, x: 4.0 if i > N - WINDOW else 40.0)
    assert signs(changed(history, "objective/entropy", lambda i, x: 8.0 if i > N - WINDOW else 80.0)) == ["short"]


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]


def test_the_script_prints_a_warning_once(world, capsys):
    run_ppo(world, "--reward", f"{world}/reward.py:same", "--missing_eos", 0, "--iterations", 4)
    said = warnings(capsys)
    assert sum("the same score" in line for line in said) == 1 and "the same score" in said[0]
    assert said[0].startswith("[0]") and len(set(said)) == len(said)


def test_a_policy_that_never_moves_is_warned_about(world, capsys):
    run_ppo(world, "--lr", 0, "--iterations", 4)
    said = [line for line in warnings(capsys) if "KL is exactly 0" in line]
    assert len(said) == 1 and said[0].startswith("[2]")


def test_a_first_rollout_with_a_kl_that_is_not_0_is_warned_about(world, capsys, monkeypatch):
    """Before the first update the policy is the reference, unless the reference is named or sees something else."""
    def first_kl(*flags):
        run_ppo(world, "--temperature", 0.7, "--iterations", 2, *flags)
        return [line for line in warnings(capsys) if "KL of the first rollout" in line]

    assert first_kl() == first_kl("--dtype", "bfloat16") == []
    save_pretrained(letters_gpt2(5), world / "other")
    (line,) = first_kl("--reference", world / "other")
    assert line.startswith("[0]")
    monkeypatch.setattr(train_ppo, "make_rollout", mutant(
        train_ppo.make_rollout, "ref_logprobs[part] = ppo.token_logprobs(logits, responses[part], cfg.temperature)",
        "ref_logprobs[part] = ppo.token_logprobs(logits, responses[part])"))
    (line,) = first_kl()
    assert line.startswith("[0]")


# ---- figures that only the log has -----------------------------------------------------------------------------------

def logged(rollout, name, **changes):
    return rollout_metrics(rollout._replace(**changes), 0.05, None)[name]


def test_explained_variance_is_one_for_a_perfect_critic_none_for_a_constant_and_numpys_in_between():
    rollout, name = Networks(config()).rollout, "value/explained_variance"
    mask, returns = rollout.response_mask, rollout.returns
    assert logged(rollout, name, values=returns) == 1
    assert logged(rollout, name, values=returns + 3) == pytest.approx(1)                # an offset does not matter
    assert abs(logged(rollout, name, values=torch.full_like(returns, 2))) < 1e-6
    expected = 1 - np.var((returns - rollout.values)[mask].numpy()) / np.var(returns[mask].numpy())
    assert logged(rollout, name) == pytest.approx(expected, rel=1e-4)
    for constant in (0.0, 0.1, -3.0):                           # nothing to explain, and no division by about 0
        assert logged(rollout, name, returns=torch.full_like(returns, constant)) == 0


def test_distinct_pairs_are_different_neighbours_over_all_neighbours_within_responses():
    rollout = Networks(config()).rollout
    responses = rows_of(rollout.ids[:, rollout.P:], rollout.response_mask)
    pairs = [pair for row in responses for pair in zip(row, row[1:])]
    assert logged(rollout, "rollout/distinct_2") == pytest.approx(len(set(pairs)) / len(pairs))
    first_tokens_only = torch.arange(rollout.response_mask.shape[1]).expand_as(rollout.response_mask) == 0
    assert logged(rollout, "rollout/distinct_2", response_mask=first_tokens_only) == 0      # no pair at all


# ---- the reward model's accuracy -------------------------------------------------------------------------------------

@pytest.mark.parametrize("accuracy, prompts, longer, says", [
    (0.4, 1000, 0.5, "chance"), (0.6, 20, 0.5, "chance"),                               # 20 prompts say little
    (0.7, 1000, 0.7, "length"), (0.7, 1000, 0.3, "length"), (0.7, 40, 0.6, "length"),
    (0.7, 1000, 0.6, None), (0.6, 1000, 0.5, None),
])
def test_a_reward_model_no_better_than_chance_or_than_length_is_a_no_go(accuracy, prompts, longer, says):
    right = stats.rate([i < accuracy * prompts for i in range(prompts)])
    good, said = judge_reward_model({"rm_accuracy_heldout": right.value, "longer_is_preferred": longer,
                                     "rm_accuracy_heldout_ci": [right.low, right.high]})
    assert good == (says is None) and (says or "go: ") in said
