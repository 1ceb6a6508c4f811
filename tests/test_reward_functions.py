"""Functions of users: what a reward function may return, and one clear line for everything else."""

import json
import types

import numpy as np
import pytest
import torch

from minirlhf.files.errors import UserError
from minirlhf.reward_functions import call_reward, check_fits, load_function

PROMPTS, RESPONSES = ["p", "q", "r"], [" a", " b", " c"]


def returns(value):
    return call_reward(lambda prompts, responses: value, PROMPTS, RESPONSES)


@pytest.mark.parametrize("value", [
    [1.0, 2.0, 3.0], (1, 2, 3), np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]),
    torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor([1, 2, 3]),
    [np.float32(1), np.float64(2), np.int64(3)], [torch.tensor(1.0), torch.tensor(2), 3],
], ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}")
def test_lists_arrays_and_tensors_of_numbers_are_scores(value):
    scores = returns(value)
    assert scores.dtype == torch.float32 and not scores.requires_grad and scores.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [
    None, 1.0, "abc", [1.0, 2.0], [1.0] * 4, [], {"a": 1, "b": 2, "c": 3}, np.float32(1), torch.tensor(1.0), torch.zeros(4),
    (score for score in [1.0, 2.0, 3.0]),
], ids=str)
def test_what_is_no_list_of_the_right_length_is_refused(value):
    with pytest.raises(UserError, match="must return a list of 3 numbers, not "):
        returns(value)


@pytest.mark.parametrize("score", [
    "1", None, True, float("nan"), float("-inf"), 1e39, 10**400, [1.0], 1j, np.float32("nan"), np.float64(1e39), np.bool_(True),
    torch.tensor(float("inf")), torch.tensor(True), torch.zeros(1), np.datetime64("2026-01-01"),
], ids=repr)
def test_a_score_that_is_no_finite_number_is_refused_with_its_response(score):
    """1e39 is finite in Python and infinite in the float32 that a score becomes."""
    with pytest.raises(UserError, match="the reward function gave .* for the response ' b' to 'q'"):
        returns([0.0, score, 0.0])


@pytest.mark.parametrize("value", [np.zeros((3, 1)), torch.zeros(3, 1), torch.tensor([True] * 3), np.array(["a"] * 3)], ids=str)
def test_an_array_of_something_else_is_refused_with_the_first_response(value):
    with pytest.raises(UserError, match="the reward function gave .* for the response ' a' to 'p'"):
        returns(value)


def test_a_function_that_fails_is_named_with_its_line_and_the_first_response(tmp_path):
    (tmp_path / "bad.py").write_text("def f(prompts, responses):\n    return [g(r) for r in responses]\n\n"
                                     "def g(r):\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"raised ZeroDivisionError: division by zero \(.*bad.py:5\) on 3 responses, the first "
                                        "of them ' a' to 'p'"):
        call_reward(load_function(f"{tmp_path}/bad.py:f"), PROMPTS, RESPONSES)


def test_a_function_that_sorts_its_lists_moves_no_score_to_another_response():
    def f(prompts, responses):
        prompts.clear()
        responses.reverse()
        return [0.0, 1.0, float("nan")]
    with pytest.raises(UserError, match="for the response ' c' to 'r'"):
        call_reward(f, PROMPTS, RESPONSES)


@pytest.mark.parametrize("text, says", [
    ("def f(:\n", "cannot be run: SyntaxError"), ("import nowhere_at_all\n", "cannot be run: ModuleNotFoundError"),
    ("g = 3\n", "has no function 'f'"), ("f = 3\n", "has no function 'f'"),
])
def test_a_file_without_the_function_or_that_cannot_be_run_is_one_clear_error(tmp_path, text, says):
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(UserError, match=says):
        load_function(f"{tmp_path}/reward.py:f")


@pytest.mark.parametrize("spec", ["reward.py", "nowhere.py:f", ".py:f", "x" * 5000 + ".py:f", "a\0.py:f", "tests:f", ""])
def test_a_spec_that_names_no_file_is_one_clear_error(spec):
    with pytest.raises(UserError, match="not FILE.py:function with a file that exists"):
        load_function(spec)


@pytest.mark.parametrize("report, warns", [
    ({"rm_accuracy_heldout_ci": [0.48, 0.6]}, True), ({"rm_accuracy_heldout_ci": [0.55, 0.7], "longer_is_preferred": 0.4}, True),
    ({"rm_accuracy_heldout_ci": [0.75, 0.9], "longer_is_preferred": 0.4}, False), ({}, False), (None, False),
])
def test_a_reward_model_that_its_own_run_found_no_better_than_chance_is_named(tmp_path, capsys, report, warns):
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=7, n_positions=20))
    cfg = types.SimpleNamespace(reward=str(tmp_path), model="m", max_response=5)
    check_fits(model, model, [types.SimpleNamespace(prompt=[1, 2])], cfg)
    assert ("not clearly better than chance" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("tokens, positions, says", [(8, 20, "they must share one vocabulary"), (7, 6, "6 positions, .* 7")])
def test_a_reward_model_that_does_not_fit_the_policy_is_named(tmp_path, tokens, positions, says):
    policy, reward = (types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=v, n_positions=n))
                      for v, n in ((7, 20), (tokens, positions)))
    cfg = types.SimpleNamespace(reward=str(tmp_path), model="m", max_response=5)
    with pytest.raises(UserError, match=says):
        check_fits(reward, policy, [types.SimpleNamespace(prompt=[1, 2])], cfg)
