"""What people are shown: prompts, and answers that are sampled a few prompts before anyone asks for them."""

import json
import re
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from minirlhf.running.compute import generator
from minirlhf.running.errors import UserError
from minirlhf.generate import respond
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.feedback.votes import item_id
from minirlhf.weights import from_pretrained

AHEAD = 4           # items that are ready before anyone asks for them


class Policy(NamedTuple):
    name: str
    model: object
    tokenizer: object


def load_policies(folders, device):
    return [Policy(str(Path(folder)), from_pretrained(folder).to(device).eval(), load_tokenizer(folder))
            for folder in folders]


def find_templates(prompts, folders):
    """The templates of a data set: in meta.json beside its prompts, or in the run.json of a policy trained on it."""
    templates = []
    for file in [Path(prompts).parent / "meta.json", *(Path(folder) / "run.json" for folder in folders)]:
        try:
            values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error})") from None
        values = values if isinstance(values, dict) else {}
        templates += [value for name, value in values.items() if name.startswith("template") and isinstance(value, str)]
    return templates


def instruction_of(prompt, templates):
    """What stood in the slots, like {instruction}, of the first template that fits; else the whole prompt."""
    for template in templates:
        parts = re.split(r"\{\w+\}", template)
        found = re.fullmatch("(.*)".join(map(re.escape, parts)), prompt, re.DOTALL)
        if found and found.groups():
            return "\n\n".join(found.groups())
    return prompt


def draw(policy, prompt, n, rng, args):
    """n sampled answers, no two of the same text -> {text: finished}. Fewer if four rounds bring no more."""
    found = {}
    for _ in range(4):
        ids = [policy.tokenizer.encode_ordinary(prompt)] * n
        sampled = respond(policy.model, ids, args.max_response, policy.tokenizer.eot_token, rng, args.temperature)
        for tokens, ended in sampled:
            found.setdefault(policy.tokenizer.decode(tokens[:-1] if ended else tokens), ended)
        if len(found) >= n:
            break
    return dict(list(found.items())[:n])


class Sampler(threading.Thread):
    """Makes the items, one per prompt and in that order, on a thread of its own and a few ahead of the people.

    An item is {"item", "prompt", "responses", "finished", "models"}. It is written to its file before anyone sees it,
    so that everyone, and every later run, sees the same answers.
    """

    def __init__(self, prompts, policies, K, journal, args):
        super().__init__(daemon=True)
        self.prompts, self.policies, self.K, self.args, self.journal = prompts, policies, K, args, journal
        self.wanted, self.stopped, self.error = 0, False, None
        self.changed = threading.Condition()
        names = {policy.name for policy in policies}
        for row, prompt in zip(journal.rows, prompts):
            if row.get("prompt") != prompt or not set(row.get("models", [])) <= names:
                raise UserError(f"{journal.path} was sampled from other prompts or models; give --out another name")
        self.items = journal.rows[:len(prompts)]            # a copy, that grows

    def sample(self, index):
        prompt, answers = self.prompts[index], []
        for i, policy in enumerate(self.policies):
            n = len(range(i, self.K, len(self.policies)))   # K answers, dealt out to the policies in turn
            rng = generator(self.args.seed, 11, index, i)
            answers += [(text, ended, policy.name) for text, ended in draw(policy, prompt, n, rng, self.args).items()]
        responses, finished, models = map(list, zip(*answers)) if answers else ([], [], [])
        return {"item": item_id(prompt, responses), "prompt": prompt, "responses": responses, "finished": finished,
                "models": models}

    def run(self):
        try:
            while len(self.items) < len(self.prompts):
                with self.changed:
                    self.changed.wait_for(lambda: self.stopped or len(self.items) < self.wanted + AHEAD)
                if self.stopped:
                    return
                item = self.sample(len(self.items))
                self.journal.append(item)
                self.items.append(item)
        except Exception as error:                          # people must learn of it, not wait for ever
            self.error = f"sampling stopped: {type(error).__name__}: {error}"
            print(self.error, file=sys.stderr)

    def want(self, number):
        """Someone looks at item `number`, counted from 1."""
        with self.changed:
            self.wanted = max(self.wanted, number)
            self.changed.notify()

    def stop(self):
        with self.changed:
            self.stopped = True
            self.changed.notify()
        if self.is_alive():
            self.join()
