"""What a report says, as tables: the main ones for a terminal of 80 columns, all of them for the page report.html."""

import textwrap
from typing import NamedTuple

WIDTH = 80          # of the terminal
FIGURES = {  # name: what it is, and its unit
    "annotator_agreement": "two annotators agree", "rm_accuracy_gold": "reward model: pairs ordered as gold does",
    "rm_accuracy_heldout": "reward model: pairs ordered as the annotators do",
    "win_rate": "win rate against SFT in gold", "gold": "true preference, 0 to 1",
    "attributes_right": "all that was asked for is right", "mood": "mood as asked",
    "who": "person as asked", "what": "thing as asked", "rude": "rude", "grammatical": "grammatical",
    "stereotype_gap": "P(she) for a female stereotype minus for a male one",
    "eos_rate": "answers that end by themselves", "length": "tokens, EOS included",
    "distinct_1": "different tokens / tokens", "distinct_2": "different pairs / pairs",
    "distinct_3": "different triples / triples", "repetition": "4-grams that the same answer has had before",
    "entropy": "entropy, nats per sequence", "entropy_per_token": "entropy, nats per token",
    "perplexity": "perplexity on demonstrations", "kl": "KL to the reference (k1), nats per sequence",
    "kl_k3": "KL (k3), nats per sequence", "kl_per_token": "KL (k1), nats per token",
    "kl_k3_per_token": "KL (k3), nats per token",
}


class Table(NamedTuple):
    """One table of a report. The first column holds names."""
    title: str
    head: list
    rows: list
    text: str = ""


def p_value(p):
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# ---- the terminal ----------------------------------------------------------------------------------------------------

def shortened(name, width):
    """A name without its beginning if it is too long: the end of a path says more."""
    return name if len(name) <= width else ".." + name[len(name) - width + 2:]


def print_table(table):
    """Prints a table. The first column takes what room the numbers leave it."""
    if not table.rows:
        return
    head = [shortened(name, 23) for name in table.head]
    cells = [head, *([str(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    first = min(widths[0], WIDTH - sum(2 + width for width in widths[1:]))
    print("", *textwrap.wrap(table.title, WIDTH), *textwrap.wrap(table.text, WIDTH), sep="\n")
    for name, *others in cells:
        line = f"{shortened(name, first):<{first}}"
        print((line + "".join(f"  {cell:>{width}}" for cell, width in zip(others, widths[1:]))).rstrip())


def print_figures(title, columns):
    """Prints the figures {model: {name: Estimate}}, two models side by side, the win rate first."""
    models = list(columns)
    for start in range(0, len(models), 2):
        pair = models[start:start + 2]
        names = dict.fromkeys(name for model in pair for name in columns[model])
        rows = [[name, *(columns[model].get(name, "") for model in pair)]
                for name in sorted(names, key=lambda name: name != "win_rate")]
        print_table(Table(title, ["", *pair], rows))


def print_report(report):
    """Prints the verdicts of a report, then its notes and figures."""
    for table in verdicts_of(report):
        print_table(table)
    for note in report["notes"]:
        print("", *textwrap.wrap(f"Note: {note}.", WIDTH), sep="\n")
    print_figures(f"Each model on {report['n_prompts']:,} held-out prompts, 95 % intervals", report["models"])


# ---- what a report says ----------------------------------------------------------------------------------------------

def verdicts_of(report):
    """The tables that answer what the assessment is for, the most important first."""
    yield from wins_of(report)
    rows = [[names, w["win_rate"], w["win_rate"].n, w["ties"], p_value(w["p"])] for names, w in report["votes"].items()]
    yield Table("What people said", ["", "win rate", "prompts", "ties", "p"], rows)
    yield from accuracies_of(report.get("reward"))
    yield from bias_of(report)


def wins_of(report):
    first = next(iter(report["models"]))
    for name, found in report["comparisons"].items():
        rows = [[judge, w["win_rate"], w["length_controlled"], w["win_rate"].n, w["ties"], p_value(w["p"])]
                for judge, w in found["by"].items()]
        head = ["judge", "win rate", "at equal length", "n", "ties", "p"]
        yield Table(f"Win rate of {name} against {first}", head, rows, "A tie is half a win. p: the exact sign test.")


def accuracies_of(reward):
    if not reward:
        return
    length = reward["length_only"]
    accuracies = {
        "the labels": reward["accuracy"], "true preference (gold)": reward.get("accuracy_gold"),
        "single annotators": reward["accuracy_against_one_annotator"],
        "one annotator against another": reward["annotators_agree"],
        f"length alone ({length['direction']})": length["accuracy"],
        "ECE: calibration error over 10 bins": reward["ece"],
    }
    yield Table(f"The reward model {reward['model']}", ["accuracy against", "", "n"],
                [[name, right, right.n] for name, right in accuracies.items() if right],
                f"On {reward['pairs']:,} pairs of {reward['prompts']:,} held-out prompts ({reward['comparisons']}). "
                f"n counts prompts. It differs from length alone with p {p_value(length['p_of_the_difference'])}.")


def bias_of(report):
    probes = dict.fromkeys(probe for found in report["bias"].values() for probe in found)
    for probe in probes:
        rows = [[model, gap, gap.n, p_value(p), "yes" if flagged else "no"]
                for model, found in report["bias"].items() for gap, p, flagged in [found[probe]]]
        yield Table(f"Bias: {probe}", ["model", "gap in nats", "persons", "p", "flagged"], rows,
                    "Gap: how much likelier the stereotypical continuation is for one group of persons than for the "
                    "other. 0 is no bias. p: the label test over persons.")


def details_of(report):
    """The tables that only the page has."""
    models = report["models"]
    first, names = next(iter(models)), dict.fromkeys(name for figures in models.values() for name in figures)
    rows = [[FIGURES.get(name, name), *(figures.get(name, "") for figures in models.values()),
             next(figures[name].n for figures in models.values() if name in figures)] for name in names]
    yield Table("Each model", ["", *models, "n"], rows)
    for name, found in report["comparisons"].items():
        rows = [[FIGURES.get(fact, fact), gap, gap.n, p_value(p)] for fact, (gap, p) in found["differences"].items()]
        yield Table(f"{name} minus {first}, on the same prompts", ["mean difference", "", "n", "flip test p"], rows)
    where = {"prompts": "these prompts", "own": "tools/evaluate/quality.py"}
    rows = [[kind, model, where[source], right, right.n] for model, found in report["instructions"].items()
            for source, kinds in found.items() for kind, right in kinds.items()]
    yield Table("Instructions that need no judge", ["asked for", "model", "asked in", "fulfilled", "n"], rows)
    if reward := report.get("reward"):
        groups = [(f"ranks {low:.0f} apart", right, pairs) for low, _, right, pairs in reward["by_margin_in_ranks"]]
        groups += [(f"gold {low:g} to {min(high, 1):g} apart", right, pairs)
                   for low, high, right, pairs in reward.get("by_margin_in_gold", [])]
        rows = [[name, right, right.n, pairs] for name, right, pairs in groups + reward["by_length"]]
        yield Table(f"Where {reward['model']} is right", ["among pairs with", "accuracy", "prompts", "pairs"], rows)
        rows = [[f"{claimed:.3f}", right, right.n, pairs] for claimed, right, pairs in reward["reliability"]]
        yield Table(f"Is {reward['model']} as often right as it claims?",
                    ["mean probability that it gives its choice", "the choice is right", "prompts", "pairs"], rows)
    rows = [[sample["why"], sample["prompt"], *sample["answers"].values()] for sample in report["samples"]]
    yield Table("Samples", ["why", "prompt", *models], rows, "Best and worst: the first judge's score of the last "
                "model. Most changed: its KL to the first model, or else the change of that score.")


def introduction(report):
    """One sentence on how the answers were sampled."""
    sampling = report["sampling"]
    stop = f", stop {sampling['stop']}" if sampling["stop"] else ""
    return (f"{report['n_prompts']} held-out prompts ({report['prompts']}), one sampled answer of each model, seed "
            f"{report['seed']}, temperature {sampling['temperature']:g}, at most {sampling['max_response']} "
            f"tokens{stop}. In brackets: 95 % intervals.")
