"""One PPO iteration, rollout to last optimizer step, 4 epochs, a separate value network: us against TRL. One row of the table:

    python tests/bench/ppo_iteration.py --peer_python PEER/bin/python --size 124M --batch 16 --dtype float32

The peer's environment: tests/bench/trl.txt. Every response has all 32 tokens on both sides. --dtype is ours, --peer_dtype TRL's.
"""

import contextlib
import importlib.metadata
import tempfile
import time

from common import SIZES, arguments, compare, our_model, random_ids, report

import torch

args = arguments(__doc__, batch=16, micro_batch=16, prompt=32, new=32, iterations=2)


def ours():
    """Seconds of each iteration but the first, which allocates; by the functions of train_ppo.py."""
    import copy
    import train_ppo
    from minirlhf.data import Example, Row
    from minirlhf.reward import ScalarHeadModel
    from minirlhf.running import compute

    class Tokenizer:
        eot_token, n_vocab = -7, SIZES[args.size]["vocab_size"]     # no token ever ends a response

        def decode(self, ids):
            return ""

    cfg = train_ppo.Config(batch_size=args.batch, micro_batch=args.micro_batch, minibatches=1, epochs=4, max_response=args.new,
                           dtype=args.dtype, lr=1e-6, value_lr=1e-6)
    policy = our_model(args.size)
    policy.dtype = args.dtype
    reference, scorer = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))
    reward, value = ScalarHeadModel(scorer).requires_grad_(False), ScalarHeadModel(copy.deepcopy(policy))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, eps=1e-5, weight_decay=0.0, fused=True) for m in (policy, value)]
    cpu, seconds = compute.pick_device("cpu"), []
    batch = [Example(Row("", ""), ids, []) for ids in random_ids(args.size, args.batch, args.prompt).tolist()]
    for iteration in range(1 + args.iterations):
        start = time.perf_counter()
        rollout = train_ppo.roll_out(policy, batch, Tokenizer(), (-7, 0), cfg, iteration, cpu)
        train_ppo.make_experience(rollout, policy, reference, reward, cfg, cfg.beta)
        train_ppo.estimate_advantages(rollout, value, cfg)
        train_ppo.update(rollout, policy, value, *optimizers, cfg, iteration)
        seconds.append(time.perf_counter() - start)
        assert rollout.mask.shape == (args.batch, args.new) and rollout.mask.all()
    return seconds[1:]


def trl():
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
    config = transformers.GPT2Config(**SIZES[args.size], bos_token_id=None, eos_token_id=None, pad_token_id=V - 1, num_labels=1)
    policy, reference = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    value, reward = (transformers.GPT2ForSequenceClassification(config) for _ in range(2))
    rows = random_ids(args.size, args.batch * (1 + args.iterations), args.prompt).clamp(max=V - 3).tolist()
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        PPOTrainer(
            args=PPOConfig(output_dir=folder, per_device_train_batch_size=args.micro_batch,
                           gradient_accumulation_steps=args.batch // args.micro_batch, num_mini_batches=1, num_ppo_epochs=4,
                           total_episodes=len(rows), response_length=args.new, temperature=1.0, learning_rate=1e-6,
                           local_rollout_forward_batch_size=args.micro_batch, num_sample_generations=0, use_cpu=True,
                           gradient_checkpointing=False, bf16=args.dtype == "bfloat16", report_to=[], save_strategy="no",
                           disable_tqdm=True),
            processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}), callbacks=[Clock()]).train()
    return [end - start for start, end in zip(ends, ends[1:])]


def floors(peaks, dtype):
    """2 FLOP per weight and token forward, 6 with the way back. Blocks: five passes forward (sampling, log-probabilities of
    policy and reference, values, scores), 4 epochs of two networks; the head only where a response is, and not for scalars."""
    c = SIZES[args.size]
    blocks, head = 12 * c["n_layer"] * c["n_embd"]**2, c["vocab_size"] * c["n_embd"]
    tokens, responses = args.batch * (args.prompt + args.new), args.batch * args.new
    return {"arithmetic": (blocks * tokens * (2 * 5 + 6 * 4 * 2) + head * responses * (2 * 3 + 6 * 4)) / peaks[dtype]}


def main():
    if args.worker:
        torch.set_num_threads(args.threads)
        seconds = {"ours": ours, "trl": trl}[args.worker]()
        version = importlib.metadata.version("torch" if args.worker == "ours" else "trl")
        report(sum(seconds) / len(seconds), version=version)
        return
    compare(args, f"PPO iteration, {args.size}, {args.batch} prompts, {args.prompt} + {args.new} tokens, {args.dtype}", "trl",
            "responses", args.batch, floors)


if __name__ == "__main__":
    main()
