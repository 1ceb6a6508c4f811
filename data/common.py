"""What the prepare.py scripts share: options, download, splitting, writing a folder.

Nothing is repaired. A row that breaks its format is a UserError with file and line. A row in the right format that
cannot be used is dropped and counted.
"""

import json
import random
import tempfile
from pathlib import Path

from minirlhf.files.download import cache_folder, download, sha256_of
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError
from minirlhf.running.runs import move_aside, write_json


def arguments(description, out, heldout=0.05):
    """The options that every prepare.py has. A script may add its own."""
    parser = Parser(description=description)
    parser.add_argument("--source", type=Path, metavar="FILE", help="a file that you have, instead of the download")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"[{out}]")
    parser.add_argument("--heldout", type=float, default=heldout,
                        help=f"share of the prompts for the test files [{heldout}]")
    parser.add_argument("--seed", type=int, default=1, help="decides which prompts are held out [1]")
    return parser


def fetch(url, name):
    """The path of a file in the cache, downloaded on first use."""
    file = cache_folder() / "data" / name
    if not file.exists():
        print(f"downloading {url} to {file}")
        download(url, file, hint=f"fetch it by other means and put it at {file}, or name it with --source")
    return file


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

    Unless there are prompts among them, those of the first name become prompts.jsonl and prompts_test.jsonl. All files
    appear at once, and an existing folder is moved aside.
    """
    splits.setdefault("prompts", [[{"prompt": prompt} for prompt in dict.fromkeys(map(prompt_of, rows))]
                                  for rows in next(iter(splits.values()))])
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
