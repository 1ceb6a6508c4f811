"""JSON read strictly, and files written completely or not at all."""

import contextlib
import json
import os
import statistics

from minirlhf.files.errors import UserError, require


def strict_json(data):
    """Bytes -> their value as UTF-8 JSON. ValueError says what is wrong, also for a key that occurs twice, of which
    json.loads would silently use the last one."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_key_twice)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def no_key_twice(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f'"{statistics.mode(name for name, _ in pairs)}" is there twice')
    return values


def json_object(data, where, kind="line"):
    """Bytes that hold one JSON object -> dict. where, kind: what an error names, the file or line and what it is."""
    try:
        value = strict_json(data)
    except ValueError as error:
        raise UserError(f"{where}: not a {kind} of JSON in UTF-8 ({error})") from None
    require(isinstance(value, dict),
            f"{where}: a {kind} must be an object like {{\"name\": ...}}, not {data[:40]!r}")
    return value


def read_json(file):
    """A file with one JSON object in it -> dict."""
    return json_object(file.read_bytes(), file, "file")


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_json(file, values):
    write_whole(file, [(json.dumps(values, indent=2) + "\n").encode()])


def write_whole(file, parts):
    """Writes pieces of bytes to a file, completely or not at all."""
    with whole_file(file) as f:
        f.writelines(parts)


@contextlib.contextmanager
def whole_file(file):
    """A file to write bytes to, which takes its name only when all of it is on the disk. If the program crashes or the
    disk is full, the old file stays as it was.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save hides a full disk behind a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{file} cannot be written: {reason}. What was there before is unchanged") from None
