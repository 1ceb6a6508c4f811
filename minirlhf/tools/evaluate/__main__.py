"""The assessment: does a model follow instructions, is it fair, is it good, and what did alignment cost?

    python -m minirlhf.tools.evaluate out/sft out/ppo --reward out/rm --out out/report

samples one answer of each model to held-out prompts and writes report.md, report.json and pictures. The first model is
the reference of KL and comparisons. What only the embedded world can tell (gold) comes from data/tiny/gold.py; for other
prompts there are --judge, --votes, the probes and the instruction checks. train_ppo.py ends with the short form, assess_run.
"""

import argparse
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from minirlhf.running.compute import eos_of, pick_device
from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import Row, encode_rows, read_any, read_demonstrations, read_jsonl, read_prompts
from minirlhf.functions import TINY_GOLD, load_function
from minirlhf.running.runs import move_aside, read_run, write_json
from minirlhf.files.tensors import read_json
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.evaluate import probes
from minirlhf.tools.evaluate.compare import against_first, config_of, duels, partiality, sequence_kl
from minirlhf.tools.feedback.items import find_templates, instruction_of
from minirlhf.tools.evaluate.learning_curve import first_lines, train_rewards
from minirlhf.tools.evaluate.measure import Answers, answer, distinct, entropies, gold_function, perplexity, repetition, rewards_of
from minirlhf.tools.plot import draw_report
from minirlhf.tools.evaluate.report import as_markdown, plain
from minirlhf.tools.evaluate.reward_quality import assess_reward
from minirlhf.tools.evaluate.stats import Estimate, difference_of_rates, rate, ratio, wins_of
from minirlhf.weights import from_pretrained, scalar_from_pretrained


# ---- one model -------------------------------------------------------------------------------------------------------

def tiny_facts(answers):
    """What gold.py knows about each answer: {name: N numbers}."""
    attributes, score, female = (load_function(f"{TINY_GOLD}:{name}") for name in ("attributes", "score", "asks_for_female"))
    rows = [attributes(prompt, text) for prompt, text in zip(answers.prompts, answers.texts)]
    facts = {name: [row[name] for row in rows] for name in ("mood", "who", "what", "rude", "she", "grammatical")}
    facts["attributes_right"] = [row["mood"] and row["who"] and row["what"] for row in rows]
    return {"gold": list(map(score, rows)), **facts, "asks_for_female": list(map(female, answers.prompts))}


def gold_figures(facts):
    """The figures that only the embedded world knows."""
    names = ("attributes_right", "mood", "who", "what", "rude", "grammatical")
    figures = {"gold": ratio(facts["gold"]), **{name: rate(facts[name]) for name in names}}
    groups = [[she for she, female in zip(facts["she"], facts["asks_for_female"]) if female == kind] for kind in (True, False)]
    return figures | ({"stereotype_gap": difference_of_rates(*groups)} if all(groups) else {})


def qualities(model, tokenizer, answers, demonstrations, temperature):
    """The figures of one model that need no gold, as Estimates."""
    entropy, lengths = entropies(model, answers.prompt_ids, answers.ids, temperature), list(map(len, answers.ids))
    examples = encode_rows(demonstrations, tokenizer, model.config.n_positions, drop_long=True) if demonstrations else []
    return {
        "eos_rate": rate(answers.finished), "length": ratio(lengths),
        **{f"distinct_{n}": distinct(answers.ids, n) for n in (1, 2, 3)}, "repetition": repetition(answers.ids),
        "entropy": ratio(entropy), "entropy_per_token": ratio(entropy, lengths),
        **({"perplexity": perplexity(model, examples)} if examples else {}),
    }


# ---- the short form, with which train_ppo.py ends --------------------------------------------------------------------

def annotator_agreement(comparisons_file):
    """How often the embedded world's annotators agree on pairs that differ in gold."""
    agreement = load_function(f"{TINY_GOLD.with_name('annotate.py')}:agreement")
    return agreement([row for _, row in read_jsonl(comparisons_file)])


def flat(figures):
    """Estimates -> their values, and their intervals under "ci"."""
    return {name: figure.value for name, figure in figures.items()} | {
        "ci": {name: [figure.low, figure.high] for name, figure in figures.items()}}


def report_of(folder):
    """The report.json of a run's folder, {} if there is none."""
    file = Path(folder) / "report.json"
    return read_json(file) if file.is_file() else {}


def demonstrations_of(sft_folder):
    """The demonstrations that an SFT run held out; [] if the model was made otherwise. UserError if they are gone."""
    heldout = config_of(sft_folder).get("heldout")
    schema, rows = read_any(heldout) if heldout else ("none", [])
    return rows if schema == "demonstrations" else []


def assess_run(folder, seconds, device):
    """The report of a PPO run: its policy against the SFT model it came from, on prompts neither was trained on."""
    cfg = SimpleNamespace(**read_run(folder))
    sft_report, rm_report = report_of(cfg.model), report_of(cfg.reward)
    demonstrations, comparisons = demonstrations_of(cfg.model), config_of(cfg.reward).get("heldout")
    gold = gold_function(cfg.gold, cfg.heldout)
    tiny = gold is not None and cfg.gold == "auto"
    rows, tokenizer = read_prompts(cfg.heldout), load_tokenizer(str(folder))

    models, answers, figures = {}, {}, {}
    for name, path in (("sft", cfg.model), ("ppo", str(folder))):
        models[name] = from_pretrained(path).to(device)
        answers[name] = answer(models[name], tokenizer, rows, cfg.max_response, cfg.temperature, cfg.seed, name,
                               eos_of(cfg, tokenizer), cfg.stop_after, max_prompt=cfg.max_prompt, drop_long=cfg.drop_long)
        figures[name] = gold_figures(tiny_facts(answers[name])) if tiny else {}
        figures[name] |= qualities(models[name], tokenizer, answers[name], demonstrations, cfg.temperature)
    figures["ppo"] |= sequence_kl(models["ppo"], models["sft"], answers["ppo"], cfg.temperature)
    if gold:
        ours, theirs = (gold(answers[name].prompts, answers[name].texts) for name in ("ppo", "sft"))
        figures["ppo"]["win_rate"] = rate(wins_of(ours, theirs))
    report = {name: flat(figures[name]) for name in ("sft", "ppo")}
    return {
        "n_prompts": len(answers["sft"].prompts), "seed": cfg.seed,
        "seconds": {"sft": sft_report.get("seconds"), "rm": rm_report.get("seconds"), "ppo": seconds},
        "annotator_agreement": annotator_agreement(comparisons) if tiny and comparisons else None,
        "rm_accuracy_gold": rm_report.get("rm_accuracy_gold"), "rm_accuracy_heldout": rm_report.get("rm_accuracy_heldout"),
        "win_rate": report["ppo"].get("win_rate"), "win_rate_ci": report["ppo"]["ci"].get("win_rate"), "kl": report["ppo"]["kl"],
        **report,
    }


def print_report(columns):
    """columns: {model: flat figures} -> a table with a row per figure, each with its 95 % interval."""
    width = max(30, *(len(name) + 2 for name in columns))
    print("\n" + " " * 18 + "".join(f"{name:>{width}}" for name in columns))
    for figure in dict.fromkeys(figure for column in columns.values() for figure in column if figure != "ci"):
        cells = ["" if column.get(figure) is None else Estimate(column[figure], *column["ci"][figure], n=0)
                 for column in columns.values()]
        print(f"{figure:<18}" + "".join(f"{cell!s:>{width}}" for cell in cells))


# ---- the full form ---------------------------------------------------------------------------------------------------

def sampling_of(args):
    """max_response, temperature, stop_token, stop_after: as flags say, else as the last PPO run among the models, else plain."""
    config = next((run for run in map(config_of, reversed(args.models)) if "reward" in run), {})
    otherwise = dict(max_response=48, temperature=1.0, stop_token=-1, stop_after=0)
    return SimpleNamespace(**{name: config.get(name, value) if getattr(args, name) is None else getattr(args, name)
                              for name, value in otherwise.items()})


def instruction_checks(model, tokenizer, answers, templates, sampling, seed):
    """Instruction checks on the prompts that ask for something countable, and on the project's own INSTRUCTIONS."""
    given = probes.instruction_rates([instruction_of(prompt, templates) for prompt in answers.prompts], answers.texts)
    template = next((t for t in templates if t.count("{") == 1), "{instruction}")
    asked = {template.replace("{instruction}", text): text for text in probes.INSTRUCTIONS}
    rows = [Row("tools/probes.py", prompt) for prompt in asked]
    own = answer(model, tokenizer, rows, sampling.max_response, sampling.temperature, seed, "instructions",
                 eos_of(sampling, tokenizer), sampling.stop_after, drop_long=True)
    return {"prompts": given, "own": probes.instruction_rates([asked[prompt] for prompt in own.prompts], own.texts)}


class Assessed(NamedTuple):
    """What is found out about one model by itself."""
    answers: Answers
    figures: dict           # {name: Estimate}
    facts: dict             # {name: N numbers}, what is compared prompt by prompt
    bias: dict              # {probe: (gap, p, flagged)}
    instructions: dict      # {where it was asked: {kind of check: Estimate}}


def assess_model(name, model, tokenizer, rows, demonstrations, templates, sampling, tiny, args):
    """Everything about one model; tiny: gold.py knows the prompts."""
    own = answer(model, tokenizer, rows, sampling.max_response, sampling.temperature, args.seed, name,
                 eos_of(sampling, tokenizer), sampling.stop_after, drop_long=args.drop_long)
    facts = tiny_facts(own) if tiny else {}
    figures = gold_figures(facts) if tiny else {}
    figures |= qualities(model, tokenizer, own, demonstrations, sampling.temperature)
    compared = {fact: values for fact, values in facts.items() if fact in figures}
    compared |= {"length": list(map(len, own.ids)), "eos_rate": own.finished}
    bias = {probe.title: probes.bias(model, tokenizer, probe) for probe in (probes.TINY if tiny else probes.ENGLISH)}
    instructions = {} if tiny else instruction_checks(model, tokenizer, own, templates, sampling, args.seed)
    return Assessed(own, figures, compared, bias, instructions)


def load_reward(path, models, device):
    reward = scalar_from_pretrained(path).to(device).requires_grad_(False)
    for name, model in models.items():
        if model.config.vocab_size != reward.config.vocab_size:
            raise UserError(f"{path} has {reward.config.vocab_size} tokens, {name} has {model.config.vocab_size}: they must "
                            "share one vocabulary")
    return reward


def verdicts_of(found, judges, gold):
    """{judge: {model: N numbers}}: gold where it is known, and reward models, whose mean score becomes one of the figures."""
    verdicts = {"gold": {path: gold(own.answers.prompts, own.answers.texts) for path, own in found.items()}} if gold else {}
    for judge, reward in judges.items():
        verdicts[judge] = {path: rewards_of(reward, own.answers.prompt_ids, own.answers.ids) for path, own in found.items()}
        for path, scores in verdicts[judge].items():
            found[path].figures[f"score by {judge}"] = ratio(scores)
    return verdicts


def assess(args, device):
    """The whole report as a dict; Estimates are still Estimates."""
    rows, sampling = read_prompts(args.prompts), sampling_of(args)
    if len(rows) < 2 or sampling.max_response < 1 or sampling.temperature <= 0:
        raise UserError(f"{args.prompts}: an interval needs 2 prompts or more; --max_response must be 1 or more, --temperature "
                        "above 0")
    gold, notes = gold_function(args.gold, args.prompts), []
    demonstrations = read_demonstrations(args.demonstrations) if args.demonstrations else []
    templates, votes = find_templates(args.prompts, args.models), duels(args.votes) if args.votes else {}
    models, tokenizers = ({path: load(path) for path in args.models} for load in (from_pretrained, load_tokenizer))
    judges = {path: load_reward(path, models, device) for path in (args.judge, args.reward) if path}
    found = {path: assess_model(path, models[path].to(device), tokenizers[path], rows, demonstrations, templates, sampling,
                                gold is not None and args.gold == "auto", args) for path in args.models}

    first, *others = args.models
    for path in others:
        if found[path].answers.prompts != found[first].answers.prompts:
            raise UserError(f"{path} and {first} drop different prompts as too long: shorten the prompts, or leave these out")
        if models[path].config.vocab_size != models[first].config.vocab_size:
            notes.append(f"{path} and {first} have different vocabularies: no KL between them, and nothing per token to compare")
        else:
            found[path].figures.update(sequence_kl(models[path], models[first], found[path].answers, sampling.temperature))
    verdicts = verdicts_of(found, judges, gold)
    notes += filter(None, (partiality(path, judge) for judge, path in product(judges, found)))

    def of_all(part):
        return {path: getattr(own, part) for path, own in found.items()}
    report = {"prompts": args.prompts, "n_prompts": len(found[first].answers.prompts), "seed": args.seed,
              "sampling": vars(sampling), "models": of_all("figures"), "bias": of_all("bias"),
              "instructions": of_all("instructions"), "votes": votes, "notes": notes,
              "comparisons": against_first(of_all("answers"), verdicts, of_all("facts"))}
    if args.reward:
        report["reward"] = reward_part(args, judges[args.reward])
    return report


def reward_part(args, reward):
    return {"model": args.reward, "comparisons": args.comparisons,
            **assess_reward(reward, load_tokenizer(args.reward), args.comparisons, gold_function(args.gold, args.comparisons),
                            args.drop_long)}


def learning_curve(args, device):
    """{labels: accuracy on held-out comparisons} of reward models trained now, as --reward was, on the first of its labels."""
    config = read_run(args.reward)
    train_rewards(args.learning_curve, config["data"], args.out, **config | {"heldout": args.comparisons, "device": args.device})
    found = {}
    for count in args.learning_curve:
        folder = f"{args.out}/rm_{count}"
        reward = scalar_from_pretrained(folder).to(device)
        found[count] = assess_reward(reward, load_tokenizer(folder), args.comparisons)["accuracy"]
    return found


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.evaluate", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders; the first is the reference")
    parser.add_argument("--reward", help="a reward model to assess")
    parser.add_argument("--judge", help="another reward model, not trained on, for win rates")
    parser.add_argument("--votes", help="a file of `feedback judge`: what people said")
    parser.add_argument("--learning_curve", type=int, nargs="+", help="train reward models on this many of --reward's labels")
    parser.add_argument("--gold", default="auto", help="FILE.py:function, a true preference, or 'none' [the embedded world's]")
    parser.add_argument("--prompts", default="data/tiny/prompts_test.jsonl", help="held-out prompts")
    parser.add_argument("--demonstrations", help="held-out demonstrations for the perplexity, '' for none "
                                                 "[demonstrations_test.jsonl beside --prompts, if there is one]")
    parser.add_argument("--comparisons", help="held-out comparisons for --reward [comparisons_test.jsonl beside --prompts]")
    for name, kind, help in (("max_response", int, "most tokens of an answer"), ("temperature", float, "sampling temperature"),
                             ("stop_token", int, "the token id that ends an answer, -1 is EOS"),
                             ("stop_after", int, "tokens of an answer before it can end so")):
        parser.add_argument(f"--{name}", type=kind, help=f"{help} [as the last PPO run here]")
    parser.add_argument("--drop_long", action="store_true", help="drop and count prompts that do not fit, instead of stopping")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="")
    parser.add_argument("--out", default="out/report", help="the folder of report.md, report.json and the pictures")
    args = parser.parse_args(argv)
    if len(set(args.models)) < len(args.models):
        raise UserError("a model is named twice")
    if args.learning_curve and not args.reward:
        raise UserError("--learning_curve trains on the labels of a reward model: name it with --reward")
    for name in ("demonstrations", "comparisons"):
        if getattr(args, name) is None:
            file = Path(args.prompts).with_name(f"{name}_test.jsonl")
            setattr(args, name, str(file) if file.is_file() else "")
    if args.reward and not args.comparisons:
        raise UserError("--reward is assessed on comparisons that it was not trained on: name them with --comparisons")
    if args.learning_curve:
        first_lines(read_run(args.reward)["data"], args.learning_curve)             # now, and not after everything else
    device, out = pick_device(args.device), Path(args.out)
    report = assess(args, device)
    move_aside(out)
    out.mkdir(parents=True)
    if args.learning_curve:
        report["learning_curve"] = learning_curve(args, device)
    write_json(out / "report.json", plain(report))
    pictures = draw_report(plain(report), args.models, out)
    (out / "report.md").write_text(as_markdown(report, pictures), encoding="utf-8")
    print_report({path: flat(figures) for path, figures in report["models"].items()})
    print(f"\nwrote {out}/report.md, report.json{''.join(', ' + name for name in pictures)}")


if __name__ == "__main__":
    run_main(main)
