"""The lab: one idea per patch, applied to a copy of this repository, trained on the embedded world, and measured.

    python -m minirlhf.tools.experiment list
    python -m minirlhf.tools.experiment run algo_grpo ablate_lam_0 --seeds 1 2 3 --jobs 2
    python -m minirlhf.tools.experiment mystery 3            trains with one of the bugs and does not say which
    python -m minirlhf.tools.experiment reveal 3

The patches are minirlhf/patches/*.patch. What stands above the diff says what the idea is, what to expect and which
scripts are run. "default" is the code without a patch, and every patch is compared with it on the same seeds. All runs
of a seed share one SFT model and one reward model, unless a patch trains its own. Each finished run is a line of
results.jsonl in --out. The same command again continues with what is missing.
"""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minirlhf.data import read_demonstrations, read_prompts
from minirlhf.files.jsonl import read_jsonl
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError, require, run_main
from minirlhf.tools import page
from minirlhf.assess import assess, gold_function, Sampling
from minirlhf.running.runs import read_options, read_report
from minirlhf.stats import t_limit, t_probability
from minirlhf.weights import from_pretrained, scalar_from_pretrained

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "minirlhf/patches"
SCRIPTS = {"train_sft.py": "sft", "train_rm.py": "rm", "train_ppo.py": "ppo"}
FIGURES = ("gold", "attributes_right", "win_rate", "kl", "perplexity", "rude", "grammatical", "length", "eos_rate")
TABLE = {"gold": 3, "attributes_right": 3, "win_rate": 3, "kl": 1, "perplexity": 2, "grammatical": 3, "seconds": 0}


# ---- patches ---------------------------------------------------------------------------------------------------------

class Patch(NamedTuple):
    name: str
    header: str     # what stands above the diff
    diff: str       # "" if the idea is a flag
    runs: list      # [(script, flags)], in order

    def field(self, name):
        """What a line of the header says after "name: ", "" if there is none."""
        found = re.search(rf"^{name}: (.*(?:\n(?!\w+: ).+)*)", self.header, flags=re.MULTILINE)
        return found[1] if found else ""


def read_patch(name):
    """The patch of this name, or the code as it is: "default"."""
    if name == "default":
        return Patch(name, "The scripts as they are.\n", "", [("train_ppo.py", [])])
    file = PATCHES / f"{name}.patch"
    require(file.is_file(), f"{name}: no such patch. `python -m minirlhf.tools.experiment list` names them")
    header, start, diff = file.read_text().partition("\n--- a/")
    patch = Patch(name, header, start[1:] + diff, [])
    commands = [shlex.split(command) for command in patch.field("run").split(",")]
    require(all(command and command[0] in SCRIPTS for command in commands),
            f"{file}: needs a line \"run: \" that names one or more of {', '.join(SCRIPTS)}")
    return patch._replace(runs=[(script, flags) for script, *flags in commands])


def names():
    return sorted(file.stem for file in PATCHES.glob("*.patch"))


def hunks_of(patch):
    """{file: [(first line, old lines, new lines)]}."""
    files, hunks = {}, None
    for line in patch.diff.splitlines():
        if line.startswith("+++ b/"):
            hunks = files.setdefault(line[6:], [])
        elif line.startswith("@@ "):
            hunks.append((int(re.match(r"@@ -(\d+)", line)[1]), [], []))
        elif hunks and line[:1] in " -+" and not line.startswith("--- a/"):
            _, old, new = hunks[-1]
            old += [line[1:]] * (line[:1] in " -")              # an empty line of context may have lost its blank
            new += [line[1:]] * (line[:1] in " +")
    return files


def apply_patch(patch, folder):
    """Changes the files of a folder. Every line must fit. Lines may have moved: the nearest place that fits counts."""
    for file, hunks in hunks_of(patch).items():
        require((folder / file).is_file(), f"{patch.name}: there is no {file}")
        lines, shift, done = (folder / file).read_text().splitlines(), 0, 0
        for first, old, new in hunks:
            places = [i for i in range(done, len(lines) - len(old) + 1) if lines[i:i + len(old)] == old]
            require(places, f"{patch.name} does not fit {file}: what it changes at line {first} is not there")
            at = min(places, key=lambda place: abs(place - (first - 1 + shift)))
            lines[at:at + len(old)] = new
            shift, done = at - (first - 1) + len(new) - len(old), at + len(new)
        (folder / file).write_text("\n".join(lines) + "\n")


# ---- one run ---------------------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """One patch with one seed."""
    patch: Patch
    row: dict           # how the run is known in results.jsonl: patch (for a mystery not its name), seed, iterations
                        # (0: as many as the patch says) and the hash of the code
    out: Path
    loud: bool          # the scripts print to the terminal and not to log.txt

    @property
    def folder(self):
        """Where its runs are."""
        name, seed, iterations = (self.row[key] for key in ("patch", "seed", "iterations"))
        return self.out / (f"{name}_{iterations}" if iterations else name) / str(seed)

    def is_row(self, row):
        return self.row.items() <= row.items()


def copy_tree(patch, tree):
    """A copy of the scripts and all they need, as they are now, with the patch applied -> a hash of the code."""
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("minirlhf", "data"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tree)
    apply_patch(patch, tree)
    code = [*tree.glob("*.py"), *tree.glob("minirlhf/*.py"), *tree.glob("minirlhf/running/*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(code))).hexdigest()[:8]


def run_script(tree, script, flags, log):
    """Runs a script of a copied tree. UserError with its last line if it fails. log: a file, None for the terminal."""
    with open(log or os.devnull, "a") as file:
        done = subprocess.run([sys.executable, script, *map(str, flags)], cwd=tree, text=True,
                              stdout=file if log else None, stderr=subprocess.PIPE)
    error = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
    require(done.returncode == 0, f"{script}: {error.removeprefix('error: ')}")


def shared_models(seed, out, loud):
    """The SFT model and the reward model of a seed, trained once with the code as it is -> their folders."""
    if all(read_options(f"out/{kind}").get("seed") == seed and read_report(f"out/{kind}") for kind in ("sft", "rm")):
        return Path("out/sft").resolve(), Path("out/rm").resolve()
    sft, rm = (out / "models" / str(seed) / kind for kind in ("sft", "rm"))
    for folder, script, flags in ((sft, "train_sft.py", []), (rm, "train_rm.py", ["--model", sft])):
        if not read_report(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            run_script(ROOT, script, [*flags, "--seed", seed, "--out", folder],
                       None if loud else folder.parent / "log.txt")
    return sft, rm


def run_job(job):
    """Trains and measures -> a row of results.jsonl. A run that ends with an error has only "failed" in its row."""
    seed, iterations, folder = job.row["seed"], job.row["iterations"], job.folder
    tree = job.out / "trees" / f"{folder.parent.name}_{seed}"
    copy_tree(job.patch, tree)
    folder.mkdir(parents=True, exist_ok=True)
    (sft, rm), begun = shared_models(seed, job.out, job.loud), time.time()
    (tree / "out").mkdir()
    for kind, model in (("sft", sft), ("rm", rm)):              # where the scripts look for them
        (tree / "out" / kind).symlink_to(model)
    for script, flags in job.patch.runs:
        kind = SCRIPTS[script]
        last, link = folder / kind, tree / "out" / kind
        shorter = ["--iterations", iterations] if iterations and kind == "ppo" else []
        shutil.rmtree(last, ignore_errors=True)
        try:
            run_script(tree, script, [*flags, *shorter, "--seed", seed, "--out", last],
                       None if job.loud else folder / "log.txt")
        except UserError as error:
            return job.row | {"failed": str(error)}
        link.unlink(missing_ok=True)                            # a script after this one builds on what it made
        link.symlink_to(last)
    seconds = round(time.time() - begun)
    report = read_report(last) if "ppo" in read_report(last) else measure(last, sft, rm, seed)
    figures = report["ppo"] | {"win_rate": report["win_rate"], "kl": report["kl"]}
    shutil.rmtree(tree)
    return job.row | {"seconds": seconds} | {name: round(figures[name], 4) for name in FIGURES}


def measure(policy, sft, rm, seed):
    """The assessment of a policy that train_ppo.py did not train, on the embedded world's held-out prompts."""
    prompts = ROOT / "data/tiny/prompts_test.jsonl"
    gold, facts_of = gold_function("auto", prompts)
    policy, reference = (from_pretrained(str(folder)) for folder in (policy, sft))
    demonstrations = read_demonstrations(prompts.with_name("demonstrations_test.jsonl"))
    return assess(policy, reference, scalar_from_pretrained(str(rm)), load_tokenizer(str(sft)), read_prompts(prompts),
                  Sampling(seed=seed), gold, facts_of, demonstrations)


# ---- all of them -----------------------------------------------------------------------------------------------------

def read_results(file):
    return [row for _, row in read_jsonl(file)] if file.exists() else []


def run_all(jobs, results, at_once):
    """Runs what results.jsonl does not have yet, and adds a line for each as soon as it is done."""
    missing = [job for job in jobs if not any(map(job.is_row, read_results(results)))]
    if at_once > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda seed: shared_models(seed, jobs[0].out, jobs[0].loud),
                      sorted({job.row["seed"] for job in missing})))
        for row in tqdm(pool.map(run_job, missing), "experiments", len(missing), disable=None):
            with open(results, "a") as file:
                file.write(json.dumps(row) + "\n")
            said = row.get("failed") or f"{row['seconds']} s, gold {row['gold']:.3f}, KL {row['kl']:.1f}"
            tqdm.write(f"{row['patch']}, seed {row['seed']}: {said}")
    return [row for row in read_results(results) if any(job.is_row(row) for job in jobs)]


def summary(values, digits=3):
    """Mean, and half of the 95 % interval over seeds by Student's t, as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    half = t_limit(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def against_default(own, default):
    """The paired difference in gold to the default on the same seeds, with its interval and its p, as text."""
    gaps = [row["gold"] - default[row["seed"]]["gold"] for row in own if row["seed"] in default]
    if len(gaps) < 2:
        return f"{gaps[0]:+.3f}" if gaps else ""
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 or 1e-9
    mean, half = statistics.fmean(gaps), t_limit(len(gaps) - 1) * error
    p = t_probability(mean / error, len(gaps) - 1)
    said = f"p {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}], {said}"


def table(rows, patches):
    """Lines of a Markdown table: a row per patch, means over seeds, and the difference in gold to the default."""
    default = {row["seed"]: row for row in rows if row["patch"] == "default" and "gold" in row}
    heads = " | ".join(["", "seeds", *TABLE, "gold minus default"]).replace("_", " ")
    lines = [f"|{heads} |", "|" + "---|" * (len(TABLE) + 3)]
    for name in patches:
        own = [row for row in rows if row["patch"] == name and "gold" in row]
        failed = next((row["failed"] for row in rows if row["patch"] == name and "failed" in row), "")
        cells = [summary([row[figure] for row in own], digits) for figure, digits in TABLE.items()]
        cells[0] = cells[0] or failed
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} | "
                     f"{against_default(own, default) if name != 'default' else ''} |")
    return lines


# ---- the command line ------------------------------------------------------------------------------------------------

def hidden_bug(number):
    """The bug of this number. The order is a fixed shuffle, so that the file names do not give it away."""
    bugs = [name for name in names() if name.startswith("bug_")]
    require(1 <= number <= len(bugs), f"there are mysteries 1 to {len(bugs)}, not {number}")
    random.Random(2019).shuffle(bugs)
    return read_patch(bugs[number - 1])


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.experiment", description=__doc__)
    parser.add_argument("command", choices=("list", "run", "mystery", "reveal"))
    parser.add_argument("names", nargs="*", help="patches for `run`, a number for `mystery` and `reveal`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="[1]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores [1]")
    parser.add_argument("--iterations", type=int, default=0, help="of PPO [as the script says; for `mystery` 20]")
    parser.add_argument("--out", default="out/experiments", help="the folder of all runs [out/experiments]")
    args = parser.parse_args(argv)
    if args.command == "list":
        print("\n".join(f"{name:<28}{' '.join(read_patch(name).header.split())[:88]}" for name in names()))
    elif args.command == "run":
        require(args.names, "`run` needs the names of patches, or \"default\"")
        compare([(name, read_patch(name)) for name in args.names if name != "default"], args)
    else:
        require(len(args.names) == 1 and args.names[0].isdigit(), f"`{args.command}` needs a number")
        bug = hidden_bug(int(args.names[0]))
        if args.command == "reveal":
            print(f"{bug.name}\n\n{bug.header}\n{bug.diff}")
            for sign in read_results(PATCHES / "signs.jsonl"):
                if sign["patch"] == bug.name and "column" in sign:
                    print("In the log: {column} is {bug} at iteration {iteration}, {good} in a good run".format(**sign))
        else:
            args.iterations = args.iterations or 20
            compare([(f"mystery_{args.names[0]}", bug)], args)


def compare(patches, args):
    """Runs the default and these (label, Patch) on all seeds, and writes the table and the page of curves."""
    out, every = Path(args.out).resolve(), [("default", read_patch("default")), *patches]
    code = {label: copy_tree(patch, out / "trees" / label) for label, patch in every}   # does every patch fit?
    shutil.rmtree(out / "trees")
    jobs = [Job(patch, {"patch": label, "seed": seed, "iterations": args.iterations, "code": code[label]}, out,
                args.jobs == 1) for seed in args.seeds for label, patch in every]
    rows = run_all(jobs, out / "results.jsonl", args.jobs)
    print("\n".join(["", *table(rows, [label for label, _ in every])]))
    runs = [str(run) for job in jobs[:len(every)] if (run := job.folder / "ppo").is_dir()]
    if runs:
        page.main([*runs, "--out", str(out / f"{every[-1][0]}.html")])


if __name__ == "__main__":
    run_main(main)
