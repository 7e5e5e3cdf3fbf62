"""Sums: every way to share them out gives the right answer through the runner, and does the same work."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.tags import SUM_WORDS, DigitSum, SumTask, TagProtocol, solve_sum, tag_tokenizer
from apr_jax.threads import decode_tree, encode_tree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.metrics import children, sequential_tokens, total_tokens
from apr_jax.threads.run import Budget, TreeRunner, run_all
from tests.threads.fake_engine import scripted, scripts_of

TOKENIZER = tag_tokenizer(SUM_WORDS, 9)
PROTOCOL = TagProtocol(SumTask(), inherit=True)


def encoded(tree):
    return encode_tree(tree, TOKENIZER.encode, TOKENIZER.bos, TOKENIZER.eos)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=26), st.integers(1, 30))
def test_every_way_to_share_out_is_right_and_does_the_same_work(digits, parts):
    problem = DigitSum(tuple(digits))
    if parts > len(digits):
        with pytest.raises(ValueError, match=f"1 to {len(digits)} parts, was given {parts}"):
            solve_sum(problem, parts)
        return
    tree = solve_sum(problem, parts)
    texts = [thread.text for thread in tree.threads()]
    assert PROTOCOL.correct(problem, texts[0]) and PROTOCOL.result(texts[0])[1:] == str(sum(digits) % 10)
    assert children(tree) == (parts if parts > 1 else 0)
    counts = [PROTOCOL.steps(text) for text in texts]
    assert all(right == all_ for right, all_ in counts)
    assert sum(n for _, n in counts) == len(digits) + (parts if parts > 1 else 0)
    assert all(PROTOCOL.child_correct(child.text) for child in tree.root.children)


def test_more_threads_are_a_shorter_chain_and_more_tokens():
    problem = DigitSum(tuple(random.Random(0).choices(range(10), k=26)))
    alone, shared = (encoded(solve_sum(problem, parts)) for parts in (1, 4))
    assert sequential_tokens(shared) < 0.8 * sequential_tokens(alone)
    assert total_tokens(shared) > 1.3 * total_tokens(alone)


def test_the_runner_replays_the_solver():
    problems = [DigitSum(tuple(random.Random(i).choices(range(10), k=26))) for i in range(12)]
    trees = [encoded(solve_sum(problem, 1 + i % 6)) for i, problem in enumerate(problems)]
    scripts = {}
    for index, tree in enumerate(trees):
        scripts |= scripts_of(tree, (index,))
    runner = TreeRunner(scripted(scripts, shuffle=1), PROTOCOL, TOKENIZER, Budget(256), Sampling())
    played = asyncio.run(run_all([lambda i=i: runner.run(problems[i], (i,)) for i in range(len(problems))]))
    for tree, mine in zip(trees, played):
        assert decode_tree(mine, TOKENIZER.decode).root == decode_tree(tree, TOKENIZER.decode).root
        assert mine.info["correct"]


def test_wrong_answers_and_problems_are_told():
    problem = DigitSum((3, 4))
    assert SumTask().correct(problem, "B7")
    assert not any(SumTask().correct(problem, wrong) for wrong in ("B8", "A7", "b7", "7", "", None))
    assert SumTask().steps("a:a3+0=3\nb:b9+3=2\nb=B9+3=3\n") == (2, 3)
    assert not PROTOCOL.child_correct("a to c\n<return>B3</return>")
    assert not PROTOCOL.child_correct("<return>B3</return>")
    for wrong in ((), (10,), (1,) * 27):
        with pytest.raises(ValueError, match="1 to 26 digits"):
            DigitSum(wrong)
