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

from minirlhf.files.json_files import write_whole
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError, require, run_main
from minirlhf.health import complaints
from minirlhf.running.runs import in_use, read_report, read_rows, read_run
from minirlhf.stats import Estimate
from minirlhf.tools.evaluate.tables import FIGURES, Table
from minirlhf.tools.plot import COLOURS, PANELS, TRAINING

TEMPLATE = Path(__file__).with_name("page_template.html")
POINTS = 4000           # most rows of metrics on a page. Of longer runs it shows every 2nd, 3rd, ...
EVERY = 3               # seconds from one writing to the next, and from one reload to the next
PATIENCE = 120          # seconds without news after which a run that keeps no lock has ended


# ---- reading what runs have written ----------------------------------------------------------------------------------

def read_folder(folder):
    """What a run has written so far, as a dict. UserError if the folder is not a run's or a line is damaged."""
    path, config = Path(folder), read_run(folder)
    samples = path / "samples.jsonl"                            # of PPO only
    return {"name": str(folder), "config": config, "report": read_report(path), "state": state_of(path),
            "rows": whole_rows(path / "metrics.jsonl", is_metrics),
            "samples": whole_rows(samples, is_sample) if samples.exists() else []}


def whole_rows(file, fits):
    """The rows of a JSONL without a last line that is still being written. fits: whether a row is as it should be."""
    complete = file.read_bytes().count(b"\n")
    rows = read_rows(file)
    wrong = next((n for n, row in enumerate(rows, start=1) if not fits(row)), len(rows) + 1)
    require(wrong > max(complete, len(rows)),
            f"{file}:{wrong}: damaged, not a row as a training script writes it. Remove this line and those after it")
    return rows


def is_metrics(row):
    return all(type(x) in (int, float) for x in row.values()) and (
        "objective/kl" not in row or {"objective/entropy", "rollout/length", "rollout/score_std"} <= set(row))


def is_sample(row):
    match row:
        case {"sample": str(), "prompt": str(), "response": str(), "score": float(), "kl": float(),
              "tokens": {"text": [*texts], **columns}}:
            return set(map(type, texts)) <= {str} and all(
                isinstance(column, list) and list(map(type, column)) == [float] * len(texts)
                and all(map(math.isfinite, column)) for column in columns.values())
    return False


def state_of(folder):
    """"ended", "running" or "stopped". A run that writes nothing for a while is running if it keeps its folder locked.
    That is not asked before, because the question itself takes the lock for a moment, and no run could begin then."""
    if (folder / "report.json").exists():
        return "ended"
    fresh = time.time() - (folder / "metrics.jsonl").stat().st_mtime < PATIENCE
    return "running" if fresh or in_use(folder) else "stopped"


# ---- what the page shows ---------------------------------------------------------------------------------------------

def thin(run):
    """Leaves about POINTS rows of metrics in a run, every n-th one, and of its samples every n-th step. Returns n.

    The last of both are kept, and what SFT and reward models measure only now and then.
    """
    rows, steps = run["rows"], sorted({row["step"] for row in run["samples"]})
    every = max(1, math.ceil(len(rows) / POINTS))
    usual, kept = min(map(len, rows), default=0), {*steps[::every], *steps[-1:]}
    run["rows"] = [row for n, row in enumerate(rows) if n % every == 0 or row is rows[-1] or len(row) > usual]
    run["samples"] = [row for row in run["samples"] if row["step"] in kept]
    return every


def warnings_of(run):
    """The warnings that the script printed, each at the first iteration that deserved it: [(step, sentence)]."""
    rows, first = [row for row in run["rows"] if "objective/kl" in row], {}
    for n in range(1, len(rows) + 1):
        for sign, sentence in complaints(rows[:n]):
            first.setdefault(sign, (rows[n - 1]["step"], sentence))
    return first.values()


def charts_of(runs):
    """The panels of tools.plot that these runs can fill, and before them score and gold in one picture."""
    def lines(metric, dashed=False):
        curves = [[rounded(row.get(metric, math.nan)) for row in run["rows"]] for run in runs]
        return [{"run": k, "y": y, "dashed": dashed} for k, y in enumerate(curves) if set(y) - {None}]

    panels = [(metric, title, unit, healthy, lines(metric)) for metric, title, unit, healthy in PANELS + TRAINING]
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
    unit = f"of {run['config']['iterations']:,} iterations" if "iterations" in run["config"] else "steps"
    return f"{done:,} {unit}, {run['state']}" + f", win rate against SFT in gold {win}" * bool(win)


def report_tables(run):
    """The report.json of a training script as tables: models side by side, then single numbers."""
    report = run["report"]
    models = {model: found for model, found in report.items() if isinstance(found, dict) and "ci" in found}
    names = sorted(dict.fromkeys(name for found in models.values() for name in found["ci"]), key="win_rate".__ne__)
    rows = [[FIGURES.get(name, name), *(figure_of(found, name) for found in models.values())] for name in names]
    yield Table(f"{run['name']}: the assessment", ["", *models], rows, f"On {report.get('n_prompts')} held-out "
                "prompts. In brackets: 95 % intervals. tools.evaluate says more.")
    rows = [[FIGURES.get(name, name), figure_of(report, name)] for name, value in report.items()
            if type(value) in (int, float) and name not in names]
    yield Table(f"{run['name']}: reward model and other numbers", ["of report.json", ""], rows)


def figure_of(found, name):
    """A figure of a report.json as text, with its interval where it has one. "" if there is no such figure."""
    value, interval = found.get(name), found.get("ci", {}).get(name) or found.get(f"{name}_ci")
    return "" if value is None else str(Estimate(value, *interval, 0)) if interval else f"{value:.4g}"


# ---- the page --------------------------------------------------------------------------------------------------------

def write_page(out, title, runs, tables, notes=(), live=False, report=False):
    """Writes the page, completely or not at all. evaluate writes its report with it too.

    runs: from read_folder. tables: Tables. notes: sentences. live: it reloads itself. report: the tables come first.
    """
    warnings = [{"run": k, "step": step, "text": text} for k, run in enumerate(runs) for step, text in warnings_of(run)]
    notes = [*notes, *(f"{run['name']}: one row of metrics in {n}, and of the samples one iteration in {n}"
                       for run in runs if (n := thin(run)) > 1)]
    options = dict.fromkeys(name for run in runs for name in run["config"])
    values = [[name, *(run["config"].get(name, "") for run in runs)] for name in options]
    tables = [*tables, Table("Options", ["", *(run["name"] for run in runs)], values)]
    data = {
        "title": title, "live": EVERY * live, "report": report, "notes": notes, "warnings": warnings,
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
    seen, live = time.time(), True
    try:
        while live and time.time() - seen < PATIENCE:
            time.sleep(EVERY)
            with contextlib.suppress(UserError, OSError):       # a new run may be moving the folder aside
                live = write_runs(out, folders, follow=True)
                seen = time.time()
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
