"""The warnings in words: each fires on a history that deserves it, and none on a healthy run."""

import math

import pytest

from minirlhf.running.health import complaints
from small_world import run_ppo, small_world

N = 25                                                          # iterations of the healthy run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = small_world(tmp_path_factory.mktemp("world"))
    (folder / "reward.py").write_text('def share_of_a(prompts, responses):\n'
                                      '    return [text.count("a") / (len(text) + 1) for text in responses]\n'
                                      'def same(prompts, responses):\n'
                                      '    return [1.0] * len(responses)\n')
    return folder


@pytest.fixture(scope="module")
def healthy(world):
    """The metrics of a real run, in which the true preference is what is rewarded."""
    spec = f"{world}/reward.py:share_of_a"
    return run_ppo(world, "--reward", spec, "--gold", spec, "--iterations", N, "--batch_size", 32, "--lr", 2e-3)


def signs(history):
    return [sign for sign, _ in complaints(history)]


def changed(history, name, function):
    """The history with function(iteration, value) in place of one metric."""
    return [row | {name: function(i, row[name])} for i, row in enumerate(history)]


def test_a_healthy_run_is_not_complained_about_at_any_iteration(healthy):
    assert healthy[-1]["objective/gold"] > healthy[0]["objective/gold"] + 0.2           # it did learn
    assert healthy[-1]["objective/kl"] > 1
    for n in range(1, N + 1):
        assert signs(healthy[:n]) == []


def test_a_run_without_gold_is_judged_by_the_rest(healthy):
    history = [{name: x for name, x in row.items() if name != "objective/gold"} for row in healthy]
    assert signs(history) == []
    assert signs(changed(history, "val/eos_rate", lambda i, x: 1 - i / N)) == ["EOS falls"]


SICK = {    # sign: the metric, and what becomes of it
    "negative KL": ("objective/kl", lambda i, x: -1.5),
    "equal scores": ("val/score_std", lambda i, x: 0.0),
    "EOS falls": ("val/eos_rate", lambda i, x: 1 - 0.02 * i),
    "over-optimisation": ("objective/gold", lambda i, x: 0.9 - 0.01 * i),
    "value loss": ("loss/value_avg", lambda i, x: 0.1 if i < N - 10 else 2.0),
    "clipping": ("policy/clipfrac_avg", lambda i, x: 0.5),
}


@pytest.mark.parametrize("sign", SICK)
def test_each_complaint_fires_when_it_should_and_alone(healthy, sign):
    if sign == "over-optimisation":
        healthy = changed(healthy, "objective/scores", lambda i, x: 0.1 * i)
    history = changed(healthy, *SICK[sign])
    assert signs(history) == [sign]
    (_, sentence), = complaints(history)
    assert len(sentence) > 60 and sentence == sentence.strip()


@pytest.mark.parametrize("name, function", [
    ("objective/kl", lambda i, x: -0.8),                        # k1 is noisy: a little below 0 is no news
    ("val/score_std", lambda i, x: 1e-3),
    ("val/eos_rate", lambda i, x: 0.9 + 0.05 * (-1) ** i),      # goes up and down
    ("objective/gold", lambda i, x: 0.9),
    ("loss/value_avg", lambda i, x: 0.1 if i < N - 10 else 0.5),
    ("policy/clipfrac_avg", lambda i, x: 0.3),
])
def test_what_is_still_normal_is_not_complained_about(healthy, name, function):
    assert signs(changed(healthy, name, function)) == []


def test_trends_need_twenty_iterations(healthy):
    history = changed(healthy, "val/eos_rate", lambda i, x: 1 - 0.04 * i)
    assert signs(history[:19]) == [] and signs(history[:20]) == ["EOS falls"]


def test_a_diverged_metric_does_not_hide_the_others(healthy):
    history = changed(healthy, "loss/value_avg", lambda i, x: math.nan)
    assert signs(changed(history, "objective/kl", lambda i, x: -9.0)) == ["negative KL"]


def test_the_script_prints_a_warning_once(world, capsys):
    run_ppo(world, "--reward", f"{world}/reward.py:same", "--missing_eos", 0, "--iterations", 4)
    assert capsys.readouterr().out.count("warning: every response of the rollout got the same score") == 1
