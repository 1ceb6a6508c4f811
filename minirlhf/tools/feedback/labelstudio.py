"""Label Studio in both directions: answers to its tasks and labeling configuration, its JSON export to comparisons.

    python -m minirlhf.tools.feedback export my_comparisons.items.jsonl --guidelines FILE --out DIR
    python -m minirlhf.tools.feedback import EXPORT.json --names 1=Ann 2=Bob --out my_comparisons.jsonl

Answers become a Ranker task with one bucket per rank. Those in the same bucket are tied. They are shown in a random
order, drawn for each task. It is kept under "minirlhf" in the data of the task, with all that a row of ours needs.
Pairwise tasks are imported too. Each annotation is imported as a row of its own, like a vote on our page.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import quoteattr

from minirlhf.files.jsonl import is_list_of
from minirlhf.files.json_files import strict_json
from minirlhf.files.errors import UserError, during, require, shown
from minirlhf.tools.feedback.items import read_items
from minirlhf.tools.feedback.votes import comparison_row, in_file_order, to_line

# The second paragraph of an answer is its id, which looks like a rank.
RANKER = """<View>
  <Style>
    .htx-ranker-item p {{ white-space: pre-wrap; }}
    .htx-ranker-item p + p {{ display: none; }}
  </Style>
{guidelines}  <Text name="prompt" value="$prompt"/>
  <Header value="Drag each answer to its rank. 1 is best. Answers in the same box are equally good."/>
  <List name="results" value="$items" title="Answers"/>
  <Ranker name="rank" toName="results">
{buckets}
  </Ranker>
</View>
"""
GUIDELINES = """  <Collapse open="true"><Panel value="Guidelines"><View style="max-height: 40vh; overflow: auto">
    <Markdown value={text}/>
  </View></Panel></Collapse>
"""


class Dropped(Exception):
    """An annotation that does not rank the answers. The text is the reason."""


# ---- export ----------------------------------------------------------------------------------------------------------

def export_file(path, folder, guidelines=""):
    """Writes a task for each item of a file with answers, and the configuration, with a bucket for each rank."""
    tasks, folder = [{"data": task_of(item)} for item in read_items(path)], Path(folder)
    folder.mkdir(parents=True)
    K = max(len(task["data"]["items"]) for task in tasks)
    buckets = "\n".join(f'    <Bucket name="rank {k}" title="{k}"/>' for k in range(1, K + 1))
    config = RANKER.format(guidelines=guidelines and shown_first(guidelines), buckets=buckets)
    (folder / "ranker_config.xml").write_text(config, encoding="utf-8")
    (folder / "ranker_tasks.json").write_text(json.dumps(tasks, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{folder}/ranker_tasks.json: {len(tasks)} tasks; the labeling configuration is ranker_config.xml")


def shown_first(guidelines):
    """Their part of the configuration. Label Studio would take "$5" for data and "<b>" for HTML, so something invisible
    comes after these signs (a word joiner), and XML has no control characters."""
    text = re.sub(r"[\0-\x08\x0b-\x1f]", " ", re.sub("[$<]", "\\g<0>\u2060", guidelines))
    return GUIDELINES.format(text=quoteattr(text))


def task_of(item):
    K = len(item["responses"])
    order = random.Random(item["item"]).sample(range(K), K)
    items = [{"id": str(p), "title": chr(65 + p), "body": item["responses"][k]} for p, k in enumerate(order)]
    return {"prompt": item["prompt"], "items": items,
            "minirlhf": {"order": order, "finished": item["finished"],
                         "extra": {"item": item["item"], "models": item["models"]}}}


# ---- import ----------------------------------------------------------------------------------------------------------

def import_file(path, out, leading_space=False, names=()):
    """Label Studio's JSON export -> a comparisons file. Prints who has voted, and what was dropped and why.

    names: ["1=Ann"] gives the name Ann to the votes of account 1.
    """
    tasks, dropped, votes, rows = read_export(path), Counter(), [], {}
    for index, task in enumerate(tasks):
        with during(f"{path}: task {task.get('id', index)}"):
            votes += task_votes(task, leading_space, dropped)
    for n, (_, row) in enumerate(sorted(votes, key=lambda vote: vote[0])):
        rows[row["prompt"], tuple(row["responses"]), row["annotator"] or n] = row       # each vote without a name stays
    dropped["replaced by a later one of the same annotator"] += len(votes) - len(rows)
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "nothing"
    require(rows, f"{path}: no usable annotation in {len(tasks)} tasks ({reasons})")
    who = give_names(rows.values(), names)
    with open(out, "xb") as file:                               # x: an error if the file exists
        file.writelines(map(to_line, rows.values()))
    print(f"{out}: {len(rows)} comparisons from {len(tasks)} tasks\n  dropped: {reasons}\n  votes: {who}")


def give_names(rows, names):
    """Puts names in place of accounts, and says who has voted. No two accounts may become one person."""
    pairs = [pair.partition("=")[::2] for pair in names]
    require(all(map(all, pairs)), f"--names {' '.join(names)}: write pairs like 1=Ann or a@example.org=Bob")
    votes, known = Counter(row["annotator"] for row in rows), dict(pairs)
    people = {account: known.get(account, account) for account in votes}
    require(len(known) == len(pairs) and len(set(people.values())) == len(people),
            f"--names {' '.join(names)}: give each account one name of its own; these have voted: {', '.join(votes)}")
    for row in rows:
        row["annotator"] = people[row["annotator"]]
    said = ", ".join(f"{votes[account]} by {name or '(no name)'}" for account, name in people.items())
    number = next(filter(str.isdecimal, people.values()), "")
    return said + (number and f". A number is an account of Label Studio; import with --names {number}=Ann to name it")


def read_export(path):
    try:
        tasks = strict_json(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({error})") from None
    require(isinstance(tasks, list) and all(isinstance(task, dict) and "annotations" in task for task in tasks),
            f"{path}: not a list of annotated tasks; export from Label Studio as JSON, not as JSON-MIN")
    return tasks


def need(value, kind, name, default=None):
    """value[name], which must be of this kind. Where it is missing or null, the default, if there is one."""
    found = value.get(name) if isinstance(value, dict) else None
    found = default if found is None else found
    require(isinstance(found, kind), f"no \"{name}\" that is a {kind.__name__} in {shown(value)}")
    return found


def task_votes(task, leading_space, dropped):
    """The votes of one task: [(when, row)]. `dropped` counts the annotations without one."""
    data, annotations, votes = need(task, dict, "data"), need(task, list, "annotations"), []
    prompt, ids, texts = task_texts(data)
    if leading_space:
        texts = [text if text[:1].isspace() or prompt[-1:].isspace() else " " + text for text in texts]
    ours = need(data, dict, "minirlhf", default={})
    given, order = need(ours, dict, "extra", default={}), need(ours, list, "order", default=list(range(len(ids))))
    require(is_list_of(int, order, len(ids)) and sorted(order) == list(range(len(ids))),
            f"its order {order} is not an order of {len(ids)} answers")
    dropped["tasks nobody annotated"] += not annotations
    for annotation in annotations:
        try:
            ranks = judgement(annotation, ids)
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        extra = {**{name: given[name] for name in ("item", "models") if name in given}, "order": order,
                 "annotator": annotator_of(annotation), "seconds": annotation.get("lead_time"),
                 "time": annotation.get("created_at")}
        row = comparison_row(prompt, in_file_order(texts, order), in_file_order(ranks, order), ours.get("finished"),
                             **extra)
        votes.append((str(annotation.get("updated_at") or annotation.get("created_at") or ""), row))
    return votes


def annotator_of(annotation):
    """Who made it: e-mail address or number, as text; "" if unknown. A copy keeps the `meta` of the one it was made
    from, so that is not looked at."""
    by = annotation.get("completed_by")
    by = by.get("email") or by.get("id") if isinstance(by, dict) else by
    require(by is None or type(by) in (int, str), f"completed_by is {shown(by)}, neither a number nor a name")
    return "" if by is None else str(by).strip()


def task_texts(data):
    """The prompt, the ids of the answers, and their texts, in the order shown."""
    prompt = need(data, str, "prompt")
    if "items" not in data:
        return prompt, ["left", "right"], [need(data, str, name) for name in ("answer1", "answer2")]
    items = need(data, list, "items")
    texts = [need(item, str, "body") for item in items]
    return prompt, [str(item.get("id")) for item in items], texts


def judgement(annotation, ids):
    """One annotation -> the rank of each shown answer. Raises Dropped.

    Goes by each result's type: in real exports from_name is not always the name in the configuration.
    """
    if annotation.get("was_cancelled"):
        raise Dropped("skipped or cancelled")
    rankings = [result for result in need(annotation, list, "result") if need(result, str, "type") in READERS]
    if not rankings:
        raise Dropped("without a ranking")
    first, *others = [READERS[result["type"]](need(result, dict, "value"), ids) for result in rankings]
    if any(ranks != first for ranks in others):
        raise Dropped("contradicting themselves")
    return first


def read_pairwise(value, ids):
    selected = value.get("selected")
    require(selected in ("left", "right"), f"selected is {shown(selected)}, neither 'left' nor 'right'")
    return [1, 2] if selected == "left" else [2, 1]


def read_choices(value, ids):
    require(value.get("choices") == ["tie"], f"choices are {shown(value.get('choices'))}; only ['tie'] is known")
    return [1] * len(ids)


def read_ranker(value, ids):
    """{"rank": [ids, the best first]}, or export's buckets {"rank 1": [ids], "rank 2": [...]}."""
    lists = need(value, dict, "ranker")
    buckets = {name: need(lists, list, name) for name in lists if name != "_"}      # "_": the answers nobody moved
    if all(re.fullmatch(r"rank \d{1,3}", name) for name in buckets):
        groups = [buckets[name] for name in sorted(buckets, key=lambda name: int(name.split()[1])) if buckets[name]]
    elif len(buckets) == 1:
        groups = [[i] for some in buckets.values() for i in some]
    else:
        raise UserError(f"the order of the buckets {', '.join(buckets)} is unknown; name them rank 1, rank 2, ...")
    placed = [str(i) for group in groups for i in group]
    require(len(set(placed)) == len(placed) and set(placed) <= set(ids),
            f"ranks the answers {shown(placed)}, but there are {shown(ids)}, to be ranked once each")
    if len(placed) < len(ids):
        raise Dropped("with answers left unranked")
    rank_of = {str(i): rank for rank, group in enumerate(groups, 1) for i in group}
    return [rank_of[i] for i in ids]


READERS = {"pairwise": read_pairwise, "choices": read_choices, "ranker": read_ranker}
