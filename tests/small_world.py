"""Models and data that a test can afford: GPT-2 with 2 layers, and a world whose texts are made of ten letters."""

import dataclasses
import json
import math

import torch

import train_ppo
from minirlhf import generate as sampling
from minirlhf import health
from minirlhf.data import Row, encode_rows
from minirlhf.files.tokenizer import encoding_from_ranks, save_tokenizer
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.reward_functions import FunctionReward
from minirlhf.weights import save_pretrained

LETTERS = "abcdefghij"
TOKENIZER = encoding_from_ranks({bytes([byte]): byte for byte in range(256)})
EOS = 256                       # the tokens of the world of letters are the 256 bytes, and this
CPU = torch.device("cpu")


def tiny_gpt2(V=11, C=16, n_positions=48, seed=0):
    """Weights far larger than at initialisation, so that every token, position and layer matters."""
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(vocab_size=V, n_positions=n_positions, n_embd=C, n_layer=2, n_head=2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def letters_gpt2(seed=0):
    """A language model that writes letters and, about every tenth token, the EOS; other bytes are out of its reach."""
    model = tiny_gpt2(V=257, seed=seed)
    with torch.no_grad():
        model.ln_f.weight[0], model.ln_f.bias[0] = 0, 2         # hidden channel 0 is always 2: a bias for the logits
        model.wte.weight[:, 0] = -6
        model.wte.weight[[ord(letter) for letter in LETTERS] + [EOS], 0] = 1
    return model


def random_texts(n, shortest, longest, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=rng).tolist()
    return ["".join(LETTERS[i] for i in torch.randint(10, (length,), generator=rng)) for length in lengths]


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_world(folder):
    """Writes all that the three scripts need: sft/, rm/, prompts.jsonl, demonstrations.jsonl, comparisons.jsonl."""
    reward = ScalarHeadModel(letters_gpt2(seed=1))
    reward.reward_mean, reward.reward_std = 0.3, 2.0
    for name, model in (("sft", letters_gpt2(seed=0)), ("rm", reward)):
        save_pretrained(model, folder / name)
        save_tokenizer(TOKENIZER, folder / name)
    prompts, answers = random_texts(40, 1, 6), random_texts(160, 1, 9, seed=1)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    write_jsonl(folder / "demonstrations.jsonl", [{"prompt": p, "response": r} for p, r in zip(prompts, answers)])
    write_jsonl(folder / "comparisons.jsonl", [{"prompt": p, "responses": answers[4 * i:4 * i + 2 + i % 3],
                                                "ranks": [2, 1, 3, 3][:2 + i % 3]} for i, p in enumerate(prompts)])
    return folder


def ppo_flags(world, *flags, out="ppo"):
    return ["--model", f"{world}/sft", "--reward", f"{world}/rm", "--data", f"{world}/prompts.jsonl", "--heldout", "",
            "--gold", "none", "--insist", "--device", "cpu", "--dtype", "float32", "--out", f"{world}/{out}", "--iterations", "1",
            "--batch_size", "12", "--micro_batch", "5", "--max_response", "12", *map(str, flags)]


def run_ppo(world, *flags, out="ppo"):
    """train_ppo.py through its command line; returns metrics.jsonl as a list of dicts."""
    train_ppo.main(ppo_flags(world, *flags, out=out))
    return read_metrics(world / out)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def script_flags(world, name, *flags):
    """Flags with which train_sft.py and train_rm.py run in the world of letters, into the folder `name`."""
    return ["--model", f"{world}/sft", "--heldout", "", "--device", "cpu", "--out", f"{world}/{name}", *map(str, flags)]


def ragged_mask(lengths, R):
    """(B, R) bool: the first `length` of each row."""
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def generate_with_logprobs(generate, model, prompts, prompt_mask, uniforms, *args):
    """A call of generate(), and with which log-probability it drew each token: (ids, mask, finished, logprobs (B, R)).

    They come from the sampler's own logits. Its random numbers, all different, say which row and token they belong to.
    """
    drawn, sample_token = {}, sampling.sample_token

    def watched(logits, uniform):
        token = sample_token(logits, uniform)
        logprobs = logits.log_softmax(dim=-1).gather(-1, token)
        drawn.update(zip(uniform.flatten().tolist(), logprobs.flatten().tolist()))
        return token
    sampling.sample_token = watched
    try:
        ids, mask, finished = generate(model, prompts, prompt_mask, uniforms, *args)
    finally:
        sampling.sample_token = sample_token
    logprobs = [[drawn.get(u, math.nan) for u in row] for row in uniforms[:, :mask.shape[1]].tolist()]
    return ids, mask, finished, torch.tensor(logprobs)


class GivenScores(FunctionReward):
    """A reward that gives these scores (B,), whatever the responses are."""

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, prompts, texts):
        return self.scores


# ---- the same in memory ----------------------------------------------------------------------------------------------

def config(**changes):
    return train_ppo.Config(**dict(batch_size=12, micro_batch=5, max_response=12, dtype="float32",
                                     temperature=1.0, stop="") | changes)


class Networks:
    """The four networks in memory, none of them at a special point, and a rollout of theirs."""

    def __init__(self, cfg, B=12, reward_model=None):
        self.cfg = dataclasses.replace(cfg, batch_size=B)
        self.policy, self.reference = letters_gpt2(0), letters_gpt2(0).requires_grad_(False)
        self.policy.dtype = self.reference.dtype = cfg.dtype
        with torch.no_grad():
            for p in self.policy.parameters():                  # a KL that is not 0
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        self.value_model = ScalarHeadModel(letters_gpt2(2))
        self.reward_model = reward_model or ScalarHeadModel(letters_gpt2(1)).requires_grad_(False)
        self.rollout = self.make_rollout()

    def make_rollout(self, beta=None, iteration=0):
        """Steps 1 to 6 on as many prompts as the batch has."""
        beta = self.cfg.beta if beta is None else beta
        return train_ppo.make_rollout(examples(self.cfg.batch_size), self.policy, self.reference, self.reward_model,
                                      self.value_model, TOKENIZER, (TOKENIZER.eot_token, 0), self.cfg, beta, iteration)

    def update(self, lr=0.1, iteration=0):
        """One call of update() with plain gradient descent; returns its metrics."""
        optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for model in (self.policy, self.value_model)]
        return train_ppo.update(self.rollout, self.policy, self.value_model, *optimizers, self.cfg, iteration)

    def weights(self):
        models = self.policy, self.value_model
        return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def skip_first_ratio_check(patch):
    """For tests that move a rollout away from the policy, which the run-time check would rightly refuse."""
    patch.setattr(health, "check_first_ratio", lambda *_: None)


def move_away(rollout, distance=0.3):
    """The rollout with other log-probabilities and values, so that some ratios and values are clipped."""
    rng = torch.Generator().manual_seed(0)
    noise = distance * torch.randn(2, *rollout.logprobs.shape, generator=rng)
    return rollout._replace(logprobs=rollout.logprobs + noise[0], values=rollout.values + noise[1])


def recorded(patch, module, name):
    """A list that fills with the arguments and the result of every call of a module's function."""
    calls, function = [], getattr(module, name)

    def watched(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]
    patch.setattr(module, name, watched)
    return calls


def rows_of(ids, mask):
    """Each row as a tuple of its tokens, without pads."""
    return [tuple(row[own].tolist()) for row, own in zip(ids, mask)]


def examples(B):
    return encode_rows([Row("x:1", text) for text in random_texts(B, 1, 6)], TOKENIZER, 48)
