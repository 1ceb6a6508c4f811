"""One dataclass per script is at once its command line, its saved JSON and the list of what may be changed."""

import argparse
import contextlib
import dataclasses
import math
import sys


class UserError(Exception):
    """Something the person at the keyboard can mend: shown as one line, without a traceback. Exit code 2.

    What a message quotes may come from any file: line ends and control characters in it are shown as \\n or \\x1b, and of
    a very long message the middle is left out.
    """

    def __init__(self, message):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= 4000 else f"{line[:2000]} ... {line[-2000:]}")


def shown(value):
    """How a message quotes a value; one that is nested too deeply to be written is told by its type."""
    try:
        return repr(value)[:60]
    except RecursionError:
        return f"a {type(value).__name__}"


def option(default, help, least=None):
    """A field of a config: its default, the sentence --help shows, and the least value allowed, if there is one."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(config_class, description, presets, argv=None):
    """Command line -> config. A preset replaces defaults; a flag replaces both. UserError names the flag at fault."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets, help="a set of values for another size or task; any flag overrides")
    for field in dataclasses.fields(config_class):
        help = f"{field.metadata['help']} [{'none' if field.default == '' else field.default}]".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, metavar=field.type.__name__.upper(), help=help)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    values = {**presets.get(given.pop("preset", None), {}), **given}
    return from_dict(config_class, values, "the command line")


def from_dict(config_class, values, where):
    """Checks names, types and least values of a dict (a preset, or a saved run.json) and makes the config."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{where}: unknown option '{name}'")
        field = fields[name]
        if type(value) is not field.type and not (field.type is float and type(value) is int):
            raise UserError(f"{where}: --{name} wants {field.type.__name__}, not {shown(value)}")
        most, said = (math.inf, "infinity") if type(value) is float else (2**63, "2^63")
        if type(value) in (int, float) and not abs(value) < most:                   # "not <" catches nan too
            raise UserError(f"{where}: --{name} must be a number below {said}, not {shown(value)}")
        least = field.metadata["least"]
        if least is not None and value < least:
            raise UserError(f"{where}: --{name} must be at least {least}, not {value}")
    return config_class(**values)


@contextlib.contextmanager
def during(what):
    """Puts `what`, say "iteration 7", before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error.__cause__


def run_main(main):
    """Runs a script's main(); a UserError becomes one line on stderr and exit code 2, Ctrl-C one line and 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:                                    # a folder that cannot be made, moved or written to
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted; a training script goes on from its last checkpoint with --resume"
        print(f"\n{said}", file=sys.stderr)
        sys.exit(130)
