"""Training curves of one or several PPO runs, overlaid (needs matplotlib: pip install -r tests/requirements.txt).

    python -m minirlhf.tools.plot out/ppo [out/ppo.1 ...] --out curves.png
"""

import argparse
import json
from pathlib import Path

from minirlhf.config import Parser, UserError, run_main
from minirlhf.runs import read_run

PANELS = [  # metric, title, unit
    ("objective/gold", "True preference (never trained on)", "gold, 0 to 1"),
    ("objective/scores", "Score of the reward model", "deviations of the SFT model's"),
    ("objective/kl", "KL to the SFT model", "nats per sequence"),
    ("objective/entropy", "Entropy of the policy", "nats per sequence"),
    ("val/length", "Length of a response", "tokens, EOS included"),
    ("val/explained_variance", "Variance that the value model explains", "share of the returns' variance"),
]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]     # Okabe and Ito: safe for the colour-blind


def read_metrics(folder):
    """metrics.jsonl of a PPO run as a list of dicts."""
    read_run(folder)
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    if not rows or "objective/kl" not in rows[0]:
        raise UserError(f"{folder}: metrics.jsonl is not that of a PPO run with at least one iteration")
    return rows


def draw(runs, out):
    """runs: {label: rows of metrics} -> a picture with a panel per metric that any of them has."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plots need matplotlib: pip install -r tests/requirements.txt") from None
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (metric, title, unit) in zip(axes.flat, PANELS):
        for colour, (label, rows) in zip(COLOURS * len(runs), runs.items()):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                axis.plot(*zip(*points), color=colour, linewidth=1.2, label=label)
        axis.set_title(title, fontsize=11)
        axis.set_ylabel(unit, fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("PPO iteration", fontsize=9)
    if len(runs) > 1:
        axes[0][2].legend(fontsize=9, frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.plot", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of PPO runs")
    parser.add_argument("--labels", nargs="+", help="names for the legend, one per run; the folders' if not given")
    parser.add_argument("--out", default="curves.png", help="the picture to write [curves.png]")
    args = parser.parse_args(argv)
    labels = args.labels or args.runs
    if len(labels) != len(args.runs):
        raise UserError(f"--labels has {len(labels)} names for {len(args.runs)} runs")
    draw({label: read_metrics(folder) for label, folder in zip(labels, args.runs)}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
