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
from data.openassistant import prepare as openassistant
from minirlhf.data import read_comparisons, read_demonstrations, read_prompts
from minirlhf.files.tokenizer import save_tokenizer
from minirlhf.running.errors import run_main
from minirlhf.tools.feedback.stats import cohen_kappa
from minirlhf.weights import save_pretrained
from tests.small_world import TOKENIZER, tiny_gpt2

REAL = Path(os.environ.get("MINIRLHF_REAL_DATA") or "nowhere") / "hutto_ICWSM_2014.tar.gz"
real_data = pytest.mark.skipif(not REAL.is_file(), reason="$MINIRLHF_REAL_DATA has no hutto_ICWSM_2014.tar.gz")
SETS = [name + part for name in ("demonstrations", "comparisons", "comparisons_judge", "prompts")
        for part in ("", "_test")]
BLOCKS = 40


@pytest.fixture
def source(tmp_path, monkeypatch):
    """An archive of 40 blocks. Rater 1 of each says the true value of a sentence; the others, more or less."""
    rng, texts, ratings = random.Random(0), [], []
    for i in range(BLOCKS * 30):
        value = rng.randint(-3, 3)
        given = [value] + [value + rng.randint(-1, 1) for _ in range(14 + i // 30 % 3)]
        texts.append(f"{i + 1}\t0.0\tSentence {i} of the ''film''    naïve &amp; w{value + 3} long enough.\n")
        ratings.append(f"{i + 1}\t0.0\t1.0\t{given}\n")
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as archive:
        for name, lines in (("movieReviewSnippets_GroundTruth.txt", texts),
                            ("movieReviewSnippets_anonDataRatings.txt", ratings),
                            ("vader_sentiment_lexicon.txt", ["good\t2.0\t0.5\n", "bad\t-2.0\t0.5\n"])):
            data = "".join(lines).encode()
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(prepare, "SHA256", prepare.sha256_of(tmp_path / "made.tar.gz"))
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "made.tar.gz"


def made(source, *flags):
    """{file: its rows}"""
    prepare.main(["--source", str(source), "--out", "made", *flags])
    return {name: [json.loads(line) for line in open(f"made/{name}.jsonl", encoding="utf-8")] for name in SETS}


def blocks_of(rows):
    return {block for row in rows for block in row.get("blocks", [row.get("block")])}


# ---- the files -------------------------------------------------------------------------------------------------------

def test_no_two_files_share_a_block(source):
    found = made(source)
    for one, other in combinations(SETS, 2):
        assert blocks_of(found[one]) and not blocks_of(found[one]) & blocks_of(found[other])
    assert set().union(*map(blocks_of, found.values())) == set(range(1, BLOCKS + 1))
    assert read_prompts("made/prompts.jsonl") and read_demonstrations("made/demonstrations.jsonl")
    assert read_comparisons("made/comparisons_judge.jsonl")[0].ranks
    assert json.loads(Path("made/meta.json").read_text())["counts"]["read"] == BLOCKS * 30


def test_a_demonstration_is_a_sentence_cut_after_four_to_seven_words(source):
    for row in made(source)["demonstrations"]:
        whole = row["prompt"] + row["response"]
        assert re.fullmatch(r'Movie review: Sentence \d+ of the "film" - naïve & w\d long enough\.', whole)
        assert 4 <= len(row["prompt"].split()) - 2 <= 7


@pytest.mark.parametrize("flags, raters, within", [((), None, False), (("--raters", "1", "--within"), 1, True),
                                                   (("--raters", "3"), 3, False)])
def test_ranks_are_what_the_named_raters_say(source, flags, raters, within):
    sentences = {" " + sentence.text: sentence for sentence in prepare.read_sentences(source)}
    people = {}
    for row in made(source, *flags)["comparisons"]:
        scores = []
        for text, given, gold in zip(row["responses"], row["ratings"], row["gold"], strict=True):
            sentence = sentences[text]
            assert len(given) == (raters or len(sentence.ratings)) and gold == pytest.approx(sentence.mean, abs=1e-4)
            assert people.setdefault(sentence.block, set(given)) == set(given)
            for name, rating in given.items():
                block, place = map(int, re.fullmatch(r"block (\d+), rater (\d+)", name).groups())
                assert block == sentence.block and sentence.ratings[place - 1] == rating
            scores.append(np.mean(list(given.values())))
        for (a, rank_a), (b, rank_b) in combinations(zip(scores, row["ranks"]), 2):
            assert rank_a == rank_b or (rank_a < rank_b) == (a > b)
            assert rank_a != rank_b or abs(a - b) < 0.5
        assert len(set(row["blocks"])) == 1 or not within
    assert len({tuple(name.partition(", ")[2] for name in names) for names in people.values()}) > 1


@pytest.mark.parametrize("scores, ranks", [([3, 1, 2, 1], [1, 3, 2, 3]), ([1.4, 1.0, 0.9, 0.6], [1, 1, 2, 2]),
                                           ([-1, -1.2], [1, 1]), ([0, 0.5], [2, 1])])
def test_less_than_half_a_point_below_the_best_of_a_rank_shares_it(scores, ranks):
    assert prepare.ranks_of(scores) == ranks


def test_what_goes_wrong_is_one_line_and_nothing_is_written(source, monkeypatch, capsys):
    Path("wrong.tar.gz").write_bytes(b"not the archive")
    Path("a_file").touch()
    monkeypatch.setattr(prepare, "URL", "http://127.0.0.1:1/nothing")
    for flags, said in (("--source wrong.tar.gz", "wrong.tar.gz"), ("--source nowhere", "nowhere"), ("", "--source"),
                        (f"--source {source} --out a_file/made", "a_file"), (f"--source {source} --raters 16", "16")):
        with pytest.raises(SystemExit):
            run_main(lambda: prepare.main(flags.split()))
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ") and said in lines[-1] and "Traceback" not in "".join(lines)
    assert not Path("out").exists()


# ---- the lexicon and the measurements --------------------------------------------------------------------------------

RATED = {"good": 2.0, "bad": -2.0, "no": -1.2}


@pytest.mark.parametrize("less, more", [("bad", "good"), ("not very good", "good"), ("good", "very good"), ("", "good"),
                                        ("slightly good", "good"), ("good, but bad", "bad, but good"), ("bad!", "bad"),
                                        ("a film", "not bad"), ("It isn't so good", "a film"), ("no good", "a film")])
def test_the_lexicon_orders_texts_as_people_do(less, more):
    assert -1 < lexicon.compound(less, RATED) < lexicon.compound(more, RATED) < 1


def test_facts_about_answers(source, monkeypatch):
    monkeypatch.setattr(lexicon, "archive", lambda given: source)
    lexicon.ratings.cache_clear()
    facts = measure.film_facts(["x"] * 3, ["a good film's end", "bad soup", "the table"])
    lexicon.ratings.cache_clear()
    assert [facts[name] for name in ("positive", "negative", "about_films")] == [
        [True, False, False], [False, True, False], [True, False, False]]


def test_measuring_two_models(source, monkeypatch):
    made(source)
    monkeypatch.setattr(measure, "ratings", lambda: RATED)
    for seed in (0, 1):
        save_pretrained(tiny_gpt2(V=257, n_positions=256, seed=seed), Path(f"model{seed}"))
        save_tokenizer(TOKENIZER, Path(f"model{seed}"))
    measure.main(["model0", "model1", "--prompts", "made/prompts_test.jsonl", "--max_response", "4", "--out", "m.json"])
    found = json.loads(Path("m.json").read_text())
    n = len(read_prompts("made/prompts_test.jsonl"))
    assert all(found[name]["positive"]["n"] == n and found[name]["perplexity_plain"]["n"] >= 40 for name in found)
    assert found["model0"]["perplexity_plain"] != found["model1"]["perplexity_plain"]
    assert found["model0"]["length"]["value"] <= 4


def test_the_plain_sentences_are_about_no_film():
    sentences = (measure.HERE / "plain.txt").read_text().splitlines()
    assert len(set(sentences)) >= 40 and not any(map(measure.about_films, sentences))


# ---- what labels are worth -------------------------------------------------------------------------------------------

def test_states_are_those_of_each_text_alone_without_its_prompt(tmp_path):
    model, texts = tiny_gpt2(V=257, n_positions=64), ["good", "a longer text", "b"]
    save_pretrained(model, tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    found = labels.frozen_states(tmp_path, texts)
    prompt = list(b"Movie review:")
    del model.h[1:]
    for text, state in zip(texts, found, strict=True):
        hidden = model(torch.tensor([prompt + list(f" {text}".encode()) + [256]]))[0, len(prompt):]
        np.testing.assert_allclose(state, hidden.mean(0).detach(), atol=1e-5)


def test_a_preference_that_is_in_the_states_is_learned(source, monkeypatch):
    monkeypatch.setattr(labels, "TEST_BLOCKS", 8)
    sentences = prepare.read_sentences(source)
    noise = np.random.default_rng(0).standard_normal((len(sentences), 8))
    told = labels.World(sentences, np.c_[[sentence.ratings[0] for sentence in sentences], noise])
    untold = labels.World(sentences, noise)
    for condition in (labels.Condition(40), labels.Condition(10, k=8, raters=5, within=False),
                      labels.Condition(40, people="not worst", sentences="not disputed")):
        assert labels.measure(told, condition, 1)["accuracy"] > 0.9
        assert 0.4 < labels.measure(untold, condition, 1)["anywhere"] < 0.6


def test_kappas_are_cohens(source):
    verdicts = labels.verdicts_of(prepare.read_sentences(source)[:30])
    found = labels.kappas(verdicts)
    for a, b in combinations(range(len(verdicts)), 2):
        assert found[a, b] == pytest.approx(cohen_kappa(verdicts[a].tolist(), verdicts[b].tolist()))


def test_the_guide_has_the_tables_that_the_rows_give():
    rows, guide = labels.read_results(labels.ROWS), labels.GUIDE.read_text(encoding="utf-8")
    used = {name for table in labels.tables().values() for pair in table.rows.values() for name in pair}
    assert used == set(labels.CONDITIONS)
    seen = [(row["condition"], row["seed"]) for row in rows]
    assert sorted(seen) == sorted([(name, seed) for name in used for seed in labels.SEEDS] + [("people", 0)])
    assert labels.written(guide, rows) == guide, "run `python data/films/labels.py write`"


# ---- the real archives -----------------------------------------------------------------------------------------------

@real_data
def test_a_place_in_the_lists_of_a_block_is_one_person():
    sentences = prepare.read_sentences(REAL)
    lengths = [len(sentence.ratings) for sentence in sentences]
    residuals = [np.array(sentence.ratings) - sentence.mean for sentence in sentences]
    assert len(sentences) == 10_605 and {min(lengths), max(lengths)} == {15, 29}
    assert all(i % 30 == 0 for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1])
    steps = [(i, j) for i, j in zip(range(10_604), range(1, 10_605)) if lengths[i] == lengths[j]]
    inside, across = ([step for step in steps if (step[1] % 30 == 0) == ends] for ends in (False, True))

    def correlation(pairs, turn=0):
        first, second = zip(*((residuals[i], np.roll(residuals[j], turn)) for i, j in pairs))
        return np.corrcoef(np.concatenate(first), np.concatenate(second))[0, 1]

    assert correlation(inside) == pytest.approx(0.34, abs=0.01)
    assert abs(correlation(across)) < 0.06 and abs(correlation(inside, turn=1)) < 0.06


@real_data
def test_people_agree_and_blocks_are_of_one_kind():
    world = labels.World(prepare.read_sentences(REAL), np.zeros((10_605, 1)))
    people = json.loads(labels.ROWS.read_text().splitlines()[-1])
    for name, estimate in labels.agreement(world).items():
        assert estimate.value == pytest.approx(people[name]["value"], abs=1e-3)
    kinds = [np.mean([sentence.mean > 0 for sentence in own]) for own in labels.by_block(world.sentences).values()]
    assert np.mean([abs(kind - 0.5) > 0.3 for kind in kinds]) > 0.95


@real_data
def test_film_words_are_those_of_films():
    shares = [np.mean([measure.about_films(sentence.text) for sentence in prepare.read_sentences(REAL, name)])
              for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")]
    assert shares[0] > 0.5 and max(shares[1:]) < 0.1


@pytest.mark.slow
@real_data
def test_the_lexicon_agrees_with_vader():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    sentences, rated = prepare.read_sentences(REAL), lexicon.ratings(REAL)
    ours, theirs = (np.array([score(sentence.text) for sentence in sentences]) for score in (
        lambda text: lexicon.compound(text, rated), lambda text: vader.polarity_scores(text)["compound"]))
    assert np.corrcoef(ours, theirs)[0, 1] > 0.98                               # measured: 0.984
    assert abs(np.mean(ours >= 0.05) - np.mean(theirs >= 0.05)) < 0.005


# ---- OpenAssistant ---------------------------------------------------------------------------------------------------

def message(role, text, *replies, rank=None):
    return {"role": role, "text": text, "replies": list(replies), "rank": rank, "synthetic": False}


def test_ranked_replies_become_comparisons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow = message("prompter", "Why?", message("assistant", "B", rank=1), message("assistant", "A", rank=0))
    replies = [message("assistant", "Worse", rank=2), message("assistant", "Best", follow, rank=0),
               message("assistant", "Unranked"), message("assistant", "Middle", rank=1)]
    trees = [{"message_tree_id": f"tree {i}", "prompt": message("prompter", f"Question {i}", *replies)}
             for i in range(4)]
    Path("trees.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    openassistant.main(["--source", "trees.jsonl", "--out", "made", "--heldout", "0.25"])
    train, test = (read_comparisons(f"made/comparisons{part}.jsonl") for part in ("", "_test"))
    assert len(train) == 6 and len(test) == 2
    first, second = (row for row in test)
    assert first.prompt.startswith("\n\nHuman: Question") and first.prompt.endswith("\n\nAssistant:")
    assert (first.responses, first.ranks) == ((" Worse", " Best", " Middle"), (3, 1, 2))
    assert second.prompt == first.prompt + " Best\n\nHuman: Why?\n\nAssistant:" and second.ranks == (2, 1)
    assert {row.responses[0] for row in read_demonstrations("made/demonstrations.jsonl")} == {" Best", " A"}
    with pytest.raises(SystemExit):
        Path("trees.jsonl").write_text('{"message_tree_id": "x", "prompt": {"text": "a"}}\n')
        run_main(lambda: openassistant.main(["--source", "trees.jsonl"]))


@pytest.mark.skipif(not REAL.with_name("oasst_en_100_tree.jsonl").is_file(), reason="no $MINIRLHF_REAL_DATA")
def test_real_trees(tmp_path):
    openassistant.main(["--source", str(REAL.with_name("oasst_en_100_tree.jsonl")), "--out", str(tmp_path / "made")])
    rows = [row for part in ("", "_test") for row in read_comparisons(tmp_path / f"made/comparisons{part}.jsonl")]
    sizes = [len(row.ranks) for row in rows]
    assert len(rows) == 212 and (min(sizes), max(sizes)) == (2, 9)
    assert sum(size * (size - 1) // 2 for size in sizes) == 754
