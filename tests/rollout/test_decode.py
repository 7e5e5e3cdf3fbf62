"""Sampling of tokens: greedy, from the softmax, and from the softmax cut by top-k and top-p."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TopKLogitsWarper, TopPLogitsWarper

from apr_jax.errors import UserError
from apr_jax.rollout.decode import Distribution, sample, truncate
from apr_jax.rollout.engine import JaxEngine
from apr_jax.threads.engine import Sampling
from apr_jax.train.step import data_mesh
from tests.tiny import TOKENIZER, log_softmax, make_model, plain_logits


def distribution(temperature, top_k=40, top_p=1.0):
    return Distribution(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def chi_square(counts, probabilities):
    """The p-value of a chi-square test; tokens that are expected less than 5 times share one bin."""
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
    assert chi_square(np.bincount(again, minlength=40), np.exp(right)) > 1e-3, (
        "positions of one sequence are as independent"
    )


def kept(logits, temperature, top_k, top_p):
    """The tokens that top-k and top-p keep, by the definition: the likeliest k, and of these the likeliest until their
    probabilities add up to p."""
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    scaled = logits[order] / temperature
    probabilities = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    before = np.cumsum(probabilities) - probabilities
    return order[before < top_p]


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 5, 1.0), (1.0, 0, 0.6), (0.7, 8, 0.8), (1.0, 1, 1.0), (1.0, 0, 1e-6)]
)
def test_truncated_draws_follow_the_softmax_of_the_kept_tokens(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32) * 1.5
    n = 20_000
    keys = np.random.default_rng(1).integers(0, 2**32, (n, 2), np.uint32)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (n, 40))
    how = distribution(temperature, top_k or 40, top_p)
    tokens, logprobs, model_logprobs = map(
        np.asarray, sample(rows, keys, jnp.full(n, 11, jnp.int32), how, truncated=True)
    )
    allowed = kept(logits, temperature, top_k, top_p)
    assert set(tokens) == set(allowed), "every kept token is drawn, and no other"
    right = np.full(40, -np.inf)
    right[allowed] = log_softmax(logits[allowed] / temperature)
    np.testing.assert_allclose(logprobs, right[tokens], atol=1e-5)
    np.testing.assert_allclose(model_logprobs, log_softmax(logits)[tokens], atol=1e-5)
    counts = np.bincount(tokens, minlength=40)[allowed]
    assert len(allowed) == 1 or chi_square(counts, np.exp(right[allowed])) > 1e-3


def truncated(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities [P, V] from which the JAX engine samples, with top-k and top-p applied."""
    how = distribution(temperature, min(top_k or logits.shape[1], logits.shape[1]), top_p)
    return np.asarray(jax.nn.softmax(truncate(jnp.asarray(logits) / how.temperature, how), axis=1))


def truncated_by_transformers(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities [P, V] from which transformers samples, with top-k and top-p applied."""
    scores = torch.tensor(logits) / temperature
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    for warper in [*warpers, *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]:
        scores = warper(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize(
    "top_k, top_p",
    [(20, 1.0), (1, 1.0), (300, 1.0), (5000, 1.0), (0, 0.9), (0, 0.05), (0, 0.999), (20, 0.9), (20, 0.3), (5000, 0.6)],
)
def test_top_k_then_top_p_are_those_of_transformers(temperature, top_k, top_p):
    """For distinct logits: tied ones are in the next test."""
    rng = np.random.default_rng(top_k)
    quantiles = np.tile(stats.norm.ppf((np.arange(300) + 0.5) / 300), (200, 1))
    logits = (rng.permuted(quantiles, axis=1) * rng.uniform(0.5, 5, (200, 1))).astype(np.float32)
    assert all(len(np.unique(row / np.float32(temperature))) == 300 for row in logits)
    mine, theirs = (cut(logits, temperature, top_k, top_p) for cut in (truncated, truncated_by_transformers))
    assert ((mine > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("top_k, top_p", [(20, 1.0), (1, 1.0), (7, 0.5), (0, 0.5), (0, 0.97)])
def test_of_equally_likely_tokens_the_lower_id_is_kept_first(top_k, top_p):
    """Logits of nine values, since bfloat16 makes many logits equal. Our top-k keeps exactly k tokens. That of
    transformers keeps all tokens as likely as the k-th, and its sort decides which of equal tokens top-p cuts."""
    logits = np.random.default_rng(3).integers(-4, 5, (200, 200)).astype(np.float32) / 2
    mine, theirs = (cut(logits, 1.0, top_k, top_p) for cut in (truncated, truncated_by_transformers))
    for row, found, other in zip(logits, mine, theirs, strict=True):
        allowed = kept(row.astype(np.float64), 1.0, top_k, top_p)
        assert set(np.flatnonzero(found)) == set(allowed)
        if top_p == 1:
            assert len(allowed) == top_k and set(allowed) <= set(np.flatnonzero(other))
        if top_k == 0:
            assert sorted(row[allowed]) == sorted(row[other > 0])
        right = np.exp(log_softmax(row[allowed].astype(np.float64)))
        np.testing.assert_allclose(found[allowed], right, rtol=1e-5)


def test_a_top_p_of_one_cuts_no_token():
    """Even where float32 sums lose a tail of a millionth of the probability, spread over 50,000 tokens."""
    logits = np.full((1, 50_000), -14.0, np.float32)
    logits[0, ::5000] = np.arange(10)
    for top_k in (0, 49_999, 50_000, 10**6, 2**40):
        assert (truncated(logits, top_k=top_k) > 0).sum() == min(top_k or 50_000, 50_000)


@pytest.mark.parametrize("top_p", [1e-50, 1e-45, 1e-30, 1e-7])
@pytest.mark.parametrize("top_k", [0, 3])
def test_the_smallest_top_p_keeps_the_likeliest_token(top_p, top_k):
    logits = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    found = truncated(logits, top_p=top_p, top_k=top_k)
    assert (found.argmax(axis=1) == logits.argmax(axis=1)).all() and (found.max(axis=1) == 1).all()
    how = distribution(1.0, top_k or 40, top_p)
    tokens, logprobs, _ = sample(jnp.asarray(logits), np.zeros((50, 2), np.uint32), jnp.arange(50), how, True)
    assert (np.asarray(tokens) == logits.argmax(axis=1)).all() and (np.asarray(logprobs) == 0).all()


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=10**12), Sampling(1.0, top_p=1e-50), Sampling(1e-6)])
def test_an_engine_accepts_every_sampling_that_is_allowed(sampling):
    engine = JaxEngine(make_model(1), data_mesh(1), slots=1, context=64, steps=4)
    decoded = asyncio.run(engine.decode(engine.open((1, 9, 30), (0,)), frozenset(), 4, sampling))
    assert np.isfinite(decoded.logprobs).all() and np.isfinite(decoded.model_logprobs).all()
    if sampling.top_p < 1 or sampling.temperature < 1:
        assert decoded.ids[0] == plain_logits(make_model(1), (1, 9, 30))[-1].argmax()


@pytest.mark.parametrize(
    "given",
    [{"temperature": 1e-50}, {"temperature": 1e-7}, {"temperature": float("nan")}, {"temperature": float("inf")},
     {"top_p": float("nan")}, {"top_k": 2.5}],
)  # fmt: skip
def test_settings_that_float32_cannot_represent_are_refused(given):
    with pytest.raises(UserError, match=f"{next(iter(given))}.* {next(iter(given.values()))}"):
        Sampling(**given)


def test_greedy_returns_the_largest_logit_and_the_model_s_own_log_probability():
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
    plain, mesh = make_model(1), data_mesh(min(2, jax.device_count()))  # 1 on a machine with one GPU
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
