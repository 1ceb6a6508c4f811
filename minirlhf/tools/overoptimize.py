"""Over-optimisation: what happens to the true preference when the reward model is optimised harder and harder?

    python -m minirlhf.tools.overoptimize --out out/overoptimize      (needs out/sft; about 15 minutes on 2 CPU cores)

The experiment of Gao, Schulman and Hilton 2022 ("Scaling laws for reward model overoptimization"), with a gold reward
that can be read. Reward models are trained on fewer and more comparisons. Each is then optimised in two ways: by PPO
without a KL penalty, where every iteration is a point further from the SFT model, and by best-of-n, which takes the
best of n samples. Gold (what people want) and proxy (what the reward model says) are drawn against d = sqrt(KL).
"""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from minirlhf.data import read_prompts
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.running.device import pick_device
from minirlhf.running.config import Parser
from minirlhf.files.errors import require, run_main
from minirlhf.running.runs import move_aside, read_report, read_rows, write_json
from minirlhf.assess import Sampling, answer, gold_function, scores_of
from minirlhf.stats import ratio
from minirlhf.tools.experiment import run_script
from minirlhf.weights import from_pretrained, scalar_from_pretrained

VISITS = 2400                       # prompts that a reward model reads in all, within 4 to 20 epochs
MISSING_EOS = -3.0                  # the score of an unfinished answer, the same in both ways of optimising
FORMULAS = {"bon": "best of n: d(a - b d)", "rl": "PPO: d(a - b log d)"}


# ---- the laws and the arithmetic of best-of-n (Gao 2022), pure functions ---------------------------------------------
# d = sqrt(KL) in sqrt(nats), always > 0. R = reward minus that of the SFT model. law: "bon" or "rl".

def fit(d, R, law):
    """Least squares of R = d (a - b g(d)), g(d) = d for "bon" and log d for "rl" (section 3.1) -> a, b, R^2."""
    d, R = np.asarray(d, float), np.asarray(R, float)
    X = np.stack([d, -d * (d if law == "bon" else np.log(d))], axis=1)             # (points, 2)
    (a, b), *_ = np.linalg.lstsq(X, R, rcond=None)
    spread = ((R - R.mean()) ** 2).sum()
    return float(a), float(b), float(1 - ((R - X @ (a, b)) ** 2).sum() / spread) if spread else math.nan


def turnover(a, b, law, farthest):
    """The d beyond which, by the law, more optimisation makes it worse. None if no such d was reached."""
    if b <= 0:
        return None
    d = a / (2 * b) if law == "bon" else math.exp(min(a / b - 1, 700))              # where the law's derivative is 0
    return max(d, 0.0) if d <= farthest else None


def fitted(d, R, law, resampled):
    """The law's parameters, their 95 % intervals from resampled curves [(d, R), ...], and its turnover, as a dict."""
    a, b, r2 = fit(d, R, law)
    low, high = np.quantile([fit(*curve, law)[:2] for curve in resampled], [0.025, 0.975], axis=0)
    return {"a": a, "a_ci": [low[0], high[0]], "b": b, "b_ci": [low[1], high[1]], "r2": r2, "n": len(d),
            "turnover": turnover(a, b, law, max(d))}


def highest(d, R, window=1):
    """The highest mean of R over `window` points that are neighbours in d -> (their mean d, that mean)."""
    order, ones = np.argsort(d), np.full(window, 1 / window)
    means = [np.convolve(np.asarray(values)[order], ones, mode="valid") for values in (d, R)]
    return tuple(float(mean[means[1].argmax()]) for mean in means)


def best_of_n_kl(n):
    """The KL between the best of n samples and the model that they come from, in nats (section 2)."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy, values, n):
    """The expected value of the best by proxy of n samples: proxy, values (N prompts, S samples) -> (N,).

    The n are drawn without replacement from the S. The i-th worst (from 0) is the best of them with probability
    C(i, n-1) / C(S, n).
    """
    S = proxy.shape[1]
    chance = np.array([math.comb(i, n - 1) / math.comb(S, n) for i in range(S)])
    return np.take_along_axis(values, proxy.argsort(axis=1), axis=1) @ chance


# ---- the experiment --------------------------------------------------------------------------------------------------

def sample_sft(args, prompts, samples, device):
    """`samples` answers of the SFT model to each prompt, those of one prompt next to each other."""
    model, tokenizer = from_pretrained(args.model).to(device), load_tokenizer(args.model)
    rows = [row for row in prompts for _ in range(samples)]
    return answer(model, tokenizer, rows, Sampling(args.max_response, seed=args.seed), "sft")


def best_of_n_curve(folder, pool, gold, samples, device):
    """Points of best-of-n under one reward model, n = 1, 2, 4, ...: d, and gold and proxy (N, points) per prompt."""
    reward = scalar_from_pretrained(str(folder)).to(device)
    proxy = scores_of(reward, pool.prompt_ids, pool.ids).reshape(-1, samples)                      # (N, S)
    proxy[~np.array(pool.finished).reshape(proxy.shape)] = MISSING_EOS
    proxy -= proxy.mean()                                                                       # above the SFT model
    ns = [2 ** k for k in range(int(math.log2(samples)) + 1)]
    curves = {name: np.stack([best_of_n(proxy, values, n) for n in ns], axis=1)
              for name, values in (("gold", gold), ("proxy", proxy))}
    return {"n": ns, "d": [math.sqrt(best_of_n_kl(n)) for n in ns], **curves}


def ppo_curve(folder, start, deviation):
    """Points of a PPO run from its log, one per iteration whose estimated KL is above 0.

    start, deviation: mean and standard deviation of the SFT model's gold. The proxy is in its own deviations already.
    """
    rows = [row for row in read_rows(Path(folder) / "metrics.jsonl") if row["objective/kl"] > 0]
    return {"d": [math.sqrt(row["objective/kl"]) for row in rows], "proxy": [row["objective/scores"] for row in rows],
            "gold": [(row["objective/gold"] - start) / deviation for row in rows]}


def laws(bon, rl, seed=0, resamples=500):
    """Both laws of one reward model, with intervals: best-of-n from resampled prompts, PPO from resampled blocks of
    iterations, since neighbouring iterations are alike."""
    rng, d = np.random.default_rng(seed), np.array(bon["d"][1:])                    # n = 1 is the SFT model itself
    above = bon["gold"][:, 1:] - bon["gold"][:, :1]                                 # (N, points)
    prompts = rng.integers(len(above), size=(resamples, len(above)))
    rl_d, rl_R = np.array(rl["d"]), np.array(rl["gold"])
    n, block = len(rl_d), min(8, len(rl_d))
    starts = rng.integers(n - block + 1, size=(resamples, -(-n // block), 1))
    iterations = (starts + np.arange(block)).reshape(resamples, -1)[:, :n]
    return {"bon": fitted(d, above.mean(axis=0), "bon", [(d, above[rows].mean(axis=0)) for rows in prompts]),
            "rl": fitted(rl_d, rl_R, "rl", [(rl_d[rows], rl_R[rows]) for rows in iterations])}


def experiment(args, lines, gold, device):
    """Trains, samples and fits everything -> the report. lines: those of the file of comparisons."""
    pool = sample_sft(args, read_prompts(args.heldout)[:args.prompts], args.samples, device)
    golds = np.array(gold(pool.prompts, pool.texts)).reshape(-1, args.samples)                      # (N, S)
    before = sample_sft(args, read_prompts(args.data), 1, device)           # PPO's prompts are not the held-out ones
    start, deviation = float(np.mean(gold(before.prompts, before.texts))), float(golds.std())
    golds = (golds - golds.mean()) / deviation
    found = {}
    for count in args.labels:
        rm, ppo = train(args, count, lines[:count])
        rl, bon = ppo_curve(ppo, start, deviation), best_of_n_curve(rm, pool, golds, args.samples, device)
        means = {name: [ratio(column)[:3] for column in bon[name].T] for name in ("gold", "proxy")}
        found[count] = {"rm_accuracy_gold": read_report(rm)["rm_accuracy_gold"], "laws": laws(bon, rl), "rl": rl,
                        "bon": bon | means}
    return {"sft_gold": start, "sft_gold_deviation": deviation, "prompts": len(golds), "samples": args.samples,
            "iterations": args.iterations, "seed": args.seed, "labels": found}


def train(args, count, lines):
    """A reward model on these `count` comparisons, and PPO on it -> the folders of both."""
    few, rm, ppo = (Path(args.out) / name for name in (f"comparisons_{count}.jsonl", f"rm_{count}", f"ppo_{count}"))
    few.write_bytes(b"".join(lines))
    shared = {"model": args.model, "gold": args.gold, "seed": args.seed, "device": args.device}
    run_script("train_rm.py", data=few, heldout=args.heldout_comparisons, out=rm,
               epochs=min(20, max(4, VISITS // count)), **shared)
    run_script("train_ppo.py", reward=rm, data=args.data, heldout="", out=ppo, beta=0.0, lr=args.lr, temperature=1.0,
               missing_eos=MISSING_EOS, iterations=args.iterations, max_response=args.max_response, **shared)
    return rm, ppo


# ---- the picture -----------------------------------------------------------------------------------------------------

def draw(report, out):
    """Gold (points, and the fitted law as a line) and proxy (dashed) against sqrt(KL)."""
    from matplotlib.figure import Figure                        # not pyplot, which wants a window
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, law in zip(figure.subplots(1, 2, sharey=True), FORMULAS):
        for n, (count, row) in enumerate(report["labels"].items()):
            draw_law(axis, law, row, f"C{n}", f"{count} labels (accuracy {row['rm_accuracy_gold']:.2f})")
        axis.set(title=f"{FORMULAS[law]}\npoints: gold, line: its law, dotted: its turnover, dashed: the reward model",
                 xlabel="d = sqrt(KL to the SFT model), sqrt(nats per sequence)",
                 ylabel="reward above the SFT model, in its standard deviations")
        axis.legend(loc="lower left", frameon=False)
    figure.savefig(out, dpi=110)


def draw_law(axis, law, row, colour, label):
    """The points of one reward model and the law that was fitted to them."""
    d, found = row[law]["d"], row["laws"][law]
    # Best-of-n has intervals, (value, low, high). A point of PPO is a value alone.
    gold, proxy = (np.reshape(row[law][name], (len(d), -1)) for name in ("gold", "proxy"))
    axis.vlines(d, gold.min(axis=1), gold.max(axis=1), color=colour)
    axis.plot(d, gold[:, 0], color=colour, linestyle="none", marker="o", markersize=3, alpha=0.5)
    axis.plot(d, proxy[:, 0], color=colour, linestyle="--", linewidth=1)
    x = np.linspace(0, max(d), 201)[1:]
    axis.plot(x, x * (found["a"] - found["b"] * (x if law == "bon" else np.log(x))), color=colour,
              label=f"{label}, R² {found['r2']:.3f}")
    if found["turnover"]:
        axis.axvline(found["turnover"], color=colour, linewidth=0.8, linestyle=":")


# ---- the command line ------------------------------------------------------------------------------------------------

def describe(report):
    """The fitted laws as lines of a table. Next to each law's turnover: where gold was measured to be highest."""
    lines = [f"d = sqrt(KL); gold above the SFT model's mean, in its standard deviations "
             f"({report['sft_gold_deviation']:.3f})",
             f"{'labels':>7} {'rm':>6}  {'law':<22}{'a':>22}{'b':>24} {'R^2':>7}  {'turnover at d':<14} highest gold"]
    for count, row in report["labels"].items():
        tops = {"bon": highest(row["bon"]["d"], [value for value, _, _ in row["bon"]["gold"]]),
                "rl": highest(row["rl"]["d"], row["rl"]["gold"], min(5, len(row["rl"]["d"])))}
        for law, (d, top) in tops.items():
            f = row["laws"][law]
            a, b = (f"{f[name]:.3f} [{f[name + '_ci'][0]:.3f}, {f[name + '_ci'][1]:.3f}]" for name in "ab")
            turn = "none seen" if f["turnover"] is None else f"{f['turnover']:.2f}"
            lines.append(f"{count:>7} {row['rm_accuracy_gold']:>6.3f}  {FORMULAS[law]:<22}{a:>22}{b:>24} "
                         f"{f['r2']:>7.3f}  {turn:<14} {top:+.2f} at d {d:.2f}")
    return lines


OPTIONS = (     # name, default, help
    ("model", "out/sft", "the SFT model"),
    ("comparisons", "data/tiny/comparisons.jsonl", "comparisons for the reward models"),
    ("heldout_comparisons", "data/tiny/comparisons_test.jsonl", "comparisons for their accuracy"),
    ("data", "data/tiny/prompts.jsonl", "prompts of PPO"),
    ("heldout", "data/tiny/prompts_test.jsonl", "prompts of best-of-n"),
    ("gold", "auto", "FILE.py:function, the true preference; 'auto' is the embedded world's for its own data"),
    ("prompts", 96, "how many prompts for best-of-n"),
    ("samples", 128, "samples for each of them"),
    ("iterations", 80, "iterations of PPO"),
    ("lr", 1.5e-4, "learning rate of PPO: small steps, so that small KL gets points too"),
    ("max_response", 48, "most tokens of an answer"),
    ("seed", 1, "seed of everything"),
    ("device", "", "cuda, mps or cpu; the first that is available if not given"),
    ("out", "out/overoptimize", "the folder of all runs, the report and the picture"),
)


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.overoptimize", description=__doc__)
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 400, 1600, 4000],
                        help="comparisons per reward model [100 400 1600 4000]")
    for name, default, help in OPTIONS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{help} [{default}]")
    args = parser.parse_args(argv)
    require(find_spec("matplotlib"), "the picture needs matplotlib: pip install -r tests/requirements.txt")
    device, out = pick_device(args.device), Path(args.out)
    gold, _ = gold_function(args.gold, args.data)
    require(gold is not None,
            "over-optimisation shows in a true preference, and these prompts have none: "
            "give --gold FILE.py:function")
    require(args.prompts >= 2 and args.samples >= 4 and args.iterations >= 3,
            "a law needs points: --prompts 2 or more, --samples 4 or more, --iterations 3 or more")
    lines = Path(args.comparisons).read_bytes().splitlines(keepends=True)
    require(1 <= min(args.labels) <= max(args.labels) <= len(lines),
            f"--labels: {args.comparisons} has {len(lines)} comparisons, so each number must be between 1 "
            f"and {len(lines)}")
    move_aside(out)
    out.mkdir(parents=True)
    report = experiment(args, lines, gold, device)
    write_json(out / "report.json", report)
    print("\n" + "\n".join(describe(report)))
    draw(report, out / "overoptimization.png")


if __name__ == "__main__":
    run_main(main)
