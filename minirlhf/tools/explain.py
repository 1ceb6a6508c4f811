"""PPO on one response, token by token: where the reward enters, what the KL costs, what the value model expected.

    python -m minirlhf.tools.chat out/ppo --explain
"""

from pathlib import Path
from types import SimpleNamespace

import torch

from minirlhf import ppo
from minirlhf.answers import parse_stop, respond
from minirlhf.data import encode, encode_prompt, encode_rows, read_prompts
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.reward_functions import FunctionReward
from minirlhf.generate import at_response, decode, response_logits
from minirlhf.reward import ScalarHeadModel
from minirlhf.files.errors import require
from minirlhf.running.runs import read_run, read_state
from minirlhf.weights import from_pretrained, scalar_from_pretrained

FIRST_LOOK = 5          # tokens that the block above the table shows: the first four, and the last
SENTENCES = {           # of its columns
    "state": "what the policy has read: the prompt, and its answer up to here",
    "action": "the token that the policy draws next",
    "V(state)": "the reward that the value model expects from here on. It is a V, not a Q: the action is not known yet",
    "reward": "-beta KL of the action. The last one also has the score, because only a whole answer can be judged",
    "return": "the reward from here on, as GAE estimates it. The value model is trained on it",
    "advantage": "return - V(state): how much better the action of this row is than expected. It trains that action",
}
COLUMNS = ("logp", "ref_logp", "KL", "reward", "value", "advantage", "return")


class Explainer:
    """The networks of a finished PPO run: the policy as it is now, everything else as it was in training."""

    def __init__(self, folder, device):
        folder = Path(folder)
        require("beta" in (config := read_run(folder)),
                f"{folder} is not a PPO run, and --explain needs one, such as out/ppo")
        require((folder / "state.pt").exists(),
                f"--explain: {folder} has no state.pt, where a PPO run keeps its value model")
        self.cfg, state = SimpleNamespace(**config), read_state(folder / "state.pt")
        self.beta, self.device, self.tokenizer = state["beta"], device, load_tokenizer(folder)
        self.policy = from_pretrained(folder).to(device)
        self.reference = from_pretrained(self.cfg.reference or self.cfg.model).to(device)
        if ".py:" in self.cfg.reward:
            prompts = encode_rows(read_prompts(self.cfg.data), self.tokenizer, self.policy.config.n_positions,
                                  reserve=self.cfg.max_response, drop_long=True)
            self.reward = FunctionReward(self.cfg.reward)
            self.reward.normalise(self.reference, prompts, self.tokenizer, self.cfg)
            self.value = ScalarHeadModel(from_pretrained(folder)).to(device)
        else:
            self.reward, self.value = (scalar_from_pretrained(self.cfg.reward).to(device) for _ in range(2))
        require("value" in state, f"--explain: {folder} was trained without a value model, and --explain shows one")
        self.value.load_state_dict(state["value"])

    def sample(self, prompt, seed):
        """Prompt ids and the ids of one sampled response, and whether it ended."""
        ids, positions = encode_prompt(self.tokenizer, prompt), self.policy.config.n_positions
        require(len(ids) + self.cfg.max_response <= positions,
                f"the prompt has {len(ids)} tokens, the response may have {self.cfg.max_response}, and "
                f"this model has {positions} positions in all")
        stop, rng = parse_stop(self.cfg.stop, self.tokenizer), torch.Generator().manual_seed(seed)
        (response, finished), = respond(self.policy, [ids], self.cfg.max_response, stop, rng, self.cfg.temperature)
        return ids, response, finished

    @torch.no_grad()
    def explain(self, prompt, response=None, seed=1):
        """Steps 2 to 5 for one response, given or sampled: token ids, {column: (R,) tensor} and the score.

        The advantage is the one before whitening. KL and log-probabilities are in nats.
        """
        if response is None:
            prompt_ids, response_ids, finished = self.sample(prompt, seed)
        else:
            (prompt_ids, response_ids), finished = encode(self.tokenizer, prompt, response), True
        P, ids = len(prompt_ids), torch.tensor([prompt_ids + response_ids], device=self.device)                 # (1, T)
        tokens, mask = ids[:, P:], torch.ones_like(ids, dtype=torch.bool)
        if isinstance(self.reward, ScalarHeadModel):
            score = self.reward.normalised_scores(ids, mask)                                                    # (1,)
        else:
            score = self.reward([prompt], [decode(self.tokenizer, response_ids)]).to(self.device)
        score = score if finished else torch.full_like(score, self.cfg.missing_eos)
        logp, ref_logp = (ppo.token_logprobs(response_logits(model, ids, mask, P), tokens, self.cfg.temperature)
                          for model in (self.policy, self.reference))                                           # (1, R)
        kl, value = logp - ref_logp, at_response(self.value(ids, mask), P)
        reward = ppo.token_rewards(kl, score, mask[:, P:], self.beta)
        advantage, returns = ppo.gae(reward, value, mask[:, P:], lam=self.cfg.lam)
        columns = dict(zip(COLUMNS, (logp, ref_logp, kl, reward, value, advantage, returns), strict=True))
        return response_ids, {name: column[0] for name, column in columns.items()}, float(score)

    def first_look(self, prompt, tokens, columns):
        """The lines of a block that shows some tokens as actions in states, and what its columns mean."""
        header = f"{'state':<29}{'action':<15}" + "".join(f"{name:>10}" for name in list(SENTENCES)[2:])
        numbers, rows = [columns[name].tolist() for name in ("value", "reward", "return", "advantage")], []
        for t, token in enumerate(tokens):
            state, action = prompt + self.tokenizer.decode(tokens[:t]), self.tokenizer.decode([token])
            rows.append(f"{'...' + state[-22:]!r:<29}{action!r:<15}" + "".join(f"{x[t]:>+10.3f}" for x in numbers))
        if len(rows) > FIRST_LOOK:
            rows[FIRST_LOOK - 1:-1] = ["..."]
        return [header, *rows, "", *(f"{name:<11}{sentence}" for name, sentence in SENTENCES.items()), ""]

    def table(self, prompt, response=None, seed=1):
        """The lines of the block and of the table."""
        tokens, columns, score = self.explain(prompt, response, seed)
        lines = self.first_look(prompt, tokens, columns)
        lines.append(f"{'token':<14}" + "".join(f"{name:>10}" for name in COLUMNS))
        for token, *numbers in zip(tokens, *(column.tolist() for column in columns.values())):
            lines.append(f"{self.tokenizer.decode([token])!r:<14}" + "".join(f"{number:>+10.3f}" for number in numbers))
        lines.append(f"score {score:+.3f} at the last token, beta {self.beta:.3g}, KL {columns['KL'].sum():.3f} nats "
                     f"in all, {len(tokens)} tokens")
        return lines
