"""A run's folder: what a script writes while it trains, and how --resume continues from it.

It holds the model (an export in the official layout), run.json (the resolved configuration), metrics.jsonl and, for
PPO, samples.jsonl (only what is deterministic), state.pt (everything that --resume needs), heldout.jsonl (rows that
the script itself held out of --data) and, at the end, report.json.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from minirlhf.files.download import fcntl, sha256_of
from minirlhf.files.errors import UserError, require, shown
from minirlhf.files.json_files import read_json, whole_file, write_json, write_whole
from minirlhf.running.processes import is_first

HELD = {}           # {folder: the file descriptor that keeps it locked}
LOGS = ("metrics.jsonl", "samples.jsonl")       # rows with a "step", appended while a run goes on
SAVING = 0.05       # share of the time that may go into checkpoints
MODEL_FILES = ("config.json", "*.safetensors*", "pytorch_model*", "vocab*", "merges.txt", "tokenizer*", "*template*",
               "generation_config*")
STOPS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
LINES = 20          # about this many rows of metrics are printed during a run
say = tqdm.write    # prints a line above the bar


class Run:
    """A run's folder. Made (or found, with --resume) after all input has been read and checked.

    Of several processes only the first writes. `rows` holds the metrics of all steps so far, as metrics.jsonl does.
    Ctrl-C, SIGTERM and SIGHUP take effect once the step is done and saved; a second one stops at once.
    """

    def __init__(self, config, heldout=()):
        """config: the script's dataclass. It has `out`, `resume` and perhaps `allow_changes`.

        heldout: Examples. Rows that the script itself held out of --data are kept in the folder.
        """
        self.folder, self.config, self.first = Path(config.out), config, is_first()
        require(self.folder.name not in ("", ".."), f"--out {config.out!r} must name a folder of the run's own")
        for name in ("model", "reward", "reference"):
            require(not getattr(config, name, "") or Path(getattr(config, name)).resolve() != self.folder.resolve(),
                    f"--out {config.out} is also the --{name}, which must stay. Choose another --out")
        self.inputs, self.rows, self.warned, self.interrupted = hashes_of_inputs(config), [], set(), None
        self.state = self._continue() if config.resume else self._begin(heldout)
        self.started = time.monotonic() - self.state.get("seconds", 0.0)
        self.saved_at, self.saving_takes = 0.0, 0.0
        self.printed = self.state.get("step", 0), time.monotonic()   # after how many steps the last row was, and when
        if "TORCHELASTIC_RUN_ID" not in os.environ:                 # torchrun handles signals itself
            for number in STOPS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:       # nohup ignores SIGHUP
                    signal.signal(number, self._stop)

    def _begin(self, heldout):
        if self.first:
            move_aside(self.folder)
            self.folder.mkdir(parents=True)
            lock(self.folder)
            self._write_run_json()
            (self.folder / "metrics.jsonl").touch()
            if self.config.heldout == str(self.folder / "heldout.jsonl"):
                write_rows(self.folder / "heldout.jsonl", [example.row.fields() for example in heldout])
        return {}

    def _continue(self):
        """The saved state, after checking that this is the same run. Rows that were logged after it are cut off."""
        require((self.folder / "state.pt").exists(),
                f"--resume: {self.folder} has no state.pt to continue from. Leave out --resume")
        if self.first:
            lock(self.folder)
        changed, report = self._changes(), self.folder / "report.json"
        require(not changed or getattr(self.config, "allow_changes", False),
                f"--resume: {self.folder} was started with other options: {', '.join(changed)}. Give it the same"
                + ", or add --allow_changes" * hasattr(self.config, "allow_changes"))
        state = read_state(self.folder / "state.pt")
        step = state["step"]
        require(not report.exists() or getattr(self.config, "iterations", 0) > step,
                f"--resume: {self.folder} is finished. A PPO run is extended by more --iterations with "
                "--allow_changes")
        self.rows = [row for row in read_rows(self.folder / "metrics.jsonl") if row["step"] < step]
        if self.first:
            if report.exists():
                report.rename(self.folder / f"report.{step}.json")
            for log in filter(Path.exists, map(self.folder.joinpath, LOGS)):
                write_rows(log, [row for row in read_rows(log) if row["step"] < step])
            if changed:
                self._write_run_json()
        how = f", with {', '.join(changed)}. The learning rates now fall to 0 at the new end" if changed else ""
        print(f"{self.folder}: continued at step {step}{how}"
              + f". metrics.jsonl has only {len(self.rows)} rows of before" * (len(self.rows) < step))
        return state

    def _changes(self):
        """["--lr 0.1 -> 0.2", ...]: how the options and the contents of the input files differ from those of before."""
        before, now = read_run(self.folder), dataclasses.asdict(self.config)
        inputs = read_if_there(self.folder, "run.json").get("inputs", {})
        return [f"--{name} {before.get(name)!r} -> {now[name]!r}" for name in now
                if name not in ("out", "resume", "allow_changes", "insist") and now[name] != before.get(name)] + [
                f"--{name} has other contents" for name in inputs | self.inputs
                if inputs.get(name) != self.inputs.get(name)]

    def _write_run_json(self):
        write_json(self.folder / "run.json", {
            "config": dataclasses.asdict(self.config), **templates(self.config), "inputs": self.inputs,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__}})

    def _stop(self, number, _):
        if self.interrupted:
            raise KeyboardInterrupt(
                f"interrupted; --resume continues {self.folder} from its last checkpoint, if there is one", number)
        self.interrupted = number
        with contextlib.suppress(OSError):                          # the terminal is gone
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")

    def seconds(self):
        """Wall-clock seconds of this run, including those before a --resume."""
        return time.monotonic() - self.started

    def steps(self, total, name):
        """A progress bar over the steps that are left, on a terminal and in the first process only."""
        self.total, first = total, self.state.get("step", 0)
        require(first <= total, f"{self.folder / 'state.pt'} is damaged: it is after step {first} of {total}")
        return tqdm(range(first, total), initial=first, total=total, desc=name, disable=None if self.first else True)

    def log(self, step, metrics, show=(), complaints=None):
        """Appends one line to metrics.jsonl, and prints the metrics in `show` about LINES times a run.

        complaints: a function of all rows -> [(sign, sentence)]. Each is printed once.
        """
        self.rows.append({"step": step, **metrics})
        self.append("metrics.jsonl", self.rows[-1:])
        if self.first and (step % max(1, self.total // LINES) == 0 or step == self.total - 1):
            self._print_row(step, show)
        for sign, sentence in complaints(self.rows) if complaints and self.first else ():
            if sign not in self.warned:
                say(f"[{step}] warning: {sentence}")
            self.warned.add(sign)

    def _print_row(self, step, show):
        """The newest values of these metrics, and the seconds that a step took since the row before."""
        newest = {name: value for row in self.rows for name, value in row.items()}
        cells = {name.rpartition("/")[2]: f"{newest[name]:.3f}" if name in newest else "" for name in show}
        (done, then), self.printed = self.printed, (step + 1, time.monotonic())
        cells = {"step": str(step), **cells, "s/step": f"{(time.monotonic() - then) / (step + 1 - done):.2f}"}
        if done == self.state.get("step", 0):
            say("".join(head.rjust(max(10, len(head) + 2)) for head in cells))
        say("".join(cell.rjust(max(10, len(head) + 2)) for head, cell in cells.items()))

    def append(self, name, rows):
        """Appends rows to one of the LOGS. Only what is deterministic belongs there: --resume writes the same again."""
        if self.first:
            try:
                with open(self.folder / name, "ab") as file:
                    file.writelines(lines_of(rows))
            except OSError as error:
                raise UserError(f"{self.folder / name} cannot be written: {error.strerror}. Once it can, --resume "
                                "continues") from None

    def last(self, name):
        """The newest value of a metric, nan if it was never logged."""
        return next((row[name] for row in reversed(self.rows) if name in row), math.nan)

    def restore(self, **parts):
        """Loads models and optimizers from what the saved state holds under the same names.

        Also refuses to begin if the disk has no room for state.pt and the one that replaces it.
        """
        for name, part in parts.items() if self.state else ():
            try:
                part.load_state_dict(self.state[name])
                require(not isinstance(part, torch.optim.Optimizer) or has_moments(part),
                        f"{self.folder / 'state.pt'} is damaged: {name}")
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
                raise UserError(f"{self.folder / 'state.pt'} is damaged: {name}: {error}") from error
        models = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        numbers = sum(p.numel() for model in models for p in model.parameters())
        size = 3 * 4 * numbers / 1e9                                # float32: the weights and Adam's two moments
        if self.first and not self.state and size > 1:
            room = shutil.disk_usage(self.folder).free / 1e9
            print(f"{self.folder / 'state.pt'} will have about {size:.1f} GB")
            require(room > 2 * size, f"--out {self.folder}: its disk has room for {room:.1f} GB, and two checkpoints "
                    f"need {2 * size:.1f} GB, the old one and the one that replaces it")

    def checkpoint(self, done, **parts):
        """Writes state.pt when it is due, after the last step, and after Ctrl-C, which then ends the run.

        It is due when saving takes no more than SAVING of the time since the last one. done: how many of the steps are
        done. parts: models, optimizers, plain values; restore() finds them by these names. After the last step only the
        first of several processes is still needed, and the others end here.
        """
        due = time.monotonic() - self.saved_at >= self.saving_takes / SAVING
        if self.first and (due or done == self.total or self.interrupted):
            begun = time.monotonic()
            state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
            with whole_file(self.folder / "state.pt") as file:
                torch.save({"step": done, "seconds": self.seconds(), **state}, file)
            self.saved_at, self.saving_takes = time.monotonic(), time.monotonic() - begun
        if done == self.total:
            for number in STOPS:                                    # what follows can be repeated
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            if not self.first:
                sys.exit()
        if self.interrupted:
            raise KeyboardInterrupt(f"interrupted: {self.folder} is saved after step {done} of {self.total}; the same "
                                    "command with --resume continues from there", self.interrupted)

    def report(self, values):
        """report.json, which marks the run as finished."""
        write_json(self.folder / "report.json", values)


def hashes_of_inputs(config):
    """{option, or option/file of a folder: sha256} of what a run reads. With other contents it would be another run.

    What lies in the run's own folder does not count: an earlier run's heldout.jsonl there is about to be moved aside.
    """
    found = {}
    for name in ("model", "reference", "reward", "data", "heldout", "gold"):
        spec = getattr(config, name, "")
        path = Path(spec.rsplit(":", 1)[0] if ".py:" in spec else spec)
        inside = [file for pattern in MODEL_FILES * bool(spec) for file in sorted(path.glob(pattern))]
        found |= {f"{name}/{file.name}": sha256_of(file) for file in inside or beside(path)}
        if path.is_file() and path.parent.resolve() != Path(config.out).resolve():
            found[name] = sha256_of(path)
    return found


def beside(path):
    """The files that are read with a file: meta.json with data, and with a function the modules it has imported."""
    files = [path.resolve().with_name("meta.json")] if path.suffix != ".py" else [
        Path(getattr(module, "__file__", None) or "") for name, module in sys.modules.items() if name != "__main__"]
    return sorted({file for file in files if path.is_file() and file.is_file() and file.parent == path.resolve().parent}
                  - {path.resolve()})


def read_state(file):
    """What a state.pt holds, a dict with "step" and "seconds". UserError if it is damaged."""
    with contextlib.suppress(Exception):                        # a damaged file fails in many ways
        # torch.load ignores the checksums of its zip file, so it would not notice a flipped bit in a weight.
        whole = zipfile.ZipFile(file).testzip() is None
        state = torch.load(file, map_location="cpu", weights_only=True)             # tensors and values, never code
        numbers = state["seconds"], state.get("beta", 0.0)
        if whole and type(state["step"]) is int and state["step"] > 0 and all(0 <= x < 1e15 for x in numbers):
            return state
    raise UserError(f"{file} is damaged. Without --resume a new run begins")


def has_moments(optimizer):
    """Whether an AdamW has both moments of every parameter, after as many steps, and the options it was made with."""
    return all({name: value.shape for name, value in optimizer.state[parameter].items()}
               == {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
               and optimizer.state[parameter]["step"] == next(iter(optimizer.state.values()))["step"]
               and all(group.get(name) == value for name, value in optimizer.defaults.items() if name != "lr")
               for group in optimizer.param_groups for parameter in group["params"])


def lock(folder):
    """Keeps a folder for this process as long as it lives; UserError if another process has it."""
    if fcntl is None:
        return
    if folder.absolute() in HELD:
        os.close(HELD.pop(folder.absolute()))
    HELD[folder.absolute()] = descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: let it finish, or give another --out") from None
    except OSError:                                             # some network file systems have no locks
        pass


def write_rows(file, rows):
    write_whole(file, lines_of(rows))


def lines_of(rows):
    return [(json.dumps(row) + "\n").encode() for row in rows]


def read_rows(file):
    """The rows of a metrics.jsonl, up to a line that was cut off or is damaged."""
    rows = []
    with contextlib.suppress(ValueError, RecursionError):
        for line in file.read_bytes().splitlines() if file.exists() else ():
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int or (
                    file.name == "metrics.jsonl" and not all(
                        x is not None and is_figure("", x, False) for x in row.values())):
                break
            rows.append(row)
    return rows


def templates(config):
    """The data set's templates, from the meta.json beside it, and the model's own. Tools show the bare instruction."""
    values = read_if_there(Path(getattr(config, "data", "")).parent, "meta.json")
    own = {"model_template": config.model_template} if vars(config).get("model_template") else {}
    return own | {name: value for name, value in values.items() if name.startswith("template")}


def move_aside(folder):
    """Nothing is overwritten or deleted: what is at this path becomes path.1, or .2, ... UserError if in use."""
    if folder.exists():
        require(folder.is_dir(), f"{folder} is a file, not the folder of a run. Choose another --out")
        lock(folder)
        old = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(old)
        print(f"{folder} existed: moved to {old}")


def prompts_for(folder, kind):
    """The file of prompts that the model in this folder was made for: its run's "data" or "heldout" rows.

    For the embedded world, and for a model that no run of ours made, the embedded world's.
    """
    config = read_options(folder)
    tiny = Path(config.get("data", "data/tiny/")).parent == Path("data/tiny")
    own = next((config[name] for name in (kind, "data") if Path(config.get(name) or "?").is_file()), "")
    embedded = {"data": "data/tiny/prompts.jsonl", "heldout": "data/tiny/prompts_test.jsonl"}
    return own if own and not tiny else embedded[kind]


def read_options(folder):
    """The options of the run in this folder, as a dict; {} if there is no run.json, since a model may come from anywhere."""
    return read_if_there(folder, "run.json").get("config", {})


def read_run(folder):
    """The same, but UserError if no run of ours made the folder."""
    config = read_options(folder)
    require(config and isinstance(config, dict), f"{folder}: no run.json of a training script in it")
    return config


def read_report(folder):
    """The report.json of a run's folder, {} if there is none. UserError if it has text where numbers belong."""
    report = read_if_there(folder, "report.json")
    for name, value in report.items():
        require(is_figure(name, value), f"{Path(folder) / 'report.json'}: {name} is no number: {shown(value)}")
    return report


def is_figure(name, value, outermost=True):
    """Whether a value of a report.json is a number, null, an interval (of a name in _ci, or in "ci"), or holds such."""
    if name.endswith("_ci") and value is not None:
        return (isinstance(value, list) and len(value) == 2 and None not in value
                and all(is_figure("", x, False) for x in value))
    if isinstance(value, dict) and outermost or name == "ci":
        return isinstance(value, dict) and all(
            is_figure(inner + "_ci" * (name == "ci"), part, False) for inner, part in value.items())
    return value is None or type(value) is float or type(value) is int and abs(value) < 2**63


def read_if_there(folder, name):
    file = Path(folder) / name
    return read_json(file) if file.is_file() else {}


def print_table(title, rows):
    """The summary at the end of a script: (name, value) pairs in two columns."""
    print(f"\n{title}")
    for name, value in rows:
        values = value if isinstance(value, list) else [value]
        print(f"  {name:<22}  {' to '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in values)}")
