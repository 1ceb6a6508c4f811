"""A lexicon as the reward, or as a judge: how positive the words of a response are, by the rules of VADER.

    python train_ppo.py --reward data/films/lexicon.py:lexicon ...

VADER (Hutto and Gilbert 2014) is a list of about 7,500 words and emoticons, each rated by ten people, and a few rules
for the words around them. The list is in the archive that prepare.py downloads. Left out are words in capitals, idioms
("the bomb"), question marks, "least", "without doubt", and the words of degree beyond those below.
"""

import functools
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.films.prepare import archive, table

MORE = set("absolutely amazingly completely considerably decidedly deeply enormously entirely especially exceptionally "
           "extremely fully greatly highly hugely incredibly intensely majorly more most particularly purely quite "
           "really remarkably so substantially thoroughly totally tremendously truly unbelievably unusually utterly "
           "very".split())
LESS = set("almost barely hardly kinda less little marginally occasionally partly scarcely slightly somewhat".split())
NOT = set("aint cannot neither never no nobody none nope nor not nothing nowhere without rarely seldom despite".split())
DEGREE, NEGATION, EXCLAMATION = 0.293, -0.74, 0.292     # (Hutto and Gilbert 2014)
FADING = (1, 0.95, 0.9)                 # what a word that is 1, 2 or 3 places before does to a degree


@functools.cache
def ratings(source=None):
    """{word: the mean of ten people's ratings, -4 to 4}"""
    return {word: float(mean) for word, mean, *_ in table(archive(source), "vader_sentiment_lexicon.txt")}


def is_negation(word):
    return word in NOT or word.endswith("n't")


def strength(words, i, rated):
    """What word i adds, after the three words before it have made it stronger, weaker, or its opposite."""
    value = rated.get(words[i], 0.0)
    before = words[max(0, i - 3):i][::-1]
    if not value or words[i] in MORE | LESS or words[i] == "no" and rated.keys() & words[i + 1:i + 2]:
        return 0.0                                      # "no" is a bad word by itself, but in "no fun" it only negates
    for word, fading in zip(before, FADING):
        if word not in rated and (word in MORE or word in LESS):
            value += math.copysign(DEGREE * fading, value) * (1 if word in MORE else -1)
    return value * NEGATION ** sum(map(is_negation, before))


def compound(text, rated):
    """-1 (negative) to 1 (positive): the sum of all strengths, squeezed as VADER does. Above 0.05 is positive, below
    -0.05 is negative."""
    words = [piece if piece in rated else re.sub(r"^\W+|\W+$", "", piece) for piece in text.lower().split()]
    values = [strength(words, i, rated) for i in range(len(words))]
    if "but" in words:                                  # what follows it counts more than what comes before
        at = words.index("but")
        values = [0.5 * value for value in values[:at]] + [1.5 * value for value in values[at:]]
    total = sum(values)
    if total:
        total += math.copysign(EXCLAMATION * min(4, text.count("!")), total)
    return total / math.sqrt(total**2 + 15)


def lexicon(prompts, responses):
    """A reward function: the compound of each response. What the prompt says is no merit of the response."""
    return [compound(response, ratings()) for response in responses]
