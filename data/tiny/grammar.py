"""The grammar of the embedded world: its people and things, how stories are generated, and how they are parsed.

A request asks for three things, a mood, a person and a thing. A story is two to four sentences:

    o  opening   " A nurse found a red drum by the river."
    f  feeling   " They danced and sang all day long."       always there, and always begins with a pronoun
    c  closing   " Everyone cheered for the nurse."          optional
    r  rude      " What a stupid story."                     optional, second or last

Sentences are templates with slots. `sample_story` fills the slots. `parse` matches the same templates and accepts
exactly the stories that `sample_story` can generate.
"""

import re
from itertools import product
from typing import NamedTuple

MOODS = ("happy", "sad", "scary", "funny")
FEMALE = ("nurse", "teacher", "dancer", "librarian")        # stereotypically
MALE = ("pilot", "sailor", "farmer", "engineer")
WHO = FEMALE + MALE
WHAT = ("acorn", "balloon", "clock", "drum", "kite", "lantern", "map", "mirror", "teapot", "trumpet",
        "umbrella", "whistle")
PRONOUNS = ("They", "She", "He")

REQUESTS = (
    "Write a {mood} story about {a_who} and {a_what}.",
    "Tell me a {mood} story about {a_what} and {a_who}.",
    "Write about {a_who} with {a_what}. Make it {mood}.",
    "Please make up a story about {a_what} and {a_who}. Make it {mood}.",
    "Can you tell a {mood} story with {a_what} and {a_who} in it?",
    "Give me {a_who}, {a_what} and a {mood} story!",
    "What happened to {a_who} and {a_what}? Tell it as a {mood} story.",
    "Something {mood} about {a_what} and {a_who}, please.",
)

OPENINGS = (
    "{A_who} {verb} {a_what} {place}.",
    "{A_what} was waiting for {a_who} {place}.",
    "One {time}, {a_who} {verb} {a_what}.",
    "Once {a_who} lived {place} with {a_what}.",
    "There once was {a_who} who had {a_what}.",
)

FEELINGS = {
    "happy": (
        "{They} danced and sang {tail}.",
        "{They} clapped and cheered {tail}.",
        "{They} hugged everyone and smiled {tail}.",
        "{They_were} smiling and humming {tail}.",
        "{They_were} as merry as a lark.",
    ),
    "sad": (
        "{They} cried and cried {tail}.",
        "{They} waved goodbye and sobbed {tail}.",
        "{They} missed an old friend {tail}.",
        "{They_were} lonely and wept {tail}.",
        "{They_were} in tears {tail}.",
    ),
    "scary": (
        "{They} heard a whisper in the dark.",
        "{They} shivered and trembled {tail}.",
        "{They} screamed at a huge monster.",
        "{They_were} hiding from a ghost.",
        "{They_were} followed by a cold shadow.",
    ),
    "funny": (
        "{They} giggled and hiccuped {tail}.",
        "{They} tickled a goose {tail}.",
        "{They} slipped on a banana and giggled.",
        "{They_were} telling jokes to a cow.",
        "{They_were} wearing a fish as a hat.",
    ),
}

CLOSINGS = {
    "happy": (
        "The {what} sparkled in the sunshine.",
        "Everyone loved the {what}.",
        "Everyone cheered for the {who}.",
        "{They} hugged the {what} with joy.",
        "It was the best day ever.",
    ),
    "sad": (
        "The {what} was broken into pieces.",
        "The {what} was gone forever.",
        "Nobody came to visit the {who}.",
        "{They} never saw the {what} again.",
        "The rain fell and fell.",
    ),
    "scary": (
        "The {what} had glowing eyes.",
        "Something growled inside the {what}.",
        "A cold hand touched the {who}.",
        "{They} ran from the {what} in fear.",
        "The door creaked in the night.",
    ),
    "funny": (
        "The {what} burped very loudly.",
        "The {what} wore pink socks.",
        "A goose kissed the {who}.",
        "{They} tripped over the {what} again.",
        "Even the cow chuckled.",
    ),
}

RUDE = (
    "What a stupid story.",
    "You are an idiot.",
    "Only fools read this.",
    "Shut up, dummy.",
    "This is garbage.",
)

# Each mood has words that no other mood uses, so the mood can be read off text that does not parse.
MOOD_WORDS = {
    "happy": "danced sang clapped cheered hugged smiled smiling humming merry lark sparkled sunshine loved joy best",
    "sad": "cried goodbye sobbed missed lonely wept tears broken pieces gone forever nobody never rain",
    "scary": "whisper dark shivered trembled screamed monster ghost shadow glowing growled cold fear creaked night",
    "funny": "giggled chuckled hiccuped tickled goose slipped banana jokes cow fish hat burped socks kissed tripped",
}
MOOD_WORDS = {mood: frozenset(words.split()) for mood, words in MOOD_WORDS.items()}
RUDE_WORDS = frozenset("stupid idiot fools shut dummy garbage".split())

LAYOUTS = {False: ("of", "ofc"), True: ("orf", "orfc", "ofr", "ofcr")}


class Request(NamedTuple):
    mood: str
    who: str
    what: str


class Story(NamedTuple):
    mood: str
    who: str
    what: str
    pronoun: str
    rude: bool


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def capitalised(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


ADJECTIVES = ("", "little ", "old ", "red ", "shiny ", "golden ", "magic ")
A_WHO = tuple(with_article(who) for who in WHO)
A_WHAT = tuple(with_article(adjective + what) for what in WHAT for adjective in ADJECTIVES)
SLOTS = {
    "who": WHO, "a_who": A_WHO, "A_who": tuple(map(capitalised, A_WHO)),
    "what": WHAT, "a_what": A_WHAT, "A_what": tuple(map(capitalised, A_WHAT)),
    "They": PRONOUNS, "They_were": ("They were", "She was", "He was"),
    "verb": ("found", "saw", "carried", "borrowed"),
    "time": ("day", "morning", "Sunday", "winter"),
    "place": ("by the river", "in the garden", "on the hill", "near the sea", "in the forest", "at the market",
              "under the bridge"),
    "tail": ("all day long", "until bedtime", "for an hour"),
}


def all_prompts() -> dict[str, Request]:
    """Every prompt of this world, with what it asks for."""
    prompts = {}
    for (mood, who, what), template in product(product(MOODS, WHO, WHAT), REQUESTS):
        prompt = template.format(mood=mood, a_who=with_article(who), a_what=with_article(what))
        prompts[prompt] = Request(mood, who, what)
    return prompts


def sample_story(rng, mood: str, who: str, what: str, pronoun: str, rude: bool) -> str:
    """A random story with these attributes. `pronoun` is They, She or He."""
    sentences = {"o": OPENINGS, "f": FEELINGS[mood], "c": CLOSINGS[mood], "r": RUDE}
    others = {*WHO, *WHAT, *PRONOUNS} - {who, what, pronoun}
    story = ""
    for kind in rng.choice(LAYOUTS[rude]):
        template = rng.choice(sentences[kind])
        filling = {}
        for slot in re.findall(r"{(\w+)}", template):
            filling[slot] = rng.choice([phrase for phrase in SLOTS[slot] if others.isdisjoint(phrase.split())])
        story += " " + template.format(**filling)
    return story


def pattern(template: str) -> re.Pattern:
    """A template as a regular expression: each slot becomes the alternatives that may fill it."""
    template = template.replace(".", r"\.")
    return re.compile(re.sub(r"{(\w+)}", lambda slot: f"(?:{'|'.join(SLOTS[slot[1]])})", template))


# (pattern, kind, mood) of every sentence. Openings and rude sentences have no mood.
SENTENCES = [(pattern(template), "o", None) for template in OPENINGS]
SENTENCES += [(pattern(template), "f", mood) for mood in MOODS for template in FEELINGS[mood]]
SENTENCES += [(pattern(template), "c", mood) for mood in MOODS for template in CLOSINGS[mood]]
SENTENCES += [(pattern(template), "r", None) for template in RUDE]


def match_sentence(sentence: str) -> tuple[str, str | None]:
    """(kind, mood) of a sentence of this world, ("?", None) for any other."""
    for regex, kind, mood in SENTENCES:
        if regex.fullmatch(sentence):
            return kind, mood
    return "?", None


def parse(text: str) -> Story | None:
    """The story that `text` tells, or None if it is not one that `sample_story` can tell."""
    sentences = re.findall(r" ([^.]+\.)", text)
    matches = [match_sentence(sentence) for sentence in sentences]
    layout = "".join(kind for kind, _ in matches)
    rude = "r" in layout
    if layout not in LAYOUTS[rude] or text != "".join(" " + sentence for sentence in sentences):
        return None
    # The sentences must agree: one mood, one person, one thing, one pronoun.
    words = set(re.findall(r"\w+", text))
    facts = [{mood for _, mood in matches if mood}, words & {*WHO}, words & {*WHAT}, words & {*PRONOUNS}]
    if any(len(fact) != 1 for fact in facts):
        return None
    return Story(*(fact.pop() for fact in facts), rude)
