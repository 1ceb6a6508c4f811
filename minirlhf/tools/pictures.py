"""The pictures themselves; `python -m minirlhf.tools.plot` and the reports draw with these. Needs matplotlib."""

import math

from minirlhf.running.errors import UserError

PANELS = [  # metric, title, unit, healthy range
    ("objective/scores", "Score of the reward model", "deviations of the SFT model's", None),
    ("objective/gold", "True preference (never trained on)", "gold, 0 to 1", None),
    ("objective/kl", "KL to the SFT model", "nats per sequence", (0, 15)),
    ("objective/entropy", "Entropy of the policy", "nats per sequence", (4, None)),
    ("val/eos_rate", "Responses that end by themselves", "share", (0.98, 1)),
    ("val/length", "Length of a response", "tokens, EOS included", None),
    ("policy/approxkl_avg", "How far one update moves the policy", "approx-KL, nats per token", (0, 0.2)),
    ("policy/clipfrac_avg", "Ratios that the clip stops", "share of the tokens", (0, 0.2)),
    ("val/explained_variance", "What the value model foresees", "explained variance", (0.2, 1)),
]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]     # Okabe and Ito: safe for the colour-blind


def pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plots need matplotlib: pip install -r tests/requirements.txt") from None
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
                         "axes.titlesize": 11, "axes.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
                         "savefig.dpi": 110, "figure.constrained_layout.use": True})
    return plt


def spans(low, middle, high):
    """The ends of error bars as matplotlib wants them: distances from the middle."""
    return [[b - a for a, b in zip(low, middle)], [b - a for a, b in zip(middle, high)]]


def save(plt, figure, out):
    figure.savefig(out)
    plt.close(figure)


def draw_curves(runs, out):
    """runs: {label: rows of metrics} -> a panel per metric, its healthy range shaded."""
    plt = pyplot()
    figure, axes = plt.subplots(3, 3, figsize=(12, 8.5), sharex=True)
    for axis, (metric, title, unit, healthy) in zip(axes.flat, PANELS):
        for colour, (label, rows) in zip(COLOURS * len(runs), runs.items()):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                axis.plot(*zip(*points), color=colour, linewidth=1.2, label=label)
        if healthy and axis.lines:
            low, high = axis.get_ylim()
            top = high if healthy[1] is None else healthy[1]
            axis.axhspan(healthy[0], max(top, healthy[0]), color="0.9", zorder=0)
            axis.set_ylim(low, high)
        axis.set(title=title, ylabel=unit)
    for axis in axes[-1]:
        axis.set_xlabel("PPO iteration")
    if len(runs) > 1:
        axes[0][2].legend()
    save(plt, figure, out)


def draw_kl(runs, out):
    """runs: {label: rows of metrics} -> score and, where it is known, gold against KL: a point per iteration."""
    plt = pyplot()
    metrics = [panel for panel in PANELS[:2] if any(panel[0] in row for rows in runs.values() for row in rows)]
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.5 * len(metrics), 4), squeeze=False)
    for axis, (metric, title, unit, _) in zip(axes[0], metrics):
        for colour, (label, rows) in zip(COLOURS * len(runs), runs.items()):
            points = [(row["objective/kl"], row[metric]) for row in rows if metric in row]
            axis.plot(*zip(*points), color=colour, linewidth=0.6, marker="o", markersize=3, label=label)
        axis.set(title=title, ylabel=unit, xlabel="KL to the SFT model, nats per sequence")
    if len(runs) > 1:
        axes[0][0].legend()
    save(plt, figure, out)


def draw_calibration(rewards, out):
    """rewards: {label: "reward" of an assessment's report} -> how often a reward model is right against how sure it is."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 4.5))
    axis.plot([0.5, 1], [0.5, 1], color="0.5", linestyle="--", linewidth=1, label="perfectly calibrated")
    for colour, (label, reward) in zip(COLOURS * len(rewards), rewards.items()):
        x, accuracy, n = zip(*reward["reliability"])
        y, low, high = ([row[name] for row in accuracy] for name in ("value", "low", "high"))
        axis.errorbar(x, y, spans(low, y, high), color=colour, linewidth=1.2, marker="o", markersize=4, capsize=2,
                      label=f"{label}: ECE {reward['ece']['value']:.3f}, {sum(n):,} pairs")
    axis.set(xlabel="probability that the model gives the answer it prefers",
             ylabel="share of pairs in which annotators agree with it",
             title="Calibration of the reward model (95 % intervals)")
    axis.legend()
    save(plt, figure, out)


def draw_overoptimization(report, out):
    """The report of tools.overoptimize -> gold (points, and the fitted law as a line) and proxy (dashed) against sqrt(KL)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    titles = "Best of n:  R = d (a - b d)", "PPO without KL penalty:  R = d (a - b log d)"
    for axis, law, title in zip(axes, ("bon", "rl"), titles):
        for colour, (count, row) in zip(COLOURS, report["labels"].items()):
            points, found = row[law], row["laws"][law]
            d, gold, proxy = points["d"], points["gold"], points["proxy"]
            if law == "bon":                                    # (value, low, high)
                (gold, low, high), (proxy, _, _) = zip(*gold), zip(*proxy)
                axis.errorbar(d, gold, spans(low, gold, high), color=colour, linestyle="none", marker="o", markersize=4, capsize=2)
            else:
                axis.plot(d, gold, color=colour, linestyle="none", marker="o", markersize=3, alpha=0.5)
            axis.plot(d, proxy, color=colour, linestyle="--", linewidth=1)
            line = [max(d) * k / 200 for k in range(1, 201)]
            bend = [x if law == "bon" else math.log(x) for x in line]
            axis.plot(line, [x * (found["a"] - found["b"] * g) for x, g in zip(line, bend)], color=colour, linewidth=1.8,
                      label=f"{count} labels (accuracy {row['rm_accuracy_gold']:.2f}), R² {found['r2']:.3f}")
            if found["turnover"]:
                axis.axvline(found["turnover"], color=colour, linewidth=0.8, linestyle=":")
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set(title=title, xlabel="d = sqrt(KL to the SFT model), sqrt(nats per sequence)")
    axes[0].plot([], [], color="0.3", marker="o", linestyle="-", label="gold, and its fitted law; dotted: its turnover")
    axes[0].plot([], [], color="0.3", linestyle="--", label="proxy: what the reward model says")
    axes[0].set_ylabel("reward above the SFT model, in its deviations")
    axes[0].legend(loc="lower left")
    axes[1].legend(loc="lower left")
    save(plt, figure, out)
