"""The assessment: does a model follow the instruction, is it fair, is it good, and how far did it move?

    python -m minirlhf.tools.evaluate out/sft out/ppo

samples one answer of each model to held-out prompts and prints a column per model; the first is the reference of KL and
win rate. What only the embedded world can tell (gold, attributes, rudeness, stereotypes, grammar) comes from
data/tiny/gold.py and is left out for other prompts.
"""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from minirlhf import ppo
from minirlhf.compute import eos_of, generator, pick_device
from minirlhf.config import Parser, UserError, run_main
from minirlhf.data import decode, encode_rows, read_demonstrations, read_jsonl, read_prompts
from minirlhf.functions import TINY_GOLD, load_function, load_gold
from minirlhf.generate import respond, response_logprobs
from minirlhf.runs import read_run, write_json
from minirlhf.tokenizer import load_tokenizer
from minirlhf.weights import from_pretrained


class Answers(NamedTuple):
    """One sampled answer to each prompt."""
    prompts: list           # N texts
    texts: list             # N texts, without EOS
    prompt_ids: list        # N lists of ids
    ids: list               # N lists of ids, with the EOS if there is one
    finished: list          # N bools


# ---- measuring one model ---------------------------------------------------------------------------------------------

def answer(model, tokenizer, rows, max_response, temperature, seed, name, eos=None, earliest=0, **limits):
    """Samples one answer to every prompt. The same seed gives every model the same uniform numbers."""
    examples = encode_rows(rows, tokenizer, model.config.n_positions, reserve=max_response, **limits)
    prompt_ids = [example.prompt for example in examples]
    sampled = respond(model, prompt_ids, max_response, tokenizer.eot_token if eos is None else eos, generator(seed, 9), temperature,
                      earliest, progress=name)
    ids, finished = map(list, zip(*sampled))
    texts = [decode(tokenizer, tokens) for tokens in ids]
    return Answers([example.row.prompt for example in examples], texts, prompt_ids, ids, finished)


def distinct_2(sequences):
    """Different pairs of neighbouring tokens over all of them, counted across the whole set: low means repetitive."""
    pairs = [pair for ids in sequences for pair in zip(ids, ids[1:])]
    return len(set(pairs)) / max(len(pairs), 1)


@torch.no_grad()
def summed_logprobs(model, prompts, responses, temperature=1.0, batch_size=16):
    """Log-probability of each whole response, nats: an array of N."""
    device, sums = next(model.parameters()).device, []
    for i in range(0, len(prompts), batch_size):
        logprobs, _ = response_logprobs(model, prompts[i:i + batch_size], responses[i:i + batch_size], device, temperature)
        sums += logprobs.double().sum(dim=1).tolist()
    return np.array(sums)


def perplexity(model, examples):
    """exp of the mean loss per response token on demonstrations: what alignment costs shows here."""
    responses = [example.responses[0] for example in examples]
    nats = -summed_logprobs(model, [example.prompt for example in examples], responses).sum()
    return math.exp(nats / sum(map(len, responses)))


def qualities(model, tokenizer, answers, demonstrations, measure):
    """The figures of one model, rates in 0..1: what `measure` (gold.py's, or None) says, and what needs no gold."""
    gold = measure(answers.prompts, answers.texts) if measure else {}
    examples = encode_rows(demonstrations, tokenizer, model.config.n_positions, drop_long=True) if demonstrations else []
    return {
        **gold,
        "eos_rate": sum(answers.finished) / len(answers.finished),
        "length": sum(map(len, answers.ids)) / len(answers.ids),
        "distinct_2": distinct_2(answers.ids),
        "perplexity": perplexity(model, examples) if examples else None,
    }


# ---- comparing two ---------------------------------------------------------------------------------------------------

def win_rate(ours, theirs, seed=0, resamples=2000):
    """How often `ours` is the greater of two numbers on the same prompt, a tie counting half, with its 95 % interval
    from a bootstrap over prompts."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    wins = (ours > theirs) + 0.5 * (ours == theirs)
    chosen = np.random.default_rng(seed).integers(len(wins), size=(resamples, len(wins)))
    low, high = np.quantile(wins[chosen].mean(axis=1), [0.025, 0.975])
    return float(wins.mean()), [float(low), float(high)]


def sequence_kl(model, reference, answers, temperature):
    """Mean over the model's own answers of log p - log p_reference: KL in nats per sequence (k1)."""
    ours = summed_logprobs(model, answers.prompt_ids, answers.ids, temperature)
    return float((ours - summed_logprobs(reference, answers.prompt_ids, answers.ids, temperature)).mean())


# ---- the short form, with which train_ppo.py ends --------------------------------------------------------------------

def read_json(file):
    """A JSON file's object, or {} if there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def annotator_agreement(comparisons_file):
    """How often the embedded world's annotators agree on pairs that differ in gold."""
    agreement = load_function(f"{TINY_GOLD.with_name('annotate.py')}:agreement")
    return agreement([row for _, row in read_jsonl(comparisons_file)])


def assess_run(folder, seconds, device):
    """The report of a PPO run: its policy against the SFT model it came from, on prompts neither was trained on."""
    cfg = SimpleNamespace(**read_run(folder))
    sft_folder, rm_folder = Path(cfg.model), Path(cfg.reward)
    sft_report, rm_report = read_json(sft_folder / "report.json"), read_json(rm_folder / "report.json")
    demonstrations, comparisons = (read_json(run / "run.json").get("config", {}).get("heldout") for run in (sft_folder, rm_folder))
    demonstrations = read_demonstrations(demonstrations) if demonstrations else []
    gold = load_gold(cfg.gold, cfg.heldout)
    measure = load_function(f"{TINY_GOLD}:measure") if gold and cfg.gold == "auto" else None
    rows, tokenizer = read_prompts(cfg.heldout), load_tokenizer(str(folder))

    models, answers, report = {}, {}, {}
    for name, path in (("sft", cfg.model), ("ppo", str(folder))):
        models[name] = from_pretrained(path).to(device)
        answers[name] = answer(models[name], tokenizer, rows, cfg.max_response, cfg.temperature, cfg.seed, name,
                               eos_of(cfg, tokenizer), cfg.stop_after, max_prompt=cfg.max_prompt, drop_long=cfg.drop_long)
        report[name] = qualities(models[name], tokenizer, answers[name], demonstrations, measure)
    rate, interval = None, None
    if gold:
        rate, interval = win_rate(*(gold(answers[name].prompts, answers[name].texts) for name in ("ppo", "sft")))
    return {
        "n_prompts": len(answers["sft"].prompts), "seed": cfg.seed,
        "seconds": {"sft": sft_report.get("seconds"), "rm": rm_report.get("seconds"), "ppo": seconds},
        "annotator_agreement": annotator_agreement(comparisons) if measure and comparisons else None,
        "rm_accuracy_gold": rm_report.get("rm_accuracy_gold"), "rm_accuracy_heldout": rm_report.get("rm_accuracy_heldout"),
        "win_rate": rate, "win_rate_ci": interval,
        "kl": sequence_kl(models["ppo"], models["sft"], answers["ppo"], cfg.temperature), **report,
    }


def print_report(columns):
    """columns: {model: {figure: number or None}} -> a table with a row per figure."""
    names = list(columns)
    print("\n" + " " * 18 + "".join(f"{name:>14}" for name in names))
    for figure in dict.fromkeys(figure for column in columns.values() for figure in column):
        cells = [columns[name].get(figure) for name in names]
        print(f"{figure:<18}" + "".join(f"{'' if cell is None else f'{cell:.3f}':>14}" for cell in cells))


# ---- python -m minirlhf.tools.evaluate -------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.evaluate", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders; the first is the reference")
    parser.add_argument("--prompts", default="data/tiny/prompts_test.jsonl", help="held-out prompts")
    parser.add_argument("--demonstrations", default="data/tiny/demonstrations_test.jsonl",
                        help="held-out demonstrations for the perplexity; '' for none")
    parser.add_argument("--max_response", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="")
    parser.add_argument("--out", help="a JSON file to write the figures to")
    args = parser.parse_args(argv)
    device, rows = pick_device(args.device), read_prompts(args.prompts)
    gold = load_gold("auto", args.prompts)
    measure = load_function(f"{TINY_GOLD}:measure") if gold else None
    demonstrations = read_demonstrations(args.demonstrations) if args.demonstrations else []

    loaded = [(path, load_tokenizer(path), from_pretrained(path).to(device)) for path in args.models]
    columns, reference, before = {}, None, None
    for path, tokenizer, model in loaded:
        answers = answer(model, tokenizer, rows, args.max_response, args.temperature, args.seed, path)
        columns[path] = qualities(model, tokenizer, answers, demonstrations, measure)
        values = gold(answers.prompts, answers.texts) if gold else None
        if reference is None:
            reference, before = model, values
        else:
            if model.config.vocab_size != reference.config.vocab_size:
                raise UserError(f"{path} and {args.models[0]} have different vocabularies: no KL between them")
            columns[path]["kl"] = sequence_kl(model, reference, answers, args.temperature)
            if gold:
                rate, (low, high) = win_rate(values, before)
                columns[path] |= {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
    print_report(columns)
    if args.out:
        write_json(Path(args.out), columns)


if __name__ == "__main__":
    run_main(main)
