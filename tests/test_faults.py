"""What breaks runs, really done to train_ppo.py in processes of their own: kill -9, a full disk, a read-only one, a second
run on the same folder, Ctrl-C, SIGTERM. Whatever happens, the run that was resumed ends as the run that nothing happened to."""

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from small_world import ppo_flags, script_flags, small_world

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

ITERATIONS, KILLS = 20, 12
SHORT = ["--iterations", ITERATIONS]
START = """import sys
sys.path.insert(0, {root!r})
from minirlhf.files.errors import run_main
from minirlhf.running import runs
runs.SAVING = {saving}
import {script}
run_main({script}.main)
"""
OFTEN, SELDOM = 1e9, 1e-12              # runs.SAVING: a checkpoint after every step, or after the first and the last only


def default_signals():
    """As from a terminal: in the background, or under nohup, a shell has these ignored, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Process:
    """A script in a process of its own, with what it has said so far."""

    def __init__(self, script, flags, log, prefix=(), saving=OFTEN):
        self.files = [Path(f"{log}.{name}") for name in ("out", "err")]
        with open(self.files[0], "wb") as out, open(self.files[1], "wb") as err:
            start = START.format(root=str(ROOT), script=script.removesuffix(".py"), saving=saving)
            command = [*prefix, sys.executable, "-c", start, *map(str, flags)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, preexec_fn=default_signals,
                                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})

    def said(self):
        return "".join(file.read_text(errors="replace") for file in self.files)

    def wait(self, seconds=120):
        """The exit code; a process that does not end is killed, and fails the test."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()

    def until(self, condition, seconds=60):
        """Waits until something is so; the process must not end before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.005)

    def error(self):
        """The one line of an error, after exit code 2 and without a traceback."""
        assert self.wait() == 2 and "Traceback" not in self.said(), self.said()
        line, = [line for line in self.files[1].read_text().splitlines() if line.startswith("error: ")]
        return line


def train(world, *flags, out="ppo", prefix=(), saving=OFTEN):
    return Process("train_ppo.py", ppo_flags(world, *SHORT, *flags, out=out), world / "log", prefix, saving)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The small world, with a run in whole/ that nothing happened to."""
    home = small_world(tmp_path_factory.mktemp("faults"))
    assert train(home, out="whole").wait() == 0
    return home


def state(folder):
    """state.pt as (path, value) pairs, without the seconds, which no two runs share."""
    def walk(path, value):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
        return [(path, value)] if items is None else [pair for key, item in items for pair in walk(f"{path}/{key}", item)]
    return [(path, value) for path, value in walk("", torch.load(folder / "state.pt", weights_only=True)) if path != "/seconds"]


def assert_same(folder, whole):
    """Model, vocabulary and metrics byte for byte; every tensor and value of the state."""
    for name in ("model.safetensors", "config.json", "vocab.tiktoken", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = state(folder), state(whole)
    assert [path for path, _ in ours] == [path for path, _ in theirs] and len(ours) > 100
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for (_, a), (_, b) in zip(ours, theirs))
    assert not list(folder.glob("*.tmp")) and (folder / "report.json").exists()


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

def rows_of(folder):
    return (folder / "metrics.jsonl").read_bytes().count(b"\n") if (folder / "metrics.jsonl").exists() else 0


def place(folder):
    """How far a run had come when it was killed."""
    if (folder / "report.json").exists():
        return "with its report written"
    if not (folder / "state.pt").exists():
        return "before the first checkpoint"
    return "after the last step" if rows_of(folder) == ITERATIONS else "in training"


def kill(process, folder, moment, seconds):
    """kill -9 at a random moment of a phase: of its start-up, of its steps, or of what follows the last of them."""
    def reached():
        working = "PPO: 40 prompts" in process.said()
        return process.process.poll() is not None or moment == "start" or working and (
            moment == "training" and (folder / "state.pt").exists() or rows_of(folder) == ITERATIONS)

    while not reached():
        time.sleep(0.002)
    time.sleep(seconds)
    process.process.kill()
    return process.wait() == -signal.SIGKILL


def follow_up(process, folder, whole):
    """What a person does once a process has ended: the flags of the next one, none if the run is finished."""
    if process.process.returncode == 0 or "is finished" in process.error():
        assert_same(folder, whole)
        return []
    assert "has no state.pt to continue from" in process.error()
    return ["--no-resume"]


def test_killed_at_random_moments_a_run_ends_as_the_run_that_was_not(home):
    rng, folder, whole, places = random.Random(8), home / "ppo", home / "whole", collections.Counter()
    moments = [("start", 3.0)] * 2 + [("training", 0.7)] * 7 + [("export", 0.2)] * 3
    rng.shuffle(moments)
    flags = []
    while moments:                                              # each process is killed; one that ends before is checked
        process = train(home, *flags)
        if kill(process, folder, moments[-1][0], rng.uniform(0, moments[-1][1])):
            moments.pop()
            places[place(folder)] += 1
            flags = ["--resume"]
        else:
            flags = follow_up(process, folder, whole)
    while flags:
        process = train(home, *flags)
        process.wait()
        flags = follow_up(process, folder, whole)
    print("killed", dict(places))
    assert sum(places.values()) == KILLS and places["in training"] >= 3
    assert places["after the last step"] + places["with its report written"] >= 1


# ---- a full disk, a read-only one ------------------------------------------------------------------------------------

@pytest.fixture
def tmpfs(tmp_path):
    """A file system in memory of 4 MB: the words that start a command where it is mounted, its path there, its path here.

    Where mounting is refused it is mounted in a namespace of its own, which a sleeping process keeps alive.
    """
    if not all(map(shutil.which, ("mount", "unshare", "nsenter"))):
        pytest.skip("mount, unshare or nsenter is not installed, so there is no small file system to fill")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        yield [], folder, folder
        subprocess.run(["umount", folder], check=True)
        return
    shell = ["sh", "-c", f"{' '.join(mount)} && echo mounted && exec sleep 600"]
    keeper = subprocess.Popen(["unshare", "--user", "--map-root-user", "--mount", *shell], stdout=subprocess.PIPE, text=True)
    try:
        if keeper.stdout.readline() != "mounted\n":
            pytest.skip("neither mount nor unshare --mount is allowed here, so there is no small file system to fill")
        enter = ["nsenter", f"--target={keeper.pid}", "--user", "--mount", "--preserve-credentials", f"--wd={ROOT}"]
        yield enter, folder, Path(f"/proc/{keeper.pid}/root{folder}")
    finally:
        keeper.kill()
        keeper.wait()


def test_a_full_disk_is_one_line_and_once_there_is_room_resume_ends_as_if_there_always_had_been(home, tmpfs):
    prefix, disk, disk_here = tmpfs
    (disk_here / "others").write_bytes(bytes((4 << 20) - 600_000))    # one checkpoint fits, two do not
    flags = ["--out", f"{disk}/ppo"]
    line = train(home, *flags, prefix=prefix).error()
    assert f"{disk}/ppo/state.pt cannot be written" in line and "No space left on device" in line
    assert 0 < rows_of(disk_here / "ppo") < ITERATIONS and not list((disk_here / "ppo").glob("*.tmp"))
    (disk_here / "others").unlink()
    again = train(home, *flags, "--resume", prefix=prefix)
    assert again.wait() == 0, again.said()
    assert_same(disk_here / "ppo", home / "whole")


def test_a_read_only_disk_is_one_line_of_every_script(home, tmpfs):
    prefix, disk, _ = tmpfs
    subprocess.run([*prefix, "mount", "-o", "remount,ro", disk], check=True)
    rows = {"sft": "demonstrations", "rm": "comparisons"}
    for name in ("sft", "rm", "ppo"):
        flags = ppo_flags(home) if name == "ppo" else script_flags(home, name, "--data", f"{home}/{rows[name]}.jsonl")
        line = Process(f"train_{name}.py", [*flags, "--out", f"{disk}/run"], home / "log", prefix).error()
        assert line == f"error: {disk}/run: Read-only file system"


# ---- two runs, Ctrl-C ------------------------------------------------------------------------------------------------

def content(home):
    """Everything that lies in the runs' folders, and under which names."""
    return {file: file.read_bytes() for file in home.rglob("*") if file.is_file() and file.suffix not in (".out", ".err")}


def test_a_second_run_on_the_same_folder_is_refused_and_changes_nothing(home):
    first = train(home, out="shared")
    first.until(lambda: (home / "shared/state.pt").exists())
    first.process.send_signal(signal.SIGSTOP)                   # it lives, and does nothing
    try:
        before = content(home)
        for flags in ([], ["--resume"]):
            second = Process("train_ppo.py", ppo_flags(home, *SHORT, *flags, out="shared"), home / "second")
            assert f"{home}/shared is in use by another process" in second.error()
        assert content(home) == before
    finally:
        first.process.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert_same(home / "shared", home / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_says_how_to_go_on_and_resume_ends_as_the_run_that_went_through(home, number):
    out = f"stopped{number}"
    process = train(home, out=out, saving=SELDOM)         # after the first step only a signal makes a checkpoint
    process.until(lambda: rows_of(home / out) >= 3)
    process.process.send_signal(number)
    assert process.wait() == 128 + number and "Traceback" not in process.said() and "--resume" in process.said().splitlines()[-1]
    step = dict(state(home / out))["/step"]
    assert step == rows_of(home / out) < ITERATIONS and f"step {step} of {ITERATIONS}" in process.said()
    again = train(home, "--resume", out=out, saving=SELDOM)
    assert again.wait() == 0, again.said()
    assert_same(home / out, home / "whole")
