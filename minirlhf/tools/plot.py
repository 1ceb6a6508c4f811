"""Pictures of runs (needs matplotlib: pip install -r tests/requirements.txt).

    python -m minirlhf.tools.plot out/ppo                                       curves of PPO, SFT or a reward model
    python -m minirlhf.tools.plot out/ppo out/calm --out both.png               several runs, overlaid
    python -m minirlhf.tools.plot out/ppo --metrics objective/kl loss/policy    some metrics only
    python -m minirlhf.tools.plot out/ppo --kind kl                             score and gold against KL

Grey is the healthy range of PPO in the embedded world. "How to read the log" in minirlhf/DETAILS.md says what it means
when a curve leaves it.
"""

import io
import math
from itertools import cycle
from pathlib import Path

from minirlhf.files.json_files import write_whole
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError, require, run_main
from minirlhf.running.runs import read_rows, read_run

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
MARKERS = "os^Dv*"
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: safe for the colour-blind
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "axes.titlesize": 11, "axes.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False, "savefig.dpi": 110,
         "figure.constrained_layout.use": True}


def subplots(rows, columns, size, **options):
    """An empty picture: (figure, axes), the axes as an array (rows, columns)."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure                    # not pyplot, which wants a window
    except ImportError:
        raise UserError("plots need matplotlib: pip install -r tests/requirements.txt") from None
    rcParams.update(STYLE)
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, out):
    """Writes a picture, completely or not at all."""
    file, buffer = Path(out), io.BytesIO()
    kinds = figure.canvas.get_supported_filetypes()
    require(file.suffix[1:] in kinds, f"--out {out}: the name of a picture ends in one of .{', .'.join(kinds)}")
    figure.savefig(buffer, format=file.suffix[1:])
    write_whole(file, [buffer.getvalue()])


# ---- runs ------------------------------------------------------------------------------------------------------------
# runs: {label: rows of metrics.jsonl}

def choose_panels(runs, metrics, usual):
    """The panels of these metrics, which must be logged. With None: of the `usual` ones those that a run here has."""
    logged = dict.fromkeys(name for rows in runs.values() for row in rows for name in row if name != "step")
    for name in metrics or ():
        require(name in logged, f"--metrics {name}: not in these runs, which have {', '.join(logged)}")
    known = {panel[0]: panel for panel in PANELS + TRAINING}
    return [known.get(name, (name, name, "", None)) for name in metrics or usual if name in logged]


def draw_panels(runs, panels, out, x="step"):
    """A panel per metric with a curve per run, against the step or, with a colour for the time, against the KL."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = subplots(height, columns, (max(6, 4 * columns), max(4, 2.9 * height)))
    lines, last = {}, max(row["step"] for rows in runs.values() for row in rows)
    for axis, (metric, title, unit, healthy) in zip(axes.flat, panels):
        for colour, marker, (label, rows) in zip(cycle(COLOURS), cycle(MARKERS), runs.items()):
            rows = [row for row in rows if metric in row and x in row]
            xs, ys, steps = ([row[name] for row in rows] for name in (x, metric, "step"))
            few = x != "step" or len(rows) < 20                 # a single point would be no line
            lines[label], = axis.plot(xs, ys, color=colour, linewidth=0.5 if x != "step" else 1.2,
                                      marker=marker if few else None, markersize=4)
            if x != "step":                                     # dark at first and light at the end
                axis.scatter(xs, ys, c=steps, vmin=0, vmax=last, marker=marker, s=22, zorder=3)
        if healthy:
            limits = axis.get_ylim()
            axis.axhspan(*healthy, color="0.9", zorder=0)
            axis.set_ylim(limits)
        axis.set(title=title, ylabel=unit)
    finish(figure, axes, panels, x, lines)
    save(figure, out)


def finish(figure, axes, panels, x, lines):
    """Names the x-axes, hides what has no panel, and adds the colours of time and the legend."""
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    figure.supxlabel("step" if x == "step" else "KL to the SFT model, nats per sequence", fontsize=9)
    if x != "step":
        figure.colorbar(axes[0, 0].collections[-1], ax=axes, label="PPO iteration")
    if len(lines) > 1:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=4)


def draw_curves(runs, out, metrics=None):
    """What PPO logs, or the losses and accuracies of SFT and reward models, against the step (PPO: the iteration)."""
    draw_panels(runs, choose_panels(runs, metrics, [panel[0] for panel in PANELS + TRAINING]), out)


def draw_kl(runs, out, metrics=None):
    """Score and, where a run has it, gold against KL: a point per iteration, coloured by time."""
    for label, rows in runs.items():
        require("objective/kl" in rows[0], f"{label}: not a PPO run, so it has no KL to draw against")
    draw_panels(runs, choose_panels(runs, metrics, ("objective/scores", "objective/gold")), out, x="objective/kl")


# ---- over-optimisation -----------------------------------------------------------------------------------------------

def draw_overoptimization(report, out):
    """Gold (points, and the fitted law as a line) and proxy (dashed) against sqrt(KL). report: that of overoptimize."""
    figure, (axes,) = subplots(1, 2, (12, 5), sharey=True)
    titles = {"bon": "Best of n:  R = d (a - b d)", "rl": "PPO without KL penalty:  R = d (a - b log d)"}
    for axis, (law, title) in zip(axes, titles.items(), strict=True):
        for colour, (count, row) in zip(cycle(COLOURS), report["labels"].items()):
            draw_law(axis, law, row, colour, f"{count} labels (accuracy {row['rm_accuracy_gold']:.2f})")
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set(title=title, xlabel="d = sqrt(KL to the SFT model), sqrt(nats per sequence)")
    axes[0].plot([], [], color="0.3", marker="o", linestyle="-", label="gold, and its fitted law; dotted: its turnover")
    axes[0].plot([], [], color="0.3", linestyle="--", label="proxy: what the reward model says")
    axes[0].set_ylabel("reward above the SFT model, in its standard deviations")
    for axis in axes:
        axis.legend(loc="lower left")
    save(figure, out)


def draw_law(axis, law, row, colour, label):
    """The points of one reward model and the law that was fitted to them."""
    points, found = row[law], row["laws"][law]
    d, gold, proxy = points["d"], points["gold"], points["proxy"]
    if law == "bon":                                            # these have intervals: (value, low, high)
        (gold, low, high), (proxy, _, _) = zip(*gold), zip(*proxy)
        axis.vlines(d, low, high, color=colour)
    axis.plot(d, gold, color=colour, linestyle="none", marker="o", markersize=3, alpha=0.5)
    axis.plot(d, proxy, color=colour, linestyle="--", linewidth=1)
    line = [max(d) * k / 200 for k in range(1, 201)]
    fit = [x * (found["a"] - found["b"] * (x if law == "bon" else math.log(x))) for x in line]
    axis.plot(line, fit, color=colour, linewidth=1.8, label=f"{label}, R² {found['r2']:.3f}")
    if found["turnover"]:
        axis.axvline(found["turnover"], color=colour, linewidth=0.8, linestyle=":")


# ---- the command line ------------------------------------------------------------------------------------------------

def read_metrics(folder):
    """The rows of metrics.jsonl of a run."""
    read_run(folder)
    rows = read_rows(Path(folder) / "metrics.jsonl")
    require(rows, f"{folder}: metrics.jsonl has no step yet")
    return rows


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.plot", description=__doc__)
    parser.add_argument("folders", nargs="+", help="folders of runs")
    parser.add_argument("--kind", choices=("curves", "kl"), default="curves")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="names in metrics.jsonl, a panel each")
    parser.add_argument("--labels", nargs="+", help="names for the legend, one per folder [the folders' own]")
    parser.add_argument("--out", help="the picture to write [the kind's name.png]")
    args = parser.parse_args(argv)
    labels, out = args.labels or args.folders, args.out or f"{args.kind}.png"
    require(len(labels) == len(set(labels)) == len(args.folders),
            f"the legend has {len(set(labels))} different names for {len(args.folders)} folders: "
            "give each a name with --labels")
    draw = draw_kl if args.kind == "kl" else draw_curves
    draw(dict(zip(labels, map(read_metrics, args.folders))), out, args.metrics)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
