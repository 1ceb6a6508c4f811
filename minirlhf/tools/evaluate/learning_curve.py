"""Reward models on fewer and more comparisons: for `evaluate --learning_curve` and for overoptimize."""

import json
from pathlib import Path

import train_rm
from minirlhf.running.errors import UserError

VISITS = 2400       # few labels are seen more often: about this many prompts in all, but each 4 to 20 times


def run_script(script, **flags):
    """A training script with these flags, as from the command line; those that are its defaults are left out."""
    defaults, argv = vars(script.Config()), []
    for name, value in flags.items():
        if value != defaults[name]:
            argv.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    print(f"\n$ python {script.__name__}.py {' '.join(argv)}", flush=True)
    script.main(argv)


def first_lines(file, counts):
    """{count: the first `count` lines of a file of comparisons}. UserError if it has fewer."""
    lines = [line for _, line in zip(range(max(counts)), open(file, encoding="utf-8"))]
    if not 1 <= min(counts) or len(lines) < max(counts):
        raise UserError(f"{file}: reward models on {', '.join(map(str, counts))} comparisons need as many lines, and at least 1")
    return {count: "".join(lines[:count]) for count in counts}


def train_rewards(counts, labels, folder, **flags):
    """Reward models on the first `count` comparisons of the file `labels`, in folder/rm_<count> -> {count: its report}.
    flags: any of train_rm.py's."""
    reports = {}
    for count, lines in first_lines(labels, counts).items():
        few, out = Path(folder) / f"comparisons_{count}.jsonl", Path(folder) / f"rm_{count}"
        few.write_text(lines, encoding="utf-8")
        run_script(train_rm, **flags | dict(data=str(few), out=str(out), epochs=min(20, max(4, VISITS // count))))
        reports[count] = json.loads((out / "report.json").read_text())
    return reports
