"""Functions of your own: any Python function can be the reward, or a true preference to watch.

    function(prompts: list[str], responses: list[str]) -> list[float]       (or a one-dimensional array or tensor)

A path given as FILE.py:function is the only code that any command of this project executes from a path.
"""

import importlib.util
import os
import traceback
from pathlib import Path

import numpy as np
import torch

from minirlhf.config import UserError, shown

LARGEST = torch.finfo(torch.float32).max
TINY_GOLD = Path(__file__).parent.parent / "data/tiny/gold.py"


def load_function(spec):
    """"path/to/file.py:name" -> that function. UserError if the file or the name is not there."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise UserError(f"{spec}: not FILE.py:function with a file that exists")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{spec}: {path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name!r}")
    return getattr(module, name)


def load_gold(spec, data_file):
    """The true preference, which is only ever measured: a function's spec, 'none', or 'auto', which is the embedded
    world's own gold.py for its own data and nothing for any other. Returns the function, or None."""
    if spec == "auto":
        return load_function(f"{TINY_GOLD}:gold") if Path(data_file).resolve().parent == TINY_GOLD.parent else None
    return None if spec == "none" else load_function(spec)


def call_reward(function, prompts, responses, name="the reward function"):
    """Calls a reward function and checks what it returns -> (B,) float32. UserError names the response at fault.

    The function gets lists of its own, so that it may sort or change them.
    """
    try:
        scores = plain(function(list(prompts), list(responses)))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{name} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno}) on "
                        f"{len(prompts)} responses, the first of them {responses[0]!r} to {prompts[0]!r}") from error
    if not isinstance(scores, (list, tuple)) or len(scores) != len(prompts):
        raise UserError(f"{name} must return a list of {len(prompts)} numbers, not {shown(scores)}")
    scores = [plain(score) for score in scores]
    for prompt, response, score in zip(prompts, responses, scores):
        if type(score) not in (int, float) or not abs(score) <= LARGEST:        # "not <=" catches nan too
            raise UserError(f"{name} gave {shown(score)} for the response {response!r} to {prompt!r}")
    return torch.tensor(scores, dtype=torch.float32)


def plain(value):
    """An array or tensor, or one number of them, as lists and numbers of Python; anything else as it is."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value
