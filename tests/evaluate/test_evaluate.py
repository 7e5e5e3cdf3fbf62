"""Evaluation: one record per problem in the problems' order, whatever fails and whenever it is killed."""

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.errors import UserError
from apr_jax.evaluate.evaluate import (
    NAME_TAG,
    Record,
    accuracy_by_sequential,
    accuracy_by_window,
    evaluate,
    even_edges,
    paired_difference,
    read_records,
    summarise,
    wilson_interval,
)
from apr_jax.tasks.countdown import CountdownProtocol, ProblemRange, trace
from apr_jax.tasks.countdown.solver import SolverConfig, solve_apr
from apr_jax.tasks.countdown.vocabulary import countdown_tokenizer
from apr_jax.threads import encode_tree, metrics
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
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


class Killed(BaseException):
    """As a kill: nothing may catch it."""


def make_runner(broken=(), kill_after=None, shuffle=1):
    """Plays the solver's trees; the threads of the problems in `broken` raise, and so does, as a kill, the
    engine at its `kill_after`-th thread."""
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


def test_records_stand_in_the_problems_order_and_say_what_the_trees_are(tmp_path):
    path = tmp_path / "deep" / "apr.jsonl"
    records = evaluate(make_runner(), PROBLEMS, path, name="apr")
    assert [record.index for record in records] == list(range(COUNT))
    assert read_records(path) == records
    assert [file.name for file in path.parent.iterdir()] == ["apr.jsonl"], "no partial file is left"
    for record, problem, text, tree in zip(records, PROBLEMS, TEXTS, TREES):
        assert record.problem == {"numbers": list(problem.numbers), "target": problem.target}
        assert record.correct == record.claimed == text.info["solved"]
        assert record.failures == record.malformed == {}
        for field in ("total_tokens", "sampled_tokens", "sequential_tokens", "longest_context", "children", "depth"):
            assert getattr(record, field) == getattr(metrics, field)(tree), field
        assert record.operations_right == record.operations
        assert record.thread_tree.root.blocks[0] == tree.root.blocks[0]
    assert {record.correct for record in records} == {True, False}


def test_operations_are_those_that_threads_wrote_not_those_of_joins(tmp_path):
    records = evaluate(make_runner(), PROBLEMS, tmp_path / "apr.jsonl", name="apr")
    for record, text in zip(records, TEXTS):
        written = [block.content for thread in text.threads() for block in thread.context if block.sampled]
        assert record.operations == "".join(written).count("Exploring Operation:")
    joined = [spawn.join.content for text in TEXTS for spawn in text.root.spawns]
    assert any("Exploring Operation:" in join for join in joined), "or this test shows nothing"


def test_a_failure_of_the_system_ends_the_evaluation_and_is_no_record(tmp_path):
    """What had ended before stays, nothing is left running, and the same call goes on to the same bytes."""
    path = tmp_path / "apr.jsonl"
    whole = evaluate(make_runner(), PROBLEMS, tmp_path / "whole.jsonl", name="apr")
    runner = make_runner(broken={7})
    with pytest.raises(ZeroDivisionError, match="broken on purpose"):
        evaluate(runner, PROBLEMS, path, name="apr", at_once=4)
    assert not runner.engine.live, "the trees beside it were cancelled and have given back what they held"
    kept = read_records(path.with_name("apr.jsonl.partial"))
    assert not path.exists() and 4 <= len(kept) < COUNT - 1
    assert all(record == whole[record.index] and record.index != 7 for record in kept)
    again = make_runner()
    assert evaluate(again, PROBLEMS, path, name="apr") == whole
    assert {name[1] for name in again.engine.names} == set(range(COUNT)) - {record.index for record in kept}
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_failure_of_the_system_that_an_old_file_holds_is_no_result(tmp_path):
    """It is not taken over when an evaluation goes on, and nobody reads it as a wrong answer."""
    path = tmp_path / "apr.jsonl"
    whole = evaluate(make_runner(), PROBLEMS, path, name="apr")
    text = path.read_bytes()
    failed = dataclasses.replace(
        Record(3, "apr", "", whole[3].problem, False, False, {}), failures={"error:XlaRuntimeError": 1}
    )
    path.write_text("".join(record.line() for record in [*whole[:3], failed, *whole[4:]]))
    with pytest.raises(UserError, match="line 4: problem 3 .*error:XlaRuntimeError"):
        read_records(path)
    with pytest.raises(ValueError, match="problem 3 is no result: error:XlaRuntimeError"):
        summarise([*whole[:3], failed])
    again = make_runner()
    assert evaluate(again, PROBLEMS, path, name="apr") == whole
    assert {name[1] for name in again.engine.names} == {3} and path.read_bytes() == text


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9])
def test_killed_and_started_again_ends_in_the_same_bytes(tmp_path, share):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "apr.jsonl"
    evaluate(make_runner(), PROBLEMS, whole, name="apr")
    with pytest.raises(Killed):
        evaluate(make_runner(kill_after=int(share * len(SCRIPTS))), PROBLEMS, path, name="apr", at_once=5)
    partial = path.with_name("apr.jsonl.partial")
    done = len(partial.read_text().splitlines())
    assert not path.exists() and done < COUNT and bool(done) == bool(share)
    if done:
        partial.write_text(partial.read_text()[:-40])  # a line that the kill cut short
    runner = make_runner(shuffle=9)
    evaluate(runner, PROBLEMS, path, name="apr")
    roots = [name for name in runner.engine.names if len(name) == 2]
    assert len(roots) == COUNT - max(done - 1, 0), "only what is missing is run again"
    assert path.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_a_finished_file_is_taken_over_and_another_evaluation_is_not(tmp_path):
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
    assert {name[1] for name in trained.engine.names} == set(range(COUNT)), "those of other weights are not taken over"
    evaluate(make_runner(broken=range(COUNT)), PROBLEMS, path, name="apr@2", weights="a1")
    evaluate(make_runner(), PROBLEMS, path, name="apr@2")
    swapped = [PROBLEMS[1], PROBLEMS[0], *PROBLEMS[2:]]
    changed = make_runner()
    evaluate(changed, swapped, path, name="apr@2")
    assert {name[1] for name in changed.engine.names} == {0, 1}, "a record counts for its own problem only"


def test_how_many_run_at_once_changes_nothing(tmp_path):
    paths = [tmp_path / f"{n}.jsonl" for n in (1, 3, 256)]
    for path in paths:
        evaluate(make_runner(shuffle=4), PROBLEMS, path, name="apr", at_once=int(path.stem))
    assert len({path.read_bytes() for path in paths}) == 1


def test_the_condition_goes_first_on_the_root_prompt(tmp_path):
    condition = CountdownProtocol().condition(4)
    record = evaluate(make_runner(), PROBLEMS[:1], tmp_path / "apr.jsonl", name="apr", condition=condition)[0]
    assert record.condition == condition
    prompt = TOKENIZER.decode(record.thread_tree.root.blocks[0].content)
    assert prompt.startswith(condition + trace.moving("0"))


def test_no_problems_are_no_records(tmp_path):
    assert evaluate(make_runner(), [], tmp_path / "none.jsonl", name="apr") == []
    assert summarise([])["n"] == 0


def test_a_broken_records_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(Record(0, "apr", "", {}, True, True, {}).line() + '{"index": 1')
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_its_rate_and_mirrors(case):
    right, total = case
    low, high = wilson_interval(right, total)
    assert 0 <= low <= high <= 1
    if total:
        assert low <= right / total <= high
        mirrored = wilson_interval(total - right, total)
        assert mirrored == pytest.approx((1 - high, 1 - low))


def test_a_paired_difference_counts_what_changed():
    before = [record(i, i < 54, 10, 10, problem={"i": i}) for i in range(100)]
    after = [record(i, 4 <= i < 63, 10, 10, problem={"i": i}) for i in range(100)]
    mean, low, high, gained, lost = paired_difference(before, after)
    assert (gained, lost) == (9, 4) and mean == pytest.approx(0.05)
    rng, differences = random.Random(0), [int(b.correct) - int(a.correct) for a, b in zip(before, after)]
    drawn = sorted(sum(rng.choices(differences, k=100)) / 100 for _ in range(4000))  # the bootstrap, as an oracle
    assert (low, high) == pytest.approx((drawn[100], drawn[3900]), abs=0.015)
    assert paired_difference(before, before)[:3] == (0, 0, 0)
    with pytest.raises(ValueError, match="the same problems"):
        paired_difference(before, after[::-1])


def test_wilson_interval_known_values_and_errors():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(834, 1000) == pytest.approx((0.8097, 0.8558), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)
    for right, total in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="right"):
            wilson_interval(right, total)


def record(index, correct, longest, sequential, **changes):
    base = Record(
        index, "toy", "", {}, correct, correct, {}, longest_context=longest, sequential_tokens=sequential, tree={}
    )
    return dataclasses.replace(base, **changes)


def test_summary_of_four_records():
    records = [
        record(0, True, 100, 150, children=2, operations=4, operations_right=4),
        record(1, True, 300, 350, children=4, operations=4, operations_right=2),
        record(2, False, 90, 90, failures={"length": 2, "malformed:empty": 1}, malformed={"empty": 1}, guarded=3),
        record(3, False, 80, 80, failures={"tokens": 1}),
    ]
    assert accuracy_by_window(records, [99, 100, 299, 300]) == [(99, 0.0), (100, 0.25), (299, 0.25), (300, 0.5)]
    assert accuracy_by_sequential(records, [100, 400]) == [(100, 0.0), (400, 0.5)]
    summary = summarise(records)
    assert (summary["n"], summary["ran"], summary["right"], summary["accuracy"]) == (4, 4, 2, 0.5)
    assert summary["children"] == 1.5 and summary["operations_right"] == 0.75
    assert summary["failures"] == {"length": 2, "malformed:empty": 1, "tokens": 1}
    assert summary["malformed"] == {"empty": 1} and summary["guarded"] == 3
    assert summary["accuracy_by_window"][-1][1] == summary["accuracy"]
    assert json.loads(json.dumps(summary))["accuracy_low"] == wilson_interval(2, 4)[0]


@given(st.lists(st.integers(0, 5000), max_size=5))
def test_even_edges_hold_every_value(values):
    edges = even_edges(values)
    assert len(edges) <= 8 and edges == sorted(set(edges)) and edges[-1] >= max([*values, 0])
