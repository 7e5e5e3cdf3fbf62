"""Tests of evaluation: it leaves one record per problem, in order, after any failure and any kill."""

import random

import pytest

from apr_jax.evaluate.records import read_records
from apr_jax.evaluate.run import NAME_TAG
from apr_jax.evaluate.run import evaluate as run_evaluation
from apr_jax.evaluate.statistics import summarise
from apr_jax.tasks.countdown import CountdownProtocol, ProblemRange, trace
from apr_jax.tasks.countdown.solver import SolverConfig, solve_apr
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.threads import encode_tree, metrics
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from tests.evaluate.nonsense import SPEC, Nonsense
from tests.threads.fake_engine import FakeEngine, scripts_of

TOKENIZER = countdown_tokenizer(99)
COUNT = 24


def make_problems():
    rng = random.Random(5)
    source = ProblemRange(max_number=20, max_target=30)
    problems = [source.draw(rng) for _ in range(COUNT)]
    config = SolverConfig.paper_apr(beam=(1, 4), sub_beam=(1, 4))
    texts = [solve_apr(problem, config, rng) for problem in problems]
    return problems, texts, [encode_tree(text, TOKENIZER.encode, TOKENIZER.bos, TOKENIZER.eos) for text in texts]


PROBLEMS, TEXTS, TREES = make_problems()
SCRIPTS = {}
for _index, _tree in enumerate(TREES):
    SCRIPTS |= scripts_of(_tree, (NAME_TAG, _index))


def evaluate(*arguments, task=Nonsense(), variant="threads", **named):
    return run_evaluation(*arguments, task=task, variant=variant, **named)


class Killed(BaseException):
    """Stands for a kill: no code may catch it."""


def make_runner(broken=(), kill_after=None, shuffle=1):
    """Return a runner that replays the solver's trees. Threads of the problems in `broken` raise ZeroDivisionError.
    After `kill_after` threads the engine raises Killed."""
    opened = 0

    def tape(name, ids):
        nonlocal opened
        opened += 1
        if kill_after is not None and opened > kill_after:
            raise Killed
        if name[1] in broken:
            raise ZeroDivisionError("broken on purpose")
        return iter(SCRIPTS[name])

    engine = FakeEngine(tape, context=10**6, shuffle=shuffle)
    return TreeRunner(engine, CountdownProtocol(), TOKENIZER, Budget(10**6), Sampling(0.0))


def test_records_are_in_the_problems_order_and_describe_the_trees(tmp_path):
    path = tmp_path / "deep" / "apr.jsonl"
    records = evaluate(make_runner(), PROBLEMS, path, name="apr")
    assert [record.index for record in records] == list(range(COUNT))
    assert read_records(path) == records
    assert [file.name for file in path.parent.iterdir()] == ["apr.jsonl"], "no partial file is left"
    for record, problem, text, tree in zip(records, PROBLEMS, TEXTS, TREES):
        assert record.problem == {"numbers": list(problem.numbers), "target": problem.target}
        assert (record.task, record.variant) == (SPEC, "threads")
        assert record.correct == record.answered == text.info["solved"]
        assert record.failures == record.malformed == {}
        for field in ("total_tokens", "sampled_tokens", "sequential_tokens", "longest_context", "children", "depth"):
            assert getattr(record, field) == getattr(metrics, field)(tree), field
        assert record.steps_right == record.steps
        assert record.thread_tree.root.blocks[0] == tree.root.blocks[0]
    assert {record.correct for record in records} == {True, False}


def test_steps_in_join_blocks_are_not_counted(tmp_path):
    records = evaluate(make_runner(), PROBLEMS, tmp_path / "apr.jsonl", name="apr")
    for record, text in zip(records, TEXTS):
        written = [block.content for thread in text.threads() for block in thread.context if block.sampled]
        assert record.steps == "".join(written).count("Exploring Operation:")
    joined = [spawn.join.content for text in TEXTS for spawn in text.root.spawns]
    assert any("Exploring Operation:" in join for join in joined), "without a step in a join, this test shows nothing"


def test_a_failure_of_the_system_ends_the_evaluation_and_is_no_record(tmp_path):
    """Finished records stay, no tree keeps running, and the same call resumes and ends in the same bytes."""
    path = tmp_path / "apr.jsonl"
    whole = evaluate(make_runner(), PROBLEMS, tmp_path / "whole.jsonl", name="apr")
    runner = make_runner(broken={7})
    with pytest.raises(ZeroDivisionError):
        evaluate(runner, PROBLEMS, path, name="apr", at_once=4)
    assert not runner.engine.live, "the other trees were cancelled and freed their sequences"
    kept = read_records(path.with_name("apr.jsonl.partial"))
    assert not path.exists() and 4 <= len(kept) < COUNT - 1
    assert all(record == whole[record.index] and record.index != 7 for record in kept)
    again = make_runner()
    assert evaluate(again, PROBLEMS, path, name="apr") == whole
    assert {name[1] for name in again.engine.names} == set(range(COUNT)) - {record.index for record in kept}
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("fraction", [0, 0.3, 0.6, 0.9])
def test_a_killed_evaluation_resumes_and_ends_in_the_same_bytes(tmp_path, fraction):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "apr.jsonl"
    evaluate(make_runner(), PROBLEMS, whole, name="apr")
    with pytest.raises(Killed):
        evaluate(make_runner(kill_after=int(fraction * len(SCRIPTS))), PROBLEMS, path, name="apr", at_once=5)
    partial = path.with_name("apr.jsonl.partial")
    done = len(partial.read_text().splitlines())
    assert not path.exists() and done < COUNT and bool(done) == bool(fraction)
    if done:
        partial.write_text(partial.read_text()[:-40])  # a line that the kill cut short
    runner = make_runner(shuffle=9)
    evaluate(runner, PROBLEMS, path, name="apr")
    roots = [name for name in runner.engine.names if len(name) == 2]
    assert len(roots) == COUNT - max(done - 1, 0), "only missing problems are run again"
    assert path.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_records_are_reused_only_for_the_same_name_weights_variant_and_problem(tmp_path):
    path = tmp_path / "apr.jsonl"
    first = evaluate(make_runner(), PROBLEMS, path, name="apr@1")
    again = make_runner()
    assert evaluate(again, PROBLEMS, path, name="apr@1") == first
    assert not again.engine.names
    other = make_runner()
    records = evaluate(other, PROBLEMS, path, name="apr@2")
    assert other.engine.names and all(record.name == "apr@2" for record in records)
    trained = make_runner()
    evaluate(trained, PROBLEMS, path, name="apr@2", weights="a1")
    assert {name[1] for name in trained.engine.names} == set(range(COUNT)), "records of other weights are not reused"
    evaluate(make_runner(broken=range(COUNT)), PROBLEMS, path, name="apr@2", weights="a1")
    evaluate(make_runner(), PROBLEMS, path, name="apr@2")
    asked = make_runner()
    evaluate(asked, PROBLEMS, path, name="apr@2", variant="serial")
    assert {name[1] for name in asked.engine.names} == set(range(COUNT)), "records of another variant are not reused"
    evaluate(make_runner(broken=range(COUNT)), PROBLEMS, path, name="apr@2", variant="serial")
    evaluate(make_runner(), PROBLEMS, path, name="apr@2")
    swapped = [PROBLEMS[1], PROBLEMS[0], *PROBLEMS[2:]]
    changed = make_runner()
    evaluate(changed, swapped, path, name="apr@2")
    assert {name[1] for name in changed.engine.names} == {0, 1}, "records of another problem are not reused"


def test_at_once_changes_no_record(tmp_path):
    paths = [tmp_path / f"{n}.jsonl" for n in (1, 3, 256)]
    for path in paths:
        evaluate(make_runner(shuffle=4), PROBLEMS, path, name="apr", at_once=int(path.stem))
    assert len({path.read_bytes() for path in paths}) == 1


def test_the_condition_begins_the_root_prompt(tmp_path):
    condition = CountdownProtocol().condition(4)
    record = evaluate(make_runner(), PROBLEMS[:1], tmp_path / "apr.jsonl", name="apr", condition=condition)[0]
    assert record.condition == condition
    prompt = TOKENIZER.decode(record.thread_tree.root.blocks[0].content)
    assert prompt.startswith(condition + trace.moving("0"))


def test_no_problems_give_no_records(tmp_path):
    assert evaluate(make_runner(), [], tmp_path / "none.jsonl", name="apr") == []
    assert summarise([])["n"] == 0


def test_a_problem_is_written_in_its_tasks_json_form(tmp_path):
    class Named(Nonsense):
        def problem_json(self, problem):
            return {"asked": (*problem.numbers, problem.target)}

    first = evaluate(make_runner(), PROBLEMS[:2], tmp_path / "apr.jsonl", task=Named())
    assert [record.problem for record in first] == [{"asked": [*p.numbers, p.target]} for p in PROBLEMS[:2]]
    again = make_runner()
    assert evaluate(again, PROBLEMS[:2], tmp_path / "apr.jsonl", task=Named()) == first and not again.engine.names
