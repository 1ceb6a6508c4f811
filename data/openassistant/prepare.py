"""OpenAssistant's conversation trees -> comparisons, demonstrations (the best replies) and prompts.

    python data/openassistant/prepare.py --source FILE [--out out/data/openassistant] [--heldout 0.05] [--seed 1]

FILE holds trees as OpenAssistant exports them (Köpf 2023; Apache-2.0), one a line, also compressed: a prompt with
replies, which have replies. People ranked the assistant's replies to the same message, 0 being the best. So each
message of a prompter with two or more ranked replies is one comparison. The conversation up to it is the prompt.
Trees are split, so that no conversation is in both splits. Replies that a model wrote ("synthetic") are counted.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.common import arguments, split, write_folder
from minirlhf.files.errors import require, run_main, shown
from minirlhf.files.jsonl import field, keep, read_objects, text_field

SPEAKER = {"prompter": "\n\nHuman: ", "assistant": "\n\nAssistant: "}


def messages(message, before, where):
    """Yields (the conversation up to and with this message, the message), for it and all that follow."""
    role, replies = field(message, "role", where), field(message, "replies", where)
    require(role in SPEAKER, f"{where}: role must be prompter or assistant, not {shown(role)}")
    require(isinstance(replies, list) and all(isinstance(reply, dict) for reply in replies),
            f"{where}: replies must be a list of messages")
    text = before + SPEAKER[role] + text_field(message, "text", where)
    yield text, message
    for reply in replies:
        yield from messages(reply, text, where)


def comparison(text, message, tree, where, counts):
    """A comparison of the ranked replies to a message, or the reason to drop it."""
    ranked = [reply for reply in message["replies"] if type(reply.get("rank")) is int]
    if len(ranked) < 2:
        return "fewer than two ranked replies"
    order = sorted({reply["rank"] for reply in ranked})
    counts["kept, with a reply that a model wrote"] += any(reply.get("synthetic") for reply in ranked)
    return {"prompt": text + SPEAKER["assistant"].rstrip(), "tree": tree,
            "responses": [" " + text_field(reply, "text", where) for reply in ranked],
            "ranks": [1 + order.index(reply["rank"]) for reply in ranked]}


def best(row):
    return {"prompt": row["prompt"], "response": row["responses"][row["ranks"].index(1)]}


def main(argv=None):
    parser = arguments(__doc__.splitlines()[0], "out/data/openassistant")
    args = parser.parse_args(argv)
    require(args.source, "--source FILE is needed: a file of OpenAssistant's trees, such as oasst_en_100_tree.jsonl")
    counts = Counter(read=0)
    rows = keep((comparison(text, message, text_field(tree, "message_tree_id", where), where, counts)
                 for where, tree in read_objects(args.source)
                 for text, message in messages(field(tree, "prompt", where), "", where)
                 if message["role"] == "prompter" and message["replies"]), counts)
    both = split(rows, args.heldout, args.seed, key=lambda row: row["tree"])
    meta = {"template": "\n\nHuman: {instruction}\n\nAssistant:", "heldout": args.heldout, "seed": args.seed,
            "licence": "Apache-2.0, LAION-AI/Open-Assistant"}
    write_folder(args.out, {"comparisons": both, "demonstrations": [list(map(best, part)) for part in both]}, meta,
                 [args.source], counts)


if __name__ == "__main__":
    run_main(main)
