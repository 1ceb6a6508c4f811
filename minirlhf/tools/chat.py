"""Talk to a model in the terminal.

    python -m minirlhf.tools.chat out/ppo                one model
    python -m minirlhf.tools.chat out/sft out/ppo        two, side by side: the same prompt, the same random numbers
    python -m minirlhf.tools.chat out/ppo --explain      what PPO sees: log-probabilities, KL, rewards, values, token by token

A line is a prompt; an empty line asks one of the prompts that the model was made for; Ctrl-D ends.
"""

import argparse
import random
import shutil
import sys
import textwrap
from itertools import zip_longest

import torch

from minirlhf.running.compute import pick_device
from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import decode, read_prompts
from minirlhf.generate import respond
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.tools.explain import Explainer
from minirlhf.weights import from_pretrained


def reply(model, tokenizer, prompt, args, seed):
    """One sampled response as text; an unfinished one ends in [...]."""
    ids = tokenizer.encode_ordinary(prompt)
    room = model.config.n_positions - len(ids)
    if room < 1:
        raise UserError(f"the prompt has {len(ids)} tokens; this model has {model.config.n_positions} positions in all")
    rng = torch.Generator().manual_seed(seed)
    (tokens, finished), = respond(model, [ids], min(args.max_response, room), tokenizer.eot_token, rng, args.temperature)
    return decode(tokenizer, tokens) + ("" if finished else " [...]")


def side_by_side(texts, width):
    """Texts as wrapped columns of equal width."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    wrapped = [[line for part in text.strip().split("\n") for line in textwrap.wrap(part, column) or [""]] for text in texts]
    return "\n".join(" | ".join(f"{line:<{column}}" for line in lines).rstrip() for lines in zip_longest(*wrapped, fillvalue=""))


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.chat", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="one or more model folders")
    parser.add_argument("--prompts", default="data/tiny/prompts_test.jsonl", help="what an empty line chooses from")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--max_response", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--explain", action="store_true", help="print PPO's view of each answer of the first model")
    parser.add_argument("--device", default="")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    loaded = [(load_tokenizer(path), from_pretrained(path).to(device)) for path in args.models]
    explainer = Explainer(args.models[0], device) if args.explain else None
    examples, choice = read_prompts(args.prompts), random.Random(args.seed)

    width = shutil.get_terminal_size().columns
    if len(loaded) > 1:
        print(side_by_side(args.models, width))
    print("> ", end="", flush=True)
    for turn, line in enumerate(sys.stdin):
        prompt = line.rstrip("\n")
        if not prompt:
            prompt = choice.choice(examples).prompt
            print(prompt)
        try:
            if explainer:
                print("\n".join(explainer.table(explainer.rollout(prompt, seed=args.seed + turn))))
                continue
            print(side_by_side([reply(model, tokenizer, prompt, args, args.seed + turn) for tokenizer, model in loaded], width))
        except UserError as error:                              # a prompt too long must not end the conversation
            print(f"error: {error}", file=sys.stderr)
        finally:
            print("> ", end="", flush=True)
    print()


if __name__ == "__main__":
    run_main(main)
