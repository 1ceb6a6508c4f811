"""PPO on one response, token by token: where the reward enters, what the KL costs, what the value model expected.

    python -m minirlhf.tools.chat out/ppo --explain
"""

from pathlib import Path

import torch

import train_ppo
from minirlhf import ppo
from minirlhf.running.compute import eos_of
from minirlhf.running.config import from_dict
from minirlhf.running.errors import UserError
from minirlhf.data import decode, encode, encode_rows, read_prompts
from minirlhf.generate import respond
from minirlhf.reward import ScalarHeadModel
from minirlhf.running.runs import newest_state, read_run
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.weights import from_pretrained


class Explainer:
    """The networks of a finished PPO run: the policy as it is now, everything else as it was in training."""

    def __init__(self, folder, device):
        folder = Path(folder)
        self.cfg = from_dict(train_ppo.Config, read_run(folder), f"{folder}/run.json")
        if not (folder / "state.pt").exists():
            raise UserError(f"--explain: {folder} has no state.pt, where a PPO run keeps its value model")
        state, _ = newest_state([folder / "state.pt"])
        self.beta, self.device, self.tokenizer = state["beta"], device, load_tokenizer(folder)
        self.policy, self.reference = from_pretrained(folder).to(device), from_pretrained(self.cfg.model).to(device)
        self.value = ScalarHeadModel(from_pretrained(self.cfg.model)).to(device)
        self.value.load_state_dict(state["value"])
        prompts = encode_rows(read_prompts(self.cfg.data), self.tokenizer, self.policy.config.n_positions,
                              reserve=self.cfg.max_response, drop_long=True)
        self.score, _ = train_ppo.make_scorer(self.cfg, self.reference, prompts, self.tokenizer, device)

    def rollout(self, prompt, response=None, seed=1):
        """A rollout of one row with all its fields filled in: of the response given, or of one sampled."""
        if response is None:
            ids, positions = self.tokenizer.encode_ordinary(prompt), self.policy.config.n_positions
            if len(ids) + self.cfg.max_response > positions:
                raise UserError(f"the prompt has {len(ids)} tokens, the response may have {self.cfg.max_response}; "
                                f"this model has {positions} positions in all")
            rng = torch.Generator().manual_seed(seed)
            (sampled, finished), = respond(self.policy, [ids], self.cfg.max_response, eos_of(self.cfg, self.tokenizer),
                                           rng, self.cfg.temperature, self.cfg.stop_after)
        else:
            ids, sampled = encode(self.tokenizer, prompt, response)
            finished = True
        text = decode(self.tokenizer, sampled)
        everything = torch.tensor([ids + sampled], device=self.device)
        rollout = train_ppo.Rollout([prompt], [text], len(ids), everything, torch.ones_like(everything, dtype=torch.bool),
                                    torch.ones(1, len(sampled), dtype=torch.bool, device=self.device),
                                    torch.tensor([finished], device=self.device))
        train_ppo.make_experience(rollout, self.policy, self.reference, self.value, self.score, self.cfg, self.beta)
        return rollout

    def table(self, rollout):
        """The lines of the table. The advantage is the one before whitening; KL and log-probabilities are in nats."""
        r = rollout
        columns = (r.logprobs, r.ref_logprobs, ppo.kl_k1(r.logprobs, r.ref_logprobs), r.rewards, r.values,
                   r.returns - r.values, r.returns)
        lines = [f"{'token':<14}" + "".join(f"{name:>10}" for name in ("logp", "ref_logp", "KL", "reward", "value",
                                                                       "advantage", "return"))]
        for token, *numbers in zip(r.ids[0, r.P:].tolist(), *(column[0].tolist() for column in columns)):
            lines.append(f"{self.tokenizer.decode([token])!r:<14}" + "".join(f"{number:>+10.3f}" for number in numbers))
        lines.append(f"score {float(r.scores[0]):+.3f} at the last token, beta {self.beta:.3g}, "
                     f"KL {float(columns[2].sum()):.3f} nats in all, {len(r.mask[0])} tokens")
        return lines
