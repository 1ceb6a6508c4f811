"""Sampling: the cached, batched loop against a naive one, and the frequencies against the distribution."""

import copy
import math

import pytest
import torch

from minirlhf.answers import respond
from minirlhf.generate import (decode, generate, left_pad, micro_batches, response_logits, response_logprobs, right_pad,
                               sample_token)
from small_world import TOKENIZER, generate_with_logprobs, tiny_gpt2

EOS, R = 8, 9
PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [10, 9], [3, 3, 3, 3], [0, 5, 0], [2, 9, 4, 1, 0], [6], [4, 4]]


def uniform_numbers(B=len(PROMPTS), seed=0):
    return torch.rand(B, R, generator=torch.Generator().manual_seed(seed))


def naive(model, prompt, uniforms, temperature, earliest=0):
    """One response without cache, batch, pads or float32: the whole sequence anew for each token."""
    model, ids, logprobs = copy.deepcopy(model).double(), [], []
    for u in uniforms.tolist():
        logits = model.logits(model(torch.tensor([prompt + ids])))[0, -1].tolist()
        if temperature == 0:
            token = logits.index(max(logits))
            weights = [float(x == logits[token]) for x in logits]
        else:
            weights = [math.exp(x / temperature) for x in logits]
            token, below = 0, weights[0]
            while below <= u * sum(weights):
                token, below = token + 1, below + weights[token + 1]
        ids.append(token)
        logprobs.append(math.log(weights[token] / sum(weights)))
        if token == EOS and len(ids) > earliest:
            break
    return ids, logprobs


def sampled_rows(*args):
    """A call of generate(*args) -> a list of (ids, log-probabilities, finished), without what stands under the mask."""
    return [(ids[mask].tolist(), logprobs[mask], bool(finished))
            for ids, mask, finished, logprobs in zip(*generate_with_logprobs(generate, *args))]


def check_against_naive(temperature=1.0, earliest=0):
    model, uniforms = tiny_gpt2(), uniform_numbers()
    rows = sampled_rows(model, *left_pad(PROMPTS), uniforms, (EOS, earliest), temperature)
    lengths = set()
    for prompt, row_uniforms, (ids, logprobs, finished) in zip(PROMPTS, uniforms, rows):
        expected, expected_logprobs = naive(model, prompt, row_uniforms, temperature, earliest)
        assert ids == expected and finished == (expected[-1] == EOS)
        torch.testing.assert_close(logprobs, torch.tensor(expected_logprobs), rtol=1e-5, atol=1e-5)
        lengths.add(len(ids))
    assert temperature == 0 or len(lengths) > 2 and R in lengths        # some ended early, some never


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_cached_sampling_is_naive_sampling_without_a_cache(temperature):
    check_against_naive(temperature)


def test_a_stop_token_before_the_earliest_column_ends_nothing():
    check_against_naive(earliest=1)
    check_against_naive(earliest=4)


def test_what_stands_under_the_prompt_mask_does_not_matter():
    model, uniforms = tiny_gpt2(), uniform_numbers()
    ids, mask = left_pad(PROMPTS)
    for filler in (EOS, 7):
        filled = ids.masked_fill(~mask, filler)
        clean, other = (generate(model, x, mask, uniforms, (EOS, 0)) for x in (ids, filled))
        assert all(torch.equal(a, b) for a, b in zip(clean, other))


@pytest.mark.parametrize("eos", [EOS, 0])                               # 0 is what stands under the mask, too
def test_a_finished_response_has_one_eos_at_its_end_and_an_unfinished_one_none(eos):
    ids, mask, finished = generate(tiny_gpt2(), *left_pad(PROMPTS * 20), uniform_numbers(160), (eos, 0))
    lengths = mask.sum(dim=1)
    assert torch.equal(mask, torch.arange(R) < lengths[:, None])
    ends = ((ids == eos) & mask).sum(dim=1)
    assert torch.equal(ends == 1, finished) and torch.equal(ends == 0, ~finished)
    last = ids.gather(1, lengths[:, None] - 1)[:, 0]
    assert torch.equal(last == eos, finished) and (lengths[~finished] == R).all()
    assert 20 < finished.sum() < 140


def only_eos():
    """A model that writes nothing but EOS."""
    model = tiny_gpt2()
    with torch.no_grad():
        model.ln_f.bias.copy_(30 * model.wte.weight[EOS])
    return model


def test_the_loop_stops_when_every_row_is_finished_and_cuts_the_batch_to_the_longest():
    model, calls = only_eos(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for earliest in (0, 4):
        ids, mask, finished = generate(model, *left_pad(PROMPTS), uniform_numbers(), (EOS, earliest))
        assert finished.all() and mask.all() and ids.shape == mask.shape == (len(PROMPTS), 1 + earliest)
    assert len(calls) == 1 + 5


# ---- frequencies -----------------------------------------------------------------------------------------------------

def test_sampled_frequencies_are_the_distribution(N=20_000):
    """Chi-square with 6 degrees of freedom stays under 22.5 with probability 0.999."""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0, -3.0, 1.1, 0.2])
    tokens = sample_token(logits.expand(N, 7), torch.rand(N, 1, generator=torch.Generator().manual_seed(0)))
    expected = logits.double().softmax(0) * N
    counts = torch.bincount(tokens[:, 0], minlength=7)
    assert ((counts - expected) ** 2 / expected).sum() < 22.5


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2 ** -24])
def test_the_ends_of_the_interval_give_tokens_that_are_possible(uniform):
    logits = torch.full((1, 50_257), -math.inf)
    logits[0, 100:40_000] = torch.randn(39_900, generator=torch.Generator().manual_seed(0))
    assert 100 <= sample_token(logits, torch.tensor([[uniform]])) < 40_000


# ---- many prompts, and the log-probabilities of given responses ------------------------------------------------------

@pytest.mark.parametrize("batch_size", [3, 128])
def test_respond_answers_in_the_order_of_the_prompts_whatever_the_batch(batch_size):
    model, rng = tiny_gpt2(), torch.Generator().manual_seed(5)
    uniforms = torch.rand(len(PROMPTS), R, generator=torch.Generator().manual_seed(5))
    answers = respond(model, PROMPTS, R, (EOS, 0), rng, batch_size=batch_size)
    for prompt, row_uniforms, (ids, finished) in zip(PROMPTS, uniforms, answers):
        assert ids == naive(model, prompt, row_uniforms, 1.0)[0] and finished == (ids[-1] == EOS)


def test_the_text_of_a_response_does_not_contain_its_eos():
    eos = TOKENIZER.eot_token
    for ids, text in (([97, 98, eos], "ab"), ([97, 98], "ab"), ([eos], ""), ([], "")):
        assert decode(TOKENIZER, ids) == text


def test_log_probabilities_of_responses_are_the_full_softmax_by_hand():
    model = tiny_gpt2()
    responses = [[1, 2, EOS], [3], [4, 5, 6, 7, 1, 9], [EOS], [0] * 9, [2, EOS], [7, 7], [1]]
    logprobs, mask = response_logprobs(model, PROMPTS, responses, "cpu")
    exact = copy.deepcopy(model).double()
    for row, row_mask, prompt, response in zip(logprobs, mask, PROMPTS, responses):
        everything = exact.logits(exact(torch.tensor([prompt + response])))[0]
        expected = [everything[len(prompt) - 1 + t].log_softmax(0)[token] for t, token in enumerate(response)]
        torch.testing.assert_close(row[row_mask].double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert (row[~row_mask] == 0).all()


def test_response_logits_are_those_that_predict_the_response():
    """Left-padded prompts, right-padded responses: the logits that predict each token, from the unpadded sequence."""
    model, responses = tiny_gpt2(), [[1, 2, EOS], [3], [4, 5, 6, 7, 1, 9], [EOS]]
    (prompts, prompt_mask), (padded, response_mask) = left_pad(PROMPTS[:4]), right_pad(responses)
    ids, mask = torch.cat([prompts, padded], dim=1), torch.cat([prompt_mask, response_mask], dim=1)
    logits, exact = response_logits(model, ids, mask, prompts.shape[1]), copy.deepcopy(model).double()
    assert logits.shape == (4, 6, model.config.vocab_size)
    for row, prompt, response in zip(logits, PROMPTS, responses):
        alone = exact.logits(exact(torch.tensor([prompt + response])))[0, len(prompt) - 1:-1]
        torch.testing.assert_close(row[:len(response)].double(), alone, rtol=1e-5, atol=1e-5)


def test_micro_batches_hold_every_row_once_in_order():
    for size, lengths in ((0, [7]), (1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (9, [7])):
        for rows in (list(range(7)), torch.arange(7)):
            parts = micro_batches(rows, size)
            assert [len(part) for part in parts] == lengths
            assert [int(x) for part in parts for x in part] == list(range(7))
    assert micro_batches([], 0) == micro_batches([], 3) == []           # a process without rows


def test_sampling_and_scoring_agree_on_what_was_sampled():
    model = tiny_gpt2()
    rows = sampled_rows(model, *left_pad(PROMPTS), uniform_numbers(), (EOS, 0))
    logprobs, mask = response_logprobs(model, PROMPTS, [ids for ids, _, _ in rows], "cpu")
    for row, row_mask, (_, sampled, _) in zip(logprobs, mask, rows):
        torch.testing.assert_close(row[row_mask], sampled, rtol=1e-5, atol=1e-5)
