"""The lab: one idea per patch, applied to a copy of this repository, trained on the embedded world, and measured.

    python -m minirlhf.tools.experiment list
    python -m minirlhf.tools.experiment run algo_grpo ablate_lam_0 --seeds 1 2 3 --jobs 2
    python -m minirlhf.tools.experiment mystery 3            trains with one of the bugs and does not say which
    python -m minirlhf.tools.experiment mystery 3 --blind    without the log's warnings. Asks for your diagnosis first
    python -m minirlhf.tools.experiment reveal 3

The patches are minirlhf/patches/*.patch. What stands above the diff says what the idea is, what to expect, and in the
line "run: " which scripts are run. A patch whose idea is a flag has no diff, or names the patch whose diff it shares in
a line "diff: ". "default" is the code without a patch, and every patch is compared with it on the same seeds. All runs
of a seed share one SFT model and one reward model, unless a patch trains its own. Each finished run is a line of
results.jsonl in --out. The same command again continues with what is missing.

A bug has its number in a line "mystery: ", so numbers stay as they are when somebody adds a patch.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minirlhf.assess import Sampling, assess, gold_function
from minirlhf.data import read_demonstrations, read_prompts
from minirlhf.files.errors import UserError, require, run_main
from minirlhf.files.jsonl import read_jsonl
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.running.config import Parser
from minirlhf.running.runs import read_options, read_report
from minirlhf.stats import t_limit, t_probability
from minirlhf.tools import page
from minirlhf.weights import from_pretrained, scalar_from_pretrained

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "minirlhf/patches"
SCRIPTS = {"train_sft.py": "sft", "train_rm.py": "rm", "train_ppo.py": "ppo"}
TABLE = {"gold": 3, "attributes_right": 3, "win_rate": 3, "kl": 1, "perplexity": 2, "grammatical": 3, "seconds": 0}
FIGURES = ("gold", "attributes_right", "win_rate", "kl", "perplexity", "rude", "grammatical", "length", "eos_rate")


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
            f"{file}: above the diff it needs the idea and a line like \"run: train_rm.py --epochs 2, train_ppo.py\" "
            "that says which scripts to run")
    shared = patch.field("diff") and read_patch(patch.field("diff")).diff
    return patch._replace(diff=patch.diff or shared, runs=[(script, flags) for script, *flags in commands])


def every_patch():
    """All patches by name. One without its header gets a warning and is left out."""
    found = {}
    for file in sorted(PATCHES.glob("*.patch")):
        try:
            found[file.stem] = read_patch(file.stem)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    return found


def hidden_bug(number):
    """The bug with this number."""
    bugs = {patch.field("mystery"): patch for patch in every_patch().values() if patch.field("mystery")}
    require(number in bugs, f"there are the mysteries {', '.join(sorted(bugs, key=int))}, not {number}")
    return bugs[number]


def apply_patch(patch, folder):
    """Changes the files of a folder as `git apply` does: every line must fit, but lines may have moved."""
    if patch.diff:
        apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}  # from a repository around it
        done = subprocess.run(["git", "apply", "--unidiff-zero", "-"], cwd=folder, input=patch.diff, env=apart,
                              text=True, capture_output=True)
        said = done.stderr.strip().replace("\nerror:", ",").removeprefix("error: ")
        require(done.returncode == 0, f"{patch.name} does not fit (are your own changes undone?): {said}")


# ---- one run ---------------------------------------------------------------------------------------------------------

def copy_tree(patch, tree):
    """A copy of the scripts and all they need, as they are now, with the patch applied -> a hash of the code."""
    shutil.rmtree(tree, ignore_errors=True)         # of a run that was stopped
    for name in ("minirlhf", "data"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tree)
    apply_patch(patch, tree)
    code = [*tree.glob("*.py"), *tree.glob("minirlhf/*.py"), *tree.glob("minirlhf/running/*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(code))).hexdigest()[:8]


def run_script(script, *words, folder=None, log=None, **flags):
    """Runs a script of this repository, or of a copy, as from the command line -> how many seconds it took.

    folder: where it runs [here]. log: a file, None for the terminal. UserError has its last line if it fails. PPO goes
    on whatever its checks say: an experiment may want to see a run go wrong.
    """
    words = (*words, "--insist") if Path(script).name == "train_ppo.py" else words
    argv, begun = [*map(str, words), *(f"--{name}={value}" for name, value in flags.items())], time.monotonic()
    with open(log or os.devnull, "a", encoding="utf-8") as file:
        print(f"\n$ python {script} {' '.join(argv)}", file=file if log else None, flush=True)
        done = subprocess.run([sys.executable, ROOT / script, *argv], cwd=folder, text=True,
                              stdout=file if log else None, stderr=subprocess.PIPE)
        print(done.stderr, end="", file=file if log else sys.stderr)
    said = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
    require(done.returncode == 0, f"{Path(script).name} stopped with exit code {done.returncode}: {said}")
    return time.monotonic() - begun


def shared_models(seed, out):
    """The SFT model and the reward model of a seed, trained once with the code as it is -> their folders by kind."""
    if all(read_options(f"out/{kind}").get("seed") == seed and read_report(f"out/{kind}") for kind in ("sft", "rm")):
        return {kind: Path("out", kind).resolve() for kind in ("sft", "rm")}
    models = {kind: out / "models" / str(seed) / kind for kind in ("sft", "rm")}
    for kind, flags in (("sft", {}), ("rm", {"model": models["sft"]})):
        if not read_report(models[kind]):
            run_script(f"train_{kind}.py", seed=seed, out=models[kind], **flags)
    return models


def run_patch(patch, row, models, folder, log):
    """Trains and measures -> the row with its figures. A run that ends with an error has only "failed" in its row.

    row: how the run is known: patch (for a mystery not its name), seed, iterations (0: as many as the patch says) and
    code, a hash. models: from shared_models. folder: of its runs. log: a file, None for the terminal.
    """
    tree, begun = folder / "tree", time.monotonic()
    copy_tree(patch, tree)
    (tree / "out").mkdir()
    for kind, model in models.items():                          # where the scripts look for them
        (tree / "out" / kind).symlink_to(model)
    for script, flags in patch.runs:
        kind = SCRIPTS[script]
        last, link = folder / kind, tree / "out" / kind
        shorter = ["--iterations", row["iterations"]] if row["iterations"] and kind == "ppo" else []
        shutil.rmtree(last, ignore_errors=True)
        try:
            run_script(tree / script, *flags, *shorter, folder=tree, log=log, seed=row["seed"], out=last)
        except UserError as error:
            return row | {"failed": str(error)}
        link.unlink(missing_ok=True)                            # a script after this one builds on what it made
        link.symlink_to(last)
    seconds = round(time.monotonic() - begun)
    report = read_report(last) if "ppo" in read_report(last) else measure(last, models, row["seed"])
    shutil.rmtree(tree)
    figures = report["ppo"] | {"win_rate": report["win_rate"], "kl": report["kl"]}
    return row | {"seconds": seconds} | {name: round(figures[name], 4) for name in FIGURES}


def measure(policy, models, seed):
    """The assessment of a policy that train_ppo.py did not train, on the embedded world's held-out prompts."""
    prompts = ROOT / "data/tiny/prompts_test.jsonl"
    gold, facts_of = gold_function("auto", prompts)
    demonstrations = read_demonstrations(prompts.with_name("demonstrations_test.jsonl"))
    return assess(from_pretrained(str(policy)), from_pretrained(str(models["sft"])),
                  scalar_from_pretrained(str(models["rm"])), load_tokenizer(str(models["sft"])), read_prompts(prompts),
                  Sampling(seed=seed), gold, facts_of, demonstrations)


# ---- results ---------------------------------------------------------------------------------------------------------

def read_results(file):
    return [row for _, row in read_jsonl(file)] if file.exists() else []


def run_missing(patches, rows, out, at_once, blind):
    """Runs what results.jsonl does not have yet, and adds a line for each as soon as it is done -> all of its lines.

    blind: what a run prints is shown when it has ended, without its warnings.
    """
    done, seeds = read_results(out / "results.jsonl"), sorted({row["seed"] for row in rows})
    rows = [row for row in rows if not any(row.items() <= each.items() for each in done)]
    models = {seed: shared_models(seed, out) for seed in seeds if any(row["seed"] == seed for row in rows)}
    if at_once > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))

    def run_one(row):
        folder = folder_of(row, out)
        log = folder / "log.txt" if at_once > 1 or blind else None
        return run_patch(patches[row["patch"]], row, models[row["seed"]], folder, log)

    with ThreadPoolExecutor(at_once) as pool:
        for row in tqdm(pool.map(run_one, rows), "experiments", len(rows), disable=None):
            with open(out / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if blind:
                # A line that begins with "$ " is the command, whose flags may be the bug.
                tqdm.write("".join(line for line in open(folder_of(row, out) / "log.txt")
                                   if "warning: " not in line and not line.startswith("$ ")))
            said = row.get("failed") or f"{row['seconds']} s, gold {row['gold']:.3f}, KL {row['kl']:.1f}"
            tqdm.write(f"{row['patch']}, seed {row['seed']}: {said}")
            done.append(row)
    return done


def folder_of(row, out):
    """Where the runs of a row are."""
    return out / f"{row['patch']}{'_' * bool(row['iterations'])}{row['iterations'] or ''}" / str(row["seed"])


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
        own = [row for row in rows if row["patch"] == name]
        good = [row for row in own if "gold" in row]
        cells = [summary([row[figure] for row in good], digits) for figure, digits in TABLE.items()]
        cells = cells if good else [own[0]["failed"], *cells[1:]]
        gap = against_default(good, default) if name != "default" else ""
        lines.append(f"| {' | '.join([name, str(len(good)), *cells, gap])} |")
    return lines


# ---- the command line ------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.experiment", description=__doc__)
    parser.add_argument("command", choices=("list", "run", "mystery", "reveal"))
    parser.add_argument("names", nargs="*", help="patches for `run`, a number for `mystery` and `reveal`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="[1]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores [1]")
    parser.add_argument("--iterations", type=int, default=0, help="of PPO [as the script says; for `mystery` 20]")
    parser.add_argument("--blind", action="store_true", help="hide all warnings; `mystery` then asks for a diagnosis")
    parser.add_argument("--out", default="out/experiments", help="the folder of all runs [out/experiments]")
    args = parser.parse_args(argv)
    require(args.names or args.command == "list", f"`{args.command}` needs "
            + ("the names of patches, or \"default\"" if args.command == "run" else "a number"))
    if args.command == "list":
        for name, patch in every_patch().items():
            print(f"{name:<28}{' '.join(patch.header.split())[:88]}")
    elif args.command == "run":
        compare({name: read_patch(name) for name in args.names}, args)
    elif args.command == "mystery":
        args.iterations = args.iterations or 20
        runs = compare({f"mystery_{args.names[0]}": hidden_bug(args.names[0])}, args)
        if args.blind and sys.stdin.isatty() and input("\nWhat is wrong, and what shows it? (Just Enter: not yet) "):
            print("\n".join(f"[{step}] warning: {text}" for run in runs for step, text in page.warnings_of(run)))
            reveal(hidden_bug(args.names[0]))
    else:
        reveal(hidden_bug(args.names[0]))


def reveal(bug):
    print(f"{bug.name}\n\n{bug.header}\n{bug.diff}")
    for sign in read_results(PATCHES / "signs.jsonl"):
        if sign["patch"] == bug.name and "column" in sign:
            print("In the log: {column} is {bug} at iteration {iteration}, {good} in a good run".format(**sign))


def compare(patches, args):
    """Runs the default and these {label: Patch} on all seeds, and writes the table and the page of curves.

    Returns what is on the page: the runs of the first seed, as page.read_folder has them.
    """
    out, patches = Path(args.out).resolve(), {"default": read_patch("default"), **patches}
    with tempfile.TemporaryDirectory() as empty:                # does every patch fit?
        code = {label: copy_tree(patch, Path(empty, label)) for label, patch in patches.items()}
    rows = [{"patch": label, "seed": seed, "iterations": args.iterations, "code": code[label]}
            for seed, label in product(args.seeds, patches)]
    done = run_missing(patches, rows, out, args.jobs, args.blind)
    own = [each for each in done if any(row.items() <= each.items() for row in rows)]
    print("\n".join(["", *table(own, patches)]))
    runs = [page.read_folder(folder_of(row, out) / "ppo") | {"name": row["patch"].replace("_", " ")}
            for row in rows[:len(patches)] if (folder_of(row, out) / "ppo").is_dir()]
    page.write_page(out / f"{list(patches)[-1]}.html", ", ".join(run["name"] for run in runs), runs,
                    [table for run in runs for table in page.report_tables(run)], blind=args.blind)
    print(f"wrote {out / list(patches)[-1]}.html")
    return runs


if __name__ == "__main__":
    run_main(main)
