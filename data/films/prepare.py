"""Sentences of film reviews, each rated by 15 to 29 people -> demonstrations, comparisons and prompts.

    python data/films/prepare.py [--source FILE] [--raters N] [--within] [--seed 1] [--out out/data/films]

Without --source this downloads hutto_ICWSM_2014.tar.gz (2.3 MB, MIT): 10,605 sentences with every single rating, from
-4 to 4 (Hutto and Gilbert 2014). The sentences come from reviews that Pang and Lee collected (2005).

The archive does not name the raters, but sentences were rated in blocks of 30, and within a block the same place in
the lists of ratings is the same person. So a rater is a block and a place. The blocks are dealt out to four sets, and
no two files share a block, a sentence or a rater:

    demonstrations       "Movie review:" and the first 4 to 7 words of a sentence; the rest is the response
    comparisons          whole sentences after "Movie review:", four to a ranking
    comparisons_judge    the same from other blocks: for a second reward model, which judges and never trains
    prompts              as those of the demonstrations, for PPO

Each has a _test file. Ranks come from the mean of N raters of a sentence's block, drawn by seed (default: all of them).
Responses less than half a point below the best of a rank share that rank. Three fields are extra: "gold", the mean of
all raters for each response, "ratings", what each of the N gave it, and "blocks", the block of each response.

--within makes every ranking of sentences of one block, so that the same people rated all four. The archive has its
positive reviews first and its negative ones last, so nearly every block is of one kind, and such a ranking is mostly
of four praises or four complaints: the sign of a sentence is hardly ever compared (data/README.md has the cost).
"""

import html
import json
import random
import re
import shutil
import statistics
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.common import arguments, fetch, split, write_folder
from minirlhf.files.download import cache_folder, sha256_of
from minirlhf.files.errors import require, run_main
from minirlhf.files.jsonl import keep

URL = ("https://raw.githubusercontent.com/cjhutto/vaderSentiment/master/additional_resources/"
       "hutto_ICWSM_2014.tar.gz")
NAME = "films/hutto_ICWSM_2014.tar.gz"                    # in the cache
SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
BLOCK, K, TIE = 30, 4, 0.5 - 1e-9       # sentences in a block, responses in a ranking, points (and rounding)
PROMPT = "Movie review:"
FEWEST_WORDS = 8                        # of a sentence that is cut into prompt and response
CHANGED = ("UTF-8, not latin-1; &amp; is &, '' is \", ` is ', three or more spaces are \" - \" (a dash was lost), "
           "other runs of spaces are one. Hyphens were lost too, and stay lost: \"low key\"")


# ---- the archive -----------------------------------------------------------------------------------------------------

def archive(source=None):
    """The path of the archive: a file that the user has, or that of the cache, downloaded on first use.

    A file that the user has is copied to the cache, where lexicon.py looks for its words.
    """
    path, cached = source or fetch(URL, NAME), cache_folder() / "data" / NAME
    require(sha256_of(path) == SHA256, f"{path}: this is not the archive of Hutto and Gilbert (2014), whose sha256 is "
                                       f"{SHA256}. Remove it, and run this again to download it")
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, cached)
    return path


def table(path, name):
    """The lines of a file of the archive, split at their tabs."""
    with tarfile.open(path) as archived:
        content = archived.extractfile(f"hutto_ICWSM_2014/{name}").read()
    return [line.split("\t") for line in content.decode(errors="replace").splitlines()]   # one emoticon is latin-1


def tidy(text):
    """Ordinary English from a text of the archive. CHANGED says what is done."""
    text = html.unescape(text).replace("''", '"').replace("`", "'")
    return re.sub(r"\s+", " ", re.sub(r"\s{3,}", " - ", text)).strip()


class Sentence(NamedTuple):
    block: int                          # from 1
    text: str
    ratings: tuple                      # of each rater of the block, -4 to 4

    @property
    def mean(self):
        return statistics.fmean(self.ratings)


def read_sentences(path, name="movieReviewSnippets"):
    """All sentences of one of the archive's four collections, in its order."""
    texts, ratings = (table(path, f"{name}_{part}.txt") for part in ("GroundTruth", "anonDataRatings"))
    return [Sentence(1 + i // BLOCK, tidy(text[-1]), tuple(json.loads(rating[-1])))
            for i, (text, rating) in enumerate(zip(texts, ratings, strict=True))]


# ---- rows ------------------------------------------------------------------------------------------------------------

def block_of(sentence):
    return sentence.block


def demonstration(sentence, rng):
    """A sentence cut after 4 to 7 words, or the reason to drop it."""
    words, cut = sentence.text.split(" "), rng.randint(4, 7)
    if len(words) < FEWEST_WORDS:
        return f"no demonstration or prompt: fewer than {FEWEST_WORDS} words"
    return {"prompt": " ".join([PROMPT, *words[:cut]]), "response": " " + " ".join(words[cut:]),
            "block": sentence.block}


def demonstrations(sentences, seed, counts):
    rng = random.Random(seed)
    return keep((demonstration(sentence, rng) for sentence in sentences), counts)


def ranks_of(scores):
    """1 is the best. Whoever is less than half a point below the best of a rank shares it."""
    tops = []
    for score in sorted(scores, reverse=True):
        if not tops or tops[-1] - score >= TIE:
            tops.append(score)
    return [sum(top >= score for top in tops) for score in scores]


def ranking(group, raters):
    """A comparison of some sentences by the raters {block: places}, or the reason to drop it."""
    ratings = [{f"block {sentence.block}, rater {1 + place}": sentence.ratings[place]
                for place in raters[sentence.block]} for sentence in group]
    ranks = ranks_of([statistics.fmean(own.values()) for own in ratings])
    if max(ranks) == 1:
        return "no comparison: all responses are tied"
    return {"prompt": PROMPT, "responses": [" " + sentence.text for sentence in group], "ranks": ranks,
            "gold": [round(sentence.mean, 4) for sentence in group], "blocks": [sentence.block for sentence in group],
            "ratings": ratings}


def draw_raters(sentences, n, seed):
    """{block: the places of n raters}, of all of them if n is None. The same seed gives a block the same raters."""
    people = {sentence.block: len(sentence.ratings) for sentence in sentences}
    for block, most in people.items():
        require(n is None or 1 <= n <= most,
                f"--raters must be from 1 to {most}, not {n}: that is how many people rated block {block}")
    return {block: sorted(random.Random(f"{seed} {block}").sample(range(most), n or most))
            for block, most in people.items()}


def groups_of(sentences, k, within, rng):
    """Sentences in random order, k at a time; within: all of one block. What is left over is in no group."""
    shuffled = rng.sample(sentences, len(sentences))
    pools = [shuffled]
    if within:
        blocks = sorted(set(map(block_of, shuffled)))
        pools = [[sentence for sentence in shuffled if sentence.block == block] for block in blocks]
    groups = [pool[i:i + k] for pool in pools for i in range(0, len(pool) - k + 1, k)]
    return rng.sample(groups, len(groups))


def comparisons(sentences, args, counts):
    raters = draw_raters(sentences, args.raters, args.seed)
    groups = groups_of(sentences, K, args.within, random.Random(args.seed))
    return keep((ranking(group, raters) for group in groups), counts)


# ---- the sets --------------------------------------------------------------------------------------------------------

def without_repeats(sentences, counts):
    first = {sentence.text: sentence for sentence in reversed(sentences)}
    counts["dropped: a sentence that came before"] += len(sentences) - len(first)
    return [sentence for sentence in sentences if first[sentence.text] is sentence]


def four_sets(sentences, heldout, seed):
    """Deals out the blocks: four times (training sentences, test sentences)."""
    blocks = sorted(set(map(block_of, sentences)))
    require(len(blocks) >= 8, f"{len(blocks)} blocks are too few for four sets with test files")
    random.Random(seed).shuffle(blocks)
    quarters = [set(blocks[i::4]) for i in range(4)]
    return [split([sentence for sentence in sentences if sentence.block in quarter], heldout, seed, key=block_of)
            for quarter in quarters]


def without_tested(train, test, tested, counts):
    """Two people can begin a sentence with the same words. Such prompts stay in the test files only."""
    kept = [row for row in train if row["prompt"] not in tested]
    counts["dropped: the prompt is also in a test file"] += len(train) - len(kept)
    return kept, test


def main(argv=None):
    parser = arguments(__doc__.splitlines()[0], "out/data/films", heldout=0.15)
    parser.add_argument("--raters", type=int, metavar="N", help="how many people's ratings make the ranks [all]")
    parser.add_argument("--within", action="store_true", help="every ranking of sentences that the same people rated")
    args, counts = parser.parse_args(argv), Counter(read=0)
    source = archive(args.source)
    everything = read_sentences(source)
    sentences = without_repeats(everything, counts)
    shown, ranked, judged, asked = four_sets(sentences, args.heldout, args.seed)
    shown, asked = ([demonstrations(part, args.seed, counts) for part in pair] for pair in (shown, asked))
    ranked, judged = ([comparisons(part, args, counts) for part in pair] for pair in (ranked, judged))
    tested = {row["prompt"] for rows in (shown[1], asked[1]) for row in rows}
    splits = {"demonstrations": without_tested(*shown, tested, counts), "comparisons": ranked,
              "comparisons_judge": judged, "prompts": without_tested(*asked, tested, counts)}
    splits["prompts"] = [[{name: row[name] for name in ("prompt", "block")} for row in rows]
                         for rows in splits["prompts"]]
    counts["read"] = len(everything)
    meta = {"template": PROMPT + " {instruction}", "licence": "MIT, Hutto and Gilbert 2014; sentences of reviews that "
            "Pang and Lee collected (2005)", "changed": CHANGED, "raters": args.raters or "all",
            "within": args.within, "heldout": args.heldout, "seed": args.seed}
    write_folder(args.out, splits, meta, [source], counts)


if __name__ == "__main__":
    run_main(main)
