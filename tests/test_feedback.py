"""The feedback tool without a browser: votes on the disk, crashes, parallel people, hostile requests, sampling."""

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train_rm
from minirlhf.files.errors import UserError, run_main
from minirlhf.data import read_comparisons, read_demonstrations
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools.feedback.__main__ import main, parse_args
from minirlhf.tools.feedback.items import (AHEAD, Given, Policy, Sampler, find_templates, instruction_of,
                                           load_policies, read_items, title_of, turns_of)
from minirlhf.tools.feedback.server import PAGE, Server
from minirlhf.tools.feedback.session import Session
from minirlhf.tools.feedback.stats import read_votes
from minirlhf.tools.feedback.votes import Journal, comparison_row, item_id, lock, sidecar, to_line
from minirlhf.weights import save_pretrained

ROOT = Path(__file__).parents[1]
EVIL = ' <script>document.title = "owned"</script></textarea><img src=x onerror="document.title=1">'


class Shelf:
    """A sampler whose items are all there from the start."""

    error = None

    def __init__(self, n=10, K=4):
        self.prompts = [f"Instruction {i}" for i in range(n)]
        self.items = [make_item(prompt, [f" Answer {k} to {prompt}." for k in range(K)]) for prompt in self.prompts]

    def want(self, number):
        pass


def make_item(prompt, responses):
    return {"item": item_id(prompt, responses), "prompt": prompt, "responses": responses,
            "finished": [k != 1 for k in range(len(responses))], "models": ["out/sft"] * len(responses)}


def session(folder, shelf=None, mode="rank"):
    return Session(mode, folder / "votes.jsonl", shelf or Shelf(), [], seed=1)


def rows_of(folder, name="votes.jsonl"):
    file = folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def vote_by_text(a_session, annotator, best_first):
    """Votes for the next item by what its answers say, as a person would: not knowing where each one stands."""
    shown = a_session.next(annotator)
    ranks = [1 + sorted(shown["answers"], key=best_first).index(answer) for answer in shown["answers"]]
    return shown["item"], a_session.vote(annotator, shown["item"], ranks, 1.5)


# ---- votes -----------------------------------------------------------------------------------------------------------

def test_a_vote_is_a_comparison_in_the_order_of_the_responses_not_of_the_page(tmp_path):
    s = session(tmp_path)
    for _ in range(10):
        vote_by_text(s, "ann", best_first=lambda text: text)            # "Answer 0" is the best, "Answer 3" the worst
    rows = rows_of(tmp_path)
    assert [row.ranks for row in read_comparisons(tmp_path / "votes.jsonl")] == [(1, 2, 3, 4)] * 10
    assert all(row["finished"] == [True, False, True, True] and row["annotator"] == "ann" for row in rows)
    assert len({tuple(row["order"]) for row in rows}) > 5               # the page showed them in many orders
    assert s.next("ann")["finished"]


def test_a_reload_shows_the_same_order_and_another_person_another(tmp_path):
    s = session(tmp_path, Shelf(n=1, K=6))
    assert s.next("ann") == s.next("ann") and s.next("ann")["item"] == s.next("bob")["item"]
    assert len({tuple(s.next(f"person {i}")["answers"]) for i in range(20)}) > 10


def test_every_answer_comes_first_equally_often(tmp_path):
    s = session(tmp_path, Shelf(n=1, K=2))
    first = sum(s.order(s.sampler.items[0], f"person {i}")[0] for i in range(2000))
    assert 900 < first < 1100                                           # 4.5 standard deviations


def test_after_a_restart_it_goes_on_with_the_next_prompt_and_can_undo(tmp_path):
    s = session(tmp_path)
    for _ in range(3):
        vote_by_text(s, "ann", str)
    s.skip("ann", s.next("ann")["item"], 0.5)
    again = session(tmp_path)
    state = again.next("ann")
    assert (state["instruction"], state["votes"], state["skips"], state["total"]) == ("Instruction 4", 3, 1, 10)
    again.undo("ann")                                                   # the skip
    again.undo("ann")                                                   # the third vote
    assert again.next("ann")["instruction"] == "Instruction 2"
    assert len(rows_of(tmp_path)) == 2 and rows_of(tmp_path, "votes.skips.jsonl") == []


def test_undo_gives_back_the_ranking_and_takes_only_ones_own(tmp_path):
    s = session(tmp_path)
    item, _ = vote_by_text(s, "ann", str)
    before = (tmp_path / "votes.jsonl").read_bytes()
    s.vote("bob", item, [2, 1, 3, 3], 1)
    vote_by_text(s, "ann", str)
    assert s.undo("bob") == {"undone": item, "ranks": [2, 1, 3, 3], "response": None, "flags": [], "note": ""}
    s.undo("ann")
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    assert s.undo("bob") == {"undone": None}


def test_a_repeated_vote_counts_once(tmp_path):
    s = session(tmp_path)
    item = s.next("ann")["item"]
    assert [s.vote("ann", item, [1, 2, 3, 4], 1) for _ in range(3)] == [{"saved": True}] * 3
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.parametrize(
    "ranks", [[1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3], [2, 2, 3, 3], [1, 1, 1, True], [10**9] * 4, "1234", None])
def test_ranks_that_are_none_are_refused(tmp_path, ranks):
    s = session(tmp_path)
    with pytest.raises(UserError):
        s.vote("ann", s.next("ann")["item"], ranks, 1)
    assert rows_of(tmp_path) == []


def test_everyone_gets_the_same_items(tmp_path):
    s = session(tmp_path)
    seen = {name: [vote_by_text(s, name, str)[0] for _ in range(10)] for name in ("ann", "bob")}
    assert seen["ann"] == seen["bob"] and len(set(seen["ann"])) == 10
    assert s.next("ann")["finished"] and s.next("bob")["finished"] and len(rows_of(tmp_path)) == 20


def test_write_keeps_the_space_between_prompt_and_answer(tmp_path):
    s = session(tmp_path, Shelf(n=2, K=1), mode="write")
    s.write("ann", s.next("ann")["item"], "  Mine, with\r\ntwo lines. \n", 9)
    with pytest.raises(UserError):
        s.write("ann", s.next("ann")["item"], " \n", 9)
    with pytest.raises(UserError, match="surrogate"):
        s.write("ann", s.next("ann")["item"], "half \ud800", 9)
    assert [row.responses for row in read_demonstrations(tmp_path / "votes.jsonl")] == [(" Mine, with\ntwo lines.",)]


def test_the_reward_model_trains_on_the_file_as_it_is(tmp_path, monkeypatch, policy_folder):
    s = session(tmp_path)
    for name in ("ann", "bob"):
        for _ in range(4):
            vote_by_text(s, name, str)
    s.vote("ann", s.next("ann")["item"], [1, 1, 1, 1], 1)
    monkeypatch.chdir(tmp_path)
    train_rm.main(["--model", str(policy_folder), "--data", "votes.jsonl", "--heldout", "", "--out", "rm",
                   "--epochs", "1"])
    assert json.loads((tmp_path / "rm/report.json").read_text())["reward_std"] > 0


# ---- files that crashes leave ----------------------------------------------------------------------------------------

def test_half_a_last_line_is_cut_off_and_nothing_else(tmp_path, capsys):
    file = tmp_path / "votes.jsonl"
    for cut in range(1, 40):
        file.write_bytes(to_line({"a": 1}) + to_line({"prompt": "ü" * 40})[:cut])
        assert Journal(file).rows == [{"a": 1}] and file.read_bytes() == to_line({"a": 1})
    assert "cut off 39 bytes" in capsys.readouterr().out
    file.write_bytes(b'{"a":1}\n{"a":2}')                               # whole: someone's editor left out the line end
    journal = Journal(file)
    journal.append({"a": 3})
    assert file.read_bytes() == b'{"a":1}\n{"a":2}\n{"a":3}\n' and journal.rows == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    "data", [b'{"a": 1}\nnot json\n{"a": 2}\n', b"a text of somebody else", b"\x00\xff\n\n{", b'{"a":1}\nx\n{"a"'])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path, data):
    file = tmp_path / "votes.jsonl"
    file.write_bytes(data)
    with pytest.raises(UserError):
        Journal(file)
    assert file.read_bytes() == data


def test_a_full_disk_loses_no_vote_and_confirms_none(tmp_path, monkeypatch):
    s = session(tmp_path)
    vote_by_text(s, "ann", str)
    before, item = (tmp_path / "votes.jsonl").read_bytes(), s.next("ann")["item"]

    def full(_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError):
            s.vote("ann", item, [1, 2, 3, 4], 1)
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    s.vote("ann", item, [1, 2, 3, 4], 1)
    assert len(rows_of(tmp_path)) == 2


def test_two_servers_cannot_write_to_one_file(tmp_path):
    with lock(tmp_path / "x.jsonl"):
        with pytest.raises(UserError, match="another feedback server.*another name"):
            lock(tmp_path / "x.jsonl")
    lock(tmp_path / "x.jsonl").close()


def test_comparison_row_is_what_the_embedded_world_writes():
    line = (ROOT / "data/tiny/comparisons.jsonl").open().readline()
    row = json.loads(line)
    finished = row.get("finished")
    made = comparison_row(row["prompt"], row["responses"], row["ranks"], finished, annotators=row["annotators"])
    assert made == row
    with pytest.raises(UserError, match="new row: ranks"):
        comparison_row("a", ["b", "c"], [1])


# ---- flags, notes and revising ---------------------------------------------------------------------------------------

REMARKS = {"flags": ["prompt broken"], "note": "Which nurse?"}


def test_flags_and_a_note_are_kept_with_the_vote_or_the_skip_and_given_back(tmp_path):
    s = session(tmp_path)
    first, second, third = [item["item"] for item in s.sampler.items[:3]]
    s.vote("ann", first, [1, 2, 3, 4], 1, REMARKS)
    s.skip("ann", second, 1, REMARKS)
    s.vote("ann", third, [1, 2, 3, 4], 1)
    with_them, without = rows_of(tmp_path)
    assert with_them.items() >= REMARKS.items() and rows_of(tmp_path, "votes.skips.jsonl")[0].items() >= REMARKS.items()
    assert not {"flags", "note"} & set(without)
    assert [row.ranks for row in read_comparisons(tmp_path / "votes.jsonl")]        # the readers ignore them
    again = session(tmp_path)
    assert again.undo("ann").items() >= {"undone": third, "flags": [], "note": ""}.items()
    assert again.undo("ann").items() >= {"undone": second, **REMARKS}.items()


def test_past_votes_are_listed_latest_first_and_only_ones_own(tmp_path):
    s = session(tmp_path)
    voted, _ = vote_by_text(s, "ann", str)
    vote_by_text(s, "bob", str)
    skipped = s.next("ann")["item"]
    s.skip("ann", skipped, 1, REMARKS)
    tied = s.next("ann")["item"]
    s.vote("ann", tied, [1, 1, 1, 1], 1)
    past = s.past("ann")["past"]
    assert [row["item"] for row in past] == [tied, skipped, voted]
    assert [row["skipped"] for row in past] == [False, True, False]
    assert [row["best"] for row in past] == ["", "", " Answer 0 to Instruction 0."]
    assert past[1].items() >= REMARKS.items() and past[2]["title"] == "Instruction 0"
    assert s.past("eve") == {"past": []} and "out/sft" not in json.dumps(past)


def test_revising_shows_the_vote_and_replaces_it_in_one_step(tmp_path):
    s = session(tmp_path)
    items = [vote_by_text(s, "ann", str)[0] for _ in range(3)]
    before = (tmp_path / "votes.jsonl").read_bytes()
    shown = s.revise("ann", items[0])
    best = shown["answers"][shown["ranks"].index(1)]
    assert best == " Answer 0 to Instruction 0." and (tmp_path / "votes.jsonl").read_bytes() == before
    s.vote("ann", items[0], shown["ranks"][::-1], 2, {"note": "on second thoughts"}, revise=True)
    s.vote("ann", items[0], shown["ranks"][::-1], 2, {"note": "on second thoughts"}, revise=True)     # sent twice
    rows = rows_of(tmp_path)
    assert [row["item"] for row in rows] == [items[1], items[2], items[0]] and rows[-1]["note"] == "on second thoughts"
    again = session(tmp_path)
    assert again.revise("ann", items[0])["ranks"] == shown["ranks"][::-1]
    assert again.undo("ann")["undone"] == items[0]                      # as if it had been undone and voted on again
    for name in (items[0], None, [], "x"):
        with pytest.raises(UserError, match="not voted"):
            again.revise("ann", name)


def test_a_vote_is_revised_to_a_skip_and_back(tmp_path):
    s = session(tmp_path)
    item, _ = vote_by_text(s, "ann", str)
    s.skip("ann", item, 1, revise=True)
    assert rows_of(tmp_path) == [] and len(rows_of(tmp_path, "votes.skips.jsonl")) == 1
    s.vote("ann", item, [4, 3, 2, 1], 1, revise=True)
    assert len(rows_of(tmp_path)) == 1 and rows_of(tmp_path, "votes.skips.jsonl") == []
    assert s.next("ann")["votes"] == 1 and s.next("ann")["skips"] == 0


def test_a_written_answer_is_revised(tmp_path):
    s = session(tmp_path, Shelf(n=2, K=1), mode="write")
    item = s.next("ann")["item"]
    s.write("ann", item, "First try", 1)
    assert s.past("ann")["past"][0]["best"] == " First try" == s.revise("ann", item)["response"]
    s.write("ann", item, "Second try", 1, revise=True)
    assert [row.responses for row in read_demonstrations(tmp_path / "votes.jsonl")] == [(" Second try",)]


def test_a_crash_while_revising_leaves_the_old_vote_or_the_new_one(tmp_path, monkeypatch):
    s = session(tmp_path)
    item, _ = vote_by_text(s, "ann", str)
    before = (tmp_path / "votes.jsonl").read_bytes()

    def power_cut(*_):
        raise OSError(5, "power cut")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(UserError, match="power cut"):
            s.vote("ann", item, [4, 3, 2, 1], 1, revise=True)
        assert (tmp_path / "votes.jsonl").read_bytes() == before
        with pytest.raises(UserError):
            s.skip("ann", item, 1, revise=True)                         # the skip is on the disk, the vote still there
    again = session(tmp_path)
    assert rows_of(tmp_path) == [] and again.next("ann")["skips"] == 1
    assert len(rows_of(tmp_path, "votes.skips.jsonl")) == 1


def test_a_ranking_comes_back_in_the_order_that_the_page_shows_now(tmp_path):
    vote_by_text(session(tmp_path), "ann", str)
    other = Session("rank", tmp_path / "votes.jsonl", Shelf(), [], seed=2)
    shown = other.revise("ann", Shelf().items[0]["item"])
    by_rank = [answer for _, answer in sorted(zip(shown["ranks"], shown["answers"]))]
    assert by_rank == Shelf().items[0]["responses"] and other.undo("ann")["ranks"] == shown["ranks"]


# ---- answers that exist already --------------------------------------------------------------------------------------

def read_rows_as_items(folder, *rows):
    (folder / "a.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return read_items(folder / "a.jsonl")


def test_answers_come_from_every_form_of_a_row_without_its_verdict(tmp_path, capsys):
    found = read_rows_as_items(
        tmp_path,
        {"prompt": "a", "chosen": " x", "rejected": " y"},
        {"prompt": "b", "responses": [" x", " y", " z"], "ranks": [3, 1, 2], "finished": [True, False, True]},
        {"prompt": "c", "responses": [" x", " y"], "best": 1, "models": ["m", "n"]},
        {"prompt": "d", "responses": [" x", " x", " y"], "finished": [False, True, True]},
        {"prompt": "a", "chosen": " x", "rejected": " y", "annotator": "bob"},      # the same answers, judged twice
        {"prompt": "e", "responses": [" x", " x"]},
        {"prompt": "f", "responses": [" x"]},
        {"prompt": "g", "responses": []})
    assert [(item["prompt"], item["responses"], item["finished"], item["models"]) for item in found] == [
        ("a", [" x", " y"], [True, True], []),
        ("b", [" x", " y", " z"], [True, False, True], []),
        ("c", [" x", " y"], [True, True], ["m", "n"]),
        ("d", [" x", " y"], [False, True], [])]
    said = capsys.readouterr().out
    assert "left out 3 rows with fewer than two different answers" in said and said.count("\n") == 1


@pytest.mark.parametrize("row, message", [
    ({"responses": ["a", "b"]}, 'a.jsonl:1: no "prompt"'),
    ({"prompt": "p"}, 'a.jsonl:1: no "responses"'),
    ({"prompt": "p", "responses": "ab"}, "a.jsonl:1: responses must be a list"),
    ({"prompt": "p", "responses": ["a", 1]}, "a.jsonl:1: response must be a string"),
    ({"prompt": "p", "responses": ["a", "b"], "finished": [True]}, "a.jsonl:1: finished must be"),
    ({"prompt": "p", "responses": [str(k) for k in range(10)]}, "a.jsonl:1: more than 9 different answers"),
    ({"prompt": "p", "responses": ["a"]}, "a.jsonl: no row has two different answers"),
])
def test_rows_that_hold_no_answers_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_rows_as_items(tmp_path, row)


def test_given_answers_are_ranked_like_sampled_ones(tmp_path):
    found = read_items(ROOT / "data/tiny/comparisons.jsonl")[:3]
    s = session(tmp_path, Given(found))
    for _ in range(3):
        vote_by_text(s, "ann", str)
    rows = read_comparisons(tmp_path / "votes.jsonl")
    assert s.next("ann")["finished"] and [row.prompt for row in rows] == [item["prompt"] for item in found]
    assert [list(row.responses) for row in rows] == [item["responses"] for item in found]
    assert [list(row.finished) for row in rows] == [item["finished"] for item in found]


# ---- dialogues -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, turns", [
    ("\n\nHuman: Hi\n\nAssistant: Hello.\nUser: is a word\n\nHuman: Bye\n\nAssistant:",
     [("Human", "Hi"), ("Assistant", "Hello.\nUser: is a word"), ("Human", "Bye")]),
    ("Human: Hi\n\nAssistant: Sure, here is", [("Human", "Hi"), ("Assistant", "Sure, here is")]),
    ("User: Hi\nAssistant: Hello\nUser: two\nlines\nAssistant:",
     [("User", "Hi"), ("Assistant", "Hello"), ("User", "two\nlines")]),
    ("System: Be kind.\nUser: Hi\nAssistant: ", [("System", "Be kind."), ("User", "Hi")]),
    ("A talk.\n\nHuman: Hi\n\nAssistant:", [("", "A talk."), ("Human", "Hi")]),
    ("Do: A talk.\nUser: Hi\nBot: Yes\nSo:", [("", "A talk."), ("User", "Hi"), ("Bot", "Yes")]),
    ("Tell me about Assistant: and Human: in a line", []),
    ("User: bob\nPassword: x", []),
    ("Write a story.", []),
    ("", []),
])
def test_a_dialogue_is_shown_as_turns(prompt, turns):
    templates = ["\n\nHuman: {instruction}\n\nAssistant:", "Do: {instruction}\nSo:"]
    assert turns_of(prompt, templates) == turns


def test_the_page_gets_the_turns_and_the_list_shows_the_last_one(tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: " + "Bye " * 200 + "\n\nAssistant:"
    shelf = Shelf(n=1)
    shelf.items = [make_item(prompt, [" a", " b"])]
    s = session(tmp_path, shelf)
    shown = s.next("ann")
    assert [speaker for speaker, _ in shown["turns"]] == ["Human", "Assistant", "Human"]
    s.skip("ann", shown["item"], 1)
    assert s.past("ann")["past"][0]["title"] == title_of(prompt, []) == ("Bye " * 75)
    assert session(tmp_path / "x", Shelf()).next("ann")["turns"] == []


# ---- the server ------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path):
    server = Server(0, session(tmp_path, Shelf(n=12)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def post(server, path, body=None, token=None, raw=None, **headers):
    """-> status and reply; headers None are left out."""
    given = {"Host": f"127.0.0.1:{server.server_port}", "X-Token": server.token if token is None else token,
             "Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    data = json.dumps(body).encode() if raw is None else raw
    connection.putrequest("POST", path, skip_host=True)
    for name, value in {"Content-Length": str(len(data)), **given}.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, json.loads(content)


def get(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


ANN = {"annotator": "Ann"}


def test_the_page_and_its_actions(server, tmp_path):
    status, headers, page = get(server, f"/?token={server.token}")
    assert status == 200 and page == PAGE.read_bytes()
    status, shown = post(server, "/next", ANN)
    assert status == 200 and shown["instruction"] == "Instruction 0" and len(shown["answers"]) == 4
    assert "out/sft" not in json.dumps(shown)                           # blind
    assert post(server, "/vote",
                {**ANN, "item": shown["item"], "ranks": [1, 2, 2, 3], "seconds": 2}) == (200, {"saved": True})
    assert post(server, "/skip", {**ANN, "item": post(server, "/next", ANN)[1]["item"]})[0] == 200
    assert post(server, "/undo", ANN)[1]["ranks"] is None
    assert post(server, "/undo", ANN)[1]["ranks"] == [1, 2, 2, 3]


def test_flags_past_votes_revising_and_guidelines_by_the_server(server, tmp_path):
    item = post(server, "/next", ANN)[1]["item"]
    vote = {**ANN, "item": item, "ranks": [1, 2, 3, 4], "seconds": 2}
    flags = {"flags": ["prompt broken", "all bad", "all bad"], "note": "  odd  "}
    assert post(server, "/vote", {**vote, **flags})[0] == 200
    assert rows_of(tmp_path)[0].items() >= {"flags": ["all bad", "prompt broken"], "note": "odd"}.items()
    assert [row["item"] for row in post(server, "/past", ANN)[1]["past"]] == [item]
    assert post(server, "/revise", {**ANN, "item": item})[1]["ranks"] == [1, 2, 3, 4]
    assert post(server, "/vote", {**vote, "ranks": [4, 3, 2, 1]})[0] == 200                     # a vote sent twice
    assert post(server, "/revise", {**ANN, "item": item})[1]["ranks"] == [1, 2, 3, 4]
    assert post(server, "/vote", {**vote, "ranks": [4, 3, 2, 1], "revise": True, "flags": [], "note": " "})[0] == 200
    row, = rows_of(tmp_path)
    assert [row["ranks"][k] for k in row["order"]] == [4, 3, 2, 1] and not {"flags", "note"} & set(row)
    assert post(server, "/guidelines", ANN) == (200, {"text": ""})


@pytest.mark.parametrize("remarks", [
    {"flags": ["other"]}, {"flags": "all bad"}, {"flags": [[]]}, {"flags": None}, {"note": 1}, {"note": None},
    {"note": "\ud800"}])
def test_bad_flags_and_notes_are_refused(server, tmp_path, remarks):
    item = server.session.next("Ann")["item"]
    assert post(server, "/skip", {**ANN, "item": item, **remarks})[0] == 400
    assert rows_of(tmp_path, "votes.skips.jsonl") == []


def token_after_a_restart(folder, mode="rank", seed=1):
    server = Server(0, Session(mode, folder / "votes.jsonl", Shelf(), [], seed=seed))
    server.server_close()
    return server.token


def test_the_token_outlives_the_server_in_a_file_that_only_the_owner_can_read(tmp_path):
    file = tmp_path / "votes.token"
    token = token_after_a_restart(tmp_path)
    assert token_after_a_restart(tmp_path) == token and len(token) >= 32
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)                                                   # somebody else may have read it
    changed = token_after_a_restart(tmp_path)
    assert changed != token and file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir() if "token" in entry.name or "tmp" in entry.name] == [file.name]
    assert token not in file.read_text()                                # the file alone is no address


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_secret_that_is_not_whole_is_replaced(tmp_path, content):
    file = tmp_path / "votes.token"
    file.write_bytes(content)
    file.chmod(0o600)
    assert token_after_a_restart(tmp_path) and len(file.read_bytes()) == 32 and b"xxx" not in file.read_bytes()


def test_pages_that_show_another_order_do_not_keep_their_token(tmp_path):
    tokens = [token_after_a_restart(tmp_path, **how) for how in ({}, {"seed": 2}, {"seed": 2, "mode": "judge"})]
    assert len(set(tokens)) == 3


def test_it_listens_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("why, change", [
    ("token", dict(token="")),
    ("token", dict(token="wrong")),
    ("token", dict(token="\xff\xfe")),
    ("token", dict(X_Token=None)),
    ("wrong host", dict(Host="evil.example")),
    ("wrong host", dict(Host="evil.example:8321")),
    ("wrong host", dict(Host=None)),
    ("wrong host", dict(Host="")),
    ("other sites", dict(Origin="http://evil.example")),
    ("other sites", dict(Origin="null")),
    ("other sites", dict(Sec_Fetch_Site="cross-site")),
    ("other sites", dict(Sec_Fetch_Site="same-site")),
    ("length is needed", dict(Content_Length=None)),
    ("length is needed", dict(Content_Length="-1")),
    ("length is needed", dict(Content_Length="1e3")),
    ("more than", dict(Content_Length="65537")),
    ("more than", dict(Content_Length="999999999")),
    ("length is needed", dict(Transfer_Encoding="chunked")),
])
def test_foreign_requests_are_refused(server, tmp_path, why, change):
    item = server.session.next("Ann")["item"]
    status, reply = post(server, "/vote", {**ANN, "item": item, "ranks": [1, 2, 3, 4]}, **change)
    assert status == 400 and why in reply["error"]
    assert rows_of(tmp_path) == []


@pytest.mark.parametrize("body", [
    b"",
    b"{",
    b"[]",
    b"1",
    b"\xff",
    b"[" * 5000,
    b'{"annotator": "Ann", "item": ' + b"9" * 5000 + b"}",
    {},
    {"annotator": 1},
    {"annotator": ""},
    {"annotator": " Ann"},
    {"annotator": "a" * 41},
    {"annotator": "a\nb"},
    {"annotator": "\ud800"},
    ANN,
    {**ANN, "item": None},
    {**ANN, "item": []},
    {**ANN, "item": {}},
    {**ANN, "item": "0" * 16},
    {**ANN, "seconds": -1},
    {**ANN, "seconds": "1"},
    {**ANN, "seconds": float("nan")},
    {**ANN, "seconds": float("inf")},
])
def test_bad_bodies_are_refused(server, tmp_path, body):
    raw = body if isinstance(body, bytes) else None
    assert post(server, "/vote", body, raw=raw)[0] == 400
    assert rows_of(tmp_path) == []


def test_a_page_without_the_token_is_not_given_out(server):
    paths = ("/", "/?token=", "/?token=x", f"/votes.jsonl?token={server.token}", "/../feedback.py")
    assert [get(server, path)[0] for path in paths] == [403] * 5
    assert get(server, f"/?token={server.token}", Host="evil.example")[0] == 403
    assert get(server, f"/?token={server.token}", Host=f"localhost:{server.server_port}")[0] == 200


def test_text_of_a_model_is_data_to_the_page_never_html(server):
    server.session.sampler.items[0] = make_item("Instruction 0 " + EVIL, [EVIL, " two"])
    _, shown = post(server, "/next", ANN)
    assert EVIL in shown["answers"] and EVIL in shown["instruction"]
    _, headers, page = get(server, f"/?token={server.token}")
    assert b"owned" not in page and not re.search(rb"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere():
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"// .*", "", PAGE.read_text()))


def garbage(rng, server):
    """One malformed request."""
    good = (f"POST /vote HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nX-Token: {server.token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 20\r\n\r\n" + '{"annotator": "Ann"}').encode()
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 300))
    if kind == 1:
        return good[:rng.randrange(len(good) - 1)]                      # cut off
    if kind == 2:
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 10)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        return bytes(bad)
    if kind == 3:
        return good.replace(b"Host", b"X" * 70000)
    return good.replace(b"\r\n\r\n", b"\r\n" + b"A: b\r\n" * 150 + b"\r\n")


def test_a_thousand_malformed_requests_and_votes_between_them(server, tmp_path):
    rng = random.Random(1)
    for i in range(1000):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
            try:
                client.sendall(garbage(rng, server))
                client.shutdown(socket.SHUT_WR)
                client.recv(1000)
            except ConnectionError:                                     # refused before it was read to its end
                pass
        if i % 100 == 50:
            item = post(server, "/next", ANN)[1]["item"]
            assert post(server, "/vote", {**ANN, "item": item, "ranks": [1, 2, 3, 4], "seconds": 1})[0] == 200
    assert len(read_comparisons(tmp_path / "votes.jsonl")) == len(rows_of(tmp_path)) == 10


def test_twenty_clients_at_once_lose_and_double_nothing(server, tmp_path):
    problems = []

    def work(name):
        try:
            rng = random.Random(name)
            while not (shown := post(server, "/next", {"annotator": name})[1]).get("finished"):
                body = {"annotator": name, "item": shown["item"], "ranks": rng.sample([1, 2, 3, 4], 4), "seconds": 1}
                for _ in range(rng.choice([1, 1, 2])):                  # impatient: the same vote twice
                    assert post(server, "/vote", body) == (200, {"saved": True})
                if rng.random() < 0.2:
                    assert post(server, "/undo", {"annotator": name})[1]["undone"] == shown["item"]
        except Exception as error:
            problems.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(f"person {i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = rows_of(tmp_path)
    assert problems == [] and len(read_comparisons(tmp_path / "votes.jsonl")) == len(rows) == 20 * 12
    assert len({(row["annotator"], row["item"]) for row in rows}) == 20 * 12


# ---- sampling --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """A model that knows nothing, with the vocabulary of data/tiny."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = load_tokenizer(ROOT / "data/tiny")
    torch.manual_seed(1)
    save_pretrained(GPT2(GPT2Config(vocab_size=tokenizer.n_vocab, n_positions=128, n_embd=16, n_layer=1, n_head=2)),
                    folder)
    save_tokenizer(tokenizer, folder)
    return folder


def sampler(folder, policy_folder, prompts, names=("a",), K=4):
    args = parse_args(["rank", "--max_response", "8"])
    policies = [Policy(name, *load_policies([policy_folder], "cpu")[0][1:]) for name in names]
    return Sampler(prompts, policies, K, Journal(folder / "x.items.jsonl"), args)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_items_are_sampled_a_few_ahead_and_the_same_after_a_restart(tmp_path, policy_folder):
    prompts = [f"Tell story {i}." for i in range(20)]
    first = sampler(tmp_path, policy_folder, prompts)
    first.want(0)
    wait_for(lambda: len(first.items) == AHEAD)
    time.sleep(0.2)
    assert len(first.items) == AHEAD
    first.want(3)
    wait_for(lambda: len(first.items) == 3 + AHEAD)
    first.stop()
    assert all(len(set(item["responses"])) == 4 and item["models"] == ["a"] * 4 for item in first.items)
    (tmp_path / "x.items.jsonl").write_bytes(b"".join(map(to_line, first.items[:2])))
    second = sampler(tmp_path, policy_folder, prompts)
    second.want(3)
    wait_for(lambda: len(second.items) == 3 + AHEAD)
    second.stop()
    assert second.items == first.items == rows_of(tmp_path, "x.items.jsonl")


def test_sample_makes_all_items_that_rank_would_show_and_goes_on_where_it_stopped(tmp_path, policy_folder, capsys):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Story {i}."}) + "\n" for i in range(7)))
    flags = ["--policy", policy_folder, "--prompts", tmp_path / "prompts.jsonl", "--answers", 3, "--max_response", 8]

    def run(name, *more):
        main([*map(str, ["sample", *flags, "--out", tmp_path / name, *more])])
        return rows_of(tmp_path, name.replace(".jsonl", ".items.jsonl"))
    all_at_once = run("a.jsonl")
    assert [row["prompt"] for row in all_at_once] == [f"Story {i}." for i in range(7)]
    assert all(len(set(row["responses"])) == 3 for row in all_at_once)
    assert run("b.jsonl", "--n", 4) == all_at_once[:4] and run("b.jsonl") == all_at_once
    assert "b.items.jsonl: answers to 7 prompts" in capsys.readouterr().out
    assert run("b.jsonl") == all_at_once
    assert len(read_items(tmp_path / "b.items.jsonl")) == 7
    with pytest.raises(UserError, match="--answers must be from 2 to 9"):
        run("c.jsonl", "--answers", 1)


def test_failed_sampling_is_shown_and_no_item_is_left_out(tmp_path, policy_folder, capsys):
    broken = sampler(tmp_path, policy_folder, [f"Tell story {i}." for i in range(9)])
    make_item = broken.make_item
    broken.make_item = lambda index: make_item(index if index != 2 else 99)
    s = session(tmp_path, broken)
    broken.want(0)
    wait_for(lambda: broken.error)
    assert [item["prompt"] for item in broken.items] == ["Tell story 0.", "Tell story 1."]
    for _ in range(2):
        s.skip("ann", s.next("ann")["item"], 1)
    with pytest.raises(RuntimeError, match="sampling stopped: IndexError"):
        s.next("ann")
    server = Server(0, s)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    status, reply = post(server, "/next", {"annotator": "ann"})
    server.shutdown(), server.server_close(), broken.stop()
    assert status == 500 and reply["error"].startswith("sampling stopped")


def test_answers_are_dealt_out_to_the_policies_in_turn(tmp_path, policy_folder):
    item = sampler(tmp_path, policy_folder, ["One."], names=("a", "b"), K=3).make_item(0)
    assert sorted(item["models"]) == ["a", "a", "b"] and len(set(item["responses"])) == 3


def test_items_of_other_prompts_or_models_are_not_mixed_in(tmp_path, policy_folder):
    Journal(tmp_path / "x.items.jsonl").append(sampler(tmp_path, policy_folder, ["One."]).make_item(0))
    sampler(tmp_path, policy_folder, ["One.", "Two."])
    for prompts, names in ((["Two."], ("a",)), (["One."], ("b",))):
        with pytest.raises(UserError, match="other prompts or models"):
            sampler(tmp_path, policy_folder, prompts, names)


def test_the_page_shows_the_bare_instruction(tmp_path):
    templates = ["Do: {instruction}\nWith: {input}\nSo: ", "Do: {instruction}\nSo: "]
    (tmp_path / "meta.json").write_text(
        json.dumps({"template": templates[1], "template_input": templates[0], "other": 1}))
    found = find_templates(tmp_path / "prompts.jsonl", [tmp_path])
    assert instruction_of("Do: sing (a.*b)\nloud\nSo: ", found) == "sing (a.*b)\nloud"
    assert instruction_of("Do: sing\nWith: joy\nSo: ", templates) == "sing\n\njoy"
    assert instruction_of("Something else", templates) == "Something else" == instruction_of("Something else", [])
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json"):
        find_templates(tmp_path / "prompts.jsonl", [])


# ---- the command line ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["rank", "--answers", "1"], "--answers must be from 2 to 9"),
    (["rank", "--answers", "10"], "--answers"),
    (["rank", "--answers", "x"], "--answers"),
    (["rank", "--n", "-1"], "--n"),
    ([], "COMMAND"),
    (["rang"], "rang"),
    (["rank", "--policy", "no/such"], "no/such"),
    (["judge", "--a", "x", "--b", "x/"], "both x"),
    (["stats", "no.jsonl"], "no.jsonl"),
    (["export", "no.jsonl", "--out", "d"], "no.jsonl"),
    (["import", "no.json", "--out", "f"], "no.json"),
    (["rank", "--answers_from", "no.jsonl"], "no.jsonl"),
    (["rank", "--answers_from", "a.jsonl", "--policy", "p"], "--policy"),
    (["rank", "--answers_from", "a.jsonl", "--out", "./a.jsonl"], "--answers_from and --out"),
    (["rank", "--answers_from", "a.jsonl", "--guidelines", "no.md"], "--guidelines no.md"),
    (["rank", "--answers_from", "a.jsonl", "--guidelines", "latin1.md"], "--guidelines latin1.md: not a text in UTF-8"),
])
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    (tmp_path / "latin1.md").write_bytes(b"\xe4")
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: main(argv))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_prompt_that_does_not_fit_is_named_with_its_line(tmp_path, monkeypatch, policy_folder):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "short"}\n' + json.dumps({"prompt": "long " * 200}) + "\n")
    with pytest.raises(UserError, match="p.jsonl:2.*more than 128"):
        main(["rank", "--policy", str(policy_folder), "--prompts", "p.jsonl"])
    with pytest.raises(UserError, match="temperature 0"):
        main(["rank", "--policy", str(policy_folder), "--prompts", "p.jsonl", "--temperature", "0"])


def test_a_port_in_use_is_one_line_that_says_what_to_do(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit):
            run_main(lambda: main(["rank", "--answers_from", str(tmp_path / "a.jsonl"), "--port", port,
                                   "--out", str(tmp_path / "votes.jsonl")]))
    said = capsys.readouterr().err
    assert said.startswith(f"error: --port {port}: ") and "--port 0" in said and said.count("\n") == 1


def start(folder, policy, *more, port=0):
    """The real command in a process of its own -> process, port, token. policy: a model, or a file with answers."""
    source = "--policy" if Path(policy).is_dir() else "--answers_from"
    command = [sys.executable, "-m", "minirlhf.tools.feedback", "rank", "--max_response", "8", "--no_browser", "--port",
               str(port), "--n", "40", source, str(policy), "--out", str(folder / "votes.jsonl"), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if found := re.search(r"http://127.0.0.1:(\d+)/\?token=(\S+)", line):
            return process, int(found[1]), found[2]
    raise AssertionError("no address was printed")


class Address:
    def __init__(self, port, token):
        self.server_port, self.token = port, token


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_that_was_confirmed(tmp_path, policy_folder):
    rng, confirmed = random.Random(2), []
    for _ in range(5):
        process, port, token = start(tmp_path, policy_folder)
        threading.Timer(rng.uniform(0.1, 0.4), process.kill).start()
        try:
            while True:
                shown = post(Address(port, token), "/next", ANN)[1]
                if shown.get("finished"):
                    break
                if "item" in shown:
                    assert shown["item"] not in confirmed
                    post(Address(port, token), "/vote",
                         {**ANN, "item": shown["item"], "ranks": [1, 2, 3, 4], "seconds": 1})
                    confirmed.append(shown["item"])
        except (OSError, http.client.HTTPException):
            pass
        process.wait()
        items = [row["item"] for row in rows_of(tmp_path)]
        assert len(set(items)) == len(items) and set(confirmed) <= set(items)
        assert len(items) <= len(confirmed) + 1                         # one may be on the disk and not confirmed yet
        confirmed = items
    assert confirmed and len(read_comparisons(tmp_path / "votes.jsonl")) == len(confirmed)


@pytest.mark.slow
def test_ctrl_c_ends_judge_with_the_win_rate_and_stats_says_the_same(tmp_path, policy_folder):
    other = tmp_path / "b"
    other.mkdir()
    for file in policy_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "minirlhf.tools.feedback", "judge", "--max_response", "8", "--no_browser",
               "--port", "0", "--n", "20", "--a", str(policy_folder), "--b", str(other),
               "--out", str(tmp_path / "judged.jsonl")]
    # a shell that starts the tests in the background makes them ignore Ctrl-C, and that would be inherited
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    found = next(filter(None, (re.search(r":(\d+)/\?token=(\S+)", line) for line in process.stdout)))
    address, sides = Address(int(found[1]), found[2]), []
    for n in range(20):
        while "item" not in (shown := post(address, "/next", ANN)[1]):
            time.sleep(0.02)
        row = next(row for row in rows_of(tmp_path, "judged.items.jsonl") if row["item"] == shown["item"])
        wanted = row["models"].index(str(other) if n < 15 else str(policy_folder))     # b wins 15 of 20
        side = shown["answers"].index(row["responses"][wanted])
        sides.append(shown["answers"].index(row["responses"][row["models"].index(str(other))]))
        post(address, "/vote", {**ANN, "item": shown["item"], "ranks": [1, 2] if side == 0 else [2, 1], "seconds": 1})
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and "15 wins, 0 ties, 5 losses on 20 prompts" in said
    assert "win rate 0.750, 95 % interval [0.531, 0.888]" in said and "sign test p = 0.041" in said
    assert 3 < sum(sides) < 17                                          # the sides are random
    assert len(read_votes(tmp_path / "judged.jsonl")) == 20


@pytest.mark.slow
def test_after_kill_9_and_a_restart_on_the_same_port_an_open_page_goes_on(tmp_path):
    answers = ROOT / "data/tiny/comparisons.jsonl"
    process, port, token = start(tmp_path, answers)
    item = post(Address(port, token), "/next", ANN)[1]["item"]
    process.kill()
    process.wait()
    process, port_again, token_again = start(tmp_path, answers, port=port)
    assert (port_again, token_again) == (port, token)
    assert post(Address(port, token), "/vote", {**ANN, "item": item, "ranks": [1, 2, 3, 4]}) == (200, {"saved": True})
    second = subprocess.run([sys.executable, "-m", "minirlhf.tools.feedback", "rank", "--answers_from", str(answers),
                             "--out", str(tmp_path / "votes.jsonl")], cwd=ROOT, capture_output=True, text=True)
    process.kill()
    process.wait()
    assert second.returncode == 2 and "another feedback server is writing" in second.stderr
    assert second.stderr.count("\n") == 1 and len(rows_of(tmp_path)) == 1
