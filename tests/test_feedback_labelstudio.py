"""Label Studio: our export, its export, and back.

fixtures_labelstudio_*.json are what Label Studio 1.23.2 wrote for tasks of ours that were imported into it with the
exported configuration and annotated through its API; the texts are made up. The real export in $MINIRLHF_REAL_DATA is
other people's.
"""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import train_rm
from minirlhf.files.errors import UserError, run_main
from minirlhf.data import read_comparisons
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
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
