"""Answers of a model to many prompts: to normalise a reward, to assess, to be labelled."""

import torch
from tqdm import tqdm

from minirlhf.files.errors import UserError, require
from minirlhf.generate import NORMALISE, generate, generator, left_pad, micro_batches

SAMPLES = 512       # of the SFT model: their scores get mean 0 and standard deviation 1


def parse_stop(text, tokenizer):
    """--stop -> (token, position): this token ends a response from that position on. "" is EOS."""
    if not text:
        return tokenizer.eot_token, 0
    try:
        token, position = (int(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--stop {text}: must be TOKEN,POSITION like 13,16 (empty: EOS)") from None
    require(0 <= token < tokenizer.n_vocab and position >= 0,
            f"--stop {text}: tokens go from 0 to {tokenizer.n_vocab - 1} here")
    return token, position


def respond(model, prompts, limit, stop, rng, temperature=1.0, batch_size=128, progress=None):
    """Samples one response for each of many prompts (lists of ids), similar lengths together.

    limit: most tokens of a response. rng: the CPU generator of the random numbers. progress: the
    name of a progress bar. stop, temperature: as in generate(). Returns, in the order of the
    prompts, a list of (response ids as a list, finished); the EOS is among the ids.
    """
    device = next(model.parameters()).device
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
