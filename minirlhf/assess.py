"""The assessment: how good is a reward model, and what has PPO made of the SFT model?

Both are measured on held-out rows. Log-probabilities and KL are in nats. A sequence is a list of
token ids, with the EOS if it has one. Every figure is an Estimate, with a 95 % interval that counts
prompts, because answers to one prompt are not independent.
`python -m minirlhf.tools.evaluate` compares any number of models and says more.
"""

import math
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minirlhf import ppo, stats
from minirlhf.answers import parse_stop, respond
from minirlhf.data import demonstration, encode_rows
from minirlhf.files.jsonl import read_jsonl
from minirlhf.generate import decode, generator, response_positions, right_pad
from minirlhf.reward import ScalarHeadModel
from minirlhf.reward_functions import TINY_GOLD, call_reward, load_function, load_gold
from minirlhf.running.device import set_precision
from minirlhf.running.runs import read_options, read_report

LOGITS = 100_000_000                # most logits made at once: 0.4 GB


# ---- how likely, and how good, a model finds given responses -------------------------------------

def similar_lengths(model, prompts, responses, most=64):
    """Lists of indices that put sequences of similar length together: few pads."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    size = min(most, max(1, LOGITS // (model.config.vocab_size * max(1, *map(len, responses)))))
    return [order[start:start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def logprobs_per_token(model, prompts, responses, temperature=1.0):
    """Log-probabilities of the tokens of each response: a list of N arrays, in nats."""
    device, found = next(model.parameters()).device, [None] * len(prompts)
    for rows in similar_lengths(model, prompts, responses):
        ids, mask = right_pad([prompts[i] + responses[i] for i in rows], device)        # (B, T)
        predicted = response_positions(mask, [len(prompts[i]) for i in rows])[:, 1:]    # (B, T-1)
        logits = model.logits(model(ids)[:, :-1][predicted])                           # (tokens, V)
        logprobs = ppo.token_logprobs(logits, ids[:, 1:][predicted], temperature)       # (tokens,)
        own = logprobs.cpu().double().split([len(responses[i]) for i in rows])
        for i, numbers in zip(rows, own, strict=True):
            found[i] = numbers.numpy()
    return found


@torch.no_grad()
def scores_of(reward_model, prompts, responses):
    """Normalised scores of a reward model: an array of N."""
    device, found = next(reward_model.parameters()).device, np.zeros(len(prompts))
    for rows in similar_lengths(reward_model, prompts, responses):
        ids, mask = right_pad([prompts[i] + responses[i] for i in rows], device)
        found[rows] = reward_model.normalised_scores(ids, mask).cpu()
    return found


def units_of(examples):
    return stats.units([e.row.prompt for e in examples], [e.row.responses for e in examples])


def perplexity(model, examples):
    """exp of the mean loss per response token on demonstrations: it shows what alignment costs."""
    logprobs = logprobs_per_token(model, [e.prompt for e in examples],
                                  [e.responses[0] for e in examples])
    nats = stats.ratio(*stats.sum_by_prompt(units_of(examples), [-row.sum() for row in logprobs],
                                            [len(row) for row in logprobs]))
    return stats.Estimate(*map(math.exp, nats[:3]), nats.n)


# ---- a reward model ------------------------------------------------------------------------------

def scores_by_prompt(reward_model, examples):
    """Raw scores, less their mean over SFT samples: for each example an array of its K answers."""
    counts = [len(example.responses) for example in examples]
    answers = [(example.prompt, ids) for example in examples for ids in example.responses]
    scores = scores_of(reward_model, *zip(*answers)) * reward_model.reward_std
    return np.split(scores, np.cumsum(counts)[:-1])


def pairs_of(goodness, scores, lengths, prompts=None):
    """All pairs of answers in one row that differ in goodness, as four arrays over pairs.

    The first three have a list of K numbers per row. prompts: the unit of each row, from
    units_of(), if several rows may share one. Returns the number of the prompt, and goodness, score
    and length of the better answer, less those of the other one.
    """
    texts = range(len(goodness)) if prompts is None else prompts
    number = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    rows = []
    for text, good, score, length in zip(texts, goodness, scores, lengths, strict=True):
        rows += [(number[text], good[i] - good[j], score[i] - score[j], length[i] - length[j])
                 for i, j in permutations(range(len(good)), 2) if good[i] > good[j]]
    return np.array(rows, dtype=float).reshape(-1, 4).T


def pair_accuracy(differences, prompt):
    """How often a pair's difference is above 0. 0 counts half. prompt: of each pair, from pairs_of.

    The prompt is the unit: pairs of one ranking, and several people's votes, are not independent.
    """
    right = stats.wins_of(differences, 0)
    return stats.clustered_rate(*stats.sum_by_prompt(prompt, right, np.ones_like(right)))


def assess_reward_model(reward_model, examples, gold=None):
    """{name: Estimate}: accuracy by the labels and by gold, and how often the longer one wins."""
    scores = scores_by_prompt(reward_model, examples)
    lengths = [[len(ids) for ids in example.responses] for example in examples]
    labels = [[-rank for rank in example.row.ranks] for example in examples]
    texts = units_of(examples)
    prompt, _, score, longer = pairs_of(labels, scores, lengths, texts)
    found = {"rm_accuracy_heldout": pair_accuracy(score, prompt),
             "longer_is_preferred": pair_accuracy(longer, prompt)}
    if gold:
        true = [gold([e.row.prompt] * len(e.responses), e.row.responses) for e in examples]
        prompt, _, score, _ = pairs_of(true, scores, lengths, texts)
        found["rm_accuracy_gold"] = pair_accuracy(score, prompt)
    return found


def print_worst(reward_model, examples, most=5):
    """The held-out pairs that the model gets most confidently wrong show what it misses."""
    worst = []
    for example, scores in zip(examples, scores_by_prompt(reward_model, examples)):
        ranks = example.row.ranks
        worst += [(scores[j] - scores[i], example.row, i, j)
                  for i, j in permutations(range(len(scores)), 2)
                  if ranks[i] < ranks[j] and scores[j] > scores[i]]
    print("\nThe held-out pairs that it gets most confidently wrong:")
    for margin, row, i, j in sorted(worst, key=lambda pair: -pair[0])[:most]:
        print(f"  {row.prompt!r}\n    preferred {row.responses[i]!r}\n"
              f"    {margin:.2f} higher {row.responses[j]!r}")


# ---- a language model's answers ------------------------------------------------------------------

class Sampling(NamedTuple):
    """How answers are sampled: the options of train_ppo.py that have these names."""
    max_response: int = 48
    temperature: float = 1.0
    stop: str = ""              # "" is EOS, "13,16" is token 13 from position 16 on
    seed: int = 1
    max_prompt: int = 0         # 0 is the model's limit
    drop_long: bool = False     # drop and count prompts that do not fit, instead of an error


class Answers(NamedTuple):
    """One sampled answer to each of N prompts: as texts, and as lists of ids.

    Only the ids have an EOS.
    """
    prompts: list
    texts: list
    prompt_ids: list
    ids: list
    finished: list


def answer(model, tokenizer, rows, sampling, progress=None):
    """Samples one answer to the prompt of each row.

    The same seed gives every model the same random numbers.
    """
    examples = encode_rows(rows, tokenizer, model.config.n_positions, sampling.max_prompt,
                           reserve=sampling.max_response, drop_long=sampling.drop_long)
    prompt_ids = [example.prompt for example in examples]
    sampled = respond(model, prompt_ids, sampling.max_response,
                      parse_stop(sampling.stop, tokenizer), generator(sampling.seed, 9),
                      sampling.temperature, progress=progress)
    ids, finished = map(list, zip(*sampled))
    texts = [decode(tokenizer, tokens) for tokens in ids]
    prompts = [example.row.prompt for example in examples]
    return Answers(prompts, texts, prompt_ids, ids, finished)


def gold_function(spec, data_file):
    """--gold as two functions of (prompts, texts), each None where there is none.

    The first gives the true preference, a list of numbers, checked as a reward is. The second gives
    what the embedded world knows beyond one number: facts() of data/tiny/gold.py.
    """
    if (gold := load_gold(spec, data_file)) is None:
        return None, None
    facts = load_function(f"{TINY_GOLD}:facts") if spec == "auto" else None

    def checked(prompts, texts):
        return call_reward(gold, prompts, texts, "the function of --gold").double().tolist()

    return checked, facts


def distinct_2(sequences):
    """Different pairs of neighbouring tokens / all pairs, over all responses. Low: they are alike.

    The interval is the jackknife's, which leaves out one response at a time: a bootstrap would
    count the repeats that it makes itself. It is up to twice too wide where pairs are few (Efron
    and Stein 1981: its variance is biased upwards).
    """
    pairs = [list(zip(ids, ids[1:])) for ids in sequences]
    counts, N = np.array([len(own) for own in pairs]), len(pairs)
    total = max(1, counts.sum())
    owners = Counter(pair for own in pairs for pair in set(own))        # responses that have a pair
    only_here = np.array([sum(owners[pair] == 1 for pair in set(own)) for own in pairs])
    left_out = (len(owners) - only_here) / np.maximum(total - counts, 1)
    half = stats.Z * math.sqrt((N - 1) / N * ((left_out - left_out.mean()) ** 2).sum())
    value = float(len(owners) / total)
    return stats.Estimate(value, max(0.0, value - half), min(1.0, value + half), N)


def sequence_kl(model, reference, answers, temperature):
    """log p - log p_ref of the model's own answers, an array of N in nats. Its mean is the KL."""
    ours, theirs = (logprobs_per_token(each, answers.prompt_ids, answers.ids, temperature)
                    for each in (model, reference))
    return np.array([float((a - b).sum()) for a, b in zip(ours, theirs)])


def measure_model(name, model, tokenizer, rows, sampling, demonstrations, facts_of=None):
    """Samples an answer to every prompt and measures the answers. facts_of: from gold_function.

    Several rows with one prompt, as votes have them, count once.
    Returns the Answers, facts {name: a value of each answer}, and figures {name: Estimate}.
    """
    rows = list({row.prompt: row for row in rows}.values())
    answers = answer(model, tokenizer, rows, sampling, name)
    facts = facts_of(answers.prompts, answers.texts) if facts_of else {}
    facts |= {"eos_rate": answers.finished, "length": list(map(len, answers.ids))}
    figures = {fact: figure for fact, values in facts.items() if (figure := figure_of(values))}
    figures["distinct_2"] = distinct_2(answers.ids)
    if demonstrations:
        examples = encode_rows(demonstrations, tokenizer, model.config.n_positions, drop_long=True)
        figures["perplexity"] = perplexity(model, examples)
    return answers, facts, figures


def figure_of(values):
    """A fact as an Estimate: the rate of bools, or the mean of numbers.

    Of pairs (group, bool) it is the difference of the rates of the groups True and False, or None
    if one of them is empty.
    """
    if isinstance(values[0], tuple):
        groups = [[yes for own, yes in values if own == group] for group in (True, False)]
        return stats.difference_of_rates(*groups) if all(groups) else None
    return stats.rate(values) if isinstance(values[0], bool) else stats.ratio(values)


# ---- a policy against its reference --------------------------------------------------------------

def assess(policy, reference, reward_model, tokenizer, rows, sampling, gold=None, facts_of=None,
           demonstrations=(), name="ppo"):
    """Measures a policy against its reference on held-out prompts and prints a table.

    Returns the figures of report.json, as plain numbers.

    policy, reference: networks, so that any method that trains a policy can end with this.
    reward_model: a ScalarHeadModel or None. rows: from read_prompts. sampling: a Sampling.
    gold, facts_of: from gold_function. demonstrations: rows for the perplexity.
    name: the policy's name in the report.
    """
    before, _, sft = measure_model("sft", reference, tokenizer, rows, sampling, demonstrations,
                                   facts_of)
    after, _, figures = measure_model(name, policy, tokenizer, rows, sampling, demonstrations,
                                      facts_of)
    figures["kl"] = stats.ratio(sequence_kl(policy, reference, after, sampling.temperature))
    if reward_model is not None:
        sft["score"] = stats.ratio(scores_of(reward_model, before.prompt_ids, before.ids))
        figures["score"] = stats.ratio(scores_of(reward_model, after.prompt_ids, after.ids))
    if gold:
        wins = stats.wins_of(gold(after.prompts, after.texts), gold(before.prompts, before.texts))
        figures["win_rate"] = stats.rate(wins)
    print_figures(f"{name} against sft on {len(after.prompts):,} held-out prompts, 95 % intervals",
                  {"sft": sft, name: figures})
    columns = {"sft": flat(sft), name: flat(figures)}
    return {"n_prompts": len(after.prompts), "seed": sampling.seed,
            "win_rate": columns[name].get("win_rate"),
            "win_rate_ci": columns[name]["ci"].get("win_rate"), "kl": columns[name]["kl"],
            **columns}


def print_figures(title, columns):
    """Prints {model: {name: Estimate}} side by side."""
    print(f"\n{title}\n{'':<20}" + "".join(f"{model[-24:]:>26}" for model in columns))
    for name in dict.fromkeys(name for figures in columns.values() for name in figures):
        cells = [str(figures.get(name, "")) for figures in columns.values()]
        print(f"{name:<20}" + "".join(f"{cell:>26}" for cell in cells))


def flat(figures):
    """Estimates -> their values, with all intervals under "ci"."""
    intervals = {name: [figure.low, figure.high] for name, figure in figures.items()}
    return {**{name: figure.value for name, figure in figures.items()}, "ci": intervals}


def assess_run(cfg, policy, reference, reward_model, tokenizer, heldout, seconds):
    """Assesses a PPO run -> its report.json. heldout: Examples. seconds: how long the run took."""
    seconds = round(seconds, 1)
    if not heldout:
        print(f"\nPPO done: {cfg.out}, {seconds:.0f} seconds. Nothing was held out, so nothing is "
              "assessed")
        return {"seed": cfg.seed, "seconds": {"ppo": seconds}}
    reward_model = reward_model if isinstance(reward_model, ScalarHeadModel) else None
    for model in (policy, reference, *([reward_model.transformer] if reward_model else [])):
        model.dtype = "float32"             # figures do not depend on the precision of training
    set_precision(next(policy.parameters()).device, "float32_exact")
    gold, facts_of = gold_function(cfg.gold, cfg.heldout)
    sampling = Sampling(**{name: getattr(cfg, name) for name in Sampling._fields})
    demonstrations = [demonstration(line, where) for where, line in heldout_lines(cfg.model)
                      if "response" in line]
    report = assess(policy, reference, reward_model, tokenizer,
                    [example.row for example in heldout], sampling, gold, facts_of, demonstrations)
    annotated = [line for _, line in heldout_lines(cfg.reward) if "annotators" in line]
    agreement = load_function(f"{TINY_GOLD.with_name('annotate.py')}:agreement")
    sft_report, rm_report = read_report(cfg.model), read_report(cfg.reward)
    return {
        "seconds": {"sft": sft_report.get("seconds"), "rm": rm_report.get("seconds"),
                    "ppo": seconds},
        "annotator_agreement": agreement(annotated) if facts_of and annotated else None,
        "rm_accuracy_gold": rm_report.get("rm_accuracy_gold"),
        "rm_accuracy_heldout": rm_report.get("rm_accuracy_heldout"),
        **report,
    }


def heldout_lines(folder):
    """(where, line) of what the run in this folder held out. [] if that is unknown or gone."""
    file = read_options(folder).get("heldout")
    if file and not Path(file).is_file():
        print(f"{file}, which {folder} held out, no longer exists: the report does without it")
        return []
    return list(read_jsonl(file)) if file else []
