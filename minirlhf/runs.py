"""What the three scripts share that is not RLHF: a run's folder, seeds, device and precision, the learning rate.

A run folder holds the model (an export in the official layout), run.json (the resolved configuration), metrics.jsonl
(only what is deterministic), state.pt (everything that --resume needs) and, at the end, report.json.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import torch

from minirlhf.config import UserError
from minirlhf.tensors import read_json
from minirlhf.tokenizer import save_tokenizer
from minirlhf.weights import save_pretrained


# ---- seeds, device, precision ----------------------------------------------------------------------------------------

def generator(*numbers):
    """A CPU generator for (seed, purpose, step, ...). Nothing draws from a global stream, so a draw depends on its own
    numbers only: not on what ran before, and a resumed run needs no saved state of the generator."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(mixed)


def epoch_batch(items, size, step, *numbers):
    """The batch of this step, and whether it is the last of its pass over the items; every pass is a fresh permutation
    seeded by the numbers and the pass. The last batch of a pass may be smaller."""
    n_batches = -(-len(items) // size)
    epoch, position = divmod(step, n_batches)
    order = torch.randperm(len(items), generator=generator(*numbers, epoch))
    return [items[i] for i in order[position * size:(position + 1) * size]], position == n_batches - 1


def pick_device(name):
    """cuda, then mps, then cpu; a name overrides."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def precision(device, dtype):
    """float32, or autocast to bfloat16 for the forward passes; parameters, losses and optimizer stay in float32."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, not {dtype}")
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def eos_of(config, tokenizer):
    """The token that ends a response: the tokenizer's EOS, unless --stop_token says otherwise."""
    return tokenizer.eot_token if config.stop_token < 0 else config.stop_token


def freeze(model, share):
    """Freezes the embeddings and the first `share` of the blocks, and returns the parameters that are left to train.

    A 6B model fits one GPU this way; a small one keeps what it knows. share 0 freezes nothing.
    """
    body = getattr(model, "transformer", model)
    frozen = round(share * len(body.h))
    if share:
        model.requires_grad_(False)
        for part in (*body.h[frozen:], body.ln_f, getattr(model, "score", None), getattr(body, "lm_head", None)):
            if part is not None:
                part.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def memory(*models):
    """GB of weights, gradients and Adam's two moments in float32: 16 bytes a parameter that trains, 4 one that does not."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in parameters) / 1e9


def set_lr(optimizer, lr, step, steps, warmup=0):
    """Linear warm-up over the first `warmup` steps, then linearly to 0 at `steps` (A, B: linear decay)."""
    factor = min((step + 1) / warmup, 1.0) if warmup else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr * factor * (1 - step / steps)


def set_tf_epsilon(optimizer, eps):
    """TensorFlow's Adam divides by sqrt(v) + eps before the bias correction of v, PyTorch's after it. They are equal when
    PyTorch's eps is eps / sqrt(1 - beta2^t); without it early updates are several times larger (B). Call before step()."""
    t = 1 + max((int(state["step"]) for state in optimizer.state.values()), default=0)
    for group in optimizer.param_groups:
        group["eps"] = eps / (1 - group["betas"][1] ** t) ** 0.5


# ---- the folder ------------------------------------------------------------------------------------------------------

class Run:
    """A run's folder, made (or found, with --resume) once all input has been read and found good."""

    def __init__(self, config, extra=None):
        """config: the script's dataclass, with `out` and `resume`; extra: more for run.json."""
        self.folder = Path(config.out)
        self.started = time.time()
        self.state = self._continue(config) if config.resume else self._begin(config, extra or {})

    def _begin(self, config, extra):
        move_aside(self.folder)
        self.folder.mkdir(parents=True)
        values = {"config": dataclasses.asdict(config), **templates(config), **extra,
                  "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
        write_json(self.folder / "run.json", values)
        (self.folder / "metrics.jsonl").touch()
        return {}

    def _continue(self, config):
        """The saved state, after checking that this is the same run; metrics after that state are cut off."""
        if not (self.folder / "state.pt").exists():
            raise UserError(f"--resume: {self.folder} has no state.pt to continue from")
        if (self.folder / "report.json").exists():
            raise UserError(f"--resume: {self.folder} is finished; there is nothing left to do")
        before = read_run(self.folder)
        now = dataclasses.asdict(config)
        changed = [f"--{name} {before.get(name)!r} -> {now[name]!r}" for name in now
                   if name != "resume" and now[name] != before.get(name)]
        if changed:
            raise UserError(f"--resume: {self.folder} was started with other values: {', '.join(changed)}")
        state = torch.load(self.folder / "state.pt", weights_only=True)
        metrics = self.folder / "metrics.jsonl"
        rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] < state["step"]]
        metrics.write_text("".join(row + "\n" for row in rows))
        self.started -= state["seconds"]
        print(f"{self.folder}: continued at step {state['step']}")
        return state

    def seconds(self):
        """Wall-clock seconds of this run, those before a --resume included."""
        return time.time() - self.started

    def log(self, step, metrics):
        """Appends one line to metrics.jsonl. Only what is deterministic belongs there: no times."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def save_state(self, step, **parts):
        """state.pt, whole or not at all: `step` is the first step still to be done."""
        temporary = self.folder / "state.pt.tmp"
        with open(temporary, "wb") as file:
            torch.save({"step": step, "seconds": self.seconds(), **parts}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "state.pt")

    def export(self, model, tokenizer):
        """The model in the official layout, and its vocabulary."""
        save_pretrained(model, self.folder)
        save_tokenizer(tokenizer, self.folder)

    def report(self, values):
        write_json(self.folder / "report.json", values)


def templates(config):
    """The data set's templates, from the meta.json beside it: run.json keeps them, so that one can be asked for the bare
    instruction later."""
    meta = Path(getattr(config, "data", "")).parent / "meta.json"
    return {name: value for name, value in read_json(meta).items() if name.startswith("template")} if meta.exists() else {}


def move_aside(folder):
    """Nothing is overwritten or deleted: what is at this path becomes path.1, or .2, ..."""
    if folder.exists():
        n = 1
        while (old := folder.with_name(f"{folder.name}.{n}")).exists():
            n += 1
        folder.rename(old)
        print(f"{folder} existed: moved to {old}")


def read_run(folder):
    """The configuration of the run in this folder, as a dict. UserError if it has none."""
    try:
        return json.loads((Path(folder) / "run.json").read_text())["config"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: no run.json of a training script in it") from None


def write_json(file, values):
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, file)


def print_table(title, rows):
    """The summary at the end of a script: (name, value) pairs in two columns."""
    print(f"\n{title}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
