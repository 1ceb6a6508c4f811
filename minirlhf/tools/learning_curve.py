"""Reward models on fewer and more comparisons: for `evaluate --learning_curve` and for overoptimize."""

import json
from pathlib import Path

import train_rm
from minirlhf.config import UserError

VISITS = 2400       # few labels are seen more often: about this many prompts in all, but each 4 to 20 times


def run_script(script, **flags):
    """A training script with these flags, as from the command line; those that are its defaults are left out."""
    defaults, argv = vars(script.Config()), []
    for name, value in flags.items():
        if value != defaults[name]:
            argv.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    print(f"\n$ python {script.__name__}.py {' '.join(argv)}", flush=True)
    script.main(argv)


def train_rewards(counts, out, data, **flags):
    """Reward models on the first `count` comparisons of a file -> {count: its report}; their folders are out/rm_<count>.
    flags: any of train_rm.py's."""
    lines, reports = Path(data).read_text(encoding="utf-8").splitlines(keepends=True), {}
    for count in counts:
        if not 1 <= count <= len(lines):
            raise UserError(f"{data} has {len(lines)} comparisons: none can be trained on {count}")
    for count in counts:
        few, folder = Path(out) / f"comparisons_{count}.jsonl", Path(out) / f"rm_{count}"
        few.write_text("".join(lines[:count]), encoding="utf-8")
        run_script(train_rm, **flags | dict(data=str(few), out=str(folder), epochs=min(20, max(4, VISITS // count))))
        reports[count] = json.loads((folder / "report.json").read_text())
    return reports
