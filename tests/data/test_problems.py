"""Tests of which candidates become problems, and of problem files."""

import json

import pytest

from apr_jax.data.problems import ProblemFile, choose_problems, shared, write_problems
from apr_jax.errors import UserError
from tests.evaluate.nonsense import Nonsense, Question


class Numbers(Nonsense):
    """A task whose candidates are the given numbers, the same for every split; None stands for no problem."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def batches(self, split, size=5):
        for start in range(0, len(self.numbers), size):
            yield [None if n is None else Question(n) for n in self.numbers[start : start + size]]
        yield []


def chosen(numbers, train, held_out, repeats=False):
    task = Numbers(numbers)
    return {
        split: [problem.number for problem in problems]
        for split, problems in choose_problems(task, train, held_out, repeats, task.batches)
    }


def test_held_out_problems_are_chosen_first_and_problems_are_distinct():
    numbers = [3, 3, None, 1, 3, 2, 2, 5, 1, 8]
    assert chosen(numbers, 3, 2) == {"held_out": [3, 1], "train": [2, 5, 8]}
    assert chosen(numbers, 3, 2, repeats=True) == {"held_out": [3, 1], "train": [2, 2, 5]}


def test_problems_with_equal_hashes_are_distinct():
    assert hash(-1) == hash(-2)
    assert chosen([7, -1, -2, 4], 3, 1) == {"held_out": [7], "train": [-1, -2, 4]}


def test_a_task_with_too_few_problems_is_refused():
    with pytest.raises(UserError, match="4 train .* 3"):
        chosen([1, 2, 3, 4, 1, 2, 3, 4], 4, 1)


def test_a_problem_file_is_read_back_and_a_broken_line_is_named(tmp_path):
    path, task = tmp_path / "held_out.jsonl", Nonsense()
    assert write_problems(path, task, map(Question, (7, 5, 3))) == 3
    problems = ProblemFile(task, path)
    assert list(problems) == problems[:9] == [Question(7), Question(5), Question(3)]
    assert problems[-1] == Question(3) and problems[1:] == [Question(5), Question(3)]
    assert shared(task, problems, [Question(5), Question(6)]) == 1
    for line in ("{", "[]", json.dumps({"other": 3})):
        path.write_text(f'{{"number": 7}}\n{line}\n')
        with pytest.raises(UserError, match="held_out.jsonl, line 2"):
            ProblemFile(task, path)[1]
