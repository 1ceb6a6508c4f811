"""One dataclass per script is its command line, its saved JSON and the list of what may be changed."""

import argparse
import dataclasses
import difflib
import math

from minirlhf.files.errors import UserError, require, run_main, shown     # run_main: for the scripts


# What other projects call some options.
SYNONYMS = {"--kl_coef": "--beta", "--init_kl_coef": "--beta", "--learning_rate": "--lr", "--cliprange": "--clip",
            "--output_dir": "--out", "--max_new_tokens": "--max_response", "--num_ppo_epochs": "--epochs",
            "--num_train_epochs": "--epochs", "--per_device_train_batch_size": "--micro_batch"}


def option(default, help, least=None):
    """A field of a config: its default, the sentence --help shows, and the least value allowed, if there is one."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        """Raises UserError. An unknown flag gets the most similar known one, or what it is called here."""
        known = [flag for action in self._actions for flag in action.option_strings]
        words = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        if "unrecognized" in message and words:
            similar = [SYNONYMS.get(words[0], "")] + difflib.get_close_matches(words[0], known, 1, 0.7)
            guess = next((flag for flag in similar if flag in known), None)
            message += f"; did you mean {guess}?" if guess else ""
        raise UserError(f"{message} (see --help)")


def parse(config_class, description, presets, argv=None):
    """Command line -> config. A preset replaces defaults; a flag replaces both. UserError names the flag at fault."""
    parser = Parser(description=description)
    parser.add_argument("--preset", choices=presets, help="values for another size or task; any flag overrides them")
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
        require(name in fields, f"{where}: unknown option '{name}'")
        field = fields[name]
        require(type(value) is field.type or (field.type is float and type(value) is int),
                f"{where}: --{name} wants {field.type.__name__}, not {shown(value)}")
        most, said = (math.inf, "infinity") if type(value) is float else (2**63, "2^63")
        # "not <" catches nan too
        require(type(value) not in (int, float) or abs(value) < most,
                f"{where}: --{name} must be a number below {said}, not {shown(value)}")
        least = field.metadata["least"]
        require(least is None or value >= least, f"{where}: --{name} must be at least {least}, not {value}")
    return config_class(**values)
