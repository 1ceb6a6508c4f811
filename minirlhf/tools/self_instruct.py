"""Self-instruct: a language model writes new demonstrations from a few tasks that people wrote.

    python -m minirlhf.tools.self_instruct --seed_tasks FILE --model FOLDER --requests N --out DIR
    python -m minirlhf.tools.self_instruct --seed_tasks FILE --endpoint URL --endpoint_model NAME --requests N --out DIR

Each request shows the model three of the seed tasks as a numbered list and asks it to continue the list (Wang et al.
2022, "Self-Instruct"; the form and the rules are those of Stanford Alpaca, 2023). What it writes is cut into tasks. A
task is kept if it passes the rules and is new: not too similar to any seed or any task kept before.

    DIR/requests.jsonl          what which model wrote, a line per request, on the disk as soon as it is there
    DIR/blocks.jsonl            every task that was found in it: kept, or the reason why not
    DIR/demonstrations.jsonl    the kept ones, for train_sft.py
    DIR/meta.json               the template, the options, and how many were rejected for what

The last three are computed from the first one. So --resume continues after a crash to the same files, and with other
rules it judges anew what the model wrote.
"""

import http.client
import os
import random
import re
import threading
import time
import urllib.request
from collections import Counter, namedtuple
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from minirlhf.files import instructions
from minirlhf.files.jsonl import read_objects, text, text_field
from minirlhf.files.json_files import json_object, write_json, write_whole
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.answers import respond
from minirlhf.generate import decode, generator
from minirlhf.running.device import pick_device
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError, require, run_main, shown
from minirlhf.running.runs import lock, move_aside
from minirlhf.tools.feedback.votes import Journal, to_line
from minirlhf.weights import from_pretrained

HEADER = ("Tasks for a language model: an instruction, an input (<noinput> if there is none) and an output. "
          "Continue the list up to task {last}.\n\n")
SHOWN, NO_INPUT = 3, "<noinput>"        # seed tasks in a prompt; what stands for an empty input
WAITS = 0, 1, 4, 16, 64                 # seconds before each try of a request to a server
LARGEST = 10_000_000                    # most bytes of a server's answer
KEY_VARIABLE = "OPENAI_API_KEY"         # the environment variable with the server's key, if it wants one

Task = namedtuple("Task", "instruction input output")      # texts; the input is "" where there is none


# ---- the numbered list -----------------------------------------------------------------------------------------------

def read_seeds(path):
    """The seed tasks of a file, and whether its rows are demonstrations, {"prompt", "response"}."""
    seeds, names = [], {"prompt": "instruction", "response": "output"}
    for where, value in read_objects(path):
        renamed = {names.get(name, name): part for name, part in value.items()}
        for part in instructions.instances({"input": "", **renamed}, where):
            task = Task(*(text_field(part, name, where).strip() for name in Task._fields))
            require(task.instruction and task.output, f"{where}: a seed task needs an instruction and an output")
            require("###" not in "".join(task),
                    f"{where}: this task has ### in it, which separates the tasks of a list")
            seeds.append(task._replace(instruction=" ".join(task.instruction.split()).rstrip(":")))
    require(len(seeds) >= SHOWN, f"{path}: {len(seeds)} seed tasks are too few, a request shows {SHOWN}")
    return seeds, "prompt" in value


def encode_list(tasks, first=1):
    """Tasks -> the text of a list with the numbers first, first + 1, ..."""
    return "".join(f"###\n{k}. Instruction: {task.instruction}\n{k}. Input:\n{task.input or NO_INPUT}\n"
                   f"{k}. Output:\n{task.output}\n" for k, task in enumerate(tasks, start=first))


def prompt_of(tasks, per_request):
    """The prompt that asks for `per_request` more tasks. It ends where the instruction of the first one begins."""
    n = len(tasks)
    return HEADER.format(last=n + per_request) + encode_list(tasks) + f"###\n{n + 1}. Instruction:"


def parse_list(text, first, most, complete=True):
    """The continuation of a list whose next number is `first` -> [(text of a block, Task or reason), ...].

    complete: whether the model ended the text itself. If not, its last block is cut off. Blocks after `most` are not
    looked at.
    """
    text = re.sub(rf"^\s*(###\s*)?{first}\.\s+Instruction:", "", text)          # a chat model may repeat this
    blocks = f"{first}. Instruction:{text}".split("###") if text.strip() else []
    found = [(block, parse_block(block, k)) for k, block in enumerate(blocks, start=first)]
    if found and not complete:
        found[-1] = blocks[-1], CUT_OFF
    return [pair for pair in found[:most] if pair[0].strip()]


def parse_block(block, k):
    """The text of block number k -> Task, or the reason why it is none."""
    before, *parts = re.split(rf"\b{k}\.\s+(Instruction|Input|Output):", block)
    if before.strip() or parts[::2] != ["Instruction", "Input", "Output"]:
        return MALFORMED
    instruction, input, output = (part.strip() for part in parts[1::2])
    return Task(instruction, "" if input.lower() == NO_INPUT else input, output)


# ---- what is kept ----------------------------------------------------------------------------------------------------

KEPT, CUT_OFF, MALFORMED, TOO_SIMILAR = "kept", "cut off", "not in the form of the list", "too similar to another"
def unreadable(task):
    """Whether a file of demonstrations cannot hold the task: half a surrogate pair, say, or 100,000 spaces."""
    try:
        return not text("".join((instructions.TEMPLATE_WITH_INPUT, *task)), "task", "new task")
    except UserError:
        return True


RULES = {       # why a task is rejected: whether it is, given the task and --banned. The first and last two are ours.
    "not a text that a tokenizer can read": lambda task, _: unreadable(task),
    "instruction of 3 words or fewer": lambda task, _: len(task.instruction.split()) <= 3,
    "instruction of more than 150 words": lambda task, _: (
        len(task.instruction.split()) > 150 or len(words_of(task.instruction)) > 1000),    # it may be one-two-three-...
    "instruction with a banned word": lambda task, banned: any(
        re.search(rf"\b{re.escape(word)}\b", task.instruction, re.IGNORECASE)
        for word in filter(None, banned.split(","))),
    "asks for a program": lambda task, _: task.instruction.startswith("Write a program"),
    "begins with punctuation": lambda task, _: task.instruction[0].isascii() and not task.instruction[0].isalnum(),
    "begins with a character that is not ASCII": lambda task, _: not task.instruction[0].isascii(),
    "empty output": lambda task, _: not task.output,
    "output repeats the instruction or the input": lambda task, _: task.output in (task.instruction, task.input),
}


def words_of(text):
    return re.findall("[a-z0-9]+", text.lower())


def rouge_l(a, b):
    """ROUGE-L F1 of two lists of words (Lin 2004): 2 lcs / (len(a) + len(b)), lcs the longest common subsequence.

    Bit i of `row` is 0 where the lcs is one longer for a[:i + 1] than for a[:i]. Each word of b updates the whole row
    of the usual table with one addition (Hyyrö 2004).
    """
    places, ones = {}, (1 << len(a)) - 1
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = ones
    for word in b:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & ones
    return 2 * (len(a) - row.bit_count()) / max(len(a) + len(b), 1)


def judge(rows, seeds, args):
    """Yields each block of each request in order, a dict with its fields and its "verdict": KEPT, or the reason.

    A task must be new: its instruction may have no ROUGE-L above --most_similar with any seed or any task kept before.
    """
    pool = {seed.instruction: words_of(seed.instruction) for seed in seeds}
    for row in rows:
        for block, task in parse_list(row["text"], SHOWN + 1, args.per_request, row["complete"]):
            if isinstance(task, str):
                yield {"request": row["request"], "verdict": task, "block": block}
                continue
            verdict = next((reason for reason, broken in RULES.items() if broken(task, args.banned)), None)
            similar = None
            if not verdict:
                words = words_of(task.instruction)
                similar = next((known for known in pool if rouge_l(words, pool[known]) > args.most_similar), None)
                verdict = TOO_SIMILAR if similar else KEPT
            if verdict == KEPT:
                pool[task.instruction] = words
            yield {"request": row["request"], "verdict": verdict, **task._asdict(), "similar_to": similar}


def funnel(rows, blocks):
    """{what: how many}, in the order in which tasks are lost."""
    counts = Counter(block["verdict"] for block in blocks)
    parsed = len(blocks) - counts[CUT_OFF] - counts[MALFORMED]
    return {"requests": len(rows), "requests without an answer": sum(not row["text"].strip() for row in rows),
            "blocks": len(blocks), CUT_OFF: counts[CUT_OFF], MALFORMED: counts[MALFORMED], "parsed": parsed,
            **{reason: counts[reason] for reason in (*RULES, TOO_SIMILAR, KEPT)}}


# ---- who writes: a model of ours, or a server ------------------------------------------------------------------------

class Model:
    """A model folder. Its EOS gets no probability, because a model after SFT would end after the first answer."""

    def __init__(self, args):
        self.args, self.tokenizer = args, load_tokenizer(args.model)
        self.model = from_pretrained(args.model).to(pick_device(args.device))
        logits, eos = self.model.logits, self.tokenizer.eot_token
        self.model.logits = lambda x: logits(x).index_fill(-1, torch.tensor(eos, device=x.device), -torch.inf)

    def write(self, prompts, start):
        """[(text, complete), ...] for prompts of which the first is request `start`. "" where a prompt has no room."""
        room, ids = self.model.config.n_positions - self.args.max_tokens, map(self.tokenizer.encode_ordinary, prompts)
        short = {i: own for i, own in enumerate(ids) if len(own) <= room}
        written = respond(self.model, list(short.values()), self.args.max_tokens, (-1, 0),  # -1: no token ends it
                          generator(self.args.seed, 12, start), batch_size=self.args.batch_size)
        texts = {i: decode(self.tokenizer, tokens) for i, (tokens, _) in zip(short, written)}
        return [(texts.get(i, ""), False) for i in range(len(prompts))]


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Returns every answer as it is. A redirect is not followed, because it would send the key to another address."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Endpoint:
    """A server that speaks OpenAI's completions or chat format: llama.cpp, vLLM, Ollama, or a hosted one."""

    def __init__(self, args):
        self.args, self.url, self.key = args, args.endpoint.rstrip("/"), os.environ.get(KEY_VARIABLE, "").strip()
        require(re.fullmatch(r"https?://[^/@\s]+(/.*)?/v1", self.url), "--endpoint must be http(s)://HOST/v1, and "
                f"without a password. The key comes from ${KEY_VARIABLE}")
        require(re.fullmatch("[!-~]*", self.key), f"${KEY_VARIABLE} has characters that are in no key")
        self.opener = urllib.request.build_opener(AnyStatus)

    def write(self, prompts, start):
        """As Model.write, but one by one. All requests of a batch run at the same time."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            yield from threads.map(self.ask, prompts, range(start, start + len(prompts)))

    def ask(self, prompt, number):
        """(text, complete). What a retry may cure is tried again, with longer and longer waits."""
        for wait in WAITS:
            time.sleep(wait)
            try:
                status, data = self.post_in_time(prompt, number)
                if status == 200:
                    written, complete = answer_of(json_object(data, "its answer", "file"))
                    return self.without_key(written), complete
                hint = " (--chat is for servers without completions)" if status == 404 else ""
                problem = f"HTTP {status}{hint}: {data.decode(errors='replace')}"
                if status < 500 and status not in (408, 429):
                    break
            except (OSError, http.client.HTTPException, UserError) as error:        # among them a cut answer
                problem = str(getattr(error, "reason", error))
        raise UserError(f"{self.url}, request {number}: {self.without_key(problem)[:300]}. --resume goes on from here")

    def without_key(self, said):
        """A text without the key, which some servers repeat."""
        return said.replace(self.key or "\0", "(the key)")

    def post_in_time(self, prompt, number):
        """As post(), but TimeoutError after --timeout, also when a byte comes now and then."""
        answer = Future()

        def work():
            try:
                answer.set_result(self.post(prompt, number))
            except Exception as error:
                answer.set_exception(error)
        threading.Thread(target=work, daemon=True).start()      # one that never ends does not keep the program
        try:
            status, data = answer.result(self.args.timeout)
        except TimeoutError:
            raise TimeoutError(f"no answer within {self.args.timeout:g} seconds") from None
        return status, self.without_key(data.decode("latin-1")).encode("latin-1")

    def post(self, prompt, number):
        """The server's answer: (HTTP status, bytes)."""
        args, path, asked = self.args, "/completions", {"prompt": prompt}
        if args.chat:
            path, asked = "/chat/completions", {"messages": [{"role": "user", "content": prompt}]}
        body = {"model": args.endpoint_model, **asked, "max_tokens": args.max_tokens, "temperature": 1.0, "top_p": 1.0,
                "seed": (args.seed * 1_000_003 + number) % 2**31, "stop": [f"\n{SHOWN + args.per_request + 1}. Instr"]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url + path, to_line(body), headers)
        with self.opener.open(request, timeout=args.timeout) as reply:
            return reply.status, reply.read(LARGEST)


def answer_of(value):
    match value:
        case ({"choices": [{"message": {"content": str(text) | (None as text)}} as choice, *_]}
              | {"choices": [{"text": str(text) | (None as text)} as choice, *_]}):
            return text or "", choice.get("finish_reason") != "length"
    raise UserError(f"its answer has no choices with a text: {shown(value)}")


# ---- the command line ------------------------------------------------------------------------------------------------

OPTIONS = (     # name, default, help
    ("seed_tasks", "", '{"instruction", "input", "output"}, tasks like the 175 of Stanford, or {"prompt", "response"}'),
    ("model", "", "who writes: a model folder, GPT-2 or GPT-J"),
    ("endpoint", "", "or a server, http(s)://HOST/v1"),
    ("endpoint_model", "", "the server's name for its model"),
    ("requests", 100, "how often the model is asked. A retry is not a request"),
    ("per_request", 3, "new tasks asked for in a request"),
    ("banned", "image,images,graph,graphs,picture,pictures,file,files,map,maps,draw,plot,go to,video,audio,music,"
     "flowchart,diagram", "words that no instruction may have: what a model of texts cannot do"),
    ("most_similar", 0.7, "reject an instruction whose ROUGE-L with another is above this; 0.99 rejects equal ones"),
    ("max_tokens", 512, "most tokens that the model writes in a request"),
    ("batch_size", 8, "requests at a time"),
    ("timeout", 120.0, "seconds to wait for a server"),
    ("seed", 1, "decides which seed tasks are shown and what a model of ours samples"),
    ("device", "", "cuda, mps or cpu; the first available if empty"),
    ("out", "", "the folder to write"),
)


def parse_args(argv):
    parser = Parser(prog="python -m minirlhf.tools.self_instruct", description=__doc__)
    for name, default, help in OPTIONS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{help} [{default}]")
    parser.add_argument("--chat", action="store_true", help="ask the server for chat, if it has no completions")
    parser.add_argument("--resume", action="store_true", help="go on after a crash, with more --requests, or with "
                        "other rules, which are then applied to all that was written")
    args = parser.parse_args(argv)
    require(args.seed_tasks and args.out and bool(args.model) != bool(args.endpoint and args.endpoint_model),
            "give --seed_tasks, --out, and either --model or --endpoint with --endpoint_model")
    require(min(args.requests, args.per_request, args.max_tokens, args.batch_size, args.timeout) > 0,
            "--requests, --per_request, --max_tokens, --batch_size and --timeout must be above 0")
    return args


def request_all(writer, journal, seeds, args):
    """Writes what the model answers to each request into the journal.

    Which seeds a request shows depends on --seed and its number only. A model of ours samples a whole batch with one
    generator, so it samples a batch again of which a crash left only a part.
    """
    size, done = args.batch_size, len(journal.rows)
    first = done // size * size if args.model else done
    for start in tqdm(range(first, args.requests, size), "requests", disable=None):
        numbers = range(start, min(start + size, args.requests))
        prompts = [prompt_of(random.Random(f"{args.seed} {i}").sample(seeds, SHOWN), args.per_request) for i in numbers]
        for i, (text, complete) in zip(numbers, writer.write(prompts, start)):
            if i >= len(journal.rows):
                journal.append({"request": i, "model": args.model or args.endpoint_model, "text": text,
                                "complete": complete})


def demonstration(task, bare):
    """A kept task as a row of ours: in Stanford's template, or without one where the seeds have none."""
    if bare:
        return {"prompt": f"{task['instruction']}\n{task['input']}".strip(), "response": " " + task["output"]}
    return instructions.demonstration(task, "new task", Counter())


def main(argv=None):
    args = parse_args(argv)
    folder, (seeds, bare) = Path(args.out), read_seeds(args.seed_tasks)
    writer = Model(args) if args.model else Endpoint(args)
    if not args.resume:
        move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    journal = Journal(folder / "requests.jsonl")
    request_all(writer, journal, seeds, args)
    rows = journal.rows[:args.requests]
    blocks = list(judge(rows, seeds, args))
    counts = funnel(rows, blocks)
    write_whole(folder / "blocks.jsonl", map(to_line, blocks))
    print("\n".join(f"{n:>8,}  {what}" for what, n in counts.items()))
    require(counts[KEPT], f"{folder}: nothing was kept. {folder / 'blocks.jsonl'} has what the model wrote")
    kept = [demonstration(block, bare) for block in blocks if block["verdict"] == KEPT]
    write_whole(folder / "demonstrations.jsonl", map(to_line, kept))
    templates = {"template": instructions.TEMPLATE, "template_with_input": instructions.TEMPLATE_WITH_INPUT}
    write_json(folder / "meta.json", {**({} if bare else templates), "counts": counts, "options": {
        name: value for name, value in vars(args).items() if name not in ("out", "resume")}})


if __name__ == "__main__":
    run_main(main)
