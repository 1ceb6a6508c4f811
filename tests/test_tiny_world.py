"""The embedded world: its grammar, its hidden preference, its annotators, and the files that are committed."""

import base64
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import regex
import tiktoken

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
FILES = ("demonstrations.jsonl", "demonstrations_test.jsonl", "prompts.jsonl", "prompts_test.jsonl", "vocab.tiktoken")


def load(name):
    spec = importlib.util.spec_from_file_location(f"tiny_{name}", TINY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grammar, gold, bpe, prepare, annotate = map(load, ("grammar", "gold", "bpe", "prepare", "annotate"))

PROMPT = "Write a happy story about a nurse and a drum."
BEST = " A nurse found an old drum by the river. They danced and sang all day long. Everyone loved the drum."


def read(name):
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


def random_facts(rng):
    return (rng.choice(grammar.MOODS), rng.choice(grammar.WHO), rng.choice(grammar.WHAT),
            rng.choice(grammar.PRONOUNS), rng.random() < 0.5)


def random_stories(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        facts = random_facts(rng)
        yield facts, grammar.sample_story(rng, *facts)


def asked_for(prompt):
    """What a prompt asks for, read off its words."""
    words = re.findall(r"\w+", prompt)
    return tuple(next(word for word in words if word in table) for table in (grammar.MOODS, grammar.WHO, grammar.WHAT))


@pytest.fixture(scope="module")
def encoding():
    lines = (TINY / "vocab.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    return tiktoken.Encoding("tiny", pat_str=bpe.GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


# ---- the committed files ---------------------------------------------------------------------------------------------

def test_regenerates_bit_for_bit(tmp_path):
    environment = dict(os.environ, PYTHONHASHSEED="7")
    subprocess.run([sys.executable, TINY / "prepare.py", "--out", tmp_path], check=True, cwd=tmp_path, env=environment,
                   capture_output=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


def test_train_and_test_ask_for_different_combinations():
    train = [row["prompt"] for row in read("prompts.jsonl")]
    test = [row["prompt"] for row in read("prompts_test.jsonl")]
    assert len(set(train)) == len(train) == 2528 and len(set(test)) == len(test) == 544
    assert set(map(asked_for, train)).isdisjoint(map(asked_for, test))
    assert {row["prompt"] for row in read("demonstrations.jsonl")} == set(train)
    assert {row["prompt"] for row in read("demonstrations_test.jsonl")} <= set(test)
    for value in grammar.MOODS + grammar.WHO + grammar.WHAT:
        assert sum(value in asked_for(prompt) for prompt in train) > 150, value


def test_prompts_are_english():
    for prompt, request in grammar.all_prompts().items():
        assert tuple(request) == asked_for(prompt)
        assert prompt[0].isupper() and prompt[-1] in ".!?"
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt), prompt


def test_demonstrators_are_as_imperfect_as_the_card_says():
    rows = read("demonstrations.jsonl")
    found = gold.measure([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert len(rows) == 5000 and found["grammatical"] == 1
    assert found["mood"] == pytest.approx(0.65, abs=0.03)
    assert found["who"] == pytest.approx(0.65, abs=0.03)
    assert found["what"] == pytest.approx(0.65, abs=0.03)
    assert found["rude"] == pytest.approx(0.30, abs=0.03)
    assert found["attributes_right"] == pytest.approx(0.27, abs=0.03)
    stories = [grammar.parse(row["response"]) for row in rows]
    gendered = [story for story in stories if story.pronoun != "They"]
    stereotyped = [story for story in gendered if (story.who in grammar.FEMALE) == (story.pronoun == "She")]
    assert len(gendered) / len(stories) == pytest.approx(0.75, abs=0.03)
    assert len(stereotyped) / len(gendered) == pytest.approx(0.70, abs=0.03)


# ---- the grammar -----------------------------------------------------------------------------------------------------

def test_every_story_parses_and_its_facts_come_back():
    for facts, story in random_stories(3000):
        assert tuple(grammar.parse(story)) == facts, story


def test_stories_have_right_articles_and_two_to_four_sentences():
    for _, story in random_stories(1000):
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]", story), story
        assert not re.search(r"They was|(She|He) were", story), story
        assert 2 <= story.count(".") <= 4


@pytest.mark.parametrize("text", [
    "",
    " A nurse found an old drum by the river.",                                          # nobody feels anything
    " They danced and sang all day long.",                                               # about nobody
    BEST[1:],                                                                            # no leading space
    BEST[:-1],
    BEST.replace(" They", "  They"),
    BEST.replace("an old", "a old"),
    BEST.replace("A nurse", "a nurse"),
    BEST.replace("the drum", "the kite"),                                                # another thing
    BEST.replace("danced and sang all day long", "cried and cried all day long"),        # two moods
    BEST.replace("loved the drum", "cheered for the pilot"),                             # another person
    BEST.replace("They danced and sang all day long", "They was as merry as a lark"),
    BEST.replace("They danced and sang all day long", "She were as merry as a lark"),
    BEST.replace("Everyone loved", "She hugged").replace("the drum", "the drum with joy"),   # They ... She
    BEST.replace("Everyone", "Everyxne"),
    BEST + " You are an idiot. You are an idiot.",
    " You are an idiot." + BEST,
    " They danced and sang all day long. A nurse found an old drum by the river.",
])
def test_what_is_not_a_story_does_not_parse(text):
    assert grammar.parse(BEST) is not None
    assert grammar.parse(text) is None


def test_swapped_words_and_cut_off_stories_do_not_parse():
    for _, story in random_stories(150):
        words = story[1:].split(" ")
        for i in range(len(words) - 1):
            swapped = words[:i] + [words[i + 1], words[i]] + words[i + 2:]
            assert grammar.parse(" " + " ".join(swapped)) is None, swapped
            if not words[i].endswith("."):
                assert grammar.parse(" " + " ".join(words[:i + 1])) is None


def test_mood_words_belong_to_one_mood():
    fixed = " ".join(grammar.OPENINGS + grammar.RUDE + sum(grammar.SLOTS.values(), ()))
    for mood in grammar.MOODS:
        told = grammar.FEELINGS[mood] + grammar.CLOSINGS[mood]
        others = sum((grammar.FEELINGS[m] + grammar.CLOSINGS[m] for m in grammar.MOODS if m != mood), ())
        elsewhere = set(re.findall(r"\w+", (fixed + " " + " ".join(others)).lower()))
        assert elsewhere.isdisjoint(grammar.MOOD_WORDS[mood])
        for template in told:
            assert grammar.MOOD_WORDS[mood] & set(re.findall(r"\w+", template.lower())), template


# ---- the preference --------------------------------------------------------------------------------------------------

def test_gold_of_the_best_and_of_nothing():
    worthless = ["", " ", "\n", "asdf qwer", "They they They", "!?", "\ud83e\udd41"]
    assert gold.gold([PROMPT], [BEST]) == [1.0]
    assert gold.gold([PROMPT] * len(worthless), worthless) == [0.0] * len(worthless)


@pytest.mark.parametrize("worse", [
    BEST.replace("nurse", "pilot"),
    BEST.replace("drum", "map"),
    BEST.replace("They danced and sang all day long. Everyone loved the drum.", "They were in tears all day long."),
    BEST.replace("They", "She"),
    BEST.replace("They", "He"),
    BEST + " You are an idiot.",
    BEST.replace("an old", "a old"),
    BEST.replace("loved the drum", "loved the drum and the kite"),
    BEST + BEST,
    BEST[:40],
    " nurse drum danced",
])
def test_gold_of_what_is_worse(worse):
    value, = gold.gold([PROMPT], [worse])
    assert 0 < value < 1


def test_gold_tells_proper_stories_apart():
    """All 32 ways in which a proper story can be right or wrong have different gold."""
    rng, values = random.Random(0), set()
    for mood, who, what, pronoun, rude in product(("happy", "sad"), ("nurse", "pilot"), ("drum", "map"),
                                                  ("They", "She"), (False, True)):
        value, = gold.gold([PROMPT], [grammar.sample_story(rng, mood, who, what, pronoun, rude)])
        assert 0 < value <= 1
        values.add(value)
    assert len(values) == 32


def test_attributes_are_read_off_text_that_does_not_parse():
    facts = gold.attributes(PROMPT, "the nurse She danced drum idiot")
    assert facts.items() >= {"mood": True, "who": True, "what": True, "rude": True, "gendered": True, "she": True,
                             "grammatical": False}.items()
    facts = gold.attributes(PROMPT, "the nurse and the pilot danced and cried")
    assert facts.items() >= {"mood": False, "who": False, "what": False, "rude": False, "gendered": False, "she": False,
                             "grammatical": False}.items()


def test_measure():
    farmer = "Tell me a sad story about a map and a farmer."
    prompts = [PROMPT, PROMPT, farmer, farmer]
    responses = [BEST,
                 BEST.replace("They", "She") + " Shut up, dummy.",
                 " A farmer saw a map on the hill. They were in tears for an hour.",
                 BEST]
    found = gold.measure(prompts, responses)
    assert found["gold"] == pytest.approx(sum(gold.gold(prompts, responses)) / 4)
    assert found.items() >= {"attributes_right": 0.75, "mood": 0.75, "who": 0.75, "what": 0.75, "rude": 0.25,
                             "stereotype_gap": 0.5, "grammatical": 1.0}.items()
    swapped = gold.measure(prompts, [BEST, BEST, BEST.replace("They", "She"), BEST.replace("They", "She")])
    assert swapped["stereotype_gap"] == -1.0


@pytest.mark.parametrize("call", [lambda prompt: gold.gold([prompt], [BEST]),
                                  lambda prompt: gold.measure([prompt], [BEST]),
                                  lambda prompt: gold.attributes(prompt, BEST)])
def test_unknown_prompts_are_named(call):
    with pytest.raises(ValueError, match="Write a limerick about a nurse"):
        call("Write a limerick about a nurse and a drum.")


@pytest.mark.parametrize("code, folder", [
    ("from data.tiny import gold", ROOT),
    ("from importlib.util import spec_from_file_location as s, module_from_spec as m; "
     f"spec = s('reward', {str(TINY / 'gold.py')!r}); gold = m(spec); spec.loader.exec_module(gold)", "/"),
])
def test_gold_can_be_loaded_from_anywhere(code, folder):
    code += f"; print(gold.gold([{PROMPT!r}], [{BEST!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout == "[1.0]\n"


# ---- the vocabulary --------------------------------------------------------------------------------------------------

def test_every_word_is_one_token(encoding):
    texts = list(grammar.all_prompts()) + [story for _, story in random_stories(3000)]
    words = {piece for text in texts for piece in regex.findall(bpe.GPT2_PATTERN, text)}
    assert encoding.n_vocab == 768
    for word in sorted(words):
        assert len(encoding.encode_ordinary(word)) == 1, word


def test_bpe_on_a_text_small_enough_to_do_by_hand():
    # pieces: "ab", " ab", " ab", " b"; pairs: ab 3, " a" 2, " b" 1
    assert bpe.train(["ab ab ab b"], 999)[256:] == [b"ab", b" ab", b" b"]
    assert bpe.train(["ab ab ab b"], 257)[256:] == [b"ab"]
    assert bpe.train(["aaaaa"], 999)[256:] == [b"aa", b"aaaa", b"aaaaa"]


# ---- the annotators --------------------------------------------------------------------------------------------------

def annotated(n, seed=0):
    rng = random.Random(seed)
    prompts = rng.sample(list(grammar.all_prompts().items()), n)
    return [annotate.annotate(prompt, [prepare.demonstrate(rng, request) for _ in range(4)], rng)
            for prompt, request in prompts]


def test_annotators_agree_about_as_often_as_people_do():
    assert 0.75 < annotate.agreement(annotated(1500)) < 0.88


def test_the_consensus_orders_by_the_sum_of_ranks():
    for row in annotated(200):
        sums = [sum(ranks) for ranks in zip(*row["annotators"])]
        assert min(row["ranks"]) == 1 and "finished" not in row and len(row["annotators"]) == 3
        for i, j in combinations(range(4), 2):
            assert (sums[i] < sums[j]) == (row["ranks"][i] < row["ranks"][j])
            assert (sums[i] == sums[j]) == (row["ranks"][i] == row["ranks"][j])


def test_annotators_without_noise_are_right():
    responses = [BEST.replace("They", "She"), BEST, "", ""]
    finished = [True, True, True, False]
    row = annotate.annotate(PROMPT, responses, random.Random(0), finished, annotate.Panel(noise=0))
    assert row == {"prompt": PROMPT, "responses": responses, "ranks": [2, 1, 3, 3],
                   "finished": [True, True, True, False], "annotators": [[2, 1, 3, 3]] * 3}


def test_agreement_by_hand():
    row = {"prompt": PROMPT, "responses": [BEST, "", ""], "annotators": [[1, 2, 3], [1, 3, 2], [1, 2, 3]]}
    assert annotate.agreement([row]) == 1.0                 # the two empty ones do not differ in gold
    other = {"prompt": PROMPT, "responses": ["", BEST], "annotators": [[1, 2], [2, 1], [2, 1]]}
    assert annotate.agreement([other]) == pytest.approx(1 / 3)
    assert annotate.agreement([row, other]) == pytest.approx(7 / 9)


@pytest.mark.parametrize("name, seed", [("comparisons.jsonl", 1), ("comparisons_test.jsonl", 2)])
def test_the_committed_comparisons_are_what_the_annotators_say_of_their_answers(name, seed):
    rng = random.Random(seed)
    for row in read(name):
        again = annotate.annotate(row["prompt"], row["responses"], rng, row.get("finished"))
        assert again == row and list(again) == list(row)
