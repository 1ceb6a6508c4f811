"""The files that people's votes go into, and why none of them is lost.

    my_comparisons.jsonl         a row per vote: comparisons, as minirlhf.data and train_rm.py read them
    my_comparisons.skips.jsonl   a row per skip; apart, because a skip says nothing about the answers
    my_comparisons.items.jsonl   what was sampled for people to see, whether or not anyone has seen it yet

A vote has, beside prompt, responses, ranks and finished: "item" (a hash of prompt and responses), "models" (which model
wrote each response), "annotator", "order" (responses[order[0]] was shown first), "seconds" and "time" (UTC).
There is at most one vote per item and annotator: a vote that arrives twice is the same vote.

A row is appended in one write and on the disk (fsync) before append() returns. Should the machine die inside that
write, the half line at the end was never confirmed to anyone; it is cut off at the next start. Undo rewrites the file
under another name and renames it, so at every moment the file is either the old or the new one, whole.
"""

import hashlib
import json
import os
from pathlib import Path

from minirlhf.running.errors import UserError
from minirlhf.data import comparison, read_jsonl

try:
    import fcntl
except ImportError:                 # Windows: two servers on one file are then not noticed
    fcntl = None


def to_line(row):
    """A dict -> its line of JSON, as bytes with the line end."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def comparison_row(prompt, responses, ranks, finished=None, where="new row", **extra):
    """A checked row of a comparisons file: ranks 1 is best, equal is a tie; finished None: all ended by themselves.

    Everything that writes comparisons goes through here, people's votes, imported and simulated ones. UserError, which
    begins with `where`, says what is wrong.
    """
    row = {"prompt": prompt, "responses": list(responses), "ranks": list(ranks)}
    if finished is not None:
        row["finished"] = list(finished)
    row |= extra
    comparison(row, where)
    return row


def item_id(prompt, responses):
    """The name of one thing to vote on: the same text has the same name in every file and run."""
    return hashlib.sha256(json.dumps([prompt, list(responses)]).encode()).hexdigest()[:16]


def sidecar(path, name):
    """my_comparisons.jsonl, "skips" -> my_comparisons.skips.jsonl."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{name}.jsonl")


class Journal:
    """A JSONL file that grows by whole rows. Not locked: the caller lets one thread in at a time."""

    def __init__(self, path):
        self.path = Path(path)
        self.rows = recover(self.path)

    def append(self, row):
        """Returns once the row is on the disk. OSError (a full disk, say) leaves the file as it was."""
        line, new = to_line(row), not self.path.exists()
        with open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) < len(line):
                    raise OSError(f"{self.path}: the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if new:
            sync_folder(self.path.parent)
        self.rows.append(row)

    def remove(self, row):
        """Takes the last such row out: the whole file under another name, then the rename."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        last = max(i for i, line in enumerate(lines) if json.loads(line) == row)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.writelines(lines[:last] + lines[last + 1:])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)
        self.rows.remove(row)


def lock(path):
    """Keeps a second server off these files until the file that is returned is closed, by a kill -9 at the latest.

    To be held before a journal is opened: recover() would take another server's half-written line for a broken one.
    path must not be a file that remove() replaces.
    """
    try:
        file = open(path, "ab")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise UserError(f"{path}: another feedback server is writing to these files") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def recover(path):
    """The rows of a file, [] if there is none. A last line that was cut off in the middle of a write is removed."""
    if not path.exists():
        return []
    data, rows = path.read_bytes(), []
    try:
        for _, row in read_jsonl(path):
            rows.append(row)
    except UserError:
        # Only an unterminated last line that begins as ours do can be ours; any other is for a person to look at.
        end = data.rfind(b"\n") + 1
        if len(rows) != data.count(b"\n") or not b'{"'.startswith(data[end:end + 2]) or end == len(data):
            raise
        os.truncate(path, end)
        print(f"{path}: cut off {len(data) - end} bytes of a last line that was never written to its end")
        return rows
    if data and not data.endswith(b"\n"):           # whole, but an editor left out the line end
        with open(path, "ab") as file:
            file.write(b"\n")
    return rows


def sync_folder(folder):
    """A new or renamed file is safe only when its folder is on the disk too."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
