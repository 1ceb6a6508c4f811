"""Talk to a model in the terminal.

    python -m minirlhf.tools.chat out/ppo                one model
    python -m minirlhf.tools.chat out/sft out/ppo        two, side by side: the same prompt, the same random numbers
    python -m minirlhf.tools.chat out/ppo --explain      what PPO sees: log-probabilities, KL, rewards, values per token

Each line is a prompt. An empty line picks one of the prompts that the model was made for. Ctrl-D ends.
"""

import random
import shutil
import sys
import textwrap
from itertools import zip_longest

import torch

from minirlhf.answers import parse_stop, respond, sample_as_trained
from minirlhf.data import encode_prompt, read_prompts
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.generate import decode
from minirlhf.running.device import pick_device
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError, require, run_main
from minirlhf.running.runs import prompts_for
from minirlhf.tools.explain import Explainer
from minirlhf.weights import from_pretrained


def reply(model, tokenizer, prompt, args, seed):
    """One sampled response as text. An unfinished one ends in [...]."""
    ids = encode_prompt(tokenizer, prompt)
    room = model.config.n_positions - len(ids)
    require(room >= 1, f"the prompt has {len(ids)} tokens; this model has {model.config.n_positions} positions in all")
    rng, most = torch.Generator().manual_seed(seed), min(args.max_response, room)
    (tokens, finished), = respond(model, [ids], most, parse_stop(args.stop, tokenizer), rng, args.temperature)
    return decode(tokenizer, tokens) + ("" if finished else " [...]")


def side_by_side(texts, width):
    """Texts as wrapped columns of equal width."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    wrapped = [[line for paragraph in text.strip().split("\n") for line in textwrap.wrap(paragraph, column) or [""]]
               for text in texts]
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(f"{line:<{column}}" for line in lines).rstrip() for lines in rows)


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.chat", description=__doc__)
    parser.add_argument("models", nargs="+", help="one or more model folders")
    parser.add_argument("--prompts", help="what an empty line picks from [what the first model's run held out]")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token [as the first model's run]")
    parser.add_argument("--max_response", type=int, help="most tokens of an answer [as the first model's run]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--explain", action="store_true", help="print PPO's view of each answer of the first model")
    parser.add_argument("--device", default="")
    args = parser.parse_args(argv)
    sample_as_trained(args, args.models[0])
    device, width = pick_device(args.device), shutil.get_terminal_size().columns
    loaded = [(from_pretrained(path).to(device), load_tokenizer(path)) for path in args.models]
    explainer = Explainer(args.models[0], device) if args.explain else None
    examples = read_prompts(args.prompts or prompts_for(args.models[0], "heldout"))
    choice = random.Random(args.seed)

    def answer(prompt, seed):
        if explainer:
            return "\n".join(explainer.table(prompt, seed=seed))
        return side_by_side([reply(model, tokenizer, prompt, args, seed) for model, tokenizer in loaded], width)

    if len(loaded) > 1:
        print(side_by_side(args.models, width))
    print("> ", end="", flush=True)
    for seed, line in enumerate(sys.stdin, start=args.seed):
        prompt = line.rstrip("\n")
        if not prompt:
            prompt = choice.choice(examples).prompt
            print(prompt)
        try:
            print(answer(prompt, seed))
        except UserError as error:                              # such as a prompt that is too long: go on
            print(f"error: {error}", file=sys.stderr)
        print("> ", end="", flush=True)
    print()


if __name__ == "__main__":
    run_main(main)
