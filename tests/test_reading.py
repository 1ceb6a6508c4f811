"""How much somebody has to read to follow one PPO iteration: which of our functions and files it runs through."""

import subprocess
import sys
from pathlib import Path

from small_world import ppo_flags, small_world

import train_ppo

ROOT = Path(__file__).resolve().parents[1]
BOOK = {"train_ppo.py", *(f"minirlhf/{name}.py" for name in ("gpt2", "generate", "reward", "ppo"))}
UNSEEN = "minirlhf/running/cpu.py"                              # stands in for F.linear on some processors
MOST_FUNCTIONS, MOST_FILES, MOST_LOADED = 9, 5, 29


class LoopBody:
    """Records which of our functions run from the second pass through main()'s loop to the start of the third.

    called: (file, function, whether the book or only another function outside of it calls it).
    """

    def __init__(self):
        self.called, self.passes = set(), 0

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event != "call" or not Path(code.co_filename).is_relative_to(ROOT):
            return
        if code.co_name == "batch_at":                          # with which every pass begins
            self.passes += 1
        file, caller = (str(Path(f.f_code.co_filename)).removeprefix(f"{ROOT}/") for f in (frame, frame.f_back))
        ours = file.startswith(("train_", "minirlhf/", "data/")) and file != UNSEEN         # .venv may be there too
        if self.passes == 2 and ours and "<" not in code.co_name:
            self.called.add((file, code.co_qualname, caller in BOOK))


def test_one_iteration_of_ppo_calls_few_functions_in_few_files_outside_of_the_book(tmp_path):
    """With a reward model, without gold, in float32."""
    small_world(tmp_path)
    watch = LoopBody()
    sys.setprofile(watch)
    try:
        train_ppo.main(ppo_flags(tmp_path, "--iterations", 3))
    finally:
        sys.setprofile(None)
    outside = sorted(call for call in watch.called if call[0] not in BOOK)
    for file, function, by_the_book in outside:
        print(f"  {file:<32} {function}{'' if by_the_book else ', called by those'}")
    met = [call for call in outside if call[2]]
    print(f"{len(met)} functions outside of the book are called by it, {len(outside)} run")
    assert watch.passes == 3 and ("train_ppo.py", "update", True) in watch.called
    assert len({file for file, *_ in met}) <= MOST_FILES and len(met) <= MOST_FUNCTIONS


LOADED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import train_ppo

def first_batch(*_):
    print("\\n".join(sorted(module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None))))
    sys.exit()

train_ppo.batch_at = first_batch
train_ppo.main(sys.argv[1:])
"""


def test_few_of_our_files_are_loaded_when_the_first_iteration_begins(tmp_path):
    small_world(tmp_path)
    code = LOADED.format(tests=str(ROOT / "tests"), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, *ppo_flags(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    paths = [Path(line) for line in done.stdout.splitlines() if line.endswith(".py")]
    ours = sorted({path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT)})
    ours = [path for path in ours if path.parts[0] not in ("tests", ".venv")]
    print(f"{len(ours)} files:", *ours)
    assert Path("train_ppo.py") in ours, done.stderr
    assert len(ours) <= MOST_LOADED
