"""Label Studio: our export, its export, and back.

fixtures_labelstudio_*.json are what Label Studio 1.23.2 wrote for tasks of ours that were imported into it with the
exported configuration and annotated through its API; the texts are made up. The real export in $MINIRLHF_REAL_DATA is
other people's.
"""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import train_rm
from minirlhf.files.errors import UserError, run_main
from minirlhf.data import read_comparisons
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools.feedback.__main__ import main
from minirlhf.tools.feedback.labelstudio import export_file, import_file
from minirlhf.tools.feedback.items import read_items
from minirlhf.tools.feedback.stats import print_stats
from minirlhf.tools.feedback.votes import to_line
from minirlhf.weights import save_pretrained

TESTS = Path(__file__).parent
PAIR = {"prompt": "P", "answer1": " l", "answer2": " r"}
LIST = {"prompt": "P", "items": [{"id": name, "title": "", "body": f" {name}"} for name in "xyz"]}


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_bytes().splitlines()]


def tasks(kind, *annotations, data=None):
    """An export of one task with the given annotations."""
    data = data or {"pairwise": PAIR, "ranker": LIST}[kind]
    annotations = [{"completed_by": n, "was_cancelled": False, **each} for n, each in enumerate(annotations)]
    return [{"id": 7, "data": data, "annotations": annotations}]


def said(kind, value, **more):
    return {"result": [{"type": kind, "from_name": "rank", "to_name": "x", "value": value}], **more}


def left(**more):
    return said("pairwise", {"selected": "left"}, **more)


def right(**more):
    return said("pairwise", {"selected": "right"}, **more)


def run_import(tmp_path, value, *args, **kwargs):
    (tmp_path / "export.json").write_text(json.dumps(value))
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    import_file(tmp_path / "export.json", out, *args, **kwargs)
    return rows_of(out)


# ---- export ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def sampled(tmp_path):
    """A file of 40 sampled items of two answers, and a task export made from it."""
    same = {"responses": [" <b>one</b>", " two\n\n\"2\" é\u2028"], "finished": [True, False], "models": ["m1", "m2"]}
    rows = [{**same, "item": "", "prompt": f"P{i}"} for i in range(40)]
    rows.append({**same, "prompt": "P40", "responses": [" a", " b", ""], "finished": [True] * 3, "models": ["m1"] * 3})
    (tmp_path / "x.items.jsonl").write_bytes(b"".join(map(to_line, rows)))
    export_file(tmp_path / "x.items.jsonl", tmp_path / "ls")
    return json.loads((tmp_path / "ls/ranker_tasks.json").read_text(encoding="utf-8"))


def test_the_configuration_is_xml_that_fits_the_tasks(sampled, tmp_path):
    root = ElementTree.parse(tmp_path / "ls/ranker_config.xml").getroot()
    names = {node.get("value")[1:] for node in root.iter() if (node.get("value") or "").startswith("$")}
    assert all(names <= set(task["data"]) for task in sampled)
    assert len(list(root.iter("Bucket"))) == 3    # as many ranks as the longest list has answers


def test_what_was_sampled_comes_back_ranked(sampled, tmp_path):
    first = [task["data"]["items"][0]["body"] for task in sampled[:40]]
    assert 8 < first.count(" <b>one</b>") < 32                          # shown in a random order
    for task in sampled:
        ranker = {f"rank {1 + int(item['id'])}": [item["id"]] for item in task["data"]["items"]}
        task["annotations"] = [{"completed_by": 1, **said("ranker", {"ranker": ranker})}]
    items = read_items(tmp_path / "x.items.jsonl")
    for row, item, task in zip(run_import(tmp_path, sampled), items, sampled, strict=True):
        shown = [answer for _, answer in sorted(zip(row["ranks"], row["responses"]))]
        assert shown == [answer["body"] for answer in task["data"]["items"]]
        assert {name: row[name] for name in item} == item


@pytest.mark.parametrize("text", ["", "# How\n\n1. **First**\n",
                                  "$5 & `a < b` 'x' \"$prompt\" <b>no</b> </View> ]]> {K}\n"])
def test_guidelines_are_in_the_configuration_as_they_were_written(tmp_path, text):
    """But for a word joiner after what Label Studio would take for data ($word) or HTML (<word)."""
    (tmp_path / "g.md").write_text(text)
    (tmp_path / "a.jsonl").write_bytes(to_line({"prompt": "a", "responses": [" x", " y"]}))
    main(["export", str(tmp_path / "a.jsonl"), "--guidelines", str(tmp_path / "g.md"), "--out", str(tmp_path / "ls")])
    shown = [node.get("value") for node in ElementTree.parse(tmp_path / "ls/ranker_config.xml").iter("Markdown")]
    assert [value.replace("\u2060", "") for value in shown] == [text] * bool(text)
    assert not re.search(r"\$[\w[{.]|<[\w/!?]", "".join(shown))


def test_a_control_character_in_the_guidelines_is_a_space(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(to_line({"prompt": "a", "responses": [" x", " y"]}))
    export_file(tmp_path / "a.jsonl", tmp_path / "ls", "one\fpage\tand\x0b\nmore")
    shown, = ElementTree.parse(tmp_path / "ls/ranker_config.xml").iter("Markdown")
    assert shown.get("value") == "one page\tand \nmore"


def test_identical_answers_are_one_answer(tmp_path, capsys):
    rows = [{"prompt": "a", "responses": [" x", " y", " x"], "models": ["m", "n", "o"]},
            {"prompt": "b", "responses": [" x", " x"]}]
    (tmp_path / "a.jsonl").write_bytes(b"".join(map(to_line, rows)))
    export_file(tmp_path / "a.jsonl", tmp_path / "ls")
    task, = json.loads((tmp_path / "ls/ranker_tasks.json").read_text())
    assert sorted(answer["body"] for answer in task["data"]["items"]) == [" x", " y"]
    assert task["data"]["minirlhf"]["extra"]["models"] == ["m", "n"] and "left out 1 rows" in capsys.readouterr().out


def test_the_verdicts_of_comparisons_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(to_line({"prompt": "a", "chosen": " x", "rejected": " y"}) * 2)
    export_file(tmp_path / "a.jsonl", tmp_path / "ls")
    task, = json.loads((tmp_path / "ls/ranker_tasks.json").read_text())
    assert sorted(answer["body"] for answer in task["data"]["items"]) == [" x", " y"] and set(task) == {"data"}


@pytest.mark.parametrize("name, value", [("prompt", "Q"), ("responses", [" r", " l"]), ("ranks", [2, 1]),
                                         ("finished", [False, False]), ("annotators", [[2, 1]])])
def test_what_is_kept_beside_a_task_changes_no_vote(tmp_path, name, value):
    row, = run_import(tmp_path, tasks("pairwise", left(), data=PAIR | {"minirlhf": {"extra": {name: value}}}))
    assert name not in row or row[name] != value
    assert (row["prompt"], row["responses"], row["ranks"]) == ("P", [" l", " r"], [1, 2])


@pytest.mark.parametrize("partial", [None, {"order": [1, 0]}, {"extra": None, "finished": None}])
def test_without_what_export_added_the_ranking_still_counts(tmp_path, partial):
    row, = run_import(tmp_path, tasks("pairwise", left(), data={**PAIR, "minirlhf": partial}))
    assert row["responses"][row["ranks"].index(1)] == " l"


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(to_line({"prompt": "a", "chosen": " x", "rejected": " y"}))
    (tmp_path / "a.json").write_text(json.dumps(tasks("pairwise", left())))
    before = (tmp_path / "a.jsonl").read_bytes()
    for function, source, target in ((export_file, "a.jsonl", "."), (import_file, "a.json", "a.jsonl")):
        with pytest.raises(SystemExit):
            run_main(lambda: function(tmp_path / source, tmp_path / target))
        assert capsys.readouterr().err == f"error: {tmp_path / target}: File exists\n"
    assert (tmp_path / "a.jsonl").read_bytes() == before


# ---- what Label Studio really writes ---------------------------------------------------------------------------------

def test_pairwise_as_label_studio_wrote_it(tmp_path, capsys):
    import_file(TESTS / "fixtures_labelstudio_pairwise.json", tmp_path / "out.jsonl")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["ranks"] for row in rows] == [[1, 2], [1, 1], [1, 2], [1, 2], [2, 1], [1, 1]]
    assert all(row["annotator"] == "1" and row["time"].startswith("20") for row in rows)
    assert [row["seconds"] for row in rows] == [4.25] * 3 + [7.5] * 3
    assert "dropped: 1 skipped or cancelled, 1 without a ranking, 1 replaced by" in capsys.readouterr().out


def test_ranker_as_label_studio_wrote_it(tmp_path, capsys):
    import_file(TESTS / "fixtures_labelstudio_ranker.json", tmp_path / "out.jsonl")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["ranks"] for row in rows] == [[1, 2, 3, 4], [3, 1, 2], [1, 1, 1], [2, 2, 1], [1, 2, 3]]
    said = capsys.readouterr().out
    assert "1 with answers left unranked, 1 skipped or cancelled, 1 without a ranking, 1 replaced" in said


def ranked_by_hand(task, account, ranks):
    """An annotation as Label Studio 1.23.2 exports it from its own page: every box is there, and "_" is what nobody
    moved."""
    boxes = {"_": [], **{f"rank {k}": [] for k in range(1, 5)}}
    for answer in task["data"]["items"]:
        boxes[f"rank {ranks[answer['body']]}"].append(answer["id"])
    result = {"value": {"ranker": boxes}, "id": "Qx7_b2Zk-1", "from_name": "rank", "to_name": "results",
              "type": "ranker", "origin": "manual"}
    return {"id": 5, "completed_by": account, "result": [result], "was_cancelled": False, "ground_truth": False,
            "created_at": "2026-12-01T10:00:00.000001Z", "updated_at": "2026-12-01T10:00:00.000003Z",
            "draft_created_at": "2026-12-01T09:59:50.000000Z", "lead_time": 9.5, "prediction": {}, "result_count": 1,
            "import_id": None, "task": 1, "project": 1, "updated_by": account, "last_created_by": None}


@pytest.fixture
def two_people(tmp_path):
    """An export in which account 1 and account 3 have ranked the same two tasks."""
    rows = [{"prompt": prompt, "responses": [" x", " y", " z"]} for prompt in "ab"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(map(to_line, rows)))
    export_file(tmp_path / "a.jsonl", tmp_path / "ls")
    tasks = json.loads((tmp_path / "ls/ranker_tasks.json").read_text())
    for n, task in enumerate(tasks, 1):
        first, second = {" x": 2, " y": 4, " z": 4}, {" x": 3, " y": 1, " z": 2}
        task |= {"id": n, "annotations": [ranked_by_hand(task, 1, first), ranked_by_hand(task, 3, second)]}
    return tasks


def test_votes_and_names_go_there_and_back_and_there_again(two_people, tmp_path, capsys):
    votes = run_import(tmp_path, two_people, names=["1=Ann", "3=Cem"])
    assert [(row["annotator"], row["ranks"]) for row in votes] == [("Ann", [1, 2, 2]), ("Cem", [3, 1, 2])] * 2
    assert capsys.readouterr().out.endswith("votes: 2 by Ann, 2 by Cem\n")
    (tmp_path / "votes.jsonl").write_bytes(b"".join(map(to_line, votes)))
    export_file(tmp_path / "votes.jsonl", tmp_path / "again")
    tasks = json.loads((tmp_path / "again/ranker_tasks.json").read_text())
    assert [task["data"] for task in tasks] == [task["data"] for task in two_people]
    for task, before in zip(tasks, two_people):
        task["annotations"] = before["annotations"]
    assert run_import(tmp_path, tasks, names=["1=Ann", "3=Cem"]) == votes


@pytest.mark.parametrize("names, said", [
    ([], "2 by 1, 2 by 3. A number is an account of Label Studio; import with --names 1=Ann to name it"),
    (["1=Ann"], "2 by Ann, 2 by 3. A number is an account of Label Studio; import with --names 3=Ann to name it"),
    (["1=Ann", "3=a=b", "8=Dan"], "2 by Ann, 2 by a=b"),
])
def test_the_import_says_whose_votes_there_are_and_how_to_name_accounts(two_people, tmp_path, capsys, names, said):
    run_import(tmp_path, two_people, names=names)
    assert capsys.readouterr().out.splitlines()[-1] == f"  votes: {said}"


def test_addresses_are_names_already_and_can_have_others(two_people, tmp_path, capsys):
    for task in two_people:
        for annotation in task["annotations"]:
            by = annotation["completed_by"]
            annotation["completed_by"] = {"id": by, "email": f"p{by}@example.org", "first_name": "", "last_name": ""}
    run_import(tmp_path, two_people)
    assert capsys.readouterr().out.endswith("votes: 2 by p1@example.org, 2 by p3@example.org\n")
    rows = run_import(tmp_path, two_people, names=["p3@example.org=Cem"])
    assert {row["annotator"] for row in rows} == {"p1@example.org", "Cem"}


@pytest.mark.parametrize("names, message", [
    (["1=Ann", "3=Ann"], "--names 1=Ann 3=Ann: give each account one name of its own; these have voted: 1, 3"),
    (["1=3"], "one name of its own"), (["1=Ann", "1=Bob"], "one name of its own"),
    (["Ann"], "--names Ann: write pairs like 1=Ann or"), (["1="], "write pairs"), (["=Ann"], "write pairs"),
])
def test_no_two_accounts_become_one_person(two_people, tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        run_import(tmp_path, two_people, names=names)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MINIRLHF_REAL_DATA"), reason="MINIRLHF_REAL_DATA is not set")
def test_the_real_export_has_32_comparisons_18_left_and_14_right_and_trains(tmp_path, monkeypatch, capsys):
    export = Path(os.environ["MINIRLHF_REAL_DATA"]) / "label_studio_export.json"
    import_file(export, tmp_path / "real.jsonl")
    rows = read_comparisons(tmp_path / "real.jsonl")
    assert len(rows) == 32 == len({row.prompt for row in rows}) and "dropped: nothing" in capsys.readouterr().out
    assert [sum(row.ranks == ranks for row in rows) for ranks in ((1, 2), (2, 1))] == [18, 14]
    texts = {task["data"]["prompt"]: task["data"] for task in json.loads(export.read_text())}
    assert all(row.responses == (texts[row.prompt]["answer1"], texts[row.prompt]["answer2"]) for row in rows)
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(TESTS.parent / "data/tiny")
    torch.manual_seed(1)
    save_pretrained(GPT2(GPT2Config(vocab_size=tokenizer.n_vocab, n_positions=512, n_embd=16, n_layer=1, n_head=2)),
                    tmp_path / "sft")
    save_tokenizer(tokenizer, tmp_path / "sft")
    train_rm.main(["--model", "sft", "--data", "real.jsonl", "--heldout", "", "--out", "rm", "--epochs", "2"])
    assert (tmp_path / "rm/report.json").exists()


# ---- reading annotations ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, ranks", [
    ({"rank": ["y", "z", "x"]}, [3, 1, 2]),
    ({"anything": ["x", "y", "z"]}, [1, 2, 3]),
    ({"rank 1": ["y"], "rank 2": ["x", "z"]}, [2, 1, 2]),
    ({"rank 10": ["x"], "rank 9": ["y", "z"], "rank 1": []}, [2, 1, 1]),
    ({"rank 1": ["x", "y", "z"]}, [1, 1, 1]),
    ({"rank": ["y", "z", "x"], "_": []}, [3, 1, 2]),
])
def test_rankings(tmp_path, value, ranks):
    assert run_import(tmp_path, tasks("ranker", said("ranker", {"ranker": value})))[0]["ranks"] == ranks


@pytest.mark.parametrize("annotation, reason", [
    (left(was_cancelled=True), "1 skipped or cancelled"), ({"result": []}, "1 without a ranking"),
    ({"result": [{"type": "textarea", "value": {"text": ["hm"]}}]}, "1 without a ranking"),
    ({"result": left()["result"] + right()["result"]}, "1 contradicting themselves"),
])
def test_what_says_nothing_is_dropped_with_its_reason(tmp_path, capsys, annotation, reason):
    assert len(run_import(tmp_path, tasks("pairwise", annotation, left()))) == 1
    assert reason in capsys.readouterr().out
    with pytest.raises(UserError, match=f"no usable annotation in 1 tasks .{reason}"):
        run_import(tmp_path, tasks("pairwise", annotation))


@pytest.mark.parametrize("kind, value, message", [
    ("pairwise", {"selected": "middle"}, "selected is 'middle'"),
    ("choices", {"choices": ["maybe"]}, "maybe"),
    ("ranker", {"ranker": {"rank": ["x", "y", "w"]}}, "'x', 'y', 'w'.*'x', 'y', 'z'"),
    ("ranker", {"ranker": {"good": ["x"], "bad": ["y", "z"]}}, "order of the buckets good, bad"),
    ("ranker", {"ranker": {"rank": "xyz"}}, "no \"rank\" that is a list"),
])
def test_what_is_unknown_is_an_error_that_names_the_task(tmp_path, kind, value, message):
    with pytest.raises(UserError, match="task 7.*" + message):
        run_import(tmp_path, tasks("ranker" if kind == "ranker" else "pairwise", said(kind, value)))


@pytest.mark.parametrize("value, message", [
    ({}, "not a list"),
    ([1], "not a list of annotated tasks"),
    ([{"id": 7, "data": {}}], "JSON-MIN"),
    ([{"id": 7, "annotations": []}], "task 7: no \"data\""),
    (tasks("pairwise", left(), data={**PAIR, "minirlhf": 7}), "task 7: no \"minirlhf\" that is a dict in"),
    (tasks("pairwise", left(), data={"prompt": "P", "answer1": " l"}), "task 7: no \"answer2\""),
    (tasks("pairwise", left(), data={"question": "P"}), "task 7: no \"prompt\" that is a str in .'question"),
    (tasks("pairwise", {"result": [1]}), "task 7: no \"type\""),
    (tasks("pairwise", left(), data={**PAIR, "minirlhf": {"order": [0, 0]}}), "task 7: its order"),
    (tasks("pairwise", left(), data={**PAIR, "prompt": ""}), "task 7: new row: the prompt is empty"),
    (tasks("pairwise", left(), data={**PAIR, "minirlhf": {"finished": 5}}), "task 7: new row: finished must be"),
])
def test_malformed_exports_are_named(tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        run_import(tmp_path, value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_later_annotation_of_the_same_person_replaces_the_earlier(tmp_path, capsys):
    early = left(completed_by=5, updated_at="2026-01-01T00:00:00Z")
    late = right(completed_by=5, updated_at="2026-01-02T00:00:00Z")
    for order in ((early, late), (late, early)):
        rows = run_import(tmp_path, tasks("pairwise", *order))
        assert [(row["annotator"], row["ranks"]) for row in rows] == [("5", [2, 1])]
        assert "1 replaced by a later one" in capsys.readouterr().out


@pytest.mark.parametrize("by, name", [
    ({"completed_by": None}, ""), ({}, ""), ({"completed_by": ""}, ""), ({"completed_by": " "}, ""),
    ({"completed_by": {}}, ""), ({"completed_by": {"email": "", "id": None}}, ""), ({"completed_by": 0}, "0"),
    ({"completed_by": {"id": 0, "email": ""}}, "0"), ({"completed_by": "a@b.c"}, "a@b.c"),
    ({"completed_by": {"id": 3, "email": "a@b.c"}}, "a@b.c"), ({"completed_by": {"id": 3}}, "3"),
])
def test_votes_without_a_name_stay_apart_and_only_those(tmp_path, capsys, by, name):
    """Beside three votes of one person or of unknown ones, one of a person called 2, with a draft, a review and so on."""
    value = tasks("pairwise", left(), left(), right(), right(completed_by=2), right(was_cancelled=True))
    for annotation in value[0]["annotations"][:3]:
        del annotation["completed_by"]
        annotation.update(by, reviews=[{"accepted": False}], updated_at="2026-01-01T00:00:00Z")
        annotation["result"][0]["meta"] = {"minirlhf": {"extra": {"annotator": "Alice"}}}       # it was copied
    value[0].update(predictions=[left()], drafts=[left()])
    rows = run_import(tmp_path, value)
    assert sorted(row["annotator"] for row in rows) == sorted([name] * (1 if name else 3) + ["2"])
    assert [row["ranks"] for row in rows if row["annotator"] == name] == [[1, 2], [1, 2], [2, 1]][2 if name else 0:]
    print_stats(tmp_path / "out.jsonl")
    said = capsys.readouterr().out
    assert ("(no name) and (no name): 0.333 of 3 pairs" in said) == (not name)


def test_a_name_that_is_none_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"task 7: completed_by is \[1\], neither a number nor a name"):
        run_import(tmp_path, tasks("pairwise", left(completed_by=[1])))


def test_leading_space_is_added_only_on_request_and_where_there_is_none(tmp_path):
    value = tasks("pairwise", left(), data={"prompt": "P", "answer1": "l", "answer2": " r"})
    assert run_import(tmp_path, value)[0]["responses"] == ["l", " r"]
    assert run_import(tmp_path, value, leading_space=True)[0]["responses"] == [" l", " r"]
