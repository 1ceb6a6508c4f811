"""`feedback clean` on files made by hand: what it leaves out, what it prints, what it refuses."""

import json

import pytest

from minirlhf.data import read_comparisons
from minirlhf.files.errors import UserError
from minirlhf.tools.feedback.__main__ import main
from minirlhf.tools.feedback.stats import read_votes
from small_world import write_jsonl


def vote(n, name, ranks, **more):
    return {"prompt": f"Question {n}", "responses": [f" a{n}", f" b{n}", f" c{n}"], "ranks": ranks,
            "finished": [True, True, False], "annotator": name, **more}


@pytest.fixture
def votes(tmp_path, monkeypatch):
    """Item 1: all agree. Item 2: Bob has the best one last. Item 3: two say the same, and one flags it. Item 4: one vote."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "votes.jsonl", [
        vote(1, "Ann", [1, 2, 3]), vote(1, "Bob", [1, 2, 3]), vote(1, "Cem", [1, 2, 3]),
        vote(2, "Ann", [1, 2, 3]), vote(2, "Bob", [3, 1, 2], note="too long"), vote(2, "Cem", [1, 2, 3]),
        vote(3, "Ann", [2, 1, 1]), vote(3, "Cem", [2, 1, 1], flags="all bad"), vote(4, "Ann", [1, 1, 1])])
    return "votes.jsonl"


def cleaned(*flags):
    main(["clean", "votes.jsonl", "--out", "clean.jsonl", *flags])
    return [json.loads(line) for line in open("clean.jsonl", encoding="utf-8")]


def test_the_worst_disagreement_comes_first_with_names_and_notes(votes, capsys):
    main(["clean", votes])
    said = capsys.readouterr().out
    assert said.count("kappa") == 1 and "'Question 2'" in said and "Bob: 'too long'" in said
    assert "  Ann  Bob  Cem\n   1    3    1   a2\n   2    1    2   b2\n   3    2    3   c2\n" in said
    assert "9 votes on 4 items, 22 pairs with a winner" in said


def test_what_is_dropped_is_what_the_flags_say_and_nothing_else(votes, capsys):
    rows = cleaned("--drop_annotator", "Bob", "--drop_flag", "all bad")
    assert [(row["prompt"][-1], row["annotator"]) for row in rows] == [
        ("1", "Ann"), ("1", "Cem"), ("2", "Ann"), ("2", "Cem"), ("4", "Ann")]
    assert "7 votes on 4 items, 16 pairs with a winner   without Bob" in capsys.readouterr().out
    assert len(read_votes(votes)) == 9                                          # the votes stay as they are


def test_a_flag_in_a_skip_counts_too(votes, tmp_path):
    item = read_votes(votes)[0]["item"]
    write_jsonl(tmp_path / "votes.skips.jsonl", [{"prompt": "Question 1", "item": item, "flags": ["prompt broken"]}])
    write_jsonl(tmp_path / votes, [row | {"item": vote["item"]} for row, vote in zip(
        map(json.loads, open(votes, encoding="utf-8")), read_votes(votes))])
    assert {row["prompt"][-1] for row in cleaned("--drop_flag", "prompt broken")} == {"2", "3", "4"}


def test_items_on_which_people_disagree_can_go_and_an_item_with_one_vote_stays(votes):
    assert {row["prompt"][-1] for row in cleaned("--min_kappa", "0.5")} == {"1", "3", "4"}


@pytest.mark.parametrize("rule, second", [("sum", [1, 1, 2]), ("majority", [1, 2, 3])])
def test_a_consensus_is_one_row_an_item_and_full_ties_are_counted(votes, rule, second, capsys):
    rows = cleaned("--consensus", rule)
    assert [row["ranks"] for row in rows] == [[1, 2, 3], second, [2, 1, 1]]
    assert rows[1]["votes_of"] == ["Ann", "Bob", "Cem"] and rows[0]["finished"] == [True, True, False]
    assert "3 rows, without 1 that tie all answers" in capsys.readouterr().out
    assert len(read_comparisons("clean.jsonl")) == 3


@pytest.mark.parametrize("flags, says", [
    (["--drop_annotator", "Dora"], "no annotator 'Dora', only Ann, Bob, Cem"),
    (["--drop_annotator", "Ann", "Bob", "Cem"], "nothing is left")])
def test_what_it_cannot_do_is_an_error(votes, flags, says):
    with pytest.raises(UserError, match=says):
        cleaned(*flags)


def test_without_a_second_vote_there_is_no_kappa_and_no_file_is_replaced(votes, tmp_path):
    write_jsonl(tmp_path / votes, [vote(1, "Ann", [1, 2, 3])])
    with pytest.raises(UserError, match="no item has two votes"):
        cleaned("--min_kappa", "0")
    cleaned()
    with pytest.raises(UserError, match="clean.jsonl is there already"):
        cleaned()
