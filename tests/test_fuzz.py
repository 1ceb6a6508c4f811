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
import random
import resource
import signal
import sys
import time
from pathlib import Path

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
from minirlhf.reward import ScalarHeadModel
from minirlhf.running.runs import Run
from minirlhf.files.tensors import read_pickle, read_safetensors
from minirlhf.weights import from_pretrained, save_pretrained, scalar_from_pretrained
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
        lambda: values.update({rng.choice(["x", "", "\ud800", "\x00", name + " ", name.upper()]): rng.choice(ODD)}),
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
