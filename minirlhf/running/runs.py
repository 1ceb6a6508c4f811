"""A run's folder: what a script writes while it trains, and how --resume continues from it.

It holds the model (an export in the official layout), run.json (the resolved configuration), metrics.jsonl and, for
PPO, samples.jsonl (only what is deterministic), state.pt (everything that --resume needs), state.previous.pt (the one
before), heldout.jsonl (rows that the script itself held out of --data) and, at the end, report.json.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from minirlhf.files.download import fcntl, sha256_of
from minirlhf.files.json_files import read_json, whole_file, write_json, write_whole
from minirlhf.running.processes import is_first
from minirlhf.files.errors import UserError, require

HELD = {}           # {folder: the file descriptor that keeps it locked}
LOGS = ("metrics.jsonl", "samples.jsonl")       # rows with a "step", appended while a run goes on
SAVING = 0.05       # share of the time that may go into checkpoints
LINES = 20          # about this many rows of metrics are printed during a run
say = tqdm.write    # prints a line above the bar


class Run:
    """A run's folder. Made (or found, with --resume) after all input has been read and checked.

    Of several processes only the first writes. `rows` holds the metrics of all steps so far, as metrics.jsonl does.
    Ctrl-C takes effect once the step is done and saved; a second one stops at once.
    """

    def __init__(self, config, heldout=()):
        """config: the script's dataclass. It has `out`, `resume` and perhaps `allow_changes`.

        heldout: Examples. Rows that the script itself held out of --data are kept in the folder.
        """
        self.folder, self.config, self.inputs = Path(config.out), config, inputs_of(config)
        require(self.folder.name not in ("", ".."), f"--out {config.out!r} must name a folder of the run's own")
        for name in ("model", "reward", "reference"):
            require(not getattr(config, name, "") or Path(getattr(config, name)).resolve() != self.folder.resolve(),
                    f"--out {config.out} is also the --{name}, which must stay. Choose another --out")
        self.interrupted, self.rows, self.warned, self.started = False, [], set(), time.time()
        self.saved_at, self.saving_takes, self.first = 0.0, 0.0, is_first()
        self.state = self._continue() if config.resume else self._begin(heldout)
        self.printed = [(self.state.get("step", 0), self.state.get("seconds", 0.0))]    # (steps, seconds) at each row
        if "TORCHELASTIC_RUN_ID" not in os.environ:             # torchrun handles signals itself
            signal.signal(signal.SIGINT, self._hold_back)

    def _begin(self, heldout):
        if is_first():
            move_aside(self.folder)
            self.folder.mkdir(parents=True)
            lock(self.folder)
            self._write_run_json()
            (self.folder / "metrics.jsonl").touch()
            if self.config.heldout == str(self.folder / "heldout.jsonl"):
                write_whole(self.folder / "heldout.jsonl", [json_line(example.row.fields()) for example in heldout])
        return {}

    def _continue(self):
        """The saved state, after checking that this is the same run. Metrics after that state are cut off."""
        files = [file for name in ("state.pt", "state.previous.pt") if (file := self.folder / name).exists()]
        require(files, f"--resume: {self.folder} has no state.pt to continue from. Leave out --resume")
        if is_first():
            lock(self.folder)
        changed = self._changes()
        report = self.folder / "report.json"
        require(changed or not report.exists(),
                f"--resume: {self.folder} is finished. A PPO run is extended by more --iterations with "
                "--allow_changes")
        if changed and not getattr(self.config, "allow_changes", False):
            hint = ", or add --allow_changes" if hasattr(self.config, "allow_changes") else ""
            raise UserError(f"--resume: {self.folder} was started with other options: {', '.join(changed)}. "
                            f"Give it the same{hint}")
        state, file = newest_state(files)
        step = state["step"]
        require(not report.exists() or getattr(self.config, "iterations", step + 1) > step,
                f"--resume: {self.folder} is finished after {step} iterations. Give it more --iterations")
        self.rows = [row for row in read_rows(self.folder / "metrics.jsonl") if row["step"] < step]
        require([row["step"] for row in self.rows] == list(range(step)),
                f"{self.folder / 'metrics.jsonl'}: does not hold the steps 0 to {step - 1} of this run")
        if is_first():
            if file != files[0]:                                # or it would become the checkpoint before the next one
                files[0].rename(files[0].with_name("state.damaged.pt"))
            if report.exists():
                report.rename(report.with_name(f"report.{step}.json"))
            for file in filter(Path.exists, map(self.folder.joinpath, LOGS)):
                write_whole(file, [json_line(row) for row in read_rows(file) if row["step"] < step])
            if changed:
                self._write_run_json()
        self.started -= state["seconds"]
        how = f", with {', '.join(changed)}. The learning rates now fall to 0 at the new end" if changed else ""
        print(f"{self.folder}: continued at step {step}{how}")
        return state

    def _changes(self):
        """["--lr 0.1 -> 0.2", ...]: how the options and the contents of the input files differ from those of before."""
        before, now = read_run(self.folder), dataclasses.asdict(self.config)
        inputs = read_json(self.folder / "run.json").get("inputs", {})
        return [f"--{name} {before.get(name)!r} -> {now[name]!r}" for name in now
                if name not in ("out", "resume", "allow_changes") and now[name] != before.get(name)] + [
                f"--{name} has other contents" for name in inputs if inputs[name] != self.inputs.get(name)]

    def _write_run_json(self):
        write_json(self.folder / "run.json", {
            "config": dataclasses.asdict(self.config), **templates(self.config), "inputs": self.inputs,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__}})

    def _hold_back(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, self._stop_now)
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")

    def _stop_now(self, *_):
        raise KeyboardInterrupt(
            f"interrupted; --resume continues {self.folder} from its last checkpoint, if there is one")

    def seconds(self):
        """Wall-clock seconds of this run, including those before a --resume."""
        return time.time() - self.started

    def steps(self, total, name):
        """A progress bar over the steps that are left, on a terminal and in the first process only."""
        self.total, first = total, self.state.get("step", 0)
        return tqdm(range(first, total), initial=first, total=total, desc=name, disable=None if is_first() else True)

    def log(self, step, metrics, show=(), complaints=None):
        """Appends one line to metrics.jsonl. Only what is deterministic belongs there: no times.

        About LINES times a run it prints the newest values of the metrics in `show` and the seconds a step took.
        complaints: a function of all rows -> [(sign, sentence)]. Each is printed once.
        """
        self.rows.append({"step": step, **metrics})
        self.append("metrics.jsonl", self.rows[-1:])
        if not self.first:
            return
        if step % max(1, self.total // LINES) == 0 or step == self.total - 1:
            newest = {name: value for row in self.rows for name, value in row.items()}
            self.printed.append((step + 1, time.time() - self.started))
            (before, then), (now, seconds) = self.printed[-2:]
            heads = [name.split("/")[-1] for name in show]
            heads = show if len(set(heads)) < len(heads) else heads
            widths = [max(10, len(head) + 2) for head in heads]
            cells = [f"{newest[name]:.3f}" if name in newest else "" for name in show]
            if len(self.printed) == 2:
                say(f"{'step':>6}" + "".join(map(str.rjust, heads, widths)) + f"{'s/step':>9}")
            say(f"{step:>6}" + "".join(map(str.rjust, cells, widths)) + f"{(seconds - then) / (now - before):>9.2f}")
        for sign, sentence in complaints(self.rows) if complaints else ():
            if sign not in self.warned:
                say(f"[{step}] warning: {sentence}")
            self.warned.add(sign)

    def append(self, name, rows):
        """Appends rows to one of the LOGS. Only what is deterministic belongs there: --resume writes the same again."""
        if self.first:
            try:
                with open(self.folder / name, "ab") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            except OSError as error:
                raise UserError(f"{self.folder / name} cannot be written: {error.strerror}. Once it can, --resume "
                                "continues") from None

    def last(self, name):
        """The newest value of a metric, nan if it was never logged."""
        return next((row[name] for row in reversed(self.rows) if name in row), math.nan)

    def restore(self, **parts):
        """Loads models and optimizers from what the saved state holds under the same names."""
        for name, part in parts.items() if self.state else ():
            try:
                part.load_state_dict(self.state[name])
            except (KeyError, ValueError, RuntimeError) as error:
                raise UserError(f"--resume: {self.folder}/state.pt does not fit the {name.replace('_', ' ')}: "
                                f"{str(error).splitlines()[0]}") from None

    def checkpoint(self, done, **parts):
        """Writes state.pt when it is due, after the last step, and after Ctrl-C, which then ends the run.

        It is due when saving takes no more than SAVING of the time since the last one. done: how many of the steps are
        done. parts: models, optimizers, plain values; restore() finds them by these names. After the last step only the
        first of several processes is still needed, and the others end here.
        """
        due = time.time() - self.saved_at >= self.saving_takes / SAVING
        if self.first and (due or done == self.total or self.interrupted):
            begun = time.time()
            state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
            for file in filter(Path.exists, map(self.folder.joinpath, LOGS)):
                with open(file, "ab") as rows:
                    os.fsync(rows.fileno())                     # the rows before this step must survive too
            with whole_file(self.folder / "state.pt", previous=self.folder / "state.previous.pt") as file:
                torch.save({"step": done, "seconds": time.time() - self.started, **state}, file)
            self.saved_at, self.saving_takes = time.time(), time.time() - begun
        if done == self.total:
            signal.signal(signal.SIGINT, signal.default_int_handler)    # what follows can be repeated
            if not self.first:
                sys.exit()
        if self.interrupted:
            raise KeyboardInterrupt(f"interrupted: {self.folder} is saved after step {done} of {self.total}; the same "
                                    "command with --resume continues from there")

    def report(self, values):
        """report.json, which marks the run as finished. The checkpoint before the last one is no longer needed."""
        write_json(self.folder / "report.json", values)
        (self.folder / "state.previous.pt").unlink(missing_ok=True)


def inputs_of(config):
    """{option: sha256} of the files that a run reads. With other contents, --resume would continue another run.

    What lies in the run's own folder does not count: an earlier run's heldout.jsonl there is about to be moved aside.
    """
    found = {}
    for name in ("model", "reference", "reward", "data", "heldout", "gold"):
        spec = getattr(config, name, "")
        path = Path(spec.rsplit(":", 1)[0] if ".py:" in spec else spec)
        file = path / "model.safetensors" if path.is_dir() else path
        if spec and file.is_file() and file.parent.resolve() != Path(config.out).resolve():
            found[name] = sha256_of(file)
    return found


def newest_state(files):
    """(state, file) of the first of these files that is undamaged. Prints which are damaged; UserError if all are."""
    for file in files:
        try:
            # torch.load ignores the checksums of its zip file, so it would not notice a flipped bit in a weight.
            whole = zipfile.ZipFile(file).testzip() is None
            state = torch.load(file, map_location="cpu", weights_only=True)         # tensors and values, never code
            if whole and type(state["step"]) is int:
                return state, file
        except Exception:                                       # a damaged file fails in many ways
            pass
        fallback = f"; continuing from {files[-1].name}, the checkpoint before it" if file != files[-1] else ""
        print(f"{file} is damaged{fallback}")
    raise UserError(f"{' and '.join(map(str, files))}: damaged. Without --resume a new run begins")


def lock(folder):
    """Keeps a folder for this process as long as it lives; UserError if another process has it."""
    if fcntl is None:
        return
    if (held := HELD.pop(folder.absolute(), None)) is not None:
        os.close(held)
    descriptor = HELD[folder.absolute()] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: let it finish, or give another --out") from None
    except OSError:                                             # some network file systems have no locks
        pass


def in_use(folder):
    """Whether some process keeps this folder locked. False where there are no locks."""
    if fcntl is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def json_line(row):
    return (json.dumps(row) + "\n").encode()


def read_rows(file):
    """The rows of a metrics.jsonl, up to a line that was cut off."""
    rows = []
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows


def templates(config):
    """The data set's templates, from the meta.json beside it. Tools use them to show the bare instruction. And the
    model's own, in which its prompts are asked."""
    meta = Path(getattr(config, "data", "")).parent / "meta.json"
    values = read_json(meta) if meta.exists() else {}
    own = {"model_template": config.model_template} if vars(config).get("model_template") else {}
    return own | {name: value for name, value in values.items() if name.startswith("template")}


def move_aside(folder):
    """Nothing is overwritten or deleted: what is at this path becomes path.1, or .2, ... UserError if in use."""
    if folder.exists():
        require(folder.is_dir(), f"{folder} is a file, not the folder of a run. Choose another --out")
        lock(folder)
        n = 1
        while (old := folder.with_name(f"{folder.name}.{n}")).exists():
            n += 1
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


def read_run(folder):
    """The options of the run in this folder, as a dict. UserError if it has none."""
    file = Path(folder) / "run.json"
    config = read_json(file).get("config") if file.is_file() else None
    require(isinstance(config, dict), f"{folder}: no run.json of a training script in it")
    return config


def read_options(folder):
    """The same, {} if there is no run.json: a model may come from anywhere."""
    return read_run(folder) if (Path(folder) / "run.json").is_file() else {}


def read_report(folder):
    """The report.json of a run's folder, {} if there is none."""
    file = Path(folder) / "report.json"
    return read_json(file) if file.is_file() else {}


def print_table(title, rows):
    """The summary at the end of a script: (name, value) pairs in two columns."""
    print(f"\n{title}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        values = value if isinstance(value, list) else [value]
        print(f"  {name:<{width}}  {' to '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in values)}")
