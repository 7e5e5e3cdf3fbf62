"""Tests of the verifier: its verdicts on the authors' traces and on broken ones, and that no text raises."""

import json
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.countdown import CountdownProtocol, Problem, Verdict, check_solution, operations, trace

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_traces.json").read_text())
PROBLEM = Problem((5, 50, 79, 27), 62)
PATH = (
    "Moving to Node #0\nCurrent State: 62:[5, 50, 79, 27], Operations: []\n"
    "Exploring Operation: 79-27=52, Resulting Numbers: [5, 50, 52]\n"
    "Generated Node #0,0: 62:[5, 50, 52] Operation: 79-27=52\n"
    "Exploring Operation: 50/5=10, Resulting Numbers: [52, 10]\n"
    "Exploring Operation: 52+10=62, Resulting Numbers: [62]\n"
    "62,62 equal: Goal Reached"
)
PIECES = [
    "Exploring Operation: ", "79-27=52", ", Resulting Numbers: [", "5, 50, 52", "]", "\n", "Goal Reached",
    "62,62 equal: ", "-", "0", "/0=", "9" * 5000, "٣", "²", "\x00", "\ud800", "__import__('os')",
    " ", "'", "[", "\r", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("problem", GOLDEN, ids=lambda p: f"{p['nums']}to{p['target']}")
def test_verdicts_of_the_authors_traces(problem):
    task = Problem(problem["nums"], problem["target"])
    for text in (problem["apr"]["main_calls"][-1], problem["sosp"]):
        solved = not text.endswith(trace.NO_SOLUTION)
        path = trace.read_path(text)
        assert (path is not None) is solved
        assert bool(check_solution(task, text)) is solved
        assert bool(check_solution(task, path)) is solved
        assert not check_solution(Problem(problem["nums"], problem["target"] + 1), text)
        right, total = operations(text)
        assert right == total == text.count("Exploring Operation:")


def test_golden_traces_are_solved_and_unsolved_in_both_variants():
    pairs = [(problem["apr"]["main_calls"][-1], problem["sosp"]) for problem in GOLDEN]
    unsolved = {tuple(text.endswith(trace.NO_SOLUTION) for text in pair) for pair in pairs}
    assert unsolved == {(True, True), (True, False), (False, True), (False, False)}


def test_a_correct_path_has_a_true_verdict():
    verdict = check_solution(PROBLEM, PATH)
    assert verdict and verdict.reason == ""
    assert verdict == Verdict(True)
    assert check_solution(Problem((6, 6), 36), "Exploring Operation: 6*6=36, Resulting Numbers: [36]\nGoal Reached")
    assert check_solution(Problem((7,), 7), "7,7 equal: Goal Reached")
    assert not check_solution(Problem((6,), 36), "Exploring Operation: 6*6=36, Resulting Numbers: [36]\nGoal Reached")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("79-27=52, Res", "79-27=53, Res", "result"),
        ("79-27=52, Resulting Numbers: [5, 50, 52]", "79-27=52, Resulting Numbers: [5, 51, 52]", "it states"),
        ("79-27=52, Resulting Numbers: [5, 50, 52]", "79-27=52, Resulting Numbers: [5, 50, 52, 52]", "it states"),
        ("79-27=52, Res", "79-28=51, Res", "not left"),
        ("79-27=52, Res", "27-79=-52, Res", "operation line"),
        ("79-27=52, Res", "27-79=0, Res", "result"),
        ("79-27=52, Res", "79/27=2, Res", "result"),
        ("79-27=52, Res", "79-27-0=52, Res", "operation line"),
        ("79-27=52, Res", "٧٩-27=52, Res", "operation line"),
        ("79-27=52, Res", "79-27=" + "0" * 5000 + "52, Res", "operation line"),
        ("[5, 50, 52]\nGen", "[__import__('os')]\nGen", "operation line"),
        ("52+10=62, Resulting Numbers: [62]", "52-10=42, Resulting Numbers: [42]", "'Goal Reached'"),
        ("\n62,62 equal: Goal Reached", "\n62,62 equal: Goal", '"Goal Reached"'),
        ("Exploring Operation: 52+10=62, Resulting Numbers: [62]\n", "", "'Goal Reached'"),
    ],
)
def test_the_reason_states_the_error_of_a_wrong_path(old, new, reason):
    assert old in PATH
    verdict = check_solution(PROBLEM, PATH.replace(old, new, 1))
    assert not verdict
    assert reason in verdict.reason and "\n" not in verdict.reason and len(verdict.reason) < 300
    verdict.reason.encode()


def test_division_by_zero_is_wrong_and_operations_on_zero_are_allowed():
    line = "Exploring Operation: {}, Resulting Numbers: [{}]\n"
    start = line.format("5-5=0", "7, 0")
    assert not check_solution(Problem((5, 5, 7), 7), start + line.format("7/0=7", "7") + "Goal Reached")
    assert check_solution(Problem((5, 5, 7), 7), start + line.format("7-0=7", "7") + "Goal Reached")
    assert operations(start + line.format("0/7=0", "0") + line.format("0/0=0", "0")) == (2, 3)


def test_only_the_returned_path_of_a_whole_text_counts():
    wrong = "Exploring Operation: 1+1=3, Resulting Numbers: [3]\n"
    assert check_solution(PROBLEM, wrong + "62,62 equal: Goal Reached\n" + PATH)
    assert not check_solution(PROBLEM, wrong + PATH)
    assert not check_solution(PROBLEM, PATH + "\nGoal Reached\n" + wrong + "Goal Reached")


def test_operations_counts_lines_that_cannot_be_parsed_as_wrong():
    assert operations("") == (0, 0)
    assert operations(PATH) == (3, 3)
    assert operations(PATH + "\nExploring Operation: 3+") == (3, 4)
    assert operations("Exploring Operation: 3-5=2, Resulting Numbers: [2]\n  Exploring Operation:\nGoal") == (0, 2)


@pytest.mark.parametrize("text", [None, "", "\n", "\x00", "\ud800 Goal Reached", "Goal Reached" * 3, "9" * 10_000])
def test_a_text_without_a_path_is_wrong(text):
    verdict = check_solution(PROBLEM, text)
    assert not verdict and verdict.reason
    verdict.reason.encode()


@pytest.mark.parametrize(
    "unit",
    ["[", "Goal Reached", "Goal Reached\n", "Exploring Operation: ", "Exploring Operation: 1+1=2, Resulting Numbers: [",
     "Exploring Operation: 5+50=55, Resulting Numbers: [5]\n", "1, ", " ", "\n", "9"],
)  # fmt: skip
def test_long_garbage_takes_bounded_time(unit):
    start = time.perf_counter()
    for head in ("", "Exploring Operation: 5+50=55, Resulting Numbers: ["):
        text = (head + unit * 200_000)[:200_000]
        check_solution(PROBLEM, text)
        operations(text)
    assert time.perf_counter() - start < 5


@settings(max_examples=500)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_no_text_raises(text):
    verdict = check_solution(PROBLEM, text)
    assert verdict.right or verdict.reason
    verdict.reason.encode()
    right, total = operations(text)
    assert 0 <= right <= total


@settings(max_examples=1000)
@given(st.data())
def test_changed_paths_do_not_raise_and_the_protocol_agrees(data):
    cut = data.draw(st.integers(0, len(PATH)))
    piece, gone = data.draw(st.sampled_from(PIECES)), data.draw(st.integers(0, 3))
    text = "Goal Reached\n" + PATH[:cut] + piece + PATH[cut + gone :]
    verdict = check_solution(PROBLEM, text)
    protocol = CountdownProtocol()
    if protocol.result(text) is None:
        assert not protocol.correct(PROBLEM, text)
    else:
        assert protocol.correct(PROBLEM, text) is bool(verdict)
