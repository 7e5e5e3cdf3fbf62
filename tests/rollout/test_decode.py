"""How tokens are drawn: greedily, from the softmax, and from what top-k and top-p leave of it."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from apr_jax.rollout.decode import Distribution, sample
from apr_jax.rollout.engine import JaxEngine
from apr_jax.threads.engine import Sampling
from apr_jax.train.step import data_mesh
from tests.tiny import TOKENIZER, log_softmax, make_model, plain_logits


def distribution(temperature, top_k=40, top_p=1.0):
    return Distribution(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def chi_square(counts, probabilities):
    """p-value; rare tokens are one bin."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum())[: None if rare.any() else -1] for x in (counts, expected))
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature):
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32) * 1.5
    n = 20_000
    keys = np.random.default_rng(1).integers(0, 2**32, (n, 2), np.uint32)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (n, 40))
    how = distribution(temperature)
    tokens, logprobs, model_logprobs = sample(rows, keys, jnp.full(n, 11, jnp.int32), how, truncated=False)
    right = log_softmax(logits / temperature)
    assert chi_square(np.bincount(tokens, minlength=40), np.exp(right)) > 1e-3
    np.testing.assert_allclose(logprobs, right[np.asarray(tokens)], atol=1e-5)
    np.testing.assert_allclose(model_logprobs, log_softmax(logits)[np.asarray(tokens)], atol=1e-5)
    again, *_ = sample(rows, keys[:1].repeat(n, axis=0), jnp.arange(n, dtype=jnp.int32), how, truncated=False)
    assert chi_square(np.bincount(again, minlength=40), np.exp(right)) > 1e-3, "positions of one sequence are as good"


def kept(logits, temperature, top_k, top_p):
    """The words that may be drawn, by the definition: the likeliest first, until there are k, until they have p."""
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    scaled = logits[order] / temperature
    probabilities = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    before = np.cumsum(probabilities) - probabilities
    return order[before < top_p]


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 5, 1.0), (1.0, 0, 0.6), (0.7, 8, 0.8), (1.0, 1, 1.0), (1.0, 0, 1e-6)]
)
def test_truncated_draws_follow_the_softmax_of_what_is_kept(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32) * 1.5
    n = 20_000
    keys = np.random.default_rng(1).integers(0, 2**32, (n, 2), np.uint32)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (n, 40))
    how = distribution(temperature, top_k or 40, top_p)
    tokens, logprobs, model_logprobs = map(
        np.asarray, sample(rows, keys, jnp.full(n, 11, jnp.int32), how, truncated=True)
    )
    allowed = kept(logits, temperature, top_k, top_p)
    assert set(tokens) == set(allowed), "every one of them is drawn, and no other"
    right = np.full(40, -np.inf)
    right[allowed] = log_softmax(logits[allowed] / temperature)
    np.testing.assert_allclose(logprobs, right[tokens], atol=1e-5)
    np.testing.assert_allclose(model_logprobs, log_softmax(logits)[tokens], atol=1e-5)
    counts = np.bincount(tokens, minlength=40)[allowed]
    assert len(allowed) == 1 or chi_square(counts, np.exp(right[allowed])) > 1e-3


def test_greedy_takes_the_largest_logit_and_the_model_s_own_log_probability():
    logits = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    keys = np.zeros((50, 2), np.uint32)
    for truncated in (False, True):
        tokens, logprobs, model_logprobs = sample(
            jnp.asarray(logits), keys, jnp.arange(50, dtype=jnp.int32), distribution(0.0, 3, 0.5), truncated
        )
        assert (np.asarray(tokens) == logits.argmax(axis=1)).all()
        np.testing.assert_allclose(logprobs, log_softmax(logits).max(axis=1), atol=1e-5)
        np.testing.assert_array_equal(logprobs, model_logprobs)


def test_an_engine_s_draws_follow_the_model_s_softmax():
    plain, mesh = make_model(1), data_mesh(min(2, jax.device_count()))  # one on a GPU
    engine = JaxEngine(plain, mesh, slots=64, context=64, steps=1)
    prompt = (1, 9, 30)

    async def one(name):
        sequence = engine.open(prompt, (name,))
        decoded = await engine.decode(sequence, frozenset(), 1, Sampling(0.8))
        engine.free(sequence)
        return decoded.ids[0]

    async def all_of_them():
        return await asyncio.gather(*(one(name) for name in range(1536)))

    tokens = asyncio.run(all_of_them())
    right = np.exp(log_softmax(plain_logits(plain, prompt)[-1] / 0.8))
    assert chi_square(np.bincount(tokens, minlength=len(TOKENIZER)), right) > 1e-3
