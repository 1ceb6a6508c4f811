"""The pictures of curves in the documents (needs matplotlib). They are made in this order by

    python tests/pictures.py data/tiny/collapse.png out/ppo out/ppo_few
    python tests/pictures.py minirlhf/patches/curves.png RUN ... --metrics objective/gold objective/kl \\
        objective/entropy rollout/length
    python tests/pictures.py minirlhf/beta.png out/beta_0.02 out/beta_0.05 out/beta_0.15 --against_kl
    python tests/pictures.py data/films/lexicon.png out/films/ppo out/films/lexicon --gold "VADER's compound, -1 to 1" \
        --metrics objective/gold objective/kl rollout/length

A panel for each metric, a curve for each run, and the healthy range of the embedded world in grey. With --gold, which
says what another --gold measured, there is no grey. With --against_kl, gold against KL: the path of each run, and where
it ends on the held-out prompts, with the 95 % interval.
"""

import argparse
import sys
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf.running.runs import read_report, read_rows        # noqa: E402
from minirlhf.tools.page import COLOURS, PANELS                 # noqa: E402

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "axes.titlesize": 11, "axes.labelsize": 9, "legend.frameon": False, "savefig.dpi": 110}


def draw(out, runs, panels):
    """runs: {label: rows of metrics.jsonl}. panels: those of tools.page that are drawn."""
    columns = 2 if len(panels) == 4 else 3
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4 * columns, 2.9 * height), layout="constrained")
    for axis, (metric, title, unit, healthy) in zip(axes.flat, panels):
        for colour, rows in zip(cycle(COLOURS), runs.values()):
            axis.plot([row["step"] for row in rows], [row[metric] for row in rows], color=colour, linewidth=1.2)
        limits = axis.get_ylim()
        if healthy:
            axis.axhspan(*healthy, color="0.9", zorder=0)
        axis.set(title=title, ylabel=unit, ylim=limits)
    for axis in axes.flat[-columns:]:
        axis.set_xlabel("PPO iteration")
    figure.legend(axes.flat[0].lines, runs, loc="outside lower center", ncols=4)
    figure.savefig(out)


def draw_against_kl(out, runs):
    """runs: {label: folder}. A path is a mean over ten iterations, from the SFT model on."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for colour, (label, folder) in zip(cycle(COLOURS), runs.items()):
        rows, report = read_rows(folder / "metrics.jsonl"), read_report(folder)
        kl, gold = (moving_mean([row[f"objective/{name}"] for row in rows]) for name in ("kl", "gold"))
        axis.plot(kl, gold, color=colour, linewidth=1, alpha=0.6)
        end, (low, high) = report["ppo"]["gold"], report["ppo"]["ci"]["gold"]
        axis.errorbar(report["kl"], end, [[end - low], [high - end]], fmt="o", color=colour, capsize=4, label=label)
    axis.set(xlabel="KL to the SFT model, nats per sequence", ylabel="gold, 0 to 1")
    axis.legend(loc="lower right")
    figure.savefig(out)


def moving_mean(values, n=10):
    return [sum(values[max(0, i - n + 1):i + 1]) / min(n, i + 1) for i in range(len(values))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the picture to write")
    parser.add_argument("runs", nargs="+", help="folders of PPO runs; a label is a folder's name")
    parser.add_argument("--metrics", nargs="+", help="the panels, by their metric [all]")
    parser.add_argument("--gold", help="what the gold of these runs is; they are of another world")
    parser.add_argument("--against_kl", action="store_true", help="gold against KL in place of the curves")
    args = parser.parse_args()
    plt.rcParams.update(STYLE)
    if args.against_kl:
        return draw_against_kl(args.out, {Path(run).name: Path(run) for run in args.runs})
    runs = {Path(run).name: read_rows(Path(run) / "metrics.jsonl") for run in args.runs}
    panels = [panel for panel in PANELS if not args.metrics or panel[0] in args.metrics]
    if args.gold:
        panels = [(metric, args.gold, "", None) if metric == "objective/gold" else (metric, title, unit, None)
                  for metric, title, unit, _ in panels]
    draw(args.out, runs, panels)


if __name__ == "__main__":
    main()
