"""What the benchmarks share: two programs run in turn in processes of their own, and what the machine can do at best.

Each benchmark is one file for both sides. `--worker NAME` measures that side in this process and prints one line of JSON;
without it the file starts itself again and again, by turns with our interpreter and with --peer_python, and compares.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SIZES = {"124M": dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
         "774M": dict(vocab_size=50257, n_positions=1024, n_embd=1280, n_layer=36, n_head=20),
         "tiny": dict(vocab_size=1024, n_positions=128, n_embd=128, n_layer=4, n_head=4),
         "smollm2": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
                         rope_theta=100_000.0, tie_word_embeddings=True)}


def arguments(doc, **defaults):
    """The flags every benchmark has, and its own: name=default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help="measure this side in this process and print JSON")
    parser.add_argument("--peer_python", help="the interpreter of the peer's environment")
    for name, default in dict(size="124M", device="cpu", dtype="float32", peer_dtype="float32", repeats=3, threads=2,
                              **defaults).items():
        parser.add_argument(f"--{name}", default=default, type=type(default), help=f"[{default}]")
    return parser.parse_args()


def our_model(size, device="cpu", dtype="float32"):
    from minirlhf.gpt2 import GPT2, GPT2Config
    from minirlhf.llama import Llama, LlamaConfig
    torch.manual_seed(0)
    with torch.device(device):
        model = (Llama(LlamaConfig("llama", **SIZES[size], n_tokens=49152)) if size == "smollm2" else
                 GPT2(GPT2Config(**SIZES[size])))
    model.dtype = dtype
    return model


def their_config(size, **more):
    """The same architecture for transformers, without an EOS."""
    import transformers
    kind = transformers.LlamaConfig if size == "smollm2" else transformers.GPT2Config
    return kind(**SIZES[size], bos_token_id=None, eos_token_id=None, **more)


def random_ids(size, B, T, device="cpu"):
    return torch.randint(SIZES[size]["vocab_size"], (B, T), generator=torch.Generator().manual_seed(0)).to(device)


def n_weights(size):
    """Weights of all matrices that a token goes through, the head included."""
    named = our_model(size, "meta").named_parameters()
    return sum(p.numel() for name, p in named if p.dim() == 2 and name != "wpe.weight")


def now():
    """Seconds, once the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(function, n):
    """Wall-clock seconds of the fastest of n calls, after one that does not count."""
    function()
    times = []
    for _ in range(n):
        start = now()
        function()
        times.append(now() - start)
    return min(times)


@torch.inference_mode()
def peaks(device="cpu", n=2048):
    """This process at its best: FLOP/s of an n-cubed product by dtype (by MKL or oneDNN, whichever is faster; "mkl" is
    what a @ b makes in float32), bytes/s of reading 1 GB."""
    from minirlhf.running.cpu import linear
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        own, other = (2 * n**3 / best_seconds(product, 8) for product in (lambda: linear(a, b), lambda: a @ b))
        found[str(dtype).removeprefix("torch.")] = max(own, other)
        found.setdefault("mkl", other)
    x = torch.ones(2**28, device=device)
    return found | {"bytes": 4 * x.numel() / best_seconds(lambda: x.sum(), 4)}


def report(seconds, **more):
    """What a worker prints; ru_maxrss is in KB on Linux."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, **more}))


def run_worker(python, name, dtype, args):
    """One process of one side -> what it reported."""
    flags = [f"--{key}={value}" for key, value in vars(args).items() if key not in ("worker", "peer_python", "dtype") and value]
    command = [python, sys.argv[0], f"--worker={name}", f"--dtype={dtype}", *flags]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def compare(args, title, peer, unit, amount, floors):
    """Runs both sides by turns and prints a row of the README's table.

    unit, amount: what is done a run, "tokens" for instance; floors(args, peaks, dtype) -> {name: seconds that the
    arithmetic or the memory need at least}.
    """
    ours, theirs = [], []
    for _ in range(args.repeats):
        ours.append(run_worker(sys.executable, "ours", args.dtype, args))
        if args.peer_python:
            theirs.append(run_worker(args.peer_python, peer, args.peer_dtype, args))
    torch.set_num_threads(args.threads)
    best = peaks()
    seconds, memory = median(ours, "seconds"), median(ours, "peak_bytes")
    print(f"\n{title}; {args.threads} threads, torch {torch.__version__}, {platform.processor() or platform.machine()}, {date.today()}")
    print(f"  peaks: {best['float32'] / 1e9:.0f} GFLOP/s float32 ({best['mkl'] / 1e9:.0f} by MKL), {best['bfloat16'] / 1e9:.0f} bfloat16, "
          f"{best['bytes'] / 1e9:.0f} GB/s")
    show("minirlhf", args.dtype, ours, amount, unit)
    for name, floor in floors(args, best, args.dtype).items():
        print(f"  {name}: {floor:.3g} s, {floor / seconds:.2f} of the time")
    if theirs:
        show(peer, args.peer_dtype, theirs, amount, unit)
        print(f"| {title} | {peer} {theirs[0]['version']}, {args.peer_dtype} | {amount / median(theirs, 'seconds'):.3g} | "
              f"{amount / seconds:.3g} {unit}/s | **{median(theirs, 'seconds') / seconds:.2f}x** | "
              f"{memory / median(theirs, 'peak_bytes'):.2f} |")


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def show(name, dtype, runs, amount, unit):
    times = ", ".join(f"{run['seconds']:.3g}" for run in runs)
    print(f"  {name} ({dtype}): {times} s; median {amount / median(runs, 'seconds'):.3g} {unit}/s; "
          f"peak memory {median(runs, 'peak_bytes') / 1e9:.2f} GB")
