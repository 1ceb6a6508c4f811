"""The statistics of votes against brute force, published examples and simulation."""

import itertools
import json
import math
import re

import pytest

from minirlhf.tools.feedback.__main__ import main
from minirlhf.tools.feedback.stats import (agreements, cohen_kappa, duel, longer_preferred, print_stats, read_votes)
from minirlhf.tools.feedback.votes import comparison_row, to_line


# The two tables that every text on kappa shows: 20/5/10/15 gives 0.4, 45/15/25/15 gives 0.1304.
@pytest.mark.parametrize("table, kappa", [((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 0.1304),
                                          ((25, 35, 5, 35), 0.2593)])
def test_kappa_of_published_tables(table, kappa):
    pairs = [pair for pair, n in zip(itertools.product("yn", "yn"), table) for _ in range(n)]
    assert cohen_kappa(*zip(*pairs)) == pytest.approx(kappa, abs=5e-5)


def test_kappa_at_the_edges():
    assert cohen_kappa([1, 0, 1, -1], [1, 0, 1, -1]) == 1 and cohen_kappa([1, 0], [0, 1]) == -1
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))


# ---- votes -----------------------------------------------------------------------------------------------------------

def vote(prompt, ranks, annotator="ann", models=None, seconds=4.0):
    responses = [f" {k}" for k in range(len(ranks))]
    more = {"models": models} if models else {}
    return comparison_row(prompt, responses, ranks, annotator=annotator, seconds=seconds, **more)


def write(tmp_path, rows):
    file = tmp_path / "votes.jsonl"
    file.write_bytes(b"".join(map(to_line, rows)))
    return file


def test_agreement_counts_only_what_both_have_judged(tmp_path):
    rows = [vote("a", [1, 2, 3]), vote("a", [1, 3, 2], "bob"), vote("b", [1, 2]), vote("c", [1, 2], "bob"),
            vote("d", [1, 1]), vote("d", [2, 1], "bob")]
    assert agreements(read_votes(write(tmp_path, rows))) == {("ann", "bob"): [(1, 1), (1, 1), (1, -1), (0, -1)]}


def test_who_prefers_long_answers_is_counted_in_pairs_of_different_length(tmp_path, capsys):
    answers = ["a", "bb", "ccc", "ddd"]
    rows = [comparison_row("p", answers, [4, 3, 2, 1], annotator="long"),
            comparison_row("p", answers, [1, 2, 3, 3], annotator="short"),
            comparison_row("p", answers, [1, 1, 2, 1], annotator="mixed")]
    votes = read_votes(write(tmp_path, rows))
    assert [longer_preferred([vote]) for vote in votes] == [[True] * 5, [False] * 5, [False, False]]
    print_stats(tmp_path / "votes.jsonl")
    assert "length     mixed: prefers the longer answer in 0.000 of 2 pairs" in capsys.readouterr().out


def test_a_duel_is_counted_in_prompts_whoever_and_however_many_judged_them(tmp_path):
    ab, ba = ["a", "b"], ["b", "a"]
    rows = [
        vote("1", [1, 2], "x", ab),
        vote("1", [1, 2], "y", ab),
        vote("2", [1, 2], "x", ba),
        vote("3", [1, 2], "x", ab),
        vote("3", [2, 1], "y", ab),
        vote("4", [1, 1], "x", ab)
    ]
    votes = read_votes(write(tmp_path, rows))
    assert duel(votes, "a", "b") == [1, 0, 0.5, 0.5] and duel(votes, "b", "a") == [0, 1, 0.5, 0.5]


def test_stats_prints_what_the_file_holds(tmp_path, capsys):
    models = ["x", "y", "z"]
    given = [("p0", [1, 2, 3], "ann"), ("p0", [1, 3, 2], "bob"), ("p1", [2, 1, 1], "ann"), ("p1", [2, 3, 1], "bob"),
             ("p2", [1, 1, 1], "ann")]
    rows = [vote(*each, models) for each in given]
    file = write(tmp_path, rows)
    (tmp_path / "votes.skips.jsonl").write_text('{"item": "1"}\n')
    print_stats(file)
    said = capsys.readouterr().out
    for line in ("5 votes on 3 items, 15 pairs", "ties       4 of 15 pairs; 1 votes are all ties", "skips      1",
                 "ann: 3 votes, half within 4.0 s, 900 an hour", "ann and bob: 0.500 of 6 pairs",
                 "x against y: 1 wins, 2 ties, 0 losses on 3 prompts", "x against z:", "y against z:"):
        assert line in said


def test_stats_counts_the_items_that_carry_a_flag(tmp_path, capsys):
    rows = [{**vote("p0", [1, 2]), "flags": ["all bad"], "note": "dull"},
            {**vote("p0", [1, 2], "bob"), "flags": ["all bad", "prompt broken"]},
            {**vote("p1", [1, 2]), "flags": ["all bad"]}, {**vote("p2", [1, 2]), "flags": 5, "note": ""}]
    file = write(tmp_path, rows)
    skips = [{"item": "s", "flags": ["prompt broken"]}, {"item": "t", "note": "hm"}]
    (tmp_path / "votes.skips.jsonl").write_bytes(b"".join(map(to_line, skips)))
    print_stats(file)
    said = capsys.readouterr().out
    assert "skips      2" in said and said.count("  flag ") == 3
    for line in ("all bad: 2 items", "prompt broken: 2 items", "with a note: 2 items"):
        assert f"  flag       {line}\n" in said


def test_stats_names_a_pace_that_nobody_can_read_at_and_counts_gold_pairs(tmp_path, capsys):
    long = {"responses": ["word " * 20, "word " * 19 + "x"]}                                    # 40 words: 4 seconds
    rows = [{**vote(f"p{n}", [1, 2], name), **long, "seconds": seconds}
            for n, (name, seconds) in enumerate([("ann", 3.9), ("ann", 4.1), ("bob", 4.1)])]
    item = {name: rows[0][name] for name in ("prompt", "responses")} | {"ranks": [2, 1]}
    (tmp_path / "gold.jsonl").write_bytes(to_line(item))
    main(["stats", str(write(tmp_path, rows)), "--gold_items", str(tmp_path / "gold.jsonl")])
    said = capsys.readouterr().out
    assert "too fast   ann: 1 votes, at more than 10 words a second\n" in said and "too fast   bob" not in said
    assert "gold       ann: 0 of 1 known pairs\n" in said and said.count("  gold") == 1


def test_stats_reads_the_simulated_annotators_too(tmp_path, capsys):
    row = {"prompt": "p", "responses": [" a", " b"], "ranks": [1, 2], "annotators": [[1, 2], [2, 1], [1, 2]]}
    file = tmp_path / "comparisons.jsonl"
    file.write_text(json.dumps(row) + "\n")
    print_stats(file)
    said = capsys.readouterr().out
    assert "3 votes on 1 items" in said and "annotator 1 and annotator 3: 1.000 of 1 pairs" in said


@pytest.mark.parametrize("damage", [
    {"annotators": 5}, {"annotators": [1, [2, 1], "x"]},
    {"models": 3}, {"models": ["a"]}, {"models": [1, []]},
    {"seconds": "x"}, {"seconds": 10**400}, {"annotator": [1]},
])
def test_damaged_extra_fields_are_ignored(tmp_path, capsys, damage):
    file = write(tmp_path, [{**vote("p", [1, 2], models=["a", "b"]), **damage}, vote("q", [1, 2], models=["a", "b"])])
    print_stats(file)
    assert "on 2 items" in capsys.readouterr().out


def said_of(tmp_path, capsys, rows):
    print_stats(write(tmp_path, rows))
    return {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}


def test_agreement_kappa_and_length_count_prompts(tmp_path, capsys):
    """Bob agrees with Ann on two prompts of three. Rankings or pairs of the same answers, or copies, are no more."""
    answers = ["a", "bb", "ccc"]
    given = [(f"p{n}", ranks, name) for n in range(30)
             for name, ranks in (("ann", [3, 2, 1]), ("bob", [1, 2, 3] if n % 3 == 0 else [3, 2, 1]))]
    rankings = [comparison_row(prompt, answers, ranks, annotator=name) for prompt, ranks, name in given]
    pairs = [comparison_row(prompt, [answers[i], answers[j]],
                            [1 + (ranks[i] > ranks[j]), 1 + (ranks[j] > ranks[i])], annotator=name)
             for prompt, ranks, name in given for i, j in ((0, 1), (0, 2), (1, 2))]
    for sign in ("agreement  ann and bob", "length     bob"):
        once, as_pairs, copied = (next(line for start, line in said_of(tmp_path, capsys, rows).items() if sign in start)
                                  for rows in (rankings, pairs, pairs + pairs))
        assert once == as_pairs and once.endswith("30 prompts") and "0.667 of 90 pairs [0.48" in once
        assert copied.split("[")[1:] == once.split("[")[1:]
    assert "kappa" in said_of(tmp_path, capsys, rankings)["  agreement  ann and bob"]


def test_kappa_has_the_interval_of_cohens_standard_error(tmp_path, capsys):
    """Of 400 prompts with one pair, in the proportions of the published table with kappa 0.4."""
    table = zip(itertools.product(([1, 2], [2, 1]), repeat=2), (160, 40, 80, 120))
    both = [ranks for ranks, n in table for _ in range(n)]
    rows = [vote(f"p{n}", ranks[k], "ab"[k]) for n, ranks in enumerate(both) for k in (0, 1)]
    line = said_of(tmp_path, capsys, rows)["  agreement  a and b"]
    kappa, low, high = map(float, re.search(r"kappa (.*) \[(.*), (.*)\]", line).groups())
    error = 1.96 * (0.7 * 0.3 / 400) ** 0.5 / 0.5
    assert kappa == 0.4 and (low, high) == pytest.approx((0.4 - error, 0.4 + error), abs=0.01)
