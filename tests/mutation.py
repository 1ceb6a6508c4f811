"""Proof that a test would notice: the code under test with a defect put in, on which the same check must fail.

    assert_notices(check, (ppo, "masked_mean", "mask.sum()", "mask.numel()"))
"""

import inspect
import textwrap

import pytest


def mutant(function, *changes):
    """The function with pieces of its source replaced (old, new, old, new, ...); everything else is as in its module.

    Each old piece must occur exactly once; if not it is a ValueError, which no check expects.
    """
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        if source.count(old) != 1:
            raise ValueError(f"{function.__qualname__} has changed: {old!r} is in it {source.count(old)} times, not "
                             "once; the mutation of this test must be brought up to date")
        source = source.replace(old, new)
    names = {}
    exec(source, function.__globals__, names)
    return names[function.__name__]


def assert_notices(check, *defects, errors=AssertionError):
    """The check passes, and fails under each of the defects: (module or class, function's name, old, new, ...)."""
    check()
    for owner, name, *changes in defects:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(errors):
            patch.setattr(owner, name, mutant(getattr(owner, name), *changes))
            check()
