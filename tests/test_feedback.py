"""The feedback tool without a browser: votes on the disk, crashes, parallel people, hostile requests, sampling."""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from minirlhf.files.errors import UserError, run_main
from minirlhf.data import read_comparisons, read_demonstrations
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools.feedback.__main__ import main, parse_args, plan
from minirlhf.tools.feedback.items import (Given, Policy, Sampler, find_templates, instruction_of, load_policies,
                                           read_gold, read_items, turns_of)
from minirlhf.tools.feedback.server import MOST, PAGE, Handler, Server
from minirlhf.tools.feedback.session import Session
from minirlhf.tools.feedback.stats import read_votes
from minirlhf.tools.feedback.votes import Journal, item_id, lock, to_line
from minirlhf.weights import save_pretrained

ROOT = Path(__file__).parents[1]
EVIL = ' <script>document.title = "owned"</script></textarea><img src=x onerror="document.title=1">'


def shelf(n=10, K=4):
    """Items that are all there from the start."""
    return Given([make_item(f"Instruction {i}", [f" Answer {k} to Instruction {i}." for k in range(K)])
                  for i in range(n)])


def make_item(prompt, responses):
    return {"item": item_id(prompt, responses), "prompt": prompt, "responses": responses,
            "finished": [k != 1 for k in range(len(responses))], "models": ["out/sft"] * len(responses)}


def session(folder, items=None, mode="rank", seed=1):
    return Session(mode, folder / "votes.jsonl", items or shelf(), [], seed=seed)


def rows_of(folder, name="votes.jsonl"):
    file = folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def vote_by_text(a_session, annotator, best_first):
    """Votes for the next item by what its answers say, as a person would: not knowing where each one stands."""
    shown = a_session.next(annotator)
    ranks = [1 + sorted(shown["answers"], key=best_first).index(answer) for answer in shown["answers"]]
    return shown["item"], a_session.vote(annotator, shown["item"], ranks, 1.5)


def test_with_an_overlap_everybody_gets_the_first_items_and_each_other_one_goes_to_one_person(tmp_path):
    s = session(tmp_path, shelf(13))
    s.overlap = 3
    given = {name: [] for name in ("ann", "bob", "cem")}
    for turn in range(13):                                      # by turns, each with a page of their own
        for name, own in given.items():
            if "item" in s.next(name):
                own.append(vote_by_text(s, name, str)[0])
    first, others = [item["item"] for item in s.sampler.items[:3]], [item["item"] for item in s.sampler.items[3:]]
    assert all(own[:3] == first for own in given.values())
    assert sorted(item for own in given.values() for item in own[3:]) == sorted(others)
    assert max(map(len, given.values())) - min(map(len, given.values())) <= 1


def test_what_is_on_the_page_of_somebody_who_has_left_is_given_out_at_the_end(tmp_path):
    s = session(tmp_path, shelf(4))
    s.overlap = 0
    left = s.next("ann")["item"]
    assert [vote_by_text(s, "bob", str)[0] for _ in range(4)][-1] == left
    assert s.next("bob")["finished"] and s.next("ann")["finished"]


# ---- gold items, and the page of the person in charge -----------------------------------------------------------------

def gold_file(folder, n=3, **first):
    """n items of three answers, of which c is better than a and a better than b."""
    rows = [{"prompt": f"Gold {i}", "responses": [" a", " b", " c"], "ranks": [2, 3, 1]} for i in range(n)]
    rows[0] |= first
    (folder / "gold.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return read_gold(folder / "gold.jsonl")


def test_everybody_gets_each_gold_item_once_spread_among_the_others_and_cannot_tell(tmp_path):
    gold, seen = gold_file(tmp_path), {}
    s = Session("rank", tmp_path / "votes.jsonl", shelf(9), [], seed=1, overlap=3, gold=gold)
    for name in ("ann", "bob"):
        shown, seen[name] = s.next(name), []
        first_total = shown["total"]
        while "item" in shown:
            assert "gold" not in json.dumps(shown).replace("Gold", "") and len(seen[name]) < shown["total"] <= first_total
            seen[name].append(shown["item"])
            s.vote(name, shown["item"], list(range(1, len(shown["answers"]) + 1)), 5)
            shown = s.next(name)
        assert [seen[name].count(item) for item in gold] == [1, 1, 1]
    places = [seen["ann"].index(item) for item in gold]
    assert len(seen["ann"]) == 12 and [place // 4 for place in places] == [0, 1, 2]     # one in every third
    assert len(seen["bob"]) == 6                                        # three with everybody, and the gold
    again = Session("rank", tmp_path / "votes.jsonl", shelf(9), [], seed=1, overlap=3, gold=gold)
    assert again.places == s.places and again.next("ann")["finished"] and len(again.past("ann")["past"]) == 12


@pytest.mark.parametrize("first, says", [
    ({"ranks": [1, 1, 1]}, "one is better"), ({"responses": [" a", " a", " b"]}, "different answers"),
    ({"prompt": "Gold 1"}, "one row"), ({"responses": [" a"], "ranks": [1]}, "gold.jsonl")])
def test_what_is_no_gold_item_is_refused(tmp_path, first, says):
    with pytest.raises(UserError, match=says):
        gold_file(tmp_path, **first)


def test_the_overview_tells_who_is_careful_and_who_answers_without_reading(tmp_path):
    """Ann and Cem know the answers, Bob has the worst one first and takes no time. Dora has only looked."""
    gold = gold_file(tmp_path)
    s = Session("rank", tmp_path / "votes.jsonl", shelf(6, K=3), [], seed=1, gold=gold)
    for name, order, seconds in (("Ann", " c a b", 9), ("Bob", " b a c", 0.1), ("Cem", " c a b", 8)):
        while "item" in (shown := s.next(name)):
            known = shown["instruction"].startswith("Gold")
            best_first = sorted(shown["answers"], key=order.index if known else str, reverse=name == "Bob" and not known)
            s.vote(name, shown["item"], [1 + best_first.index(answer) for answer in shown["answers"]], seconds)
    s.undo("Cem")
    s.skip("Cem", s.next("Cem")["item"], 1)
    s.next("Dora")
    found = s.overview()
    assert found["total"] == found["voted"] == 9
    people = {row["name"]: row for row in found["people"]}
    assert [people[name]["votes"] for name in people] == [9, 9, 8, 0] and people["Cem"]["skips"] == 1
    assert [people[name]["pace"] for name in people] == [(9, 0), (0.1, 9), (8, 0), (0, 0)]
    assert [people[name]["gold"] for name in ("Ann", "Bob", "Dora")] == [(9, 9), (0, 9), (0, 0)]
    kappas = {tuple(row[:2]): row[3] for row in found["agreement"]}
    assert kappas["Ann", "Cem"] == 1 and kappas["Ann", "Bob"] < -0.5 and len(kappas) == 3
    assert json.loads(json.dumps(found)) and s.overview() == found


def test_only_the_address_of_the_person_in_charge_shows_the_overview(server):
    assert post(server, "/overview", ANN)[0] == 400                     # the annotators' token
    assert post(server, "/overview", ANN, token=server.overview_token)[1]["total"] == 12
    assert post(server, "/next", ANN, token=server.overview_token)[0] == 400
    assert get(server, f"/overview?token={server.overview_token}")[2] == PAGE.read_bytes()
    assert get(server, f"/overview?token={server.token}")[0] == 403


@pytest.mark.parametrize("frame, status", [(False, 403), (True, 200)])
def test_a_frame_of_another_site_shows_the_page_only_with_the_flag(tmp_path, frame, status):
    server = Server(0, session(tmp_path), frame)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    found, headers, _ = get(server, f"/?token={server.token}", **{"Sec-Fetch-Site": "cross-site"})
    assert found == status and ("frame-ancestors 'none'" in headers["Content-Security-Policy"]) is not frame
    assert post(server, "/next", ANN, Sec_Fetch_Site="cross-site")[0] == 400            # other sites still ask for nothing
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("people, overlap, gold, says", [
    (3, None, 0, "150 votes x 40 s = 1.7 hours (--people 3)"),
    (3, 20, 5, "105 votes x 40 s = 1.2 hours"),            # 3 x (20 + 5) + 30
    (1, 99, 0, "50 votes x")])
def test_hours_and_interval_are_known_before_the_first_vote(people, overlap, gold, says):
    text = plan(50, overlap, 4, people, gold)
    low, high = map(float, re.search(r"\[(.*), (.*)\]", text).groups())
    n = 3.5 * min(overlap or 50, 50)
    assert text.startswith(says) and high - low == pytest.approx(2 * 1.96 * (0.75 * 0.25 / n) ** 0.5, abs=0.02)


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
    s = session(tmp_path, shelf(n=1, K=6))
    assert s.next("ann") == s.next("ann") and s.next("ann")["item"] == s.next("bob")["item"]
    assert len({tuple(s.next(f"person {i}")["answers"]) for i in range(20)}) > 10


def test_every_answer_comes_first_equally_often(tmp_path):
    s = session(tmp_path, shelf(n=1, K=2))
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


@pytest.mark.parametrize("ranks", [[1, 2, 3], [1, 2, 3, 5], [2, 2, 3, 3], [1, 1, 1, True], "1234"])
def test_ranks_that_are_none_are_refused(tmp_path, ranks):
    s = session(tmp_path)
    with pytest.raises(UserError):
        s.vote("ann", s.next("ann")["item"], ranks, 1)
    assert rows_of(tmp_path) == []


def test_write_keeps_the_space_between_prompt_and_answer(tmp_path):
    s = session(tmp_path, shelf(n=2, K=1), mode="write")
    s.write("ann", s.next("ann")["item"], "  Mine, with\r\ntwo lines. \n", 9)
    with pytest.raises(UserError):
        s.write("ann", s.next("ann")["item"], " \n", 9)
    with pytest.raises(UserError, match="surrogate"):
        s.write("ann", s.next("ann")["item"], "half \ud800", 9)
    assert [row.responses for row in read_demonstrations(tmp_path / "votes.jsonl")] == [(" Mine, with\ntwo lines.",)]


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


@pytest.mark.parametrize("data", [b'{"a": 1}\nnot json\n{"a": 2}\n', b"a text of somebody else"])
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


# ---- flags, notes and revising ---------------------------------------------------------------------------------------

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
    ({"prompt": "p", "responses": ["a", 1]}, "a.jsonl:1: response must be a string"),
    ({"prompt": "p", "responses": [str(k) for k in range(10)]}, "a.jsonl:1: more than 9 different answers"),
    ({"prompt": "p", "responses": ["a"]}, "a.jsonl: no row has two different answers"),
])
def test_rows_that_hold_no_answers_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_rows_as_items(tmp_path, row)


# ---- dialogues -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, turns", [
    ("\n\nHuman: Hi\n\nAssistant: Hello.\nUser: is a word\n\nHuman: Bye\n\nAssistant:",
     [("Human", "Hi"), ("Assistant", "Hello.\nUser: is a word"), ("Human", "Bye")]),
    ("Human: Hi\n\nAssistant: Sure, here is", [("Human", "Hi"), ("Assistant", "Sure, here is")]),
    ("User: Hi\nAssistant: Hello\nUser: two\nlines\nAssistant:",
     [("User", "Hi"), ("Assistant", "Hello"), ("User", "two\nlines")]),
    ("A talk.\n\nHuman: Hi\n\nAssistant:", [("", "A talk."), ("Human", "Hi")]),
    ("Do: A talk.\nUser: Hi\nBot: Yes\nSo:", [("", "A talk."), ("User", "Hi"), ("Bot", "Yes")]),
    ("Tell me about Assistant: and Human: in a line", []),
    ("User: bob\nPassword: x", []),
])
def test_a_dialogue_is_shown_as_turns(prompt, turns):
    templates = ["\n\nHuman: {instruction}\n\nAssistant:", "Do: {instruction}\nSo:"]
    assert turns_of(prompt, templates) == turns


# ---- the server ------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path):
    server = Server(0, session(tmp_path, shelf(n=12)))
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


def test_flags_past_votes_and_revising_by_the_server(server, tmp_path):
    item = post(server, "/next", ANN)[1]["item"]
    vote = {**ANN, "item": item, "ranks": [1, 2, 3, 4], "seconds": 2}
    flags = {"flags": ["prompt broken", "all bad", "all bad"], "note": "  odd  "}
    assert post(server, "/vote", {**vote, **flags})[0] == 200
    assert rows_of(tmp_path)[0].items() >= {"flags": ["all bad", "prompt broken"], "note": "odd"}.items()
    assert [row["item"] for row in post(server, "/past", ANN)[1]["past"]] == [item]
    assert post(server, "/vote", {**vote, **flags})[1] == {"saved": True}                       # a vote sent twice
    assert post(server, "/vote", {**vote, "ranks": [4, 3, 2, 1]})[1] == {"saved": False}        # from another tab
    assert post(server, "/skip", {**ANN, "item": item})[1] == {"saved": False}
    assert post(server, "/revise", {**ANN, "item": item})[1]["ranks"] == [1, 2, 3, 4]
    assert post(server, "/vote", {**vote, "ranks": [4, 3, 2, 1], "revise": True, "flags": [], "note": " "})[0] == 200
    row, = rows_of(tmp_path)
    assert [row["ranks"][k] for k in row["order"]] == [4, 3, 2, 1] and not {"flags", "note"} & set(row)


@pytest.mark.parametrize("remarks", [
    {"flags": ["other"]}, {"flags": [[]]}, {"note": 1}, {"note": "\ud800"}])
def test_bad_flags_and_notes_are_refused(server, tmp_path, remarks):
    item = server.session.next("Ann")["item"]
    assert post(server, "/skip", {**ANN, "item": item, **remarks})[0] == 400
    assert rows_of(tmp_path, "votes.skips.jsonl") == []


def test_it_listens_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("why, change", [
    ("token", dict(token="")),
    ("token", dict(token="\xff\xfe")),
    ("wrong host", dict(Host="evil.example")),
    ("wrong host", dict(Host=None)),
    ("other sites", dict(Origin="http://evil.example")),
    ("other sites", dict(Sec_Fetch_Site="cross-site")),
    ("length is needed", dict(Content_Length="-1")),
    ("more than", dict(Content_Length="65537")),
    ("length is needed", dict(Transfer_Encoding="chunked")),
])
def test_foreign_requests_are_refused(server, tmp_path, why, change):
    item = server.session.next("Ann")["item"]
    status, reply = post(server, "/vote", {**ANN, "item": item, "ranks": [1, 2, 3, 4]}, **change)
    assert status == 400 and why in reply["error"]
    assert rows_of(tmp_path) == []


@pytest.mark.parametrize("body", [
    b"[]",
    b"[" * 5000,
    b'{"annotator": "Ann", "item": ' + b"9" * 5000 + b"}",
    {},
    {"annotator": "a" * 41},
    {"annotator": "\ud800"},
    ANN,
    {**ANN, "item": []},
    {**ANN, "item": "0" * 16},
    {**ANN, "seconds": float("nan")},
])
def test_bad_bodies_are_refused(server, tmp_path, body):
    raw = body if isinstance(body, bytes) else None
    assert post(server, "/vote", body, raw=raw)[0] == 400
    assert rows_of(tmp_path) == []


def test_nothing_but_the_empty_page_is_given_out_without_the_token(server):
    paths = ("/votes.jsonl", "/?token=", "/?token=x", f"/votes.jsonl?token={server.token}", "/../feedback.py")
    assert [get(server, path)[0] for path in paths] == [403] * 5
    assert get(server, "/")[2] == PAGE.read_bytes() and server.token.encode() not in PAGE.read_bytes()
    assert get(server, "/", Host="evil.example")[0] == 403
    assert get(server, f"/?token={server.token}", Host="evil.example")[0] == 403
    assert get(server, f"/?token={server.token}", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n",
                                  b"POST /next HTTP/1.1\r\nHost: PLACE\r\nX-Token: TOKEN\r\nContent-Length: 99\r\n\r\n"])
def test_half_open_connections_lock_nobody_out(server, monkeypatch, sent):
    held, place = [], f"127.0.0.1:{server.server_port}"
    sent = sent.replace(b"PLACE", place.encode()).replace(b"TOKEN", server.token.encode())
    for _ in range(3 * MOST):
        held.append(socket.create_connection(("127.0.0.1", server.server_port), timeout=30))
        held[-1].sendall(sent)
    assert post(server, "/next", ANN)[0] == 200 and len(server.waiting) <= MOST
    monkeypatch.setattr(Handler, "timeout", 0.2)
    time.sleep(0.3)                                     # all that are left have taken too long
    assert held[-1] and post(server, "/next", ANN)[0] == 200
    assert held[-1].recv(99) == b""
    for connection in held:
        connection.close()


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
    args = parse_args(["rank", "--max_response", "8", "--temperature", "1", "--stop", ""])
    policies = [Policy(name, *load_policies([policy_folder], "cpu")[0][1:]) for name in names]
    return Sampler(prompts, policies, K, Journal(folder / "x.items.jsonl"), args)


def test_items_are_sampled_when_needed_and_the_same_after_a_restart(tmp_path, policy_folder):
    prompts = [f"Tell story {i}." for i in range(5)]
    first = sampler(tmp_path, policy_folder, prompts)
    s = session(tmp_path, first)
    for name in ("ann", "bob", "ann"):
        s.next(name)
    assert len(first.items) == 1 and s.next("ann")["total"] == 5
    s.skip("ann", s.next("ann")["item"], 1)
    s.next("ann")
    assert [item["prompt"] for item in first.items] == prompts[:2]
    assert all(len(set(item["responses"])) == 4 and item["models"] == ["a"] * 4 for item in first.items)
    assert first.items == rows_of(tmp_path, "x.items.jsonl")
    (tmp_path / "x.items.jsonl").write_bytes(to_line(first.items[0]))
    second = sampler(tmp_path, policy_folder, prompts)
    assert second.add_item() and second.items == first.items == rows_of(tmp_path, "x.items.jsonl")


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


def test_failed_sampling_is_shown_and_no_item_is_left_out(tmp_path, policy_folder):
    broken = sampler(tmp_path, policy_folder, [f"Tell story {i}." for i in range(9)])

    def make_item(index):
        raise RuntimeError("out of memory")
    broken.make_item, working = make_item, broken.make_item
    server = Server(0, session(tmp_path, broken))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    status, reply = post(server, "/next", ANN)
    assert status == 500 and reply["error"] == "out of memory"
    broken.make_item = working                                          # "Try again"
    assert post(server, "/next", ANN)[1]["instruction"] == "Tell story 0."
    server.shutdown(), server.server_close()


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
    (["rank", "--n", "-1"], "--n"),
    ([], "COMMAND"),
    (["rank", "--policy", "no/such"], "no/such"),
    (["judge", "--a", "x", "--b", "x/"], "both x"),
    (["export", "no.jsonl", "--out", "d"], "no.jsonl"),
    (["rank", "--answers_from", "a.jsonl", "--policy", "p"], "--policy"),
    (["rank", "--answers_from", "a.jsonl", "--out", "./a.jsonl"], "--answers_from and --out"),
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


def start(folder, mode, *more, port=0):
    """The command in a process of its own -> the process, and the address that it prints."""
    command = [sys.executable, "-m", "minirlhf.tools.feedback", mode, "--max_response", "8", "--no_browser", "--port",
               str(port), "--out", str(folder / "votes.jsonl"), *map(str, more)]
    # a shell that starts the tests in the background makes them ignore Ctrl-C, and that would be inherited
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise AssertionError("no address was printed")


class Address:
    def __init__(self, url):
        port, self.token = re.search(r":(\d+)/\?token=(\S+)", url).groups()
        self.server_port = int(port)


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_that_was_confirmed(tmp_path, policy_folder):
    rng, confirmed = random.Random(2), []
    for _ in range(3):
        process, url = start(tmp_path, "rank", "--policy", policy_folder, "--n", 40)
        address = Address(url)
        threading.Timer(rng.uniform(0.1, 0.4), process.kill).start()
        try:
            while True:
                shown = post(address, "/next", ANN)[1]
                if shown.get("finished"):
                    break
                assert shown["item"] not in confirmed
                post(address, "/vote", {**ANN, "item": shown["item"], "ranks": [1, 2, 3, 4], "seconds": 1})
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
    other = shutil.copytree(policy_folder, tmp_path / "b")
    process, url = start(tmp_path, "judge", "--n", 20, "--a", policy_folder, "--b", other)
    address, sides = Address(url), []
    for n in range(20):
        shown = post(address, "/next", ANN)[1]
        row = next(row for row in rows_of(tmp_path, "votes.items.jsonl") if row["item"] == shown["item"])
        wanted = row["models"].index(str(other) if n < 15 else str(policy_folder))     # b wins 15 of 20
        side = shown["answers"].index(row["responses"][wanted])
        sides.append(shown["answers"].index(row["responses"][row["models"].index(str(other))]))
        post(address, "/vote", {**ANN, "item": shown["item"], "ranks": [1, 2] if side == 0 else [2, 1], "seconds": 1})
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and "15 wins, 0 ties, 5 losses on 20 prompts" in said
    assert "win rate 0.750, 95 % interval [0.531, 0.888]" in said and "sign test p = 0.041" in said
    assert 3 < sum(sides) < 17                                          # the sides are random
    assert len(read_votes(tmp_path / "votes.jsonl")) == 20


@pytest.mark.slow
def test_a_second_server_on_the_same_file_is_refused(tmp_path):
    answers = ROOT / "data/tiny/comparisons.jsonl"
    process, url = start(tmp_path, "rank", "--answers_from", answers)
    second = subprocess.run([sys.executable, "-m", "minirlhf.tools.feedback", "rank", "--answers_from", str(answers),
                             "--out", str(tmp_path / "votes.jsonl")], cwd=ROOT, capture_output=True, text=True)
    process.kill()
    process.wait()
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert "another feedback server is writing" in second.stderr
    process, again = start(tmp_path, "rank", "--answers_from", answers, port=Address(url).server_port)
    stale, status = Address(url), post(Address(again), "/next", ANN)[0]
    assert status == 200 and "restart" in post(stale, "/next", ANN)[1]["error"]
    process.kill()
    process.wait()
