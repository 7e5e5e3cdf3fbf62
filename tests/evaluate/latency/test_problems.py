"""Problems to measure."""

import json

import pytest

from apr_jax.errors import UserError
from apr_jax.evaluate.latency.problems import held_out_problems, read_problem_file
from tests.evaluate.nonsense import Nonsense, NonsenseSettings, Question


def test_candidates_that_are_no_problems_are_left_out():
    task = Nonsense(NonsenseSettings(first=100))
    found, behind = held_out_problems(task, 6)
    assert [problem.number - 100 for problem in found] == [0, 1, 2, 3, 5, 6] and behind == 7
    further, _ = held_out_problems(task, 3, behind)
    assert [problem.number - 100 for problem in further] == [7, 8, 10]


def test_a_task_that_has_no_more_gives_fewer():
    class Three(Nonsense):
        def problems(self, seed, split, indices):
            return [Question(index) for index in indices if index < 3]

    class Nothing(Nonsense):
        def problems(self, seed, split, indices):
            return [None] * len(indices)

    assert held_out_problems(Three(), 5) == ([Question(0), Question(1), Question(2)], 3)
    assert held_out_problems(Three(), 5, 3) == ([], 3)
    assert held_out_problems(Nothing(), 5)[0] == []


def test_a_file_of_problems(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"number": number}) + "\n" for number in (7, 5, 3)))
    assert read_problem_file(path, Nonsense(), 2) == [Question(7), Question(5)]
    assert len(read_problem_file(path, Nonsense(), 9)) == 3
    for line in ("{", "[]", '{"other": 3}'):
        path.write_text(f'{{"number": 7}}\n{line}\n')
        with pytest.raises(UserError, match="held_out.jsonl, line 2 is no problem of"):
            read_problem_file(path, Nonsense(), 2)
