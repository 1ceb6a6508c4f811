"""Everything that is worth knowing about one GPU, right and fast, in one command without a network:

    python tests/bench/gpu.py                           on the GPU; prints a Markdown table and writes out/gpu.json
    python tests/bench/gpu.py --device cpu --toy        the same code on a small model, to see that it runs

First what must hold, then speed and memory with random weights, against transformers and TRL where they are installed.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import generate
import memory
import ppo_iteration
import train_step
from common import ROOT, best_seconds, now, our_model, peaks, random_ids

import torch

import train_ppo
from minirlhf.running.device import pick_device, set_precision
from minirlhf.data import Example, Row
from minirlhf.reward import ScalarHeadModel
from minirlhf.weights import from_pretrained, save_pretrained

sys.path.insert(0, str(ROOT / "tests"))
from small_world import ppo_flags, read_metrics, small_world      # noqa: E402

DTYPES = ("float32_exact", "float32", "bfloat16")
WHOLE = dict(sizes=("124M", "774M"), batches=(1, 32, 128, 512), new=64, tokens=1024, square=8192, iterations=3,
             preset={})
TOY = dict(sizes=("tiny",), batches=(1, 8), new=16, tokens=128, square=512, iterations=2,
           preset=dict(batch_size=16, micro_batch=8, epochs=1))


class Table:
    """Rows of (what, value, what it is compared with). A gate that does not hold is remembered."""

    def __init__(self):
        self.rows, self.failed = [], []

    def add(self, what, value, against="", holds=True):
        self.rows.append((what, value, against + ("" if holds else " FAILED")))
        self.failed += [what] * (not holds)
        print(f"  {what}: {value}  {self.rows[-1][2]}", file=sys.stderr)

    def markdown(self):
        lines = [("what", "measured", "against"), ("---",) * 3, *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def installed(package):
    return importlib.util.find_spec(package) is not None


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- right -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def logits(table, args):
    """The device's logits against the CPU's in float64, and against transformers."""
    size = args.sizes[0]
    model, ids = our_model(size), random_ids(size, 2, 64)
    model.double()
    exact = model.logits(model(ids))
    model.float().to(args.device)
    for dtype, most in zip(DTYPES, (1e-4, 0.02, 0.2)):
        set_precision(torch.device(args.device), dtype)
        model.dtype = dtype
        difference = float((model.logits(model(ids.to(args.device))).double().cpu() - exact).abs().max())
        table.add(f"logits, {size}, {dtype}: largest difference from the CPU's float64", f"{difference:.1e}",
                  f"at most {most:g}", difference <= most)
    if installed("transformers"):
        from transformers import GPT2LMHeadModel
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, folder)
            peer = GPT2LMHeadModel.from_pretrained(folder).eval().to(args.device)
        difference = float((peer(ids.to(args.device)).logits.double().cpu() - exact).abs().max())
        table.add(f"logits, {size}: transformers on the same device", f"{difference:.1e}", "for comparison")


@contextlib.contextmanager
def quietly():
    with contextlib.redirect_stdout(sys.stderr):
        yield


def one_iteration(table, args, world):
    """One PPO iteration of a toy model: its metrics on the device against those on the CPU."""
    def metrics(device, dtype):
        out = f"{device}_{dtype}"
        with quietly():
            train_ppo.main([*ppo_flags(world, out=out), "--device", device, "--dtype", dtype])
        return read_metrics(world / out)[0]

    expected = metrics("cpu", "float32")
    for dtype, most in zip(DTYPES, (1e-3, 0.05, 0.5)):
        found = metrics(args.device, dtype)
        name = max(found, key=lambda name: abs(found[name] - expected[name]))
        difference = abs(found[name] - expected[name])
        table.add(f"one PPO iteration, {dtype}: largest difference of a metric from the CPU's",
                  f"{difference:.1e} ({name})", f"at most {most:g}", difference <= most)


def resume(table, args, world):
    """Two iterations in one go, and one that is resumed for the second: the same weights?"""
    def train(out, iterations, *more):
        train_ppo.main([*ppo_flags(world, out=out), "--iterations", str(iterations), "--device", args.device,
                        "--dtype", "float32_exact", *more])
    with quietly():
        train("whole", 2)
        train("resumed", 1)
        train("resumed", 2, "--resume", "--allow_changes")
    whole, resumed = (from_pretrained(world / out).state_dict() for out in ("whole", "resumed"))
    difference = max(float((whole[name] - resumed[name]).abs().max()) for name in whole)
    table.add("a resumed run: largest difference of a weight from a run in one go", f"{difference:.1e}", "at most 1e-4",
              difference <= 1e-4)


def embedded_run(table, args, folder):
    """The quick start on the device, with the gates of .ci/check.py. As a toy only two steps or so of each script."""
    model, reward = ["--model", f"{folder}/sft"], ["--reward", f"{folder}/rm"]
    flags = {"sft": [], "rm": model, "ppo": model + reward}
    for name, data in (("sft", "demonstrations"), ("rm", "comparisons"), ("ppo", "prompts")):
        if args.toy:
            lines = (ROOT / f"data/tiny/{data}.jsonl").read_text().splitlines(keepends=True)[:100]
            Path(folder, f"{data}.jsonl").write_text("".join(lines))
            length = "--iterations" if name == "ppo" else "--epochs"
            flags[name] += ["--data", f"{folder}/{data}.jsonl", "--heldout", "", length, "1"]
            flags[name] += ["--insist"] * (name == "ppo")       # a model of two steps does not end its answers
    start = time.perf_counter()
    for name in flags:
        command = [sys.executable, f"train_{name}.py", "--out", f"{folder}/{name}", "--device", args.device]
        subprocess.run([*command, *flags[name]], check=True, cwd=ROOT, stdout=sys.stderr)
    seconds = time.perf_counter() - start
    if args.toy:
        return table.add("embedded run, shortened", f"{seconds:.0f} s")
    check = [sys.executable, ".ci/check.py", f"{folder}/ppo/report.json"]
    holds = subprocess.run(check, cwd=ROOT, stdout=sys.stderr).returncode == 0
    table.add("embedded run, all three scripts and the assessment", f"{seconds:.0f} s",
              "goal 60 s, gates of .ci/check.py", holds)


# ---- fast ------------------------------------------------------------------------------------------------------------

def seconds_of(module, peer, settings, measure):
    """What a function of this benchmark takes on one side: infinity without enough memory, None without the peer."""
    if peer and not installed("transformers"):
        return None
    free()
    try:
        return measure((module.transformers if peer else module.ours)(settings))
    except torch.OutOfMemoryError:
        return math.inf


def add_rate(table, what, tokens, seconds, share, peer_seconds, gate):
    """A row of tokens a second. gate: how many times as fast as transformers it must be."""
    ratio = "" if peer_seconds is None else f", {peer_seconds / seconds:.2f}x transformers"
    said = f" (gate {gate}x)" if gate and ratio else ""
    rate = f"{tokens / seconds:,.0f} tokens/s" if seconds < math.inf else "not enough memory"
    table.add(what, rate, share + ratio + said, peer_seconds is None or peer_seconds / seconds >= gate)


def sampling(table, args, best):
    for size, batch in itertools.product(args.sizes, args.batches):
        settings = SimpleNamespace(size=size, batch=batch, prompt=32, new=args.new, dtype="bfloat16",
                                   device=args.device)
        ours, theirs = (seconds_of(generate, peer, settings, lambda run: best_seconds(run, 2))
                        for peer in (False, True))
        share = generate.floors(settings, best, "bfloat16")["reading the weights"] / ours
        add_rate(table, f"generate {args.new} tokens after 32, {size}, bfloat16, batch {batch}", batch * args.new, ours,
                 f"{share:.0%} of the memory's rate", theirs, {1: 1.5, 128: 1.2}.get(batch, 0) if size == "124M" else 0)


def training(table, args, best):
    for size, dtype in itertools.product(args.sizes, DTYPES):
        settings = SimpleNamespace(size=size, batch=8, tokens=args.tokens, dtype=dtype, device=args.device)
        set_precision(torch.device(args.device), dtype)

        def seconds(worker):
            settings.worker = worker
            return seconds_of(train_step, worker != "ours", settings, lambda made: train_step.measure(settings, *made))
        ours = seconds("ours")
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if args.device == "cuda" else ""
        kind = "bfloat16" if dtype == "bfloat16" else "float32"
        share = train_step.floors(settings, best, kind)["arithmetic"] / ours
        add_rate(table, f"forward and backward, {size}, 8 x {args.tokens} tokens, {dtype}", 8 * args.tokens, ours,
                 f"{share:.0%} of a square {kind} product's rate{memory}", seconds("transformers"),
                 1.0 if (size, dtype) == ("124M", "bfloat16") else 0)


def ppo(table, args):
    """The preset gpt2 at the first size: episodes a second, seconds of each phase, peak of memory."""
    from_sft = dict(temperature=0.7, stop="")             # what a run takes over from its SFT model
    cfg = train_ppo.Config(**{"device": args.device, **from_sft, **train_ppo.PRESETS["gpt2"], **args.preset})
    prompt = 64
    what = f"PPO, gpt2 preset, {args.sizes[0]}"
    free()
    last = list(ppo_iteration.iterations(args.sizes[0], cfg, prompt, args.iterations))[-1]
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in last.items())
    table.add(f"{what}: episodes a second", f"{cfg.batch_size / sum(last.values()):.1f}", f"seconds: {phases}")
    if args.device == "cuda":
        peak, said = torch.cuda.max_memory_allocated(), by_formula(args.sizes[0], cfg, prompt)
        table.add(f"{what}: peak of memory", f"{peak / 1e9:.1f} GB", f"by memory.py {said / 1e9:.1f} GB, within 25 %",
                  0.75 < said / peak < 1.25)


def by_formula(size, cfg, prompt):
    """The peak of train_ppo.py in bytes, by memory.py."""
    policy, reference, reward, value = (our_model(size, "meta", cfg.dtype) for _ in range(4))
    with torch.device("meta"):
        reward, value = ScalarHeadModel(reward).requires_grad_(False), ScalarHeadModel(value)
    examples = [Example(Row("", ""), [0] * prompt, [])]
    return memory.peak_bytes(cfg, examples, [policy, reference.requires_grad_(False), reward, value])


def trl(table, args):
    """One of TRL's iterations and one of ours, of 32 prompts."""
    if not installed("trl"):
        return
    settings = SimpleNamespace(size=args.sizes[0], batch=32, micro_batch=16, prompt=32, new=32, iterations=2,
                               dtype="bfloat16", device=args.device)
    ours, theirs = (min(run(settings)) for run in (ppo_iteration.ours, ppo_iteration.trl))
    table.add(f"PPO iteration, {settings.size}, 32 prompts, 32 + 32 tokens, bfloat16", f"{32 / ours:.1f} episodes/s",
              f"{theirs / ours:.2f}x TRL {importlib.metadata.version('trl')}")


# ---- all of it -------------------------------------------------------------------------------------------------------

def machine(args):
    card = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl") if installed(name)}
    return {"card": card, "cuda": torch.version.cuda, "python": platform.python_version(), "toy": args.toy, **versions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, mps or cpu")
    parser.add_argument("--toy", action="store_true", help="a small model and short runs, without gates on speed")
    parser.add_argument("--out", default="out/gpu.json", help="the file of results")
    args = parser.parse_args()
    vars(args).update(TOY if args.toy else WHOLE)
    start, table = now(), Table()
    pick_device(args.device)                            # an error if there is none
    logits(table, args)
    with tempfile.TemporaryDirectory() as folder:
        world = small_world(Path(folder))
        one_iteration(table, args, world)
        resume(table, args, world)
    with tempfile.TemporaryDirectory() as folder:
        embedded_run(table, args, folder)
    set_precision(torch.device(args.device), "float32")
    best = peaks(args.device, args.square)
    table.add("a square product", f"{best['bfloat16'] / 1e12:.3g} TFLOP/s in bfloat16",
              f"{best['float32'] / 1e12:.3g} in float32 (TF32 on cuda)")
    table.add("reading memory", f"{best['bytes'] / 1e9:,.0f} GB/s")
    sampling(table, args, best)
    training(table, args, best)
    ppo(table, args)
    trl(table, args)
    about = machine(args)
    title = ", ".join(f"{name} {value}" for name, value in about.items())
    print(f"\n{title}, {now() - start:.0f} s\n\n{table.markdown()}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps({**about, "rows": table.rows, "failed": table.failed}, indent=1))
    sys.exit(f"\nbelow the gate: {'; '.join(table.failed)}" if table.failed else 0)


if __name__ == "__main__":
    main()
