"""The converter: each format to the rows written here by hand, what it says, what it refuses, and its split."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minirlhf.data import read_any, read_comparisons, read_demonstrations, read_prompts, split
from minirlhf.files.errors import UserError
from minirlhf.tools import convert

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("MINIRLHF_REAL_DATA") or "nowhere")
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="$MINIRLHF_REAL_DATA names no folder")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name, content):
    """A text as it is, in UTF-8; rows as JSON lines."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def converted(name, content, *flags):
    convert.main([save(name, content), "--out", "new/rows.jsonl", *flags])
    return [json.loads(line) for line in Path("new/rows.jsonl").read_text().splitlines()]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


QA = [{"prompt": "Why?", "response": " So."}, {"prompt": "Who? ", "response": "Me, \"I\".\nYes"}]
PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("a.csv", 'question,answer\nWhy?,So.\nWho? ,"Me, ""I"".\nYes"\n'),
    ("b.csv", '\ufeffPrompt;RESPONSE;id\r\nWhy?; So.;1\r\n"Who? ";"Me, ""I"".\nYes";2\r\n'),
    ("sep.csv", 'sep=;\r\nprompt;response;;\r\nWhy?;So.;;\r\n;;;\r\n"Who? ";"Me, ""I"".\r\nYes"\r\n'),
    ("utf16.csv", 'prompt\tresponse\r\nWhy?\tSo.\r\n"Who? "\t"Me, ""I"".\r\nYes"\r\n'.encode("utf-16")),
    ("c.tsv", 'id\t"Prompt"\tCompletion\n\n1\tWhy?\tSo.\n2\tWho? \t"Me, ""I"".\nYes"'),
    ("d.json", json.dumps([{"question": row["prompt"], "answer": row["response"]} for row in QA], indent=1)),
    ("e.json", "\ufeff" + json.dumps(QA)),
    ("f.jsonl", "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in QA) + "\r\n"),
    ("g.jsonl", [{"completion": row["response"], "prompt": row["prompt"], "id": 3} for row in QA]),
    ("h.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in QA).encode())),
])
def test_every_kind_of_file_gives_the_same_rows(name, content):
    assert converted(name, content) == QA
    assert [(row.prompt, row.responses[0]) for row in read_demonstrations("new/rows.jsonl")] == [
        (row["prompt"], row["response"]) for row in QA]
    with pytest.raises(UserError, match="exists and is not overwritten"):
        convert.main([name, "--out", "new/rows.jsonl"])


@pytest.mark.parametrize("text, flags", [
    ("Größe 5 €?".encode("cp1252"), []), ("Größe 5 €?".encode("utf-16"), []), ("Größe 5 €?".encode(), []),
    ("Größe 5 €?".encode("mac_roman"), ["--encoding", "mac_roman"])])
def test_letters_arrive_and_foreign_columns_can_be_named(text, flags, capsys):
    wide = text.startswith(b"\xff\xfe")
    start = "Id,Question,Reply\n1,"
    content = f"{start}{text.decode('utf-16')},Ä" if wide else start.encode() + text + b",A"
    content = content.encode("utf-16") if wide else content
    row, = converted("q.csv", content, "--columns", "prompt=question,response=Reply", *flags)
    assert row["prompt"] == "Größe 5 €?" and set(row) == {"prompt", "response"}
    assert ("Größe" in capsys.readouterr().out) == (text == "Größe 5 €?".encode("cp1252"))
    for flag, value, named in (("--columns", "prompt=Frage", "'Frage'"), ("--columns", "Frage", "--columns"),
                               ("--columns", "prompt=Question,respons=Reply", "respons is no name"),
                               ("--encoding", "no", "no such encoding")):
        with pytest.raises(UserError, match=named):
            convert.main(["q.csv", "--out", "other.jsonl", flag, value])


@pytest.mark.parametrize("text, place, named", [
    ("prompt,response\na,b\n\"c\nd\",e,f\n", ":3: ", "3 fields for the 2 different names"),
    ("prompt,response\na,b\nc,\"d\ne\n", ":3: ", "unexpected end of data"),
    ("prompt,response\na,\"b\"c\n", ":2: ", "not CSV"),
    ("prompt,response\na," + "b" * 200_000 + "\n", ":2: ", "field limit"),
    ("prompt,response,Prompt\na,b,c\n", ":1: ", "3 fields for the 2 different names"),
    ("prompt,response\n", "", "the fields found (none)"),
    ("prompt,response\nä,ö\n".encode() + b"c,\xe9\n", ":3: ", "not utf-8"),
    ("prompt,response\nПочему?,Потому.\n".encode("cp1251"), ":2: ", "--encoding names another"),
    (b"prompt,response\na,\x81\n", ":2: ", "not utf-8"), (b"\xff\xfea", ":1: ", "not utf-16"),
    ("text,label\na,1\n", ":1: ", "the fields found (text, label) fit 0 of the known formats"),
    ("question,answer,prompt,completion\na,b,c,d\n", ":1: ", "fit 2 of the known formats"),
    ("prompt\rone\rtwo\r", ":1: ", "not CSV"), (b"\x7fELF\0\r\r\1\0", ":1: ", "fit 0 of the known formats"),
    ("[", ":1: ", "not JSON"), ("[]", "", "the fields found (none)"), ("", ": ", "the file is empty"),
    ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', ":2: ", "has the fields prompt, but the first row has"),
    ('{"prompt": "a", "response": 3}\n', ":1: ", "response must be a string"),
    ('{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}', ": ", "0 usable prompts"),
    ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}', ":1: ",
     "content must be a string"),
    ('{"messages": [{"role": ["user"]}]}', ":1: ", "response must be a string"),
    ('{"prompt": "a", "response": ""}\n', ": ", "0 usable prompts"),
])
def test_what_cannot_be_converted_is_one_line(text, place, named):
    with pytest.raises(UserError) as error:
        converted("odd.txt", text)
    assert str(error.value).startswith(f"odd.txt{place}") and named in str(error.value) and "\n" not in str(error.value)
    assert not Path("new/rows.jsonl").exists()


# ---- formats ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, expected", [
    ({"messages": [user("Hi"), assistant("Hello"), user("Why?"), assistant("So."), user("Thanks")]},
     {"prompt": HH, "response": " So."}),
    ({"messages": [{"role": "system", "content": "Be kind."}, user("Hi"), assistant(" Yo")]},
     {"prompt": "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant:", "response": " Yo"}),
    ({"prompt": [user("Hi"), assistant("Hello"), user("Why?")], "completion": [assistant("So.")]},
     {"prompt": HH, "response": " So."}),
    ({"prompt": [user("Hi"), assistant("Hello"), user("Why?")], "chosen": [assistant("So.")],
      "rejected": [assistant("No.")]}, PAIR | {"prompt": HH}),
    ({"chosen": [user("Hi"), assistant("Hello"), user("Why?"), assistant("So.")],
      "rejected": [user("Hi"), assistant("Hello"), user("Why?"), assistant("No.")]}, PAIR | {"prompt": HH}),
    ({"prompt": [user("Hi"), assistant("Hello"), user("Why?")]}, {"prompt": HH}),
    ({"chosen": HH + " So.", "rejected": HH + " No."}, PAIR | {"prompt": HH}),
    ({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "finished": [True, False]},
     PAIR | {"finished": [True, False]}),
    ({"prompt": "Why?", "chosen": "So.", "rejected": ""}, PAIR | {"rejected": ""}),
    ({"prompt": "p", "responses": ["a", " b"], "ranks": [2, 1]}, {"prompt": "p", "responses": ["a", " b"],
                                                                  "ranks": [2, 1]}),
    ({"prompt": "p", "responses": ["a", " b"], "best": 1}, {"prompt": "p", "responses": ["a", " b"], "best": 1}),
    ({"prompt": "p"}, {"prompt": "p"}),
    ({"prompt": HH, "response": " So.", "chosen": " So.", "rejected": " No."}, PAIR | {"prompt": HH}),     # rm-static
    ({"prompt": "Hi", "messages": [user("Hi"), assistant("a")], "chosen": [user("Hi"), assistant("a")],
      "rejected": [user("Hi"), assistant("b")], "score_chosen": 8.0},                                   # UltraFeedback
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}),
    ({"prompt": "Hi", "messages": [user("Hi"), assistant("a")]},
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " a"}),
    ({"prompt": "Hi", "completion": [assistant("Hello"), user("Why?"), assistant("So.")]},
     {"prompt": HH, "response": " So."}),
    ({"prompt": [user("Hi"), assistant("Hello"), user("Why?")], "completion": [user("Why?"), assistant("So.")]},
     {"prompt": HH, "response": " So."}),
    ({"messages": [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "a"}]},
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " a"}),
])
def test_every_format_becomes_the_row_written_here(row, expected):
    assert converted("rows.jsonl", [row]) == [expected]
    schema, (read,) = read_any("new/rows.jsonl")
    assert read.prompt == expected["prompt"]
    assert read.responses == tuple(expected.get("responses") or [expected[name] for name in (
        "response", "chosen", "rejected") if name in expected])
    by_size = "prompts" if len(expected) == 1 else "comparisons"
    assert schema == ("demonstrations" if "response" in expected else by_size)
    is_dialogue = "Assistant:" in expected["prompt"]
    assert Path("new/meta.json").exists() == is_dialogue
    if is_dialogue:
        assert json.loads(Path("new/meta.json").read_text()) == {"template": "\n\nHuman: {instruction}\n\nAssistant:"}


WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
              "Write a response that appropriately completes the request.\n\n"
              "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
WITHOUT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
           "\n\n### Instruction:\nAdd.\n\n### Response:")


@pytest.mark.parametrize("content", [
    [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Add.", "input": "", "output": "What?"}],
    [{"instruction": "Add.", "id": "t1", "instances": [{"input": "1 2", "output": "3"},
                                                       {"input": "", "output": "What?"}]}],
    "Instruction,Input,Output\nAdd.,1 2,3\nAdd.,,What?\n",
])
def test_instructions_are_put_into_stanfords_template(content):
    assert converted("tasks", content) == [{"prompt": WITH_INPUT, "response": "3"},
                                           {"prompt": WITHOUT, "response": "What?"}]
    meta = json.loads(Path("new/meta.json").read_text())
    assert meta["template"].format(instruction="Add.") == WITHOUT
    assert meta["template_with_input"].format(instruction="Add.", input="1 2") == WITH_INPUT


def test_a_folder_has_one_template():
    converted("tasks.csv", "instruction,output\nAdd.,3\n")
    convert.main(["tasks.csv", "--out", "new/more.jsonl"])
    with pytest.raises(UserError, match="meta.json: other data here have another template"):
        convert.main([save("other.jsonl", QA), "--out", "new/other.jsonl"])


def test_it_says_what_it_took_for_what_and_counts(capsys):
    content = "question;answer;source\nWhy?;So.;a\nWhat?;;b\n;So.;c\nWho? ;Me;d\n"
    assert converted("q.csv", content) == [{"prompt": "Why?", "response": " So."},
                                           {"prompt": "Who? ", "response": "Me"}]
    printed = capsys.readouterr().out
    assert "CSV with a header, separated by ';': question -> prompt, answer -> response\nnot used: source\n" in printed
    for n, what in ((4, "read"), (1, "dropped: empty response"), (1, "dropped: empty prompt"), (2, "rows written to"),
                    (1, "responses got a space in front")):
        assert f"{n:>8,}  {what}" in printed


def test_comparisons_that_teach_nothing_are_dropped_and_counted(capsys):
    pairs = [(HH + " a", HH + " b"), (HH + " a", HH + " a "), (HH + " a", HH + " b\n\nHuman: c\n\nAssistant: d"),
             ("\n\nAssistant: a", "\n\nAssistant: b"), ("one", "two")]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    assert converted("hh.jsonl", rows) == [{"prompt": HH, "chosen": " a", "rejected": " b"}]
    printed = capsys.readouterr().out
    for n, what in ((5, "read"), (1, "dropped: identical sides"), (1, "dropped: the two sides have different prompts"),
                    (2, "dropped: empty prompt"), (5, "rows hold dialogues")):
        assert f"{n:>8,}  {what}" in printed


def test_a_list_of_messages_without_an_answer_is_dropped(capsys):
    rows = [{"messages": [user("Hi")]}, {"messages": [user("Hi"), assistant("Yo")]}, {"messages": [assistant("Yo")]},
            {"messages": [user("Hi\n\nAssistant: Yo"), assistant("Yo")]}]
    assert converted("chat.jsonl", rows) == [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Yo"}]
    printed = capsys.readouterr().out
    assert "1  dropped: no answer in a list of messages" in printed and "1  dropped: empty prompt" in printed
    assert "1  dropped: a message holds a dialogue itself" in printed


# ---- what would be silently wrong ------------------------------------------------------------------------------------

Q = "\n\nHuman: Q?\n\nAssistant:"


@pytest.mark.parametrize("row", [
    {"prompt": [user("Q?")], "chosen": [user("Q?"), assistant("a")], "rejected": [user("Q?"), assistant("b")]},
    {"prompt": "Q?", "chosen": [user("Q?"), assistant("a")], "rejected": [user("Q?"), assistant("b")]},
    {"prompt": Q, "chosen": Q + " a", "rejected": Q + " b"},
    {"prompt": "Q?", "chosen": Q + " a", "rejected": Q + " b"},
    {"prompt": Q, "chosen": " a\n\nHuman: And then?", "rejected": " b"},
    {"chosen": Q + " a\n\nHuman: And then?", "rejected": Q + " b"},
    {"chosen": [user("Q?"), assistant("a"), user("And then?")], "rejected": [user("Q?"), assistant("b")]},
])
def test_a_response_holds_neither_its_prompt_nor_the_next_human_turn(row, capsys):
    assert converted("rows.jsonl", [row]) == [{"prompt": Q, "chosen": " a", "rejected": " b"}]
    assert ("a copy of their prompt" in capsys.readouterr().out) != ("And then?" in str(row))


def test_responses_that_begin_with_their_prompt_lose_it_only_where_all_do(capsys):
    assert converted("all.csv", "prompt,response\nHi,Hi you\nHo,Ho ho\n") == [
        {"prompt": "Hi", "response": " you"}, {"prompt": "Ho", "response": " ho"}]
    convert.main([save("some.csv", "prompt,response\nHi,Hi you\nHo,What?\n"), "--out", "some.jsonl"])
    assert [row.responses for row in read_demonstrations("some.jsonl")] == [(" Hi you",), (" What?",)]
    assert "1  responses begin with their prompt and are kept" in capsys.readouterr().out


def test_a_copy_of_the_prompt_may_differ_in_white_space():
    rows = [{"prompt": "\nHi", "response": "Hi you"}, {"prompt": "Ho ", "response": "Ho ho"},
            {"prompt": "He ", "response": "He\nhe"}]
    assert [row["response"] for row in converted("rows.jsonl", rows)] == [" you", "ho", "\nhe"]


def test_a_side_that_repeats_another_prompt_is_dropped(capsys):
    with pytest.raises(UserError, match="0 usable prompts"):
        converted("rows.jsonl", [{"prompt": [user("Q?")], "chosen": [user("Who?"), assistant("a")],
                                  "rejected": [user("Q?"), assistant("b")]},
                                 {"prompt": "Other", "chosen": Q + " a", "rejected": Q + " b"}])
    assert "2  dropped: a side is a dialogue that does not hold its prompt" in capsys.readouterr().out


def test_what_people_rejected_and_half_an_answer_are_no_demonstrations(capsys):
    rows = [{"prompt": "Q?", "completion": " a", "label": True}, {"prompt": "Q?", "completion": " b", "label": False}]
    assert converted("rows.jsonl", rows) == [{"prompt": "Q?", "response": " a"}]
    with pytest.raises(UserError, match="0 usable prompts"):
        convert.main([save("half.jsonl", [{"prompt": [user("Q?"), assistant("Sure,")], "completion": [assistant("a")]}]),
                      "--out", "half/rows.jsonl"])
    out = capsys.readouterr().out
    assert "1  dropped: label is false" in out and "1  dropped: a prompt that ends with the beginning" in out


def test_responses_that_are_kept_as_they_are_are_counted_where_they_look_wrong(capsys):
    answers = ["Q? a", "a\n\nHuman: And then?", "b\n\nuser: Thanks", "the human: a"]
    convert.main([save("rows.jsonl", [{"prompt": "Q?", "responses": answers, "ranks": [1, 2, 3, 4]}]), "--out", "r.jsonl"])
    out = capsys.readouterr().out
    assert "1  responses begin with their prompt and are kept" in out
    assert "2  responses hold a turn of a human and are kept" in out


def test_a_turn_of_weight_zero_is_no_demonstration():
    draft = assistant("WRONG DRAFT") | {"weight": 0}
    rows = [{"messages": [user("Q?"), draft]}, {"messages": [user("Q?"), assistant("a"), user("More"), draft]},
            {"messages": [user("Q?"), draft, user("No"), assistant("a") | {"weight": 1}]}]
    assert converted("rows.jsonl", rows) == [{"prompt": Q, "response": " a"},
                                             {"prompt": "\n\nHuman: Q?\n\nAssistant: WRONG DRAFT\n\nHuman: No"
                                              "\n\nAssistant:", "response": " a"}]


@pytest.mark.parametrize("blank", ["", " ", "\n", "<noinput>", "<no input>", "N/A", "None", "nan", "No input", None,
                                   "\u00a0", "\u200b", "null", "N.A."])
def test_an_input_that_says_nothing_is_no_input(blank):
    assert converted("rows.jsonl", [{"instruction": "Add.", "input": blank, "output": "3"}]) == [
        {"prompt": WITHOUT, "response": "3"}]


def test_what_a_person_should_look_at_is_counted_and_named(capsys):
    converted("a.jsonl", [{"prompt": "Call?", "response": "+49 (0)30 123-4567 or me@example.org"},
                          {"prompt": "Call?", "response": "555-123-4567, from 2024-01-02 to 2024-02-03, 1000000 times"},
                          {"prompt": "When?", "response": "On 2024-01-02, for 12000000, at 3.14159265"}])
    out = capsys.readouterr().out
    assert "1 prompts are there again" in out and "Call?" in out
    assert "1 rows hold what looks like an e-mail" in out and "2 rows hold what looks like a phone" in out
    swapped = {"prompt": "Why?", "chosen": " No.", "rejected": " So."}
    other = {"prompt": "Who?", "chosen": " a", "rejected": " b"}
    convert.main([save("b.jsonl", [PAIR, swapped, other, other | {"rejected": " c"}, other]), "--out", "b/rows.jsonl"])
    out = capsys.readouterr().out
    assert "1 prompts are there again" in out and "Why?" in out and "Who?" not in out


def test_labels_leave_as_pairs_for_trl_with_a_card_that_names_no_person():
    vote = {"prompt": "p", "responses": [" a", " b", " c"], "annotator": "Ann", "time": "2026-03-04T10:00:00+00:00"}
    votes = [vote | {"ranks": [1, 2, 2]}, vote | {"ranks": [1, 2, 3], "annotator": "Bob", "time": "2026-03-01T10:00"}]
    assert converted("votes.jsonl", votes, "--format", "trl") == [
        {"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in (
            (" a", " b"), (" a", " c"), (" a", " b"), (" a", " c"), (" b", " c"))]
    card = Path("new/rows.card.md").read_text()
    for line in ("rows | 5 on 1 prompts, made of 2 ", "people | 2",
                 "2026-03-01 to 2026-03-04", "licence |"):
        assert line in card
    assert "Ann" not in card
    convert.main([save("qa.jsonl", QA), "--out", "qa/rows.jsonl", "--format", "trl"])
    assert json.loads(Path("qa/rows.jsonl").read_text().splitlines()[0]) == {"prompt": "Why?", "completion": " So."}
    assert "people | unknown" in Path("qa/rows.card.md").read_text()


# ---- the split -------------------------------------------------------------------------------------------------------

def test_the_split_is_that_of_heldout_auto_and_shares_no_prompt():
    rows = [{"question": f"What is {i % 60}?", "answer": f"It is {i}."} for i in range(120)]
    train = converted("rows.jsonl", rows, "--split", "0.1")
    test = [json.loads(line) for line in Path("new/rows_test.jsonl").read_text().splitlines()]
    prompts = {row["prompt"] for row in test}
    assert prompts == {row["question"] for row in rows if int(hashlib.sha256(row["question"].encode()).hexdigest(), 16)
                       % 10 == 0}
    assert prompts and not prompts & {row["prompt"] for row in train} and len(train) + len(test) == 120
    convert.main(["rows.jsonl", "--out", "all.jsonl"])
    cfg = SimpleNamespace(heldout="auto", data="all.jsonl", out="out")
    kept, heldout = split(cfg, read_demonstrations("all.jsonl"), read_demonstrations)
    assert [row.fields() for row in kept] == train and [row.fields() for row in heldout] == test


def test_a_split_needs_two_prompts_a_known_share_and_free_names(capsys):
    with pytest.raises(UserError, match="1 usable prompts are too few"):
        converted("one.jsonl", [QA[0]], "--split", "0.1")
    with pytest.raises(UserError, match="--split"):
        converted("two.jsonl", QA, "--split", "0.3")
    save("rows_test.jsonl", "mine")
    with pytest.raises(UserError, match="rows_test.jsonl exists"):
        convert.main(["two.jsonl", "--out", "rows.jsonl", "--split", "0.1"])
    assert Path("rows_test.jsonl").read_text() == "mine" and not Path("rows.jsonl").exists()
    assert len(converted("two.jsonl", QA, "--split", "0.5")) == 1


# ---- the readers' advice ---------------------------------------------------------------------------------------------

def command(path, out):
    return f"convert it with: python -m minirlhf.tools.convert {path} --out {out}"


@pytest.mark.parametrize("name, content, kind, out", [
    ("q.csv", "Question,Answer\na,b\n", "CSV with a header", "q.jsonl"),
    ("b.csv", "\ufeffprompt;response\na;b\n", "CSV with a header", "b.jsonl"),
    ("s.csv", "sep=;\nprompt;response\na;b\n", "CSV with a header", "s.jsonl"),
    ("u.csv", "prompt\tresponse\na\tb\n".encode("utf-16"), "UTF-16", "u.jsonl"),
    ("a.json", json.dumps(QA), "a JSON array", "a.jsonl"),
    ("l.json", json.dumps(QA, indent=1), "JSON array", "l.jsonl"),
    ("b.jsonl", "\ufeff" + json.dumps(QA[0]), "BOM", "b.converted.jsonl"),
    ("z.jsonl.gz", gzip.compress(json.dumps(QA[0]).encode()), "compressed with gzip", "z.jsonl"),
    ("r.jsonl", [{"question": "a", "answer": "b"}], "rows of question, answer", "r.converted.jsonl"),
    ("i.jsonl", [{"instruction": "a", "input": "", "output": "b"}], "rows of instruction, input, output",
     "i.converted.jsonl"),
    ("m.jsonl", [{"messages": [user("Hi"), assistant("Yo")]}], "rows of messages", "m.converted.jsonl"),
    ("h.jsonl", [{"chosen": HH + " a", "rejected": HH + " b"}], "rows of chosen, rejected", "h.converted.jsonl"),
    ("t.jsonl", [{"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}],
     "lists of messages", "t.converted.jsonl"),
])
def test_every_reader_names_the_format_and_a_command_that_works(name, content, kind, out):
    save(name, content)
    for read in (read_demonstrations, read_comparisons, read_prompts, read_any):
        with pytest.raises(UserError) as error:
            read(name)
        said = str(error.value)
        assert said.startswith(f"{name}:1: ") and kind in said and said.endswith(command(name, out))
    convert.main([name, "--out", out])
    assert read_any(out)[1]


@pytest.mark.parametrize("text", ["<html>404</html>\n", "text,label\na,b\n", "a line; of prose\n", "\n", "a\rb\r",
                                  "\0\0\n",
                                  '{"x": "; prompt ;"}\n', '{"promt": "p"}\n', '{"text": "p", "label": 1}\n'])
def test_no_advice_where_the_converter_would_not_help(text):
    with pytest.raises(UserError) as error:
        read_demonstrations(save("odd file.jsonl", text))
    assert "convert" not in str(error.value)


def test_the_command_is_one_line_of_error_and_quotes_odd_names():
    save("my file.csv", "question,answer\na,b\n")
    words = [sys.executable, "-m", "minirlhf.data", "--tokenizer", str(ROOT / "data/tiny"), "my file.csv"]
    found = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    advice = command("'my file.csv'", "'my file.jsonl'")
    assert found.returncode == 2
    assert found.stderr == f"error: my file.csv:1: this looks like CSV with a header; {advice}\n"


# ---- real files ------------------------------------------------------------------------------------------------------

@real_data
def test_the_real_seed_tasks():
    convert.main([str(REAL / "alpaca_seed_tasks.jsonl"), "--out", "seed.jsonl"])
    tasks = [json.loads(line) for line in (REAL / "alpaca_seed_tasks.jsonl").read_text().splitlines()]
    answers = [instance["output"] for task in tasks for instance in task["instances"] if instance["output"].strip()]
    assert [row.responses[0] for row in read_demonstrations("seed.jsonl")] == answers


@real_data
def test_the_real_hh_dialogues():
    file = REAL / "hh_rlhf_harmless_base_test.jsonl.gz"
    convert.main([str(file), "--out", "hh.jsonl", "--split", "0.1"])
    rows = read_comparisons("hh.jsonl") + read_comparisons("hh_test.jsonl")
    whole = {(row["chosen"], row["rejected"]) for row in map(json.loads, gzip.open(file))}
    assert len(rows) > 0.9 * len(whole) and all(row.prompt.endswith("\n\nAssistant:") for row in rows)
    assert {tuple(row.prompt + response for response in row.responses) for row in rows} <= whole
    assert not any("\n\nAssistant:" in response for row in rows for response in row.responses)


@real_data
@pytest.mark.parametrize("name", ["p01_prompt_repeated_messages.jsonl", "p01b_prompt_repeated_text.jsonl",
                                  "p04_text_human_after.jsonl", "p05_alpaca_noinput.jsonl",
                                  "p07_excel_trailing_columns.csv", "p07b_excel_sep_line.csv", "p07c_excel_utf16.csv",
                                  "p07f_cell_crlf.csv", "p07g_cp1252.csv"])
def test_odd_files_give_all_their_rows_without_what_is_odd(name):
    convert.main([str(REAL / "odd" / name), "--out", "odd.jsonl"])
    _, rows = read_any("odd.jsonl")
    assert len(rows) == 12 and not any("### Input" in row.prompt or row.prompt.count("Question") > 1 for row in rows)
    assert not any(odd in text for row in rows for text in row.responses for odd in ("\n\nHuman:", "\r", "Question", "Ã"))
