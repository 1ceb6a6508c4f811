"""Pictures of runs and reports (needs matplotlib: pip install -r tests/requirements.txt).

    python -m minirlhf.tools.plot out/ppo [out/ppo.1 ...] --out curves.png          training curves, runs overlaid
    python -m minirlhf.tools.plot out/ppo [...] --kind kl                           score and gold against KL
    python -m minirlhf.tools.plot out/report [...] --kind calibration               reliability of reward models
    python -m minirlhf.tools.plot out/overoptimize --kind overoptimization          what tools.overoptimize found

Grey is the healthy range of a 2 to 4 sentence story in the embedded world; README, "How to read the log", says what it
means when a curve leaves it.
"""

import argparse
from pathlib import Path

from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, run_main
from minirlhf.running.runs import read_rows, read_run
from minirlhf.files.tensors import read_json
from minirlhf.tools.pictures import draw_calibration, draw_curves, draw_kl, draw_overoptimization


def read_metrics(folder):
    """metrics.jsonl of a PPO run as a list of dicts."""
    read_run(folder)
    rows = read_rows(Path(folder) / "metrics.jsonl")
    if not rows or "objective/kl" not in rows[0]:
        raise UserError(f"{folder}: metrics.jsonl is not that of a PPO run with at least one iteration")
    return rows


def read_report(folder, key, writer):
    """report.json of a folder that `writer` has written; it must have `key`."""
    file = Path(folder) / "report.json"
    report = read_json(file) if file.is_file() else {}
    if key not in report:
        raise UserError(f"{folder}: no report.json of {writer} with \"{key}\" in it")
    return report


def draw_report(report, models, folder):
    """The pictures of an assessment -> the names of the files; none, and a line that says so, without matplotlib."""
    runs = {model: rows for model in models if "objective/kl" in ((rows := read_rows(Path(model) / "metrics.jsonl")) or [{}])[0]}
    try:
        names = []
        if "reward" in report:
            draw_calibration({report["reward"]["model"]: report["reward"]}, folder / "calibration.png")
            names.append("calibration.png")
        if runs:
            draw_kl(runs, folder / "kl.png")
            names.append("kl.png")
        return names
    except UserError as error:
        print(f"no pictures: {error}")
        return []


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.plot", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of PPO runs, or of reports")
    parser.add_argument("--kind", choices=("curves", "kl", "calibration", "overoptimization"), default="curves")
    parser.add_argument("--labels", nargs="+", help="names for the legend, one per folder; the folders' if not given")
    parser.add_argument("--out", help="the picture to write [the kind's name.png]")
    args = parser.parse_args(argv)
    labels, out = args.labels or args.folders, args.out or f"{args.kind}.png"
    if len(labels) != len(args.folders):
        raise UserError(f"--labels has {len(labels)} names for {len(args.folders)} folders")
    if args.kind == "overoptimization":
        if len(args.folders) > 1:
            raise UserError("--kind overoptimization draws one folder")
        draw_overoptimization(read_report(args.folders[0], "labels", "tools.overoptimize"), out)
    elif args.kind == "calibration":
        reports = [read_report(folder, "reward", "tools.evaluate") for folder in args.folders]
        draw_calibration({label: report["reward"] for label, report in zip(labels, reports)}, out)
    else:
        draw = draw_curves if args.kind == "curves" else draw_kl
        draw({label: read_metrics(folder) for label, folder in zip(labels, args.folders)}, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
