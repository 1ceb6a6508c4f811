"""What labels are worth: the simulated annotators, the runs behind the tables of data/README.md, and the tables."""

import json
import math
import random
import re
import statistics
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from minirlhf.data import read_comparisons
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.files.errors import UserError
from minirlhf.tools.feedback.stats import agreements, cohen_kappa, longer_preferred, read_votes
from minirlhf.weights import save_pretrained

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data/tiny"
sys.path.insert(0, str(TINY))
import annotate
import labels

ROWS = [json.loads(line) for line in (TINY / "comparisons_test.jsonl").read_text(encoding="utf-8").splitlines()]


def judged(*kinds, seed=0, n=200, **panel):
    """The first n held-out prompts of the embedded world with their answers, ranked by these annotators."""
    rng, panel = random.Random(seed), annotate.Panel(kinds, **panel)
    return [annotate.annotate(row["prompt"], row["responses"], rng, row.get("finished"), panel) for row in ROWS[:n]]


def right(rows, name="ranks"):
    """The share of pairs that differ in gold which the ranks order as gold does. Equal ranks count half."""
    hits = []
    for row in rows:
        gold = annotate.gold([row["prompt"]] * len(row["responses"]), row["responses"])
        for i, j in combinations(range(len(gold)), 2):
            if gold[i] != gold[j]:
                a, b = row[name][i], row[name][j]
                hits.append(0.5 if a == b else (a < b) == (gold[i] > gold[j]))
    return statistics.fmean(hits)


# ---- annotators ------------------------------------------------------------------------------------------------------

def test_without_other_flags_the_rankings_are_the_committed_ones():
    """The held-out rankings were drawn in one stream from seed 2."""
    assert judged(*annotate.Panel().annotators, seed=2, n=len(ROWS)) == ROWS


@pytest.mark.parametrize("kind, least, most", [("careful", 0.80, 0.95), ("random", 0.45, 0.55), ("short", 0.50, 0.62),
                                               ("adversarial", 0.05, 0.20)])
def test_each_kind_of_annotator_is_as_right_as_its_name_says(kind, least, most):
    assert least < right(judged(kind)) < most


def test_one_annotator_is_the_consensus():
    for rule in annotate.CONSENSUS:
        assert all(row["annotators"] == [row["ranks"]] for row in judged("careful", consensus=rule))
    assert math.isnan(annotate.agreement(judged("careful")[:5]))


def test_noise_makes_annotators_disagree_down_to_chance():
    found = [annotate.agreement(judged("careful", "careful", noise=noise)) for noise in (0.0, 0.02, 0.115, 0.4, 50)]
    assert found[0] == 1 and found == sorted(found, reverse=True)
    assert found[2] == pytest.approx(0.80, abs=0.03) and found[4] == pytest.approx(0.5, abs=0.03)


def test_kappa_and_length_reveal_the_bad_annotator(tmp_path):
    """A random one agrees by chance, an adversarial one less often, and one who likes short answers shows it."""
    seen = {}
    for kind in ("random", "short", "adversarial"):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in judged("careful", "careful", kind)))
        votes = read_votes(file)
        kappas = {names: cohen_kappa(*zip(*both)) for names, both in agreements(votes).items()}
        assert kappas["annotator 1", "annotator 2"] > 0.45
        longer = [vote for vote in votes if vote["annotator"] == "annotator 3"]
        seen[kind] = kappas["annotator 1", "annotator 3"], statistics.fmean(longer_preferred(longer))
    assert abs(seen["random"][0]) < 0.05 and seen["adversarial"][0] < -0.4 and 0 < seen["short"][0] < 0.25
    assert seen["short"][1] == 0 and abs(seen["random"][1] - 0.5) < 0.05 and seen["adversarial"][1] > 0.5


def test_two_consensus_rules_by_hand():
    rankings = [[1, 2, 3], [1, 2, 3], [3, 1, 2]]            # sums 5, 5, 8; most say 1 before 2 before 3
    assert annotate.consensus(rankings, "sum") == [1, 1, 2]
    assert annotate.consensus(rankings, "majority") == [1, 2, 3]
    circle = [[1, 2, 3], [3, 1, 2], [2, 3, 1]]
    assert annotate.consensus(circle, "majority") == annotate.consensus(circle, "sum") == [1, 1, 1]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A model that knows nothing, with the vocabulary of data/tiny."""
    folder, tokenizer = tmp_path_factory.mktemp("policy"), load_tokenizer(TINY)
    torch.manual_seed(1)
    save_pretrained(GPT2(GPT2Config(vocab_size=768, n_positions=128, n_embd=16, n_layer=1, n_head=2)), folder)
    save_tokenizer(tokenizer, folder)
    return folder


def test_the_command_asks_whom_and_how_often_its_flags_say(policy, tmp_path, capsys):
    flags = ["--model", policy, "--n", 5, "--n_test", 0, "--k", 3, "--annotators", "careful", "short", "--noise", 0]
    annotate.main([*map(str, flags), "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["comparisons.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "comparisons.jsonl").read_text().splitlines()]
    assert len(read_comparisons(tmp_path / "comparisons.jsonl")) == len(rows) == 5
    for row in rows:
        careful, short = row["annotators"]
        assert len(row["responses"]) == 3 and careful == annotate.ranking(annotate.gold([row["prompt"]] * 3,
                                                                                        row["responses"]))
        assert short == annotate.ranking([-len(response) for response in row["responses"]])
    with pytest.raises(SystemExit):
        annotate.main(["--annotators", "lazy"])
    assert "lazy" in capsys.readouterr().err


def test_two_models_share_the_answers_to_a_prompt(policy, tmp_path, capsys):
    torch.manual_seed(2)
    other = tmp_path / "other"
    save_pretrained(GPT2(GPT2Config(vocab_size=768, n_positions=128, n_embd=16, n_layer=1, n_head=2)), other)
    save_tokenizer(load_tokenizer(TINY), other)
    one, two, both = (annotate.sample(list(map(str, models)), ["A.", "B."], K, seed=1)
                      for models, K in (([policy], 2), ([other], 2), ([policy, other], 4)))
    assert both == [first + second for first, second in zip(one, two)] and one != two
    with pytest.raises(SystemExit):
        annotate.main(["--model", "a", "b", "--k", "3"])
    assert "--k 3" in capsys.readouterr().err


# ---- the runs --------------------------------------------------------------------------------------------------------

@pytest.fixture
def world(monkeypatch, tmp_path):
    """Scripts that only write the files that they would write -> what was called, [(script, flags), ...]."""
    called = []

    def run_script(folder, script, *words, **flags):
        called.append((script, flags | {"words": words}))
        out = Path(flags.get("out", ""))
        out.mkdir(parents=True, exist_ok=True)
        if script.endswith("annotate.py"):
            (out / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:flags["n"]]))
        else:
            report = {"rm_accuracy_gold": 0.75 + flags["seed"] / 100, "ppo": {"gold": 0.9, "score": 1.0, "kl": 5.0}}
            (out / "report.json").write_text(json.dumps(report))
            curve = [0.5] * 8 + [0.9] * 8 + [0.6] * 8
            metrics = ({"step": step, "objective/gold": gold} for step, gold in enumerate(curve))
            (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))

    monkeypatch.setattr(labels, "run_script", run_script)
    monkeypatch.setattr(labels, "CONDITIONS", {
        "small": labels.Condition(20), "first": labels.Condition(10, ppo=True),
        "second": labels.Condition(30, k=2, ppo=True, after="first"),
        "mixed": labels.Condition(30, k=2, after="first", mixed=True)})
    return called


def run(tmp_path, *flags):
    labels.main(["run", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), *flags])
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_every_condition_gets_one_row_a_seed(world, tmp_path):
    rows = run(tmp_path, "--seeds", "1", "2")
    assert sorted((row["condition"], row["seed"]) for row in rows) == [
        (name, seed) for name in ("first", "mixed", "second", "small") for seed in (1, 2)]
    assert sorted(script for script, _ in world) == sorted(
        2 * (["train_sft.py"] + ["data/tiny/annotate.py", "train_rm.py"] * 4 + ["train_ppo.py"] * 2))
    first = next(row for row in rows if row["condition"] == "first" and row["seed"] == 2)
    assert first["rm_accuracy_gold"] == 0.77 and first["gold"] == 0.9 and first["gold_fell"] == pytest.approx(0.3)
    assert first["agreement"] == round(annotate.agreement(ROWS[:10]), 4) and 0 < first["kappa_12"] < 1


def test_a_second_round_samples_from_ppo_and_keeps_the_first(world, tmp_path):
    run(tmp_path, "--seeds", "1", "--only", "second")
    sampled = [flags for script, flags in world if script.endswith("annotate.py")]
    trained = [flags for script, flags in world if script == "train_rm.py"]
    assert [writers(flags) for flags in sampled] == [[("1", "sft")], [("first", "ppo")]]
    assert [Path(flags["model"]).parts[-2:] for flags in trained] == [("1", "sft"), ("1", "sft")]
    assert Path(trained[1]["data"]).read_text().splitlines() == [json.dumps(row) for row in ROWS[:10] + ROWS[:30]]
    assert [flags["batch_size"] for flags in trained] == [32, 64] and trained[0]["epochs"] == 20


def writers(flags):
    """The models that annotate.py was told to sample from, the last two parts of their folders."""
    words = flags["words"]
    return [Path(word).parts[-2:] for word in words[words.index("--model") + 1:]]


def test_a_mixed_round_samples_from_both(world, tmp_path):
    run(tmp_path, "--seeds", "1", "--only", "mixed")
    assert [writers(flags) for script, flags in world if script.endswith("annotate.py")] == [
        [("1", "sft")], [("first", "ppo"), ("1", "sft")]]


def test_what_has_a_row_is_skipped_and_what_was_made_is_used(world, tmp_path):
    before = run(tmp_path, "--seeds", "1")
    world.clear()
    assert run(tmp_path, "--seeds", "1") == before and world == []
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before[1:]))
    again = run(tmp_path, "--seeds", "1")
    assert world == [] and len(again) == len(before) and {**again[-1], "seconds": 0} == {**before[0], "seconds": 0}


def test_a_script_that_fails_ends_the_run_and_names_its_log(tmp_path):
    with pytest.raises(UserError, match=r"train_rm.py stopped with exit code 2; .*train_rm.log has its message"):
        labels.run_script(tmp_path, "train_rm.py", loss="nonsense")
    assert "--loss must be one of" in (tmp_path / "train_rm.log").read_text()


# ---- the tables ------------------------------------------------------------------------------------------------------

def test_an_estimate_has_an_interval_and_says_where_0_is_inside():
    assert labels.estimate([]) == "-" and labels.estimate([0.5]) == "0.500"
    assert labels.estimate([0.909, 0.872, 0.868]) == "0.883 ± 0.056"
    assert labels.estimate([5.0, 6.0]) == "5.5 ± 6.4" and labels.difference([]) == "-"
    assert labels.difference([0.1, 0.11, 0.12]) == "+0.110 ± 0.025"
    assert labels.difference([-0.1, 0.1, 0.12]) == "+0.040 ± 0.302 (could be 0)"


def test_differences_are_paired_by_seed():
    table = labels.Table("x", {"a": ("A", "A"), "b": ("B", "A")}, (("accuracy", "m"),), {"more than a": "m"})
    rows = [{"condition": name, "seed": seed, "m": value, "seconds": 60} for name, seed, value in (
        ("A", 1, 0.5), ("A", 2, 0.7), ("A", 3, 0.6), ("B", 3, 0.7), ("B", 1, 0.6), ("B", 2, 0.8), ("C", 1, 9.0))]
    assert labels.markdown(table, rows).splitlines() == [
        "| x | accuracy | more than a |", "|---|---|---|", "| a | 0.600 ± 0.248 |  |",
        "| b | 0.700 ± 0.248 | +0.100 ± 0.000 |", "", "3 seeds, 6 runs, 6 minutes of one processor."]


def test_every_table_compares_conditions_that_are_run():
    named = {name for table in labels.tables().values() for pair in table.rows.values() for name in pair}
    assert named == set(labels.CONDITIONS)
    committed = labels.read_results(labels.ROWS)
    assert len({(row["condition"], row["seed"]) for row in committed}) == len(committed)
    assert {row["condition"] for row in committed} <= named


def test_the_guide_has_the_tables_that_the_rows_give(capsys):
    guide = labels.GUIDE.read_text(encoding="utf-8")
    assert labels.filled(guide, labels.read_results(labels.ROWS)) == guide, "run `python data/tiny/labels.py write`"
    labels.main(["table"])
    printed = capsys.readouterr().out
    for name, table in re.findall(r"<!-- table (\w+) -->\n(.*?)\n<!-- end -->", guide, flags=re.DOTALL):
        assert f"{name}\n\n{table}\n" in printed


def test_the_curve_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(labels, "CURVE", tmp_path / "curve.png")
    labels.main(["draw"])
    assert labels.CURVE.read_bytes().startswith(b"\x89PNG")


def test_writing_fills_the_tables_and_leaves_the_rest(tmp_path, monkeypatch):
    guide = "one\n" + "".join(f"<!-- table {name} -->\nold\n<!-- end -->\ntwo\n" for name in labels.tables())
    monkeypatch.setattr(labels, "GUIDE", tmp_path / "README.md")
    labels.GUIDE.write_text(guide)
    rows = tmp_path / "rows.jsonl"
    row = {"condition": "2000 prompts", "seed": 1, "rm_accuracy_gold": 0.81234, "seconds": 9}
    rows.write_text(json.dumps(row) + "\n")
    labels.main(["write", "--rows", str(rows)])
    text = labels.GUIDE.read_text()
    assert text.startswith("one\n<!-- table size -->\n| prompts") and text.endswith("<!-- end -->\ntwo\n")
    assert "| 2,000 | 0.812 | - |" in text and "\nold\n" not in text
    labels.GUIDE.write_text(guide.replace("<!-- table noise -->", ""))
    with pytest.raises(UserError, match="has the tables"):
        labels.main(["write", "--rows", str(rows)])
