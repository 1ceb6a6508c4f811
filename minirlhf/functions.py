"""Functions of your own: any Python function can be the reward, or a true preference to watch.

    function(prompts: list[str], responses: list[str]) -> list[float]

A path given as FILE.py:function is the only code that any command of this project executes from a path.
"""

import importlib.util
import math
from pathlib import Path

import torch

from minirlhf.config import UserError

TINY_GOLD = Path(__file__).parent.parent / "data/tiny/gold.py"


def load_function(spec):
    """"path/to/file.py:name" -> that function. UserError if the file or the name is not there."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"{spec}: not FILE.py:function with a file that exists")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name!r}")
    return getattr(module, name)


def load_gold(spec, data_file):
    """The true preference, which is only ever measured: a function's spec, 'none', or 'auto', which is the embedded
    world's own gold.py for its own data and nothing for any other. Returns the function, or None."""
    if spec == "auto":
        return load_function(f"{TINY_GOLD}:gold") if Path(data_file).resolve().parent == TINY_GOLD.parent else None
    return None if spec == "none" else load_function(spec)


def call_reward(function, prompts, responses):
    """Calls a reward function and checks what it returns -> (B,) float32. UserError names the response at fault."""
    try:
        scores = function(prompts, responses)
    except Exception as error:
        raise UserError(f"the reward function raised {type(error).__name__}: {error} on {len(prompts)} responses, the first "
                        f"of them {responses[0]!r} to {prompts[0]!r}") from error
    if not isinstance(scores, (list, tuple)) or len(scores) != len(prompts):
        raise UserError(f"the reward function must return a list of {len(prompts)} numbers, not {repr(scores)[:60]}")
    for prompt, response, score in zip(prompts, responses, scores):
        if type(score) not in (int, float) or not math.isfinite(score):
            raise UserError(f"the reward function gave {score!r} for the response {response!r} to {prompt!r}")
    return torch.tensor(scores, dtype=torch.float32)
