"""The files that votes are written to, and why no vote is lost.

    my_comparisons.jsonl         a row per vote: comparisons, as minirlhf.data and train_rm.py read them
    my_comparisons.skips.jsonl   a row per skip, in a file of its own because a skip says nothing about the answers
    my_comparisons.items.jsonl   everything that was sampled, whether or not anyone has seen it yet
    my_comparisons.token         a secret from which the address of the page is made, readable by you alone

A vote has, beside prompt, responses, ranks and finished: "item" (a hash of prompt and responses), "models" (which model
wrote each response), "order" (responses[order[0]] was shown first), "annotator", "seconds" and "time" (UTC).
There is at most one vote per item and annotator. What an annotator remarked on an item is in the vote, or in the skip,
as "flags" (some of FLAGS) and "note".

append() writes a row in one go and returns when it is on the disk (fsync). If the machine stops during that write,
the file ends in half a line. Nobody was told that this vote is saved, and the next start cuts it off. Undo and revising
write a new file and rename it, so the file is at every moment either the old one or the new one, complete.
"""

import hashlib
import json
import os
from pathlib import Path

from minirlhf.data import comparison
from minirlhf.files.download import fcntl
from minirlhf.files.jsonl import json_object
from minirlhf.files.json_files import write_whole
from minirlhf.files.errors import UserError

FLAGS = ("all bad", "prompt broken")        # what an annotator can say about an item, beside a note of their own


def to_line(row):
    """A dict -> its line of JSON, as bytes. Half a surrogate pair, which UTF-8 cannot hold, is escaped."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace") + b"\n"


def comparison_row(prompt, responses, ranks, finished=None, /, **extra):
    """A row of a comparisons file, checked. Rank 1 is best, equal ranks are a tie; finished None means all of them.

    Votes, imported rows and simulated rows are all made here.
    """
    finished = {} if finished is None else {"finished": finished}
    row = {"prompt": prompt, "responses": list(responses), "ranks": list(ranks), **finished, **extra}
    comparison(row, "new row")
    return row


def item_id(prompt, responses):
    """The name of an item. The same texts get the same name in every file and run."""
    return hashlib.sha256(json.dumps([prompt, list(responses)]).encode()).hexdigest()[:16]


def in_file_order(shown, order):
    """Values in the order shown -> in the order of the file, where shown[p] belongs to responses[order[p]]."""
    return [shown[order.index(k)] for k in range(len(order))]


def sidecar(path, name):
    """my_comparisons.jsonl, "skips" -> my_comparisons.skips.jsonl."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{name}.jsonl")


class Journal:
    """A JSONL file that grows row by row. It has no lock: the caller lets one thread in at a time."""

    def __init__(self, path):
        self.path = Path(path)
        self.rows = recover(self.path)

    def append(self, row):
        """Returns once the row is on the disk. After an OSError (say, the disk is full) the file is as before."""
        line = to_line(row)
        with open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) < len(line):
                    raise OSError(f"{self.path}: the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        sync_folder(self.path.parent)
        self.rows.append(row)

    def remove(self, row, *instead):
        """Removes a row, which must be one of self.rows, by way of a new file that replaces the old one. The rows in
        `instead` are added at its end in the same step."""
        rows = [other for other in self.rows if other is not row] + list(instead)
        write_whole(self.path, map(to_line, rows))
        sync_folder(self.path.parent)
        self.rows = rows


def lock(out):
    """Keeps a second server away from the files of `out` while the returned file is open. A kill -9 closes it too.

    Take the lock before you open a journal: recover() would take another server's half-written line for a broken one.
    What is locked is the items file, because remove() never replaces it.
    """
    path = sidecar(out, "items")
    file = open(path, "ab")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another feedback server is writing to these files; stop it, or give --out another "
                        "name") from None
    return file


def recover(path):
    """The rows of a file, [] if there is none. If a crash left half a line at the end, that is removed."""
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    rows = [json_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not rest:
        return rows
    try:
        rows.append(json_object(rest, f"{path}:{len(lines) + 1}"))
    except UserError:
        if not b'{"'.startswith(rest[:2]):          # not the beginning of a line of ours: leave the file as it is
            raise
        os.truncate(path, len(data) - len(rest))
        print(f"{path}: cut off {len(rest)} bytes, the beginning of a last line that was not written completely")
    else:                                           # complete, but an editor left out the line end
        with open(path, "ab") as file:
            file.write(b"\n")
    return rows


def sync_folder(folder):
    """A new or renamed file survives a crash only when its folder is on the disk too."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
