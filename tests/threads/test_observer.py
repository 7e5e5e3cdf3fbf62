"""The observer of a runner: its events give every thread exactly, and change nothing."""

import asyncio

import pytest

from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner, run_all
from tests.threads.fake_engine import drawing
from tests.threads.recorder import Recorder, check_recorded
from tests.tiny import TOKENIZER, NonsenseProtocol

LIKELY = tuple(
    map(TOKENIZER.token, (NonsenseProtocol.spawn_open, NonsenseProtocol.spawn_close, NonsenseProtocol.join_open))
) + (TOKENIZER.eos,)


@pytest.mark.parametrize("inherit", [False, True])
@pytest.mark.parametrize("malformed", ["stop", "fail"])
def test_events_give_every_thread_exactly_and_change_nothing(inherit, malformed):
    """Among random tokens are malformed spawns, openings of joins that are replaced, threads that are cut off, and
    prompts that do not fit."""

    def run(observer):
        engine = drawing(len(TOKENIZER), LIKELY, shuffle=3)
        budget = Budget(48, threads=12, depth=2, min_children=1, malformed=malformed)
        runner = TreeRunner(engine, NonsenseProtocol(2, inherit), TOKENIZER, budget, Sampling(1.0), observer)
        jobs = [lambda i=i: runner.run(i, (4, i)) for i in range(60)]
        trees = asyncio.run(run_all(jobs))
        assert not engine.live
        return trees

    recorder = Recorder()
    trees = run(recorder)
    assert trees == run(None)  # log-probabilities too
    check_recorded(recorder, {(4, i): tree for i, tree in enumerate(trees)})
    assert recorder.again == 0
    kinds = {kind for kind, _ in recorder.events}
    assert kinds == {"started", "decoded", "replaced", "spawned", "joined", "ended"}
    assert any(tree.outcome.suppressed_joins for tree in trees) and any(tree.outcome.malformed for tree in trees)
    assert any(tree.outcome.forced_spawns for tree in trees) and any(tree.outcome.failures for tree in trees)


def test_an_error_of_an_observer_ends_the_run():
    class Broken(Recorder):
        def decoded(self, name, at, ids):
            raise ZeroDivisionError

    engine = drawing(len(TOKENIZER), LIKELY, shuffle=1)
    runner = TreeRunner(engine, NonsenseProtocol(2), TOKENIZER, Budget(48), Sampling(1.0), Broken())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(runner.run(0, (0,)))
    assert not engine.live
