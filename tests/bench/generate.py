"""Sampling 32 tokens after 32: us against transformers. One row of the README's table:

    python tests/bench/generate.py --peer_python PEER/bin/python --batch 16 --dtype float32

The peer's environment: tests/bench/transformers.txt. Random weights, temperature 1, no EOS on either side.
"""

import importlib.metadata

from common import arguments, best_seconds, compare, n_weights, our_model, random_ids, report, their_config

import torch


def ours(args):
    from minirlhf.running.device import sampling_copy
    from minirlhf.running.device import pick_device
    from minirlhf.generate import generate
    device = pick_device(args.device)                           # as the scripts do: fast products
    model, ids = our_model(args.size, device, args.dtype), random_ids(args.size, args.batch, args.prompt, device)
    uniforms = torch.rand(args.batch, args.new, generator=torch.Generator().manual_seed(0)).to(device)
    sampler = sampling_copy(model)                              # as train_ppo.py does
    return lambda: generate(sampler, ids, torch.ones_like(ids, dtype=torch.bool), uniforms, stop=(-1, 0))


def transformers(args):
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(their_config(args.size)).eval()
    model.to(args.device, getattr(torch, args.dtype))
    ids = random_ids(args.size, args.batch, args.prompt, args.device)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                                  max_new_tokens=args.new, min_new_tokens=args.new, pad_token_id=0, eos_token_id=None)


def floors(args, peaks, dtype):
    """Reading the weights once a token, and the products of all tokens."""
    weights = n_weights(args.size)
    size = 4 if dtype == "float32" else 2
    return {"reading the weights": args.new * weights * size / peaks["bytes"],
            "arithmetic": 2 * weights * args.batch * args.new / peaks[dtype]}


def main():
    args = arguments(__doc__, batch=16, prompt=32, new=32)
    if args.worker:
        torch.set_num_threads(args.threads)
        run = {"ours": ours, "transformers": transformers}[args.worker](args)
        seconds = best_seconds(run, 3)
        version = importlib.metadata.version("torch" if args.worker == "ours" else "transformers")
        report(seconds, version=version)
        return
    compare(args, f"generate, {args.size}, batch {args.batch}, {args.dtype}", "transformers", "tokens", args.batch * args.new, floors)


if __name__ == "__main__":
    main()
