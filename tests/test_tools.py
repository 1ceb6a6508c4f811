"""The tools: the figures of the assessment, chat, and the plots."""

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
import train_rm
from minirlhf.running.errors import UserError
from minirlhf.data import encode_rows, read_demonstrations, read_jsonl, read_prompts
from minirlhf.functions import TINY_GOLD, load_function
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools import chat, plot
from minirlhf.tools.evaluate import __main__ as evaluate
from minirlhf.tools.evaluate import measure
from minirlhf.tools.evaluate.compare import against_first, partiality, sequence_kl
from minirlhf.tools.evaluate.measure import Answers, answer, distinct, entropies, perplexity, repetition, token_logprobs_of
from minirlhf.weights import save_pretrained
from small_world import script_flags, write_jsonl

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
    answers = answer(model, TOKENIZER, PROMPTS, 10, 1.0, 1, None)
    again = answer(copy, TOKENIZER, PROMPTS, 10, 1.0, 1, None)
    assert all(figure[:3] == (0, 0, 0) for figure in sequence_kl(copy, model, answers, 1.0).values())
    assert answers.texts == again.texts
    scores = {name: list(map(len, own.texts)) for name, own in (("model", answers), ("copy", again))}
    facts = {name: {"x": values} for name, values in scores.items()}
    found = against_first({"model": answers, "copy": again}, {"length": scores}, facts)["copy"]
    verdict = found["by"]["length"]
    assert verdict["win_rate"].value == 0.5 and verdict["ties"] == 12 and verdict["p"] == 1
    assert found["differences"]["x"] == ((0, 0, 0, 12), 1)
    assert sequence_kl(model, other, answer(model, TOKENIZER, PROMPTS * 8, 10, 1.0, 1, None), 1.0)["kl"].low > 1


def test_both_estimates_of_the_kl_agree_with_the_exact_one():
    """Responses of one token: the exact KL of the first token's distribution is a sum over the vocabulary."""
    model, other = small_model(0), small_model(1)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters()):
            theirs.copy_(0.9 * ours + 0.1 * theirs)                                 # not far away
    answers = answer(model, TOKENIZER, PROMPTS[:1] * 4000, 1, 1.0, 1, None)
    ids = torch.tensor([answers.prompt_ids[0]])
    p, q = (torch.log_softmax(each.logits(each(ids)[:, -1]), dim=-1).double() for each in (model, other))
    exact = float((p.exp() * (p - q)).sum().detach())
    found = sequence_kl(model, other, answers, 1.0)
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
    rows = token_logprobs_of(model, [e.prompt for e in examples], [e.responses[0] for e in examples], 0.7)
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
    assert distinct([[1, 2, 1, 2], [1, 2, 3]], 2).value == 3 / 5                    # 12 21 12 12 23: three different ones of five
    assert distinct([[1, 1], [1]], 1).value == 1 / 3 and distinct([[1], []], 2).value == 0
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9]]).value == 1 / 7   # of 5 + 2 four-grams one is said twice
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
    text = (world / "report/report.md").read_text()
    assert "ECE" in text and "sign test p" in text and "perplexity" in capsys.readouterr().out


M = {"gold", "attributes_right", "rude", "stereotype_gap", "grammatical", "eos_rate", "length", "distinct_2", "perplexity"}


def test_the_short_form_has_what_was_agreed(folders, world, tmp_path, capsys):
    """The keys of out/ppo/report.json that others read, for a PPO run that changed nothing."""
    run = shutil.copytree(folders[0], tmp_path / "ppo")
    config = train_ppo.Config(model=folders[0], reward=str(world / "rm"), max_response=8, out=str(run))
    (run / "run.json").write_text(json.dumps({"config": vars(config)}))
    (world / "rm/report.json").write_text('{"rm_accuracy_gold": 0.9, "seconds": 5.0}')
    report = json.loads(json.dumps(evaluate.assess_run(run, 12.5, torch.device("cpu"))))
    assert set(report) == {"n_prompts", "seed", "seconds", "annotator_agreement", "rm_accuracy_gold", "rm_accuracy_heldout",
                           "win_rate", "win_rate_ci", "kl", "sft", "ppo"}
    assert report["n_prompts"] == 544 and report["seconds"] == {"sft": None, "rm": 5.0, "ppo": 12.5}
    assert report["kl"] == 0 and report["win_rate"] == 0.5 and report["win_rate_ci"][0] < 0.5 < report["win_rate_ci"][1]
    for name in ("sft", "ppo"):
        figures = report[name]                                                      # no perplexity: this SFT has no run.json
        assert M - {"perplexity"} <= set(figures) and set(figures["ci"]) == set(figures) - {"ci"}
        assert all(low <= figures[figure] <= high for figure, (low, high) in figures["ci"].items())
    evaluate.print_report({"sft": report["sft"], "ppo": report["ppo"] | {"win_rate": None}})
    assert capsys.readouterr().out.count("[") == len(report["sft"]["ci"]) + len(report["ppo"]["ci"]) - 1       # not of None


def test_the_facts_are_those_that_gold_measures(world):
    rows = [(row["prompt"], response) for _, row in read_jsonl(world / "comparisons.jsonl") for response in row["responses"]]
    answers = Answers(*map(list, zip(*rows)), [], [], [])
    facts = evaluate.tiny_facts(answers)
    figures = evaluate.gold_figures(facts)
    measured = load_function(f"{TINY_GOLD}:measure")(answers.prompts, answers.texts)
    assert measured["stereotype_gap"] > 0 and {name: figures[name].value for name in measured} == pytest.approx(measured)


def test_real_prompts_get_the_checks_that_need_no_gold(folders, world, tmp_path):
    asked = ("List two rivers.", "Why?", "Say it in at most 3 words.")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Q: {text} A:"} for text in asked])
    (tmp_path / "meta.json").write_text('{"template": "Q: {instruction} A:"}')
    write_jsonl(tmp_path / "demonstrations_test.jsonl", [{"prompt": "Why?", "response": " So."}])       # found beside the prompts
    report = evaluated(world, *folders, prompts=tmp_path / "prompts.jsonl", judge=world / "rm")
    found = report["instructions"][folders[0]]
    assert set(found["prompts"]) == {"a list", "number of words"} and len(found["own"]) == 3
    assert "gold" not in report["models"][folders[0]] and report["models"][folders[0]]["perplexity"]["n"] == 1
    assert set(report["bias"][folders[0]]) == {"occupation and pronoun", "name and occupation"}
    assert set(report["comparisons"][folders[1]]["by"]) == {str(world / "rm")}


def test_the_learning_curve_trains_as_the_reward_model_was_trained(folders, world):
    train_rm.main(script_flags(world, "rm_of_30", "--model", folders[0], "--data", world / "comparisons.jsonl", "--gold", "none",
                               "--normalise", 8, "--epochs", 1, "--sample_tokens", 5, "--loss", "best"))
    report = evaluated(world, folders[0], prompts="data/tiny/prompts_test.jsonl", reward=world / "rm_of_30", learning_curve=7)
    assert list(report["learning_curve"]) == ["7"] and 0 <= report["learning_curve"]["7"]["value"] <= 1
    config = json.loads((world / "report/rm_7/run.json").read_text())["config"]
    assert config["loss"] == "best" and config["normalise"] == 8 and config["epochs"] == 20 and config["model"] == folders[0]
    assert len((world / "report/comparisons_7.jsonl").read_text().splitlines()) == 7
    with pytest.raises(UserError, match="on 31 comparisons need as many lines"):
        evaluated(world, folders[0], reward=world / "rm_of_30", learning_curve=31, out=world / "y")
    assert not (world / "y").exists()


def test_models_are_sampled_as_the_ppo_run_among_them_sampled(tmp_path):
    for name, config in (("sft", {"max_response": 0}),
                         ("ppo", {"reward": "rm", "max_response": 24, "temperature": 0.7, "stop_token": 13})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": config}))
    flags = dict(temperature=None, stop_token=None, stop_after=16)
    both = [str(tmp_path / "ppo"), str(tmp_path / "sft")]
    assert vars(evaluate.sampling_of(SimpleNamespace(models=both, max_response=None, **flags))) == dict(
        max_response=24, temperature=0.7, stop_token=13, stop_after=16)
    assert evaluate.sampling_of(SimpleNamespace(models=both[1:], max_response=None, **flags)).max_response == 48


def test_a_judge_that_trained_the_model_is_named(world, tmp_path):
    for name, config in (("ppo", {"reward": f"{tmp_path}/rm"}), ("rm", {"data": "labels.jsonl"}),
                         ("cousin", {"data": "labels.jsonl"}), ("other", {"data": "other_half.jsonl"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": config}))
    assert "trained to please" in partiality(tmp_path / "ppo", tmp_path / "rm")
    assert "shares its mistakes" in partiality(tmp_path / "ppo", tmp_path / "cousin")
    (tmp_path / "rm").rename(tmp_path / "moved")
    assert "which is not there" in partiality(tmp_path / "ppo", tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "rm")
    assert partiality(tmp_path / "ppo", tmp_path / "other") is None and partiality(world / "copy", tmp_path / "rm") is None


def test_without_matplotlib_the_rest_is_written(folders, world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluated(world, *folders, reward=world / "rm", out=world / "plain")
    assert "no pictures: plots need matplotlib" in capsys.readouterr().out
    assert {file.name for file in (world / "plain").iterdir()} == {"report.json", "report.md"}


def test_what_cannot_be_assessed_is_said_in_one_line(folders, world, tmp_path):
    model = folders[0]
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "p"}])
    write_jsonl(tmp_path / "ties.jsonl", [{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}])
    for said, argv, flags in (
        ("named twice", (model, model), {}),
        ("no such model folder", (tmp_path / "none",), {}),
        ("name it with --reward", (model,), {"learning_curve": 5}),
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
    write_jsonl(run / "metrics.jsonl", [{"step": i, "objective/kl": i, "objective/scores": i / 2, "val/eos_rate": 1.0}
                                        for i in range(3)])
    return run


@pytest.mark.parametrize("kind", ["curves", "kl"])
def test_plot_draws_several_runs(ppo_run, kind, tmp_path):
    pytest.importorskip("matplotlib")
    plot.main([str(ppo_run), str(ppo_run), "--kind", kind, "--labels", "a", "b", "--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_draws_reports(folders, world, tmp_path):
    pytest.importorskip("matplotlib")
    evaluated(world, folders[0], reward=world / "rm", out=tmp_path / "report")
    plot.main([str(tmp_path / "report"), "--kind", "calibration", "--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_refuses_what_it_cannot_draw(ppo_run, tmp_path):
    for argv, said in (([tmp_path], "no run.json"), ([ppo_run, "--labels", "a", "b"], "2 names for 1 folders"),
                       ([ppo_run, "--kind", "calibration"], "no report.json"),
                       ([ppo_run, "--kind", "overoptimization"], "no report.json")):
        with pytest.raises(UserError, match=said):
            plot.main(list(map(str, argv)))
