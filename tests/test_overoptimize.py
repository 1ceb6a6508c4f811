"""The laws of over-optimisation on synthetic curves, best-of-n by enumeration, the experiment in the world of letters."""

import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from minirlhf.files.errors import UserError
from minirlhf.tools import overoptimize
from minirlhf.tools.overoptimize import best_of_n, best_of_n_kl, fit, fitted, highest, ppo_curve, turnover
from small_world import small_world, write_jsonl


def curve(a, b, law, d):
    return d * (a - b * d) if law == "bon" else d * (a - b * np.log(d))


@pytest.mark.parametrize("law, a, b", [("bon", 1.3, 0.28), ("rl", 0.5, -0.1)])
def test_a_law_is_recovered_from_its_own_curve(law, a, b):
    d = np.linspace(0.3, 9, 60)
    assert fit(d, curve(a, b, law, d), law) == pytest.approx((a, b, 1))
    noisy = curve(a, b, law, d) + np.random.default_rng(0).normal(0, 0.1, size=60)
    found = fit(d, noisy, law)
    assert found[:2] == pytest.approx((a, b), abs=0.03) and 0.9 < found[2] < 1


def test_the_other_law_does_not_fit():
    d = np.linspace(0.3, 9, 60)
    assert fit(d, curve(1.3, 0.28, "bon", d), "rl")[2] < 0.98 and fit(d, curve(0.9, 0.35, "rl", d), "bon")[2] < 0.98


@pytest.mark.parametrize("law, a, b", [("bon", 1.3, 0.28), ("rl", 0.9, 0.5)])
def test_the_turnover_is_the_highest_point_of_the_curve(law, a, b):
    d = np.linspace(0.01, 9, 90_000)
    top = d[curve(a, b, law, d).argmax()]
    assert turnover(a, b, law, farthest=9) == pytest.approx(top, abs=1e-3)
    assert turnover(a, b, law, farthest=top - 0.1) is None                          # not reached: none seen
    assert turnover(a, -b, law, farthest=9) is None                                 # a curve that only bends upwards


def test_intervals_of_the_parameters_cover_the_truth():
    d, covered = np.linspace(0.5, 8, 40), []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        R = curve(0.9, 0.35, "rl", d) + rng.normal(0, 0.2, size=40)
        rows = [rng.integers(40, size=40) for _ in range(100)]
        found = fitted(d, R, "rl", [(d[chosen], R[chosen]) for chosen in rows])
        covered.append(found["a_ci"][0] <= 0.9 <= found["a_ci"][1])
    assert 0.87 <= np.mean(covered) <= 0.99                                         # 40 points and 100 resamples: roughly


def test_best_of_n_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in (1, 2, 4, 6):
        draws = list(itertools.combinations(range(6), n))
        by_hand = [np.mean([gold[row][max(draw, key=lambda k: proxy[row][k])] for draw in draws]) for row in range(3)]
        assert best_of_n(proxy, gold, n).tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("n", [1, 8])
def test_the_kl_of_best_of_n_is_that_of_the_greatest_of_n_uniform_numbers(n):
    u = (np.arange(400_000) + 0.5) / 400_000
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(np.maximum(density, 1e-300))), abs=1e-4)


def test_the_highest_point_is_that_of_a_window_and_not_of_one_lucky_iteration():
    d, R = [3.0, 1.0, 2.0, 4.0, 5.0], [1.0, 0.0, 0.8, 0.9, 2.0]
    assert highest(d, R) == (5, 2)
    assert highest(d, R[:4] + [-1.0], window=3) == pytest.approx((3, 0.9))


def test_ppo_points_are_measured_from_where_the_sft_model_stands(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": i, "objective/kl": kl, "objective/scores": i,
                                              "objective/gold": 0.5 + i / 10} for i, kl in enumerate((-0.01, 4.0, 9.0))])
    found = ppo_curve(tmp_path, start=0.5, deviation=0.2)
    assert found == {"d": [2, 3], "proxy": [1, 2], "gold": pytest.approx([0.5, 1])}


def run_here(script, **flags):
    """run_script in this process: starting one takes seconds."""
    importlib.import_module(Path(script).stem).main([
        f"--{name}={value}" for name, value in flags.items()] + ["--insist"] * (script == "train_ppo.py"))


def test_the_experiment_runs_in_another_world(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(overoptimize, "run_script", run_here)
    world = small_world(tmp_path)
    (world / "taste.py").write_text("def letters(prompts, responses):\n    return [len(set(r)) / 10 for r in responses]\n")
    argv = dict(model=world / "sft", comparisons=world / "comparisons.jsonl",
                heldout_comparisons=world / "comparisons.jsonl", data=world / "prompts.jsonl",
                heldout=world / "prompts.jsonl", prompts=5, samples=8, iterations=3, max_response=12,
                out=world / "over", device="cpu", gold=f"{world}/taste.py:letters")
    overoptimize.main(["--labels", "8", "20", *(f"--{name}={value}" for name, value in argv.items())])
    report = json.loads((world / "over/report.json").read_text())
    assert set(report["labels"]) == {"8", "20"} and (world / "over/overoptimization.png").exists()
    for row in report["labels"].values():
        assert row["bon"]["n"] == [1, 2, 4, 8] and row["bon"]["gold"][0][0] == pytest.approx(0, abs=1e-9)
        assert row["bon"]["proxy"][-1][0] > row["bon"]["proxy"][0][0] and len(row["rl"]["d"]) <= 3
        assert math.isfinite(row["laws"]["bon"]["a"])
    assert "PPO: d(a - b log d)" in capsys.readouterr().out
    with pytest.raises(UserError, match="has 40 comparisons"):
        overoptimize.main(["--labels", "41", *(f"--{name}={value}" for name, value in argv.items())])
    with pytest.raises(UserError, match="give --gold"):
        overoptimize.main([*(f"--{name}={value}" for name, value in argv.items()), "--gold", "none"])
