"""The assessment of a reward model, by hand and against the counts of train_rm.py."""

import math

import numpy as np
import pytest
import torch

import train_rm
from minirlhf.data import encode_rows, read_comparisons
from minirlhf.reward_functions import TINY_GOLD, load_function
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel, preferred
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.evaluate.quality import (accuracy, assess_reward, by_length, by_margin, ceiling, length_baseline,
                                             pairs_of, reliability)

TOKENIZER = load_tokenizer("data/tiny")
FILE = "data/tiny/comparisons_test.jsonl"


@pytest.fixture(scope="module")
def reward():
    torch.manual_seed(0)
    config = GPT2Config(TOKENIZER.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    model = ScalarHeadModel(GPT2(config))
    model.reward_mean, model.reward_std = 0.7, 2.5
    return model


@pytest.fixture
def few(tmp_path):
    """A file of the first 60 held-out comparisons."""
    file = tmp_path / "few.jsonl"
    file.write_text("".join(open(FILE).readlines()[:60]))
    return str(file)


def test_pairs_by_hand():
    pairs = pairs_of([[-2, -1, -2], [-1, -1]], [[0.5, 0.1, 3.0], [9.0, 8.0]], [[4, 6, 5], [1, 1]])
    assert pairs.tolist() == [(0, 1, pytest.approx(-0.4), 2), (0, 1, pytest.approx(-2.9), 1)]
    assert accuracy(pairs).value == 0
    empty = pairs_of([[1, 1]], [[0.0, 1.0]], [[1, 2]])
    assert len(empty) == 0


def test_accuracies_are_those_of_the_training_script(reward, few):
    gold = load_function(f"{TINY_GOLD}:gold")
    report = assess_reward(reward, TOKENIZER, few, gold)
    examples = encode_rows(read_comparisons(few), TOKENIZER, 64)
    device = torch.device("cpu")
    ranks = train_rm.rank_tensor(examples)
    found = train_rm.accuracy(reward, examples, ranks, device)
    assert report["accuracy"].value == pytest.approx(found) and report["accuracy"].n <= 60
    assert report["pairs"] == int(preferred(ranks).sum())
    found = train_rm.accuracy(reward, examples, train_rm.gold_ranks(gold, examples), device)
    assert report["accuracy_gold"].value == pytest.approx(found)
    longer = train_rm.length_accuracy(examples)
    assert report["length_only"]["accuracy"].value == pytest.approx(max(longer, 1 - longer))


@pytest.mark.parametrize("groups", ["by_margin_in_ranks", "by_margin_in_gold", "by_length"])
def test_groups_of_pairs_add_up_to_all_of_them(reward, few, groups):
    report = assess_reward(reward, TOKENIZER, few, load_function(f"{TINY_GOLD}:gold"))
    whole = report["accuracy_gold" if "gold" in groups else "accuracy"].value
    right = sum(row[-2].value * row[-1] for row in report[groups])
    assert right / sum(row[-1] for row in report[groups]) == pytest.approx(whole)


def test_a_judge_of_length_is_found_out():
    """It always prefers the longer answer, which people prefer in two of three pairs."""
    good = [[2, 1]] * 20 + [[1, 2]] * 10
    lengths = [[9, 3]] * 30
    pairs = pairs_of(good, [[float(n) for n in row] for row in lengths], lengths)
    direction, alone, p = length_baseline(pairs)
    assert direction == "longer is better" and alone.value == accuracy(pairs).value == pytest.approx(2 / 3) and p == 1
    assert [(name, found.value, n) for name, found, n in by_length(pairs)] == [("shorter by up to 6", 0, 10),
                                                                               ("longer by up to 6", 1, 20)]


def test_the_margin_shows_that_clear_cases_are_easier():
    rng = np.random.default_rng(0)
    good = rng.random((400, 4))
    pairs = pairs_of(good, good + rng.normal(0, 0.2, size=good.shape), np.ones_like(good))
    rows = by_margin(pairs, ((0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 1.01)))
    values = [found.value for _, _, found, _ in rows]
    assert values == sorted(values) and values[0] < 0.65 and values[-1] > 0.95


def test_scores_that_are_log_odds_are_calibrated_and_doubled_ones_are_not():
    """Bradley-Terry: answers of strength s are preferred with sigmoid(s_i - s_j), and the model knows s."""
    rng = np.random.default_rng(0)
    strength = rng.normal(size=(1500, 2))
    first = rng.random(1500) < 1 / (1 + np.exp(strength[:, 1] - strength[:, 0]))
    good = np.stack([first, ~first], axis=1).astype(int)
    assert reliability(pairs_of(good, strength, np.ones_like(strength)))[1].value < 0.04
    assert reliability(pairs_of(good, 3 * strength, np.ones_like(strength)))[1].value > 0.1


def test_the_ceiling_by_hand():
    votes = [{"prompt": "p", "responses": ("a", "b", "c"), "ranks": ranks} for ranks in ((1, 2, 3), (1, 3, 2), (2, 1, 2))]
    # pairs (a,b), (a,c), (b,c): the three say  + + +,  + + -,  - 0 +
    agree, model = ceiling(votes, {("p", ("a", "b", "c")): [3.0, 2.0, 1.0]})
    assert agree.value == pytest.approx((2 + 1 + 0) / (3 + 2 + 2))
    assert model.value == pytest.approx((3 + 2 + 1) / (3 + 3 + 2))                  # the scores say + + +
    assert ceiling(votes[:1], {}) == (None, None)


def test_a_coin_is_right_on_half(reward, few):
    report = assess_reward(reward, TOKENIZER, few)
    assert report["accuracy"].low < 0.6 and report["ece"].value > 0 and "accuracy_gold" not in report
    assert report["annotators_agree"].value == pytest.approx(0.78, abs=0.06)
    assert math.isfinite(report["accuracy_against_one_annotator"].value)
