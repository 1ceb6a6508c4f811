"""Python functions as rewards, or as a true preference that is only measured; checks of rewards.

    function(prompts: list[str], responses: list[str]) -> list[float]   (or a 1-d array or tensor)

Parameters with names like these, or TRL's "completions", are given by name, in whatever order.
A path given as FILE.py:function is the only code that any command here executes from a path.
"""

import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

from minirlhf.answers import parse_stop, reference_answers
from minirlhf.files.errors import UserError, require, shown
from minirlhf.generate import decode
from minirlhf.health import judge_reward_model
from minirlhf.running.runs import read_report

LARGEST = torch.finfo(torch.float32).max
GOLD = ("a true preference to watch, never trained on: FILE.py:function, 'none', or 'auto', the "
        "embedded world's for its own data")
SHARED = (torch.get_default_dtype, torch.get_default_device, torch.is_grad_enabled, os.getcwd,
          torch.is_inference_mode_enabled, lambda: torch.is_autocast_enabled("cpu"),
          torch.get_float32_matmul_precision)
ROLES = {role: names.split() for role, names in {
    "prompts": "prompts prompt queries query questions question instructions instruction "
               "inputs input contexts context",
    "responses": "responses response completions completion answers answer outputs output "
                 "generations generation",
}.items()}
TINY_GOLD = Path(__file__).parent.parent / "data/tiny/gold.py"


def load_function(spec):
    """"path/to/file.py:name" -> that function. UserError if the file or the name is missing.

    The file is a module like others, so it may import what lies beside it and use process pools.
    """
    path, _, name = spec.rpartition(":")
    require(path.endswith(".py") and os.path.isfile(path),
            f"{spec}: not FILE.py:function with a file that exists")
    module_name, folder = Path(path).stem, str(Path(path).resolve().parent)
    # What another such file has imported under a name from this folder is hidden meanwhile.
    hidden = {name: sys.modules.pop(name)
              for name in [file.stem for file in Path(folder).glob("*.py")]
              if name in sys.modules.keys() - sys.stdlib_module_names - {module_name}
              and not hasattr(sys.modules[name], "__path__")
              and Path(getattr(sys.modules[name], "__file__", "") or "").parent != Path(folder)}
    while module_name in sys.modules or module_name in sys.stdlib_module_names:
        module_name += "_"                              # another module has this name already
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, folder)                          # stays there for later imports
    with torch_unchanged(spec):
        try:
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{spec}: {path} cannot be run: "
                            f"{traceback.format_exception_only(error)[-1].strip()}") from error
    sys.modules.update(hidden)
    require(callable(getattr(module, name, None)), f"{spec}: {path} has no function {name!r}")
    return getattr(module, name)


@contextlib.contextmanager
def torch_unchanged(name):
    """UserError if what runs inside changes a setting that the training shares."""
    before = [setting() for setting in SHARED]
    yield
    require(before == [setting() for setting in SHARED],
            f"{name} changes torch's default dtype, its default device, its precision, whether it "
            "keeps gradients, or the current folder, which are the training's too")


def load_gold(spec, data_file):
    """The true preference, which is measured and never optimised: a function, or None.

    spec: FILE.py:function, "none", or "auto", the embedded world's own gold.py for its own data.
    """
    if spec == "auto":
        embedded = Path(data_file).resolve().parent == TINY_GOLD.parent
        return load_function(f"{TINY_GOLD}:gold") if embedded else None
    return None if spec == "none" else load_function(spec)


def call_reward(function, prompts, responses, name="the reward function"):
    """Calls a function and checks what it returns -> (B,) float32. UserError names the response.

    The function gets copies of the lists, so that it may sort or change them.
    """
    positional, named = arguments(function, list(prompts), list(responses), name)
    with torch_unchanged(name):
        try:
            scores = plain(function(*positional, **named))
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{name} raised {traceback.format_exception_only(error)[-1].strip()} "
                f"({place.filename}:{place.lineno}) "
                f"on {len(prompts)} responses, the first of them {responses[0]!r} to {prompts[0]!r}"
            ) from error
    require(isinstance(scores, (list, tuple)) and len(scores) == len(prompts),
            f"{name} must return a list of {len(prompts)} numbers, not {shown(scores)}")
    scores = [plain(score) for score in scores]
    for prompt, response, score in zip(prompts, responses, scores):
        if type(score) not in (int, float) or not abs(score) <= LARGEST:    # "not <=" catches nan
            raise UserError(
                f"{name} gave {shown(score)} for the response {response!r} to {prompt!r}")
    return torch.tensor(scores, dtype=torch.float32)


def arguments(function, prompts, responses, name):
    """(positional arguments, named arguments) of a call. UserError if names contradict the order.

    TRL's functions take completions first. With both names known the order does not matter.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):                     # some written in C do not tell
        return (prompts, responses), {}
    found = {role: next((known for known in parameters if known.lower() in ROLES[role]), None)
             for role in ROLES}
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds and found["responses"]:
        found["prompts"] = found["prompts"] or "prompts"
    if all(found.values()) and inspect.Parameter.POSITIONAL_ONLY not in kinds:
        return (), {found["prompts"]: prompts, found["responses"]: responses}
    first, second = (*parameters, "", "")[:2]
    # Names like completion_texts count too.
    require(not any(known in first.lower() for known in ROLES["responses"])
            and not any(known in second.lower() for known in ROLES["prompts"]),
            f"{name} takes ({', '.join(parameters)}), and it is unclear which are the prompts. "
            "Name its parameters prompts and responses")
    return (prompts, responses), {}


def plain(value):
    """An array, a tensor or one number of them as Python lists and numbers; the rest as it is."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value


class FunctionReward:
    """A function as PPO's reward, with mean 0 and standard deviation 1 over SFT samples."""

    def __init__(self, spec):
        self.function, self.mean, self.std = load_function(spec), 0.0, 1.0
        print(f"the reward is {spec}: its code runs here")

    def __call__(self, prompts, texts):
        """B prompts and B responses -> (B,) float32 on the CPU."""
        return (call_reward(self.function, prompts, texts) - self.mean) / self.std

    def normalise(self, sft, examples, tokenizer, cfg):
        """Sets mean and standard deviation from samples of the SFT model (Ziegler 2019)."""
        stop = parse_stop(cfg.stop, tokenizer)
        examples, answers = reference_answers(sft, examples, cfg.max_response, stop, cfg)
        texts = [decode(tokenizer, ids) for ids, _ in answers]
        raw = call_reward(self.function, [example.row.prompt for example in examples], texts)
        self.mean, self.std = float(raw.mean()), float(raw.std()) or 1.0


def check_fits(reward_model, policy, examples, cfg):
    """UserError unless the reward model can read every prompt with every response.

    Also if its training run found it no better than chance or than length, unless --insist.
    """
    tokens, positions = reward_model.config.vocab_size, reward_model.config.n_positions
    require(tokens == policy.config.vocab_size,
            f"--reward {cfg.reward} has {tokens} tokens, --model {cfg.model} has "
            f"{policy.config.vocab_size}: they must share one vocabulary")
    longest = max(len(example.prompt) for example in examples) + cfg.max_response
    require(longest <= positions,
            f"--reward {cfg.reward} has {positions} positions, the longest prompt and response "
            f"{longest}: lower --max_prompt or --max_response")
    good, sentence = judge_reward_model(read_report(cfg.reward))
    require(good or cfg.insist, f"--reward {cfg.reward}: {sentence}. --insist starts anyway")
