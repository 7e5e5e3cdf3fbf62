"""Tests of factor search: its problems and demonstrations, and nested trees in the runner."""

import asyncio
import random

import pytest

from apr_jax.tasks.tagged.factors import PHRASES, Factors, Span, solve, spans
from apr_jax.tasks.tagged.protocol import TagProtocol, tag_tokenizer
from apr_jax.threads import decode_tree, encode_tree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.metrics import depth
from apr_jax.threads.run import Budget, TreeRunner, run_all
from tests.threads.fake_engine import scripted, scripts_of

TOKENIZER = tag_tokenizer(PHRASES, 60)
PROBLEMS = random.Random(0).sample(spans(60), 60)


def encoded(problem, inherit):
    return encode_tree(solve(problem, inherit), TOKENIZER.encode, TOKENIZER.bos, TOKENIZER.eos)


def test_answers_are_smallest_divisors():
    for problem in PROBLEMS:
        dividing = [d for d in range(problem.first, problem.last + 1) if problem.number % d == 0]
        assert problem.divisor == (dividing[0] if dividing else None)
        assert Factors().correct(problem, str(dividing[0]) if dividing else None)
        assert not Factors().correct(problem, "1") and not Factors().correct(problem, "")
    with pytest.raises(ValueError, match="5 to 4"):
        Span(10, 5, 4)


def test_steps_counts_the_tried_candidates():
    assert Factors().steps("15/2 no\n15/3 yes\n15/4 yes\n15/0 no\n") == (2, 4)


@pytest.mark.parametrize("inherit", [False, True])
def test_the_runner_replays_the_solver(inherit):
    """With nested children, of a fresh context or their parent's, all blocks of the solver's tree are reproduced."""
    trees = [encoded(problem, inherit) for problem in PROBLEMS]
    assert max(map(depth, trees)) == 2
    scripts = {}
    for index, tree in enumerate(trees):
        scripts |= scripts_of(tree, (index,))
    engine = scripted(scripts, shuffle=1)
    runner = TreeRunner(engine, TagProtocol(Factors(), inherit), TOKENIZER, Budget(128, depth=2), Sampling())
    jobs = [lambda i=i: runner.run(PROBLEMS[i], (i,)) for i in range(len(PROBLEMS))]
    for tree, problem, played in zip(trees, PROBLEMS, asyncio.run(run_all(jobs))):
        assert decode_tree(played, TOKENIZER.decode).root == decode_tree(tree, TOKENIZER.decode).root
        assert played.outcome.correct and played.outcome.answered == (problem.divisor is not None)
    assert not engine.live and len(set(engine.names)) == len(engine.names)
