"""One PPO iteration, rollout to last optimizer step, a separate value network: us against TRL. One row of the table:

    python tests/bench/ppo_iteration.py --peer_python PEER/bin/python --size 124M --batch 16 --dtype float32

The peer's environment: tests/bench/trl.txt. Every response has all 32 tokens on both sides. --dtype is ours, --peer_dtype TRL's.
"""

import contextlib
import importlib.metadata
import tempfile
import time

from common import SIZES, arguments, compare, n_weights, now, our_model, random_ids, report, their_config

from minirlhf.running.device import start
import torch


def ours(args):
    """Seconds of each iteration but the first, which allocates."""
    import train_ppo
    cfg = train_ppo.Config(batch_size=args.batch, micro_batch=args.micro_batch, minibatches=1, epochs=args.epochs,
                           max_response=args.new, device=args.device, dtype=args.dtype, lr=1e-6, value_lr=1e-6,
                           temperature=1.0, stop="")
    return [sum(phases.values()) for phases in iterations(args.size, cfg, args.prompt, 1 + args.iterations)][1:]


def iterations(size, cfg, prompt, n):
    """n iterations by the functions of train_ppo.py: for each {phase: seconds}. No response ends before its limit."""
    import copy
    import train_ppo
    from minirlhf.data import Example, Row
    from minirlhf.reward import ScalarHeadModel

    class Tokenizer:
        eot_token, n_vocab = -7, SIZES[size]["vocab_size"]          # no token ever ends a response

        def decode(self, ids):
            return ""

    device = start(cfg)
    policy = our_model(size, device, cfg.dtype)
    reference, scorer = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    reward, value = (ScalarHeadModel(model).to(device) for model in (scorer, copy.deepcopy(policy)))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-6, eps=1e-5, weight_decay=0.0, fused=True)
                  for model in (policy, value)]
    batch = [Example(Row("", ""), ids, []) for ids in random_ids(size, cfg.batch_size, prompt).tolist()]
    reward.requires_grad_(False)
    for iteration in range(n):
        begun = now()
        rollout = train_ppo.make_rollout(batch, policy, reference, reward, value, Tokenizer(), (-7, 0), cfg, cfg.beta,
                                         iteration)
        middle = now()
        train_ppo.update(rollout, policy, value, *optimizers, cfg, iteration)
        assert rollout.response_mask.shape == (cfg.batch_size, cfg.max_response) and rollout.response_mask.all()
        yield {"rollout": middle - begun, "update": now() - middle}


def trl(args):
    """The same by PPOTrainer, timed by a callback between the ends of iterations."""
    import datasets
    import transformers
    from tokenizers import Tokenizer, models
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    V = SIZES[args.size]["vocab_size"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0")), pad_token=f"t{V - 1}",
        eos_token=f"t{V - 2}")
    torch.manual_seed(0)
    config = their_config(args.size, pad_token_id=V - 1, num_labels=1)
    policy, reference = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    value, reward = (transformers.AutoModelForSequenceClassification.from_config(config) for _ in range(2))
    rows = random_ids(args.size, args.batch * (1 + args.iterations), args.prompt).clamp(max=V - 3).tolist()
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        PPOTrainer(
            args=PPOConfig(output_dir=folder, per_device_train_batch_size=args.micro_batch,
                           gradient_accumulation_steps=args.batch // args.micro_batch, num_mini_batches=1,
                           num_ppo_epochs=args.epochs,
                           total_episodes=len(rows), response_length=args.new, temperature=1.0, learning_rate=1e-6,
                           local_rollout_forward_batch_size=args.micro_batch, num_sample_generations=0,
                           use_cpu=args.device == "cpu", gradient_checkpointing=False, bf16=args.dtype == "bfloat16",
                           report_to=[], save_strategy="no",
                           disable_tqdm=True),
            processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}), callbacks=[Clock()]).train()
    return [end - start for start, end in zip(ends, ends[1:])]


def floors(args, peaks, dtype):
    """2 FLOP per weight and token forward, 6 with the way back. Blocks: five passes forward (sampling, log-probabilities of
    policy and reference, values, scores), the epochs of two networks; the head only where a response is, and not for
    scalars."""
    config = our_model(args.size, "meta").config
    head = config.vocab_size * config.n_embd
    blocks, n = n_weights(args.size) - head, args.epochs
    tokens, responses = args.batch * (args.prompt + args.new), args.batch * args.new
    return {"arithmetic": (blocks * tokens * (2 * 5 + 6 * n * 2) + head * responses * (2 * 3 + 6 * n)) / peaks[dtype]}


def main():
    args = arguments(__doc__, batch=16, micro_batch=16, prompt=32, new=32, iterations=2, epochs=4)
    if args.worker:
        torch.set_num_threads(args.threads)
        seconds = {"ours": ours, "trl": trl}[args.worker](args)
        version = importlib.metadata.version("torch" if args.worker == "ours" else "trl")
        report(sum(seconds) / len(seconds), version=version)
        return
    compare(args, f"PPO iteration, {args.size}, {args.batch} prompts, {args.prompt} + {args.new} tokens, {args.dtype}", "trl",
            "responses", args.batch, floors)


if __name__ == "__main__":
    main()
