"""Sampling: the cached, batched loop against a naive one, and the frequencies against the distribution."""

import copy
import math

import pytest
import torch

from minirlhf.answers import respond
from minirlhf.generate import decode, generate, left_pad, response_logits, response_logprobs, sample_token
from mutation import mutant
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


def rows_of(generate, *args):
    """A call of generate() -> a list of (ids, log-probabilities, finished), without what stands under the mask."""
    return [(ids[mask].tolist(), logprobs[mask], bool(finished))
            for ids, mask, finished, logprobs in zip(*generate_with_logprobs(generate, *args))]


def check_against_naive(generate, temperature=1.0, earliest=0):
    model, uniforms = tiny_gpt2(), uniform_numbers()
    rows = rows_of(generate, model, *left_pad(PROMPTS), uniforms, (EOS, earliest), temperature)
    lengths = set()
    for prompt, row_uniforms, (ids, logprobs, finished) in zip(PROMPTS, uniforms, rows):
        expected, expected_logprobs = naive(model, prompt, row_uniforms, temperature, earliest)
        assert ids == expected and finished == (expected[-1] == EOS)
        torch.testing.assert_close(logprobs, torch.tensor(expected_logprobs), rtol=1e-5, atol=1e-5)
        lengths.add(len(ids))
    assert temperature == 0 or len(lengths) > 2 and R in lengths        # some ended early, some never


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0, 0])
def test_cached_sampling_is_naive_sampling_without_a_cache(temperature):
    check_against_naive(generate, temperature)


@pytest.mark.parametrize("earliest", [1, 4])
def test_a_stop_token_before_the_earliest_column_ends_nothing(earliest):
    check_against_naive(generate, earliest=earliest)


@pytest.mark.parametrize("old, new", [
    ("cache.keep(going)", "cache.keep(torch.arange(len(going)))"),
    ("seen.new_ones(len(rows), 1)", "seen.new_zeros(len(rows), 1)"),
    ("uniforms[rows, t, None]", "uniforms[:len(rows), t, None]"),
    ("finished[rows] = ended", "finished[rows] = True"),
    ("logits / max(temperature, 1e-9)", "logits / max(temperature, 2)"),
    ("ids[:, :t + 1], mask[:, :t + 1]", "ids[:, :t], mask[:, :t]"),
    ("model(inputs, seen, cache)", "model(inputs, torch.ones_like(seen), cache)"),         # trap 2
])
def test_other_loops_are_noticed(old, new):
    changed = mutant(generate, old, new)
    with pytest.raises(AssertionError):
        check_against_naive(changed)


def test_a_row_depends_neither_on_the_other_rows_nor_on_their_order():
    model, uniforms = tiny_gpt2(), uniform_numbers()
    together = rows_of(generate, model, *left_pad(PROMPTS), uniforms, (EOS, 0))
    for chosen in ([0], [6], [5, 2, 7], [7, 6, 5, 4, 3, 2, 1, 0]):
        some = rows_of(generate, model, *left_pad([PROMPTS[i] for i in chosen]), uniforms[chosen], (EOS, 0))
        for i, (ids, logprobs, finished) in zip(chosen, some):
            assert (ids, finished) == (together[i][0], together[i][2])
            torch.testing.assert_close(logprobs, together[i][1], rtol=1e-5, atol=1e-5)


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


def test_the_loop_stops_when_every_row_is_finished():
    model, calls = only_eos(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    ids, mask, finished = generate(model, *left_pad(PROMPTS), uniform_numbers(), (EOS, 0))
    assert finished.all() and len(calls) == 1 and ids.shape == mask.shape == (len(PROMPTS), 1)


def test_a_batch_is_cut_to_its_longest_response():
    for prompt, uniforms in zip(PROMPTS, uniform_numbers()):
        ids, mask, _ = generate(tiny_gpt2(), *left_pad([prompt]), uniforms[None], (EOS, 0))
        assert mask.all() and ids.shape == mask.shape
    ids, mask, finished = generate(only_eos(), *left_pad(PROMPTS), uniform_numbers(), (EOS, 4))
    assert ids.shape == (len(PROMPTS), 5) and mask.all() and finished.all()


# ---- frequencies -----------------------------------------------------------------------------------------------------

def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def check_frequencies(sample_token, N=20_000):
    """Chi-square with 6 degrees of freedom stays under 22.5 with probability 0.999."""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0, -3.0, 1.1, 0.2])
    probabilities = logits.double().softmax(0)
    tokens = sample_token(logits.expand(N, 7), torch.rand(N, 1, generator=torch.Generator().manual_seed(0)))
    assert chi_square(torch.bincount(tokens[:, 0], minlength=7), probabilities) < 22.5


def test_sampled_frequencies_are_the_distribution():
    check_frequencies(sample_token)


@pytest.mark.parametrize("old, new", [
    ("torch.softmax(logits", "torch.softmax(logits / 0.9"),
    ("uniform * cumulative[:, -1:]", "(0.97 * uniform) * cumulative[:, -1:]"),                          # cuts the tail
    ("token.clamp(max=", "(token + 1).clamp(max="),
])
def test_other_samplers_are_noticed(old, new):
    with pytest.raises(AssertionError):
        check_frequencies(mutant(sample_token, old, new))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2 ** -24])
def test_the_ends_of_the_interval_give_tokens_that_are_possible(uniform):
    logits = torch.full((1, 50_257), -math.inf)
    logits[0, 100:40_000] = torch.randn(39_900, generator=torch.Generator().manual_seed(0))
    assert 100 <= sample_token(logits, torch.tensor([[uniform]])) < 40_000


def test_whole_responses_come_as_often_as_their_probability_says():
    """All 1 + 2 + 4 + 8 responses of at most three tokens in a world of two letters and an EOS, by enumeration."""
    model = tiny_gpt2(V=3)
    expected, eos = {}, 2

    def enumerate_from(ids, logprob):
        if ids[-1:] == [eos] or len(ids) == 3:
            expected[tuple(ids)] = math.exp(logprob)
            return
        logprobs = model.logits(model(torch.tensor([[0, 1] + ids])))[0, -1].double().log_softmax(0).tolist()
        for token in range(3):
            enumerate_from(ids + [token], logprob + logprobs[token])
    enumerate_from([], 0.0)
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-9)

    N = 10_000
    uniforms = torch.rand(N, 3, generator=torch.Generator().manual_seed(0))
    ids, mask, _ = generate(model, *left_pad([[0, 1]] * N), uniforms, (eos, 0))
    found = [tuple(row[own].tolist()) for row, own in zip(ids, mask)]
    counts = torch.tensor([found.count(ids) for ids in expected])
    assert counts.sum() == N and len(expected) == 15
    assert chi_square(counts, torch.tensor(list(expected.values()))) < 36.1             # 14 degrees of freedom, 0.999


# ---- many prompts, and the log-probabilities of given responses ------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 3, 128])
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


def check_response_logprobs(response_logprobs, temperature):
    model = tiny_gpt2()
    responses = [[1, 2, EOS], [3], [4, 5, 6, 7, 1, 9], [EOS], [0] * 9, [2, EOS], [7, 7], [1]]
    logprobs, mask = response_logprobs(model, PROMPTS, responses, "cpu", temperature)
    exact = copy.deepcopy(model).double()
    for row, row_mask, prompt, response in zip(logprobs, mask, PROMPTS, responses):
        everything = exact.logits(exact(torch.tensor([prompt + response])))[0] / temperature
        expected = [everything[len(prompt) - 1 + t].log_softmax(0)[token] for t, token in enumerate(response)]
        torch.testing.assert_close(row[row_mask].double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert (row[~row_mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_responses_are_the_full_softmax_by_hand(temperature):
    check_response_logprobs(response_logprobs, temperature)


@pytest.mark.parametrize("old, new", [
    ("[len(p) for p in prompts])[:, 1:]", "[len(p) + 1 for p in prompts])[:, 1:]"),             # the first is lost
    ("[len(p) for p in prompts])[:, 1:]", "[len(p) for p in prompts])[:, :-1]"),                # off by one
    (", temperature)  ", ")  "),
])
def test_other_log_probabilities_are_noticed(old, new):
    changed = mutant(response_logprobs, old, new)
    with pytest.raises((AssertionError, RuntimeError)):                 # another number of tokens
        check_response_logprobs(changed, 0.7)


def check_response_logits(response_logits):
    """Left-padded prompts, right-padded responses: the logits that predict each token, from the unpadded sequence."""
    model, responses = tiny_gpt2(), [[1, 2, EOS], [3], [4, 5, 6, 7, 1, 9], [EOS]]
    prompts, prompt_mask = left_pad(PROMPTS[:4])
    (P, lengths), exact = (prompts.shape[1], torch.tensor([len(r) for r in responses])), copy.deepcopy(model).double()
    mask = torch.cat([prompt_mask, torch.arange(6) < lengths[:, None]], dim=1)
    ids = torch.cat([prompts, torch.tensor([r + [0] * (6 - len(r)) for r in responses])], dim=1)
    logits = response_logits(model, ids, mask, P)
    assert logits.shape == (4, 6, model.config.vocab_size)
    for row, prompt, response in zip(logits, PROMPTS, responses):
        alone = exact.logits(exact(torch.tensor([prompt + response])))[0, len(prompt) - 1:-1]
        torch.testing.assert_close(row[:len(response)].double(), alone, rtol=1e-5, atol=1e-5)


def test_response_logits_are_those_that_predict_the_response():
    check_response_logits(response_logits)
    for old, new in (("P - 1:-1", "P:"), ("model(ids, mask)", "model(ids)")):
        changed = mutant(response_logits, old, new)
        with pytest.raises(AssertionError):
            check_response_logits(changed)


def test_sampling_and_scoring_agree_on_what_was_sampled():
    model = tiny_gpt2()
    rows = rows_of(generate, model, *left_pad(PROMPTS), uniform_numbers(), (EOS, 0), 0.7)
    logprobs, mask = response_logprobs(model, PROMPTS, [ids for ids, _, _ in rows], "cpu", 0.7)
    for row, row_mask, (_, sampled, _) in zip(logprobs, mask, rows):
        torch.testing.assert_close(row[row_mask], sampled, rtol=1e-5, atol=1e-5)
