"""Which item a person sees next, and what each person says about it."""

import math
import random
from collections import defaultdict
from datetime import datetime, timezone
from threading import Lock

from minirlhf.files.jsonl import is_list_of, text
from minirlhf.files.errors import require
from minirlhf.tools.feedback import stats
from minirlhf.tools.feedback.items import instruction_of, title_of, turns_of
from minirlhf.tools.feedback.votes import Journal, comparison_row, in_file_order, sidecar


class Session:
    """Hands out items and writes down what people say about them.

    next, vote, write, skip, undo, past and revise are the actions of the page. They take and return what JSON can hold.
    The server holds `lock` around each call, because two of them must not run at the same time.
    """

    def __init__(self, mode, out, sampler, templates, seed, guidelines="", overlap=None, gold={}):
        self.mode, self.sampler, self.templates, self.seed = mode, sampler, templates, seed
        self.overlap = overlap                      # how many items everybody gets, the others go to one; None: all
        self.gold = gold                            # {item: an item with known ranks}; everybody gets these too
        every, rng = max(len(sampler.prompts) // max(len(gold), 1), 1), random.Random(seed)
        self.places = [min(every * n + rng.randrange(every), len(sampler.prompts) - 1) for n in range(len(gold))]
        self.shown = {}                             # annotator -> the item on their page
        self.guidelines = guidelines                # text that the page shows at the first visit
        self.lock = Lock()
        self.votes, self.skips = Journal(out), Journal(sidecar(out, "skips"))
        self.done = defaultdict(dict)               # annotator -> {item: (journal, row)}, the latest one last
        rows = [(journal, row) for journal in (self.votes, self.skips) for row in journal.rows
                if all(isinstance(row.get(name), str) for name in ("item", "annotator", "time"))]
        for journal, row in sorted(rows, key=lambda pair: pair[1]["time"]):
            done, name = self.done[row["annotator"]], row["item"]
            if name in done and done[name][0] is not journal:       # a crash between the two steps of record()
                done[name][0].remove(done[name][1])
            done.pop(name, None)                                    # the latest one last
            done[name] = journal, row

    # ---- handing out items ----

    @property
    def items(self):
        """The items that exist so far, with the gold ones among them. self.places says before which others."""
        return [item for n, other in enumerate(self.sampler.items)
                for item in [*(gold for gold, place in zip(self.gold.values(), self.places) if place == n), other]]

    def next(self, annotator):
        """This person's progress, with the first item still to do, or {"finished": True}."""
        done = self.done[annotator]
        fewest = 0 if self.mode == "write" else 2                           # ranking needs two answers

        def still_to_do(pages={}):
            shared = {item["item"] for item in self.sampler.items[:self.overlap]} | self.gold.keys()
            return [item for item in self.items if item["item"] not in done and len(item["responses"]) >= fewest
                    and (item["item"] in shared or not self.is_taken(item["item"], annotator, pages))]

        while not (free := still_to_do(self.shown)) and self.sampler.add_item():
            pass
        free = free or still_to_do()                # what is only on the page of somebody who may have left
        own = [done[item["item"]] for item in self.items if item["item"] in done]
        votes = sum(journal is self.votes for journal, _ in own)
        unsampled = len(self.sampler.prompts) + len(self.gold) - len(self.items)
        state = {"mode": self.mode, "votes": votes, "skips": len(own) - votes, "can_undo": bool(done),
                 "total": len(own) + len(free) + unsampled}
        self.shown[annotator] = free[0]["item"] if free else None
        return state | (self.show(free[0], annotator) if free else {"finished": True})

    def is_taken(self, name, annotator, pages):
        """Whether somebody else has said something about an item, or has it on their page {annotator: item}."""
        others = (self.done.keys() | pages.keys()) - {annotator}
        return any(name in self.done.get(other, ()) or pages.get(other) == name for other in others)

    def show(self, item, annotator):
        """What the page needs to show an item. The names of the models are not part of it."""
        order = self.order(item, annotator)
        return {"item": item["item"], "instruction": instruction_of(item["prompt"], self.templates),
                "turns": turns_of(item["prompt"], self.templates),
                "answers": [item["responses"][k] for k in order], "cut": [not item["finished"][k] for k in order]}

    def order(self, item, annotator):
        """A random order of the answers. It depends on person and item only, so a reload does not change it."""
        K = len(item["responses"])
        return random.Random(f"{self.seed} {annotator} {item['item']}").sample(range(K), K)

    def find(self, name):
        item = next((item for item in self.items if item["item"] == name), None)
        require(item, "there is no such item")
        return item

    # ---- what people say ----

    # seconds: how long the person took. remarks: the flags and the note, where there are any. revise: replace what this
    # person said before.

    def vote(self, annotator, name, ranks, seconds, remarks={}, revise=False):
        """ranks are in the order shown. 1 is best, equal ranks are a tie, no rank is left out."""
        item = self.find(name)
        order = self.order(item, annotator)
        whole = is_list_of(int, ranks, len(order)) and self.mode != "write"
        require(whole and sorted(set(ranks)) == list(range(1, len(set(ranks)) + 1)),
                f"ranks must be {len(order)} whole numbers that count from 1 without a gap")
        row = comparison_row(item["prompt"], item["responses"], in_file_order(ranks, order), item["finished"],
                             item=name, models=item["models"], order=order)
        return self.record(self.votes, row, annotator, seconds, remarks, revise)

    def write(self, annotator, name, response, seconds, remarks={}, revise=False):
        """The ideal answer. It gets the leading space of the draft, or one if the prompt does not end in a space."""
        item = self.find(name)
        require(self.mode == "write" and isinstance(response, str) and response.strip(), "the answer is empty")
        text(response, "response", "the answer")
        draft = (item["responses"] or ["" if item["prompt"][-1].isspace() else " "])[0]
        space = draft[:len(draft) - len(draft.lstrip())]
        row = {"prompt": item["prompt"], "response": space + response.strip().replace("\r\n", "\n"), "item": name}
        return self.record(self.votes, row, annotator, seconds, remarks, revise)

    def skip(self, annotator, name, seconds, remarks={}, revise=False):
        row = {"prompt": self.find(name)["prompt"], "item": name}
        return self.record(self.skips, row, annotator, seconds, remarks, revise)

    def record(self, journal, row, annotator, seconds, remarks, revise):
        """Saves a row, and says so. What this person said before stays unless `revise`; sending it twice is harmless."""
        done, name = self.done[annotator], row["item"]
        old_journal, old = done.get(name, (None, None))
        if old and not revise:
            return {"saved": old_journal is journal and old == old | row | remarks}
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        row |= {"annotator": annotator, "seconds": seconds, "time": now, **remarks}
        if old_journal is journal:
            journal.remove(old, row)
        else:
            journal.append(row)
        done.pop(name, None)                                        # the latest one last
        done[name] = journal, row
        if old and old_journal is not journal:                      # last, so that no crash can lose both
            old_journal.remove(old)
        return {"saved": True}

    def undo(self, annotator):
        """Removes this person's latest vote or skip. Returns what it said, so that the page can start from it."""
        done = self.done[annotator]
        if not done:
            return {"undone": None}
        name, (journal, row) = list(done.items())[-1]
        journal.remove(row)
        del done[name]
        return {"undone": name, **self.said(annotator, row)}

    def said(self, annotator, row):
        """What a vote or skip says, with the ranks in the order that the page shows."""
        ranks = [row["ranks"][k] for k in self.order(row, annotator)] if "ranks" in row else None
        return {"ranks": ranks, "response": row.get("response"), "flags": row.get("flags", []),
                "note": row.get("note", "")}

    # ---- what this person said before ----

    def past(self, annotator):
        """This person's votes and skips on items that can be shown, the latest first, as the page lists them."""
        prompts = {item["item"]: item["prompt"] for item in self.items}
        return {"past": [{"item": name, "skipped": journal is self.skips, "time": row["time"],
                          "title": title_of(prompts[name], self.templates), "best": best_of(row)[:300],
                          "flags": row.get("flags", []), "note": row.get("note", "")}
                         for name, (journal, row) in reversed(self.done[annotator].items()) if name in prompts]}

    def revise(self, annotator, name):
        """Shows an item again with what this person said. That stays saved until something else replaces it."""
        require(isinstance(name, str) and name in self.done[annotator], "you have not voted on this item")
        _, row = self.done[annotator][name]
        return self.show(self.find(name), annotator) | {"undone": name, **self.said(annotator, row)}


    # ---- for the person in charge ----

    def overview(self):
        """Progress, pace, gold items and agreement of everybody. People are compared where two have voted."""
        said = [row for done in self.done.values() for journal, row in done.values() if journal is self.votes]
        people, ranked = [], [row for row in said if "ranks" in row]
        for name, done in self.done.items():
            own = [row for row in said if row["annotator"] == name]
            people.append({"name": name, "votes": len(own), "skips": len(done) - len(own), "pace": stats.pace(own),
                           "gold": stats.gold_right([row for row in own if "ranks" in row], self.gold)})
        pairs = [[*names, n, kappa, low, high] for names, (_, n, kappa, low, high) in stats.kappas(ranked).items()]
        return {"total": len(self.sampler.prompts) + len(self.gold), "voted": len({row["item"] for row in said}),
                "people": people, "agreement": [row for row in pairs if math.isfinite(row[3])]}


def best_of(row):
    """The text that a vote calls the best, or the first such text. "" for a skip, and where all are equal."""
    ranks = row.get("ranks", [])
    return row["responses"][ranks.index(1)] if len(set(ranks)) > 1 else row.get("response", "")
