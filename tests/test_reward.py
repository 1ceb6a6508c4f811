"""The reward model's head and its losses: equal where theory says so, and right about strengths that are known."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import train_rm
from minirlhf import reward
from minirlhf.files.errors import UserError
from minirlhf.data import Example, Row, read_comparisons
from minirlhf.reward import LOSSES, ScalarHeadModel, at_last_token, pair_accuracy
from mutation import mutant
from small_world import tiny_gpt2, write_jsonl
from test_ppo import check_gradient, randn

NAMES = ("pairs", "best", "plackett_luce")      # a loss that somebody adds need not be one of rankings


def tensor(*rows):
    return torch.tensor(rows)


def pair(a, b):
    """The loss of one comparison, in its plainest form."""
    return -math.log(1 / (1 + math.exp(b - a)))


# ---- equal where theory says so --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (7, 1)])
def test_with_two_answers_all_losses_are_the_pair_loss(name, ranks):
    a, b = randn(2).tolist()
    better, worse = (a, b) if ranks[0] < ranks[1] else (b, a)
    assert math.isclose(LOSSES[name](randn(1, 2), tensor(ranks)), pair(better, worse), rel_tol=1e-9)


def check_pairs(pair_loss):
    """Against the explicit mean over the pairs of a prompt, then over the prompts: K = 3, ties, K = 2 padded to 3."""
    a, b, c = randn(3).tolist()
    cases = {(3, 1, 2): [pair(b, a), pair(b, c), pair(c, a)], (1, 2, 2): [pair(a, b), pair(a, c)],
             (1, 1, 2): [pair(a, c), pair(b, c)], (2, 1, 0): [pair(b, a)]}
    means = [sum(losses) / len(losses) for losses in cases.values()]
    for ranks, mean in zip(cases, means):
        assert math.isclose(pair_loss(randn(1, 3), tensor(ranks)), mean, rel_tol=1e-9)
    batch = pair_loss(randn(1, 3).expand(4, 3), tensor(*cases))
    assert math.isclose(batch, sum(means) / 4, rel_tol=1e-9)


def check_best(best_loss):
    """Against cross_entropy: the best of K, whatever is said of the others; and the mean over several best ones."""
    rewards, best = randn(8, 4), torch.arange(8) % 4
    expected = F.cross_entropy(rewards, best)
    only = torch.where(F.one_hot(best, 4) == 1, 1, 2)
    ranked = torch.stack([torch.tensor([1 if k == b else 2 + (k + b) % 3 for k in range(4)]) for b in best])
    for ranks in (only, ranked):
        torch.testing.assert_close(best_loss(rewards, ranks), expected)
    a, b, c = randn(3).tolist()
    assert math.isclose(best_loss(randn(1, 3), tensor((1, 1, 2))), (pair(a, c) + pair(b, c)) / 2, rel_tol=1e-9)


def check_plackett_luce(plackett_luce_loss):
    """Against choosing without replacement, step by step; the chances of all 24 rankings sum to 1."""
    rewards, total = randn(4), 0.0
    for order in itertools.permutations(range(4)):              # best first
        chance, left = 1.0, list(order)
        while left:
            weights = [math.exp(rewards[i]) for i in left]
            chance, left = chance * weights[0] / sum(weights), left[1:]
        ranks = torch.tensor([[1 + order.index(i) for i in range(4)]])
        assert math.isclose(math.exp(-plackett_luce_loss(rewards[None], ranks)), chance, rel_tol=1e-9)
        total += chance
    assert math.isclose(total, 1)


CHECKS = {"pairs": check_pairs, "best": check_best, "plackett_luce": check_plackett_luce}


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_what_its_name_says(name):
    CHECKS[name](LOSSES[name])


@pytest.mark.parametrize("name", NAMES)
def test_absolute_values_of_the_losses(name):
    """The better answer one unit ahead: -log sigmoid(1) = 0.31326. Equal rewards: log 2. One unit behind: 1.31326."""
    for rewards, loss in (([1.0, 0], 0.31326), ([3.0, 3], 0.69315), ([0.0, 1], 1.31326)):
        assert math.isclose(LOSSES[name](tensor(rewards), tensor((1, 2))), loss, abs_tol=1e-5)


@pytest.mark.parametrize("name, old, new", [
    ("pairs", "/ better.sum(dim=(1, 2))).mean()", "/ better.sum(dim=(1, 2)) ** 2).mean()"),    # trap 18: twice
    ("pairs", "/ better.sum(dim=(1, 2))).mean()", ").sum() / better.sum()"),                   # mean over all pairs
    ("pairs", "F.logsigmoid", "torch.sigmoid"),
    ("best", "best = ranks == 1", "best = ranks == ranks.max()"),
    ("best", "/ best.sum(dim=1)", "/ 2"),
    ("plackett_luce", ".sum(dim=1).mean()", ".mean()"),
])
def test_other_losses_are_noticed(name, old, new):
    changed = mutant(LOSSES[name], old, new)
    with pytest.raises(AssertionError):
        CHECKS[name](changed)


@pytest.mark.parametrize("name, old, new", [
    ("plackett_luce", "better | itself", "better.any() | itself"),                              # rivals that are better
    ("plackett_luce", "better | itself", "better"),                                             # not itself among them
    ("best", "better | itself", "better"),
])
def test_a_choice_among_too_many_or_too_few_is_noticed(name, old, new, monkeypatch):
    monkeypatch.setattr(reward, "choice_losses", mutant(reward.choice_losses, old, new))
    with pytest.raises(AssertionError):
        CHECKS[name](LOSSES[name])


# ---- ties and answers that are not there -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_a_tie_says_nothing_about_the_two_and_their_order_does_not_matter(name):
    rewards, ranks = randn(1, 4), tensor((1, 2, 2, 3))
    assert torch.isclose(LOSSES[name](rewards, ranks), LOSSES[name](rewards[:, [0, 2, 1, 3]], ranks))
    alone = tensor((1, 1, 2, 0))                                # the two best would be drawn apart if they competed
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(LOSSES[name](x, alone), x)
    assert gradient[0, 0] == gradient[0, 1] < 0 < gradient[0, 2] and gradient[0, 3] == 0


@pytest.mark.parametrize("filler", [1e6, -1e6])
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_where_there_is_no_answer_changes_no_loss_gradient_or_accuracy(name, filler):
    rewards, ranks = randn(3, 4), tensor((2, 1, 0, 0), (1, 2, 3, 3), (1, 3, 2, 0))
    results = []
    for value in (0.0, filler):
        x = rewards.masked_fill(ranks == 0, value).requires_grad_()
        loss = LOSSES[name](x, ranks)
        results.append((loss, *torch.autograd.grad(loss, x), *pair_accuracy(x.detach(), ranks)))
        assert (results[-1][1][ranks == 0] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    alone = LOSSES[name](rewards[:1, :2], ranks[:1, :2])        # and the batch is the mean of its prompts
    others = LOSSES[name](rewards[1:2], ranks[1:2]) + LOSSES[name](rewards[2:, :3], ranks[2:, :3])
    torch.testing.assert_close(results[0][0], (alone + others) / 3)


def test_a_ranking_without_a_first_place_is_refused_with_its_line(tmp_path):
    """The best of it would be nothing, and the mean over nothing NaN."""
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranks": [2, 3]}])
    with pytest.raises(UserError, match="c.jsonl:1.*ranks"):
        read_comparisons(tmp_path / "c.jsonl")


def test_accuracy_counts_strict_pairs_and_equal_rewards_half():
    rewards, ranks = torch.tensor([[3.0, 1, 1, 2], [1, 2, 9, 9]]), tensor((1, 2, 3, 3), (1, 2, 0, 0))
    right, pairs = pair_accuracy(rewards, ranks)
    assert pairs.tolist() == [5, 1]                             # 0>1 0>2 0>3 1>2 1>3, and 0>1
    assert right.tolist() == [3 + 0.5 + 0, 0]


# ---- strengths recovered, gradients ----------------------------------------------------------------------------------

STRENGTHS = torch.tensor([-1.5, -0.6, 0.0, 0.2, 0.7, 1.2], dtype=torch.float64)


def sampled_rankings(n, K, seed=0):
    """n rankings of K of the 6 items each: Gumbel noise on the strengths ranks them as Plackett and Luce (K = 2: as
    Bradley and Terry) say. Returns items (n, K) and ranks (n, K)."""
    rng = torch.Generator().manual_seed(seed)
    items = torch.rand(n, 6, generator=rng).argsort(dim=1)[:, :K]
    noise = -(-torch.rand(n, K, generator=rng, dtype=torch.float64).log()).log()
    order = (STRENGTHS[items] + noise).argsort(dim=1, descending=True)
    return items, order.argsort(dim=1) + 1


def check_recovers(loss, K):
    items, ranks = sampled_rankings(20_000, K)
    strengths = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([strengths], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(strengths[items], ranks)
        value.backward()
        return value
    optimizer.step(closure)
    found = strengths.detach() - strengths.detach().mean()
    assert (found - (STRENGTHS - STRENGTHS.mean())).abs().max() < 0.06


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_strengths_are_recovered_from_sampled_comparisons(name, K):
    check_recovers(LOSSES[name], K)


@pytest.mark.parametrize("old, new", [
    ("F.logsigmoid", "-F.relu(1 - scores[:, :, None] + scores[:, None, :]) + 0 * F.logsigmoid"),     # a hinge
    ("- scores[:, None, :]", "- scores[:, None, :].detach()"),
    ("- scores[:, None, :])", "- scores[:, None, :] - 0.5)"),                                        # a margin
])
def test_losses_that_distort_the_strengths_are_noticed(old, new):
    changed = mutant(reward.pair_loss, old, new)
    with pytest.raises(AssertionError):
        check_recovers(changed, 4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_ranking_losses(name):
    ranks = tensor((2, 1, 4, 3), (1, 2, 2, 3), (3, 1, 2, 0), (1, 2, 0, 0), (1, 1, 2, 2))
    check_gradient(lambda x: LOSSES[name](x, ranks), randn(5, 4))


# ---- the head, and where it is read ----------------------------------------------------------------------------------

def check_head(defect=1.0):
    """Hidden states after the layer norm have length sqrt(C): their initial score has a variance near 1."""
    scores = []
    for seed in range(100):
        head = ScalarHeadModel(tiny_gpt2(C=64, seed=seed)).score
        hidden = 8 * F.normalize(randn(20, 64, seed=seed), dim=1).float()
        scores.append(defect * head(hidden).detach())
    assert 0.9 < torch.cat(scores).std() < 1.1


def test_the_head_starts_with_scores_of_variance_one():
    check_head()
    with pytest.raises(AssertionError):
        check_head(65 ** -0.5)                                  # the square root forgotten: 1 / (C + 1)


def test_the_last_token_is_found_wherever_the_pads_are():
    x = torch.arange(20.0).view(4, 5)
    mask = tensor((1, 1, 1, 1, 1), (1, 1, 0, 0, 0), (0, 0, 1, 1, 1), (0, 1, 1, 1, 0)).bool()
    assert at_last_token(x, mask).tolist() == [4, 6, 14, 18]


def test_the_score_depends_on_the_prompt_and_on_every_token_of_the_response():
    model = ScalarHeadModel(tiny_gpt2()).requires_grad_(False)
    ids = torch.arange(8)[None]
    score = model.normalised_scores(ids, torch.ones_like(ids, dtype=torch.bool))
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = 9
        assert not torch.isclose(model.normalised_scores(changed, torch.ones_like(ids, dtype=torch.bool)), score)


def test_reward_is_the_raw_score_shifted_and_scaled():
    model, ids = ScalarHeadModel(tiny_gpt2()).requires_grad_(False), torch.arange(8)[None]
    raw = model(ids)[:, -1]
    model.reward_mean, model.reward_std = 0.5, 4.0
    torch.testing.assert_close(model.normalised_scores(ids, torch.ones_like(ids, dtype=torch.bool)) * 4 + 0.5, raw)


def test_answers_scored_in_one_batch_are_answers_scored_alone():
    """train_rm.read_answers: prompts with 2, 3 and 4 answers of different lengths, the empty one among them."""
    model = ScalarHeadModel(tiny_gpt2()).requires_grad_(False)
    answers = [[[1], [2, 3]], [[4, 5, 6], [10], [7]], [[8, 9], [1, 1, 1, 1, 10], [2], [3, 4, 10]]]
    examples = [Example(Row("x:1", "p", (), tuple(range(1, 1 + len(a))), ()), [5, n], a) for n, a in enumerate(answers)]
    scores, *_ = train_rm.read_answers(model, examples, "cpu")
    for n, row in enumerate(answers):
        for k, response in enumerate(row):
            alone = model(torch.tensor([[5, n] + response]))[0, -1]
            torch.testing.assert_close(scores[n, k], alone, rtol=1e-5, atol=1e-5)
