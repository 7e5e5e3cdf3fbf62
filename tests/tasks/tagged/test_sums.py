"""Tests of sums: every number of parts gives the correct result and adds every number."""

import asyncio
import random

import pytest

from apr_jax.tasks.tagged.protocol import TagProtocol, tag_tokenizer
from apr_jax.tasks.tagged.sums import PHRASES, RangeSum, Sums, range_sums, solve_sum
from apr_jax.threads import decode_tree, encode_tree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.metrics import children, sampled_tokens, sequential_tokens
from apr_jax.threads.run import Budget, TreeRunner, run_all
from tests.threads.fake_engine import scripted, scripts_of

TOKENIZER = tag_tokenizer(PHRASES, 99)
PROTOCOL = TagProtocol(Sums())


def encoded(tree):
    return encode_tree(tree, TOKENIZER.encode, TOKENIZER.bos, TOKENIZER.eos)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_every_number_of_parts_is_correct_and_adds_every_number(parts):
    problems = range_sums()
    assert len(set(problems)) == 1000
    for problem in random.Random(parts).sample(problems, 50):
        tree = solve_sum(problem, parts)
        texts = [thread.text for thread in tree.threads()]
        total = (problem.start + sum(range(problem.first, problem.last + 1))) % 10
        assert PROTOCOL.correct(problem, texts[0]) and PROTOCOL.result(texts[0]) == f"{problem.last}:{total}"
        assert children(tree) == (parts if parts > 1 else 0)
        counts = [PROTOCOL.steps(text) for text in texts]
        assert all(right == all_ for right, all_ in counts)
        assert sum(n for _, n in counts) == problem.last - problem.first + 1 + children(tree)


def test_more_threads_have_fewer_sequential_tokens_and_more_tokens_in_total():
    alone, two, four = (encoded(solve_sum(RangeSum(13, 62, 4), parts)) for parts in (1, 2, 4))
    assert sequential_tokens(four) < sequential_tokens(two) < 0.75 * sequential_tokens(alone)
    assert sampled_tokens(four) > sampled_tokens(two) > 1.1 * sampled_tokens(alone)


def test_the_runner_replays_the_solver():
    problems = random.Random(0).sample(range_sums(), 12)
    trees = [encoded(solve_sum(problem, (1, 2, 4)[i % 3])) for i, problem in enumerate(problems)]
    scripts = {}
    for index, tree in enumerate(trees):
        scripts |= scripts_of(tree, (index,))
    runner = TreeRunner(scripted(scripts, shuffle=1), PROTOCOL, TOKENIZER, Budget(384), Sampling())
    played = asyncio.run(run_all([lambda i=i: runner.run(problems[i], (i,)) for i in range(len(problems))]))
    for tree, mine in zip(trees, played):
        assert decode_tree(mine, TOKENIZER.decode).root == decode_tree(tree, TOKENIZER.decode).root
        assert mine.outcome.correct


def test_wrong_results_and_wrong_problems_are_recognized():
    problem = RangeSum(24, 55, 0)
    right = sum(range(24, 56)) % 10
    assert Sums().correct(problem, f"55:{right}")
    assert not any(Sums().correct(problem, wrong) for wrong in (f"54:{right}", f"55:{right - 1}", "55", "", None))
    assert Sums().steps("13+0=3\n14+3=8\n39:9+3=2\n") == (2, 3)
    for wrong in ((9, 60, 0), (25, 60, 0), (10, 54, 0), (10, 60, 10)):
        with pytest.raises(ValueError, match=f"{wrong[0]}.*{wrong[1]}.*{wrong[2]}"):
            RangeSum(*wrong)
    with pytest.raises(ValueError, match="parts.*1, 2, 4.*3"):
        solve_sum(problem, 3)
