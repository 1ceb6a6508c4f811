"""Label Studio, both ways: comparisons -> its tasks and labeling configuration, its JSON export -> comparisons.

    python -m minirlhf.tools.feedback export my_comparisons.jsonl --out DIR
    python -m minirlhf.tools.feedback import EXPORT.json --out my_comparisons.jsonl

Two answers become a Pairwise task with a choice for a tie, more become a Ranker task with a bucket for each rank, where
a bucket with two answers is a tie. A row that is ranked already goes along as an annotation. The answers are put in an
order drawn for each task, and "minirlhf" in its data (and in an annotation's "meta") is what brings a row back exactly.
"""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

from minirlhf.running.errors import UserError
from minirlhf.data import comparison, read_jsonl
from minirlhf.tools.feedback.votes import comparison_row, item_id, to_line

PAIRWISE = """<View>
  <Text name="prompt" value="$prompt"/>
  <Header value="Which answer is better?"/>
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <Text name="answer1" value="$answer1"/>
  <Text name="answer2" value="$answer2"/>
  <Choices name="tie" toName="prompt" choice="single"><Choice value="tie" alias="tie"/></Choices>
</View>
"""
RANKER = """<View>
  <Text name="prompt" value="$prompt"/>
  <Header value="Drag each answer to its rank; answers in one box are equally good."/>
  <List name="results" value="$items" title="Answers"/>
  <Ranker name="rank" toName="results">
{buckets}
  </Ranker>
</View>
"""


class Dropped(Exception):
    """An annotation that says nothing about the answers; the text is the reason."""


# ---- export ----------------------------------------------------------------------------------------------------------

def export_file(path, folder):
    """Writes tasks and configuration of every kind that the file needs into the folder -> the files written."""
    tasks = tasks_of(path)
    kinds = {"pairwise": [task for task in tasks if "answer1" in task["data"]],
             "ranker": [task for task in tasks if "items" in task["data"]]}
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give --out another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for kind, some in kinds.items():
        if some:
            text = json.dumps(some, indent=1, ensure_ascii=False) + "\n"
            (folder / f"{kind}_tasks.json").write_text(text, encoding="utf-8")
            (folder / f"{kind}_config.xml").write_text(config_of(kind, some), encoding="utf-8")
            print(f"{folder}/{kind}_tasks.json: {len(some)} tasks, {sum(len(task['annotations']) for task in some)} of "
                  f"their annotations are here already; {kind}_config.xml is the labeling configuration")


def config_of(kind, tasks):
    if kind == "pairwise":
        return PAIRWISE
    K = max(len(task["data"]["items"]) for task in tasks)
    return RANKER.format(buckets="\n".join(f'    <Bucket name="rank {k}" title="{"Best" if k == 1 else k}"/>'
                                           for k in range(1, K + 1)))


def tasks_of(path):
    """One task for each item of a comparisons file, or of the items file beside it, which has no ranks yet."""
    tasks = {}
    for line, (where, value) in enumerate(read_jsonl(path)):
        ranked = bool({"ranks", "best", "chosen"} & set(value))
        responses = value.get("responses")
        if not ranked and isinstance(responses, list):          # what was sampled, ranked by nobody
            if len(responses) < 2:
                continue
            value = {**value, "ranks": [1] * len(responses)}
        row = comparison(value, where)
        task = tasks.setdefault(item_id(row.prompt, row.responses), new_task(row, value))
        if ranked:
            task["annotations"].append(annotation_of(task["data"], row, value, line))
    if not tasks:
        raise UserError(f"{path}: nothing to export")
    return list(tasks.values())


def new_task(row, value):
    order = list(range(len(row.responses)))
    random.Random(item_id(row.prompt, row.responses)).shuffle(order)
    shown = [row.responses[k] for k in order]
    extra = {name: value[name] for name in ("item", "models") if name in value}
    ours = {"order": order, "finished": value.get("finished"), "extra": extra}
    data = {"prompt": row.prompt, "minirlhf": ours}
    if len(shown) == 2:
        data |= {"answer1": shown[0], "answer2": shown[1]}
    else:
        data["items"] = [{"id": str(p), "title": chr(65 + p % 26), "body": text} for p, text in enumerate(shown)]
    return {"data": data, "annotations": []}


def annotation_of(data, row, value, line):
    """A ranked row as Label Studio would have written it."""
    ranks = [row.ranks[k] for k in data["minirlhf"]["order"]]
    known = {"prompt", "responses", "ranks", "finished", "chosen", "rejected", "best"}
    extra = {name: value[name] for name in value if name not in known}
    if "items" in data:
        places = sorted(set(ranks))
        buckets = {f"rank {n}": [str(p) for p, rank in enumerate(ranks) if rank == place]
                   for n, place in enumerate(places, 1)}
        result = {"type": "ranker", "from_name": "rank", "to_name": "results", "value": {"ranker": buckets}}
    elif ranks[0] == ranks[1]:
        result = {"type": "choices", "from_name": "tie", "to_name": "prompt", "value": {"choices": ["tie"]}}
    else:
        result = {"type": "pairwise", "from_name": "comparison", "to_name": "answer1,answer2",
                  "value": {"selected": "left" if ranks[0] < ranks[1] else "right"}}
    annotation = {"result": [{"id": f"line{line}", **result, "meta": {"minirlhf": {"line": line, "extra": extra}}}]}
    if isinstance(value.get("seconds"), (int, float)):
        annotation["lead_time"] = value["seconds"]
    return annotation


# ---- import ----------------------------------------------------------------------------------------------------------

def import_file(path, out, several="majority", leading_space=False):
    """Label Studio's JSON export -> a comparisons file. Prints what was dropped and why."""
    if Path(out).exists():
        raise UserError(f"{out} exists; give --out another name")
    tasks = read_export(path)
    rows, dropped = [], Counter()
    by_item = {}                            # {item: {annotator: vote}}: tasks of the same text are one item
    for index, task in enumerate(tasks):
        where = f"{path}: task {task.get('id', index) if isinstance(task, dict) else index}"
        for vote in task_votes(task, where, leading_space, dropped):
            votes = by_item.setdefault(item_id(vote["row"]["prompt"], vote["row"]["responses"]), {})
            before = votes.get(vote["annotator"])
            dropped["replaced by a later one of the same annotator"] += before is not None
            if before is None or vote["when"] >= before["when"]:
                votes[vote["annotator"]] = vote
    for votes in by_item.values():
        rows += settle(list(votes.values()), several, dropped)
    rows.sort(key=lambda vote: vote["line"])                    # stable: what has no line stays in its order
    if not rows:
        raise UserError(f"{path}: no usable annotation in {len(tasks)} tasks ({reasons(dropped)})")
    Path(out).write_bytes(b"".join(to_line(vote["row"]) for vote in rows))
    prompts = len({vote["row"]["prompt"] for vote in rows})
    print(f"{out}: {len(rows)} comparisons on {prompts} prompts, from {len(tasks)} tasks")
    print(f"  dropped: {reasons(dropped)}")


def reasons(dropped):
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "nothing"


def read_export(path):
    try:
        tasks = json.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({error})") from None
    if not isinstance(tasks, list):
        raise UserError(f"{path}: not a list of tasks; export from Label Studio as JSON")
    return tasks


def need(value, kind, name, where):
    """value[name], which must be of this kind."""
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        found = ", ".join(value) if isinstance(value, dict) else json.dumps(value)[:40]
        raise UserError(f"{where}: no \"{name}\" that is a {kind.__name__} (found: {found})")
    return value[name]


def task_votes(task, where, leading_space, dropped):
    """One task -> its votes: {"annotator", "when", "line", "row"}. What says nothing is counted in `dropped`."""
    data = need(task, dict, "data", where)
    if "annotations" not in task:
        raise UserError(f"{where}: no \"annotations\"; export from Label Studio as JSON, not as JSON-MIN or tasks")
    prompt, ids, shown = task_texts(data, where)
    if leading_space:
        shown = [text if text[:1].isspace() or prompt[-1:].isspace() else " " + text for text in shown]
    ours = data.get("minirlhf") if isinstance(data.get("minirlhf"), dict) else {}
    order = ours.get("order", list(range(len(shown))))
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(len(shown)))):
        raise UserError(f"{where}: its order {order} is none of {len(shown)} answers")
    responses = [shown[order.index(k)] for k in range(len(shown))]
    annotations, votes = need(task, list, "annotations", where), []
    dropped["tasks nobody annotated"] += not annotations
    for annotation in annotations:
        try:
            place, meta = judgement(annotation, ids, where)
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        ranks = [place[order.index(k)] for k in range(len(place))]
        extra = meta.get("extra") or {**ours.get("extra", {}), "order": order, **provenance(annotation)}
        row = comparison_row(prompt, responses, ranks, ours.get("finished"), where=where, **extra)
        line = meta["line"] if isinstance(meta.get("line"), int) else math.inf      # made in Label Studio: to the end
        votes.append({"annotator": str(extra.get("annotator", f"line {line}")), "row": row, "line": line,
                      "when": str(annotation.get("updated_at") or annotation.get("created_at") or "")})
    return votes


def task_texts(data, where):
    """prompt, ids of the answers, their texts in the order shown."""
    prompt = need(data, str, "prompt", where)
    if "items" in data:
        items = need(data, list, "items", where)
        return prompt, [str(item.get("id")) if isinstance(item, dict) else "" for item in items], \
            [need(item, str, "body", where) for item in items]
    return prompt, ["left", "right"], [need(data, str, name, where) for name in ("answer1", "answer2")]


def provenance(annotation):
    """Who, how long and when, of an annotation that was made in Label Studio."""
    by = annotation.get("completed_by")
    by = by.get("email") or by.get("id") if isinstance(by, dict) else by
    return {"annotator": str(by), "seconds": annotation.get("lead_time"), "time": annotation.get("created_at")}


def judgement(annotation, ids, where):
    """One annotation -> the rank of each shown answer, and what export wrote into its meta. Raises Dropped.

    Goes by each result's type: in real exports from_name is not always the name in the configuration.
    """
    results = need(annotation, list, "result", where)
    if annotation.get("was_cancelled"):
        raise Dropped("skipped or cancelled")
    if not results:
        raise Dropped("empty")
    said = []
    for result in results:
        kind = need(result, str, "type", where)
        if kind in ("pairwise", "ranker", "choices"):
            place = READERS[kind](need(result, dict, "value", where), ids, where)
            meta = result.get("meta") if isinstance(result.get("meta"), dict) else {}
            said.append((place, meta.get("minirlhf") or {}))
    if not said:
        raise Dropped("without a ranking")
    if any(place != said[0][0] for place, _ in said):
        raise Dropped("contradicting themselves")
    return said[0]


def read_pairwise(value, ids, where):
    selected = value.get("selected")
    if selected not in ("left", "right"):
        raise UserError(f"{where}: selected is {json.dumps(selected)[:60]}, neither \"left\" nor \"right\"")
    return [1, 2] if selected == "left" else [2, 1]


def read_choices(value, ids, where):
    if value.get("choices") != ["tie"]:
        raise UserError(f"{where}: choices are {json.dumps(value.get('choices'))[:60]}; known is only [\"tie\"]")
    return [1] * len(ids)


def read_ranker(value, ids, where):
    """{"rank": [ids, the best first]}, or export's buckets {"rank 1": [ids], "rank 2": [...]}."""
    lists = need(value, dict, "ranker", where)
    left = lists.get("_", [])               # Label Studio's name for the answers that stayed in the list
    groups = {name: some for name, some in lists.items() if name != "_"}
    numbers = {name: re.fullmatch(r"rank (\d{1,3})", name) for name in groups}
    if all(numbers.values()):
        ordered = [groups[name] for name in sorted(groups, key=lambda name: int(numbers[name][1]))]
    elif len(groups) == 1:
        only = next(iter(groups.values()))
        ordered = [[i] for i in only] if isinstance(only, list) else [None]
    else:
        raise UserError(f"{where}: the order of the buckets {', '.join(groups)} is unknown; "
                        "name them rank 1, rank 2, ...")
    if not all(isinstance(group, list) for group in [left, *ordered]):
        raise UserError(f"{where}: a ranking must be lists of ids, not {json.dumps(lists)[:60]}")
    ordered = [list(map(str, group)) for group in ordered if group]
    placed = [i for group in ordered for i in group]
    strange = [i for i in placed if i not in ids or placed.count(i) > 1]
    if strange:
        raise UserError(f"{where}: answer {strange[0]!r} is ranked, but it is unknown or ranked twice; known are {ids}")
    if len(placed) < len(ids):
        raise Dropped("with answers left unranked")
    return [1 + next(r for r, group in enumerate(ordered) if i in group) for i in ids]


READERS = {"pairwise": read_pairwise, "choices": read_choices, "ranker": read_ranker}


# ---- several annotators of one item ----------------------------------------------------------------------------------

def settle(votes, several, dropped):
    """The votes of one item, by different annotators -> the votes to keep.

    each: all of them; majority: one, with the order of the summed ranks (for two answers, what most said); drop: one if
    all agree. What is split down the middle, or not agreed on, is dropped and counted.
    """
    if len(votes) == 1 or several == "each":
        return votes
    rankings = [vote["row"]["ranks"] for vote in votes]
    if all(ranks == rankings[0] for ranks in rankings):
        summed = rankings[0]
    elif several == "drop":
        dropped["items on which the annotators differ"] += 1
        return []
    else:
        summed = [sum(ranks) for ranks in zip(*rankings)]
        if len(set(summed)) == 1:
            dropped["items without a majority"] += 1
            return []
    first = votes[0]["row"]
    ranks = [1 + sorted(set(summed)).index(value) for value in summed]
    kept = {name: first[name] for name in ("item", "models") if name in first}
    row = comparison_row(first["prompt"], first["responses"], ranks, first.get("finished"), **kept,
                         names=[vote["annotator"] for vote in votes], annotators=rankings)
    return [{**votes[0], "row": row}]
