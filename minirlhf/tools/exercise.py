"""Exercises: write one function of the book yourself. The project's own tests check it.

    python -m minirlhf.tools.exercise list               all exercises in the order of COURSE.md
    python -m minirlhf.tools.exercise blank gae          writes out/exercises/gae/minirlhf/ppo.py, gae without its body
                                                         (nor has any other exercise of this file one)
    python -m minirlhf.tools.exercise check gae          tests your file: exit code 0 if everything passes, 1 if not
    python -m minirlhf.tools.exercise solution gae       how your file differs from ours

You edit the file that `blank` names. `check` puts it into a temporary copy of the repository, whose own files stay as
they are.
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
TIME_LIMIT = 120        # seconds for the tests of one exercise. They take less than 20, on a busy machine longer
MOST_LINES = 40         # of the first failure, its last ones


class Exercise(NamedTuple):
    file: str           # where the function is
    minutes: int
    difficulty: str
    tests: str          # a file in tests/ and names of tests in it, the most telling one first
    only: str = ""      # of tests with several cases, those with this word in their name
    hint: str = ""      # one sentence below a failure: the idea that is mostly missing


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
        hint="a pad has no position. Counted from the left, with its pads, a prompt looks up the wrong rows of wpe."),
    "visible_positions": Exercise("minirlhf/gpt2.py", 15, "hard", """test_gpt2.py
        test_no_position_sees_what_comes_after_it
        test_pads_change_nothing_on_either_side
        test_what_is_under_a_pad_does_not_matter
        test_the_cache_changes_nothing
        test_a_row_of_pads_gives_no_nan_and_no_nan_gradient""",
        hint="with a cache the last T of S positions are new: the diagonal moves. A row of pads must see something."),
    "KVCache.extend": Exercise("minirlhf/gpt2.py", 10, "medium", """test_gpt2.py
        test_the_cache_changes_nothing
        test_the_cache_works_without_a_mask
        test_the_cache_keeps_the_rows_it_is_told_to""",
        hint="the new keys and values go behind those that are there, and attention wants all of them, old and new."),
    "sample_token": Exercise("minirlhf/generate.py", 10, "medium", """test_generate.py
        test_sampled_frequencies_are_the_distribution
        test_the_ends_of_the_interval_give_tokens_that_are_possible
        test_cached_sampling_is_naive_sampling_without_a_cache""",
        hint="the token is the first one at which the cumulative probability exceeds the random number."),
    "response_logprobs": Exercise("minirlhf/generate.py", 15, "hard", """test_generate.py
        test_log_probabilities_of_responses_are_the_full_softmax_by_hand
        test_sampling_and_scoring_agree_on_what_was_sampled""",
        hint="position t predicts token t + 1, so the mask of the predicted tokens starts one column later."),
    "sft_loss": Exercise("train_sft.py", 5, "easy", """test_steps.py
        test_sft_learns_the_response_and_its_eos_and_not_the_prompt""",
        hint="prompt tokens and pads count 0. Sum over the response tokens, and return how many they are."),
    "encode": Exercise("minirlhf/data.py", 5, "easy", """test_data.py
        test_encode_adds_exactly_one_eos_and_text_can_never_inject_one
        test_prompt_and_response_are_tokenised_apart
        test_an_unfinished_answer_is_read_back_without_eos""",
        hint="prompt and response are tokenised apart, and only a finished response gets an EOS."),
    "preferred": Exercise("minirlhf/reward.py", 5, "medium", """test_reward.py
        test_accuracy_counts_strict_pairs_and_equal_rewards_half
        test_a_tie_says_nothing_about_the_two_and_their_order_does_not_matter
        test_what_stands_where_there_is_no_answer_changes_no_loss_gradient_or_accuracy""",
        hint="rank 0 is no answer, and two equal ranks prefer nothing."),
    "at_last_token": Exercise("minirlhf/reward.py", 5, "medium", """test_reward.py
        test_the_last_token_is_found_wherever_the_pads_are
        test_the_score_depends_on_the_prompt_and_on_every_token_of_the_response""",
        hint="the last real token is not always at mask.sum() - 1: pads may stand on the left."),
    "pair_loss": Exercise("minirlhf/reward.py", 10, "medium", RANKING_LOSS, "pairs",
        hint="a mean over the pairs of a prompt, then a mean over prompts."),
    "best_loss": Exercise("minirlhf/reward.py", 10, "medium", RANKING_LOSS, "best",
        hint="a softmax over the answers that exist. What is padded must not be in its sum."),
    "normalise": Exercise("train_rm.py", 15, "hard", """test_steps.py
        test_the_reward_model_starts_as_the_sft_model_and_is_normalised_on_its_samples
        test_the_samples_that_a_reward_model_is_normalised_on_have_its_temperature_and_length""",
        hint="sample at --temperature and as long as the answers, score the last token, not the last column."),
    "token_rewards": Exercise("minirlhf/ppo.py", 10, "medium", """test_ppo.py
        test_the_kl_is_paid_at_every_token_and_the_score_comes_at_the_last
        test_what_stands_under_the_mask_reaches_no_statistic_reward_or_advantage""",
        hint="the score belongs to the last token of each response, wherever that is. Every token pays the KL."),
    "kl_k3": Exercise("minirlhf/ppo.py", 5, "easy", """test_traps.py
        test_trap_06_k1_and_k3_estimate_the_exact_kl""",
        hint="with x = log p_ref - log p it is exp(x) - 1 - x: never negative, and right on average."),
    "gae": Exercise("minirlhf/ppo.py", 15, "hard", """test_ppo.py
        test_gae_is_the_quadratic_definition_on_ragged_rows
        test_with_lambda_one_the_return_is_the_reward_to_go_whatever_the_values
        test_what_stands_under_the_mask_reaches_no_statistic_reward_or_advantage""",
        hint="go backwards. Behind the last token there is no value and no advantage, whatever is under the mask."),
    "whiten": Exercise("minirlhf/ppo.py", 5, "medium", """test_ppo.py
        test_whitening_is_whitening_of_the_compacted_vector
        test_what_stands_under_the_mask_reaches_no_statistic_reward_or_advantage""",
        hint="one mean and one variance over all real tokens of the rollout, not of each row."),
    "policy_losses": Exercise("minirlhf/ppo.py", 10, "medium", """test_ppo.py
        test_losses_and_their_gradients
        test_the_gradient_of_the_first_step_is_the_policy_gradient""", "policy",
        hint="take the worse of the clipped and the unclipped gain, with the sign of a loss."),
    "value_losses": Exercise("minirlhf/ppo.py", 5, "medium", """test_ppo.py
        test_losses_and_their_gradients""", "value",
        hint="the worse of two squared errors: of the new value, and of the new value kept near the old one."),
    "adaptive_beta": Exercise("minirlhf/ppo.py", 5, "easy", """test_ppo.py
        test_adaptive_beta_in_absolute_values""",
        hint="the relative error is limited to 20 % on both sides before it is used."),
    "make_rollout": Exercise("train_ppo.py", 60, "hard", """test_capstone.py
        test_the_first_rollout_is_that_of_ours
        test_three_iterations_are_those_of_ours""",
        hint="compare field by field, from the top: the first one that differs names the step."),
    "update": Exercise("train_ppo.py", 60, "hard", """test_capstone.py
        test_three_iterations_are_those_of_ours""",
        hint="divide by the tokens of the whole minibatch, and mask before exp() as well as after it."),
}


# ---- files -----------------------------------------------------------------------------------------------------------

TODO = 'raise NotImplementedError("your code replaces this line")'
HIDDEN = 'raise NotImplementedError("another exercise: blank it to write it, and until then check uses ours")'


def read_function(path, name):
    """(text of the file, syntax tree of its function or Class.method). UserError names the file and what is wrong."""
    require(path.exists(), f"{path} is not there yet: python -m minirlhf.tools.exercise blank {name} writes it")
    try:
        source = path.read_text(encoding="utf-8")
        return source, find_function(source, path, name)
    except (SyntaxError, ValueError) as error:                  # ValueError: not UTF-8, or a null byte
        raise UserError(f"{path}: {error}") from None


def find_function(source, path, name):
    node = ast.parse(source, path.name)
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", "") == part), None)
        require(node, f"{path}: {name} is gone. Its first line must stay as it was")
    return node


def with_body(source, path, name, body=None):
    """The source with another body below the docstring of a function: our own one, or one line."""
    function, lines = find_function(source, path, name), source.splitlines(keepends=True)
    docstring = function.body[0]
    ours, our_function = read_function(ROOT / EXERCISES[name].file, name)
    own = ours.splitlines(keepends=True)[our_function.body[0].end_lineno:our_function.end_lineno]
    lines[docstring.end_lineno:function.end_lineno] = [" " * docstring.col_offset + body + "\n"] if body else own
    return "".join(lines)


def others_in(name):
    return [other for other in EXERCISES if other != name and EXERCISES[other].file == EXERCISES[name].file]


def learners_source(path, name):
    """The learner's file, in which the other exercises that `blank` hid are solved as ours are."""
    source, _ = read_function(path, name)
    for other in others_in(name):
        if HIDDEN in ast.get_source_segment(source, find_function(source, path, other)):
            source = with_body(source, path, other)
    return source


def blank(name):
    """Writes the learner's file: ours, in which this function and the other exercises have no body."""
    file = EXERCISES[name].file
    source, _ = read_function(ROOT / file, name)
    path = FOLDER / name / file
    for each, body in [(name, TODO), *((other, HIDDEN) for other in others_in(name))]:
        source = with_body(source, path, each, body)
    move_aside(FOLDER / name)
    path.parent.mkdir(parents=True)
    write_whole(path, [source.encode()])
    print(f"{path}:{find_function(source, path, name).end_lineno} is where you write {name}. Then run\n"
          f"    python -m minirlhf.tools.exercise check {name}")


def solution(name):
    """Prints what differs between the learner's file and ours, theirs with - and ours with +."""
    path = FOLDER / name / EXERCISES[name].file
    theirs, ours = learners_source(path, name), (ROOT / EXERCISES[name].file).read_text(encoding="utf-8")
    lines = difflib.unified_diff(theirs.splitlines(), ours.splitlines(), "yours", "ours", lineterm="")
    print("\n".join(lines) or f"{path} is the same as ours")


# ---- check -----------------------------------------------------------------------------------------------------------

def run_tests(exercise, source):
    """Runs the tests with the learner's source in a copy of the tree: [(name, case, failure or None)], in order."""
    file, *names = exercise.tests.split()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        unneeded = shutil.ignore_patterns("__pycache__", "*.png", "*.jsonl")
        for part in ("minirlhf", "tests", "data/tiny"):
            shutil.copytree(ROOT / part, folder / part, ignore=unneeded)
        for script in ROOT.glob("train_*.py"):
            shutil.copy(script, folder)
        shutil.copy(ROOT / exercise.file, folder / "ours.py")           # what the capstone is compared with
        (folder / exercise.file).write_text(source, encoding="utf-8")
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
    """Says which tests pass, and shows the first failure. Exit code 0 if all pass, 1 if not."""
    path = FOLDER / name / EXERCISES[name].file
    results = run_tests(EXERCISES[name], learners_source(path, name))
    require(results, f"the tests of {name} are gone from tests/{EXERCISES[name].tests.split()[0]}")
    for sentence in dict.fromkeys(sentence for sentence, *_ in results):
        failed = [failure is not None for each, _, failure in results if each == sentence]
        cases = f" ({sum(failed) or len(failed)}{' of ' + str(len(failed)) if any(failed) else ''} cases)"
        print(("FAILS   " if any(failed) else "passes  ") + sentence + cases * (len(failed) > 1))
    failures = [result for result in results if result[2]]
    if failures:
        sentence, case, failure = failures[0]
        print(f"\nThe first failure: {sentence}{f', case {case}' if case else ''}\n{failure}\n\n"
              f"Hint: {EXERCISES[name].hint}")
    print(f"\n{name}: {'not yet' if failures else 'right'}")
    sys.exit(1 if failures else 0)


# ---- the command line ------------------------------------------------------------------------------------------------

def print_list():
    for name, exercise in EXERCISES.items():
        begun = "begun" if (FOLDER / name).exists() else ""
        print(f"{name:<20}{exercise.minutes:>3} min  {exercise.difficulty:<8}{exercise.file:<24}{begun}".rstrip())


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
