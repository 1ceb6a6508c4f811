"""The bias probes on models whose bias is known, and the instruction checks by hand."""

import numpy as np
import pytest
import torch

from minirlhf.gpt2 import GPT2Config
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.evaluate.quality import (ENGLISH, FEMALE_JOBS, MALE_JOBS, TINY, bias, checks,
                                             instruction_rates, person_gaps, with_article)
from minirlhf.tools.evaluate.tables import bias_of

TOKENIZER = load_tokenizer("data/tiny")
SHE, HE = TOKENIZER.encode_ordinary(" She")[0], TOKENIZER.encode_ordinary(" He")[0]


def flagged(gap):
    """What the table of the report says of a gap."""
    table, = bias_of({"bias": {"model": {"probe": gap}}})
    return table.rows[0][-1] == "yes"


class Toy(torch.nn.Module):
    """A language model that knows nothing but a leaning for each person: every time it reads the person's name, " She"
    becomes likelier than " He" by that many nats."""

    def __init__(self, leanings):
        super().__init__()
        self.config = GPT2Config(TOKENIZER.n_vocab, n_positions=64)
        self.lean = torch.nn.Parameter(torch.zeros(TOKENIZER.n_vocab))
        for person, nats in leanings.items():
            (token,) = TOKENIZER.encode_ordinary(f" {person}")
            self.lean.data[token] = nats

    def forward(self, ids, mask=None):
        return self.lean[ids].cumsum(dim=1).unsqueeze(-1)                           # (B, T, 1)

    def logits(self, hidden):
        side = torch.zeros(TOKENIZER.n_vocab)
        side[SHE], side[HE] = 0.5, -0.5
        return hidden * side


def test_a_biased_model_is_flagged_with_the_gap_it_was_given():
    model = Toy({**dict.fromkeys(FEMALE_JOBS[:4], 0.4), **dict.fromkeys(MALE_JOBS[:4], -0.3)})
    gap = bias(model, TOKENIZER, TINY[0])
    assert gap.value == pytest.approx(2 * (0.4 + 0.3), rel=1e-5)                    # the person is named twice
    assert flagged(gap) and gap.low > 0


def test_an_unbiased_model_is_not_flagged():
    gap = bias(Toy({}), TOKENIZER, TINY[0])
    assert not flagged(gap) and gap.value == 0
    even = bias(Toy(dict.fromkeys(FEMALE_JOBS[:4] + MALE_JOBS[:4], 1.5)), TOKENIZER, TINY[0])
    assert even.value == pytest.approx(0, abs=1e-5)                     # leans to " She", whoever it is about


def test_a_model_that_leans_by_lot_is_flagged_as_rarely_as_promised():
    flags = []
    for seed in range(60):
        nats = np.random.default_rng(seed).normal(size=8)
        flags.append(flagged(bias(Toy(dict(zip(FEMALE_JOBS[:4] + MALE_JOBS[:4], nats))), TOKENIZER, TINY[0])))
    assert np.mean(flags) <= 0.1


def test_contexts_differ_only_in_the_person():
    assert with_article("about a {} and a drum.", "engineer") == "about an engineer and a drum."
    assert with_article("about a {} and a drum.", "nurse") == "about a nurse and a drum."
    for probe in ENGLISH + TINY:
        assert len(probe.first) == len(probe.second) and not set(probe.first) & set(probe.second)
        assert all("{}" in begun for _, begun in probe.contexts)


def test_the_english_probes_run_without_a_prompt():
    small = Toy({"nurse": 0.5})
    for probe in ENGLISH:
        first, second = person_gaps(small, TOKENIZER, probe)
        assert len(first) == len(second) == 10 and np.isfinite(first).all()


@pytest.mark.parametrize("instruction, response, found", [
    ("Describe a dog in at most 5 words.", "A good friend with four paws", {"number of words": False}),
    ("Describe a dog in at most 5 words.", "", {"number of words": False}),
    ("Tell it in exactly three words.", "I came home", {"number of words": True}),
    ("Use under 3 words.", "a b c", {"number of words": False}),
    ("Write at least ten words.", "far too few", {"number of words": False}),
    ("Use the word \"lamp\" in at most 6 words.", "The Lamp was on.",
     {"number of words": True, "a word to include": True}),
    ("A story that includes the word lamp.", "The lamps were on.", {"a word to include": False}),
    ("What is a lamp?", "A light.", {}),
])
def test_checks_by_hand(instruction, response, found):
    assert checks(instruction, response) == found


def test_rates_count_only_what_was_asked():
    asked = ["Answer in two words.", "Name a river in at most 2 words.", "Say hello."]
    rates = instruction_rates(asked, ["Good evening.", "The river Nile", "hello"])
    assert set(rates) == {"number of words"} and rates["number of words"][::3] == (0.5, 2)
