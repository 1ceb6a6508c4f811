"""What people are shown: prompts, and answers that are read from a file or sampled when somebody needs them."""

import re
from collections import namedtuple
from pathlib import Path

from minirlhf.answers import parse_stop, respond
from minirlhf.data import encode_prompt, read_comparisons
from minirlhf.files.jsonl import field, finished_field, is_list_of, read_jsonl, text, text_field
from minirlhf.files.json_files import read_json
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.generate import decode, generator
from minirlhf.files.errors import require
from minirlhf.tools.feedback.votes import item_id
from minirlhf.weights import from_pretrained

MOST = 9            # answers to a prompt: the keys are 1 to 9
ROUNDS = 4          # how often sampling is repeated for a prompt if answers have the same text


Policy = namedtuple("Policy", "name model tokenizer")


def load_policies(folders, device):
    return [Policy(str(Path(folder)), from_pretrained(folder).to(device).eval(), load_tokenizer(folder))
            for folder in folders]


# ---- the instruction inside a prompt ---------------------------------------------------------------------------------

def find_templates(prompts, folders):
    """The templates of a data set: in meta.json beside its prompts, or in the run.json of a policy trained on it."""
    files = [Path(prompts).parent / "meta.json", *(Path(folder) / "run.json" for folder in folders)]
    return [value for file in files if file.exists() for name, value in read_json(file).items()
            if name.startswith("template") and isinstance(value, str)]


def instruction_of(prompt, templates):
    """What fills the slots, like {instruction}, of the first template that fits the prompt. Else the whole prompt."""
    for template in templates:
        parts = re.split(r"\{\w+\}", template)
        found = re.fullmatch("(.*)".join(map(re.escape, parts)), prompt, re.DOTALL)
        if found and found.groups():
            return "\n\n".join(found.groups())
    return prompt


SPEAKERS = [r"(?:^|\n\n)(Human|Assistant):[ \t]*",                 # HH-RLHF: an empty line before each turn
            r"(?:^|\n)(Human|User|Assistant|AI|Bot|System):[ \t]*"]
PEOPLE, MACHINES = {"Human", "User"}, {"Assistant", "AI", "Bot"}


def turns_of(prompt, templates):
    """A dialogue -> [(speaker, what was said), ...]. [] where the prompt is no dialogue.

    The last "Assistant:", after which the answers begin, is left out. What comes before the first turn has no speaker.
    A template is looked through only if the prompt does not begin with a speaker, because the template of a dialogue
    could also be found around all of its turns.
    """
    for pattern in SPEAKERS:
        whole = re.match(pattern, prompt)
        start, *rest = re.split(pattern, prompt if whole else instruction_of(prompt, templates))
        speakers = rest[::2]
        if PEOPLE & set(speakers) and MACHINES & set(speakers):
            turns = zip(["", *speakers], [start, *rest[1::2]])
            return [(speaker, said.strip()) for speaker, said in turns if said.strip()]
    return []


def title_of(prompt, templates):
    """The last turn, or the beginning of the instruction: enough to recognise a prompt in a list."""
    turns = turns_of(prompt, templates)
    return (turns[-1][1] if turns else instruction_of(prompt, templates)).strip()[:300]


# ---- answers from a file ---------------------------------------------------------------------------------------------

def read_items(path):
    """The items of a file whose rows have answers: comparisons in any form, whose verdicts are ignored, or rows
    {"prompt", "responses": [...]}. Prints how many rows have fewer than two different answers and are left out."""
    items, alike = {}, 0
    for where, value in read_jsonl(path):
        item = given_item(value, where)
        require(len(item["responses"]) <= MOST, f"{where}: more than {MOST} different answers, too many for the page")
        alike += len(item["responses"]) < 2
        items[item["item"]] = item              # several people's votes on the same answers are one item
    if alike:
        print(f"{path}: left out {alike} rows with fewer than two different answers")
    found = [item for item in items.values() if len(item["responses"]) > 1]
    require(found, f"{path}: no row has two different answers")
    return found


def given_item(value, where):
    prompt = text_field(value, "prompt", where, allow_empty=False)
    names = [name for name in ("chosen", "rejected") if name in value]
    texts = [value[name] for name in names] or field(value, "responses", where)
    require(isinstance(texts, list), f"{where}: responses must be a list of texts")
    K = len(texts)
    models = value["models"] if is_list_of(str, value.get("models"), K) else []
    first = {text(texts[k], "response", where): k for k in reversed(range(K))}      # equal texts are one answer
    kept, finished = sorted(first.values()), finished_field(value, K, where)
    responses = [texts[k] for k in kept]
    return {"item": item_id(prompt, responses), "prompt": prompt, "responses": responses,
            "finished": [finished[k] for k in kept], "models": [models[k] for k in kept if models]}


def read_gold(path):
    """{item: an item whose right ranks are known, which are its "gold"}. No file, no items."""
    if not path:
        return {}
    rows, shown = read_comparisons(path), {item["item"]: item for item in read_items(path)}
    ranks = {item_id(row.prompt, row.responses): row.ranks for row in rows}
    require(len(rows) == len(ranks) and ranks.keys() == shown.keys() and all(len(set(each)) > 1 for each in ranks.values()),
            f"{path}: a gold item has one row, with different answers, of which one is better")
    return {name: shown[name] | {"gold": ranks[name]} for name in ranks}


# ---- sampling --------------------------------------------------------------------------------------------------------

def sample(policy, prompt, n, rng, args):
    """n answers with different texts -> {text: finished}. Fewer if the model keeps repeating itself."""
    prompts, answers = [encode_prompt(policy.tokenizer, prompt)] * n, {}
    stop = parse_stop(args.stop, policy.tokenizer)
    for _ in range(ROUNDS):
        for ids, finished in respond(policy.model, prompts, args.max_response, stop, rng, args.temperature):
            answers.setdefault(decode(policy.tokenizer, ids), finished)
        if len(answers) >= n:
            break
    return dict(list(answers.items())[:n])


class Sampler:
    """Makes one item per prompt, in the order of the prompts, each when the first person needs it.

    An item is {"item", "prompt", "responses", "finished", "models"}. It is written to its file before anyone sees it,
    so everyone sees the same answers, also after a restart.
    """

    def __init__(self, prompts, policies, K, journal, args):
        self.prompts, self.policies, self.K, self.args, self.journal = prompts, policies, K, args, journal
        names = {policy.name for policy in policies}
        for row, prompt in zip(journal.rows, prompts):
            require(row.get("prompt") == prompt and set(row.get("models", [])) <= names,
                    f"{journal.path} was sampled from other prompts or models; give --out another name")
        self.items = journal.rows[:len(prompts)]

    def add_item(self):
        """Samples the answers to the next prompt -> whether there was one."""
        if len(self.items) == len(self.prompts):
            return False
        item = self.make_item(len(self.items))
        self.journal.append(item)
        self.items.append(item)
        return True

    def make_item(self, index):
        prompt, responses, finished, models = self.prompts[index], [], [], []
        for i, policy in enumerate(self.policies):
            n = len(range(i, self.K, len(self.policies)))   # the policies take turns until there are K answers
            answers = sample(policy, prompt, n, generator(self.args.seed, 11, index, i), self.args)
            responses += answers.keys()
            finished += answers.values()
            models += [policy.name] * len(answers)
        return {"item": item_id(prompt, responses), "prompt": prompt, "responses": responses, "finished": finished,
                "models": models}


class Given(Sampler):
    """Items that are all there from the start."""

    def __init__(self, items):
        self.prompts, self.items = [item["prompt"] for item in items], items
        self.K = max(len(item["responses"]) for item in items)
