"""Packed attention against the dense reference, and the visibility of tokens in packed rows."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apr_jax.data.packing import first_fit, flatten_thread, pack_rows
from apr_jax.model.attention import attend_masked, packed_attention, visible
from apr_jax.threads import Block, Spawn, Thread
from apr_jax.train.loss import row_logits, supervised_loss
from apr_jax.train.step import Trainer, data_mesh
from tests.tiny import TOKENIZER, make_model, plain_logits, random_thread


def packed_rows(seed, row_length, rows, longest):
    """Packed rows [rows + 1, row_length] of random trees with padding; the last row is padding alone. Blocks have up to
    `longest` tokens, in one tree of three up to four times as many, so that some segments fill most of a row."""
    rng = random.Random(seed)
    segments = []
    while sum(map(len, segments)) < 0.8 * row_length * rows:
        size = longest * rng.choice([1, 1, 4])
        segments += [flatten_thread(thread) for thread in random_thread(rng, longest=size).walk()]
    segments = [segment for segment in segments if len(segment) <= row_length]
    chosen = first_fit([len(segment) for segment in segments], row_length)[:rows]
    return pack_rows([[segments[i] for i in row] for row in chosen], row_length, rows + 1)


def arrays(seed, rows, heads, kv_heads, size=8):
    """Random queries, keys, values and a cotangent of the output, for packed rows."""
    B, T = rows.enter.shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, T, heads, size), (B, T, kv_heads, size), (B, T, kv_heads, size), (B, T, heads, size))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def close(a, b, tolerance=2e-5):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@pytest.mark.parametrize(
    "row_length, heads, kv_heads, longest",
    [(40, 4, 2, 4), (128, 2, 2, 8), (200, 4, 1, 12), (512, 4, 2, 30), (700, 2, 1, 90), (2048, 1, 1, 60)],
)
def test_packed_attention_equals_dense_attention_forward_and_backward(row_length, heads, kv_heads, longest):
    rows = packed_rows(row_length, row_length, 2, longest)
    q, k, v, cotangent = arrays(1, rows, heads, kv_heads)
    real = jnp.asarray(rows.exit > rows.enter)
    assert 0 < real.mean() < 1
    cotangent = jnp.where(real[:, :, None, None], cotangent, 0.0)  # no loss depends on padding

    @jax.jit
    def packed(q, k, v):
        out, back = jax.vjp(lambda *x: packed_attention(rows.enter, rows.exit)(*x, None)[0], q, k, v)
        return out, back(cotangent)

    @jax.jit
    def dense(q, k, v):
        mask = visible(jnp.asarray(rows.enter), jnp.asarray(rows.exit))
        out, back = jax.vjp(lambda *x: attend_masked(*x, mask), q, k, v)
        return out, back(cotangent)

    (out, gradients), (right, right_gradients) = packed(q, k, v), dense(q, k, v)
    assert np.isfinite(out).all(), "padding must not give NaN"
    close(jnp.where(real[:, :, None, None], out, 0.0), jnp.where(real[:, :, None, None], right, 0.0))
    for gradient, other in zip(gradients, right_gradients):
        assert np.isfinite(gradient).all()
        close(gradient, other)


def test_rows_of_padding_alone_are_finite_forward_and_backward():
    padding = pack_rows([[]], 256)
    q, k, v, cotangent = arrays(2, padding, 2, 1)
    out, back = jax.vjp(lambda *x: packed_attention(padding.enter, padding.exit)(*x, None)[0], q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *back(cotangent)))


def test_a_token_sees_the_context_of_its_block():
    thread = Thread(
        (
            Block((1, 2), False), Block((3,), True),
            Spawn((Block((4, 5), True), Block((6,), False)), (), Block((7,), False)), Block((8,), True),
        )
    )  # fmt: skip
    rows = pack_rows([[flatten_thread(thread), flatten_thread(Thread((Block((9, 1), False),)))]], 12)
    seen = np.asarray(visible(jnp.asarray(rows.enter), jnp.asarray(rows.exit)))[0].astype(int)
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],  # the call: the context before it, and itself
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0],  # the join: it does not see the call
        [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],  # another tree
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # padding
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]


@pytest.fixture(scope="module")
def logits_of():
    """A function of packed rows: the logits after each token's predecessor, [B, T, V]."""
    model = make_model(1)
    logits = jax.jit(lambda rows: row_logits(model, rows))
    return lambda rows: np.asarray(logits(rows))


@pytest.mark.parametrize("seed", range(3))
def test_a_token_changes_only_what_follows_it_on_its_own_path(logits_of, seed):
    rows = packed_rows(seed, 256, 1, 8)
    before = logits_of(rows)
    enter, exit_ = rows.enter[0], rows.exit[0]
    rng = random.Random(seed)
    real = np.flatnonzero(exit_ > enter)
    for j in [*rng.sample(real.tolist(), 8), 255]:  # the last is padding
        changed = dataclasses.replace(rows, tokens=rows.tokens.copy())
        changed.tokens[0, j] = (changed.tokens[0, j] + 1) % len(TOKENIZER)
        moved = np.abs(logits_of(changed)[0] - before[0]).max(axis=-1) > 0
        predecessor = rows.predecessors[0]
        predicted = predecessor >= 0
        behind = np.maximum(predecessor, 0)
        sees = (enter[j] <= enter[behind]) & (enter[behind] < exit_[j]) & (behind >= j)
        assert (moved == sees)[predicted].all()


def test_the_logits_of_a_packed_thread_are_those_of_its_context_alone(logits_of):
    """The reference is the plain forward of each thread's context: calls and other trees have no effect on the tokens
    after a join."""
    rng = random.Random(5)
    threads = [thread for _ in range(3) for thread in random_thread(rng, longest=6).walk()][:8]
    rows = pack_rows([[flatten_thread(thread) for thread in threads]], 256)
    logits, at, model = logits_of(rows)[0], 0, make_model(1)
    assert any(thread.spawns for thread in threads)
    for thread in threads:
        segment = flatten_thread(thread)
        context = [token for block in thread.context for token in block.content]
        plain = plain_logits(model, context)
        stays = np.flatnonzero(segment.exit == segment.nodes)
        assert segment.tokens[stays].tolist() == context and segment.positions[stays].tolist() == list(
            range(len(context))
        )
        close(logits[at + stays[1:]], plain[:-1], 1e-4)
        at += len(segment)


@pytest.mark.gpu
def test_a_step_with_the_fused_kernel_equals_a_dense_one():
    """Forward and backward, inside the trainer's shard_map, in bfloat16."""
    rows, found = packed_rows(5, 512, 3, 40), {}
    for kind in ("cudnn", "dense"):
        model = make_model(1, width=128, heads=2, kv_heads=2, dtype="bfloat16", attention=kind)
        loss = functools.partial(supervised_loss, mode="all")
        trainer = Trainer(model, loss, optax.sgd(1.0), data_mesh(1))
        state, sums = trainer.step(trainer.init(model), [rows])
        found[kind] = [float(sums["loss"]), float(sums["gradient_norm"])]
    np.testing.assert_allclose(found["cudnn"], found["dense"], rtol=2e-2)
