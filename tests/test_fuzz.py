"""Mutants of sound files and command lines, from seeds: each loads as an independent reader reads it, or is one UserError.

The mutations know the formats, so that most mutants get past the first checks: the shares that load and that fail at
each check are asserted. A traceback of another library, a second too many, or memory beyond a limit fails the test.
Plain `pytest` runs a share of the mutants, `pytest -m slow` all of them.
"""

import collections
import contextlib
import copy
import dataclasses
import json
import math
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf.running.config import parse
from minirlhf.files.errors import UserError
from minirlhf.data import Row, encode_rows, read_comparisons, read_demonstrations, read_prompts
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.health import judge_reward_model
from minirlhf.reward import ScalarHeadModel
from minirlhf.reward_functions import call_reward
from minirlhf.running.runs import Run, read_report
from minirlhf.files.tensors import read_pickle, read_safetensors
from minirlhf.tools import convert, page
from minirlhf.tools.evaluate.tables import FIGURES
from minirlhf.tools.feedback.labelstudio import import_file
from minirlhf.tools.feedback.stats import print_stats
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained
from test_page import Page
from test_runs import Config
from small_world import TOKENIZER, ppo_flags, script_flags, small_world

SECONDS, MEGABYTES = 5, 512             # what one mutant may take, and what all may add to the memory of the process


def amounts(quick, whole):
    return pytest.mark.parametrize("n", [quick, pytest.param(whole, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def limits():
    """Beyond MEGABYTES more than now, allocating raises MemoryError; a mutant that takes SECONDS raises TimeoutError."""
    def too_slow(*_):
        raise TimeoutError(f"a mutant took {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler, (soft, hard) = signal.signal(signal.SIGALRM, too_slow), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEGABYTES << 20), hard))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_limits_are_real(monkeypatch):
    with pytest.raises(MemoryError):
        bytes(2 * MEGABYTES << 20)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.01)
    with pytest.raises(TimeoutError):
        outcome(time.sleep, 1)


def outcome(load, *args):
    """(what load gives, "") or (None, the message of its UserError). Any other exception fails the test."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return load(*args), ""
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 4100
        return None, message


def check_shares(counts, kinds):
    """counts {kind: how often}: a third to a half load; no error is of an unknown kind; of many mutants each kind is met."""
    n = sum(counts.values())
    print(f"{n} mutants:", ", ".join(f"{kind} {count / n:.1%}" for kind, count in counts.most_common()))
    assert 0.3 < counts["loads"] / n < 0.5 and max(counts.values()) < 0.5 * n, counts
    assert set(counts) <= {"loads", *kinds} and (n < 1_000 or len(counts) == 1 + len(kinds)), counts


def put(file, data):
    """A new file each time: to cut an old one off and write it anew takes ext4 thirty times as long."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def kind_of(message, kinds):
    """Which of the known sentences the message holds; a message that is none of them is a kind of its own."""
    return "loads" if not message else next((kind for kind in kinds if kind in message), message)


# ---- mutations -------------------------------------------------------------------------------------------------------

ODD = [None, True, False, 0, -1, 1, 3, 1.0, 0.5, -0.0, float("nan"), float("inf"), 2**31, 2**53 + 1, 2**63 - 1, 2**63, -2**63,
       2**64, 10**400, 1e300, "", "a", "1", "\ud800", "\x00", "\u2028", "\x1b[31m", "x" * 3000, [], {}, [1], [[]], {"a": 1},
       [1] * 70, "@deep", "@deeper", "@digits"]
# What json.dumps would not write, put in the place of its quoted name.
MARKS = {"@deep": lambda rng: nest(rng.randrange(900, 1000)), "@deeper": lambda rng: nest(100_000),
         "@digits": lambda rng: "9" * 5000}


def nest(depth):
    return "[" * depth + "]" * depth


def to_json(rng, value):
    """A value as text: in ASCII or not, tight or wide."""
    return json.dumps(value, ensure_ascii=rng.random() < 0.8, separators=rng.choice([None, (",", ":"), (" , ", " : ")]))


def to_bytes(rng, text):
    """The marks become what they stand for; half of a surrogate pair becomes bytes that are no UTF-8."""
    for mark, replacement in MARKS.items():
        if mark in text:
            text = text.replace(f'"{mark}"', replacement(rng))
    return text.encode("utf-8", "surrogatepass")


def twice(rng, text):
    """One key of the outermost object again, with its own value, with an odd one, or the last of all."""
    value = json.loads(text)
    name = rng.choice(list(value) or ["a"])
    again = rng.choice([value.get(name), rng.choice(ODD[:20])])
    return f"{text.rstrip()[:-1]}{', ' if value else ''}{json.dumps(name)}: {json.dumps(again)}}}"


def change_text(rng, text):
    return rng.choice([
        lambda: twice(rng, text),
        lambda: "\ufeff" + text,
        lambda: text.replace("{", "{\x00", 1),
        lambda: text.replace(":", rng.choice([":NaN,\"n\":", ":Infinity,\"n\":", ":-1e999,\"n\":", ":01,\"n\":"]), 1),
        lambda: text.replace(rng.choice("{}[]:,\""), rng.choice(["", " ", "{", "}", "[", "]", ":", ",", "\"", "\\"]), 1),
        lambda: text.replace(",", ",,", 1),
        lambda: text + rng.choice(["}", "{}", "x", "\x00"]),
        lambda: text.replace("a", "\\u0000", 1),
        lambda: "[" + text + "]",
    ])()


def change_bytes(rng, data):
    """Bytes flipped, cut off, added, doubled, or taken from elsewhere in the file."""
    i, j = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    j = min(j, i + 40)
    at = rng.randrange(max(len(data), 1))
    odd = rng.choice([b"\0", b"\r\n", b"\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b" "])
    return rng.choice([
        lambda: data[:at] + bytes([(data[at:at + 1] or b"\0")[0] ^ 1 << rng.randrange(8)]) + data[at + 1:],
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1:],
        lambda: data[:i],
        lambda: data + rng.randbytes(rng.randrange(1, 9)),
        lambda: data[:i] + data[j:],
        lambda: data[:j] + data[i:],
        lambda: data[:at] + data[i:j] + data[at:],
        lambda: data[:at] + odd + data[at:],
    ])()


def change_value(rng, values):
    """Somewhere in a dict: an odd value, a key less, a key more."""
    name = rng.choice(list(values) or ["a"])
    rng.choice([
        lambda: values.update({name: rng.choice(ODD)}),
        lambda: values.update({name: [rng.choice(ODD)] * rng.randrange(5)}),
        lambda: values.pop(name, None),
        lambda: values.update({rng.choice(["x", "", "\ud800", "\x00", f"{name} ", str(name).upper()]): rng.choice(ODD)}),
    ])()


# ---- safetensors -----------------------------------------------------------------------------------------------------

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}
READ_ERRORS = ["not a header of JSON", "a header must be an object", "cut off, or not safetensors", "do not agree", "the one before it ends at",
               "belong to no tensor"]


def sound_tensors(rng):
    """A header and a body that agree."""
    header, end = {}, 0
    for i in range(rng.randrange(1, 6)):
        dtype, shape = rng.choice(["F32", "F32", "F16", "BF16", *WIDTHS]), [rng.randrange(5) for _ in range(rng.randrange(4))]
        start, end = end, end + torch.Size(shape).numel() * WIDTHS[dtype]
        header[f"h.{i}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, rng.randbytes(end)


def change_entry(rng, header):
    """Something about one tensor: its type, its shape, where it lies."""
    name, other = rng.choice(list(header)), rng.choice(list(header))
    entry, shape, (start, end) = header[name], list(header[name]["shape"]), header[name]["data_offsets"]
    k, step = rng.randrange(len(shape) + 1), rng.choice([-8, -1, 1, 4, 2**40, 2**63, -2**63, 2**64 - 1, 10**30])
    rng.choice([
        lambda: entry.update(shape=shape[:k] + [rng.choice([1, -1, 0, 7, 2**62, 2**64, 2.0, "2", None, True])] + shape[k:]),
        lambda: entry.update(shape=shape[:k] + [1] * rng.choice([1, 2, 63, 70]) + shape[k:]),
        lambda: entry.update(shape=shape[::-1]),
        lambda: entry.update(shape=[-n for n in shape]),
        lambda: entry.update(shape=rng.choice(ODD)),
        lambda: entry.update(dtype=rng.choice([*WIDTHS, "F8_E4M3", "f32", "I4", *ODD])),
        lambda: entry.update(data_offsets=[start + step, end + step]),
        lambda: entry.update(data_offsets=[start, end + step]),
        lambda: entry.update(data_offsets=[end, start]),
        lambda: entry.update(data_offsets=header[other]["data_offsets"]),
        lambda: entry.update(data_offsets=rng.choice(ODD)),
        lambda: header.update({name: copy.deepcopy(header[other]), other: copy.deepcopy(entry)}),
        lambda: header.update({rng.choice(["", "__metadata__", "\ud800", "\x00\n", "é"]): header.pop(name)}),
        lambda: change_value(rng, entry),
        lambda: header.pop(name),
    ])()


def harmless_header(rng, header):
    """The same tensors said in another way."""
    items = list(header.items())
    rng.shuffle(items)
    entries = {name: dict(reversed(entry.items())) for name, entry in items}
    return rng.choice([entries, {"__metadata__": {"format": "pt"}, **entries}, {**entries, "__metadata__": {"é": "\x00"}}])


def safetensors_mutant(rng):
    """(the bytes of a file, whether nothing is wrong with them)"""
    header, body = sound_tensors(rng)
    sound = rng.random() < 0.15
    how = rng.choice(["entry"] * 5 + ["text"] * 2 + ["bytes", "body", "length"]) if not sound else ""
    header = harmless_header(rng, header)
    if how == "entry":
        header.pop("__metadata__", None)
        change_entry(rng, header)
    text = to_json(rng, header) + " " * rng.randrange(9)
    text = to_bytes(rng, change_text(rng, text) if how == "text" else text)
    text = change_bytes(rng, text) if how == "bytes" else text
    body = change_bytes(rng, body) if how == "body" else body
    length = len(text)
    if how == "length":
        length = rng.choice([max(length + rng.randrange(-9, 9), 0), rng.randrange(2**rng.randrange(1, 64))])
    return length.to_bytes(8, "little") + text + body, sound


def by_hand(data):
    """{name: (dtype, shape, bytes)} of a file, with json and slices."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start].decode())
    return {name: (entry["dtype"], entry["shape"], data[start + entry["data_offsets"][0]:start + entry["data_offsets"][1]])
            for name, entry in entries.items() if name != "__metadata__"}


def by_package(data):
    """(the same by the package safetensors, "") or (None, why it does not read the file)"""
    try:
        return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(data)}, ""
    except safetensors.SafetensorError as error:
        return None, str(error)


def check_tensors(tensors, theirs):
    """Names, types, shapes and bytes are those that somebody else finds in the file."""
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype)
        if dtype is None:                   # no type that weights have, or no numbers: for the caller to skip or refuse
            assert tensor.is_meta and (theirs[name][0] not in ("F32", "F16", "BF16") or 0 in theirs[name][1])
        else:
            assert (dtype, list(tensor.shape), bytes(tensor.flatten().view(torch.uint8).tolist())) == theirs[name]


def is_stricter_here(data, message):
    """Why we refuse a file that the package reads: a name that is there twice, a type or a number of dimensions that
    PyTorch's own weights never have."""
    layouts = by_hand(data).values()
    return "is there twice" in message or any(dtype not in WIDTHS or len(shape) > 64 for dtype, shape, _ in layouts)


@amounts(1_000, 20_000)
def test_mutated_safetensors_load_as_the_package_reads_them_or_are_one_error(tmp_path, n):
    rng, counts, file = random.Random(1), collections.Counter(), tmp_path / "model.safetensors"
    for _ in range(n):
        data, sound = safetensors_mutant(rng)
        put(file, data)
        tensors, message = outcome(read_safetensors, file)
        theirs, refusal = by_package(data)
        if tensors is None:
            assert not sound and (theirs is None or is_stricter_here(data, message)), message
        else:
            check_tensors(tensors, by_hand(data))
            if theirs is not None:
                check_tensors(tensors, theirs)
            else:                           # for what we ignore: NaN or half of a surrogate pair beside the layout, say
                assert "invalid JSON in header" in refusal or "overflow computing buffer size" in refusal
        counts[kind_of(message, READ_ERRORS)] += 1
    check_shares(counts, READ_ERRORS)


# ---- JSONL -----------------------------------------------------------------------------------------------------------

LINE_ERRORS = ["this looks like", "not a line of JSON", "a line must be an object", "must be a string", "half of a surrogate pair", "white-space",
               "says more than once which response is better", "is empty", "no \"", "a list of at least two", "best must be",
               "ranks must be", "finished must be"]
READERS = {"prompts": read_prompts, "demonstrations": read_demonstrations, "comparisons": read_comparisons}
TEXTS = ["a", " b c", "é", "🙂", "\u0000", "\ufeff", "\r\n", "<|endoftext|>", " ", "\u2028", "x" * 300]


def sound_row(rng, schema):
    row, K = {"prompt": rng.choice(TEXTS) + "?"}, rng.randrange(2, 5)
    responses = [rng.choice(TEXTS) for _ in range(K)]
    if schema == "demonstrations":
        row |= {"response": responses[0]}
    elif schema == "comparisons":
        row |= rng.choice([{"chosen": responses[0], "rejected": responses[1]},
                           {"responses": responses, "best": rng.randrange(K)},
                           {"responses": responses, "ranks": [1] + [rng.randrange(1, K + 1) for _ in range(K - 1)]}])
        if rng.random() < 0.3:
            row["finished"] = [rng.random() < 0.5 for _ in range(len(row.get("responses", "12")))]
    return row


def change_row(rng, row):
    name = rng.choice(list(row))
    if "responses" in row and rng.random() < 0.15:
        row["chosen"] = rng.choice(TEXTS)                       # a second verdict
    elif isinstance(row[name], list) and rng.random() < 0.7:
        k, odd, values = rng.randrange(len(row[name])), rng.choice(ODD), row[name]
        row[name] = rng.choice([values[:k] + values[k + 1:], values + [values[k]], values[:k] + [odd] + values[k:],
                                values[:k] + [odd] + values[k + 1:]])
    elif isinstance(row[name], str) and rng.random() < 0.1:
        row[name] = ""
    elif isinstance(row[name], str) and rng.random() < 0.5:
        k = rng.randrange(len(row[name]) + 1)
        odd = rng.choice(["\ud83d", "\udc00", "\x00", "\u2028", " " * 100_000, "\n" * 99_999])
        row[name] = row[name][:k] + odd + row[name][k:]
    else:
        change_value(rng, row)


def harmless_row(rng, row):
    """What must not matter: the order of the fields, and others beside them."""
    items = [*row.items(), *rng.choice([[], [("x", "")], [("", None)], [("é", {"a": [1.5]})], [("order", [2, 1])]])]
    rng.shuffle(items)
    return dict(items)


def jsonl_mutant(rng, schema):
    """(the bytes of a file, whether nothing is wrong with them)"""
    rows = [harmless_row(rng, sound_row(rng, schema)) for _ in range(rng.randrange(1, 5))]
    end = rng.choice(["\n", "\r\n", " \n"])
    how = rng.choice(["", "row", "row", "row", "text", "bytes"])
    bad = rng.randrange(len(rows))
    if how == "row":
        rows[bad] = copy.deepcopy(rows[bad])
        change_row(rng, rows[bad])
    lines = [to_json(rng, row) for row in rows]
    if how == "text":
        lines[bad] = change_text(rng, lines[bad])
    data = to_bytes(rng, end.join(lines) + rng.choice([end, ""]))
    return (change_bytes(rng, data) if how == "bytes" else data), how == ""


def row_by_hand(where, line):
    """A line that was accepted, as json.loads reads it."""
    value = json.loads(line)
    assert len(json.loads(line, object_pairs_hook=list)) == len(value)             # no field is there twice
    if "chosen" in value or "rejected" in value:
        responses, ranks = [value["chosen"], value["rejected"]], [1, 2]
    else:
        responses = value.get("responses", [value.get("response")])
        ranks = value.get("ranks", [1])
        if "best" in value:
            ranks = [2] * len(responses)
            ranks[value["best"]] = 1
    return Row(where, value["prompt"], tuple(responses), tuple(ranks), tuple(value.get("finished", [True] * len(responses))))


@amounts(1_000, 20_000)
def test_mutated_jsonl_loads_as_json_reads_it_line_by_line_or_is_one_error(tmp_path, n):
    rng, counts, file = random.Random(2), collections.Counter(), tmp_path / "rows.jsonl"
    for _ in range(n):
        schema = rng.choice([*READERS, "comparisons"])
        data, sound = jsonl_mutant(rng, schema)
        put(file, data)
        rows, message = outcome(READERS[schema], file)
        if rows is None:
            assert not sound and message.startswith(f"{file}:"), message
        else:
            lines = data.removesuffix(b"\n").split(b"\n")
            check_rows(schema, rows, [row_by_hand(f"{file}:{i}", line) for i, line in enumerate(lines, start=1)])
        counts[kind_of(message, LINE_ERRORS)] += 1
    check_shares(counts, LINE_ERRORS)


def check_rows(schema, rows, theirs):
    """Every field that the schema has, and every text comes back from its tokens."""
    n_fields = {"prompts": 2, "demonstrations": 3, "comparisons": 5}[schema]
    assert [row[:n_fields] for row in rows] == [row[:n_fields] for row in theirs]
    for example in encode_rows(rows, TOKENIZER, positions=10**6):
        assert TOKENIZER.decode(example.prompt) == example.row.prompt
        for ids, text, finished in zip(example.responses, example.row.responses, example.row.finished):
            assert TOKENIZER.decode(ids[:-1] if finished else ids) == text


# ---- config.json, and the weights beside it --------------------------------------------------------------------------

CONFIG_ERRORS = ["not a file of JSON", "a file must be an object", "model_type is", "must be of type int", "must be of type float", "is implemented here",
                 "is not divisible by", "reward_std above 0", "but the weights are only", "by config.json it should be",
                 "is missing from the weights", "is not part of this model", "from 1 to vocab_size"]
SIZES = dict(vocab_size=11, n_positions=7, n_embd=8, n_layer=2, n_head=2)


@pytest.fixture
def model_folder(tmp_path):
    """A language model or a reward model, in two folders."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**SIZES))
    save_pretrained(model, tmp_path / "sft")
    save_pretrained(ScalarHeadModel(model), tmp_path / "rm")
    return tmp_path


def change_config(rng, values):
    name = rng.choice([*SIZES, *SIZES, "layer_norm_epsilon", "initializer_range", "model_type", "reward_mean", "reward_std",
                       *list(values)])
    values[name] = rng.choice([rng.choice(ODD), rng.choice([1, 2, 4, 7, 8, 11, 16, 1e-3, 2**28, 2**30]), 1e-5, 0.25, 2])


def config_mutant(rng, text):
    values = json.loads(text)
    if (how := rng.choice(["value"] * 6 + ["less", "text", "bytes"])) == "value":
        change_config(rng, values)
    elif how == "less":
        values.pop(rng.choice(list(values)))
    new = to_json(rng, values)
    data = to_bytes(rng, change_text(rng, new) if how == "text" else new)
    return change_bytes(rng, data) if how == "bytes" else data


def check_model(model, data, weights):
    """The sizes are those that json reads in config.json, or the defaults; the weights are those of the folder."""
    values = json.loads(data)
    for name, default in {**dataclasses.asdict(GPT2Config()), "n_tokens": model.config.vocab_size}.items():
        assert name == "eos_token_id" or getattr(model.config, name) == values.get(name, default)
    if isinstance(model, ScalarHeadModel):
        normalisation = values.get("reward_mean", 0), values.get("reward_std", 1)
        assert (model.reward_mean, model.reward_std) == tuple(map(float, normalisation))
    state = model.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


@amounts(200, 2_000)
def test_a_mutated_config_loads_as_json_reads_it_or_is_one_error(model_folder, n):
    rng, counts = random.Random(3), collections.Counter()
    for name, load in (("sft", from_pretrained), ("rm", scalar_from_pretrained)):
        folder, weights = model_folder / name, load(model_folder / name).state_dict()
        text = (folder / "config.json").read_text()
        for _ in range(n // 2):
            data = config_mutant(rng, text)
            put(folder / "config.json", data)
            model, message = outcome(load, folder)
            assert not message or str(folder) in message
            if model is not None:
                check_model(model, data, weights)
            counts[kind_of(message, CONFIG_ERRORS)] += 1
    check_shares(counts, CONFIG_ERRORS)


# ---- pytorch_model.bin -----------------------------------------------------------------------------------------------

BIN_ERRORS = ["not a dict of tensors", "can be code", "cut off or damaged", "not an ordinary tensor", "is compressed"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@amounts(100, 1_000)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_mutated_pytorch_file_is_read_or_is_one_error(tmp_path, zipped, n):
    rng, counts, file = random.Random(4), collections.Counter(), tmp_path / "pytorch_model.bin"
    tensors = {"h.0.weight": torch.arange(6.).view(2, 3), "h.1.weight": torch.ones(3).half()}
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    sound = file.read_bytes()
    for _ in range(n):
        put(file, change_bytes(rng, sound))
        read, message = outcome(read_pickle, file)
        assert not message or message.startswith(f"{file}: ")
        assert read is None or all(isinstance(tensor, torch.Tensor) for tensor in read.values())
        counts[kind_of(message, BIN_ERRORS)] += 1
    assert set(counts) <= {"loads", *BIN_ERRORS} and len(counts) > 2 and counts["loads"] < 0.7 * n, counts


# ---- state.pt --------------------------------------------------------------------------------------------------------

STATE_ERRORS = ["state.pt is damaged. Without", "state.pt is damaged: model", "state.pt is damaged: optimizer",
                "it is after step"]
TOTAL = 2


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-5, weight_decay=0.0)


def step_of(model, optimizer):
    model(torch.arange(6)[None]).square().mean().backward()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    optimizer.zero_grad()


def resumed(folder):
    """A run that is continued by one step: (its Run, the model, the optimizer)."""
    run, model = Run(Config(out=str(folder), resume=True)), GPT2(GPT2Config(**SIZES))
    optimizer = adam(model)
    run.steps(TOTAL, "test")
    run.restore(model=model, optimizer=optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    step_of(model, optimizer)
    return run, *before


def inner_dicts(value):
    """A dict and all dicts in it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [value] * isinstance(value, dict) + [found for part in parts for found in inner_dicts(part)]


@amounts(40, 300)
def test_a_mutated_checkpoint_is_what_torch_reads_or_is_one_error(tmp_path, n):
    rng, counts, model = random.Random(8), collections.Counter(), GPT2(GPT2Config(**SIZES))
    optimizer, run = adam(model), Run(Config(out=str(tmp_path / "run")))
    run.steps(TOTAL, "test")
    step_of(model, optimizer)
    run.log(0, {})
    run.checkpoint(1, model=model, optimizer=optimizer, beta=0.1)
    file = run.folder / "state.pt"
    sound, state = file.read_bytes(), torch.load(file, weights_only=True)
    for _ in range(n):
        value = copy.deepcopy(state)
        change_value(rng, rng.choice([value, *inner_dicts(value)]))
        torch.save(value, file)
        if rng.random() < 0.5:
            put(file, change_bytes(rng, sound))
        found, message = outcome(resumed, run.folder)
        if found is not None:
            theirs = torch.load(file, weights_only=True)
            assert found[0].state["step"] == theirs["step"] and found[0].seconds() >= theirs["seconds"]
            assert_equal(found[1], theirs["model"])
            for i in range(len(state["optimizer"]["state"])):           # others may lie beside them
                assert_equal(found[2][i], theirs["optimizer"]["state"][i])
        counts[kind_of(message, STATE_ERRORS)] += 1
    print(counts)
    assert set(counts) <= {"loads", *STATE_ERRORS} and len(counts) > 2 and 0 < counts["loads"] < 0.5 * n, counts


def assert_equal(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_equal(ours[name], theirs[name])
    else:
        assert torch.equal(ours, torch.as_tensor(theirs))       # a number of steps may be one of Python's


# ---- report.json -----------------------------------------------------------------------------------------------------

REPORT = {"seed": 1, "seconds": {"sft": 2.5, "rm": None, "ppo": 3}, "win_rate": 0.7, "win_rate_ci": [0.6, 0.8],
          "kl": 1.5, "rm_accuracy_heldout": 0.75, "rm_accuracy_heldout_ci": [0.7, 0.8], "longer_is_preferred": 0.5,
          "n_prompts": 10, "sft": {"gold": 0.25, "ci": {"gold": [0.1, 0.5]}},
          "ppo": {"gold": 0.5, "kl": None, "ci": {"gold": [0.4, 0.6]}}}
REPORT_ERRORS = ["is no number", "not a file of JSON", "must be an object"]


@amounts(60, 300)
def test_a_mutated_report_is_shown_as_json_reads_it_or_is_one_error(tmp_path, n):
    rng, counts = random.Random(9), collections.Counter()
    (tmp_path / "run.json").write_text('{"config": {"data": "x"}}')
    (tmp_path / "metrics.jsonl").touch()
    for _ in range(n):
        value, how = copy.deepcopy(REPORT), rng.choice(["value", "value", "value", "text", "bytes"])
        change_value(rng, rng.choice(inner_dicts(value))) if how == "value" else None
        text = change_text(rng, to_json(rng, value)) if how == "text" else to_json(rng, value)
        data = to_bytes(rng, text)
        put(tmp_path / "report.json", change_bytes(rng, data) if how == "bytes" else data)
        live, message = outcome(page.write_runs, tmp_path / "page.html", [str(tmp_path)], False)
        counts[kind_of(message, REPORT_ERRORS)] += 1
        if not message:
            check_report(json.loads((tmp_path / "report.json").read_bytes()), judge_reward_model(read_report(tmp_path)),
                         Page(tmp_path / "page.html").data)
    print(counts)
    assert set(counts) <= {"loads", *REPORT_ERRORS} and 0.2 * n < counts["loads"] < 0.8 * n, counts


def check_report(report, verdict, shown):
    """The verdict follows from the numbers, and each number of the report is on the page."""
    low, longer = (report.get("rm_accuracy_heldout_ci") or [1])[0], report.get("longer_is_preferred")
    assert verdict[0] == (low > 0.5 and low > max(0.5 if longer is None else longer, 1 - (longer or 0.5)))
    rows = [row for table in shown["tables"] for row in table["rows"]]
    for name, value in report.items():
        if type(value) in (int, float):
            cells = [cell for first, *others in rows if first == FIGURES.get(name, name) for cell in others]
            assert any(math.isclose(float(cell.split()[0]), value, rel_tol=0.01, abs_tol=1e-3) or value != value
                       for cell in cells if cell != "–"), name


# ---- Label Studio ----------------------------------------------------------------------------------------------------

STUDIO_ERRORS = [" that is a ", "completed_by is", "no usable annotation", "not JSON in UTF-8",
                 "not a list of annotated", "selected is", "is not an order", "ranks the answers", "the order of the buckets", "finished must",
                 "new row: ", "choices are"]


def sound_export(rng):
    tasks = []
    for i in range(rng.randrange(1, 4)):
        order = rng.sample(range(2), 2)
        ours = {"order": order, "finished": [True, False], "extra": {"item": "x", "models": ["a", "b"]}}
        annotations = [{"completed_by": rng.choice([n, {"id": n}, {"id": n, "email": f"{n}@x"}]),
                        "was_cancelled": rng.random() < 0.1, "updated_at": f"2026-01-0{n + 1}", "lead_time": 1.5,
                        "result": [{"type": "pairwise", "value": {"selected": rng.choice(["left", "right"])}}]}
                       for n in range(3)]
        data = {"prompt": f"P{i}", "answer1": " l", "answer2": " r", "minirlhf": ours}
        tasks.append({"id": i, "data": data, "annotations": annotations})
    return tasks


def votes_by_hand(tasks):
    """{(prompt, texts, who, or a number if unknown): the better text} of an export that was accepted."""
    votes, n = {}, 0
    for task in tasks:
        data = task["data"]
        for given in sorted(task["annotations"], key=lambda x: str(x.get("updated_at") or x.get("created_at") or "")):
            by, n = given.get("completed_by"), n + 1
            by = (by.get("email") or by.get("id")) if isinstance(by, dict) else by
            who = n if by is None or not str(by).strip() else str(by).strip()
            found = [] if given.get("was_cancelled") else [x for x in given["result"] if x["type"] == "pairwise"]
            if found:
                texts = data["answer1"], data["answer2"]
                votes[data["prompt"], frozenset(texts), who] = texts[found[0]["value"]["selected"] == "right"]
    return votes


@amounts(100, 300)
def test_a_mutated_export_of_label_studio_is_imported_as_json_reads_it_or_is_one_error(tmp_path, n):
    rng, counts, file, out = random.Random(10), collections.Counter(), tmp_path / "export.json", tmp_path / "rows.jsonl"
    for _ in range(n):
        tasks, how = sound_export(rng), rng.choice(["value"] * 4 + ["bytes"])
        change_value(rng, rng.choice(inner_dicts(tasks))) if how == "value" else None
        data = to_bytes(rng, to_json(rng, tasks))
        put(file, change_bytes(rng, data) if how == "bytes" else data)
        out.unlink(missing_ok=True)
        _, message = outcome(import_file, file, out)
        assert not message or message.startswith(f"{file}: ")
        counts[kind_of(message, STUDIO_ERRORS)] += 1
        if not message:
            rows = [json.loads(line) for line in out.read_bytes().splitlines()]
            theirs = votes_by_hand(json.loads(file.read_bytes()))
            best = sorted((row["prompt"], row["responses"][row["ranks"].index(1)]) for row in rows)
            assert best == sorted((prompt, text) for (prompt, *_), text in theirs.items())
            assert {row["annotator"] for row in rows} - {""} == {who for *_, who in theirs if type(who) is str}
            outcome(print_stats, out)
    print(counts)
    assert set(counts) <= {"loads", *STUDIO_ERRORS} and 0.3 * n < counts["loads"] < 0.8 * n, counts


# ---- TRL -------------------------------------------------------------------------------------------------------------

TRL_ERRORS = ['no "content"', "but the first row", "must be a string", "surrogate", "white-space", "fit 0 of the",
              "fit 2 of the", "not a line of JSON", "not JSON in UTF-8", "must be an object", "nothing is written",
              "finished must", "is empty"]


def sound_trl(rng):
    """Rows of one of TRL's forms, and what they become."""
    form, rows, expected = rng.choice(["text", "messages", "implicit", "completion"]), [], []
    for i in range(rng.randrange(2, 5)):
        ask, good, bad = ([{"role": role, "content": f"{text}{i}?"}] for role, text in (
            ("user", "Q"), ("assistant", "good "), ("assistant", "bad ")))
        rows.append({"text": {"prompt": f"Q{i}?", "chosen": f" good {i}?", "rejected": f" bad {i}?"},
                     "messages": {"prompt": ask, "chosen": good, "rejected": bad},
                     "implicit": {"chosen": ask + good, "rejected": ask + bad},
                     "completion": {"prompt": ask, "completion": good}}[form])
        sides = {"chosen": f" good {i}?", "rejected": f" bad {i}?"}
        sides = {"response": sides["chosen"]} if form == "completion" else sides
        expected.append({"prompt": f"Q{i}?" if form == "text" else f"\n\nHuman: Q{i}?\n\nAssistant:", **sides})
    return rows, expected


@amounts(100, 300)
def test_a_mutated_file_of_trls_becomes_the_same_rows_but_for_the_mutated_one_or_is_one_error(tmp_path, n):
    rng, counts, file = random.Random(11), collections.Counter(), tmp_path / "rows.jsonl"
    for i in range(n):
        (rows, expected), how = sound_trl(rng), rng.choice(["value"] * 4 + ["text", "bytes"])
        bad, out = rng.randrange(len(rows)), tmp_path / f"{i}/rows.jsonl"
        change_value(rng, rng.choice(inner_dicts(rows[bad]))) if how == "value" else None
        lines = [to_json(rng, row) for row in rows]
        lines[bad] = change_text(rng, lines[bad]) if how == "text" else lines[bad]
        lines = [to_bytes(rng, line) for line in lines]
        lines[bad] = change_bytes(rng, lines[bad]) if how == "bytes" else lines[bad]
        put(file, b"\n".join(lines))
        _, message = outcome(convert.main, [str(file), "--out", str(out)])
        assert not message or message.startswith(f"{file}")
        counts[kind_of(message, TRL_ERRORS)] += 1
        if not message:
            kept = [json.loads(line) for line in out.read_bytes().splitlines()]
            check_trl(kept, expected, bad, json.loads(lines[bad] or b"{}"))
    print(counts)
    assert set(counts) <= {"loads", *TRL_ERRORS} and 0.2 * n < counts["loads"] < 0.8 * n, counts


def check_trl(rows, expected, bad, source):
    """Every sound row is there, and the mutated one is not or has its own texts under the same names."""
    sound, names = expected[:bad] + expected[bad + 1:], {"response": "completion"}
    assert [row for row in rows if row in sound] == sound and len(rows) <= len(expected)
    for row in rows:
        for name in row if row not in sound else ():
            given = source.get(names.get(name, name), source.get("chosen"))
            texts = [given] if isinstance(given, str) else [part["content"] for part in given]
            assert any(text.strip() in row[name] for text in texts) or row[name].strip() in map(str.strip, texts)


# ---- what a reward function returns ----------------------------------------------------------------------------------

@amounts(150, 300)
def test_a_mutated_result_of_a_reward_function_gives_its_own_numbers_or_is_one_error(n):
    rng, counts = random.Random(12), collections.Counter()
    odd = [*ODD, 10**5000, object(), 1j, b"1", {1: 2}, float, torch.tensor(1.0), torch.ones(2), np.float64(0.5), np.nan,
           (), range(2)]
    for _ in range(n):
        result = [rng.choice([rng.random(), rng.randrange(9)]) for _ in range(3)]
        for _ in range(rng.randrange(3)):
            k = rng.randrange(len(result) + 1)
            result[k:k + rng.randrange(2)] = [rng.choice(odd)] * rng.randrange(2)
        wrap = rng.choice([list, list, tuple, torch.tensor, np.array, iter, set, lambda values: (values or [None])[0]])
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            result = wrap(result)
        scores, message = outcome(call_reward, lambda prompts, responses: result, ["p", "q", "r"], ["a", "b", "c"])
        if not message:
            plain = [float(score) for score in (result.tolist() if hasattr(result, "tolist") else result)]
            assert scores.dtype == torch.float32 and torch.equal(scores, torch.tensor(plain, dtype=torch.float32))
        counts[kind_of(message, ["must return a list of 3 numbers", "for the response"])] += 1
    assert len(counts) == 3 and min(counts.values()) > 0.05 * n, counts


# ---- command lines -------------------------------------------------------------------------------------------------

SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
ODD_WORDS = ["nan", "inf", "-inf", "1e400", "-1", "0", "1", "3", "0.5", "1_0", "\u0663", "0x10", "9" * 20, "9" * 5000, "", " ",
             "-", "--", "true", "None", "\n", "\udcff", "\x1b[31m", "\x00", "%s", "{}", "@file", "x" * 5000, "a:b.py", ".py:f",
             "cpu", "float32"]
ARGV_ERRORS = ["unrecognized arguments", "expected one argument", "invalid int value", "invalid float value",
               "must be a number below", "must be at least", " wants ", "ignored explicit argument",
               "argument --preset: invalid choice"]


def argv_mutant(rng, config_class):
    """A command line: options of the script with values of their kind or odd ones, now and then no option at all."""
    argv = []
    for field in rng.sample(dataclasses.fields(config_class), rng.randrange(1, 5)):
        good = {int: str(rng.randrange(1, 99)), float: str(rng.random()), str: "x"}.get(field.type)
        value = rng.choice(ODD_WORDS) if rng.random() < 0.25 else good
        name = rng.choice([field.name] * 30 + ["no-" + field.name, field.name[:-1], field.name.upper()])
        if field.type is bool:
            argv += rng.choice([[f"--{name}"], [f"--no-{field.name}"], [f"--{name}"], [f"--{name}={rng.choice(ODD_WORDS)}"]])
        else:
            argv += rng.choice([[f"--{name}", str(value)], [f"--{name}={value}"]])
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(ODD_WORDS))
    return argv + (["--preset", rng.choice(["gpt2", "gpt3"])] if rng.random() < 0.1 else [])


def check_options(config, argv, script):
    """Each option has the value that the words say: the last of that name, else the preset's, else the default."""
    words = " ".join(argv)
    preset = script.PRESETS["gpt2"] if "--preset gpt2" in words else {}
    said, words = {}, iter([part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])])
    for word in words:
        name = word.removeprefix("--").removeprefix("no-")
        kind = {field.name: field.type for field in dataclasses.fields(config)}.get(name)
        if kind is not None:
            said[name] = not word.startswith("--no-") if kind is bool else kind(next(words))
    assert dataclasses.asdict(config) == dataclasses.asdict(script.Config()) | preset | said


@amounts(500, 1_500)
def test_a_mutated_command_line_says_what_its_words_say_or_is_one_error(n):
    rng, counts = random.Random(6), collections.Counter()
    for _ in range(n):
        script = rng.choice(list(SCRIPTS.values()))
        argv = argv_mutant(rng, script.Config)
        config, message = outcome(parse, script.Config, "x", script.PRESETS, argv)
        if config is not None:
            check_options(config, argv, script)
        counts[kind_of(message, ARGV_ERRORS)] += 1
    check_shares(counts, ARGV_ERRORS)


class Started(Exception):
    """All input was found good and the run would begin."""


@amounts(50, 500)
def test_an_odd_option_reaches_the_start_of_the_script_or_is_one_error(tmp_path, monkeypatch, n):
    def start(*_):
        raise Started

    rng, counts, world = random.Random(7), collections.Counter(), small_world(tmp_path)
    monkeypatch.setattr(Run, "__init__", start)
    for i in range(n):
        name, script = rng.choice(list(SCRIPTS.items()))
        field = rng.choice(dataclasses.fields(script.Config))
        data = {"sft": "demonstrations", "rm": "comparisons"}.get(name)
        flags = ppo_flags(world) if data is None else script_flags(world, name + "_run", "--data", f"{world}/{data}.jsonl")
        odd = [f"--{field.name}"] if field.type is bool else [f"--{field.name}={rng.choice(ODD_WORDS)}"]
        with contextlib.suppress(Started):
            _, message = outcome(script.main, [*flags, *odd])
            assert message, f"{odd}: main() came back"
            counts["errors"] += 1
    assert 0.3 * n < counts["errors"] < 0.8 * n, counts
