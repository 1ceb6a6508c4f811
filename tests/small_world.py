"""Models and data that a test can afford: GPT-2 with 2 layers, and a world whose texts are made of ten letters."""

import contextlib
import json

import torch

import train_ppo
from minirlhf.data import Row, encode_rows
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.reward import ScalarHeadModel
from minirlhf.files.tokenizer import encoding_from_ranks, save_tokenizer
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
            "--gold", "none", "--device", "cpu", "--out", f"{world}/{out}", "--iterations", "1", "--batch_size", "12",
            "--micro_batch", "5", "--max_response", "12", *map(str, flags)]


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


# ---- the same in memory ----------------------------------------------------------------------------------------------

def config(**changes):
    return train_ppo.Config(**dict(batch_size=12, micro_batch=5, max_response=12) | changes)


class Networks:
    """The four networks in memory, none of them at a special point, and a rollout of theirs."""

    def __init__(self, cfg, B=12, score=None):
        self.cfg, self.policy, self.reference = cfg, letters_gpt2(0), letters_gpt2(0).requires_grad_(False)
        with torch.no_grad():
            for p in self.policy.parameters():                  # a KL that is not 0
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        self.value = ScalarHeadModel(letters_gpt2(2))
        self.scorer = ScalarHeadModel(letters_gpt2(1)).requires_grad_(False)
        self.score = score or (lambda r: self.scorer.reward(r.ids, r.attend))
        self.rollout = train_ppo.roll_out(self.policy, examples(B), TOKENIZER, cfg, 0, CPU)
        self.metrics = train_ppo.make_experience(self.rollout, self.policy, self.reference, self.value, self.score, cfg,
                                                 cfg.beta)

    def update(self, lr=0.1):
        """One call of update() with plain gradient descent; returns its metrics."""
        optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for model in (self.policy, self.value)]
        return train_ppo.update(self.rollout, self.policy, self.value, optimizers, self.cfg, 0,
                                contextlib.nullcontext())

    def weights(self):
        return torch.cat([p.detach().flatten() for model in (self.policy, self.value) for p in model.parameters()])


def examples(B):
    return encode_rows([Row("x:1", text) for text in random_texts(B, 1, 6)], TOKENIZER, 48)
