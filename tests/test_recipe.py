"""The recipes of the documents with a real model: their commands, one after the other, with SmolLM2 and less of the rest.

The CSV of a shop's questions is as Excel saves one: cp1252, semicolons, emptied columns, line ends within cells, a
question asked twice. Three simulated annotators rank what the model samples.
"""

import importlib
import io
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest

from minirlhf import answers
from minirlhf.files.errors import UserError
from minirlhf.files.jsonl import read_jsonl
from minirlhf.tools.feedback.votes import comparison_row, to_line
from smollm2 import smollm2                                                     # noqa: F401, a fixture

ROOT = Path(__file__).resolve().parents[1]
FILMS = Path(os.environ.get("MINIRLHF_REAL_DATA") or "nowhere") / "hutto_ICWSM_2014.tar.gz"
FACTS = {           # what people ask about: the house's answer
    "return a kettle": "You can send it back within 30 days. Put the slip into the box and drop it at any post office.",
    "descale my machine": "Fill the tank with water and one sachet of descaler. Hold the steam button for five seconds.",
    "cancel my order": "Open Orders and choose Cancel. It ends at once, and nothing more is charged.",
    "change my address": "Open Account, then Addresses. Parcels that have left already go to the old one.",
    "get an invoice": "Every invoice lies under Orders as a PDF. For a company, add the tax number first.",
    "pay by invoice": "Choose invoice at the checkout. It is due 14 days after the parcel has arrived.",
    "track my parcel": "The number is in the e-mail that we sent you. It works from the next morning on.",
    "replace the filter": "Turn the lid to the left and lift the filter out. A new one lasts about two months.",
    "use a voucher": "Type its code at the checkout, below the sum. One voucher counts for one order.",
    "reset my password": "Choose \u201cForgotten\u201d on the page where you sign in. The link is good for one hour.",
    "ship to Norway": "We ship there for 12 \u20ac. Customs may ask you for a fee when the parcel arrives.",
    "repair a grinder": "Send it to our workshop with a note. You hear from us before anything costs you money.",
    "order spare parts": "All parts are listed under Service. Look for the number on the bottom of your machine.",
    "stop the newsletter": "The last line of every letter has a link. One click, and it was the last one.",
    "reach a person": "Call us from nine to five on working days. On Saturdays, write in the chat.",
}
WORDINGS = ["How do I {}?", "I want to {}. What do I do?", "can i {}", "Please help me {}.", "Is it possible to {}?",
            "Hello, I need to {}.", "What is the way to {}?", "My husband would like to {}.", "Where do I {}?",
            "I tried to {} and could not."]


def write_csv(path, seed, rows=150):
    """150 questions: every topic in every wording. Half of the answers greet."""
    rng = random.Random(seed)
    asked = [(wording.format(topic), topic) for topic in FACTS for wording in WORDINGS]
    rng.shuffle(asked)
    lines = ["sep=;", "Question;Answer;;"]
    for question, topic in asked[:rows - 1] + [asked[0]]:
        answer = rng.choice(["Hello, thanks for asking.\r\n", ""]) + FACTS[topic]
        lines.append(";".join('"' + cell + '"' for cell in (question, answer)) + ";;")
    Path(path).write_bytes("\r\n".join([*lines, ";;;"]).encode("cp1252"))


def worth(prompt, answer, finished):
    """What the annotators want: the words of the house's answer, an end, and no rambling."""
    facts = next((fact for topic, fact in FACTS.items() if topic in prompt), "")
    wanted, said = set(re.findall(r"\w+", facts.lower())), re.findall(r"\w+", answer.lower())
    return len(wanted & set(said)) / max(len(wanted), 1) + 0.5 * finished - 0.005 * len(said)


def vote(items, votes, seed, noise=0.15, most=None):
    """Three annotators rank the sampled answers; noise None: at random. One row for each person and item."""
    rng, rows = random.Random(seed), []
    different = [item for _, item in read_jsonl(items) if len(item["responses"]) > 1]      # the page shows these
    for item in different[:most]:
        texts = item["responses"]
        for person in ("ann", "bob", "cem"):
            scores = [(0 if noise is None else worth(item["prompt"], text, finished)) + rng.gauss(0, noise or 1)
                      for text, finished in zip(texts, item["finished"])]
            ranks = [1 + sum(other > score for other in scores) for score in scores]
            row = comparison_row(item["prompt"], texts, ranks, item["finished"], item=item["item"], models=item["models"])
            rows.append(row | {"annotator": person, "seconds": 20.0, "time": f"2026-01-01T00:00:{len(rows) % 60:02}"})
    Path(votes).write_bytes(b"".join(map(to_line, rows)))


def recipe(file, heading):
    """The commands of a document below a heading: (what to run, its arguments)."""
    section = (ROOT / file).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for command in re.findall(r"^    python (.*)$", section.replace("\\\n", ""), flags=re.MULTILINE):
        name, *arguments = command.removeprefix("-m ").split()
        yield name, arguments


def main_of(name):
    """The main function of "train_sft.py" or "minirlhf.tools.chat"."""
    module = name.removesuffix(".py").replace("/", ".")
    for candidate in (module, f"{module}.__main__"):
        if (ROOT / (candidate.replace(".", "/") + ".py")).exists():
            return importlib.import_module(candidate).main
    raise AssertionError(f"{name} is no command")


def follow(commands, flags, capsys, after={}):
    """Runs commands, with more flags for some, and PPO again with --insist if it refuses.

    after: {command: what is done when it has ended}. Returns {command: what it printed}.
    """
    printed = {}
    for name, arguments in commands:
        label = f"{name} {arguments[0]}" if name.endswith("feedback") else name
        arguments = arguments + flags.get(label, [])
        try:
            main_of(name)(arguments)
        except UserError as error:
            assert label == "train_ppo.py" and "--insist" in str(error), error
            printed["refused"] = str(error)
            main_of(name)([*arguments, "--insist"])
        after.get(label, lambda: None)()
        printed[label] = capsys.readouterr().out
    return printed


def refused_rightly(printed):
    """PPO has refused to start exactly where a check before it, or its first rollout, said so."""
    said = printed.get("refused", "")
    assert bool(said) == ("no-go" in printed["train_rm.py"] or "of the first responses ended" in said)


@pytest.fixture
def few_samples(monkeypatch, tmp_path):
    """Scores are normalised on 32 answers in place of 512, and the current folder is a fresh one."""
    monkeypatch.setattr(answers, "SAMPLES", 32)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_recipe_from_a_csv_to_a_judged_model(smollm2, capsys, monkeypatch, few_samples):        # noqa: F811
    monkeypatch.setattr(sys, "stdin", io.StringIO("How do I return a kettle?\n"))
    write_csv(Path("questions.csv"), seed=1)
    commands = [(name, ["sample" if word == "rank" else word for word in arguments])     # in place of the page
                for name, arguments in recipe("data/README.md", "From a CSV to an aligned model")]
    few = ["--max_response", "48"]
    printed = follow(commands, {
        "train_sft.py": ["--model", str(smollm2), "--epochs", "1"],
        "minirlhf.tools.feedback sample": [*few, "--n", "15"],
        "train_ppo.py": [*few, "--iterations", "2", "--batch_size", "8"]}, capsys,
        {"minirlhf.tools.feedback sample": lambda: vote("my/comparisons.items.jsonl", "my/comparisons.jsonl", seed=1)})
    converted = [json.loads(line) for line in Path("my/questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(converted) == 150 and {row["response"].strip().split("\n")[-1] for row in converted} == set(FACTS.values())
    assert re.search(r"\d prompts .*with another answer", printed["minirlhf.tools.convert"])
    sft, ppo = (json.loads(Path(f"my/{name}/run.json").read_text())["config"] for name in ("sft", "ppo"))
    assert [ppo[name] for name in ("temperature", "stop", "max_prompt")] == [
        sft[name] for name in ("temperature", "stop", "max_prompt")]
    assert re.search("^(go|no-go): held-out loss", printed["train_sft.py"], re.MULTILINE)
    assert "kappa" in printed["minirlhf.tools.feedback stats"]
    refused_rightly(printed)
    assert Path("my/report/report.html").exists() and printed["minirlhf.tools.chat"].strip()


@pytest.mark.slow
@pytest.mark.skipif(not FILMS.is_file(), reason="$MINIRLHF_REAL_DATA has no hutto_ICWSM_2014.tar.gz")
def test_the_recipe_of_the_films(smollm2, capsys, few_samples):                                     # noqa: F811
    """At a twentieth of its size."""
    def cut():
        for file in Path("out/data/films").glob("*.jsonl"):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            file.write_text("".join(lines[:len(lines) // 20]), encoding="utf-8")
    printed = follow(recipe("README.md", "A real model and real people"), {
        "data/films/prepare.py": ["--source", str(FILMS)],
        "train_sft.py": ["--model", str(smollm2)],
        "train_ppo.py": ["--iterations", "2", "--batch_size", "8"]}, capsys, {"data/films/prepare.py": cut})
    assert re.search("^(go|no-go): held-out loss", printed["train_sft.py"], re.MULTILINE)
    refused_rightly(printed)
    report = json.loads(Path("out/films/ppo/report.json").read_text())
    assert abs(report["kl"]) < 5 and report["ppo"]["perplexity"] < 1.5 * report["sft"]["perplexity"] < 300
