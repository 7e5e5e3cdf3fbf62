"""Tests of tasks: lookup by name or class, settings, and reproducible problems and demonstrations."""

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
from tests.tasks.jsonl.make import settings

SETTINGS = {"jsonl": settings()}  # of tasks that need some
GENERATED = [name for name in BUILT_IN if name not in SETTINGS]  # tasks whose problems are drawn


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_task_is_found_by_its_name_and_by_its_class(name):
    task = load_task(name)
    assert type(task).name == name == task.spec
    again = load_task(BUILT_IN[name])
    assert type(again) is type(task) and again.spec == BUILT_IN[name]


@pytest.mark.parametrize(
    "spec, says",
    [
        ("cuontdown", ("countdown, factors, sums", "'cuontdown'")),
        ("", ("''",)), (":Factors", ("':Factors'",)), ("a.b:", ("'a.b:'",)), (".a:B", ("'.a:B'",)),
        ("nowhere.at_all:Task", ("module nowhere",)),
        ("apr_jax.tasks.nowhere:Task", ("module apr_jax.tasks.nowhere",)),
        ("apr_jax.tasks.task:Nothing", ("apr_jax.tasks.task", "class Nothing")),
        ("apr_jax.tasks.task:NoSettings", ("apr_jax.tasks.task", "class NoSettings")),
        ("apr_jax.tasks.task:Task", ("apr_jax.tasks.task:Task", "demonstration")),
    ],
)  # fmt: skip
def test_a_wrong_task_is_refused_in_one_line(spec, says):
    with pytest.raises(UserError) as refused:
        load_task(spec)
    assert all(part in str(refused.value) for part in says) and "\n" not in str(refused.value)


def test_a_users_task_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_task.py").write_text(
        "from apr_jax.tasks.tagged.factors import Factors\nclass Mine(Factors):\n    name = 'mine'\n"
        "class Bad(Factors):\n    name = 'not a name'\nclass Empty(Factors):\n    variants = ()\n"
        "class Numbers(Factors):\n    variants = (1,)\n"
    )
    monkeypatch.chdir(tmp_path)
    task = load_task("my_own_task:Mine", {"largest": 20})
    assert (task.name, task.spec, task.settings.largest) == ("mine", "my_own_task:Mine", 20)
    assert type(task)().spec == "my_own_task:Mine"  # also without `load_task`
    for name, says in (("Bad", "name.*my_own_task:Bad.*'not a name'"), ("Empty", r"variants.*my_own_task:Empty.*\(\)"),
                       ("Numbers", "variant.*my_own_task:Numbers.* 1$")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            find_task(f"my_own_task:{name}")


def test_an_error_inside_the_module_of_a_task_is_not_reported_as_a_missing_task(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        load_task("breaks:Task")


def test_settings_survive_json_and_wrong_ones_are_named():
    settings = dataclasses.replace(CountdownSettings(), unseen_targets=0.25)
    task = load_task("countdown", json.loads(json.dumps(settings_json(Countdown(settings)))))
    assert task.settings == settings
    assert load_task("countdown", {"problems": {"count": 3}}).settings.problems.count == 3
    for wrong, says in (({"problemz": {}}, "'problemz'"), ({"apr": {"beam": [5, 1]}}, r"beam.*\(5, 1\)"),
                        ({"largest_token": "x"}, "largest_token.*'x'"), ({"apr": 3}, "^apr .*3")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            load_task("countdown", wrong)


@pytest.mark.parametrize("name", BUILT_IN)
def test_problems_and_demonstrations_are_functions_of_their_arguments(name):
    """Problems and trees do not depend on the order of indices, nor on the other indices of a call."""
    one, two = (load_task(name, SETTINGS.get(name)) for _ in range(2))
    for split in SPLITS:
        together = one.problems(3, split, range(40))
        shuffled = random.Random(0).sample(range(40), 40)
        assert [two.problems(3, split, [index])[0] for index in shuffled] == [together[index] for index in shuffled]
        assert (together != one.problems(4, split, range(40))) == (name in GENERATED)
    for variant in one.variants:
        assert one.title(variant) and one.check_variant(variant) == variant
        for index, problem in enumerate(one.problems(0, "train", range(8))):
            trees = [task.demonstration(problem, variant, 0, "train", index) for task in (one, two)]
            assert trees[0] == trees[1] and trees[0].root.blocks[0].content.startswith(
                one.protocol(variant).root_prompt(problem)
            )
    with pytest.raises(UserError, match="'x'"):
        one.protocol("x")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_problem_survives_json(name):
    task = load_task(name, SETTINGS.get(name))
    for problem in task.problems(0, "train", range(30)):
        row = json.loads(json.dumps(task.problem_json(problem)))
        assert task.read_problem(row) == problem and task.key(task.read_problem(row)) == task.key(problem)
        assert task.describe(problem) and "\n" not in task.describe(problem)
    for wrong in ({}, {"x": 1}):
        with pytest.raises(UserError):
            task.read_problem(wrong)


@pytest.mark.parametrize("name", BUILT_IN)
def test_solved_demonstrations_are_correct_by_the_protocol_and_at_most_as_deep_as_levels(name):
    task, solved = load_task(name, SETTINGS.get(name)), 0
    tokenizer = task.tokenizer()
    for variant in task.variants:
        for index, problem in enumerate(task.problems(0, "train", range(12))):
            text, protocol = task.demonstration(problem, variant, 0, "train", index), task.protocol(variant)
            solved += protocol.correct(problem, text.root.text)
            levels = max(_levels(text.root), 0)
            assert levels <= task.levels(variant) and (task.spawns(variant) or not text.root.children)
            tree = encode_tree(text, tokenizer.encode, tokenizer.bos, tokenizer.eos)
            for thread, read in zip(text.threads(), tree.threads(), strict=True):
                assert tokenizer.decode([i for block in read.context for i in block.content]) == thread.text
    assert solved > 6


def _levels(thread) -> int:
    return max((1 + _levels(child) for child in thread.children), default=0)


def test_a_finite_task_returns_fewer_problems_than_asked_for():
    task = Factors()
    assert len(task.problems(0, "train", range(1000, 1100))) == 1062 - 1000
    assert not task.problems(0, "train", range(2000, 2010))


def test_a_task_without_files_and_budgets_raises(tmp_path):
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
    found, following = first_problems(task, "held_out", 6)
    assert task.spec == SPEC and [problem.number - 100 for problem in found] == [0, 1, 2, 3, 5, 6] and following == 7
    further, _ = first_problems(task, "held_out", 3, following)
    assert [problem.number - 100 for problem in further] == [7, 8, 10]


def test_first_problems_of_an_exhausted_task_are_fewer():
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
