"""What labels are worth: reward models from fewer, noisier and otherwise collected comparisons, measured against gold.

    python data/tiny/labels.py run [--seeds 1 2 3] [--jobs 2]      trains what labels.jsonl has no row for yet
    python data/tiny/labels.py table                               prints the tables of data/README.md
    python data/tiny/labels.py write                               puts them into data/README.md
    python data/tiny/labels.py draw                                the curve of data/README.md (needs matplotlib)

Each seed has its own SFT model. For each condition annotate.py samples answers of that model and lets its annotators
rank them, and train_rm.py learns from the rankings. For some conditions PPO follows. A row of labels.jsonl holds what
one condition gave with one seed. All reward models are judged on the same pairs: those of comparisons_test.jsonl.
"""

import json
import math
import os
import re
import statistics
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
from annotate import CONSENSUS, Panel, agreement
from minirlhf.files.json_files import read_json, write_whole
from minirlhf.running.config import Parser
from minirlhf.files.errors import require, run_main
from minirlhf.running.runs import read_rows
from minirlhf.stats import rate, t_limit
from minirlhf.tools.experiment import read_results, run_script, summary
from minirlhf.tools.feedback.stats import agreements, cohen_kappa, longer_preferred, read_votes

ROWS, GUIDE, CURVE = HERE / "labels.jsonl", ROOT / "data/README.md", ROOT / "data/labels.png"
VISITS = 16000          # answers that a reward model reads in all, within 4 to 20 passes
ANSWERS = 128           # answers in a batch of the reward model, whatever K is
WINDOW = 8              # iterations of PPO that are averaged
LOCKS = defaultdict(threading.Lock)
SPENT = threading.local()       # .seconds that the scripts of this thread's row took


# ---- the conditions --------------------------------------------------------------------------------------------------

class Condition(NamedTuple):
    prompts: int = 1000
    k: int = 4                          # answers to each prompt
    panel: Panel = Panel()
    ppo: bool = False
    after: str = ""                     # a condition whose PPO model writes the answers; its comparisons are kept
    mixed: bool = False                 # the SFT model writes half of the answers to each prompt then


ONE, THREE = ("careful",), ("careful",) * 3
NOISES = {"near-perfect": 0.02, "default": 0.115, "large": 0.4}
SIZES = (100, 250, 500, 1000, 2000, 4000)
WITH_PPO = (100, 500, 1000, 4000)
BAD = ("random", "short", "adversarial")


def conditions():
    """{name: Condition}. A condition comes after the one that it builds on."""
    found = {f"{n} prompts": Condition(n, ppo=n in WITH_PPO) for n in SIZES}
    found |= {"2 answers": Condition(2000, k=2), "8 answers": Condition(500, k=8)}
    for name, noise in NOISES.items():
        found[f"{name}, one"] = Condition(1200, panel=Panel(ONE, noise))
        found[f"{name}, three"] = Condition(400, panel=Panel(THREE, noise))
    found |= {"coin, one": Condition(1200, panel=Panel(("random",))),
              "coin, three": Condition(400, panel=Panel(("random",) * 3))}
    for kind in BAD:
        for rule in CONSENSUS:
            found[f"third {kind}, {rule}"] = Condition(panel=Panel(("careful", "careful", kind), consensus=rule))
    found |= {"third left out": Condition(panel=Panel(("careful", "careful"))),
              "two rounds": Condition(500, ppo=True, after="500 prompts"),
              "two rounds, mixed": Condition(500, ppo=True, after="500 prompts", mixed=True)}
    return found


CONDITIONS = conditions()


# ---- running them ----------------------------------------------------------------------------------------------------

def run_here(folder, script, *words, **flags):
    """Runs a script whose output goes to a log in the folder, and adds up how long the scripts of a row take."""
    folder.mkdir(parents=True, exist_ok=True)
    SPENT.seconds += run_script(script, *words, folder=ROOT, log=folder / f"{Path(script).stem}.log", **flags)


def train(folder, stage, script, **flags):
    """A training run in folder/stage, unless it is there and finished."""
    if not (folder / stage / "report.json").exists():
        run_here(folder, script, out=folder / stage, **flags)
        (folder / stage / "state.pt").unlink(missing_ok=True)   # only for --resume, and most of the size
    return folder / stage


def build(name, seed, out):
    """Makes comparisons, reward model and PPO model of a condition, as far as they are missing -> their folder."""
    condition, folder = CONDITIONS[name], out / str(seed) / name.replace(", ", "_").replace(" ", "_")
    first = build(condition.after, seed, out) if condition.after else None
    with LOCKS[out / str(seed)]:
        sft = train(out / str(seed), "sft", "train_sft.py", seed=seed)
    with LOCKS[folder]:
        comparisons, rows = folder / "comparisons.jsonl", condition.prompts
        if not comparisons.exists():
            panel = condition.panel
            writers = [first / "ppo"] if first else []
            writers += [sft] if condition.mixed or not first else []
            run_here(folder, "data/tiny/annotate.py", "--annotators", *panel.annotators, "--model", *writers,
                       noise=panel.noise, consensus=panel.consensus, n=condition.prompts, n_test=0, k=condition.k,
                       seed=seed, out=folder)
        if first:
            rows += CONDITIONS[condition.after].prompts
            write_whole(folder / "both.jsonl", [(first / comparisons.name).read_bytes(), comparisons.read_bytes()])
            comparisons = folder / "both.jsonl"
        reward = train(folder, "rm", "train_rm.py", model=sft, data=comparisons, seed=seed,
                       heldout=HERE / "comparisons_test.jsonl", epochs=min(20, max(4, VISITS // (rows * condition.k))),
                       batch_size=ANSWERS // condition.k)
        if condition.ppo:
            train(folder, "ppo", "train_ppo.py", model=sft, reward=reward, seed=seed,
                  heldout=HERE / "prompts_test.jsonl")
    return folder


def measure(folder):
    """What the files of a condition say -> the measured part of a row."""
    votes = read_votes(folder / "comparisons.jsonl")                    # by "annotator 1", "annotator 2", ...
    row = {"rm_accuracy_gold": read_json(folder / "rm/report.json")["rm_accuracy_gold"],
           "agreement": agreement(read_results(folder / "comparisons.jsonl"))}
    for name in {vote["annotator"] for vote in votes}:
        own = [vote for vote in votes if vote["annotator"] == name]
        row[f"longer_{name[-1]}"] = rate(longer_preferred(own)).value
    for (a, b), both in agreements(votes).items():
        row[f"kappa_{a[-1]}{b[-1]}"] = cohen_kappa(*zip(*both))
    if (folder / "ppo").exists():
        row |= measure_ppo(folder / "ppo")
    return {name: round(row[name], 4) for name in sorted(row) if not math.isnan(row[name])}


def measure_ppo(folder):
    """Gold, score and KL on held-out prompts, and how far gold fell in training after its highest mean of WINDOW."""
    report = read_json(folder / "report.json")["ppo"]
    gold = [row["objective/gold"] for row in read_rows(folder / "metrics.jsonl")]
    means = [statistics.fmean(gold[i:i + WINDOW]) for i in range(max(1, len(gold) - WINDOW + 1))]
    return {"gold": report["gold"], "score": report["score"], "kl": report["kl"], "gold_fell": max(means) - means[-1]}


def run(args):
    """Every condition with every seed that has no row yet, --jobs at a time. Stopped and started again, it goes on."""
    os.environ["OMP_NUM_THREADS"] = "1"
    have, lock = {(row["condition"], row["seed"]) for row in read_results(args.rows)}, threading.Lock()

    def one(each):
        SPENT.seconds, (name, seed) = 0, each
        row = {"condition": name, "seed": seed, **measure(build(name, seed, args.out.resolve()))}
        line = json.dumps(row | {"seconds": round(SPENT.seconds)})
        with lock, open(args.rows, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:     # after an error it starts nothing new and lets what runs end
        list(pool.map(one, [each for each in product(args.only or CONDITIONS, args.seeds) if each not in have]))


# ---- the tables ------------------------------------------------------------------------------------------------------

ACCURACY, GOLD = ("accuracy against gold", "rm_accuracy_gold"), ("gold after PPO", "gold")
AGREE = ("two annotators agree", "agreement")


class Table(NamedTuple):
    head: str
    rows: dict                          # {label: (condition, the condition that it is compared with)}
    columns: tuple                      # (heading, name of the measured value)
    compared: dict                      # {heading of a column with differences: name of the measured value}
    note: str = ""                      # a sentence below the table


def tables():
    sizes = {f"{n:,}": (f"{n} prompts", "1000 prompts") for n in SIZES}
    doublings = {f"{n:,}": (f"{n} prompts", f"{before} prompts") for before, n in zip((SIZES[0], *SIZES), SIZES)}
    levels = {f"{level}, {noise}": level for level, noise in NOISES.items()} | {"coin-flip": "coin"}
    third = {"careful": "1000 prompts", "left out": "third left out"} | {
        f"{kind}, {rule} of three": f"third {kind}, {rule}" for rule in CONSENSUS for kind in BAD}
    rounds = {"500 in one round": "500 prompts", "1,000 in one round": "1000 prompts",
              "500, and 500 on PPO's answers": "two rounds",
              "500, and 500 on answers of PPO and SFT": "two rounds, mixed"}
    seen = {kind: (f"third {kind}, sum", "1000 prompts") for kind in BAD}
    return {
        "size": Table("prompts with four answers", doublings, (ACCURACY,), {"more than the row above": ACCURACY[1]}),
        "ppo": Table("prompts with four answers", {label: sizes[label] for label in (f"{n:,}" for n in WITH_PPO)},
                     (GOLD, ("gold lost in training", "gold_fell"), ("score", "score"), ("KL", "kl")),
                     {"more gold than 1,000": "gold"}),
        "answers": Table("answers to a prompt", {
            "2, to 2,000 prompts": ("2 answers", "2 answers"), "4, to 1,000 prompts": ("1000 prompts", "2 answers"),
            "8, to 500 prompts": ("8 answers", "2 answers")}, (ACCURACY,), {"more than 2": ACCURACY[1]}),
        "noise": Table("noise of one annotator", {
            label: (f"{level}, one", "default, one") for label, level in levels.items()}, (ACCURACY,),
            {"more than default": ACCURACY[1]}),
        "people": Table("noise of three annotators", {
            label: (f"{level}, three", f"{level}, one") for label, level in levels.items()}, (AGREE, ACCURACY),
            {"more than one annotator": ACCURACY[1]}),
        "bad": Table("third annotator, consensus", {label: (name, "1000 prompts") for label, name in third.items()},
                     (ACCURACY,), {"more than careful": ACCURACY[1]}),
        "signs": Table("third annotator", {"careful": ("1000 prompts",) * 2} | seen, (
            ("kappa of 1 and 2", "kappa_12"), ("of 1 and 3", "kappa_13"), ("of 2 and 3", "kappa_23"),
            ("1 prefers the longer", "longer_1"), ("3 does", "longer_3")), {}),
        "rounds": Table("prompts", {label: (name, "1000 prompts") for label, name in rounds.items()},
                        (ACCURACY, GOLD, ("gold lost in training", "gold_fell"), ("score", "score"), ("KL", "kl")),
                        {"more gold than 1,000 in one round": "gold"}),
    }


def values_of(rows, condition, metric):
    """{seed: value}"""
    return {row["seed"]: row[metric] for row in rows if row["condition"] == condition and metric in row}


def estimate(values):
    return summary(values, digits=3 if not values or abs(statistics.fmean(values)) < 2 else 1) or "-"


def difference(gaps):
    """A mean difference with its 95 % interval over seeds (Student's t). It says where 0 is inside the interval."""
    if len(gaps) < 2:
        return f"{gaps[0]:+.3f}" if gaps else "-"
    mean, half = statistics.fmean(gaps), t_limit(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean:+.3f} ± {half:.3f}" + " (could be 0)" * (abs(mean) <= half)


def line_of(table, rows, label):
    """One line of a table in Markdown. Differences are paired: each seed with itself."""
    condition, base = table.rows[label]
    cells = [estimate(list(values_of(rows, condition, metric).values())) for _, metric in table.columns]
    for metric in table.compared.values():
        these, those = values_of(rows, condition, metric), values_of(rows, base, metric)
        gaps = [these[seed] - those[seed] for seed in these if seed in those]
        cells.append("" if condition == base else difference(gaps))
    return f"| {' | '.join([label, *cells])} |"


def markdown(table, rows):
    """A table of the guide, and below it the number of seeds and the processor time of its runs."""
    headings = [table.head, *(heading for heading, _ in table.columns), *table.compared]
    used = {name for pair in table.rows.values() for name in pair}
    own = [row for row in rows if row["condition"] in used]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [line_of(table, rows, label) for label in table.rows]
    seeds, seconds = len({row["seed"] for row in own}), sum(row["seconds"] for row in own)
    spent = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    below = f"{seeds} seeds, {len(own)} runs, {spent} of one processor.{table.note}"
    return "\n".join([*lines, "", below])


def filled(text, rows, every=None, mark="table"):
    """The guide with every table between its markers, <!-- table NAME --> and <!-- end -->, made from these rows."""
    every = every or tables()
    found = re.findall(rf"<!-- {mark} (\w+) -->", text)
    require(sorted(found) == sorted(every), f"{GUIDE}: has the tables {', '.join(found)}, not {', '.join(every)}")
    return re.sub(rf"(<!-- {mark} (\w+) -->\n).*?(<!-- end -->)",
                  lambda place: f"{place[1]}{markdown(every[place[2]], rows)}\n{place[3]}", text, flags=re.DOTALL)


def draw(rows, out):
    """What the number of comparisons is worth, on a logarithmic scale: a point per seed, a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (label, metric) in zip(figure.subplots(1, 2), (ACCURACY, GOLD)):
        found = {n: list(values_of(rows, f"{n} prompts", metric).values()) for n in SIZES}
        found = {n: values for n, values in found.items() if values}
        axis.plot(list(found), [statistics.fmean(values) for values in found.values()], color="C0")
        axis.scatter([n for n in found for _ in found[n]], [value for n in found for value in found[n]], s=20)
        axis.set(xscale="log", xlabel="prompts with four answers", ylabel=label, ylim=(0.5, 1))
        axis.set_xticks(SIZES, [f"{n:,}" for n in SIZES], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=100)


# ---- the command line ------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("run", "table", "write", "draw"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="the measured rows [data/tiny/labels.jsonl]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of run [1 2 3]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, metavar="NAME", help="only these conditions [all]")
    parser.add_argument("--out", type=Path, default=ROOT / "out/labels", help="folder of all models [out/labels]")
    args = parser.parse_args(argv)
    if args.command == "run":
        return run(args)
    rows = read_results(args.rows)
    if args.command == "draw":
        return draw(rows, CURVE)
    if args.command == "write":
        return write_whole(GUIDE, [filled(GUIDE.read_text(encoding="utf-8"), rows).encode()])
    for name, table in tables().items():
        print(f"{name}\n\n{markdown(table, rows)}\n")


if __name__ == "__main__":
    run_main(main)
