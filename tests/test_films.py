"""Film sentences rated by real people: the files, the lexicon, the measurements, and what the labels are worth."""

import io
import json
import os
import random
import re
import tarfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from data.films import labels, lexicon, measure, prepare
from minirlhf.data import read_comparisons, read_demonstrations, read_prompts
from minirlhf.files.errors import run_main
from minirlhf.files.tokenizer import save_tokenizer
from minirlhf.tools.feedback.stats import cohen_kappa
from minirlhf.weights import save_pretrained
from small_world import TOKENIZER, tiny_gpt2

REAL = Path(os.environ.get("MINIRLHF_REAL_DATA") or "nowhere") / "hutto_ICWSM_2014.tar.gz"
real_data = pytest.mark.skipif(not REAL.is_file(), reason="$MINIRLHF_REAL_DATA has no hutto_ICWSM_2014.tar.gz")
SETS = [name + part for name in ("demonstrations", "comparisons", "comparisons_judge", "prompts")
        for part in ("", "_test")]
RATED = {"good": 2.0, "bad": -2.0, "no": -1.2}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """An archive of 40 blocks. Rater 1 of each says the true value of a sentence; the others, more or less."""
    rng, texts, ratings = random.Random(0), [], []
    for i in range(40 * 30):
        value = rng.randint(-3, 3)
        texts.append(f"{i + 1}\t0.0\tSentence {i} of the ''film''    naïve &amp; w{value + 3} long enough.\n")
        ratings.append(f"{i + 1}\t0\t1\t{[value] + [value + rng.randint(-1, 1) for _ in range(14 + i // 30 % 3)]}\n")
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as archive:
        for name, lines in (("GroundTruth", texts), ("anonDataRatings", ratings)):
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt")
            info.size = len("".join(lines).encode())
            archive.addfile(info, io.BytesIO("".join(lines).encode()))
    monkeypatch.setattr(prepare, "SHA256", prepare.sha256_of(tmp_path / "made.tar.gz"))
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "made.tar.gz"


def made(source, *flags):
    """{file: its rows}"""
    prepare.main(["--source", str(source), "--out", "made", *flags])
    return {name: [json.loads(line) for line in open(f"made/{name}.jsonl", encoding="utf-8")] for name in SETS}


# ---- the files -------------------------------------------------------------------------------------------------------

def test_no_two_files_share_a_block_and_demonstrations_are_whole_sentences(source):
    found = made(source)
    blocks = {name: {block for row in rows for block in row.get("blocks", [row.get("block")])}
              for name, rows in found.items()}
    assert all(blocks.values()) and sum(map(len, blocks.values())) == 40 == len(set().union(*blocks.values()))
    for row in found["demonstrations"]:
        assert re.fullmatch(r'Movie review: Sentence \d+ of the "film" - naïve & w\d long enough\.',
                            row["prompt"] + row["response"])
        assert 4 <= len(row["prompt"].split()) - 2 <= 7
    assert prepare.sha256_of(prepare.archive()) == prepare.SHA256                   # kept, so no network is needed
    assert read_prompts("made/prompts.jsonl") and read_demonstrations("made/demonstrations.jsonl")
    assert len(read_comparisons("made/comparisons_judge.jsonl")[0].ranks) == 4


@pytest.mark.parametrize("flags, n", [((), None), (("--raters", "1", "--within"), 1), (("--raters", "3"), 3)])
def test_ranks_are_what_the_named_raters_say(source, flags, n):
    sentences, people = {" " + sentence.text: sentence for sentence in prepare.read_sentences(source)}, {}
    for row in made(source, *flags)["comparisons"]:
        scores = []
        for text, given, gold in zip(row["responses"], row["ratings"], row["gold"], strict=True):
            block, _, ratings = sentences[text]
            assert len(given) == (n or len(ratings)) and gold == pytest.approx(np.mean(ratings), abs=1e-4)
            assert people.setdefault(block, set(given)) == set(given)               # the same people for a block
            names = {f"block {block}, rater {i}": rating for i, rating in enumerate(ratings, start=1)}
            assert given.items() <= names.items()
            scores.append(np.mean(list(given.values())))
        for (a, rank_a), (b, rank_b) in combinations(zip(scores, row["ranks"]), 2):
            assert abs(a - b) < 0.5 if rank_a == rank_b else (rank_a < rank_b) == (a > b)
        assert len(set(row["blocks"])) == 1 or "--within" not in flags


@pytest.mark.parametrize("scores, ranks", [([3, 1, 2, 1], [1, 3, 2, 3]), ([1.4, 1.0, 0.9, 0.6], [1, 1, 2, 2]),
                                           ([-1, -1.2], [1, 1]), ([0, 0.5], [2, 1])])
def test_less_than_half_a_point_below_the_best_of_a_rank_shares_it(scores, ranks):
    assert prepare.ranks_of(scores) == ranks


@pytest.mark.parametrize("flags, said", [("--source wrong.tar.gz", "wrong.tar.gz"), ("--source nowhere", "nowhere"),
                                         ("", "--source"), ("--source made.tar.gz --out wrong.tar.gz/made", "wrong"),
                                         ("--source made.tar.gz --raters 16", "16")])
def test_what_goes_wrong_is_one_line(source, flags, said, monkeypatch, capsys):
    Path("wrong.tar.gz").write_bytes(b"not the archive")
    monkeypatch.setattr(prepare, "URL", "http://127.0.0.1:1/nothing")
    with pytest.raises(SystemExit):
        run_main(lambda: prepare.main(flags.split()))
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and said in last and len(before) <= 1 and not Path("out").exists()


# ---- the lexicon and the measurements --------------------------------------------------------------------------------

@pytest.mark.parametrize("less, more", [("bad", "good"), ("not very good", "good"), ("good", "very good"), ("", "good"),
                                        ("slightly good", "good"), ("good, but bad", "bad, but good"), ("bad!", "bad"),
                                        ("a film", "not bad"), ("It isn't so good", "a film"), ("no good", "a film")])
def test_the_lexicon_orders_texts_as_people_do(less, more):
    assert -1 < lexicon.compound(less, RATED) < lexicon.compound(more, RATED) < 1


def test_facts_about_answers():
    facts = measure.film_facts(["x"] * 3, ["a good film's end", "bad soup", "the table"], RATED)
    assert [facts[name] for name in ("positive", "negative", "about_films")] == [
        [True, False, False], [False, True, False], [True, False, False]]
    sentences = (measure.HERE / "plain.txt").read_text().splitlines()
    assert len(set(sentences)) >= 40 and not any(map(measure.about_films, sentences))


def test_measuring_a_model(source, monkeypatch):
    made(source)
    monkeypatch.setattr(measure, "ratings", lambda: RATED)
    save_pretrained(tiny_gpt2(V=257, n_positions=256), Path("model"))
    save_tokenizer(TOKENIZER, Path("model"))
    measure.main(["model", "--prompts", "made/prompts_test.jsonl", "--max_response", "4", "--out", "found.json"])
    found, n = json.loads(Path("found.json").read_text())["model"], len(read_prompts("made/prompts_test.jsonl"))
    assert found["positive"]["n"] == n and found["length"]["high"] <= 4 and found["perplexity_plain"]["n"] >= 40


# ---- what labels are worth -------------------------------------------------------------------------------------------

def test_states_are_those_of_each_text_alone_without_its_prompt(tmp_path):
    model, texts, prompt = tiny_gpt2(V=257, n_positions=64), ["good", "a longer text", "b"], list(b"Movie review:")
    save_pretrained(model, tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    found = labels.frozen_states(tmp_path, texts)
    del model.h[1:]
    for text, state in zip(texts, found, strict=True):
        hidden = model(torch.tensor([prompt + list(f" {text}".encode()) + [256]]))[0, len(prompt):]
        np.testing.assert_allclose(state, hidden.mean(0).detach(), atol=1e-5)


@pytest.mark.parametrize("condition", [labels.Condition(40), labels.Condition(10, k=8, raters=5, within=False),
                                       labels.Condition(40, people="not worst", sentences="not disputed")])
def test_a_preference_that_is_in_the_states_is_learned(source, condition, monkeypatch):
    monkeypatch.setattr(labels, "TEST_BLOCKS", 8)
    sentences = prepare.read_sentences(source)
    noise = np.random.default_rng(0).standard_normal((len(sentences), 8))
    told = np.c_[[sentence.ratings[0] for sentence in sentences], noise]
    assert labels.measure(labels.World(sentences, told), condition, 1)["accuracy"] > 0.9
    assert 0.4 < labels.measure(labels.World(sentences, noise), condition, 1)["anywhere"] < 0.6


def test_kappas_are_cohens(source):
    verdicts = labels.verdicts_of(prepare.read_sentences(source)[:30])
    for a, b in combinations(range(len(verdicts)), 2):
        assert labels.kappas(verdicts)[a, b] == pytest.approx(cohen_kappa(*verdicts[[a, b]].tolist()))


def test_the_guide_has_the_tables_that_the_rows_give():
    rows, guide = labels.read_results(labels.ROWS), labels.GUIDE.read_text(encoding="utf-8")
    used = {name for table in labels.tables().values() for pair in table.rows.values() for name in pair}
    assert used == set(labels.CONDITIONS)
    assert sorted((row["condition"], row["seed"]) for row in rows) == sorted(
        [(name, seed) for name in used for seed in labels.SEEDS] + [("people", 0)])
    assert labels.written(guide, rows) == guide, "run `python data/films/labels.py write`"


# ---- the real archive ------------------------------------------------------------------------------------------------

@real_data
def test_a_place_in_the_lists_of_a_block_is_one_person():
    sentences = prepare.read_sentences(REAL)
    lengths = [len(sentence.ratings) for sentence in sentences]
    residuals = [np.array(sentence.ratings) - sentence.mean for sentence in sentences]
    assert len(sentences) == 10_605 and {min(lengths), max(lengths)} == {15, 29}
    assert all(i % 30 == 0 for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1])

    def correlation(ends, turn=0):
        rows = [i for i in range(1, 10_605) if lengths[i - 1] == lengths[i] and (i % 30 == 0) == ends]
        first, second = (np.concatenate(part) for part in zip(*(
            (residuals[i - 1], np.roll(residuals[i], turn)) for i in rows)))
        return np.corrcoef(first, second)[0, 1]

    assert correlation(False) == pytest.approx(0.34, abs=0.01)
    assert abs(correlation(True)) < 0.06 and abs(correlation(False, turn=1)) < 0.06


@real_data
def test_people_agree_as_the_guide_says_and_blocks_are_of_one_kind():
    world = labels.World(prepare.read_sentences(REAL), np.zeros((10_605, 1)))
    people = next(row for row in labels.read_results(labels.ROWS) if row["condition"] == "people")
    assert {name: round(each.value, 6) for name, each in labels.agreement(world).items()} == {
        name: round(people[name]["value"], 6) for name in labels.WHAT}
    positive = [np.mean([sentence.mean > 0 for sentence in own]) for own in labels.by_block(world.sentences).values()]
    assert np.mean([abs(share - 0.5) > 0.3 for share in positive]) > 0.95


@real_data
def test_film_words_are_those_of_films():
    films, *others = (np.mean([measure.about_films(sentence.text) for sentence in prepare.read_sentences(REAL, name)])
                      for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"))
    assert films > 0.5 and max(others) < 0.05


@pytest.mark.slow
@real_data
def test_the_lexicon_agrees_with_vader(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path))
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    texts, rated = [sentence.text for sentence in prepare.read_sentences(REAL)], lexicon.ratings(REAL)
    ours = np.array([lexicon.compound(text, rated) for text in texts])
    theirs = np.array([vader.polarity_scores(text)["compound"] for text in texts])
    assert np.corrcoef(ours, theirs)[0, 1] > 0.98                               # measured: 0.984
    assert abs(np.mean(ours >= 0.05) - np.mean(theirs >= 0.05)) < 0.005
