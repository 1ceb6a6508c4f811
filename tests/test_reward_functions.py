"""Functions of users: what a reward function may return, and one clear line for everything else."""

import contextlib
import json
import sys
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
    (1.0, 2, 3), np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
    [np.float32(1), torch.tensor(2), 3],
], ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}")
def test_lists_arrays_and_tensors_of_numbers_are_scores(value):
    scores = returns(value)
    assert scores.dtype == torch.float32 and not scores.requires_grad and scores.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [
    None, 1.0, "abc", [1.0, 2.0], {"a": 1, "b": 2, "c": 3}, torch.zeros(4), (score for score in [1.0, 2.0, 3.0]),
], ids=str)
def test_what_is_no_list_of_the_right_length_is_refused(value):
    with pytest.raises(UserError, match="must return a list of 3 numbers, not "):
        returns(value)


@pytest.mark.parametrize("score", [
    "1", None, True, float("nan"), 1e39, 10**400, [1.0], np.float32("nan"), torch.tensor(float("inf")), torch.zeros(1),
], ids=repr)
def test_a_score_that_is_no_finite_number_is_refused_with_its_response(score):
    """1e39 is finite in Python and infinite in the float32 that a score becomes."""
    with pytest.raises(UserError, match="the reward function gave .* for the response ' b' to 'q'"):
        returns([0.0, score, 0.0])


def test_a_score_that_python_cannot_write_is_described_by_its_type():
    with pytest.raises(UserError, match="gave a int for the response ' b' to 'q'"):
        returns([0.0, 10**5000, 0.0])


def test_an_exception_that_cannot_be_written_is_named():
    def f(prompts, responses):
        raise type("Odd", (Exception,), {"__str__": None})
    with pytest.raises(UserError, match="raised .*Odd: <exception str"):
        call_reward(f, PROMPTS, RESPONSES)


@pytest.mark.parametrize("value", [np.zeros((3, 1)), torch.tensor([True] * 3)], ids=str)
def test_an_array_of_something_else_is_refused_with_the_first_response(value):
    with pytest.raises(UserError, match="the reward function gave .* for the response ' a' to 'p'"):
        returns(value)


def test_a_function_that_fails_is_named_with_its_line_and_the_first_response(tmp_path):
    (tmp_path / "bad.py").write_text("def f(prompts, responses):\n    return [g(r) for r in responses]\n\n"
                                     "def g(r):\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"raised ZeroDivisionError: division by zero \(.*bad.py:5\) on 3 responses, "
                                        "the first of them ' a' to 'p'"):
        call_reward(load_function(f"{tmp_path}/bad.py:f"), PROMPTS, RESPONSES)


def test_a_function_that_sorts_its_lists_moves_no_score_to_another_response():
    def f(prompts, responses):
        prompts.clear()
        responses.reverse()
        return [0.0, 1.0, float("nan")]
    with pytest.raises(UserError, match="for the response ' c' to 'r'"):
        call_reward(f, PROMPTS, RESPONSES)


@pytest.mark.parametrize("text, spec, says", [
    ("def f(:\n", "reward.py:f", "cannot be run: SyntaxError"), ("exit()", "reward.py:f", "cannot be run: SystemExit"),
    ("import nowhere\n", "reward.py:f", "cannot be run"),
    ("f = 3\n", "reward.py:f", "has no function 'f'"),
    ("", "reward.py", "not FILE.py:function with a file that exists"),
    ("", "nowhere.py:f", "not FILE.py:function with a file that exists"), ("", "a\0.py:f", "not FILE.py:function"),
])
def test_a_file_without_the_function_or_that_cannot_be_run_is_one_clear_error(tmp_path, text, spec, says):
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(UserError, match=says):
        load_function(f"{tmp_path}/{spec}")


def load(tmp_path, text, beside="", name="reward"):
    if beside:
        (tmp_path / "beside_it.py").write_text(beside)
    (tmp_path / f"{name}.py").write_text(text)
    return load_function(f"{tmp_path}/{name}.py:f")


@pytest.mark.parametrize("parameters", [
    "prompts, responses", "responses, prompts", "completions, prompts=None, **kwargs", "completions, **kwargs",
    "*, completion, query", "prompts, completions, answers=None", "x, responses", "prompts, y", "x, y", "*both",
    "ids=None, prompts=None, completions=None", "prompts, responses, /",
])
def test_prompts_and_responses_are_given_by_name_where_names_are_known(tmp_path, parameters):
    body = "    seen.append(dict(locals()))\n    return [1.0, 2.0, 3.0]\n"
    function = load(tmp_path, f"seen = []\ndef f({parameters}):\n{body}")
    call_reward(function, PROMPTS, RESPONSES)
    seen, = function.__globals__["seen"]
    given = {**seen, **seen.pop("kwargs", {}), **dict(zip("xy", seen.pop("both", ())))}
    first, second = [[value for name, value in given.items() if name[0] in start] for start in ("pqx", "rcy")]
    assert first == [PROMPTS] and second == [RESPONSES]


@pytest.mark.parametrize("parameters", ["completions, x", "x, prompts", "completions, *rest", "answers, prompts, /",
                                        "completion_texts, prompt_texts", "y, x_prompt", "Model_Outputs, x"])
def test_names_that_contradict_the_order_are_refused(tmp_path, parameters):
    function = load(tmp_path, f"def f({parameters}):\n    return [1.0, 2.0, 3.0]\n")
    with pytest.raises(UserError, match="--gold takes .* unclear which are the prompts"):
        call_reward(function, PROMPTS, RESPONSES, "--gold")


POOL = """import multiprocessing
def length(text):
    return float(len(text))
def f(prompts, responses):
    with multiprocessing.get_context(METHOD).Pool(1) as pool:
        return pool.map(length, responses)
"""


@pytest.mark.parametrize("name", ["reward", "queue"])
@pytest.mark.parametrize("text", [
    "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass W:\n    n: int = 2\n"
    "def f(prompts, responses):\n    return [W().n] * 3\n",
    "import beside_it\ndef f(prompts, responses):\n    return beside_it.scores\n",
    "def f(prompts, responses):\n    import beside_it\n    return beside_it.scores\n",
    POOL.replace("METHOD", "'fork'"),
], ids=["dataclass", "helper", "late helper", "pool"])
def test_files_with_dataclasses_helpers_and_pools_are_modules_like_others(tmp_path, monkeypatch, text, name):
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = sys.modules.get("queue")
    function = load(tmp_path, text, "scores = [2, 2, 2]", name)
    assert call_reward(function, PROMPTS, RESPONSES).tolist() == [2, 2, 2]
    assert sys.modules.get("queue") is before


def test_two_files_have_each_its_own_helper_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    functions = []
    for n in (1, 2):
        (tmp_path / f"{n}").mkdir()
        functions.append(load(tmp_path / f"{n}", "import beside_it\ndef f(prompts, responses):\n    return beside_it.scores\n",
                              f"scores = [{n}, {n}, {n}]"))
    assert [call_reward(f, PROMPTS, RESPONSES).tolist() for f in functions] == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize("change", ["torch.set_default_dtype(torch.bfloat16)", "torch.set_grad_enabled(False)",
                                    "torch.set_float32_matmul_precision('medium')", "os.chdir('/')",
                                    "torch.set_autocast_enabled('cpu', True)"])
@pytest.mark.parametrize("place", ["", "def f(prompts, responses):\n    "])
def test_a_file_that_changes_settings_of_the_training_is_named(tmp_path, monkeypatch, change, place):
    monkeypatch.chdir(tmp_path)                         # and back at the end
    text = f"import os, torch\n{place}{change}\n" + ("" if place else "def f(p, r):\n    ") + "    return [1.0] * 3\n"
    try:
        with pytest.raises(UserError, match="reward.py:f changes torch's default dtype"):
            call_reward(load(tmp_path, text), PROMPTS, RESPONSES, f"{tmp_path}/reward.py:f")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.set_float32_matmul_precision("highest")
        torch.set_autocast_enabled("cpu", False)


def check(folder, reward_tokens=7, reward_positions=20, insist=False):
    """check_fits with a policy of 7 tokens and 20 positions, a prompt of 2 tokens and responses of 5."""
    policy, reward = (types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=v, n_positions=n))
                      for v, n in ((7, 20), (reward_tokens, reward_positions)))
    cfg = types.SimpleNamespace(reward=str(folder), model="m", max_response=5, insist=insist)
    check_fits(reward, policy, [types.SimpleNamespace(prompt=[1, 2])], cfg)


@pytest.mark.parametrize("report, refused", [
    ({"rm_accuracy_heldout_ci": [0.48, 0.6]}, True),
    ({"rm_accuracy_heldout_ci": [0.55, 0.7], "longer_is_preferred": 0.4}, True),
    ({"rm_accuracy_heldout_ci": [0.75, 0.9], "longer_is_preferred": 0.4}, False), ({}, False), (None, False),
])
def test_a_reward_model_that_its_own_run_found_no_better_than_chance_is_refused(tmp_path, report, refused):
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="no-go.*--insist") if refused else contextlib.nullcontext():
        check(tmp_path)
    check(tmp_path, insist=True)


@pytest.mark.parametrize("tokens, positions, says", [(8, 20, "share one vocabulary"), (7, 6, "6 positions, .* 7")])
def test_a_reward_model_that_does_not_fit_the_policy_is_named(tmp_path, tokens, positions, says):
    with pytest.raises(UserError, match=says):
        check(tmp_path, tokens, positions)
