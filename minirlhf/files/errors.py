"""Errors that the person at the keyboard can fix: one line on stderr, exit code 2, no traceback."""

import contextlib
import errno
import io
import signal
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
    """How a message quotes a value. One that Python cannot write, for example one nested too deeply, is described by
    its type."""
    try:
        return repr(value)[:60]
    except Exception:
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


NO_MEMORY = "out of memory", "can't allocate memory", "MemoryError", "could not create a primitive"    # oneDNN's words


class Terminal(io.FileIO):
    """Where output goes as long as anyone reads it. After `| head`, or without a terminal, work goes on in silence.

    A full disk is an error, but only once: at the end Python writes again what is left.
    """
    failed = False

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) and not self.failed:
                self.failed = True
                raise
            return len(data)


def forgiving(stream):
    """sys.stdout or sys.stderr on a Terminal. A character that its encoding does not have is replaced by "?"."""
    if stream is None or stream not in (sys.__stdout__, sys.__stderr__):
        return stream                                           # closed, or a notebook's or a test's own
    stream.flush()
    terminal = io.BufferedWriter(Terminal(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(terminal, stream.encoding, "replace",
                            line_buffering=stream.line_buffering or stream.write_through)


def run_main(main):
    """Runs a script's main(); what the person can fix becomes one line on stderr and exit code 2.

    Ctrl-C becomes one line and 130, SIGTERM 143 and SIGHUP 129.
    """
    sys.stdout, sys.stderr = forgiving(sys.stdout), forgiving(sys.stderr)
    try:
        main()
    except UserError as error:
        end(f"error: {error}", 2)
    except OSError as error:                                    # a folder that cannot be made, moved or written to
        end(f"error: {error.filename or 'a file'}: {error.strerror or error}", 2)
    except (RuntimeError, MemoryError) as error:
        end(f"error: {advice_on(error)}", 2)
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[1] if len(interrupt.args) > 1 else signal.SIGINT
        end(f"\n{interrupt.args[0] if interrupt.args else 'interrupted'}", 128 + number)


def end(line, code):
    print(line, file=sys.stderr)
    sys.exit(code)


def advice_on(error):
    """What to do about an error of PyTorch's, as one line. Any other is raised again, with its traceback."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    if "non-finite" in said:                                    # of clip_grad_norm_
        return ("the gradient is not finite. A lower --lr may help. Nothing is exported, and the checkpoint before "
                "this step stays")
    if any(sign in said for sign in NO_MEMORY):
        said = ". ".join(said.split(". ")[:2])                  # the rest is advice about PyTorch's allocator
        return f"{said}. A lower --micro_batch, or else --batch_size, needs less memory"
    raise error
