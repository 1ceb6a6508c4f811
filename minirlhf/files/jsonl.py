"""JSONL, one JSON object a line, read strictly, and the checks of its fields.

Nothing is repaired or skipped. Every error is a UserError that begins with `where`, the file and line at fault.
What the fields mean is said in minirlhf/data.py.
"""

import gzip
import re
import zlib
from itertools import islice

from minirlhf.files.formats import BOM, advice, kind_of_file, kind_of_row
from minirlhf.files.errors import UserError, require, shown
from minirlhf.files.json_files import json_object, strict_json

LARGEST = 10**9                 # bytes of a file that is read at once
LONGEST = 1_000_000             # characters in a text, two hundred times what GPT-2 can read
# tiktoken 0.14 crashes on a million white-space characters in a row. (?<!\s) makes each run be looked at only once.
LONG_SPACE = re.compile(r"(?<!\s)\s{100000}")
HALF_PAIR = re.compile("[\ud800-\udfff]")       # JSON can hold these halves of a character as "\ud800", UTF-8 cannot


def read_jsonl(path):
    """Yields (where, object) for every line."""
    try:
        lines = open(path, "rb")
    except (OSError, ValueError) as error:                      # ValueError: a NUL character in the name
        missing = isinstance(error, FileNotFoundError) and not str(path).startswith("/")
        hint = ". Run the command in the repository, or give the path from the folder you are in" if missing else ""
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}{hint}") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and (kind := kind_of_file(line)):
                raise UserError(f"{path}:1: {advice(str(path), kind)}")
            yield f"{path}:{number}", json_object(line, f"{path}:{number}")


# ---- other people's files: JSONL or one JSON array, perhaps compressed -----------------------------------------------

def read_bytes(path):
    """The bytes of a file, which may be compressed with gzip, without the mark at the beginning of UTF-8."""
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            unpacked = gzip.open(file) if compressed else file
            data = b"".join(islice(iter(lambda: unpacked.read(2**20), b""), LARGEST // 2**20 + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    require(data, f"{path}: the file is empty")
    require(len(data) <= LARGEST, f"{path}: more than {LARGEST:,} bytes when unpacked. Split the file")
    return data.removeprefix(BOM)


def read_objects(path, data=None):
    """Yields (where, object) of a file that holds JSON lines, or one JSON array of objects."""
    data = data or read_bytes(path)
    if data.lstrip().startswith(b"["):
        yield from array_objects(path, data)
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", json_object(line, f"{path}:{number}")


def array_objects(path, data):
    try:
        values = strict_json(data)
    except ValueError as error:                                 # UnicodeDecodeError has no line, but a start
        line = getattr(error, "lineno", 1 + data.count(b"\n", 0, getattr(error, "start", 0)))
        raise UserError(f"{path}:{line}: not JSON in UTF-8 ({error})") from None
    for i, value in enumerate(values):
        require(isinstance(value, dict), f"{path}[{i}]: a row must be an object, not {shown(value)}")
        yield f"{path}[{i}]", value


def keep(rows, counts):
    """The rows without those that are a string: the reason why this row is dropped. All are counted."""
    kept = []
    for row in rows:
        counts["read"] += 1
        if isinstance(row, str):
            counts[f"dropped: {row}"] += 1
        else:
            kept.append(row)
    return kept


# ---- fields ----------------------------------------------------------------------------------------------------------

def how_to_convert(where, kind):
    """What an error about a line of a file adds where the line is of a format that can be converted."""
    path = where.rpartition(":")[0]
    return f": {advice(path, kind)}" if path and kind else ""


def field(value, name, where):
    if name not in value:
        hint = how_to_convert(where, kind_of_row(value))
        raise UserError(f"{where}: no \"{name}\" (found: {', '.join(value) or 'nothing'}){hint}")
    return value[name]


def text(value, name, where):
    """Checks that the value is a string that UTF-8 can hold and the tokenizer can split."""
    if not isinstance(value, str):
        hint = how_to_convert(where, "lists of messages" if is_dialogue(value) else None)
        raise UserError(f"{where}: {name} must be a string, not {shown(value)}{hint}")
    require(len(value) <= LONGEST,
            f"{where}: {name} has {len(value):,} characters, more than {LONGEST:,}: no model can read that")
    require(not LONG_SPACE.search(value),
            f"{where}: {name} has 100,000 white-space characters in a row, too many for the tokenizer")
    require(not HALF_PAIR.search(value),
            f"{where}: {name} holds half of a surrogate pair, which is not a character")
    return value


def text_field(value, name, where, allow_empty=True):
    string = text(field(value, name, where), name, where)
    require(string or allow_empty, f"{where}: the {name} is empty")
    return string


def index_field(value, name, n, where):
    """A whole number from 0 to n - 1."""
    index = field(value, name, where)
    require(type(index) is int and 0 <= index < n,
            f"{where}: {name} must be a number from 0 to {n - 1}, not {shown(index)}")
    return index


def responses_field(value, where):
    """"responses": at least two texts."""
    responses = field(value, "responses", where)
    require(isinstance(responses, list) and len(responses) >= 2, f"{where}: responses must be a list of at least two")
    return tuple(text(response, "response", where) for response in responses)


def ranks_field(value, K, where):
    """"best" or "ranks" of K responses -> their ranks. At least one of them is 1, the best."""
    if "best" in value:
        best = index_field(value, "best", K, where)
        return tuple(1 if k == best else 2 for k in range(K))
    ranks = field(value, "ranks", where)
    require(is_list_of(int, ranks, K) and min(ranks) == 1 and max(ranks) <= K,
            f"{where}: ranks must be a list of {K} whole numbers from 1 (the best) to {K}, not {shown(ranks)}")
    return tuple(ranks)


def finished_field(value, K, where):
    """"finished": whether each of K responses is complete. Without the field all of them are."""
    finished = value.get("finished", [True] * K)
    require(is_list_of(bool, finished, K), f"{where}: finished must be a list of {K} true or false")
    return tuple(finished)


def is_list_of(kind, value, length):
    return isinstance(value, list) and len(value) == length and all(type(item) is kind for item in value)


def is_dialogue(value):
    """Whether a value is a list of messages, {"role", "content"}, as chat models have them."""
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value))


def check_one_verdict(value, where):
    """A comparison says in one way only which response is better."""
    ways = [name for name in ("chosen", "ranks", "best") if name in value]
    require(len(ways) < 2,
            f"{where}: says more than once which response is better ({', '.join(ways)}); keep one of them")


# ---- where prompt and response meet ----------------------------------------------------------------------------------

def begins_with_prompt(response, prompt):
    """Whether a response repeats its prompt, apart from white space around it."""
    return bool(prompt.strip()) and response.lstrip().startswith(prompt.strip())


def glued(rows):
    """The rows that have neither white space nor punctuation between the prompt and one of its responses."""
    return [row for row in rows
            if not row.prompt[-1:].isspace() and any(response[:1].isalnum() for response in row.responses)]


def glue_warning(rows):
    """One sentence for the user if the space between prompts and responses was forgotten, otherwise None.

    Where some prompts do end in white space, a prompt may be cut off anywhere, even within a word: no warning.
    """
    found = glued(rows)
    if not found or any(row.prompt[-1:].isspace() for row in rows):
        return None
    return (f"{len(found):,} of {len(rows):,} rows have no space between prompt and response (the first: "
            f"{found[0].where}). "
            "Begin each response with a space, unless a model sampled it or the template wants none.")
