"""What a report says, as tables: the main ones for the terminal, all of them for the page report.html."""

import textwrap
from typing import NamedTuple

from minirlhf.stats import Estimate

WIDTH = 100         # of the sentences in the terminal
FIGURES = {  # name: what it is, and its unit
    "annotator_agreement": "two annotators agree", "rm_accuracy_gold": "reward model: pairs ordered as gold does",
    "rm_accuracy_heldout": "reward model: pairs ordered as the annotators do",
    "win_rate": "win rate against SFT in gold", "gold": "true preference, 0 to 1",
    "attributes_right": "all that was asked for is right", "mood": "mood as asked",
    "who": "person as asked", "what": "thing as asked", "rude": "rude", "grammatical": "grammatical",
    "stereotype_gap": "P(she) for a female stereotype minus for a male one",
    "eos_rate": "answers that end by themselves", "length": "tokens, EOS included",
    "distinct_2": "different pairs / pairs", "perplexity": "perplexity on demonstrations",
    "kl": "KL to the reference, nats per sequence",
}


ALIVE = {   # figures that show a collapse, in the words of the verdict
    "length": "{:.1f} tokens an answer", "eos_rate": "{:.0%} of them end by themselves",
    "distinct_2": "{:.0%} of their token pairs are different", "perplexity": "perplexity {:.1f}",
    "kl": "KL {:.1f} nats from the first model",
}


class Table(NamedTuple):
    """One table of a report. The first column holds names."""
    title: str
    head: list
    rows: list
    text: str = ""


# ---- the terminal ----------------------------------------------------------------------------------------------------

def print_table(table):
    """Prints a table unless it has no rows."""
    if not table.rows:
        return
    cells = [table.head, *([str(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("", *textwrap.wrap(table.title, WIDTH), *textwrap.wrap(table.text, WIDTH), sep="\n")
    for name, *others in cells:
        line = f"{name:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(others, widths[1:]))
        print(line.rstrip())


def print_report(report):
    """Prints the verdict of a report, its tables and notes, and the figures of its models, two side by side."""
    print("", *(textwrap.fill(sentence, WIDTH) for sentence in verdict_of(report)), sep="\n")
    for table in verdicts_of(report):
        print_table(table)
    for note in report["notes"]:
        print("", *textwrap.wrap(f"Note: {note}.", WIDTH), sep="\n")
    models = list(report["models"])
    for start in range(0, len(models), 2):
        print_table(figures_of(report, models[start:start + 2], {}))


# ---- what a report says ----------------------------------------------------------------------------------------------

def verdict_of(report):
    """The answer in sentences: who wins according to whom, people first, and does each model still write?"""
    first, *others = report["models"]
    return [*(f"By {judge}: {winner(name, first, **found)}"
              for name in others for judge, found in report["comparisons"][name]["by"].items()),
            *(alive(name, own, report["models"][first]) for name, own in report["models"].items())]


def winner(name, first, win_rate, ties, p):
    """Who is better, or that too few prompts have been judged to tell. The last three: from stats.win_rate."""
    said = f"{name} is {'better' if win_rate.value > 0.5 else 'worse'} than {first}"
    if win_rate.low <= 0.5 <= win_rate.high:
        said = (f"too few prompts to say whether {name} is better than {first}" if win_rate.high - win_rate.low > 0.1
                else f"{name} and {first} are about equally good")
    return (f"{said}. Win rate {win_rate}, n = {win_rate.n:,} ({ties} tied), "
            f"{'p < 0.001' if p < 0.001 else f'p = {p:.3f}'}.")


def alive(name, own, first):
    """What shows a collapse of a model, and whether there is one. own, first: its figures and the first model's."""
    times = {figure: own[figure].value / start.value for figure, start in first.items()
             if figure in own and start.value}
    signs = {"its answers are less than half as long": times.get("length", 1) < 0.5,
             "most of its answers are cut off": own["eos_rate"].value < 0.5,
             "its answers have become alike": times.get("distinct_2", 1) < 0.3,
             "its perplexity has more than doubled": times.get("perplexity", 1) > 2}
    wrong = ", ".join(sign for sign, seen in signs.items() if seen)
    said = [text.format(own[figure].value) for figure, text in ALIVE.items() if figure in own]
    return f"{f'Not healthy: {name}, {wrong}' if wrong else f'Alive: {name}'} ({', '.join(said)})."


def verdicts_of(report):
    """The tables that answer what the assessment is for, the most important first."""
    yield from accuracies_of(report.get("reward"))
    yield from bias_of(report)


def accuracies_of(reward):
    if not reward:
        return
    longer, rule = reward["longer_is_preferred"], "longer"
    if longer.value < 0.5:
        longer, rule = Estimate(1 - longer.value, 1 - longer.high, 1 - longer.low, longer.n), "shorter"
    accuracies = {
        "the labels": reward["accuracy"], "true preference (gold)": reward.get("accuracy_gold"),
        "single annotators": reward["accuracy_against_one_annotator"],
        "one annotator against another": reward["annotators_agree"],
        f"length alone ({rule} is better)": longer,
        "what it claims, on average": reward["claimed"],
    }
    yield Table(f"The reward model {reward['model']}", ["accuracy against", "accuracy", "n"],
                [[name, right, right.n] for name, right in accuracies.items() if right],
                f"On {reward['pairs']:,} pairs of {reward['prompts']:,} held-out prompts ({reward['comparisons']}). "
                "n counts prompts. It claims sigmoid(difference of the scores) for each pair.")


def bias_of(report):
    probes = dict.fromkeys(probe for found in report["bias"].values() for probe in found)
    for probe in probes:
        rows = [[model, found[probe], found[probe].n, "no" if found[probe].low <= 0 <= found[probe].high else "yes"]
                for model, found in report["bias"].items()]
        yield Table(f"Bias: {probe}", ["model", "gap in nats", "persons", "flagged"], rows,
                    "Gap: how much likelier the stereotypical continuation is for one group of persons than for the "
                    "other. 0 is no bias. Flagged: 0 is outside the interval.")


def figures_of(report, models, said=FIGURES):
    """The figures of some models side by side. said: what to call a figure, if not by its name in report.json."""
    figures = [report["models"][model] for model in models]
    names = dict.fromkeys(name for own in figures for name in own)
    rows = [[said.get(name, name), *(own.get(name, "–") for own in figures)] for name in names]
    return Table(f"Each model on {report['n_prompts']:,} held-out prompts, 95 % intervals", ["figure", *models], rows)


def details_of(report):
    """The tables that only the page has."""
    models = list(report["models"])
    yield figures_of(report, models)
    for name, found in report["comparisons"].items():
        rows = [[FIGURES.get(fact, fact), gap, gap.n] for fact, gap in found["differences"].items()]
        yield Table(f"{name} minus {models[0]}, on the same prompts", ["figure", "mean difference", "n"], rows)
    rows = [[kind, model, right, right.n] for model, kinds in report["instructions"].items()
            for kind, right in kinds.items()]
    yield Table("Instructions that need no judge", ["asked for", "model", "fulfilled", "n"], rows)
    if reward := report.get("reward"):
        rows = [[name, right, right.n, pairs] for name, (right, pairs) in reward["groups"].items()]
        yield Table(f"Where {reward['model']} is right", ["among pairs with", "accuracy", "prompts", "pairs"], rows)
    rows = [[sample["why"] or "–", sample["prompt"], *map(shown, sample["answers"].values(),
                                                          sample["finished"].values())]
            for sample in report["samples"]]
    yield Table("Samples", ["why", "prompt", *models], rows,
                "The last model's best and worst answers by the first judge, and its score.")


def shown(text, finished):
    """An answer as a cell: nobody takes an empty one for a gap, or a cut-off one for the model's own end."""
    return (text if text.strip() else "(empty)") + " […cut off]" * (not finished)


def introduction(report):
    """One sentence on how the answers were sampled."""
    sampling = report["sampling"]
    stop = f", stop {sampling['stop']}" if sampling["stop"] else ""
    return (f"{report['n_prompts']} held-out prompts ({report['prompts']}), one sampled answer of each model, seed "
            f"{report['seed']}, temperature {sampling['temperature']:g}, at most {sampling['max_response']} "
            f"tokens{stop}. In brackets: 95 % intervals.")
