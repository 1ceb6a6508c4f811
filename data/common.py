"""What the data sets' prepare.py share: reading other people's files strictly, splitting by prompt, writing a folder.

Nothing is repaired. A row that is not what its format promises is a UserError with file and line (file[3] is the row of
index 3 of a JSON array); a row that is sound but cannot be used is dropped by the script and counted.
"""

import gzip
import json
import random
import tempfile
import zlib
from pathlib import Path

from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, shown
from minirlhf.data import field, json_object, text
from minirlhf.files.download import cache_folder, download, sha256_of
from minirlhf.running.runs import move_aside, write_json
from minirlhf.files.tensors import strict_json

LONGEST = 1_000_000             # characters of a field: two hundred times what GPT-2 can read


def arguments(description, out):
    """The options that every prepare.py has; a script adds its own."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--source", type=Path, metavar="FILE", help="a file you have; otherwise it is downloaded")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"[{out}]")
    parser.add_argument("--heldout", type=float, default=0.05, help="share of the prompts for the test files [0.05]")
    parser.add_argument("--seed", type=int, default=1, help="which prompts are held out [1]")
    return parser


def fetch(url, name):
    """The file of this name in the cache; downloaded if it is not there. UserError says which file to place where."""
    file = cache_folder() / "data" / name
    if not file.exists():
        print(f"downloading {url} to {file}")
        download(url, file, hint=f"fetch it by other means and put it at {file}, or name it with --source")
    return file


# ---- reading ---------------------------------------------------------------------------------------------------------

def raw_lines(path):
    """Yields (where, line in bytes) of a file, packed with gzip or not."""
    number = 0
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            for number, line in enumerate(gzip.open(plain) if packed else plain, start=1):
                yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        place = f"{path}:{number + 1}" if Path(path).is_file() else path
        raise UserError(f"{place}: {getattr(error, 'strerror', None) or error}") from None
    if number == 0:
        raise UserError(f"{path}: the file is empty")


def read_objects(path):
    """Yields (where, object) of a file that holds JSON lines, or one JSON array of objects."""
    lines = list(raw_lines(path))
    if not lines[0][1].lstrip().startswith(b"["):
        yield from ((where, json_object(line, where)) for where, line in lines)
        return
    whole = b"".join(line for _, line in lines)
    try:
        values = strict_json(whole)
    except UnicodeDecodeError as error:
        line = 1 + whole.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    except ValueError as error:
        raise UserError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{path}[{i}]: a row must be an object, not {shown(value)}")
        yield f"{path}[{i}]", value


def text_field(value, name, where):
    """A string of a sane length that must be there."""
    found = text(field(value, name, where), name, where)
    if len(found) > LONGEST:
        raise UserError(f"{where}: {name} has {len(found):,} characters, more than {LONGEST:,}: no model reads that")
    return found


# ---- splitting and writing -------------------------------------------------------------------------------------------

def split(rows, heldout, seed, key):
    """(training rows, test rows): a share of the keys is drawn from the seed, and no key is in both."""
    if not 0 < heldout < 1:
        raise UserError(f"--heldout must be between 0 and 1, not {heldout}")
    keys = sorted({key(row) for row in rows})
    if len(keys) < 2:
        raise UserError(f"{len(keys)} different prompts are too few to hold some of them out")
    test = set(random.Random(seed).sample(keys, min(max(1, round(heldout * len(keys))), len(keys) - 1)))
    return [row for row in rows if key(row) not in test], [row for row in rows if key(row) in test]


def prompts_of(rows):
    """Each prompt once, in the order of its first row."""
    return [{"prompt": prompt} for prompt in dict.fromkeys(row["prompt"] for row in rows)]


def write_folder(out, files, meta, sources, counts):
    """{name: rows} -> name.jsonl each, and meta.json. The folder appears whole; an older one moves aside."""
    for name, rows in files.items():
        if not rows:
            raise UserError(f"{out}: no row is left for {name}.jsonl; nothing was written")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (new / f"{name}.jsonl").write_bytes("".join(lines).encode())
        sources = [{"file": "/".join(path.parts[-2:]), "sha256": sha256_of(path)} for path in map(Path, sources)]
        meta |= {"counts": dict(counts), "sources": sources}
        write_json(new / "meta.json", meta)
        move_aside(out)
        new.rename(out)
    for name, rows in files.items():
        print(f"{len(rows):>8,}  {out / name}.jsonl")
    for what, n in counts.items():
        print(f"{n:>8,}  {what}")
