"""Writes the tables of patches/README.md, DETAILS.md and COURSE.md (in minirlhf/) from results.jsonl and signs.jsonl.

    python tests/lab_tables.py

results.jsonl is what `experiment run` writes. signs.jsonl says of each bug which column of the log shows it. A table
stands between <!-- NAME --> and <!-- end -->. tests/test_lab_tables.py compares the documents with what this writes.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf.tools import experiment                           # noqa: E402

README, DETAILS = ROOT / "minirlhf/patches/README.md", ROOT / "minirlhf/DETAILS.md"
COURSE = ROOT / "minirlhf/COURSE.md"
SHORT = 20          # iterations of the runs of ablations and bugs


def rows_with(iterations):
    file = experiment.PATCHES / "results.jsonl"
    return [row for row in experiment.read_results(file) if row["iterations"] == iterations]


def measured(kind, iterations):
    """The patches of a kind that have results, the best gold first."""
    rows = [row for row in rows_with(iterations) if row["patch"].startswith(kind)]
    names = {row["patch"] for row in rows}
    found = {name: [row.get("gold", -1) for row in rows if row["patch"] == name] for name in names}
    return sorted(found, key=lambda name: (-sum(found[name]) / len(found[name]), name))


def link(name):
    """The name of a patch, with a link to it as long as it is there."""
    return f"[{name}]({name}.patch)" if (experiment.PATCHES / f"{name}.patch").exists() else name


def by_seed(rows, name, figure="gold", digits=3):
    """The figure of each seed: with two seeds a mean would hide what an interval of Student's t cannot say."""
    own = sorted((row["seed"], row[figure]) for row in rows if row["patch"] == name and figure in row)
    return " / ".join(f"{value:.{digits}f}" for _, value in own)


def algorithms_table():
    """One row per algorithm: means over seeds (up to two seeds: each), and time and gold against the default's."""
    rows, columns = rows_with(0), {name: digits for name, digits in experiment.TABLE.items() if name != "seconds"}
    default = {row["seed"]: row for row in rows if row["patch"] == "default"}
    heads = " | ".join(["", "seeds", *columns, "time", "gold minus default"]).replace("_", " ")
    lines = [f"|{heads} |", "|" + "---|" * (len(columns) + 4)]
    for name in ("default", *measured("algo_", 0)):
        own = {row["seed"]: row for row in rows if row["patch"] == name}
        cells = [experiment.summary([row[figure] for row in own.values()], digits) if len(own) > 2
                 else by_seed(rows, name, figure, digits) for figure, digits in columns.items()]
        gap = experiment.against_default(list(own.values()), default) if name != "default" else ""
        time = own[1]["seconds"] / default[1]["seconds"]        # all of seed 1 ran one after another, with one thread
        lines.append(f"| {link(name)} | {len(own)} | {' | '.join(cells)} | {time:.2f} | {gap} |")
    return lines


def ablations_table():
    """One row per ablation: gold and KL of each seed, and the paired difference in gold to the default."""
    rows = rows_with(SHORT)
    default = {row["seed"]: row for row in rows if row["patch"] == "default" and "gold" in row}
    lines = ["| | gold of each seed | KL of each seed | gold minus default |", "|" + "---|" * 4]
    for name in ("default", *measured("ablate_", SHORT)):
        own = [row for row in rows if row["patch"] == name and "gold" in row]
        gap = experiment.against_default(own, default) if name != "default" else ""
        lines.append(f"| {link(name)} | {by_seed(rows, name)} | {by_seed(rows, name, 'kl', 1)} | {gap} |")
    return lines


def verdict(gap):
    """What an interval allows to say."""
    if "[" not in gap:
        return "one seed"
    low, high, p = map(float, re.search(r"\[(\S+), (\S+)\], p [<]?\s*(\S+)", gap).groups())
    if low == high == 0:
        return "never acted here"
    if p >= 0.05:
        return "no effect seen" if max(-low, high) < 0.1 else "cannot tell: the interval is too wide"
    return "**lower gold**" if low + high < 0 else "**higher gold**"


def bugs_table():
    """One row per bug: gold, what shows it, from which iteration on, and whether the log's warnings say it."""
    rows = rows_with(SHORT)
    signs = {row["patch"]: row for row in experiment.read_results(experiment.PATCHES / "signs.jsonl")}
    lines = ["| | gold of each seed | what shows it | good run | with the bug | from iteration | warning |",
             "|" + "---|" * 7, f"| default | {by_seed(rows, 'default')} | | | | | |"]
    for name in measured("bug_", SHORT):
        sign = signs.get(name, {})
        cells = [sign.get(key) for key in ("column", "good", "bug", "iteration", "health")]
        cells = [by_seed(rows, name), *cells]
        cells = ["" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {link(name)} | {' | '.join(cells[:-1])} | {cells[-1] or 'silent'} |")
    return lines


def effects_table():
    """For every detail of DETAILS.md that a patch takes away: its patches, and what they changed."""
    rows, found = rows_with(SHORT), []
    default = {row["seed"]: row for row in rows if row["patch"] == "default" and "gold" in row}
    for name, patch in experiment.every_patch().items():
        details = re.search(r"\bdetails? ([\d, and]+)", patch.field("Source"))
        for number in re.findall(r"\d+", details[1]) if details and not name.startswith("algo_") else ():
            own = [row for row in rows if row["patch"] == name and "gold" in row]
            gap = experiment.against_default(own, default)
            effect = verdict(gap) if gap else "not measured"
            found.append((int(number), f"| {number} | [{name}](patches/{name}.patch) | {gap} | {effect} |"))
    return ["| detail | taken away or changed by | gold minus default | measured effect |", "|---|---|---|---|",
            *(line for _, line in sorted(found))]


def course_rows(iterations, names):
    """A row per patch, after the default at the same length. 0 iterations: as many as the script says, 80."""
    rows, lines = [row for row in rows_with(iterations) if "gold" in row], []
    default = {row["seed"]: row for row in rows if row["patch"] == "default"}
    for name in ("default", *names):
        own = [row for row in rows if row["patch"] == name]
        cells = [experiment.summary([row[figure] for row in own], digits) if len(own) > 2
                 else by_seed(rows, name, figure, digits) for figure, digits in (("gold", 3), ("kl", 1))]
        gap = experiment.against_default(own, default) if name != "default" else ""
        label = name if name == "default" else f"[{name}](patches/{name}.patch)"
        lines.append(f"| {label} | {iterations or 80} | {len(own)} | {' | '.join(cells)} | {gap} |")
    return lines


def course_table(full=(), short=()):
    """What a derivation in COURSE.md is worth: patches with full runs, and patches with short ones."""
    return ["| | iterations | seeds | gold | KL | gold minus default |", "|" + "---|" * 6,
            *(course_rows(0, full) if full else ()), *(course_rows(SHORT, short) if short else ())]


def draw(out):
    """Gold against KL at the end of training: a point per seed, a colour per algorithm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    for n, name in enumerate(("default", *measured("algo_", 0))):
        own = [row for row in rows_with(0) if row["patch"] == name and "gold" in row]
        axis.scatter([row["kl"] for row in own], [row["gold"] for row in own], s=28, color=f"C{n % 10}",
                     marker="osD^vP*X<>hd"[n % 12], label="PPO (default)" if name == "default" else name[5:])
    axis.set(xlabel="KL to the SFT model, nats per sequence", ylabel="gold on held-out prompts, 0 to 1")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(out, dpi=100)


TABLES = {
    README: {"algorithms": algorithms_table, "ablations": ablations_table, "bugs": bugs_table},
    DETAILS: {"effects": effects_table},
    COURSE: {
        "gradient": lambda: course_table(full=("algo_reinforce", "algo_reinforce_baseline")),
        "whitening": lambda: course_table(short=("ablate_whitening", "bug_whiten_rows")),
        "lambda": lambda: course_table(short=("ablate_lam_0", "ablate_lam_1", "ablate_separate_value")),
        "clip": lambda: course_table(full=("algo_reinforce_epochs", "algo_reinforce_clip"),
                                     short=("ablate_epochs", "ablate_clip")),
        "kl": lambda: course_table(full=("algo_grpo", "algo_grpo_k3", "algo_dpo"), short=("ablate_kl",)),
    },
}


def filled(document):
    """The text of a document with its tables as they should be."""
    text = document.read_text()
    for name, make in TABLES[document].items():
        block = f"<!-- {name} -->\n" + "\n".join(make()) + "\n<!-- end -->"
        text, n = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)
        assert n == 1, f"{document}: one <!-- {name} --> ... <!-- end -->"
    return text


if __name__ == "__main__":
    for document in TABLES:
        document.write_text(filled(document))
    draw(README.with_name("gold_kl.png"))
