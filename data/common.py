"""What the prepare.py scripts share: options, download, reading other people's files, splitting, writing a folder.

Nothing is repaired. A row that breaks its format is a UserError with file and line; in a JSON array it is file[3] for
the row with index 3. A row in the right format that cannot be used is dropped and counted.
"""

import gzip
import json
import random
import tempfile
import zlib
from itertools import chain
from pathlib import Path

from minirlhf.files import jsonl
from minirlhf.files.download import cache_folder, download, sha256_of
from minirlhf.files.tensors import strict_json
from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, shown
from minirlhf.running.runs import move_aside, write_json

LONGEST = 1_000_000             # characters or token ids in a field, two hundred times what GPT-2 can read


def arguments(description, out):
    """The options that every prepare.py has. A script may add its own."""
    parser = Parser(description=description)
    parser.add_argument("--source", type=Path, metavar="FILE", help="a file that you have, instead of the download")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"[{out}]")
    parser.add_argument("--heldout", type=float, default=0.05, help="share of the prompts for the test files [0.05]")
    parser.add_argument("--seed", type=int, default=1, help="decides which prompts are held out [1]")
    return parser


def fetch(url, name):
    """The path of a file in the cache, downloaded on first use."""
    file = cache_folder() / "data" / name
    if not file.exists():
        print(f"downloading {url} to {file}")
        download(url, file, hint=f"fetch it by other means and put it at {file}, or name it with --source")
    return file


# ---- reading ---------------------------------------------------------------------------------------------------------

def raw_lines(path):
    """Yields (where, line in bytes) of a file, which may be compressed with gzip."""
    number = 0
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            for number, line in enumerate(gzip.open(file) if compressed else file, start=1):
                yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        place = f"{path}:{number + 1}" if Path(path).is_file() else path
        raise UserError(f"{place}: {getattr(error, 'strerror', None) or error}") from None
    if number == 0:
        raise UserError(f"{path}: the file is empty")


def read_objects(path):
    """Yields (where, object) of a file that holds JSON lines, or one JSON array of objects."""
    lines = raw_lines(path)
    first = next(lines)
    if first[1].lstrip().startswith(b"["):
        yield from array_objects(path, first[1] + b"".join(line for _, line in lines))
    else:
        yield from ((where, jsonl.json_object(line, where)) for where, line in chain([first], lines))


def array_objects(path, data):
    try:
        values = strict_json(data)
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    except ValueError as error:
        raise UserError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{path}[{i}]: a row must be an object, not {shown(value)}")
        yield f"{path}[{i}]", value


def text_field(value, name, where):
    """A required string of a plausible length."""
    text = jsonl.text_field(value, name, where)
    if len(text) > LONGEST:
        raise UserError(f"{where}: {name} has {len(text):,} characters, more than {LONGEST:,}: no model can read that")
    return text


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


# ---- splitting and writing -------------------------------------------------------------------------------------------

def prompt_of(row):
    return row["prompt"]


def split(rows, heldout, seed, key=prompt_of):
    """(training rows, test rows): a random share of the keys is for testing, and no key is in both."""
    if not 0 < heldout < 1:
        raise UserError(f"--heldout must be between 0 and 1, not {heldout}")
    keys = sorted({key(row) for row in rows})
    if len(keys) < 2:
        raise UserError(f"{len(keys)} different prompts are too few to hold some of them out")
    test = set(random.Random(seed).sample(keys, min(max(1, round(heldout * len(keys))), len(keys) - 1)))
    return [row for row in rows if key(row) not in test], [row for row in rows if key(row) in test]


def write_folder(out, splits, meta, sources, counts):
    """Writes {name: (training rows, test rows)} as name.jsonl and name_test.jsonl, and meta.json beside them.

    The prompts of the first name become prompts.jsonl and prompts_test.jsonl. All files appear at once, and an existing
    folder is moved aside.
    """
    splits["prompts"] = [[{"prompt": prompt} for prompt in dict.fromkeys(map(prompt_of, rows))]
                         for rows in next(iter(splits.values()))]
    files = {f"{name}{part}.jsonl": rows for name, both in splits.items() for part, rows in zip(("", "_test"), both)}
    for name, rows in files.items():
        if not rows:
            raise UserError(f"{out}: no row is left for {name}; nothing was written")
    meta["counts"] = dict(counts)
    meta["sources"] = [{"file": "/".join(path.parts[-2:]), "sha256": sha256_of(path)} for path in map(Path, sources)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (new / name).write_bytes("".join(lines).encode())
        write_json(new / "meta.json", meta)
        move_aside(out)
        new.rename(out)
    for name, rows in files.items():
        print(f"{len(rows):>8,}  {out / name}")
    for what, n in counts.items():
        print(f"{n:>8,}  {what}")
