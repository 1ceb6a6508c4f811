"""PPO token by token: the table adds up, and says what the run itself would have said."""

import io
import re
import sys

import numpy as np
import pytest
import torch

from minirlhf.files.errors import UserError
from minirlhf.tools import chat
from minirlhf.tools.explain import COLUMNS, Explainer
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained
from small_world import CPU, EOS, run_ppo, small_world, write_jsonl
from test_ppo import gae_by_definition


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run whose beta has moved from where it began."""
    folder = small_world(tmp_path_factory.mktemp("world"))
    metrics = run_ppo(folder, "--iterations", 4, "--temperature", 0.8, "--beta", 0.2, "--target_kl", 6)
    assert metrics[-1]["objective/kl_k3"] > 0.01
    return folder


@pytest.fixture(scope="module")
def explainer(world):
    return Explainer(world / "ppo", CPU)


CASES = [("abc", None, 1), ("d", None, 2), ("abcdef", None, 3), ("ab", "cdefg", 1), ("j", "a", 1), ("ab", "", 1)]


@pytest.mark.parametrize("prompt, response, seed", CASES)
def test_the_rewards_add_up_to_the_score_minus_beta_times_the_kl(explainer, prompt, response, seed):
    ids, columns, score = explainer.explain(prompt, response, seed)
    kl, reward = columns["logp"] - columns["ref_logp"], columns["reward"]
    torch.testing.assert_close(columns["KL"], kl)
    torch.testing.assert_close(float(reward.sum()), score - explainer.beta * float(kl.sum()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reward[:-1], -explainer.beta * kl[:-1])
    assert all(len(column) == len(ids) for column in columns.values())


@pytest.mark.parametrize("prompt, response, seed", CASES)
def test_advantages_and_returns_are_those_of_the_quadratic_definition(explainer, prompt, response, seed):
    _, columns, _ = explainer.explain(prompt, response, seed)
    rewards, values = columns["reward"][None], columns["value"][None]
    advantages = gae_by_definition(rewards, values, [rewards.shape[1]], 1.0, 0.95)
    np.testing.assert_allclose(columns["advantage"][None], advantages, atol=1e-5)
    np.testing.assert_allclose(columns["return"][None], advantages + values.numpy(), atol=1e-5)


def test_the_networks_are_those_of_the_run(world, explainer):
    """Log-probabilities of the trained policy and of the SFT model at the sampling temperature, the score of the reward
    model, the values of the trained value model: each by hand."""
    response, columns, score = explainer.explain("ab", "cd")
    ids = torch.tensor([[97, 98, 99, 100, EOS]])
    assert response == [99, 100, EOS]
    for logprobs, folder in ((columns["logp"], "ppo"), (columns["ref_logp"], "sft")):
        model = from_pretrained(world / folder).double()
        expected = (model.logits(model(ids))[0] / 0.8).log_softmax(-1)[[1, 2, 3], [99, 100, EOS]]
        torch.testing.assert_close(logprobs.double(), expected, rtol=1e-4, atol=1e-4)
    reward = scalar_from_pretrained(world / "rm")
    assert score == pytest.approx((float(reward(ids)[0, -1]) - 0.3) / 2, rel=1e-4)
    state = torch.load(world / "ppo/state.pt", weights_only=True)
    reward.load_state_dict(state["value"])
    torch.testing.assert_close(columns["value"], reward(ids)[0, 1:4])
    assert (columns["value"] != 0).all() and explainer.beta == state["beta"] != 0.2


def test_the_reference_is_the_one_that_the_run_was_given(world):
    """With --reference the KL is measured to that folder, here as in training."""
    save_pretrained(scalar_from_pretrained(world / "rm").transformer, world / "other")
    run_ppo(world, "--reference", world / "other", out="far")
    (_, far, _), (_, near, _) = (explainer.explain("ab", "cd") for explainer in (
        Explainer(world / "far", CPU), Explainer(world / "ppo", CPU)))
    model, ids = from_pretrained(world / "other"), torch.tensor([[97, 98, 99, 100, EOS]])
    expected = model.logits(model(ids))[0].log_softmax(-1)[[1, 2, 3], [99, 100, EOS]]
    torch.testing.assert_close(far["ref_logp"], expected, rtol=1e-4, atol=1e-4)
    assert (far["ref_logp"] - near["ref_logp"]).abs().max() > 0.1


def test_a_function_as_the_reward_is_normalised_as_in_training(world):
    (world / "length.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    run_ppo(world, "--reward", f"{world}/length.py:length", out="by_function")
    explainer = Explainer(world / "by_function", CPU)
    scores = [explainer.explain("ab", response)[2] for response in ("", "a" * 4, "a" * 8)]
    assert scores[1] - scores[0] == pytest.approx(scores[2] - scores[1]) and scores[0] < 0 < scores[2]


def test_an_unfinished_response_gets_the_missing_eos_score(explainer):
    explained = [explainer.explain("abc", seed=seed) for seed in range(30)]
    cut = [(ids, score) for ids, _, score in explained if ids[-1] != EOS]
    assert 0 < len(cut) < 30 and all(score == -3 and len(ids) == 12 for ids, score in cut)
    assert all(score != -3 for ids, _, score in explained if ids[-1] == EOS)


def numbers(line):
    return [float(number) for number in re.findall(r"[+-]\d+\.\d{3}", line)]


def talk(monkeypatch, capsys, text, *args):
    """chat with these lines on its standard input -> what it prints."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.main([*args, "--device", "cpu"])
    return capsys.readouterr()


def test_chat_prints_the_table_and_its_columns_add_up(world, explainer, monkeypatch, capsys):
    write_jsonl(world / "test.jsonl", [{"prompt": "hij"}])
    out = talk(monkeypatch, capsys, "abc\n\n", f"{world}/ppo", "--explain", "--prompts", f"{world}/test.jsonl").out
    tables = re.split("^token ", out, flags=re.MULTILINE)[1:]
    assert len(tables) == 2 and "hij" in tables[0]              # the empty line asked one of the prompts
    for table, prompt, seed in zip(tables, ("abc", "hij"), (1, 2)):
        header, *lines = table.splitlines()
        assert header.split() == list(COLUMNS)
        rows = np.array([numbers(line) for line in lines if len(numbers(line)) == 7])
        logp, ref_logp, kl, reward, value, advantage, returns = rows.T
        assert len(rows) == len(explainer.explain(prompt, seed=seed)[0])
        np.testing.assert_allclose(kl, logp - ref_logp, atol=2e-3)
        np.testing.assert_allclose(returns, value + advantage, atol=2e-3)
        score = numbers(next(line for line in lines if line.startswith("score")))[0]
        assert abs(reward.sum() - (score - explainer.beta * kl.sum())) < 1e-3 * (len(rows) + 1)
        assert logp.max() < 0


@pytest.mark.parametrize("response", ["cdefghij", "cdef", "c", ""])
def test_the_first_block_shows_five_tokens_as_actions_in_states(explainer, response):
    """The first four and the last, or all if there are no more. What stands in a row is of one and the same token."""
    ids, columns, _ = explainer.explain("ab", response)
    lines = explainer.table("ab", response)
    end, table = lines.index(""), next(i for i, line in enumerate(lines) if line.startswith("token "))
    header, *rows = lines[:end]
    shown = [t for t in range(len(ids)) if t < 4 or t == len(ids) - 1]
    assert header.split() == ["state", "action", "V(state)", "reward", "return", "advantage"]
    assert rows.count("...") == (len(ids) > 5)
    text = [*response, "<|endoftext|>"]
    for t, row in zip(shown, [row for row in rows if row != "..."], strict=True):
        state, action = re.findall(r"'([^']*)'", row)
        assert state == "..." + "ab" + response[:t] and action == text[t]
        expected = [float(columns[name][t]) for name in ("value", "reward", "return", "advantage")]
        np.testing.assert_allclose(numbers(row), expected, atol=6e-4)
    assert [line.split()[0] for line in lines[end + 1:table - 1]] == header.split()        # a sentence for each
    assert all(len(line) <= 120 for line in lines)


def test_a_prompt_that_does_not_fit_ends_no_conversation(world, monkeypatch, capsys):
    lines = "a" * 60 + "\nabc\n"
    said = talk(monkeypatch, capsys, lines, f"{world}/ppo", "--explain", "--prompts", f"{world}/prompts.jsonl")
    assert "error: " in said.err and "60 tokens" in said.err and "48" in said.err
    assert said.out.count("ref_logp") == 1


def test_a_folder_that_is_no_ppo_run_is_refused(world):
    with pytest.raises(UserError, match="sft"):
        Explainer(world / "sft", CPU)
