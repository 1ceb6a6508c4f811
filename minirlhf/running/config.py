"""One dataclass per script is at once its command line, its saved JSON and the list of what may be changed."""

import argparse
import dataclasses
import math

from minirlhf.running.errors import UserError, shown


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
