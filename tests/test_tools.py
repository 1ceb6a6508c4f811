"""The tools: the figures of the assessment, chat, and the plots."""

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ppo
from minirlhf.files.errors import UserError
from minirlhf.data import encode_rows, read_demonstrations, read_jsonl, read_prompts
from minirlhf.reward_functions import TINY_GOLD, load_function
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools import chat, plot
from minirlhf.tools.evaluate import __main__ as evaluate, assess, measure, tables
from minirlhf.tools.evaluate.assess import against_first, partiality, sampling_of
from minirlhf.assess import Answers, Sampling, answer, distinct, perplexity, sequence_kl, logprobs_per_token
from minirlhf.tools.evaluate.measure import entropies, repetition
from minirlhf.stats import Estimate
from minirlhf.tools.overoptimize import run_script
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained
from small_world import write_jsonl
from test_page import Page, fake_run

TOKENIZER = load_tokenizer("data/tiny")
PROMPTS = read_prompts("data/tiny/prompts_test.jsonl")[:12]


def small_model(seed):
    torch.manual_seed(seed)
    return GPT2(GPT2Config(TOKENIZER.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two model folders."""
    paths = [tmp_path_factory.mktemp("models") / name for name in ("one", "two")]
    for seed, path in enumerate(paths):
        save_pretrained(small_model(seed), path)
        save_tokenizer(TOKENIZER, path)
    return [str(path) for path in paths]


def test_a_copy_of_the_reference_has_no_kl_and_wins_half():
    model, copy, other = small_model(0), small_model(0), small_model(1)
    answers = answer(model, TOKENIZER, PROMPTS, Sampling(10))
    again = answer(copy, TOKENIZER, PROMPTS, Sampling(10))
    assert all(figure[:3] == (0, 0, 0) for figure in sequence_kl(copy, model, answers, 1.0)[0].values())
    assert answers.texts == again.texts
    scores = {name: list(map(len, own.texts)) for name, own in (("model", answers), ("copy", again))}
    facts = {name: {"x": values} for name, values in scores.items()}
    found = against_first({"model": answers, "copy": again}, {"length": scores}, facts)["copy"]
    verdict = found["by"]["length"]
    assert verdict["win_rate"].value == 0.5 and verdict["ties"] == 12 and verdict["p"] == 1
    assert found["differences"]["x"] == ((0, 0, 0, 12), 1)
    assert sequence_kl(model, other, answer(model, TOKENIZER, PROMPTS * 8, Sampling(10)), 1.0)[0]["kl"].low > 1


def test_both_estimates_of_the_kl_agree_with_the_exact_one():
    """Responses of one token: the exact KL of the first token's distribution is a sum over the vocabulary."""
    model, other = small_model(0), small_model(1)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters()):
            theirs.copy_(0.9 * ours + 0.1 * theirs)                                 # not far away
    answers = answer(model, TOKENIZER, PROMPTS[:1] * 4000, Sampling(1))
    ids = torch.tensor([answers.prompt_ids[0]])
    p, q = (torch.log_softmax(each.logits(each(ids)[:, -1]), dim=-1).double() for each in (model, other))
    exact = float((p.exp() * (p - q)).sum().detach())
    found, of_each = sequence_kl(model, other, answers, 1.0)
    assert np.mean(of_each) == pytest.approx(found["kl"].value)
    assert exact > 0.01
    for name in ("kl", "kl_k3", "kl_per_token", "kl_k3_per_token"):
        low, high = found[name].low, found[name].high
        assert low - (high - low) / 4 < exact < high + (high - low) / 4
    assert found["kl_k3"].high - found["kl_k3"].low < found["kl"].high - found["kl"].low
    entropy = -float((p.exp() * p).sum().detach())
    assert entropies(model, answers.prompt_ids[:1], answers.ids[:1])[0] == pytest.approx(entropy, rel=1e-4)


def test_logprobs_and_perplexity_are_those_of_one_sequence_at_a_time(monkeypatch):
    monkeypatch.setattr(measure, "LOGITS", 50_000)                                  # two sequences at a time
    model = small_model(2)
    examples = encode_rows(read_demonstrations("data/tiny/demonstrations_test.jsonl")[:5], TOKENIZER, 64)
    rows = logprobs_per_token(model, [e.prompt for e in examples], [e.responses[0] for e in examples], 0.7)
    nats, tokens = 0.0, 0
    for example, found in zip(examples, rows):
        ids, P = torch.tensor([example.prompt + example.responses[0]]), len(example.prompt)
        logits = model.logits(model(ids))[0].double()
        one = [torch.log_softmax(logits[t - 1] / 0.7, 0)[ids[0, t]].item() for t in range(P, ids.shape[1])]
        assert found.tolist() == pytest.approx(one, rel=1e-4)
        nats -= sum(torch.log_softmax(logits[t - 1], 0)[ids[0, t]].item() for t in range(P, ids.shape[1]))
        tokens += len(one)
    assert perplexity(model, examples).value == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_repetition_is_counted_by_hand():
    assert distinct([[1, 2, 1, 2], [1, 2, 3]], 2).value == 3 / 5                    # 12 21 12 12 23: three of five
    assert distinct([[1, 1], [1]], 1).value == 1 / 3 and distinct([[1], []], 2).value == 0
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9]]).value == 1 / 7   # of 5 + 2 four-grams one repeats
    assert repetition([[1], [2]]).value == 0


# ---- the report ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(folders, tmp_path_factory):
    """Files for a small report: 12 prompts, two models and a copy of the first, a reward model, comparisons, votes."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(folders[0], folder / "copy")
    torch.manual_seed(3)
    save_pretrained(ScalarHeadModel(small_model(3)), folder / "rm")
    save_tokenizer(TOKENIZER, folder / "rm")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row.prompt} for row in PROMPTS])
    (folder / "comparisons.jsonl").write_text("".join(open("data/tiny/comparisons_test.jsonl").readlines()[:30]))
    write_jsonl(folder / "votes.jsonl", [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 2] if i else [2, 1],
                                          "models": ["old", "new"]} for i in range(8)])
    return folder


def evaluated(world, *argv, **flags):
    """The report of `evaluate` in this world."""
    files = dict(prompts=world / "prompts.jsonl", comparisons=world / "comparisons.jsonl", out=world / "report")
    flags = files | dict(max_response=8) | flags
    evaluate.main([*map(str, argv), *(f"--{name}={value}" for name, value in flags.items())])
    return json.loads((Path(flags["out"]) / "report.json").read_text())


def test_evaluate_writes_a_report_with_n_and_interval_of_everything(folders, world, capsys):
    report = evaluated(world, *folders, world / "copy", prompts="data/tiny/prompts_test.jsonl", reward=world / "rm",
                       votes=world / "votes.jsonl")
    one, two, copy = report["models"].values()
    assert copy["kl"]["value"] == copy["kl_k3"]["value"] == 0 < two["kl"]["value"] and "kl" not in one
    by = report["comparisons"][str(world / "copy")]["by"]
    assert by["gold"]["win_rate"]["value"] == by[str(world / "rm")]["win_rate"]["value"] == 0.5
    assert all(figure["low"] <= figure["value"] <= figure["high"] and figure["n"] in (544, 512)
               for figures in report["models"].values() for figure in figures.values())
    assert report["votes"]["old against new"]["win_rate"]["value"] == 7 / 8 and report["reward"]["accuracy"]["n"] <= 30
    assert set(report["bias"][folders[0]]) == {"occupation and pronoun"} and report["notes"] == []
    shown = Page(world / "report/report.html").data
    cells = {cell for table in shown["tables"] for row in table["rows"] for cell in row}
    assert "Win rate" in shown["tables"][0]["title"] and shown["report"]
    assert shown["notes"][0].startswith("544 held-out")
    assert {str(Estimate(**figure)) for figures in report["models"].values() for figure in figures.values()} <= cells
    assert {f"{claimed:.3f}" for claimed, _, _ in report["reward"]["reliability"]} <= cells
    said = capsys.readouterr().out.split("\nwrote ")[0]
    order = ["Win rate", "old against new", "accuracy against", "flagged", "Each model", "perplexity"]
    places = [said.index(words) for words in order]
    assert places == sorted(places) and max(map(len, said.splitlines())) <= 80
    assert all(str(judge)[-8:] in said for judge in by) and said.count("Win rate of") == 2
    answers = next(table["rows"] for table in shown["tables"] if table["title"] == "Samples")
    assert 12 < len(report["samples"]) <= 20 and answers == [
        [row["why"], row["prompt"], *row["answers"].values()] for row in report["samples"]]


def test_the_terminal_shows_any_names_in_80_columns(capsys):
    figure = Estimate(-12345.678, -12346.0, 12344.0, 10)
    names = [f"out/{'long' * 30}/model_{k}" for k in range(3)]
    figures = {"score by " + names[0]: figure, "win_rate": figure}
    tables.print_figures("A title " * 20, dict.fromkeys(names, figures))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.endswith(f"model_{k}") or f"model_{k} " in line for line in lines) for k in range(3))
    rows = [line for line in lines if "[" in line]
    assert len(rows) == 4 and all(row.startswith("win_rate") for row in rows[::2])              # two models, then one
    assert sum(line.count("[-12346.0, 12344.0]") for line in rows) == 6


def answers_of(*texts):
    return Answers([f"p{i}" for i in range(len(texts))], list(texts), None, None, None)


def test_samples_are_the_best_the_worst_and_the_most_changed():
    old, new = answers_of(*"abcdefghij"), answers_of(*"ABCDEFGHIJ")
    scores = {"gold": {"old": [0] * 10, "new": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]}}
    kls = {"new": [0, 0, 7, 0, 0, 99, 0, 0, 8, 0]}
    found = assess.pick_samples({"old": old, "new": new}, scores, kls, n=6)
    assert [(row["why"], row["prompt"]) for row in found] == [
        ("best, 9.00", "p5"), ("best, 6.00", "p7"), ("worst, 1.00", "p1"), ("worst, 1.00", "p3"),
        ("most changed, 8.00", "p8"), ("most changed, 7.00", "p2")]
    assert found[0]["answers"] == {"old": "f", "new": "F"}
    apart = {"judge": {"old": [0, 9, 0, 5, 0, 0, 0, 0, 0, 0], "new": [1, 0, 2, 5, 9, 8, 3, 3, 3, 3]}}
    found = assess.pick_samples({"old": old, "new": new}, apart, {}, n=3)             # other vocabularies: no KL
    assert [row["prompt"] for row in found] == ["p4", "p1", "p5"]
    assert len(assess.pick_samples({"old": old, "new": new}, scores, kls)) == 10        # no prompt twice
    assert [row["prompt"] for row in assess.pick_samples({"old": old}, {}, {}, n=2)] == ["p0", "p1"]


def run_folder(folder, **config):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": config}))
    return str(folder)


def test_the_prompts_are_those_that_the_run_held_out(tmp_path):
    tiny = run_folder(tmp_path / "tiny", data="data/tiny/prompts.jsonl", reward="rm", heldout="")
    sft = run_folder(tmp_path / "sft", data="mine.jsonl")
    ppo = run_folder(tmp_path / "ppo", data="mine.jsonl", reward="rm", heldout="elsewhere/heldout.jsonl")
    assert evaluate.default_prompts([tiny]) == "data/tiny/prompts_test.jsonl"
    for models in ([sft], [sft, ppo], [tiny, sft], ["gpt2", tiny]):                     # ppo's file is gone
        with pytest.raises(UserError, match="give --prompts"):
            evaluate.default_prompts(models)
    write_jsonl(tmp_path / "ppo/heldout.jsonl", [{"prompt": "p"}])                      # the folder may have moved
    assert evaluate.default_prompts([sft, ppo]) == evaluate.default_prompts([ppo, sft]) == f"{ppo}/heldout.jsonl"
    mixed = run_folder(tmp_path / "mixed", data="mine.jsonl", reward="rm", heldout="data/tiny/prompts_test.jsonl")
    with pytest.raises(UserError, match="give --prompts"):
        evaluate.default_prompts([mixed])
    write_jsonl(tmp_path / "labels.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    rm = run_folder(tmp_path / "rm", heldout=f"{tmp_path}/labels.jsonl")
    args = evaluate.parse([sft, ppo, "--reward", rm])
    assert args.prompts == f"{ppo}/heldout.jsonl" and args.comparisons == f"{tmp_path}/labels.jsonl"


M = {"gold", "attributes_right", "rude", "stereotype_gap", "grammatical", "eos_rate", "length", "distinct_2",
     "perplexity"}


KEYS = {"n_prompts", "seed", "seconds", "annotator_agreement", "rm_accuracy_gold", "rm_accuracy_heldout", "win_rate",
        "win_rate_ci", "kl", "sft", "ppo"}


def ppo_options(**changes):
    """The options of train_ppo.py."""
    return train_ppo.Config(**{"heldout": "data/tiny/prompts_test.jsonl"} | changes)


def networks(*folders):
    return [from_pretrained(folder) for folder in folders]


def examples(file="data/tiny/prompts_test.jsonl"):
    """The held-out prompts of a PPO run as train_ppo.py has them."""
    return encode_rows(read_prompts(file), TOKENIZER, 64)


def test_the_short_form_has_what_was_agreed(folders, world, capsys):
    """The keys of out/ppo/report.json that others read, for a PPO run that changed nothing."""
    (world / "rm/report.json").write_text('{"rm_accuracy_gold": 0.9, "seconds": 5.0}')
    cfg = ppo_options(model=folders[0], reward=str(world / "rm"), max_response=8)
    reward = scalar_from_pretrained(world / "rm")
    found = assess.assess_run(cfg, *networks(folders[0], folders[0]), reward, TOKENIZER, examples(), seconds=12.4567)
    report = json.loads(json.dumps(found))
    assert set(report) == KEYS
    assert report["n_prompts"] == 544 and report["seconds"] == {"sft": None, "rm": 5.0, "ppo": 12.5}
    assert report["kl"] == 0 and report["win_rate"] == 0.5 and report["win_rate_ci"][0] < 0.5 < report["win_rate_ci"][1]
    for name in ("sft", "ppo"):
        figures = report[name]                                          # no perplexity: this SFT has no run.json
        assert M - {"perplexity"} <= set(figures) and set(figures["ci"]) == set(figures) - {"ci"}
        assert all(low <= figures[figure] <= high for figure, (low, high) in figures["ci"].items())
    assert report["sft"]["score"] == report["ppo"]["score"]
    said = capsys.readouterr().out
    assert said.count("[") == len(report["sft"]["ci"]) + len(report["ppo"]["ci"])
    assert max(map(len, said.splitlines())) <= 80
    assert next(line for line in said.splitlines() if "[" in line).startswith("win_rate")


def test_the_short_form_does_without_gold_and_without_a_reward_model(folders, world, capsys):
    """Any policy and its reference will do: here another name, other prompts, and a reward that is a function."""
    two, one = networks(folders[1], folders[0])
    report = assess.assess(two, one, None, TOKENIZER, PROMPTS, Sampling(8, seed=3), name="dpo")
    assert report["win_rate"] is None and report["win_rate_ci"] is None and report["kl"] > 0 and report["seed"] == 3
    assert not {"gold", "score", "win_rate"} & set(report["dpo"]) and report["n_prompts"] == 12
    cfg = ppo_options(model=folders[0], reward="taste.py:f", max_response=8, heldout=str(world / "prompts.jsonl"),
                      gold="none")
    report = assess.assess_run(cfg, two, one, None, TOKENIZER, examples(cfg.heldout), seconds=1)
    assert set(report) == KEYS and report["win_rate"] is None
    assert report["annotator_agreement"] is report["rm_accuracy_gold"] is None
    report = assess.assess_run(cfg, two, one, None, TOKENIZER, [], seconds=1)       # nothing was held out
    assert report == {"seed": 1, "seconds": {"ppo": 1}}
    assert "nothing is assessed" in capsys.readouterr().out


def test_the_live_networks_say_what_the_long_form_says_of_their_exports(folders, world):
    files = dict(prompts="data/tiny/prompts_test.jsonl", reward=world / "rm")
    long = evaluated(world, *folders, **files, out=world / "long")
    cfg = ppo_options(model=folders[0], reward=str(world / "rm"), max_response=8)
    reward = scalar_from_pretrained(world / "rm")
    short = assess.assess_run(cfg, *networks(folders[1], folders[0]), reward, TOKENIZER, examples(), seconds=1)
    for name, path in (("sft", folders[0]), ("ppo", folders[1])):
        values = {figure: value["value"] for figure, value in long["models"][path].items()}
        values["score"] = values.pop(f"score by {world / 'rm'}")
        del values["perplexity"]                                        # of demonstrations beside the prompts
        assert {figure: short[name][figure] for figure in values} == pytest.approx(values)
    by_gold = long["comparisons"][folders[1]]["by"]["gold"]["win_rate"]
    assert short["win_rate"] == by_gold["value"] and short["win_rate_ci"] == [by_gold["low"], by_gold["high"]]


def test_what_an_earlier_run_held_out_may_be_gone(tmp_path, world, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"heldout": f"{tmp_path}/gone.jsonl"}}))
    assert assess.heldout_lines(tmp_path) == assess.heldout_lines(world) == assess.heldout_lines("taste.py:f") == []
    assert "gone.jsonl" in capsys.readouterr().out
    write_jsonl(tmp_path / "gone.jsonl", [{"prompt": "p", "response": " r"}])
    assert assess.heldout_lines(tmp_path) == [(f"{tmp_path}/gone.jsonl:1", {"prompt": "p", "response": " r"})]


def test_the_facts_are_those_that_gold_measures(world):
    rows = [(row["prompt"], response) for _, row in read_jsonl(world / "comparisons.jsonl")
            for response in row["responses"]]
    facts, measured = (load_function(f"{TINY_GOLD}:{name}")(*zip(*rows)) for name in ("facts", "measure"))
    assert measured["stereotype_gap"] > 0
    assert {name: assess.figure_of(values).value for name, values in facts.items()} == pytest.approx(measured)


def test_real_prompts_get_the_checks_that_need_no_gold(folders, world, tmp_path):
    asked = ("Name two rivers.", "Why?", "Say it in at most 3 words.")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Q: {text} A:"} for text in asked])
    (tmp_path / "meta.json").write_text('{"template": "Q: {instruction} A:"}')
    write_jsonl(tmp_path / "demonstrations_test.jsonl", [{"prompt": "Why?", "response": " So."}])     # beside the prompts
    report = evaluated(world, *folders, prompts=tmp_path / "prompts.jsonl", judge=world / "rm")
    found = report["instructions"][folders[0]]
    assert set(found["prompts"]) == {"number of words"} and len(found["own"]) == 2
    assert "gold" not in report["models"][folders[0]] and report["models"][folders[0]]["perplexity"]["n"] == 1
    assert set(report["bias"][folders[0]]) == {"occupation and pronoun", "name and occupation"}
    assert set(report["comparisons"][folders[1]]["by"]) == {str(world / "rm")}


def test_a_script_that_fails_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)                                                     # scripts are found from any folder
    with pytest.raises(UserError, match="train_rm.py stopped with exit code 2"):
        run_script("train_rm.py", model=tmp_path / "none", lr=0.5)
    shown = capfd.readouterr()
    assert f"$ python train_rm.py --model={tmp_path}/none --lr=0.5" in shown.out
    assert "no such model" in shown.err


def test_models_are_sampled_as_the_ppo_run_among_them_sampled(tmp_path):
    for name, config in (("sft", {"max_response": 0}),
                         ("ppo", {"reward": "rm", "max_response": 24, "temperature": 0.7, "stop": "13"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": config}))
    flags = dict(max_response=None, temperature=None, seed=5, drop_long=True)
    both = [str(tmp_path / "ppo"), str(tmp_path / "sft")]
    assert sampling_of(SimpleNamespace(models=both, stop=None, **flags)) == Sampling(24, 0.7, "13", 5, 0, True)
    assert sampling_of(SimpleNamespace(models=both, stop="", **flags)).stop == ""
    plain = sampling_of(SimpleNamespace(models=both[1:], stop="13,16", **flags))
    assert plain == Sampling(48, 1.0, "13,16", 5, 0, True)


def test_another_token_can_end_an_answer():
    """The same answers as with EOS, cut where this token occurs from position 3 on."""
    model = small_model(0)
    free = answer(model, TOKENIZER, PROMPTS * 4, Sampling(10))
    token = next(ids for ids in free.ids if len(ids) == 10)[4]
    stopped = answer(model, TOKENIZER, PROMPTS * 4, Sampling(10, stop=f"{token},3"))
    for long, short, finished in zip(free.ids, stopped.ids, stopped.finished):
        shared = min(len(long), len(short))
        assert long[:shared] == short[:shared] and finished == (short[-1] == token and len(short) > 3)
        assert token not in short[3:-1]
    assert any(stopped.finished)


def test_a_judge_that_trained_the_model_is_named(world, tmp_path):
    for name, config in (("ppo", {"reward": f"{tmp_path}/rm"}), ("rm", {"data": "labels.jsonl"}),
                         ("cousin", {"data": "labels.jsonl"}), ("other", {"data": "other_half.jsonl"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": config}))
    assert "says little" in partiality(tmp_path / "ppo", tmp_path / "rm")
    assert "shares its mistakes" in partiality(tmp_path / "ppo", tmp_path / "cousin")
    (tmp_path / "rm").rename(tmp_path / "moved")
    assert "no longer exists" in partiality(tmp_path / "ppo", tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "rm")
    assert partiality(tmp_path / "ppo", tmp_path / "other") is None
    assert partiality(world / "copy", tmp_path / "rm") is None


def test_the_report_needs_no_matplotlib_and_has_the_curves_of_the_ppo_runs(folders, world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.copytree(folders[1], fake_run(tmp_path / "ppo", reward="rm", data="x"), dirs_exist_ok=True)
    evaluated(world, folders[0], tmp_path / "ppo", out=world / "plain")
    assert {file.name for file in (world / "plain").iterdir()} == {"report.json", "report.html"}
    found = Page(world / "plain/report.html")
    assert [run["name"] for run in found.data["runs"]] == [str(tmp_path / "ppo")] and found.data["samples"]
    assert len(found.chart("objective/kl")["lines"][0]["y"]) == 40 and found.data["live"] == 0


def test_what_cannot_be_assessed_is_said_in_one_line(folders, world, tmp_path):
    model = folders[0]
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "p"}])
    write_jsonl(tmp_path / "ties.jsonl", [{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}])
    for said, argv, flags in (
        ("named twice", (model, model), {}),
        ("no such model folder", (tmp_path / "none",), {}),
        ("score.weight", (model,), {"reward": folders[1]}),
        ("compares two models", (model,), {"votes": world / "comparisons.jsonl"}),
        ("no.jsonl", (model,), {"votes": world / "no.jsonl"}),
        ("with --comparisons", (model,), {"reward": world / "rm", "comparisons": ""}),
        ("2 prompts", (model,), {"prompts": tmp_path / "one.jsonl"}),
        ("above 0", (model,), {"temperature": 0}),
        ("prefers anything", (model,), {"reward": world / "rm", "comparisons": tmp_path / "ties.jsonl"}),
    ):
        with pytest.raises(UserError, match=said):
            evaluated(world, *argv, **flags | {"out": world / "x"})
    assert not (world / "x").exists()


def talk(monkeypatch, capsys, *argv, said):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    chat.main(list(argv))
    return capsys.readouterr()


def test_chat_answers_every_line_and_survives_a_prompt_that_is_too_long(folders, monkeypatch, capsys):
    heard = talk(monkeypatch, capsys, folders[0], said="Write a story.\n" + "the " * 80 + "\n\n")
    assert heard.out.count("> ") == 4 and "positions in all" in heard.err
    again = talk(monkeypatch, capsys, folders[0], said="Write a story.\n" + "the " * 80 + "\n\n")
    assert again.out == heard.out                               # the same seed, the same conversation


def test_chat_with_two_models_puts_them_side_by_side(folders, monkeypatch, capsys):
    heard = talk(monkeypatch, capsys, *folders, "--max_response", "8", said="Write a story.\n")
    assert " | " in heard.out
    assert chat.side_by_side(["a b c", "d"], width=9) == "a b | d\nc   |"


@pytest.fixture
def ppo_run(tmp_path):
    """The log of a PPO run of three iterations."""
    run = tmp_path / "ppo"
    run.mkdir()
    (run / "run.json").write_text('{"config": {}}')
    write_jsonl(run / "metrics.jsonl", [{"step": i, "objective/kl": i, "objective/scores": i / 2,
                                         "rollout/eos_rate": 1.0} for i in range(3)])
    return run


@pytest.mark.parametrize("kind", ["curves", "kl"])
def test_plot_draws_several_runs(ppo_run, kind, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    plot.main([str(ppo_run), str(ppo_run), "--kind", kind, "--labels", "a", "b", "--out", str(picture)])
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, which are not written."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    return figures


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_every_panel_that_some_run_can_fill_is_drawn(drawn):
    """One run with all metrics, one with a single one, and more runs than colours: a curve each."""
    whole = [{"step": i, **{panel[0]: i for panel in plot.PANELS}} for i in range(3)]
    plot.draw_curves({f"run {k}": whole for k in range(8)}, "")
    assert [len(axis.lines) for axis in drawn[0].axes] == [8] * len(plot.PANELS)
    assert titles(drawn[0]) == [panel[1] for panel in plot.PANELS]
    few = [{"step": i, "objective/kl": i, "objective/scores": i} for i in range(3)]
    for draw, panels in ((plot.draw_curves, 2), (plot.draw_kl, 1)):
        draw({"run": few}, "")
        assert len(titles(drawn[-1])) == panels


def test_runs_of_sft_and_reward_models_are_drawn(drawn):
    sft = [{"step": i, "loss/train": 1, **({"loss/heldout": 2} if i == 49 else {})} for i in range(50)]
    rm = [{"step": 0, "loss/train": 1, "accuracy/train": 0.5, "rm_accuracy_heldout": 0.6}]
    plot.draw_curves({"sft": sft, "rm": rm}, "")
    assert len(titles(drawn[0])) == 4
    single = next(axis for axis in drawn[0].axes if "held-out demonstrations" in axis.get_title()).lines[0]
    assert len(single.get_xdata()) == 1 and single.get_marker() == "o"                  # a point, since no line shows
    plot.draw_curves({"rm": rm}, "", ["accuracy/train"])
    assert titles(drawn[1]) == ["Accuracy on the training batch"]
    with pytest.raises(UserError, match="not a PPO run"):
        plot.draw_kl({"sft": sft}, "")
    with pytest.raises(UserError, match="loss/none: not in these runs, which have loss/train, loss/heldout"):
        plot.draw_curves({"sft": sft}, "", ["loss/none"])


def test_the_kl_picture_shows_time(drawn):
    run = [{"step": i, "objective/kl": (5, 1, 3)[i % 3], "objective/scores": i, "objective/gold": 1} for i in range(9)]
    plot.draw_kl({"long": run, "short": run[:3]}, "")
    (long, short), bar = drawn[0].axes[0].collections, drawn[0].axes[-1]
    assert long.get_array().tolist() == list(range(9)) and short.get_array().tolist() == [0, 1, 2]
    assert long.get_clim() == short.get_clim() == (0, 8) and bar.get_ylabel() == "PPO iteration"
    assert len(long.get_paths()[0].vertices) != len(short.get_paths()[0].vertices)      # other markers


def test_grey_is_the_healthy_range_of_the_table():
    rows = re.findall(r"^\| `(\w+/\w+)` \|[^|]*\|([^|]*)\|", Path("minirlhf/DETAILS.md").read_text(), re.MULTILINE)
    said = {metric: set(map(float, re.findall(r"\d+(?:\.\d+)?", healthy))) for metric, healthy in rows}
    assert [panel[0] for panel in plot.PANELS] == list(said)
    for metric, _, _, healthy in plot.PANELS:
        assert set(map(abs, healthy)) - {0, 1} <= said[metric], metric


def test_a_good_run_stays_in_the_grey():
    """The least and the greatest value of each metric in a run of the defaults (seed 1)."""
    seen = {"objective/scores": (-0.08, 1.61), "objective/gold": (0.62, 0.98), "objective/kl": (0, 6.95),
            "objective/rlhf_reward": (-0.08, 1.35), "objective/entropy": (6.35, 15.5),
            "rollout/score_std": (0.54, 1.03), "rollout/eos_rate": (1, 1), "rollout/length": (19.6, 24.7),
            "policy/approxkl": (0, 0.145), "policy/clipfrac": (0, 0.144), "loss/value": (0.008, 0.163),
            "value/explained_variance": (0, 0.957)}
    for metric, _, _, (low, high) in plot.PANELS:
        assert low <= seen[metric][0] <= seen[metric][1] <= high, metric


def test_a_picture_that_cannot_be_written_is_one_line_and_leaves_nothing(ppo_run, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    for out, said in ((tmp_path / "none/x.png", "none/x.png cannot be written: No such"),
                      (tmp_path / "x.doc", "ends in one of"), (tmp_path / "x", "ends in one of")):
        with pytest.raises(UserError, match=said):
            plot.main([str(ppo_run), "--out", str(out)])

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="x.png cannot be written: No space left"):
        plot.main([str(ppo_run), "--out", str(tmp_path / "x.png")])
    assert [file.name for file in tmp_path.iterdir()] == ["ppo"]


def test_plot_refuses_what_it_cannot_draw(ppo_run, tmp_path):
    for argv, said in (([tmp_path], "no run.json"), ([ppo_run, tmp_path / "ppo.1"], "ppo.1: no run.json"),
                       ([ppo_run, ppo_run], "1 different names for 2 folders"),
                       ([ppo_run, "--labels", "a", "b"], "2 different names for 1 folders")):
        with pytest.raises(UserError, match=said):
            plot.main(list(map(str, argv)))
