"""The assessment: does a model follow instructions, is it fair, is it good, and what did alignment cost?

    python -m minirlhf.tools.evaluate out/sft out/ppo --reward out/rm --out out/report

samples one answer of each model to held-out prompts, prints who wins, and writes report.html and report.json.
The first model is the reference for KL and comparisons. The embedded world has a true preference, data/tiny/gold.py.
For other prompts there are --judge, --votes (what people said), the bias probes and the instruction checks.
"""

from pathlib import Path

from minirlhf.files.json_files import write_json
from minirlhf.running.device import pick_device
from minirlhf.running.config import Parser
from minirlhf.files.errors import require, run_main
from minirlhf.running.runs import move_aside, read_options
from minirlhf.tools.evaluate.report import full_report, held_out_by
from minirlhf.stats import plain
from minirlhf.tools.evaluate.tables import details_of, introduction, print_report, verdict_of, verdicts_of
from minirlhf.tools.page import read_folder, write_page

OPTIONS = (     # name, type, default, help
    ("reward", str, None, "a reward model to assess"),
    ("judge", str, None, "another reward model, not used in training, for win rates"),
    ("votes", str, None, "a file of `feedback judge`: what people said of these models"),
    ("gold", str, "auto", "FILE.py:function, a true preference; 'none'; 'auto' is the embedded world's for its own "
                          "prompts"),
    ("prompts", str, None, "held-out prompts [those that the run of the last model held out]"),
    ("demonstrations", str, None, "held-out demonstrations for the perplexity, '' for none "
                                  "[demonstrations_test.jsonl beside --prompts, if there is one]"),
    ("comparisons", str, None, "held-out comparisons for --reward [comparisons_test.jsonl beside --prompts, or those "
                               "that it held out itself]"),
    ("stop", str, None, "what ends an answer: '' is EOS, '13,16' is token 13 from position 16 on "
                        "[as the last PPO run here]"),
    ("max_response", int, None, "most tokens of an answer [as the last PPO run here]"),
    ("temperature", float, None, "sampling temperature [as the last PPO run here]"),
    ("seed", int, 1, "seed of the answers"),
    ("device", str, "", "cuda, mps or cpu; the first that is available if not given"),
    ("out", str, "out/report", "the folder of report.html and report.json"),
)


def parse(argv):
    """The flags, checked against each other. Files beside --prompts are filled in."""
    parser = Parser(prog="python -m minirlhf.tools.evaluate", description=__doc__)
    parser.add_argument("models", nargs="+", help="model folders; the first is the reference")
    for name, kind, default, help in OPTIONS:
        parser.add_argument(f"--{name}", type=kind, default=default, help=help + f" [{default}]" * bool(default))
    parser.add_argument("--drop_long", action="store_true",
                        help="drop and count prompts that do not fit, instead of stopping")
    args = parser.parse_args(argv)
    require(len(set(args.models)) == len(args.models), "a model is named twice")
    args.prompts = args.prompts or next(filter(None, map(held_out_by, reversed(args.models))), "")
    require(args.prompts, "no run among these models kept held-out prompts: name some with --prompts")
    for name in ("demonstrations", "comparisons"):
        if getattr(args, name) is None:
            file = Path(args.prompts).with_name(f"{name}_test.jsonl")
            setattr(args, name, str(file) if file.is_file() else "")
            if name == "comparisons" and args.reward and not args.comparisons:
                args.comparisons = held_out_by(args.reward)
    require(args.comparisons or not args.reward,
            "--reward is assessed on comparisons that it was not trained on: name them with --comparisons")
    return args


def main(argv=None):
    args = parse(argv)
    runs = [read_folder(model) for model in args.models
            if "reward" in read_options(model) and (Path(model) / "metrics.jsonl").is_file()]
    report, out = full_report(args, pick_device(args.device)), Path(args.out)
    print_report(report)
    move_aside(out)
    out.mkdir(parents=True)
    write_json(out / "report.json", plain(report | {"verdict": verdict_of(report)}))
    write_page(out / "report.html", f"{', '.join(args.models[1:])} against {args.models[0]}".removeprefix(" against "),
               runs, [*verdicts_of(report), *details_of(report)],
               [introduction(report), *report["notes"]], verdict=verdict_of(report))
    print(f"\nwrote {out}/report.html and report.json")


if __name__ == "__main__":
    run_main(main)
