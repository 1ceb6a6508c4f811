"""Self-instruct: the numbered list and back, the rules, ROUGE-L, servers that misbehave, and crashes."""

import functools
import importlib.util
import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from small_world import LETTERS, TOKENIZER, letters_gpt2, write_jsonl

from data.alpaca import prepare as alpaca
from minirlhf.data import read_demonstrations
from minirlhf.files.tokenizer import save_tokenizer
from minirlhf.files.errors import UserError
from minirlhf.tools import self_instruct
from minirlhf.tools.self_instruct import (KEPT, Task, encode_list, parse_list, prompt_of, read_seeds, rouge_l,
                                          words_of)
from minirlhf.weights import save_pretrained

ROOT = Path(__file__).parents[1]
SEEDS = [{"instruction": "Name  the capital\nof this country:", "input": "France", "output": "Paris."},
         {"instruction": "Write two short lines about the sea.", "input": "", "output": "Blue, wide.\nIt sings."},
         {"instruction": "Add these two numbers, please.", "input": "2\n40", "output": "42"},
         {"instruction": "Say which of the words is a verb.", "input": "run, table", "output": "run: a verb"}]
NEW = ("Give a synonym of the adjective.", "List three kinds of trees.", "Explain why leaves are green in summer.")
KEY = "sk-secret-0123456789"
REALLY_SLEEP = time.sleep                                       # tests replace time.sleep where the client waits


# ---- the list --------------------------------------------------------------------------------------------------------

@pytest.fixture
def seeds(tmp_path):
    write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    return tmp_path / "seeds.jsonl"


def test_a_prompt_is_the_list_of_stanford(seeds):
    tasks, bare = read_seeds(seeds)
    _, _, tasks_of_the_prompt = prompt_of(tasks[:3], 2).partition("\n\n")
    assert not bare and tasks_of_the_prompt == (
        "###\n1. Instruction: Name the capital of this country\n1. Input:\nFrance\n1. Output:\nParis.\n"
        "###\n2. Instruction: Write two short lines about the sea.\n2. Input:\n<noinput>\n2. Output:\nBlue, wide.\n"
        "It sings.\n"
        "###\n3. Instruction: Add these two numbers, please.\n3. Input:\n2\n40\n3. Output:\n42\n"
        "###\n4. Instruction:")


def round_trip(tasks):
    text = encode_list(tasks, first=4).removeprefix("###\n4. Instruction:")
    return [task for _, task in parse_list(text, first=4, most=len(tasks))]


def test_encode_and_parse_are_inverse(seeds):
    tasks, _ = read_seeds(seeds)
    assert round_trip(tasks) == tasks
    assert parse_list(encode_list(tasks, 4), 4, 9) == parse_list(" 4. Instruction:" + encode_list(tasks, 4).partition(
        "Instruction:")[2], 4, 9), "a chat model may begin with the number that the prompt ends with"


@pytest.mark.parametrize("text, complete, expected", [
    ("", True, []),
    (" \n", False, []),
    (" Say hi.\n4. Input:\n<NoInput>\n4. Output:\nHi.", True, [("Say hi.", "", "Hi.")]),
    (" Say hi.\n4. Input:\n<noinput>\n4. Output:\nHi, it costs $20. Or 14. Output", False, ["cut off"]),
    (" Say hi.\n4. Input: a\n4. Output: It costs $20. Bye\n###\n5. Instr", False,
     [("Say hi.", "a", "It costs $20. Bye"), "cut off"]),
    (" Say hi.\n4. Input:\nb\n4. Output:\nHi.\n###\n", False, [("Say hi.", "b", "Hi.")]),
    (" Say hi.\n4. Output:\nHi.\n###\n6. Instruction: x\n6. Input:\n6. Output:\n", True, ["form", "form"]),
    (" Say hi.\n4. Output:\nb\n4. Input:\nHi.", True, ["form"]),
    (" Say hi.\n4. Input:\nb\n4. Output:\nHi.\n4. Output:\nHo.", True, ["form"]),
    (" a\n4. Input:\nb\n4. Output:\nc###\n5. Instruction: d\n5. Input:\ne\n5. Output:\nf###\n6. Instruction: g", False,
     [("a", "b", "c"), ("d", "e", "f")]),
])
def test_what_a_model_writes_is_cut_into_tasks(text, complete, expected):
    found = [task for _, task in parse_list(text, first=4, most=2, complete=complete)]
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected):
        assert wanted in got if isinstance(wanted, str) else got == wanted


@pytest.mark.parametrize("rows, said", [
    (SEEDS[:2], "2 seed tasks are too few"),
    ([*SEEDS, {"instruction": "Do it.", "input": "", "output": " "}], ":5: a seed task needs"),
    ([*SEEDS, {"instruction": "Do it.", "input": "### A title", "output": "b"}], ":5: this task has ###"),
    ([*SEEDS, {"instruction": "Do it.", "input": ""}], ":5: no \"output\""),
])
def test_seeds_that_cannot_be_used(tmp_path, rows, said):
    write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=said):
        read_seeds(tmp_path / "bad.jsonl")


# ---- what is kept ----------------------------------------------------------------------------------------------------

def longest_common(a, b):
    """By the definition, in exponential time."""
    @functools.cache
    def lcs(i, j):
        if i == len(a) or j == len(b):
            return 0
        return lcs(i + 1, j + 1) + 1 if a[i] == b[j] else max(lcs(i + 1, j), lcs(i, j + 1))
    return lcs(0, 0)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    assert rouge_l(words_of("The cat sat on the mat."), words_of("the CAT is on the mat")) == pytest.approx(5 / 6)
    rng = random.Random(1)
    for _ in range(500):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(1, 70 if rng.random() < 0.1 else 9))] for _ in "ab")
        common = longest_common(a, b)
        precision, recall = common / len(b), common / len(a)
        f1 = 2 * precision * recall / (precision + recall) if common else 0
        assert rouge_l(a, b) == pytest.approx(f1) == rouge_l(b, a)
    assert rouge_l([], []) == 0 == rouge_l(["a"], [])


GOOD = Task("Name the largest of these planets.", "Mars, Jupiter", "Jupiter")


@pytest.mark.parametrize("reason, changes", [
    (None, {}),
    (None, {"instruction": "a " * 150}),
    (None, {"instruction": "Describe a mapmaker's filesystem at home."}),
    (None, {"output": " " * 99_999 + "x"}),
    ("tokenizer", {"output": "half \ud800"}),
    ("tokenizer", {"instruction": "Say this" + " " * 100_000 + "now please."}),
    ("tokenizer", {"input": "x" * 1_000_000}),
    ("3 words", {"instruction": "Name three planets."}),
    ("3 words", {"instruction": ""}),
    ("150 words", {"instruction": "a " * 151}),
    ("150 words", {"instruction": "Sort this list: " + "-".join(map(str, range(100_000)))}),
    ("banned", {"instruction": "Please go to the kitchen and cook."}),
    ("banned", {"instruction": "Describe what the Image shows here."}),
    ("program", {"instruction": "Write a program that adds numbers."}),
    ("punctuation", {"instruction": "(Name the largest of them.)"}),
    ("ASCII", {"instruction": "Écris le nom de la planète."}),
    ("empty", {"output": ""}),
    ("repeats", {"output": GOOD.input}),
    ("repeats", {"output": GOOD.instruction}),
])
def test_each_rule_rejects_what_it_names_and_nothing_else(seeds, reason, changes):
    verdict, = judge([GOOD._replace(**changes)], seeds)
    assert verdict["verdict"] == KEPT if reason is None else reason in verdict["verdict"]


def args_for(seeds, *flags):
    return self_instruct.parse_args(["--seed_tasks", str(seeds), "--out", "x", "--model", "y", *flags])


def judge(tasks, seeds, *flags):
    """The verdicts on tasks that a model wrote in one request each."""
    rows = [{"request": i, "complete": True, "text": encode_list([task], 4).removeprefix("###\n4. Instruction:")}
            for i, task in enumerate(tasks)]
    return list(self_instruct.judge(rows, read_seeds(seeds)[0], args_for(seeds, *flags)))


def test_a_task_must_be_new_against_seeds_and_against_those_kept(seeds):
    said = ["Name the capital of this big country", "Sing a song about old ships.", "Sing a song about old red ships.",
            "Sing a song about old ships."]
    found = judge([Task(text, "", "x") for text in said], seeds)
    assert ["similar" in block["verdict"] for block in found] == [True, False, True, True]
    assert [block.get("similar_to") for block in found] == ["Name the capital of this country", None, said[1], said[1]]
    found = judge([Task(text, "", "x") for text in said], seeds, "--most_similar", "0.99")
    assert ["similar" in block["verdict"] for block in found] == [False, False, False, True]
    assert judge([Task("Draw a map of old ships.", "", "x")], seeds, "--banned", "")[0]["verdict"] == KEPT


# ---- a server that can misbehave -------------------------------------------------------------------------------------

def good_text(n=3):
    """A continuation with n new tasks."""
    tasks = [Task(text, "", f"Answer {i}") for i, text in enumerate(NEW[:n])]
    return encode_list(tasks, 4).removeprefix("###\n4. Instruction:")


class Stub(BaseHTTPRequestHandler):
    """Answers with what `plan` says, one entry a request, and then well. Keeps what it was asked."""
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.asked.append((self.path, body, self.headers.get("Authorization")))
        plan = server.plan.pop(0) if server.plan else "good"
        if plan == "slow":
            REALLY_SLEEP(1)
        if self.path.endswith("/chat/completions"):
            choice = {"message": {"content": good_text()}, "finish_reason": "stop"}
        else:
            choice = {"text": good_text(), "finish_reason": "stop"}
        status, data = 200, json.dumps({"choices": [choice]})
        if plan in REASONS:
            data = json.dumps({"choices": [{**choice, "finish_reason": plan}]})
        if plan == "dripping":
            for byte in b"HTTP/1.1 100 Continue\r\n\r\n" * 20:
                REALLY_SLEEP(0.005)
                self.wfile.write(bytes([byte]))
        if isinstance(plan, int):
            status, data = plan, json.dumps({"error": {"message": f"wrong key {KEY}\nsecond line"}})
        elif plan in BODIES:
            data = BODIES[plan]
        self.send_response(status)
        if status in (302, 307):
            self.send_header("Location", f"http://127.0.0.1:{server.other}/v1/completions")
        data = data.encode()
        self.send_header("Content-Length", str(len(data) + 100 * (plan == "cut")))
        self.end_headers()
        self.wfile.write(data[:40] if plan == "cut" else data)
        self.close_connection = True

    def log_message(self, *_):
        pass


REASONS = None, "stop", "eos", "stop_sequence", "content_filter"
BODIES = {"echo": json.dumps({"choices": [{"text": good_text().replace("Answer 0", f"{KEY} is it")}]}),
          "half a key": json.dumps({"choices": [{"text": 1, "said": "x" * 12 + KEY}]}),
          "surrogate": json.dumps({"choices": [{"text": good_text().replace("Answer 0", "\ud800")}]}),
          "html": "<html>busy</html>", "empty": "", "list": "[1]", "no choices": '{"choices": []}',
          "number": '{"choices": [{"text": 3}]}', "null": '{"choices": [{"text": null, "finish_reason": "stop"}]}'}


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(self_instruct.time, "sleep", lambda seconds: server.waits.append(seconds))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads, server.asked, server.plan, server.waits = True, [], [], []
    server.other = 9
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(stub, seeds, *flags, requests=1):
    """Runs the command against the stub -> (demonstrations, meta.json)."""
    out = seeds.parent / "new"
    self_instruct.main(["--seed_tasks", str(seeds), "--endpoint", f"http://127.0.0.1:{stub.server_port}/v1",
                        "--endpoint_model", "tiny", "--requests", str(requests), "--out", str(out), *flags])
    return read_demonstrations(out / "demonstrations.jsonl"), json.loads((out / "meta.json").read_text())


def test_what_the_server_is_asked_and_what_is_written(stub, seeds, capsys):
    rows, meta = ask(stub, seeds, "--seed", "7")
    path, body, authorization = stub.asked[0]
    assert (path, authorization) == ("/v1/completions", f"Bearer {KEY}")
    assert body["prompt"].count("###\n") == 4 and body["prompt"].endswith("###\n4. Instruction:")
    assert (body["model"], body["temperature"], body["top_p"]) == ("tiny", 1, 1)
    assert not any(stop in good_text() + " $20. 20. " for stop in body["stop"])
    assert [row.prompt for row in rows] == [alpaca.TEMPLATE.format(instruction=text) for text in NEW]
    assert [row.responses[0] for row in rows] == ["Answer 0", "Answer 1", "Answer 2"]
    assert meta["template"] == alpaca.TEMPLATE and meta["counts"]["kept"] == 3 == meta["counts"]["parsed"]
    assert sorted(path.name for path in (seeds.parent / "new").iterdir()) == [
        "blocks.jsonl", "demonstrations.jsonl", "meta.json", "requests.jsonl"]
    assert "kept" in capsys.readouterr().out
    assert all(KEY not in path.read_text() for path in (seeds.parent / "new").iterdir())


def test_the_key_is_optional_and_has_no_line_ends(stub, seeds, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " other \n")
    ask(stub, seeds)
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(stub, seeds)
    assert [authorization for _, _, authorization in stub.asked] == ["Bearer other", None]
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(UserError, match="OPENAI_API_KEY has characters"):
        ask(stub, seeds)


def test_a_chat_server_gets_the_same_text_as_a_message(stub, seeds):
    rows, _ = ask(stub, seeds)
    assert ask(stub, seeds, "--chat")[0] == rows
    (_, plain, _), (path, chat, _) = stub.asked
    assert path == "/v1/chat/completions" and chat["messages"] == [{"role": "user", "content": plain["prompt"]}]


@pytest.mark.parametrize("plan", [500, 429, "cut", "html", "list", "slow", "dripping"])
def test_what_a_retry_may_cure_is_tried_again_with_longer_waits(stub, seeds, plan):
    stub.plan = [plan, plan]
    rows, meta = ask(stub, seeds, "--timeout", "0.3" if plan in ("slow", "dripping") else "20")
    assert len(rows) == 3 and meta["counts"]["requests"] == 1, "a retry is not a request"
    assert len(stub.asked) == 3 and len({json.dumps(body) for _, body, _ in stub.asked}) == 1
    first, second = filter(None, stub.waits)
    assert first < second


@pytest.mark.parametrize("plan, calls, said", [
    ([401], 1, "HTTP 401: .*wrong key .the key."), ([400], 1, "HTTP 400"), ([404], 1, "HTTP 404 .--chat"),
    ([307], 1, "HTTP 307"), ([302], 1, "HTTP 302"),
    ([500] * 99, 5, "HTTP 500"), (["html"] * 99, 5, "JSON"), (["number"] * 99, 5, "no choices with a text"),
    (["half a key"] * 99, 5, "no choices with a text"),
])
def test_what_stays_wrong_is_one_line_without_the_key(stub, seeds, plan, calls, said):
    stub.plan = list(plan)
    with pytest.raises(UserError, match=said) as error:
        ask(stub, seeds)
    assert len(stub.asked) == calls and KEY[:6] not in str(error.value) and "\n" not in str(error.value)
    assert not (seeds.parent / "new" / "demonstrations.jsonl").exists()
    stub.plan.clear()
    rows, _ = ask(stub, seeds, "--resume")
    assert len(rows) == 3


@pytest.mark.parametrize("plan, kept", [*((reason, 3) for reason in REASONS), ("surrogate", 2), ("echo", 3)])
def test_only_length_is_cut_off_and_one_bad_task_is_one_rejected_task(stub, seeds, plan, kept):
    stub.plan = [plan]
    for resume in ([], ["--resume"]):
        rows, meta = ask(stub, seeds, *resume)
        assert len(rows) == kept == meta["counts"]["kept"] and meta["counts"]["blocks"] == 3
    assert all(KEY not in path.read_text() for path in (seeds.parent / "new").iterdir())
    assert len(stub.asked) == 1


def test_a_dead_server_is_an_error_and_an_answer_without_text_is_counted(stub, seeds):
    stub.plan = ["null"]
    _, meta = ask(stub, seeds, "--batch_size", "1", requests=2)
    assert (meta["counts"]["requests"], meta["counts"]["requests without an answer"]) == (2, 1)
    stub.server_close()
    with pytest.raises(UserError, match="refused"):
        ask(stub, seeds)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://localhost:8000", "http://u:p@host/v1", "file:///x/v1"])
def test_addresses_that_are_refused(seeds, url):
    with pytest.raises(UserError, match="--endpoint must be"):
        self_instruct.main(["--seed_tasks", str(seeds), "--endpoint", url, "--endpoint_model", "m", "--out", "x"])


def test_requests_that_are_done_are_not_asked_again_and_more_can_follow(stub, seeds):
    ask(stub, seeds, requests=3)
    rows, _ = ask(stub, seeds, "--resume", requests=3)
    assert len(stub.asked) == 3 and len(rows) == 3
    _, meta = ask(stub, seeds, "--resume", requests=5)
    assert len(stub.asked) == 5 and meta["counts"]["requests"] == 5 and meta["template"]
    rows, meta = ask(stub, seeds, "--resume", "--banned", "trees", "--endpoint_model", "other", requests=6)
    assert len(stub.asked) == 6 and len(rows) == 2 and meta["options"]["banned"] == "trees"
    written = [json.loads(line) for line in (seeds.parent / "new/requests.jsonl").read_text().splitlines()]
    assert [row["model"] for row in written] == ["tiny"] * 5 + ["other"]


# ---- a model of ours -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """The folder of a model that writes letters and would often write its EOS, with room for a prompt."""
    folder, model = tmp_path_factory.mktemp("model"), letters_gpt2()
    model.wpe = torch.nn.Embedding(900, 16, _weight=torch.randn(900, 16, generator=torch.Generator().manual_seed(1)))
    model.config.n_positions = 900
    save_pretrained(model, folder)
    save_tokenizer(TOKENIZER, folder)
    return folder


def flags_of(writer, seeds, out, *flags):
    return ["--seed_tasks", str(seeds), "--model", str(writer), "--out", str(out), "--max_tokens", "30", "--device",
            "cpu", "--batch_size", "3", *flags]


def written(out, *names):
    return [(out / name).read_bytes() for name in names or ("requests.jsonl", "blocks.jsonl")]


def run(flags):
    """A model that writes letters keeps to no form: nothing is kept, and the command says so."""
    with pytest.raises(UserError, match="nothing was kept"):
        self_instruct.main(flags)


def test_a_model_of_ours_writes_on_after_its_eos(writer, seeds, tmp_path):
    run(flags_of(writer, seeds, tmp_path / "a", "--requests", "5"))
    rows = [json.loads(line) for line in (tmp_path / "a/requests.jsonl").read_text().splitlines()]
    assert [row["request"] for row in rows] == list(range(5)) and len({row["text"] for row in rows}) == 5
    assert all(len(row["text"]) == 30 and set(row["text"]) <= set(LETTERS) for row in rows)     # a token is a letter


def test_seed_and_room(writer, seeds, tmp_path):
    for name, *flags in (("a",), ("b",), ("c", "--seed", "2"), ("d", "--max_tokens", "600")):
        run(flags_of(writer, seeds, tmp_path / name, "--requests", "2", *flags))
    a, b, c, d = (written(tmp_path / name, "requests.jsonl") for name in "abcd")
    assert a == b != c
    assert [json.loads(line)["text"] for line in d[0].splitlines()] == ["", ""], "no prompt has room beside 600 tokens"


def test_a_crash_within_a_batch_changes_nothing(writer, seeds, tmp_path, capsys):
    run(flags_of(writer, seeds, tmp_path / "whole", "--requests", "7"))
    expected = written(tmp_path / "whole")
    lines = expected[0].splitlines(keepends=True)
    for n in (0, 2, 4, 7):
        out = tmp_path / str(n)
        run(flags_of(writer, seeds, out, "--requests", "1"))
        left = b"".join(lines[:n]) + lines[n][:20] if n < 7 else expected[0]
        (out / "requests.jsonl").write_bytes(left)
        run(flags_of(writer, seeds, out, "--requests", "7", "--resume"))
        assert written(out) == expected


# ---- the embedded world ----------------------------------------------------------------------------------------------

def test_the_numbers_of_the_embedded_world(monkeypatch):
    """The mean and Student's t of three seeds, by hand, and what is known of a writer's stories."""
    spec = importlib.util.spec_from_file_location("tiny_self_instruct", ROOT / "data/tiny/self_instruct.py")
    world = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(world)
    assert world.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"          # 4.303 * 1 / sqrt(3)
    prompt = "Write a happy story about a nurse and a drum."
    rows = [{"prompt": prompt, "response": " A nurse found a drum by the river. They danced and sang all day long."},
            {"prompt": "Write a happy story about a nurse and a tuba.", "response": " A tuba."}]
    assert (found := world.quality(rows))["gold"] == 1 and (found["new"], found["valid"]) == (2, 0.5)
