"""Forward and backward of the language-modelling loss on 8 x 128 tokens: us against transformers. One row of the table:

    python tests/bench/train_step.py --peer_python PEER/bin/python --dtype float32

The peer's environment: tests/bench/transformers.txt. --dtype bfloat16 is autocast, on the peer's side --peer_dtype.
"""

import contextlib
import importlib.metadata

from common import arguments, best_seconds, compare, n_weights, our_model, random_ids, report, their_config

import torch


def ours(args):
    from minirlhf.ppo import token_logprobs
    from minirlhf.running.device import pick_device
    model = our_model(args.size, pick_device(args.device), args.dtype)          # as the scripts do: fast products
    return model, lambda ids: -token_logprobs(model.logits(model(ids)[:, :-1]), ids[:, 1:]).mean()


def transformers(args):
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(their_config(args.size)).eval()       # eval: no dropout
    model.to(args.device)
    return model, lambda ids: model(ids, labels=ids).loss


def measure(args, model, loss_of):
    """Seconds of one forward and backward pass; the first gradient allocates and does not count."""
    ids = random_ids(args.size, args.batch, args.tokens, args.device)
    peer_autocast = args.worker != "ours" and args.dtype == "bfloat16"          # ours does it inside forward
    autocast = lambda: torch.autocast(args.device, torch.bfloat16) if peer_autocast else contextlib.nullcontext()

    def step():
        with autocast():
            loss = loss_of(ids)
        loss.backward()
        for p in model.parameters():
            p.grad = None
    return best_seconds(step, 3)


def floors(args, peaks, dtype):
    """6 FLOP per weight and token: 2 forward, 4 backward; and the two products of causal attention."""
    c, n = our_model(args.size, "meta").config, args.batch * args.tokens
    return {"arithmetic": 6 * n * (n_weights(args.size) + c.n_layer * c.n_embd * args.tokens) / peaks[dtype]}


def main():
    args = arguments(__doc__, batch=8, tokens=128)
    if args.worker:
        torch.set_num_threads(args.threads)
        seconds = measure(args, *{"ours": ours, "transformers": transformers}[args.worker](args))
        version = importlib.metadata.version("torch" if args.worker == "ours" else "transformers")
        report(seconds, version=version)
        return
    compare(args, f"forward and backward, {args.size}, {args.batch} x {args.tokens} tokens, {args.dtype}", "transformers", "tokens",
            args.batch * args.tokens, floors)


if __name__ == "__main__":
    main()
