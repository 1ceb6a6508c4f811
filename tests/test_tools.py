"""The assessment, short and long, and chat."""

import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from minirlhf.files.errors import UserError
from minirlhf.data import encode_rows, read_demonstrations, read_jsonl, read_prompts
from minirlhf.reward_functions import TINY_GOLD, load_function
from minirlhf import assess
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools import chat
from minirlhf.tools.evaluate import __main__ as evaluate, tables
from minirlhf.tools.evaluate.report import against_first, partiality, pick_samples, sampling_of
from minirlhf.assess import Answers, Sampling, answer, distinct_2, perplexity, sequence_kl, logprobs_per_token
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
    assert answers.texts == again.texts and not sequence_kl(copy, model, answers, 1.0).any()
    scores = {name: list(map(len, own.texts)) for name, own in (("model", answers), ("copy", again))}
    facts = {name: {"x": values} for name, values in scores.items()}
    found = against_first({"model": answers, "copy": again}, {"length": scores}, facts)["copy"]
    verdict = found["by"]["length"]
    assert verdict["win_rate"].value == 0.5 and verdict["ties"] == 12 and verdict["p"] == 1
    assert found["differences"]["x"] == (0, 0, 0, 12)
    assert sequence_kl(model, other, answers, 1.0).mean() > 1


def test_the_kl_agrees_with_the_exact_one():
    """Responses of one token: the exact KL of the first token's distribution is a sum over the vocabulary."""
    model, other = small_model(0), small_model(1)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters()):
            theirs.copy_(0.9 * ours + 0.1 * theirs)                                 # not far away
    answers = answer(model, TOKENIZER, PROMPTS[:1] * 4000, Sampling(1))
    ids = torch.tensor([answers.prompt_ids[0]])
    p, q = (torch.log_softmax(each.logits(each(ids)[:, -1]), dim=-1).double() for each in (model, other))
    exact = float((p.exp() * (p - q)).sum().detach())
    found = sequence_kl(model, other, answers, 1.0)
    assert exact > 0.01 and abs(found.mean() - exact) < 3 * found.std() / 4000 ** 0.5


def test_logprobs_and_perplexity_are_those_of_one_sequence_at_a_time(monkeypatch):
    monkeypatch.setattr(assess, "LOGITS", 50_000)                                  # two sequences at a time
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


def test_different_pairs_are_counted_by_hand():
    assert distinct_2([[1, 2, 1, 2], [1, 2, 3]]).value == 3 / 5                     # 12 21 12 12 23: three of five
    assert distinct_2([[1], []]).value == 0


def test_rows_that_share_a_prompt_are_one_prompt():
    """Two annotators' votes have every prompt twice."""
    once, twice = (assess.measure_model("m", small_model(0), TOKENIZER, rows, Sampling(8), [])
                   for rows in (PROMPTS, PROMPTS + PROMPTS))
    assert len(twice[0].prompts) == 12 and twice[2] == once[2] and once[2]["length"].n == 12
    examples = encode_rows(read_demonstrations("data/tiny/demonstrations_test.jsonl")[:8], TOKENIZER, 64)
    assert perplexity(small_model(0), examples * 3) == pytest.approx(perplexity(small_model(0), examples))


# ---- the report ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(folders, tmp_path_factory):
    """Files for a small report: 12 prompts, two models and a copy of the first, a reward model, comparisons."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(folders[0], folder / "copy")
    torch.manual_seed(3)
    save_pretrained(ScalarHeadModel(small_model(3)), folder / "rm")
    save_tokenizer(TOKENIZER, folder / "rm")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row.prompt} for row in PROMPTS])
    (folder / "comparisons.jsonl").write_text("".join(open("data/tiny/comparisons_test.jsonl").readlines()[:30]))
    return folder


def evaluated(world, *argv, **flags):
    """The report of `evaluate` in this world."""
    files = dict(prompts=world / "prompts.jsonl", comparisons=world / "comparisons.jsonl", out=world / "report")
    flags = files | dict(max_response=8) | flags
    evaluate.main([*map(str, argv), *(f"--{name}={value}" for name, value in flags.items())])
    return json.loads((Path(flags["out"]) / "report.json").read_text())


def test_evaluate_writes_a_report_with_n_and_interval_of_everything(folders, world, capsys):
    report = evaluated(world, *folders, world / "copy", prompts="data/tiny/prompts_test.jsonl", reward=world / "rm")
    one, two, copy = report["models"].values()
    assert copy["kl"]["value"] == 0 < two["kl"]["value"] and "kl" not in one
    by = report["comparisons"][str(world / "copy")]["by"]
    assert by["gold"]["win_rate"]["value"] == by[str(world / "rm")]["win_rate"]["value"] == 0.5
    figures = [figure for figures in report["models"].values() for figure in figures.values()]
    assert all(figure["low"] <= figure["value"] <= figure["high"] and figure["n"] in (544, 512) for figure in figures)
    assert report["reward"]["accuracy"]["n"] <= 30 and report["notes"] == []
    said = capsys.readouterr().out
    shown = Page(world / "report/report.html").data
    cells = {cell for table in shown["tables"] for row in table["rows"] for cell in row}
    assert "Win rate" in shown["verdict"][0] and shown["verdict"] == report["verdict"]
    assert all(text in cells and text in said for text in (str(Estimate(**figure)) for figure in figures))
    assert all(judge in said for judge in by) and said.index("Win rate") < said.index("perplexity")
    answers = next(table["rows"] for table in shown["tables"] if table["title"] == "Samples")
    assert len(report["samples"]) == 20 and all(head for table in shown["tables"] for head in table["head"])
    for row, (why, prompt, *texts) in zip(report["samples"], answers, strict=True):
        assert (why, prompt) == (row["why"], row["prompt"])
        for name, shown_text in zip(report["models"], texts, strict=True):
            assert shown_text.startswith(row["answers"][name]) or not row["answers"][name].strip()
            assert ("cut off" in shown_text) == (not row["finished"][name])


def answers_of(*texts):
    return Answers([f"p{i}" for i in range(len(texts))], list(texts), None, None, [True] * len(texts))


def test_people_come_first_in_the_report_and_are_counted_by_prompt(folders, world, tmp_path, capsys):
    """One prompt of six is lost, each judged by two people. A file about other models is an error."""
    rows = [{"prompt": f"p{n}", "responses": [" a", " b"], "ranks": [2, 1] if n else [1, 2], "annotator": who,
             "models": [folders[0], str(world / "copy")]} for n in range(6) for who in ("ann", "bob")]
    write_jsonl(tmp_path / "votes.jsonl", rows)
    report = evaluated(world, folders[0], world / "copy", judge=world / "rm", votes=tmp_path / "votes.jsonl")
    by = report["comparisons"][str(world / "copy")]["by"]
    people, judge = by.values()
    assert list(by)[1] == str(world / "rm") and people["win_rate"]["n"] == 6
    assert people["win_rate"]["value"] == pytest.approx(5 / 6) and judge["win_rate"]["value"] == 0.5
    assert "votes.jsonl" in report["verdict"][0] and str(world / "rm") in report["verdict"][1]
    with pytest.raises(UserError, match="votes.jsonl: no vote"):
        evaluated(world, *folders, votes=tmp_path / "votes.jsonl")


def estimate(value, half=0.0, n=100):
    return Estimate(value, value - half, value + half, n)


@pytest.mark.parametrize("wins, says, not_this", [
    (estimate(0.7, 0.1), "new is better than old", "too few"), (estimate(0.3, 0.1), "new is worse than old", "too few"),
    (estimate(0.6, 0.2, 12), "too few", "equally"),
    (estimate(0.51, 0.03, 900), "equally good", "too few")])
def test_the_verdict_says_who_wins_or_that_n_is_too_small(wins, says, not_this):
    said = tables.winner("new", "old", wins, ties=3, p=0.0421)
    assert says in said and not_this not in said
    assert all(number in said for number in (str(wins), str(wins.n), "3 tied", "0.042"))


@pytest.mark.parametrize("changes, wrong", [
    ({}, None), ({"length": 4.0}, "half as long"), ({"eos_rate": 0.2}, "cut off"), ({"distinct_2": 0.05}, "alike"),
    ({"perplexity": 4207.0}, "perplexity"), ({"length": 12.0, "perplexity": 12.0}, None)])
def test_the_verdict_says_whether_a_model_has_collapsed(changes, wrong):
    base = {"length": 20.0, "eos_rate": 0.9, "distinct_2": 0.5, "perplexity": 8.0}
    first, own = ({name: estimate(x) for name, x in figures.items()} for figures in (base, base | changes))
    said = tables.alive("new", own, first)
    assert said.startswith("Not" if wrong else "Alive") and (wrong or "new") in said


def test_an_empty_answer_and_a_cut_off_one_are_not_taken_for_others():
    said = [tables.shown(text, finished) for text in ("", " \n", "word") for finished in (True, False)]
    assert len(set(said)) == 4 and all(text.strip() for text in said)
    assert said[4] == "word" and said[5].startswith("word")


def test_samples_are_the_best_and_the_worst():
    old, new = answers_of(*"abcdefghij"), answers_of(*"ABCDEFGHIJ")
    scores = {"gold": {"old": [0] * 10, "new": [3, 1, 4, 0, 5, 9, 2, 6, 5, 3]}}
    found = pick_samples({"old": old, "new": new}, scores, n=4)
    assert [(row["why"], row["prompt"]) for row in found] == [
        ("best, 9.00", "p5"), ("best, 6.00", "p7"), ("worst, 0.00", "p3"), ("worst, 1.00", "p1")]
    assert found[0]["answers"] == {"old": "f", "new": "F"}
    assert len(pick_samples({"old": old, "new": new}, scores)) == 10                # no prompt twice
    assert [row["prompt"] for row in pick_samples({"old": old}, {}, n=2)] == ["p0", "p1"]


def run_folder(folder, **config):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": config}))
    return str(folder)


def test_the_prompts_are_those_that_the_last_run_held_out(tmp_path):
    sft = run_folder(tmp_path / "sft", data="mine.jsonl", heldout="")
    ppo = run_folder(tmp_path / "ppo", data="mine.jsonl", reward="rm", heldout="elsewhere/heldout.jsonl")
    for models in ([sft], [sft, ppo], ["gpt2"]):                                        # ppo's file is gone
        with pytest.raises(UserError, match="--prompts"):
            evaluate.parse(models)
    write_jsonl(tmp_path / "ppo/heldout.jsonl", [{"prompt": "p"}])                      # the folder may have moved
    write_jsonl(tmp_path / "labels.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    rm = run_folder(tmp_path / "rm", heldout=f"{tmp_path}/labels.jsonl")
    for models in ([sft, ppo], [ppo, sft]):
        args = evaluate.parse([*models, "--reward", rm])
        assert args.prompts == f"{ppo}/heldout.jsonl" and args.comparisons == f"{tmp_path}/labels.jsonl"


M = {"gold", "attributes_right", "rude", "stereotype_gap", "grammatical", "eos_rate", "length", "distinct_2",
     "perplexity"}


KEYS = {"n_prompts", "seed", "seconds", "annotator_agreement", "rm_accuracy_gold", "rm_accuracy_heldout", "win_rate",
        "win_rate_ci", "kl", "sft", "ppo"}


def ppo_options(**changes):
    """The options of train_ppo.py."""
    return train_ppo.Config(**{"heldout": "data/tiny/prompts_test.jsonl", "temperature": 1.0, "stop": ""} | changes)


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
    assert capsys.readouterr().out.count("[") == len(report["sft"]["ci"]) + len(report["ppo"]["ci"])


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
    write_jsonl(tmp_path / "demonstrations_test.jsonl", [{"prompt": "Why?", "response": " So."}])   # beside them
    report = evaluated(world, *folders, prompts=tmp_path / "prompts.jsonl", judge=world / "rm")
    assert set(report["instructions"][folders[0]]) == {"number of words"}
    assert "gold" not in report["models"][folders[0]] and report["models"][folders[0]]["perplexity"]["n"] == 1
    assert set(report["bias"][folders[0]]) == {"occupation and pronoun", "name and occupation"}
    assert set(report["comparisons"][folders[1]]["by"]) == {str(world / "rm")}


@pytest.mark.slow
def test_a_script_that_fails_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)                                                     # scripts are found from any folder
    with pytest.raises(UserError, match="train_rm.py stopped with exit code 2"):
        run_script("train_rm.py", model=tmp_path / "none", lr=0.5)
    assert "no such model" in capfd.readouterr().err


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


def test_a_judge_that_trained_the_model_is_named(world, tmp_path):
    for name, config in (("ppo", {"reward": f"{tmp_path}/rm"}), ("rm", {"data": "labels.jsonl"}),
                         ("cousin", {"data": "labels.jsonl"}), ("other", {"data": "other_half.jsonl"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": config}))
    assert "says little" in partiality(tmp_path / "ppo", tmp_path / "rm")
    assert "shares its mistakes" in partiality(tmp_path / "ppo", tmp_path / "cousin")
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
