"""A run's folder: what is written while a script trains, and how --resume goes on from it.

It holds the model (an export in the official layout), run.json (the resolved configuration), metrics.jsonl
(only what is deterministic), state.pt (everything that --resume needs), state.previous.pt (the one before it) and, at the
end, report.json.
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

from minirlhf.running.compute import ranks
from minirlhf.running.errors import UserError
from minirlhf.files.download import fcntl, sha256_of
from minirlhf.files.tensors import read_json, whole_file, write_whole
from minirlhf.files.tokenizer import save_tokenizer
from minirlhf.weights import save_pretrained

HELD = {}                                                       # {folder: the file descriptor that keeps it locked}


class Run:
    """A run's folder, made (or found, with --resume) once all input has been read and found good.

    Of several processes only the first `writes` to it. `rows` holds the metrics of all steps so far, as metrics.jsonl does.
    Ctrl-C is held back until the step is done and saved; a second one stops at once.
    """

    def __init__(self, config):
        """config: the script's dataclass; it has `out`, `save_every`, `resume` and `allow_changes`."""
        self.folder, self.config, self.inputs = Path(config.out), config, inputs_of(config)
        if self.folder.name in ("", ".."):
            raise UserError(f"--out {config.out!r} must name a folder of the run's own")
        for name in ("model", "reward"):
            if Path(getattr(config, name, "")).resolve() == self.folder.resolve():
                raise UserError(f"--out {config.out} is the --{name} too, and would move aside what --resume reads: choose another")
        self.writes, self.interrupted, self.started, self.rows = ranks()[0] == 0, False, time.time(), []
        self.state = self._continue() if config.resume else self._begin()
        if ranks()[1] == 1:                                     # torchrun has its own ways with signals
            signal.signal(signal.SIGINT, self._hold_back)

    def _begin(self):
        if self.writes:
            move_aside(self.folder)
            self.folder.mkdir(parents=True)
            lock(self.folder)
            self._write_run_json()
            (self.folder / "metrics.jsonl").touch()
        return {}

    def _continue(self):
        """The saved state, after checking that this is the same run; metrics after that state are cut off."""
        files = [file for name in ("state.pt", "state.previous.pt") if (file := self.folder / name).exists()]
        if not files:
            raise UserError(f"--resume: {self.folder} has no state.pt to continue from; without --resume a new run begins")
        if (self.folder / "report.json").exists():
            raise UserError(f"--resume: {self.folder} is finished; there is nothing left to do")
        if self.writes:
            lock(self.folder)
        changed = changes(read_run(self.folder), dataclasses.asdict(self.config))
        before = read_json(self.folder / "run.json").get("inputs", {})
        changed += [f"--{name} has other contents" for name in before if before[name] != self.inputs.get(name)]
        if changed and not self.config.allow_changes:
            raise UserError(f"--resume: {self.folder} was started otherwise: {', '.join(changed)}; give it the same, or "
                            "--allow_changes")
        state, file = newest_state(files)
        if file != files[0] and self.writes:
            files[0].rename(files[0].with_name("state.damaged.pt"))     # or it would become the checkpoint before the next one
        metrics = self.folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(metrics) if row["step"] < state["step"]]
        if [row["step"] for row in self.rows] != list(range(state["step"])):
            raise UserError(f"{metrics}: not the steps 0 to {state['step'] - 1} that {self.folder} has behind it")
        if self.writes:
            write_whole(metrics, [json_line(row) for row in self.rows])
            if changed:
                self._write_run_json()
        self.started -= state["seconds"]
        print(f"{self.folder}: continued at step {state['step']}" + (f", with {', '.join(changed)}" if changed else ""))
        return state

    def _write_run_json(self):
        write_json(self.folder / "run.json", {
            "config": dataclasses.asdict(self.config), **templates(self.config), "inputs": self.inputs,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__}})

    def _hold_back(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")

    def seconds(self):
        """Wall-clock seconds of this run, those before a --resume included."""
        return time.time() - self.started

    def log(self, step, metrics):
        """Appends one line to metrics.jsonl. Only what is deterministic belongs there: no times."""
        self.rows.append({"step": step, **metrics})
        if self.writes:
            append(self.folder / "metrics.jsonl", json_line(self.rows[-1]))

    def last(self, name):
        """The newest value of a metric, nan if it was never logged."""
        return next((row[name] for row in reversed(self.rows) if name in row), math.nan)

    def restore(self, **parts):
        """Gives models and optimizers what the saved state has of the same names. Returns the first step still to do."""
        for name, part in parts.items() if self.state else ():
            own = [{k: v for k, v in group.items() if k != "params"} for group in getattr(part, "param_groups", [])]
            try:
                part.load_state_dict(self.state[name])
            except (KeyError, ValueError, RuntimeError) as error:
                raise UserError(f"--resume: {self.folder}/state.pt does not fit the {name.replace('_', ' ')}: "
                                f"{str(error).splitlines()[0]}") from None
            for group, options in zip(getattr(part, "param_groups", []), own):
                group.update(options)                           # epsilon and the like: as told now, with --allow_changes
        return self.state.get("step", 0)

    def checkpoint(self, step, steps, **parts):
        """Writes state.pt every --save_every steps, after the last one and after Ctrl-C, which then ends the run.

        step: how many are done, of `steps`; parts: models, optimizers, plain values; by these names restore() finds them.
        """
        if not self.writes or not (step % self.config.save_every == 0 or step == steps or self.interrupted):
            return
        state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
        append(self.folder / "metrics.jsonl", b"", sync=True)   # the rows before this step must not be lost either
        with whole_file(self.folder / "state.pt", previous=self.folder / "state.previous.pt") as file:
            torch.save({"step": step, "seconds": self.seconds(), **state}, file)
        if step == steps:
            signal.signal(signal.SIGINT, signal.default_int_handler)        # what follows can be done again
        if self.interrupted:
            raise KeyboardInterrupt(f"interrupted: {self.folder} is saved after step {step} of {steps}; the same command with "
                                    "--resume goes on from there")

    def export(self, model, tokenizer):
        """The model in the official layout, and its vocabulary."""
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{self.folder}: the last step left NaN or infinity in {name}; nothing is exported; a lower "
                                "--lr may help")
        save_pretrained(model, self.folder)
        save_tokenizer(tokenizer, self.folder)

    def report(self, values):
        """report.json, the sign that the run is finished; the checkpoint before the last one has no use any more."""
        write_json(self.folder / "report.json", values)
        (self.folder / "state.previous.pt").unlink(missing_ok=True)


def changes(before, now):
    """["--lr 0.1 -> 0.2", ...] of two configurations, as dicts; the options that say how to resume are none."""
    return [f"--{name} {before.get(name)!r} -> {now[name]!r}" for name in now
            if name not in ("out", "resume", "allow_changes") and now[name] != before.get(name)]


def inputs_of(config):
    """{option: sha256} of the files that a run reads: with other contents in them, --resume would go on with another run."""
    found = {}
    for name in ("model", "reward", "data", "heldout", "gold"):
        path = Path(getattr(config, name, "").rsplit(".py:")[0] + ".py" * (".py:" in getattr(config, name, "")))
        file = path / "model.safetensors" if path.is_dir() else path
        if file.is_file():
            found[name] = sha256_of(file)
    return found


def newest_state(files):
    """(state, file) of the first of these files that is whole; says which are not. UserError if none is."""
    for file in files:
        try:
            # torch.load does not look at the checksums of its zip file, so a flipped bit in a weight would go unseen.
            if zipfile.ZipFile(file).testzip() is None:
                state = torch.load(file, map_location="cpu", weights_only=True)     # never code, only tensors and values
                if isinstance(state, dict) and type(state.get("step")) is int:
                    return state, file
        except Exception:                                       # a damaged file fails in many ways
            pass
        print(f"{file} is damaged" + (f"; going on from {files[-1].name}, the checkpoint before it" if file != files[-1] else ""))
    raise UserError(f"{' and '.join(map(str, files))}: damaged, nothing to go on from; a new run begins without --resume")


def lock(folder):
    """Takes a folder for this process, as long as it lives; UserError if another process has it."""
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


def append(file, line, sync=False):
    """Adds bytes to the end of a file, and waits until they are on the disk if sync. UserError if that cannot be done."""
    try:
        with open(file, "ab") as f:
            f.write(line)
            f.flush()
            if sync:
                os.fsync(f.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; once it can, --resume goes on") from None


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
    """The data set's templates, from the meta.json beside it: run.json keeps them, so that one can be asked for the bare
    instruction later."""
    meta = Path(getattr(config, "data", "")).parent / "meta.json"
    return {name: value for name, value in read_json(meta).items() if name.startswith("template")} if meta.exists() else {}


def move_aside(folder):
    """Nothing is overwritten or deleted: what is at this path becomes path.1, or .2, ... UserError while a run uses it."""
    if folder.exists():
        lock(folder)
        n = 1
        while (old := folder.with_name(f"{folder.name}.{n}")).exists():
            n += 1
        folder.rename(old)
        print(f"{folder} existed: moved to {old}")


def read_run(folder):
    """The configuration of the run in this folder, as a dict. UserError if it has none."""
    file = Path(folder) / "run.json"
    config = read_json(file).get("config") if file.is_file() else None
    if not isinstance(config, dict):
        raise UserError(f"{folder}: no run.json of a training script in it")
    return config


def write_json(file, values):
    write_whole(file, [(json.dumps(values, indent=2) + "\n").encode()])


def progress(first, steps, name, unit):
    """A bar over the steps that are left; of several processes only the first shows it."""
    return tqdm(range(first, steps), initial=first, total=steps, desc=name, unit=unit, disable=ranks()[0] > 0)


def print_table(title, rows):
    """The summary at the end of a script: (name, value) pairs in two columns."""
    print(f"\n{title}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
