"""The data reader: three schemas, errors with file and line, one encode, masks from lengths."""

import gzip
import json

import pytest

from minirlhf.data import (Row, describe, encode, encode_rows, pieces, read_any, read_comparisons, read_demonstrations,
                           read_prompts)
from minirlhf.generate import left_pad, response_positions, right_pad
from minirlhf.files.jsonl import glue_warning, glued
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.files.errors import UserError

TOKENIZER = load_tokenizer("data/tiny")
EOS = TOKENIZER.eot_token


def write(folder, *lines):
    """A JSONL file of objects, or of raw bytes where a line is bytes."""
    file = folder / "rows.jsonl"
    file.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return file


def test_the_three_forms_of_a_comparison(tmp_path):
    rows = read_comparisons(write(tmp_path,
                                  {"prompt": "p", "chosen": " a", "rejected": " b", "source": "ignored"},
                                  {"prompt": "p", "responses": [" a", " b", "", " d"], "ranks": [2, 1, 3, 3]},
                                  {"prompt": "p", "responses": [" a", " b", " c"], "best": 2,
                                   "finished": [True, False, True]}))
    assert [row.responses for row in rows] == [(" a", " b"), (" a", " b", "", " d"), (" a", " b", " c")]
    assert [row.ranks for row in rows] == [(1, 2), (2, 1, 3, 3), (2, 2, 1)]
    assert [row.finished for row in rows] == [(True,) * 2, (True,) * 4, (True, False, True)]
    assert rows[1].where.endswith("rows.jsonl:2")


GOOD = {"prompt": "p", "response": " r"}
PAIR = {"prompt": "p", "responses": [" a", " b"]}


@pytest.mark.parametrize("read, bad, named", [
    (read_demonstrations, b"{not json\n", "not a line of JSON"),
    (read_demonstrations, b'{"prompt": "p", "response": "\xff"}\n', "UTF-8"),
    (read_demonstrations, b"[" * 100_000 + b"\n", "not a line of JSON"),
    (read_demonstrations, b'{"prompt": "p", "response": " r", "x": ' + b"9" * 5000 + b"}\n", "not a line of JSON"),
    (read_demonstrations, b'{"prompt": "p", "response": " r", "response": " s"}\n', '"response" is there twice'),
    (read_demonstrations, b'\xef\xbb\xbf{"prompt": "p", "response": " r"}\n', "BOM"),
    (read_demonstrations, b"3\n", "must be an object"),
    (read_demonstrations, {"prompt": 3, "response": " r"}, "prompt must be a string"),
    (read_demonstrations, {"prompt": "p", "response": ""}, "response is empty"),
    (read_demonstrations, b'{"prompt": "\\ud800", "response": " r"}\n', "surrogate"),
    (read_demonstrations, GOOD | {"prompt": "p" + "\n" * 200_000 + "p"}, "100,000 white-space characters in a row"),
    (read_prompts, {"promt": "p"}, 'no "prompt"'),
    (read_comparisons, {"prompt": "p", "chosen": " a"}, 'no "rejected"'),
    (read_comparisons, {"prompt": "p", "responses": [" a"], "best": 0}, "at least two"),
    (read_comparisons, PAIR | {"ranks": [1, 2], "rejected": " b"}, 'no "chosen"'),
    (read_comparisons, PAIR | {"ranks": [1, 2], "best": 1}, "more than once which response is better (ranks, best)"),
    (read_comparisons, PAIR | {"ranks": [1]}, "list of 2"),
    (read_comparisons, PAIR | {"ranks": [1, True]}, "whole numbers"),
    (read_comparisons, PAIR | {"ranks": [1, 10**30]}, "from 1 (the best) to 2"),         # torch.tensor would raise
    (read_comparisons, PAIR | {"best": 2}, "from 0 to 1"),
    (read_comparisons, PAIR | {"best": 0, "finished": [True]}, "finished must be a list of 2"),
])
def test_a_bad_line_is_named(tmp_path, read, bad, named):
    good = {read_demonstrations: GOOD, read_prompts: {"prompt": "p"}, read_comparisons: PAIR | {"best": 0}}[read]
    with pytest.raises(UserError) as error:
        read(write(tmp_path, good, bad, good))
    assert "rows.jsonl:2: " in str(error.value) and named in str(error.value)


def test_a_missing_an_empty_and_a_packed_file(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="the file is empty"):
        read_prompts(write(tmp_path))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": "p"}\n'))
    with pytest.raises(UserError, match="rows.jsonl.gz:1"):
        read_prompts(packed)


def test_a_field_that_nests_almost_too_deeply_is_one_clear_error(tmp_path):
    """json reads what it could not write again: no message may try to."""
    for depth in range(900, 1000):
        with pytest.raises(UserError, match="rows.jsonl:1: (prompt must be a string|not a line of JSON)"):
            read_prompts(write(tmp_path, b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}\n"))


def test_a_file_name_that_no_file_can_have_is_one_clear_error():
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(UserError, match="null byte|too long"):
            read_prompts(name)


def test_white_space_that_is_only_long_is_read_and_in_no_time(tmp_path):
    """Looking for a run from each of its characters would take minutes here."""
    prompt = ("\n" * 99_999 + "p") * 10
    assert read_prompts(write(tmp_path, {"prompt": prompt}))[0].prompt == prompt


def test_encode_adds_exactly_one_eos_and_text_can_never_inject_one():
    prompt, response = encode(TOKENIZER, "Tell me.<|endoftext|>", " A drum.<|endoftext|>")
    assert EOS not in prompt and response.count(EOS) == 1 and response[-1] == EOS
    assert TOKENIZER.decode(response[:-1]) == " A drum.<|endoftext|>"
    assert encode(TOKENIZER, "p", " A drum.", finished=False)[1] == TOKENIZER.encode_ordinary(" A drum.")
    assert encode(TOKENIZER, "p", "")[1] == [EOS]


def test_prompt_and_response_are_tokenized_apart():
    """" drum" is one token. Across the border between prompt and response it must stay two pieces."""
    apart = TOKENIZER.encode_ordinary("A d"), TOKENIZER.encode_ordinary("rum.")
    assert sum(apart, []) != TOKENIZER.encode_ordinary("A drum.")
    assert encode(TOKENIZER, "A d", "rum.") == (apart[0], [*apart[1], EOS])


def test_an_unfinished_answer_is_read_back_without_eos(tmp_path):
    row, = read_comparisons(write(tmp_path, PAIR | {"best": 0, "finished": [True, False]}))
    example, = encode_rows([row], TOKENIZER, positions=50)
    assert [ids[-1] == EOS for ids in example.responses] == [True, False]


def test_what_does_not_fit_is_an_error_with_both_numbers_or_dropped_and_counted(tmp_path, capsys):
    long = {"prompt": "the " * 30, "response": " r"}
    rows = read_demonstrations(write(tmp_path, GOOD, long, GOOD))
    n = len(TOKENIZER.encode_ordinary(long["prompt"]))
    for limits in (dict(positions=20), dict(positions=100, max_prompt=20), dict(positions=n + 1)):
        with pytest.raises(UserError, match=rf"rows.jsonl:2: (prompt.* of {n}|prompt and response of {n + 2})"):
            encode_rows(rows, TOKENIZER, **limits)
        assert len(encode_rows(rows, TOKENIZER, **limits, drop_long=True)) == 2
        assert "dropped 1 of 3 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="prompt and response"):
        encode_rows(read_prompts(write(tmp_path, {"prompt": "the " * 30})), TOKENIZER, positions=n + 9, reserve=10)
    with pytest.raises(UserError, match="no row is left"):
        encode_rows(rows, TOKENIZER, positions=1, drop_long=True)


def test_batches_pad_on_the_side_they_say_and_mask_by_length():
    ids, mask = right_pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    ids, mask = left_pad([[1, 2, 3], [0]])                      # a real token 0 is no pad
    assert ids.tolist() == [[1, 2, 3], [0, 0, 0]] and mask.tolist() == [[True] * 3, [False, False, True]]
    _, mask = right_pad([[1, 2, 3, 4], [5, 6]])
    assert response_positions(mask, [3, 1]).tolist() == [[False, False, False, True], [False, True, False, False]]


def test_describe_finds_schema_lengths_ties_and_duplicates(tmp_path, capsys):
    file = write(tmp_path, PAIR | {"ranks": [1, 2]}, PAIR | {"ranks": [1, 2]}, PAIR | {"ranks": [1, 1]},
                 {"prompt": "q", "chosen": " same", "rejected": " same"})
    describe(file, TOKENIZER)
    shown = capsys.readouterr().out
    assert "4 comparisons, 2 different prompts" in shown and "1 rows repeat" in shown
    assert "1 rows are all ties, 1 have identical answers" in shown and "<|endoftext|>" in shown
    describe(write(tmp_path, GOOD, {"prompt": "p", "response": "r"}), TOKENIZER)
    assert "1 of 2 rows have no space between prompt and response (the first: " in capsys.readouterr().out
    describe(write(tmp_path, GOOD, {"prompt": "Once", "response": "Once upon"}), TOKENIZER)
    assert "1 rows have a response that begins with its prompt" in capsys.readouterr().out
    assert pieces(TOKENIZER.encode_ordinary("z" * 70), TOKENIZER) == f"'{'|'.join('z' * 60)}' and 10 more"
    assert read_any("data/tiny/prompts.jsonl")[0] == "prompts"
    assert read_any("data/tiny/demonstrations.jsonl")[0] == "demonstrations"


def with_responses(prompt, *responses):
    return Row("rows.jsonl:3", prompt, responses, (1,) * len(responses), (True,) * len(responses))


@pytest.mark.parametrize("prompt, responses, expected", [
    ("a drum", ["Once"], 1), ("a drum.", [" Once", "Once"], 1), ("2 + 2 =", ["4"], 1), ("a drum.", ["\nOnce"], 0),
    ("a drum ", ["Once", "A"], 0), ("so they", [", once"], 0), ("a drum.", [""], 0), ("a drum.", [], 0),
])
def test_rows_are_glued_where_nothing_separates_prompt_and_response(prompt, responses, expected):
    assert len(glued([with_responses(prompt, *responses)])) == expected


def test_the_warning_counts_glued_rows_and_names_the_first():
    good, bad = with_responses("a drum.", " Once"), with_responses("a drum.", "Once")._replace(where="rows.jsonl:7")
    sentence = glue_warning([good, bad, bad])
    assert sentence.startswith("2 of 3 rows have no space") and "rows.jsonl:7" in sentence and "\n" not in sentence
    assert glue_warning([good, good]) is None
    assert glue_warning([good, bad, with_responses("a dr", "um"), with_responses("a drum. ", "Once")]) is None
