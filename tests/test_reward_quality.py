"""The assessment of a reward model, by hand and against the counts of train_rm.py."""

import numpy as np
import pytest
import torch

import train_rm
from minirlhf import stats
from minirlhf.assess import pair_accuracy, pairs_of
from minirlhf.data import encode_rows, read_comparisons
from minirlhf.reward_functions import TINY_GOLD, load_function
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel, preferred
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.evaluate.quality import assess_reward, ceiling, claimed_accuracy, groups_of

TOKENIZER = load_tokenizer("data/tiny")
FILE = "data/tiny/comparisons_test.jsonl"


@pytest.fixture
def reward():
    torch.manual_seed(0)
    config = GPT2Config(TOKENIZER.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    model = ScalarHeadModel(GPT2(config))
    model.reward_mean, model.reward_std = 0.7, 2.5
    return model


def test_pairs_by_hand():
    prompt, margin, score, longer = pairs_of([[-2, -1, -2], [-1, -1], [5, 3]], [[0.5, 0.1, 3.0], [9, 8], [2, 2]],
                                             [[4, 6, 5], [1, 1], [7, 7]])
    assert prompt.tolist() == [0, 0, 2] and margin.tolist() == [1, 1, 2] and longer.tolist() == [2, 1, 0]
    assert score.tolist() == pytest.approx([-0.4, -2.9, 0])
    right = pair_accuracy(score, prompt)
    assert right.value == pytest.approx((0 + 0 + 0.5) / 3) and right.n == 2     # a tie is half; two prompts have pairs
    assert all(len(column) == 0 for column in pairs_of([[1, 1]], [[0.0, 1.0]], [[1, 2]]))


def test_accuracies_are_those_of_the_training_loop(reward, tmp_path):
    """train_rm.py counts the pairs that it orders correctly, on batches and with masks."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(open(FILE).readlines()[:60]))
    gold = load_function(f"{TINY_GOLD}:gold")
    report = assess_reward(reward, TOKENIZER, str(few), gold)
    examples = encode_rows(read_comparisons(few), TOKENIZER, 64)
    with torch.no_grad():
        _, right, pairs = train_rm.reward_model_loss(reward, examples, train_rm.Config(lm_coef=0), torch.device("cpu"))
    assert report["accuracy"].value == pytest.approx(float(right) / float(pairs)) and report["accuracy"].n <= 60
    assert report["pairs"] == int(preferred(train_rm.rank_tensor(examples)).sum())
    for kind in ("ranks", "better"):                            # each kind of group has every pair once
        chosen = [found for name, found in report["groups"].items() if kind in name]
        assert sum(n for _, n in chosen) == report["pairs"]
        assert sum(own.value * n for own, n in chosen) == pytest.approx(float(right))
    right = total = 0
    for e in examples:                                          # one answer at a time
        scores = [reward(torch.tensor([e.prompt + ids]))[0, -1].item() for ids in e.responses]
        truth = gold([e.row.prompt] * len(scores), list(e.row.responses))
        pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if truth[i] > truth[j]]
        right, total = right + sum(scores[i] > scores[j] for i, j in pairs), total + len(pairs)
    assert report["accuracy_gold"].value == pytest.approx(right / total)


def test_a_judge_of_length_is_found_out():
    """It always prefers the longer answer, which people prefer in two of three pairs."""
    good, lengths = [[2, 1]] * 20 + [[1, 2]] * 10, [[9, 3]] * 30
    pairs = pairs_of(good, [[float(n) for n in row] for row in lengths], lengths)
    found = groups_of(*pairs)
    assert found["the better answer shorter"][0].value == 0 and found["the better answer longer"][0].value == 1
    assert pair_accuracy(pairs[2], pairs[0]).value == pair_accuracy(pairs[3], pairs[0]).value == pytest.approx(2 / 3)


def test_the_margin_shows_that_clear_cases_are_easier():
    rng = np.random.default_rng(0)
    ranks = np.array([rng.permutation(4) for _ in range(400)])
    pairs = pairs_of(ranks, ranks + rng.normal(0, 0.8, size=ranks.shape), np.ones_like(ranks))
    values = [found.value for name, (found, _) in groups_of(*pairs).items() if "ranks" in name]
    assert values == sorted(values) and len(values) == 3 and values[0] < 0.85 and values[-1] > 0.98


def test_scores_that_are_log_odds_are_calibrated_and_tripled_ones_are_not():
    """Bradley-Terry: answers of strength s are preferred with sigmoid(s_i - s_j), and the model knows s."""
    rng = np.random.default_rng(0)
    strength = rng.normal(size=(1500, 2))
    first = rng.random(1500) < 1 / (1 + np.exp(strength[:, 1] - strength[:, 0]))
    good = np.stack([first, ~first], axis=1).astype(int)
    excess = []
    for scale in (1, 3):
        prompt, _, score, _ = pairs_of(good, scale * strength, np.ones_like(strength))
        claimed = claimed_accuracy(prompt, score)
        assert claimed.low <= claimed.value <= claimed.high
        excess.append(claimed.value - pair_accuracy(score, prompt).value)
    assert abs(excess[0]) < 0.03 and excess[1] > 0.1


def test_the_ceiling_by_hand():
    votes = [{"prompt": "p", "responses": ("a", "b", "c"), "ranks": ranks}
             for ranks in ((1, 2, 3), (1, 3, 2), (2, 1, 2))]
    # pairs (a,b), (a,c), (b,c): the three say  + + +,  + + -,  - 0 +
    agree, model = ceiling(votes, {("p", ("a", "b", "c")): [3.0, 2.0, 1.0]})
    assert agree.value == pytest.approx((2 + 1 + 0) / (3 + 2 + 2))
    assert model.value == pytest.approx((3 + 2 + 1) / (3 + 3 + 2))                  # the scores say + + +
    assert ceiling(votes[:1], {}) == (None, None)


@pytest.mark.parametrize("one_prompt", [False, True])
def test_the_interval_counts_prompts_however_the_answers_are_written(one_prompt):
    """As rankings, as a row per pair, or with each row four times: the same verdicts on the same prompts.

    Where every row has the same prompt, as "Movie review:", what counts are the sets of answers.
    """
    rng = np.random.default_rng(0)
    good, scores = rng.normal(size=(2, 40, 4))
    pairs = [(n, [i, j]) for n in range(40) for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    written = [(n, list(range(4))) for n in range(40)], pairs, pairs * 4
    found = []
    for rows in written:
        columns = [[list(values[n][chosen]) for n, chosen in rows] for values in (good, scores, scores)]
        prompts = ["Movie review:" if one_prompt else f"prompt {n}" for n, _ in rows]
        own = stats.units(prompts, [[f"answer {n} {i}" for i in chosen] for n, chosen in rows])
        prompt, _, score, _ = pairs_of(*columns, own)
        found.append((*pair_accuracy(score, prompt), *claimed_accuracy(prompt, score)))
    assert found[0][3] == found[0][7] == 40
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


def test_the_ceiling_counts_prompts_and_not_copies():
    """Ten prompts with two items each, and the same votes given twice more."""
    votes = [{"prompt": f"p{n}", "responses": (f"a{k}", "b"), "ranks": ranks}
             for n in range(10) for k in range(2) for ranks in ((1, 2), (1, 2) if n % 3 else (2, 1))]
    scores = {(vote["prompt"], vote["responses"]): [1.0, 0.0] for vote in votes}
    agree, single = ceiling(votes, scores)
    assert agree.n == single.n == 10 and agree.value == 0.6
    copies = [dict(vote) for vote in votes for _ in range(3)]
    assert ceiling(copies, scores)[1] == pytest.approx(single)
