"""People's feedback: collect it on a page in the browser, count it, carry it to Label Studio and back, judge blind.

    python -m minirlhf.tools.feedback rank  --policy out/sft --prompts FILE --answers 4 --out my_comparisons.jsonl
    python -m minirlhf.tools.feedback write --prompts FILE --out my_demonstrations.jsonl [--policy out/sft]
    python -m minirlhf.tools.feedback judge --a out/sft --b out/ppo --prompts FILE --out my_judgement.jsonl
    python -m minirlhf.tools.feedback stats my_comparisons.jsonl
    python -m minirlhf.tools.feedback export my_comparisons.jsonl --out DIR             for Label Studio
    python -m minirlhf.tools.feedback import EXPORT.json --out my_comparisons.jsonl     from Label Studio

rank, write and judge serve a page on this machine only, and go on where they were stopped, however that was. Several
people can work at once, each under a name; everybody gets the same items unless --people 1. What a vote looks like and
why none is lost: votes.py. On a machine elsewhere: ssh -L 8321:127.0.0.1:8321 (the same port at both ends).
"""

import argparse
import base64
import hashlib
import json
import os
import random
import re
import secrets
import signal
import sys
import threading
import time
import webbrowser
from collections import defaultdict
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from minirlhf.running.compute import pick_device
from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import encode_rows, is_list_of, read_comparisons, read_demonstrations, read_prompts, text
from minirlhf.tools.feedback.items import Sampler, find_templates, instruction_of, load_policies
from minirlhf.tools.feedback.labelstudio import export_file, import_file
from minirlhf.tools.feedback.stats import print_duel, print_stats, read_votes
from minirlhf.tools.feedback.votes import Journal, comparison_row, lock, sidecar

PAGE = Path(__file__).with_name("page.html")
MAX_BODY = 64 * 1024    # bytes of a request; a response of 1,024 tokens has about 5,000
HOLD = 900              # seconds that an item is kept for the person who looks at it, with --people


# ---- who has voted on what -------------------------------------------------------------------------------------------

def now():
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Session:
    """Hands out items and writes down what people say of them. Methods take and return what JSON holds."""

    def __init__(self, mode, out, sampler, templates, seed, people):
        self.mode, self.sampler, self.templates, self.seed, self.people = mode, sampler, templates, seed, people
        self.lock = threading.Lock()
        self.votes, self.skips = Journal(out), Journal(sidecar(out, "skips"))
        self.done = defaultdict(dict)               # annotator -> {item: (journal, row)}, the latest last
        self.held = defaultdict(dict)               # item -> {annotator: until when}
        rows = [(journal, row) for journal in (self.votes, self.skips) for row in journal.rows
                if all(isinstance(row.get(name), str) for name in ("item", "annotator", "time"))]
        for journal, row in sorted(rows, key=lambda pair: pair[1]["time"]):
            self.done[row["annotator"]][row["item"]] = journal, row

    def usable(self, item):
        """Ranking needs two different answers; writing needs none."""
        return self.mode == "write" or len(item["responses"]) > 1

    def taken(self, item, annotator):
        """Whether --people others have voted on this item, or are looking at it."""
        if not self.people:
            return False
        voted = {name for name, done in self.done.items() if done.get(item, (None,))[0] is self.votes}
        looking = {name for name, until in self.held[item].items() if until > time.monotonic()}
        return len((voted | looking) - {annotator}) >= self.people

    def order(self, item, annotator):
        """A random order of the answers, always the same for this person and item: a reload does not shuffle."""
        order = list(range(len(item["responses"])))
        random.Random(f"{self.seed} {annotator} {item['item']}").shuffle(order)
        return order

    def next(self, annotator):
        """The first item that this person has not seen, or {"waiting"}, or {"finished"}; and how far this person is."""
        with self.lock:
            items, done = self.sampler.items, self.done[annotator]
            own = [item for item in items if item["item"] in done]
            votes = sum(done[item["item"]][0] is self.votes for item in own)
            state = {"mode": self.mode, "votes": votes, "skips": len(own) - votes, "can_undo": bool(done)}
            left = len(self.sampler.prompts) - len(items)
            free = [(number, item) for number, item in enumerate(items, 1)
                    if item["item"] not in done and self.usable(item) and not self.taken(item["item"], annotator)]
            state["total"] = len(own) + len(free) + left
            if not free:
                self.sampler.want(len(items) + 1)
                if left and self.sampler.error:
                    raise Refusal(500, self.sampler.error)
                return {**state, "waiting" if left else "finished": True}
            number, item = free[0]
            self.sampler.want(number)
            self.held[item["item"]] = {**self.held[item["item"]], annotator: time.monotonic() + HOLD}
            shown = [item["responses"][k] for k in self.order(item, annotator)]
            cut = [not item["finished"][k] for k in self.order(item, annotator)]
            return {**state, "item": item["item"], "answers": shown, "cut": cut,
                    "instruction": instruction_of(item["prompt"], self.templates)}

    def record(self, annotator, item, journal, row):
        """Appends a row unless this person's word on this item is there already: a repeated request changes nothing."""
        if item not in self.done[annotator]:
            journal.append(row)
            self.done[annotator][item] = journal, row
        return {"saved": True}

    def find(self, item):
        found = [each for each in self.sampler.items if each["item"] == item]
        if not found:
            raise Refusal(400, "there is no such item")
        return found[0]

    def vote(self, annotator, item, ranks, seconds):
        """ranks: of the answers in the order shown; 1 is best, equal is a tie, no number is left out."""
        with self.lock:
            found = self.find(item)
            order = self.order(found, annotator)
            if self.mode == "write" or not is_list_of(int, ranks, len(order)):
                raise Refusal(400, f"ranks must be {len(order)} numbers")
            if sorted(set(ranks)) != list(range(1, len(set(ranks)) + 1)):
                raise Refusal(400, "ranks must count from 1 without a gap")
            ranks = [ranks[order.index(k)] for k in range(len(order))]
            row = comparison_row(found["prompt"], found["responses"], ranks, found["finished"], item=item,
                                 models=found["models"], annotator=annotator, order=order, seconds=seconds, time=now())
            return self.record(annotator, item, self.votes, row)

    def write(self, annotator, item, response, seconds):
        """The ideal answer. It gets the leading space of the draft, or one if the prompt does not end in a space."""
        with self.lock:
            found = self.find(item)
            if self.mode != "write" or not isinstance(response, str) or not response.strip():
                raise Refusal(400, "the answer is empty")
            text(response, "response", "the answer")
            draft = (found["responses"] or ["" if found["prompt"][-1].isspace() else " "])[0]
            response = draft[:len(draft) - len(draft.lstrip())] + response.strip().replace("\r\n", "\n")
            row = {"prompt": found["prompt"], "response": response, "item": item, "annotator": annotator,
                   "seconds": seconds, "time": now()}
            return self.record(annotator, item, self.votes, row)

    def skip(self, annotator, item, seconds):
        with self.lock:
            prompt = self.find(item)["prompt"]
            row = {"prompt": prompt, "item": item, "annotator": annotator, "seconds": seconds, "time": now()}
            return self.record(annotator, item, self.skips, row)

    def undo(self, annotator):
        """Takes back this person's latest vote or skip -> what it said, for the page to start from."""
        with self.lock:
            done = self.done[annotator]
            if not done:
                return {"undone": None}
            item = list(done)[-1]
            journal, row = done[item]
            journal.remove(row)
            del done[item]
            ranks = [row["ranks"][k] for k in row["order"]] if "ranks" in row else None
            return {"undone": item, "ranks": ranks, "response": row.get("response")}


# ---- the server ------------------------------------------------------------------------------------------------------
# Loopback only. The Host header keeps out pages whose name was pointed at 127.0.0.1; the token, which only the address
# printed in the terminal holds, keeps out everyone else on this machine; a foreign Origin is refused besides.

class Refusal(Exception):
    """An HTTP status and a sentence for the person at the page."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port, session):
        super().__init__(("127.0.0.1", port), Handler)
        self.session, self.token = session, secrets.token_urlsafe(24)
        self.page = PAGE.read_bytes()
        inline = re.findall(rb"<(script|style)>(.*?)</\1>", self.page, re.DOTALL)
        hashes = {kind.decode(): base64.b64encode(hashlib.sha256(code).digest()).decode() for kind, code in inline}
        # Nothing runs but the page's own script, nothing is fetched but from here: a second wall behind textContent.
        self.policy = ("default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                       f"frame-ancestors 'none'; script-src 'sha256-{hashes['script']}'; "
                       f"style-src 'sha256-{hashes['style']}'")

    def url(self):
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):      # a client that went away is no news
            print(f"request failed: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    timeout = 10                                    # seconds without a byte from the client
    error_content_type, error_message_format = "text/plain", "%(code)d %(message)s\n"

    def log_message(self, *args):
        pass

    def end_headers(self):
        for name, value in (("Content-Security-Policy", self.server.policy), ("X-Content-Type-Options", "nosniff"),
                            ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        super().end_headers()

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def check(self, token):
        """Raises Refusal unless the request comes from our own page, or from the address in the terminal."""
        hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
        given = self.headers.get_all("Host", [])
        if len(given) != 1 or given[0].lower() not in hosts:
            raise Refusal(403, "wrong host")
        origin = self.headers.get("Origin", f"http://{given[0]}")
        if origin != f"http://{given[0]}" or self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refusal(403, "requests from other sites are refused")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise Refusal(403, "the token is missing or of an earlier run: open the address that the terminal shows")

    def do_GET(self):
        try:
            path = urlsplit(self.path)
            self.check(parse_qs(path.query).get("token", [""])[0])
            if path.path != "/":
                raise Refusal(404, "nothing here")
            self.answer(200, "text/html; charset=utf-8", self.server.page)
        except Refusal as refusal:
            self.answer(refusal.args[0], "text/plain; charset=utf-8", refusal.args[1].encode())
        except ValueError:
            self.answer(400, "text/plain", b"bad address")

    def do_POST(self):
        try:
            self.check(self.headers.get("X-Token", ""))
            status, reply = 200, self.act(self.read_json())
        except Refusal as refusal:
            status, reply = refusal.args[0], {"error": refusal.args[1]}
        except UserError as error:
            status, reply = 400, {"error": str(error)}
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            print(f"not saved: {error}", file=sys.stderr)
            status, reply = 500, {"error": f"not saved: {error}"}
        self.answer(status, "application/json", json.dumps(reply).encode())

    def read_json(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "a length is needed")
        if int(length) > MAX_BODY:
            raise Refusal(413, f"more than {MAX_BODY} bytes")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "not application/json")
        try:
            value = json.loads(self.rfile.read(int(length)).decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refusal(400, "not JSON in UTF-8") from None
        if not isinstance(value, dict):
            raise Refusal(400, "not an object")
        return value

    def act(self, value):
        """Checks what every action has, and calls the one that the path names."""
        name, item, seconds = value.get("annotator"), value.get("item"), value.get("seconds", 0)
        if not isinstance(name, str) or name != name.strip() or not 0 < len(name) <= 40 or not name.isprintable():
            raise Refusal(400, "a name has 1 to 40 characters")
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e7:
            raise Refusal(400, "seconds must be a number from 0")
        session, seconds = self.server.session, round(seconds, 2)
        actions = {"/next": lambda: session.next(name),
                   "/vote": lambda: session.vote(name, item, value.get("ranks"), seconds),
                   "/write": lambda: session.write(name, item, value.get("response"), seconds),
                   "/skip": lambda: session.skip(name, item, seconds),
                   "/undo": lambda: session.undo(name)}
        if self.path not in actions:
            raise Refusal(404, "nothing here")
        return actions[self.path]()


def serve(session, sampler, args):
    """Serves until Ctrl-C or SIGTERM."""
    try:
        server = Server(args.port, session)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port}: {getattr(error, 'strerror', None) or error}") from None

    def interrupt(*_):
        raise KeyboardInterrupt

    sampler.start()
    signal.signal(signal.SIGTERM, interrupt)
    print(f"Open {server.url()}\nfor the page; Ctrl-C ends it, every vote is in {session.votes.path}", flush=True)
    # Without a screen webbrowser would start a text browser in this terminal.
    screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    if screen and not args.no_browser:
        webbrowser.open(server.url())
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    with session.lock:                              # a vote that is being written is written to its end
        server.server_close()
        sampler.stop()


# ---- python -m minirlhf.tools.feedback -------------------------------------------------------------------------------

def collect(mode, folders, K, args):
    """rank, write and judge: the same but for what is sampled and what the page asks."""
    device, out = pick_device(args.device), Path(args.out)
    policies = load_policies(folders, device)
    if mode != "write" and args.temperature == 0 and K > len(policies):
        raise UserError("--temperature 0 samples the same answer every time; there would be nothing to compare")
    rows = read_prompts(args.prompts)
    for policy in policies:
        examples = encode_rows(rows, policy.tokenizer, policy.model.config.n_positions, reserve=args.max_response,
                               drop_long=args.drop_long)
        rows = [example.row for example in examples]
    prompts = list(dict.fromkeys(row.prompt for row in rows))[:args.n or None]
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(sidecar(out, "items")):
        sampler = Sampler(prompts, policies, K, Journal(sidecar(out, "items")), args)
        session = Session(mode, out, sampler, find_templates(args.prompts, folders), args.seed, args.people)
        if session.votes.rows:
            (read_demonstrations if mode == "write" else read_comparisons)(out)
        done = f", {len(session.votes.rows)} votes are there already" if session.votes.rows else ""
        print(f"{len(prompts)} prompts{done}")
        serve(session, sampler, args)
    print(f"\n{out}: {len(session.votes.rows)} votes")


def rank(args):
    if not 2 <= args.answers <= 9 or len(args.policy) > args.answers:
        raise UserError("--answers must be from 2 to 9, and not less than the number of policies")
    collect("rank", args.policy, args.answers, args)


def write(args):
    collect("write", args.policy[:1], 1, args)


def judge(args):
    if Path(args.a) == Path(args.b):
        raise UserError(f"--a and --b are both {args.a}; a copy under another name can be judged against it")
    collect("judge", [args.a, args.b], 2, args)
    if Path(args.out).exists() and Path(args.out).stat().st_size:
        print_duel(read_votes(args.out), str(Path(args.b)), str(Path(args.a)))


def parse_args(argv):
    parser = Parser(prog="python -m minirlhf.tools.feedback", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, help, out in ((rank, "rank sampled answers", "my_comparisons.jsonl"),
                                (write, "write ideal answers", "my_demonstrations.jsonl"),
                                (judge, "compare two models blind", "my_judgement.jsonl")):
        add_collecting(commands.add_parser(function.__name__, help=help, allow_abbrev=False), function, out)
    stats = commands.add_parser("stats", help="counts, agreement, bias, pace, winners")
    stats.add_argument("file")
    stats.set_defaults(run=lambda args: print_stats(args.file))
    export = commands.add_parser("export", help="comparisons to Label Studio tasks")
    export.add_argument("file")
    export.add_argument("--out", required=True, metavar="DIR")
    export.set_defaults(run=lambda args: export_file(args.file, args.out))
    back = commands.add_parser("import", help="a Label Studio export to comparisons")
    back.add_argument("file")
    back.add_argument("--out", required=True)
    back.add_argument("--several", choices=("majority", "drop", "each"), default="majority",
                      help="when annotators differ on an item: one row by majority, none, or a row of each [majority]")
    back.add_argument("--leading_space", action="store_true",
                      help="put the space before an answer that GPT-2's tokens expect, where there is none")
    back.set_defaults(run=lambda args: import_file(args.file, args.out, args.several, args.leading_space))
    return parser.parse_args(argv)


def add_collecting(parser, function, out):
    def add(name, default, help, type=str, **more):
        parser.add_argument(f"--{name}", default=default, type=type, help=f"{help} [{default}]", **more)

    def count(value):
        if int(value) < 0:
            raise ValueError
        return int(value)

    if function is judge:
        add("a", "out/sft", "one model folder")
        add("b", "out/ppo", "the other, whose win rate is printed")
    else:
        help, default = (("model folders to sample from [out/sft]", ["out/sft"]) if function is rank else
                         ("a model folder, whose answers are drafts to edit [none]", []))
        parser.add_argument("--policy", nargs="+", default=default, help=help)
    if function is rank:
        add("answers", 4, "answers per prompt", count)
    prompts = "data/tiny/prompts_test.jsonl" if function is judge else "data/tiny/prompts.jsonl"
    add("prompts", prompts, "JSONL with a \"prompt\" in each line")
    add("out", out, "the file that the votes are appended to")
    add("n", 0, "only the first n prompts; 0 is all", count)
    add("people", 0, "how many people see each item; 0 is everyone", count)
    add("max_response", 64, "most tokens of an answer", count)
    add("temperature", 1.0, "sampling temperature", float)
    add("seed", 1, "of sampling and of the order shown", count)
    add("device", "", "cuda, mps or cpu; the first there is if not given")
    add("port", 8321, "of the page, on 127.0.0.1; 0 takes a free one", count)
    parser.add_argument("--drop_long", action="store_true", help="drop and count prompts that do not fit")
    parser.add_argument("--no_browser", action="store_true", help="do not open the page")
    parser.set_defaults(run=function)


def main(argv=None):
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
