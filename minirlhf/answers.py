"""Answers of a model to many prompts: to normalise a reward, to assess, to be labelled."""

import math

import torch
from tqdm import tqdm

from minirlhf.files.errors import require
from minirlhf.generate import (NORMALISE, SAMPLE, decode, generate, generator, left_pad,
                               micro_batches)
from minirlhf.running.device import sampling_copy
from minirlhf.running.runs import read_options

SAMPLES = 512       # of the SFT model: their scores get mean 0 and standard deviation 1


def parse_stop(text, tokenizer):
    """--stop -> (token, position): this token ends a response from that position on. "" is EOS.

    ".,8" names the token by its text, "13,8" by its id. Without a position it is 0.
    """
    if not text:
        return tokenizer.eot_token, 0
    token, comma, position = text.rpartition(",")
    if not comma or not position.isdigit():
        token, position = text, "0"
    ids = [int(token)] if token.isdigit() else tokenizer.encode_ordinary(token)
    require(len(ids) == 1, f"--stop {text}: {token!r} is {len(ids)} tokens in this vocabulary, and "
                           "one must end a response. Write it as \".\" or \".,8\"")
    require(ids[0] < tokenizer.n_vocab,
            f"--stop {text}: tokens go from 0 to {tokenizer.n_vocab - 1} here")
    return ids[0], int(position)


def take_over(cfg, limits=True):
    """What is left open of limits, temperature and stop becomes that of the run that made --model.

    So labels, reward model, PPO and assessment sample alike, as was decided where SFT saw the data.
    limits False: they stay open. Comparisons are text, and a sampled answer that is read back from
    its text can have a few tokens more than the limit it was sampled with.
    """
    before = read_options(cfg.model) or read_options(getattr(cfg, "reward", cfg.model))
    for name, still_open, otherwise in (("max_prompt", 0, 0), ("max_response", 0, 0),
                                        ("temperature", 0.0, 1.0), ("stop", "auto", "")):
        if getattr(cfg, name) == still_open and (limits or not name.startswith("max_")):
            setattr(cfg, name, before.get(name, otherwise))


def sample_as_trained(args, folder):
    """The same for a tool, whose open flags are None. Without a run: 64 tokens at temperature 1."""
    before = read_options(folder)
    for name, otherwise in (("max_response", 64), ("temperature", 1.0), ("stop", "")):
        if getattr(args, name, None) is None:
            setattr(args, name, before.get(name) or otherwise)


def settle_limits(cfg, examples, positions):
    """Decides the lengths that are still open from the data, and prints all limits.

    A sampled response may be a quarter longer than the longest in the data; without any it has 64
    tokens. Both are rounded up to multiples of 16, so that small changes of the data change none.
    """
    prompt = max(len(example.prompt) for example in examples)
    response = max((len(ids) for example in examples for ids in example.responses), default=51)
    cfg.max_prompt = cfg.max_prompt or min(-(-prompt // 16) * 16, positions - 1)
    cfg.max_response = cfg.max_response or min(math.ceil(response * 1.25 / 16) * 16,
                                               positions - cfg.max_prompt)
    print(f"limits: {cfg.max_prompt} tokens for prompts (here up to {prompt}), {cfg.max_response} "
          f"for responses; temperature {cfg.temperature:g}, stop {cfg.stop or 'EOS'}")


def respond(model, prompts, limit, stop, rng, temperature=1.0, batch_size=128, progress=None):
    """Samples one response for each of many prompts (lists of ids), similar lengths together.

    limit: most tokens of a response. rng: the CPU generator of the random numbers. progress: the
    name of a progress bar. stop, temperature: as in generate(). Returns, in the order of the
    prompts, a list of (response ids as a list, finished); the EOS is among the ids.
    """
    device = next(model.parameters()).device
    model = sampling_copy(model)
    uniforms = torch.rand(len(prompts), limit, generator=rng)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    for chosen in tqdm(micro_batches(order, batch_size), progress,
                       disable=None if progress else True):         # None: only on a terminal
        ids, prompt_mask = left_pad([prompts[i] for i in chosen], device)
        sampled = generate(model, ids, prompt_mask, uniforms[chosen].to(device), stop, temperature)
        for i, response, mask, finished in zip(chosen, *(x.tolist() for x in sampled)):
            answers[i] = response[:sum(mask)], finished
    return answers


def reference_answers(sft, examples, limit, stop, cfg):
    """(examples, answers): SAMPLES prompts, and what the SFT model says to them, as respond() does.

    Scores are normalised on these (Ziegler 2019), so temperature and stop must be PPO's.
    """
    chosen = [examples[i % len(examples)] for i in range(SAMPLES)]
    rng = generator(cfg.seed, NORMALISE)
    return chosen, respond(sft, [example.prompt for example in chosen], limit, stop, rng,
                           cfg.temperature, progress="normalise")


def show_answers(model, tokenizer, examples, cfg, most=64):
    """Prints three sampled answers. Returns the share of up to 64 that end by themselves."""
    chosen = examples[:most]
    sampled = respond(model, [example.prompt for example in chosen], cfg.max_response,
                      parse_stop(cfg.stop, tokenizer), generator(cfg.seed, SAMPLE),
                      cfg.temperature)
    print("\nThree answers:")
    for example, (ids, finished) in zip(chosen[:3], sampled):
        cut = "" if finished else " (cut off)"
        print(f"  {example.row.prompt!r}\n    {decode(tokenizer, ids)!r}{cut}")
    return sum(finished for _, finished in sampled) / len(sampled)
