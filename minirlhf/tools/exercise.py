"""Exercises: write one function of the book yourself. The project's own tests check it.

    python -m minirlhf.tools.exercise list               all exercises in the order of COURSE.md
    python -m minirlhf.tools.exercise blank gae          writes out/exercises/gae/minirlhf/ppo.py, gae without its body
    python -m minirlhf.tools.exercise check gae          tests your file: exit code 0 if everything passes, 1 if not,
                                                         and then a hint
    python -m minirlhf.tools.exercise solution gae       how your file differs from ours

You edit the file that `blank` names. The other exercises in it are hidden: they raise an error and take as many lines
as before. `check` puts our own solutions of them back, and your file into a temporary copy of the repository, whose own
files stay as they are.
"""

import ast
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from minirlhf.files.json_files import write_whole
from minirlhf.running.config import Parser
from minirlhf.files.errors import UserError, require, run_main
from minirlhf.running.runs import move_aside

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("out/exercises")
TODO = "your code replaces this line"
HIDDEN = "another exercise, see `list`. `check` puts our solution here"
TIME_LIMIT = 120        # seconds for the tests of one exercise. They take less than 20, on a busy machine longer
MOST_LINES = 40         # of the first failure, its last ones


class Exercise(NamedTuple):
    file: str           # where the function is
    minutes: int
    difficulty: str
    tests: str          # a file in tests/ and names of tests in it, the most telling one first
    hint: str           # the idea that a wrong solution most likely misses
    only: str = ""      # of tests with several cases, those with this word in their name


RANKING_LOSS = """test_reward.py
    test_absolute_values_of_the_losses
    test_each_loss_is_what_its_name_says
    test_a_tie_says_nothing_about_the_two_and_their_order_does_not_matter
    test_what_stands_where_there_is_no_answer_changes_no_loss_gradient_or_accuracy
    test_gradients_of_the_ranking_losses"""

EXERCISES = {           # the functions, in the order of the course
    "position_ids": Exercise("minirlhf/gpt2.py", 5, "easy", """test_gpt2.py
        test_positions_skip_the_pads
        test_pads_change_nothing_on_either_side""",
        "A pad has no position: count the real tokens before each one, and let no pad get -1, which wpe "
        "looks up."),
    "visible_positions": Exercise("minirlhf/gpt2.py", 15, "hard", """test_gpt2.py
        test_no_position_sees_what_comes_after_it
        test_pads_change_nothing_on_either_side
        test_what_is_under_a_pad_does_not_matter
        test_the_cache_changes_nothing
        test_a_row_of_pads_gives_no_nan_and_no_nan_gradient""",
        "The last T of S positions are the new ones: new token t is position S - T + t and sees all up to "
        "itself. A row of pads must see something, or its softmax is NaN."),
    "KVCache.extend": Exercise("minirlhf/gpt2.py", 10, "medium", """test_gpt2.py
        test_the_cache_changes_nothing
        test_the_cache_works_without_a_mask
        test_the_cache_keeps_the_rows_it_is_told_to""",
        "Every layer writes its T new columns behind the same `length`, and gets back old and new together. Who "
        "advances it?"),
    "sample_token": Exercise("minirlhf/generate.py", 10, "medium", """test_generate.py
        test_sampled_frequencies_are_the_distribution
        test_the_ends_of_the_interval_give_tokens_that_are_possible
        test_cached_sampling_is_naive_sampling_without_a_cache""",
        "Add up the probabilities from token 0. The first sum *greater* than the random number is the token, so "
        "a token of probability 0 is never drawn, whatever rounding does to the last sum."),
    "response_logprobs": Exercise("minirlhf/generate.py", 15, "hard", """test_generate.py
        test_log_probabilities_of_responses_are_the_full_softmax_by_hand
        test_sampling_and_scoring_agree_on_what_was_sampled""",
        "The logits of a column predict the next token: token t is scored by column t - 1, also the first of a "
        "response."),
    "sft_loss": Exercise("train_sft.py", 5, "easy", """test_steps.py
        test_sft_learns_the_response_and_its_eos_and_not_the_prompt""",
        "A sum over the tokens of the responses, EOS included and prompts not, and their number. The caller "
        "divides."),
    "encode": Exercise("minirlhf/data.py", 5, "easy", """test_data.py
        test_encode_adds_exactly_one_eos_and_text_can_never_inject_one
        test_prompt_and_response_are_tokenized_apart
        test_an_unfinished_answer_is_read_back_without_eos""",
        "Prompt and response go through the tokenizer one by one, or it may merge across the border. EOS is an "
        "id, not a text."),
    "preferred": Exercise("minirlhf/reward.py", 5, "medium", """test_reward.py
        test_accuracy_counts_strict_pairs_and_equal_rewards_half
        test_a_tie_says_nothing_about_the_two_and_their_order_does_not_matter
        test_what_stands_where_there_is_no_answer_changes_no_loss_gradient_or_accuracy""",
        "Rank 1 is best, equal ranks are no preference, and 0 says that there is no answer in that place."),
    "at_last_token": Exercise("minirlhf/reward.py", 5, "medium", """test_reward.py
        test_the_last_token_is_found_wherever_the_pads_are
        test_the_score_depends_on_the_prompt_and_on_every_token_of_the_response""",
        "Pads may be on the left or on the right, so look for the last True of each row. Its number is not the "
        "count of them."),
    "pair_loss": Exercise("minirlhf/reward.py", 10, "medium", RANKING_LOSS,
        "-log sigmoid(difference) of every ordered pair: first a mean over the pairs of a prompt, then over the "
        "prompts.", "pairs"),
    "best_loss": Exercise("minirlhf/reward.py", 10, "medium", RANKING_LOSS,
        "A softmax over the answers that are there. How many share rank 1? A place without an answer has no "
        "probability.", "best"),
    "normalise": Exercise("train_rm.py", 15, "hard", """test_steps.py
        test_scores_are_normalised_at_the_temperature_and_length_of_ppo
        test_the_reward_model_starts_as_the_sft_model_and_is_normalised_on_its_samples""",
        "Sample as PPO will: at cfg.temperature, ending at `stop`, as long as the longest compared answer. A "
        "score is read at the last token, which is not the last column."),
    "token_rewards": Exercise("minirlhf/ppo.py", 10, "medium", """test_ppo.py
        test_the_kl_is_paid_at_every_token_and_the_score_comes_at_the_last
        test_what_stands_under_the_mask_reaches_no_statistic_reward_or_advantage""",
        "Every real token pays beta times its KL, a pad nothing. The score comes at the last real token of its "
        "row."),
    "kl_k3": Exercise("minirlhf/ppo.py", 5, "easy", """test_traps.py
        test_trap_06_k1_and_k3_estimate_the_exact_kl""",
        "The samples come from the policy, so the ratio is ref / p and its log is ref_logprobs - logprobs."),
    "gae": Exercise("minirlhf/ppo.py", 15, "hard", """test_ppo.py
        test_gae_is_the_quadratic_definition_on_ragged_rows
        test_with_lambda_one_the_return_is_the_reward_to_go_whatever_the_values
        test_what_stands_under_the_mask_reaches_no_statistic_reward_or_advantage""",
        "Go backwards. After the last real token the value is 0: clear rewards *and* values of the pads first."),
    "whiten": Exercise("minirlhf/ppo.py", 5, "medium", """test_ppo.py
        test_whitening_is_whitening_of_the_compacted_vector
        test_what_stands_under_the_mask_reaches_no_statistic_reward_or_advantage""",
        "One mean and one variance for all real tokens of the batch: not one for each row, and no pad in them."),
    "policy_losses": Exercise("minirlhf/ppo.py", 10, "medium", """test_ppo.py
        test_losses_and_their_gradients
        test_the_gradient_of_the_first_step_is_the_policy_gradient""",
        "The loss is minus the smaller of two gains: ratio x advantage, and the same with the ratio clipped.",
        "policy"),
    "value_losses": Exercise("minirlhf/ppo.py", 5, "medium", """test_ppo.py
        test_losses_and_their_gradients""",
        "The larger of two halved squared errors: of the new value, and of the old value moved by at most "
        "`clip`.", "value"),
    "adaptive_beta": Exercise("minirlhf/ppo.py", 5, "easy", """test_ppo.py
        test_adaptive_beta_in_absolute_values""",
        "The relative error of the KL is clipped to ± 0.2 before it changes beta."),
    "make_rollout": Exercise("train_ppo.py", 60, "hard", """test_steps.py
        test_advantages_are_those_of_gae_with_gamma_one_and_whitened
        test_beta_is_the_price_of_a_nat
        test_the_kl_is_paid_by_unfinished_responses_too
        test_three_iterations_of_ppo_are_those_of_our_own_loop""",
        "Differs iteration 0? Then look at steps 1 to 4: is each token scored by the column before it? Only later "
        "ones? Then at steps 5 and 6: are the returns those from before whitening?"),
    "update": Exercise("train_ppo.py", 60, "hard", """test_steps.py
        test_the_gradient_of_the_update_is_that_of_finite_differences
        test_every_pass_is_a_fresh_permutation_of_all_rows
        test_a_pass_has_as_many_steps_as_it_is_told_on_minibatches_of_equal_size
        test_clip_is_the_limit_of_the_values_change
        test_three_iterations_of_ppo_are_those_of_our_own_loop""",
        "Each micro-batch adds the *sum* of its losses over the mask, divided by the tokens of the whole minibatch. "
        "What you compare with (log-probabilities, values) stays that of the rollout in every pass."),
}


# ---- files -----------------------------------------------------------------------------------------------------------

def read_function(path, name):
    """(text of the file, syntax tree of its function or Class.method). UserError names the file and what is wrong."""
    require(path.exists(), f"{path} is not there yet: python -m minirlhf.tools.exercise blank {name} writes it")
    try:
        source = path.read_text(encoding="utf-8")
        node = ast.parse(source, path.name)
    except (SyntaxError, ValueError) as error:                  # ValueError: not UTF-8, or a null byte
        raise UserError(f"{path}: {error}") from None
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", "") == part), None)
        require(node, f"{path}: {name} is gone. Its first line must stay as it was")
    return source, node


def blanks(name):
    """[(text, text without its body)] of all exercises in the file of this one.

    An error takes the place of a body. Those of the other exercises keep their number of lines.
    """
    for other, each in EXERCISES.items():
        if each.file == EXERCISES[name].file:
            source, function = read_function(ROOT / each.file, other)
            text, docstring = source.splitlines()[function.lineno - 1:function.end_lineno], function.body[0]
            head, indent = text[:docstring.end_lineno - function.lineno + 1], " " * docstring.col_offset
            error = f'{indent}raise NotImplementedError("{TODO if other == name else HIDDEN}")'
            gap = "\n" * (len(text) - len(head) - 1) * (other != name)
            yield "\n".join(text), "\n".join([*head, error]) + gap


def blank(name):
    """Writes the learner's file: ours, in which the bodies of this function and of the other exercises raise errors."""
    path, text = FOLDER / name / EXERCISES[name].file, (ROOT / EXERCISES[name].file).read_text(encoding="utf-8")
    for ours, theirs in blanks(name):
        text = text.replace(ours, theirs)
    move_aside(FOLDER / name)
    path.parent.mkdir(parents=True)
    write_whole(path, [text.encode()])
    print(f"{path}:{text[:text.index(TODO)].count(chr(10)) + 1} is where you write {name}. Then run\n"
          f"    python -m minirlhf.tools.exercise check {name}")


def completed(name):
    """The text of the learner's file, with our own solutions of the other exercises."""
    text, _ = read_function(FOLDER / name / EXERCISES[name].file, name)
    for ours, theirs in blanks(name):
        text = text.replace(theirs, ours) if HIDDEN in theirs else text
    return text


def solution(name):
    """Prints what differs between the learner's file and ours, theirs with - and ours with +."""
    ours = (ROOT / EXERCISES[name].file).read_text(encoding="utf-8")
    lines = difflib.unified_diff(completed(name).splitlines(), ours.splitlines(), "yours", "ours", lineterm="")
    print("\n".join(lines) or f"{FOLDER / name / EXERCISES[name].file} is the same as ours")


# ---- check -----------------------------------------------------------------------------------------------------------

def run_tests(exercise, text):
    """Runs the tests in a copy of the tree, with this text as the file: [(name, case, failure or None)], in order."""
    file, *names = exercise.tests.split()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        unneeded = shutil.ignore_patterns("__pycache__", "*.png", "*.jsonl")
        for part in ("minirlhf", "tests", "data/tiny"):
            shutil.copytree(ROOT / part, folder / part, ignore=unneeded)
        for script in ROOT.glob("train_*.py"):
            shutil.copy(script, folder)
        (folder / exercise.file).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--rootdir", folder,
                   "--basetemp", folder / "tmp", "--junitxml", folder / "results.xml", "-k", exercise.only,
                   *(f"tests/{file}::{name}" for name in names)]
        try:
            done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTEST_ADDOPTS": ""}, timeout=TIME_LIMIT,
                                  capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return [("the tests end", "", f"not within {TIME_LIMIT} seconds. Does a loop never end?")]
        require((folder / "results.xml").exists(), f"pytest did not run: {(done.stderr + done.stdout)[-300:].strip()}. "
                "It comes with pip install -r tests/requirements.txt")
        return [read_case(case) for case in ElementTree.parse(folder / "results.xml").iter("testcase")]


def read_case(case):
    """test_gae_is_right[1-0.5] -> ("gae is right", "1-0.5", the end of the failure or None)."""
    name, _, parameters = case.get("name").partition("[")
    problem = next((child for child in case if child.tag in ("failure", "error")), None)
    if problem is not None:
        problem = "\n".join((problem.text or problem.get("message")).splitlines()[-MOST_LINES:])
    return name.replace("_", " ").removeprefix("test "), parameters.rstrip("]"), problem


def check(name):
    """Says which tests pass, and shows the first failure and a hint. Exit code 0 if all pass, 1 if not."""
    results = run_tests(EXERCISES[name], completed(name))
    require(results, f"the tests of {name} are gone from tests/{EXERCISES[name].tests.split()[0]}")
    for sentence in dict.fromkeys(sentence for sentence, *_ in results):
        failed = [failure is not None for each, _, failure in results if each == sentence]
        cases = f" ({sum(failed) or len(failed)}{' of ' + str(len(failed)) if any(failed) else ''} cases)"
        print(("FAILS   " if any(failed) else "passes  ") + sentence + cases * (len(failed) > 1))
    failures = [result for result in results if result[2]]
    if failures:
        sentence, case, failure = failures[0]
        print(f"\nThe first failure: {sentence}{f', case {case}' if case else ''}\n{failure}")
    print(f"\n{name}: {'not yet. ' + EXERCISES[name].hint if failures else 'right'}")
    sys.exit(1 if failures else 0)


# ---- the command line ------------------------------------------------------------------------------------------------

def print_list():
    for name, exercise in EXERCISES.items():
        print(f"{name:<20}{exercise.minutes:>3} min  {exercise.difficulty:<8}{exercise.file:<24}"
              f"{'begun' * (FOLDER / name).exists()}".rstrip())


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.exercise", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser("list", help="all exercises, in the order of the course")
    for command, help in (("blank", "write a file in which one function has no body"), ("check", "test your file"),
                          ("solution", "how your file differs from ours")):
        commands.add_parser(command, help=help).add_argument("name", metavar="NAME", choices=EXERCISES)
    args = parser.parse_args(argv)
    if args.command == "list":
        return print_list()
    {"blank": blank, "check": check, "solution": solution}[args.command](args.name)


if __name__ == "__main__":
    run_main(main)
