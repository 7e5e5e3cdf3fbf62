"""Tasks: found by name, or by module and class; their problems, settings and demonstrations are functions of their
arguments."""

import dataclasses
import json
import random

import pytest

from apr_jax.errors import UserError
from apr_jax.tasks.countdown.task import Countdown, CountdownSettings
from apr_jax.tasks.tagged.factors import Factors
from apr_jax.tasks.task import BUILT_IN, SPLITS, Task, find_task, first_problems, load_task, settings_json
from apr_jax.threads import encode_tree
from tests.evaluate.nonsense import SPEC, Nonsense, NonsenseSettings, Question


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_task_is_found_by_its_name_and_by_its_class(name):
    task = load_task(name)
    assert type(task).name == name == task.spec
    again = load_task(BUILT_IN[name])
    assert type(again) is type(task) and again.spec == BUILT_IN[name]


@pytest.mark.parametrize(
    "spec, says",
    [
        ("cuontdown", "countdown, factors, sums or package.module:Class, was given 'cuontdown'"),
        ("", "was given ''"), (":Factors", "was given ':Factors'"), ("a.b:", "was given 'a.b:'"),
        ("nowhere.at_all:Task", "no module nowhere"), ("apr_jax.tasks.nowhere:Task", "no module apr_jax.tasks.nowhere"),
        ("apr_jax.tasks.task:Nothing", "apr_jax.tasks.task has no class Nothing that is a Task"),
        ("apr_jax.tasks.task:NoSettings", "has no class NoSettings that is a Task"), (".a:B", "was given '.a:B'"),
        ("apr_jax.tasks.task:Task", "apr_jax.tasks.task:Task is no whole task, it lacks demonstration, "),
    ],
)  # fmt: skip
def test_what_is_no_task_is_refused_in_one_line(spec, says):
    with pytest.raises(UserError) as refused:
        load_task(spec)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_task_of_ones_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_task.py").write_text(
        "from apr_jax.tasks.tagged.factors import Factors\nclass Mine(Factors):\n    name = 'mine'\n"
        "class Bad(Factors):\n    name = 'not a name'\nclass Empty(Factors):\n    variants = ()\n"
        "class Numbers(Factors):\n    variants = (1,)\n"
    )
    monkeypatch.chdir(tmp_path)
    task = load_task("my_own_task:Mine", {"largest": 20})
    assert (task.name, task.spec, task.settings.largest) == ("mine", "my_own_task:Mine", 20)
    assert type(task)().spec == "my_own_task:Mine"  # also where nobody loaded it
    for name, says in (("Bad", "identifier, my_own_task:Bad has 'not a name'"), ("Empty", "Empty has ()"),
                       ("Numbers", "variant of a task is a Python identifier, .* has 1")):  # fmt: skip
        with pytest.raises(UserError, match=says.replace("()", r"\(\)")):
            find_task(f"my_own_task:{name}")


def test_an_error_inside_the_module_of_a_task_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        load_task("breaks:Task")


def test_settings_come_back_from_json_and_wrong_ones_are_named():
    settings = dataclasses.replace(CountdownSettings(), unseen_targets=0.25)
    task = load_task("countdown", json.loads(json.dumps(settings_json(Countdown(settings)))))
    assert task.settings == settings
    assert load_task("countdown", {"problems": {"count": 3}}).settings.problems.count == 3
    for wrong, says in (({"problemz": {}}, "no 'problemz'"), ({"apr": {"beam": [5, 1]}}, "beam needs 1 <="),
                        ({"largest_token": "x"}, "largest_token is an integer"), ({"apr": 3}, "apr is")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            load_task("countdown", wrong)


@pytest.mark.parametrize("name", BUILT_IN)
def test_problems_and_demonstrations_are_functions_of_their_arguments(name):
    """Whatever the order and the company they are asked for in."""
    one, two = load_task(name), load_task(name)
    for split in SPLITS:
        together = one.problems(3, split, range(40))
        shuffled = random.Random(0).sample(range(40), 40)
        assert [two.problems(3, split, [index])[0] for index in shuffled] == [together[index] for index in shuffled]
        assert together != one.problems(4, split, range(40))
    for variant in one.variants:
        assert one.title(variant) and one.check_variant(variant) == variant
        for index, problem in enumerate(one.problems(0, "train", range(8))):
            trees = [task.demonstration(problem, variant, 0, "train", index) for task in (one, two)]
            assert trees[0] == trees[1] and trees[0].root.blocks[0].content.startswith(
                one.protocol(variant).root_prompt(problem)
            )
    with pytest.raises(UserError, match="was given 'x'"):
        one.protocol("x")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_problem_comes_back_from_its_json_form(name):
    task = load_task(name)
    for problem in task.problems(0, "train", range(30)):
        row = json.loads(json.dumps(task.problem_json(problem)))
        assert task.read_problem(row) == problem and task.key(task.read_problem(row)) == task.key(problem)
        assert task.describe(problem) and "\n" not in task.describe(problem)
    for wrong in ({}, {"x": 1}):
        with pytest.raises(UserError):
            task.read_problem(wrong)


@pytest.mark.parametrize("name", BUILT_IN)
def test_solved_demonstrations_are_right_by_the_protocol_and_as_deep_as_they_say(name):
    task, words, solved = load_task(name), load_task(name).tokenizer(), 0
    for variant in task.variants:
        for index, problem in enumerate(task.problems(0, "train", range(12))):
            text, protocol = task.demonstration(problem, variant, 0, "train", index), task.protocol(variant)
            solved += protocol.correct(problem, text.root.text)
            levels = max(_levels(text.root), 0)
            assert levels <= task.levels(variant) and (task.spawns(variant) or not text.root.children)
            tree = encode_tree(text, words.encode, words.bos, words.eos)
            for thread, read in zip(text.threads(), tree.threads(), strict=True):
                assert words.decode([i for block in read.context for i in block.content]) == thread.text
    assert solved > 6


def _levels(thread) -> int:
    return max((1 + _levels(child) for child in thread.children), default=0)


def test_a_task_that_ends_gives_fewer_problems():
    task = Factors()
    assert len(task.problems(0, "train", range(1000, 1100))) == 1062 - 1000
    assert not task.problems(0, "train", range(2000, 2010))


def test_a_task_without_files_and_budgets_says_so(tmp_path):
    task = Factors()
    for call in (
        lambda: task.read_problems(tmp_path), lambda: task.read_demonstrations(tmp_path),
        lambda: task.write_demonstrations(tmp_path, (), task.tokenizer()), lambda: task.condition("fresh", 3),
    ):  # fmt: skip
        with pytest.raises(UserError, match="factors"):
            call()
    assert issubclass(Factors, Task) and task.condition_of(None, "fresh") == ""


def test_the_first_problems_of_a_split_leave_out_candidates_that_are_none():
    task = Nonsense(NonsenseSettings(first=100))
    found, behind = first_problems(task, "held_out", 6)
    assert task.spec == SPEC and [problem.number - 100 for problem in found] == [0, 1, 2, 3, 5, 6] and behind == 7
    further, _ = first_problems(task, "held_out", 3, behind)
    assert [problem.number - 100 for problem in further] == [7, 8, 10]


def test_a_task_that_has_no_more_gives_fewer():
    class Three(Nonsense):
        def problems(self, seed, split, indices):
            return [Question(index) for index in indices if index < 3]

    class Nothing(Nonsense):
        def problems(self, seed, split, indices):
            return [None] * len(indices)

    assert first_problems(Three(), "held_out", 5) == ([Question(0), Question(1), Question(2)], 3)
    assert first_problems(Three(), "held_out", 5, 3) == ([], 3)
    assert first_problems(Nothing(), "held_out", 5)[0] == []
    sparse = Countdown(dataclasses.replace(CountdownSettings(), unseen_targets=0.05))
    assert len(first_problems(sparse, "held_out", 12)[0]) == 12
