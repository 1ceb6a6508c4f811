"""Errors that the person at the keyboard can fix: one line on stderr, exit code 2, no traceback."""

import contextlib
import sys


class UserError(Exception):
    """Something the person at the keyboard can fix: shown as one line, without a traceback. Exit code 2.

    What a message quotes may come from any file. Line ends and control characters are shown as \\n or \\x1b, and the
    middle of a very long message is left out.
    """

    def __init__(self, message):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= 4000 else f"{line[:2000]} ... {line[-2000:]}")


def shown(value):
    """How a message quotes a value. One that is nested too deeply is described by its type."""
    try:
        return repr(value)[:60]
    except RecursionError:
        return f"a {type(value).__name__}"


def require(condition, message):
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def during(what):
    """Puts `what`, for example "task 7", before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error.__cause__


def run_main(main):
    """Runs a script's main(); a UserError becomes one line on stderr and exit code 2, Ctrl-C one line and 130.

    Memory that runs out and files that cannot be written are one line, too.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("out of memory", "can't allocate memory")):
            raise
        said = ". ".join(str(error).splitlines()[0].split(". ")[:2])    # the rest is advice about PyTorch's allocator
        print(f"error: {said}. A lower --micro_batch, or else --batch_size, needs less memory", file=sys.stderr)
        sys.exit(2)
    except OSError as error:                                    # a folder that cannot be made, moved or written to
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted"
        print(f"\n{said}", file=sys.stderr)
        sys.exit(130)
