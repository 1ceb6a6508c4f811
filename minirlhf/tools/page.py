"""One HTML file about runs that needs nothing else: curves, warnings, samples token by token, the assessment.

    python -m minirlhf.tools.page out/ppo                              writes out/ppo/page.html
    python -m minirlhf.tools.page out/ppo out/calm --out both.html     several runs, overlaid
    python -m minirlhf.tools.page out/ppo --follow                     rewritten while the run goes on

With --follow, the open page reloads itself until the run has ended. A run that starts anew moves its old folder aside,
and the page with it. Give an --out elsewhere to follow the new run under the same address.
"""

import contextlib
import json
import math
import time
from itertools import cycle
from pathlib import Path

from minirlhf.files.errors import UserError, run_main
from minirlhf.files.json_files import write_whole
from minirlhf.health import complaints
from minirlhf.reward_functions import TINY_GOLD
from minirlhf.running.config import Parser
from minirlhf.running.runs import read_report, read_rows, read_run
from minirlhf.stats import Estimate
from minirlhf.tools.evaluate.tables import FIGURES, Table

TEMPLATE = Path(__file__).with_name("page_template.html")
EVERY = 3               # seconds from one writing to the next, and from one reload to the next
PATIENCE = 300          # seconds without news after which a run has stopped
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: safe for the colour-blind
PANELS = [  # metric, title, unit, healthy range (that of the table in minirlhf/DETAILS.md)
    ("objective/scores", "Score of the reward model", "SFT standard deviations", (-0.2, 1.7)),
    ("objective/gold", "True preference (never trained on)", "gold, 0 to 1", (0.6, 1)),
    ("objective/kl", "KL to the SFT model", "nats per sequence", (0, 8)),
    ("objective/rlhf_reward", "Score - beta KL, which PPO maximises", "SFT standard deviations", (-0.2, 1.4)),
    ("objective/entropy", "Entropy of the policy", "nats per sequence", (5, 16)),
    ("rollout/score_std", "Spread of the scores in a rollout", "standard deviation", (0.5, 1.1)),
    ("rollout/eos_rate", "Responses that end by themselves", "share", (0.98, 1)),
    ("rollout/length", "Length of a response", "tokens, EOS included", (18, 25)),
    ("policy/approxkl", "How far one update moves the policy", "approx-KL, nats per token", (0, 0.2)),
    ("policy/clipfrac", "Tokens whose ratio is clipped", "share of the tokens", (0, 0.2)),
    ("loss/value", "Loss of the value model", "half the squared error", (0, 0.2)),
    ("value/explained_variance", "How well the value model predicts", "explained variance", (0, 1)),
]
TRAINING = [  # of SFT and reward models
    ("loss/train", "Loss on the training batch", "loss", None),
    ("loss/heldout", "Loss on held-out demonstrations", "nats per token", None),
    ("accuracy/train", "Accuracy on the training batch", "share of the pairs", None),
    ("rm_accuracy_heldout", "Accuracy on held-out comparisons", "share of the pairs", None),
    ("rm_accuracy_gold", "Accuracy against gold", "share of the pairs", None),
]


# ---- reading what runs have written ----------------------------------------------------------------------------------

def read_folder(folder):
    """What a run has written so far, as a dict. A line that is still being written is left out. UserError if the
    folder is not a run's."""
    path, config = Path(folder), read_run(folder)
    return {"name": str(folder), "config": config, "report": read_report(path), "state": state_of(path),
            "rows": read_rows(path / "metrics.jsonl"), "samples": read_rows(path / "samples.jsonl")}


def state_of(folder):
    """"ended", "running" or "stopped". A run that was killed counts as running until it has been silent for long."""
    if (folder / "report.json").exists():
        return "ended"
    return "running" if time.time() - (folder / "metrics.jsonl").stat().st_mtime < PATIENCE else "stopped"


# ---- what the page shows ---------------------------------------------------------------------------------------------

def warnings_of(run):
    """The warnings that the script printed, each at the first iteration that deserved it: [(step, sentence)]."""
    rows, first = [row for row in run["rows"] if "objective/kl" in row], {}
    for n in range(1, len(rows) + 1):
        for sign, sentence in complaints(rows[:n]):
            first.setdefault(sign, (rows[n - 1]["step"], sentence))
    return first.values()


def charts_of(runs):
    """The panels that these runs can fill, and before them score and gold in one picture.

    The healthy ranges are those of the embedded world, so they are only shown if all runs are of it.
    """
    embedded = all(Path(str(run["config"].get("data", ""))).resolve().parent == TINY_GOLD.parent for run in runs)

    def lines(metric, dashed=False):
        curves = [[rounded(row.get(metric, math.nan)) for row in run["rows"]] for run in runs]
        return [{"run": k, "y": y, "dashed": dashed} for k, y in enumerate(curves) if set(y) - {None}]

    panels = [(metric, title, unit, healthy if embedded else None, lines(metric))
              for metric, title, unit, healthy in PANELS + TRAINING]
    if gold := lines("objective/gold", dashed=True):
        panels.insert(0, ("both", "Score and gold", "line: score, in standard deviations of the SFT model's; dashes: "
                          "gold, 0 to 1", None, lines("objective/scores") + gold))
    return [dict(zip(("metric", "title", "unit", "healthy", "lines"), panel)) for panel in panels if panel[-1]]


def rounded(x):
    """Four digits are enough for a curve. JSON has no NaN and no infinity."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def headline(run):
    """How far a run is, in a few words."""
    done, win = run["rows"][-1]["step"] + 1 if run["rows"] else 0, figure_of(run["report"], "win_rate")
    unit = f"of {run['config']['iterations']} iterations" if "iterations" in run["config"] else "steps"
    return f"{done:,} {unit}, {run['state']}" + f", win rate against SFT in gold {win}" * bool(win)


def report_tables(run):
    """The report.json of a training script as tables: models side by side, then single numbers."""
    report = run["report"]
    models = {model: found for model, found in report.items() if isinstance(found, dict) and "ci" in found}
    names = sorted(dict.fromkeys(name for found in models.values() for name in found["ci"]), key="win_rate".__ne__)
    rows = [[FIGURES.get(name, name), *(figure_of(found, name) or "–" for found in models.values())]
            for name in names]
    yield Table(f"{run['name']}: the assessment", ["figure", *models], rows, f"On {report.get('n_prompts')} held-out "
                "prompts. In brackets: 95 % intervals. tools.evaluate says more.")
    rows = [[FIGURES.get(name, name), figure_of(report, name)] for name, value in report.items()
            if type(value) in (int, float) and name not in names]
    yield Table(f"{run['name']}: reward model and other numbers", ["of report.json", "value"], rows)


def figure_of(found, name):
    """A figure of a report.json as text, with its interval where it has one. "" if there is no such figure."""
    value, interval = found.get(name), found.get("ci", {}).get(name) or found.get(f"{name}_ci")
    return ("" if value is None or isinstance(value, dict) else
            str(Estimate(value, *interval, 0)) if interval else f"{value:.4g}")


# ---- the page --------------------------------------------------------------------------------------------------------

def write_page(out, title, runs, tables, notes=(), live=False, verdict=(), blind=False):
    """Writes the page, completely or not at all. evaluate writes its report with it too.

    runs: from read_folder. tables: Tables. notes: sentences. live: it reloads itself. verdict: the sentences of
    a report, which come first, then the warnings and the tables. blind: no warnings.
    """
    warnings = [{"run": k, "step": step, "text": text} for k, run in enumerate(runs if not blind else ())
                for step, text in warnings_of(run)]
    options = dict.fromkeys(name for run in runs for name in run["config"])
    values = [[name, *(run["config"].get(name, "") for run in runs)] for name in options]
    tables = [*tables, Table("Options", ["option", *(run["name"] for run in runs)], values)]
    data = {
        "title": title, "live": EVERY * live, "verdict": verdict, "notes": notes, "warnings": warnings,
        "unit": "iteration" if "iterations" in options else "step", "charts": charts_of(runs),
        "runs": [{"name": run["name"], "headline": headline(run), "colour": colour,
                  "steps": [row["step"] for row in run["rows"]]} for run, colour in zip(runs, cycle(COLOURS))],
        "samples": [row | {"run": k} for k, run in enumerate(runs) for row in run["samples"]],
        "tables": [table._replace(rows=[[str(cell) for cell in row] for row in table.rows])._asdict()
                   for table in tables if table.rows],
    }
    # "<" as an escape, so that no text on the page can end the element that the data is in.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    write_whole(Path(out), [TEMPLATE.read_text(encoding="utf-8").replace("DATA", text).encode()])


def write_runs(out, folders, follow):
    """The page of these run folders -> whether it is to be written again."""
    runs = list(map(read_folder, folders))
    live = follow and any(run["state"] == "running" for run in runs)
    write_page(out, ", ".join(folders), runs, [table for run in runs for table in report_tables(run)], live=live)
    return live


def keep_writing(out, folders):
    """Writes the page until no run goes on."""
    seen, live = time.monotonic(), True
    try:
        while live and time.monotonic() - seen < PATIENCE:
            time.sleep(EVERY)
            with contextlib.suppress(UserError, OSError):       # a new run may be moving the folder aside
                live = write_runs(out, folders, follow=True)
                seen = time.monotonic()
    finally:
        write_runs(out, folders, follow=False)


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.page", description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", help="the file to write [page.html in the folder of the first run]")
    parser.add_argument("--follow", action="store_true", help="write it again every few seconds while a run goes on")
    args = parser.parse_args(argv)
    out = args.out or str(Path(args.runs[0]) / "page.html")
    live = write_runs(out, args.runs, args.follow)
    print(f"wrote {out}{', and goes on writing it' * live}", flush=True)
    if live:
        keep_writing(out, args.runs)


if __name__ == "__main__":
    run_main(main)
