"""Whether cost grows as it should, on this machine; each check runs in a process of its own and prints a line:

    python tests/bench/scaling.py rollout       # seconds per token of 256 sampled ones against 64: at most 1.3x
    python tests/bench/scaling.py update        # peak memory of PPO on 16 and on 128 rows with a micro-batch of 4: the same
    python tests/bench/scaling.py sft           # train_sft.py on 500 and on 5,000 demonstrations: ten times as long
    python tests/bench/scaling.py rows          # 1,000,000 short demonstrations read and tokenised: under 60 s and 3 GB
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import best_seconds, our_model, random_ids

import torch

ROOT = Path(__file__).parents[2]


def rollout():
    from minirlhf.generate import generate
    model, ids = our_model("124M"), random_ids("124M", 16, 32)
    mask = torch.ones_like(ids, dtype=torch.bool)
    per_token = {R: best_seconds(lambda: generate(model, ids, mask, torch.rand(16, R), stop=(-1, 0)), 2) / R for R in (64, 256)}
    print(f"rollout, 124M, batch 16: {1e3 * per_token[64]:.1f} ms per token at 64, {1e3 * per_token[256]:.1f} at 256: "
          f"{per_token[256] / per_token[64]:.2f}x")


def update():
    script = [sys.executable, ROOT / "tests/bench/ppo_iteration.py", "--worker=ours", "--size=tiny", "--micro_batch=4", "--iterations=1"]
    peak = {B: json.loads(subprocess.run([*script, f"--batch={B}"], check=True, capture_output=True).stdout)["peak_bytes"]
            for B in (16, 128)}
    print(f"PPO, tiny, micro-batch 4: {peak[16] / 1e9:.3f} GB with 16 rows, {peak[128] / 1e9:.3f} GB with 128")


def sft():
    lines, seconds = (ROOT / "data/tiny/demonstrations.jsonl").read_text().splitlines(keepends=True), {}
    with tempfile.TemporaryDirectory() as folder:
        for n in (500, 5000):
            data, out = Path(folder, f"{n}.jsonl"), Path(folder, f"out{n}")
            data.write_text("".join(lines[:n]))
            command = [sys.executable, ROOT / "train_sft.py", f"--data={data}", "--heldout=", f"--out={out}", "--epochs=4"]
            subprocess.run(command, check=True, capture_output=True)
            seconds[n] = json.loads((out / "report.json").read_text())["seconds"]
    print(f"SFT: {seconds[500]:.1f} s on 500 demonstrations, {seconds[5000]:.1f} s on 5,000: {seconds[5000] / seconds[500]:.1f}x")


def rows():
    from minirlhf.data import encode_rows, read_demonstrations
    from minirlhf.files.tokenizer import load_tokenizer
    lines = [json.loads(line) for line in open(ROOT / "data/tiny/demonstrations.jsonl")]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for i in range(1_000_000):                              # a million different prompts
            row = lines[i % len(lines)]
            file.write(json.dumps({**row, "prompt": f"{row['prompt']} {i}"}) + "\n")
        file.flush()
        start = time.perf_counter()
        examples = encode_rows(read_demonstrations(file.name), load_tokenizer(ROOT / "data/tiny"), positions=1024)
    tokens = sum(len(e.prompt) + len(e.responses[0]) for e in examples) / len(examples)
    print(f"reading {len(examples):,} rows of {tokens:.0f} tokens: {time.perf_counter() - start:.0f} s, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    torch.set_num_threads(2)
    {"rollout": rollout, "update": update, "sft": sft, "rows": rows}[sys.argv[1]]()
