"""Human feedback: collect it in the browser, judge two models blind, count votes, exchange them with Label Studio.

    python -m minirlhf.tools.feedback rank  --policy out/sft --prompts FILE --answers 4 --out my_comparisons.jsonl
    python -m minirlhf.tools.feedback rank  --answers_from FILE --out my_comparisons.jsonl     answers you have already
    python -m minirlhf.tools.feedback write --prompts FILE --out my_demonstrations.jsonl [--policy out/sft]
    python -m minirlhf.tools.feedback judge --a out/sft --b out/ppo --prompts FILE --out my_judgement.jsonl
    python -m minirlhf.tools.feedback stats my_comparisons.jsonl
    python -m minirlhf.tools.feedback clean my_comparisons.jsonl [--consensus sum --out clean.jsonl]
    python -m minirlhf.tools.feedback sample --policy out/sft --out my_comparisons.jsonl    all answers, not yet ranked
    python -m minirlhf.tools.feedback export my_comparisons.items.jsonl --out DIR       to Label Studio
    python -m minirlhf.tools.feedback import EXPORT.json --out my_comparisons.jsonl     from Label Studio

rank, write and judge serve a page on this machine only. Started again with the same flags, they continue where they
stopped, even after a crash. Several people can work at once, each under a name. Everybody gets the same items, or with
--overlap only the first of them. votes.py describes the files.
If this machine is a remote one, forward the port from yours: ssh -L 8321:127.0.0.1:8321 HOST
"""

from pathlib import Path

from minirlhf.answers import sample_as_trained
from minirlhf.data import encode_rows, follow_template, read_comparisons, read_demonstrations, read_prompts
from minirlhf.running.device import pick_device
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError, require, run_main
from minirlhf.running.runs import prompts_for
from minirlhf.stats import wilson
from minirlhf.tools.feedback import clean, items, labelstudio, server, stats
from minirlhf.tools.feedback.session import Session
from minirlhf.tools.feedback.votes import Journal, lock, sidecar


PACE = 40           # seconds for an item of four answers of a few sentences, as people need them


# ---- the commands ----------------------------------------------------------------------------------------------------

def collect(mode, folders, K, args):
    """What all modes share: K answers to each prompt from the models in `folders`, shown on a page."""
    args.prompts = args.prompts or prompts_for(folders[0] if folders else "", "heldout" if mode == "judge" else "data")
    sample_as_trained(args, folders[0] if folders else "")
    policies = items.load_policies(folders, pick_device(args.device))
    require(mode == "write" or args.temperature > 0 or K <= len(policies),
            "--temperature 0 samples the same answer every time; there would be nothing to compare")
    rows = read_prompts(args.prompts)
    for policy in policies:                                             # a prompt must fit into every model
        follow_template(policy.tokenizer, args.prompts)
        examples = encode_rows(rows, policy.tokenizer, policy.model.config.n_positions,
                               reserve=args.max_response, drop_long=args.drop_long)
        rows = [example.row for example in examples]
    prompts = list(dict.fromkeys(row.prompt for row in rows))[:args.n or None]
    collect_on(mode, args, lambda journal: items.Sampler(prompts, policies, K, journal, args),
               items.find_templates(args.prompts, folders))


def collect_on(mode, args, make_source, templates):
    """Shows a page until Ctrl-C, or in the mode "sample" only samples what rank would show.

    make_source gets the journal of sampled items and returns a Sampler or Given.
    """
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(out):
        journal = Journal(sidecar(out, "items"))
        source = make_source(journal)
        if mode == "sample":
            while source.add_item():
                pass
            print(f"{journal.path}: answers to {len(source.prompts)} prompts. Rank them here with rank --out {out}, or "
                  "elsewhere after export")
            return
        overlap, gold = getattr(args, "overlap", None), items.read_gold(getattr(args, "gold_items", ""))
        session = Session(mode, out, source, templates, args.seed, read_guidelines(args.guidelines), overlap, gold)
        if session.votes.rows:                                          # an error if --out is some other kind of file
            (read_demonstrations if mode == "write" else read_comparisons)(out)
        print(f"{len(source.prompts)} prompts, {len(session.votes.rows)} votes so far")
        if mode != "write":
            print(plan(len(source.prompts), overlap, source.K, args.people, len(gold)))
        server.serve(session, args.port, not args.no_browser, args.frame)
    print(f"\n{out}: {len(session.votes.rows)} votes")


def plan(n, overlap, K, people, n_gold):
    """What n items of K answers will take and tell, as a text, before the first vote.

    Real people's six pairs of an item are worth 3.6 independent ones (data/films): each beyond the first counts half.
    """
    shared = n if overlap is None else min(overlap, n)
    votes, pairs = people * (shared + n_gold) + n - shared, shared * (1 + (K * (K - 1) / 2 - 1) / 2)
    low, high = wilson(0.75 * pairs, pairs)
    return (f"{votes} votes x {PACE} s = {votes * PACE / 3600:.1f} hours (--people {people}). If two people agree on 75 % "
            f"of the pairs, or a model wins 75 %, the 95 % interval will be [{low:.2f}, {high:.2f}]")


def read_guidelines(path):
    """The text of --guidelines, "" without one."""
    try:
        return Path(path).read_text(encoding="utf-8") if path else ""
    except (OSError, ValueError) as error:
        raise UserError(f"--guidelines {path}: {getattr(error, 'strerror', None) or 'not a text in UTF-8'}") from None


def rank(args):
    if args.answers_from:
        require(not args.policy, "--answers_from takes the place of --policy; give one of them")
        require(Path(args.answers_from).resolve() != Path(args.out).resolve(),
                f"--answers_from and --out are both {args.out}; the votes need a file of their own")
        gold = items.read_gold(args.gold_items)
        given = [item for item in items.read_items(args.answers_from) if item["item"] not in gold][:args.n or None]
        require(given, f"{args.answers_from} has only gold items")
        collect_on("rank", args, lambda journal: items.Given(given), items.find_templates(args.answers_from, []))
    else:
        sample("rank", args)


def sample(mode, args):
    """Answers sampled for "rank", or with the mode "sample" for later. Started again, it goes on."""
    args.policy = args.policy or ["out/sft"]
    require(2 <= args.answers <= items.MOST and len(args.policy) <= args.answers,
            "--answers must be from 2 to 9, and not less than the number of policies")
    collect(mode, args.policy, args.answers, args)


def judge(args):
    require(Path(args.a) != Path(args.b),
            f"--a and --b are both {args.a}; to judge a model against itself, copy its folder")
    collect("judge", [args.a, args.b], 2, args)
    if Path(args.out).exists():
        stats.print_duel(stats.read_votes(args.out), str(Path(args.b)), str(Path(args.a)))


# ---- the command line ------------------------------------------------------------------------------------------------

def count(value):
    """A whole number from 0."""
    if not value.isdecimal():
        raise ValueError
    return int(value)


def page_flags(out):
    return {
        "--prompts": dict(help='JSONL with a "prompt" in each line [those of the first model\'s run]'),
        "--out": dict(default=out, help="the file that the votes are appended to [%(default)s]"),
        "--guidelines": GUIDELINES,
        "--n": dict(type=count, default=0, help="only the first n prompts; 0 is all [%(default)s]"),
        "--max_response": dict(type=count, help="most tokens of an answer [as the first model's run]"),
        "--temperature": dict(type=float, help="sampling temperature [as the first model's run]"),
        "--stop": dict(help="what ends an answer, like '.,8'; '' is EOS [as the first model's run]"),
        "--seed": dict(type=count, default=1, help="seed of the sampling and of the order shown [%(default)s]"),
        "--device": dict(default="", help="cuda, mps or cpu [the first of these that is available]"),
        "--port": dict(type=count, default=8321, help="port of the page on 127.0.0.1; 0: a free one [%(default)s]"),
        "--drop_long": dict(action="store_true", help="drop and count prompts that do not fit"),
        "--no_browser": dict(action="store_true", help="do not open the page"),
        "--frame": dict(action="store_true", help="let a page of another address show this one in a frame: a notebook"),
    }


GUIDELINES = dict(default="", metavar="FILE", help="text or Markdown to show to the annotators [none]")
PEOPLE = dict(type=count, default=1, help="how many people will vote, for the hours that are printed [%(default)s]")

# {name: (function, help, {flag: arguments of add_argument})}
COMMANDS = {
    "rank": (rank, "rank sampled answers", {
        "--policy": dict(nargs="+", default=[], help="model folders to sample from [out/sft]"),
        "--answers_from": dict(default="", metavar="FILE",
                               help='comparisons, or rows {"prompt", "responses"}, whose answers are shown in place of '
                                    'sampled ones; --prompts and --answers are not used [none]'),
        "--answers": dict(type=count, default=4, help="answers per prompt [%(default)s]"),
        "--overlap": dict(type=count, metavar="N", help="everybody ranks the first N, each other item goes to one "
                                                        "person [everybody ranks all]"),
        "--gold_items": dict(default="", metavar="FILE", help="comparisons whose ranks you know, mixed in for everybody, "
                                                              "to see who is careful [none]"),
        "--people": PEOPLE,
        **page_flags(out="my_comparisons.jsonl"),
    }),
    "sample": (lambda args: sample("sample", args), "sample all that rank would show, for Label Studio or for later", {
        "--policy": dict(nargs="+", default=[], help="model folders to sample from [out/sft]"),
        "--answers": dict(type=count, default=4, help="answers per prompt [%(default)s]"),
        **{flag: settings for flag, settings in page_flags(out="my_comparisons.jsonl").items()
           if flag not in ("--guidelines", "--port", "--no_browser", "--frame")},
    }),
    "write": (lambda args: collect("write", args.policy, 1, args), "write ideal answers", {
        "--policy": dict(nargs=1, default=[], help="a model folder, whose answers are drafts to edit [none]"),
        **page_flags(out="my_demonstrations.jsonl"),
    }),
    "judge": (judge, "compare two models blind", {
        "--a": dict(default="out/sft", help="one model folder [%(default)s]"),
        "--b": dict(default="out/ppo", help="the other, whose win rate is printed [%(default)s]"),
        "--people": PEOPLE,
        **page_flags(out="my_judgement.jsonl"),
    }),
    "stats": (lambda args: stats.print_stats(args.file, items.read_gold(args.gold_items)),
              "counts, agreement, pace, winners", {
        "file": dict(help="comparisons"),
        "--gold_items": dict(default="", metavar="FILE", help="the gold items of rank [none]"),
    }),
    "clean": (lambda args: clean.clean(args), "read disagreements, leave out votes, make a consensus", {
        "file": dict(help="votes"),
        "--show": dict(type=count, default=10, help="how many disagreements to print, the worst first [%(default)s]"),
        "--drop_annotator": dict(nargs="+", default=[], metavar="NAME", help="leave out a person's votes"),
        "--drop_flag": dict(nargs="+", default=[], metavar="FLAG", help="leave out items with this flag: 'all bad'"),
        "--min_kappa": dict(type=float, help="leave out items on which people agree less, from -1 to 1"),
        "--consensus": dict(choices=clean.CONSENSUS, help="one row an item: " + "; ".join(
            f"{name}, {rule}" for name, rule in clean.CONSENSUS.items()) + " [every vote is a row]"),
        "--out": dict(default="", metavar="FILE", help="a new file for what is left [only print]"),
    }),
    "export": (lambda args: labelstudio.export_file(args.file, args.out, read_guidelines(args.guidelines)),
               "answers to Label Studio tasks", {
        "file": dict(help="an items file, or comparisons, whose verdicts are left out"),
        "--guidelines": GUIDELINES,
        "--out": dict(required=True, metavar="DIR", help="a new folder"),
    }),
    "import": (lambda args: labelstudio.import_file(args.file, args.out, args.leading_space, args.names),
               "a Label Studio export to comparisons", {
        "file": dict(help="an export in Label Studio's format JSON"),
        "--out": dict(required=True, help="a new file"),
        "--names": dict(nargs="+", default=[], metavar="ACCOUNT=NAME",
                        help="whose votes are whose: 1=Ann a@example.org=Bob [Label Studio's numbers or addresses]"),
        "--leading_space": dict(action="store_true",
                                help="begin every answer with a space, as GPT-2's tokens expect, if it has none"),
    }),
}


def parse_args(argv):
    parser = Parser(prog="python -m minirlhf.tools.feedback", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, help, flags) in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        for flag, settings in flags.items():
            command.add_argument(flag, **settings)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
