"""The tools: the figures of the assessment, chat, and the plots."""

import io
import json
import math

import numpy as np
import pytest
import torch

from minirlhf.config import UserError
from minirlhf.data import encode_rows, read_demonstrations, read_prompts
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.tools import chat, evaluate, plot
from minirlhf.tools.evaluate import answer, distinct_2, perplexity, sequence_kl, summed_logprobs, win_rate
from minirlhf.weights import save_pretrained

TOKENIZER = load_tokenizer("data/tiny")
PROMPTS = read_prompts("data/tiny/prompts_test.jsonl")[:12]


def small_model(seed):
    torch.manual_seed(seed)
    return GPT2(GPT2Config(TOKENIZER.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two model folders."""
    paths = [tmp_path_factory.mktemp("models") / name for name in ("one", "two")]
    for seed, path in enumerate(paths):
        save_pretrained(small_model(seed), path)
        save_tokenizer(TOKENIZER, path)
    return [str(path) for path in paths]


def test_win_rate_counts_ties_half_and_covers_the_truth():
    assert win_rate([1, 0, 2, 5], [0, 1, 2, 4])[0] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        wins = rng.random(100) < 0.7
        rate, (low, high) = win_rate(wins.astype(float), 1 - wins.astype(float), resamples=400)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_copy_of_the_reference_has_no_kl_and_wins_half():
    model, copy, other = small_model(0), small_model(0), small_model(1)
    answers = answer(model, TOKENIZER, PROMPTS, 10, 1.0, 1, None)
    again = answer(copy, TOKENIZER, PROMPTS, 10, 1.0, 1, None)
    assert sequence_kl(copy, model, answers, 1.0) == 0 and answers.texts == again.texts
    lengths = [len(text) for text in answers.texts]
    assert win_rate(lengths, lengths) == (0.5, [0.5, 0.5])
    assert sequence_kl(model, other, answer(model, TOKENIZER, PROMPTS * 8, 10, 1.0, 1, None), 1.0) > 1


def test_summed_logprobs_and_perplexity_are_those_of_one_sequence_at_a_time():
    model = small_model(2)
    examples = encode_rows(read_demonstrations("data/tiny/demonstrations_test.jsonl")[:5], TOKENIZER, 64)
    sums = summed_logprobs(model, [e.prompt for e in examples], [e.responses[0] for e in examples], 0.7, batch_size=2)
    nats, tokens = 0.0, 0
    for example, found in zip(examples, sums):
        ids, P = torch.tensor([example.prompt + example.responses[0]]), len(example.prompt)
        logits = model.logits(model(ids))[0].double()
        one = [torch.log_softmax(logits[t - 1] / 0.7, 0)[ids[0, t]].item() for t in range(P, ids.shape[1])]
        assert found == pytest.approx(sum(one), rel=1e-5)
        nats -= sum(torch.log_softmax(logits[t - 1], 0)[ids[0, t]].item() for t in range(P, ids.shape[1]))
        tokens += len(one)
    assert perplexity(model, examples) == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_distinct_2_by_hand():
    assert distinct_2([[1, 2, 1, 2], [1, 2, 3]]) == 3 / 5       # 12 21 12 12 23: three different ones of five
    assert distinct_2([[1], []]) == 0


def test_evaluate_prints_a_column_per_model_and_writes_json(folders, tmp_path, capsys):
    short = tmp_path / "prompts.jsonl"
    short.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in PROMPTS))
    evaluate.main([*folders, folders[0], "--prompts", str(short), "--max_response", "8", "--out", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert set(figures) == set(folders) and figures[folders[1]]["kl"] > 0
    assert figures[folders[0]]["kl"] == 0                       # the third is the first again
    assert "perplexity" in capsys.readouterr().out


def talk(monkeypatch, capsys, *argv, said):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    chat.main(list(argv))
    return capsys.readouterr()


def test_chat_answers_every_line_and_survives_a_prompt_that_is_too_long(folders, monkeypatch, capsys):
    heard = talk(monkeypatch, capsys, folders[0], said="Write a story.\n" + "the " * 80 + "\n\n")
    assert heard.out.count("> ") == 4 and "positions in all" in heard.err
    again = talk(monkeypatch, capsys, folders[0], said="Write a story.\n" + "the " * 80 + "\n\n")
    assert again.out == heard.out                               # the same seed, the same conversation


def test_chat_with_two_models_puts_them_side_by_side(folders, monkeypatch, capsys):
    heard = talk(monkeypatch, capsys, *folders, "--max_response", "8", said="Write a story.\n")
    assert " | " in heard.out
    assert chat.side_by_side(["a b c", "d"], width=9) == "a b | d\nc   |"


def test_plot_draws_runs_and_refuses_what_is_none(tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "ppo"
    run.mkdir()
    (run / "run.json").write_text('{"config": {}}')
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "objective/kl": i}) + "\n" for i in range(3)))
    plot.main([str(run), str(run), "--labels", "a", "b", "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="no run.json"):
        plot.main([str(tmp_path)])
    with pytest.raises(UserError, match="2 names for 1 runs"):
        plot.main([str(run), "--labels", "a", "b"])
