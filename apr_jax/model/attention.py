"""Attention over packed rows of thread trees.

A row holds several trees of tokens, each flattened depth first. `enter` and `exit` are integers of each token: the
interval of its node in the tree, in the numbering of a depth-first walk. Token i sees token j where
``enter[j] <= enter[i] < exit[j]`` and j is not later in the row. This means that j is on the path from the root to i;
along one path, tokens are in the row's order. The intervals of different trees in one row do not overlap. Padding has
-1 for both numbers: it sees no token, and no token sees it.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
MASKED = -1e30  # the score of a key that a query does not see; finite, since -inf gives NaN for a query without keys


def visible(enter_BxT: Array, exit_BxT: Array) -> Array:
    """Return which key (last axis) each query sees, bool [B, T, T]."""
    T = enter_BxT.shape[1]
    enter_q = enter_BxT[:, :, None]
    on_path = (enter_BxT[:, None, :] <= enter_q) & (enter_q < exit_BxT[:, None, :])
    return on_path & jnp.tri(T, dtype=bool)[None]


def attend_masked(q_BxTxNxH: Array, k_BxSxKxH: Array, v_BxSxKxH: Array, mask_BxTxS: Array) -> Array:
    """Return softmax attention under a boolean mask, [B, T, N, H], computed over all keys. It is the reference in
    the tests of the faster kinds of `packed_attention`. Each key/value head is shared by N / K consecutive query
    heads."""
    B, T, N, H = q_BxTxNxH.shape
    K = k_BxSxKxH.shape[2]
    q = q_BxTxNxH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BxSxKxH, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(mask_BxTxS[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BxSxKxH.dtype), v_BxSxKxH).reshape(B, T, N, H)


def packed_attention(enter_BxT: Array, exit_BxT: Array, kind: str = "auto", dtype: str = "float32"):
    """Return the attention function of packed rows, an `Attend` of apr_jax.model.family. It passes a layer's carry
    through unchanged.

    `kind` is one of:

    * "dense": `attend_masked`.
    * "blocked": computes only the blocks of keys that some query of a block can see; for CPUs.
    * "cudnn": NVIDIA's fused kernel, which takes the mask as a bias [B, 1, T, T] and needs bfloat16.
    * "auto": blocked where JAX's default backend is the CPU, else cudnn for bfloat16 on CUDA, else dense.
    """
    if kind == "auto":
        cpu, cuda = jax.default_backend() == "cpu", jax.default_backend() == "gpu"
        kind = "blocked" if cpu else "cudnn" if cuda and dtype == "bfloat16" else "dense"
    if kind == "blocked":
        return _blocked_attention(enter_BxT, exit_BxT)
    mask_BxTxT = visible(enter_BxT, exit_BxT)
    if kind == "dense":
        return lambda q, k, v, carry: (attend_masked(q, k, v, mask_BxTxT), carry)

    def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, carry):
        out = jax.nn.dot_product_attention(
            q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask=mask_BxTxT[:, None], implementation="cudnn"
        )
        return out, carry

    return attend


def _blocked_attention(enter_BxT: Array, exit_BxT: Array):
    """Return the "blocked" attention of `packed_attention`.

    Each block of queries attends to the blocks of keys from the first one that it sees up to its own. Segments are
    stored one after the other in a row, so no query sees a key before its segment's beginning, and most blocks see few
    blocks. Each number of blocks of keys is a compiled branch.
    """
    B, T = enter_BxT.shape
    block = _block_size(T)
    pad = -T % block
    I = (T + pad) // block
    enter_BxT, exit_BxT = (jnp.pad(x_BxT, ((0, 0), (0, pad)), constant_values=-1) for x_BxT in (enter_BxT, exit_BxT))
    back_BxI = _blocks_back(enter_BxT, exit_BxT, block)

    def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, carry):
        N, H, K = *q_BxTxNxH.shape[2:], k_BxTxKxH.shape[2]
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH))
        # The N / K query heads that share a key head become more queries of a block: products are larger, and keys and
        # values are not repeated.
        q_BxKxQxH = q.reshape(B, I, block, K, N // K, H).transpose(0, 3, 1, 4, 2, 5).reshape(B, K, -1, H)
        out = _blocked(q_BxKxQxH, k.swapaxes(1, 2), v.swapaxes(1, 2), enter_BxT, exit_BxT, back_BxI)
        out = out.reshape(B, K, I, N // K, block, H).transpose(0, 2, 4, 1, 3, 5)
        return out.reshape(B, T + pad, N, H)[:, :T], carry

    return attend


def _block_size(T: int) -> int:
    """Return the tokens of a block for rows of `T` tokens: at least 64, and at most sixteen blocks a row, since each
    number of blocks is a branch to compile."""
    return min(T, max(64, -(-T // 16 // 64) * 64))


def _blocks_back(enter_BxT: Array, exit_BxT: Array, block: int) -> Array:
    """Return, for each block of queries, how many blocks before its own it attends to: int32 [B, I]."""
    B, T = enter_BxT.shape
    I = T // block
    seen_BxIxI = visible(enter_BxT, exit_BxT).reshape(B, I, block, I, block).any(axis=(2, 4))
    return jnp.where(seen_BxIxI.any(axis=2), jnp.arange(I)[None, :] - jnp.argmax(seen_BxIxI, axis=2), 0)


def _for_each_block(step, carry, sharing: int, enter_BxT: Array, exit_BxT: Array, back_BxI: Array):
    """Scan ``carry = step(carry, row, index, keys, mask_QxS)`` over all blocks of queries of all rows and return the
    last carry. `row` and `index` are the block's row and its number in it. `keys` (static) is the number of keys that
    the block attends to, which end with the block itself. `mask_QxS` says which of them each query sees; its queries
    are the block's tokens, repeated for each of the `sharing` query heads that share a key head."""
    B, I = back_BxI.shape
    block = enter_BxT.shape[1] // I

    def branch(blocks: int):
        keys = blocks * block

        def run(carry, row, index):
            first = (index - blocks + 1) * block
            enter_q = jax.lax.dynamic_slice(enter_BxT, (row, index * block), (1, block))[0][:, None]
            enter_k, exit_k = (jax.lax.dynamic_slice(x_BxT, (row, first), (1, keys)) for x_BxT in (enter_BxT, exit_BxT))
            not_later = jnp.arange(keys)[None, :] <= jnp.arange(keys - block, keys)[:, None]
            mask = (enter_k <= enter_q) & (enter_q < exit_k) & not_later
            return step(carry, row, index, keys, jnp.tile(mask, (sharing, 1)))

        return run

    branches = [branch(blocks) for blocks in range(1, I + 1)]

    def body(carry, at):
        row, index = at // I, at % I
        return jax.lax.switch(back_BxI[row, index], branches, carry, row, index), None

    return jax.lax.scan(body, carry, jnp.arange(B * I))[0]


def _cut(x: Array, row, stop, length: int) -> Array:
    """Return the `length` entries before `stop` on the third axis of `x` [B, K, any, ...], in row `row`: [K, length,
    ...]."""
    start = (row, 0, stop - length, *(0,) * (x.ndim - 3))
    return jax.lax.dynamic_slice(x, start, (1, x.shape[1], length, *x.shape[3:]))[0]


def _put(x: Array, value: Array, row, stop, add: bool) -> Array:
    """Return `x` [B, K, any, ...] with `value` [K, length, ...] written, or with `add` added, where `_cut` reads."""
    length = value.shape[1]
    if add:
        value = value + _cut(x, row, stop, length)
    return jax.lax.dynamic_update_slice(x, value[None].astype(x.dtype), (row, 0, stop - length, *(0,) * (x.ndim - 3)))


@jax.custom_vjp
def _blocked(
    q_BxKxQxH: Array, k_BxKxTxH: Array, v_BxKxTxH: Array, enter_BxT: Array, exit_BxT: Array, back_BxI: Array
) -> Array:
    """Return attention in which each query sees the keys that `visible` allows, [B, K, Q, H]. The Q = (N / K) * T
    queries of a key head are the T tokens' queries in the N / K query heads that share it. They are ordered by block of
    tokens, then by query head, then by token. `back_BxI` is the result of `_blocks_back`."""
    return _blocked_forward(q_BxKxQxH, k_BxKxTxH, v_BxKxTxH, enter_BxT, exit_BxT, back_BxI)[0]


def _sizes(q_BxKxQxH: Array, k_BxKxTxH: Array, back_BxI: Array) -> tuple[int, int, int, float]:
    """Return (query heads that share a key head, queries of a block over all of them, keys of a block, scale of
    scores)."""
    I, Q, T = back_BxI.shape[1], q_BxKxQxH.shape[2], k_BxKxTxH.shape[2]
    return Q // T, Q // I, T // I, q_BxKxQxH.shape[-1] ** -0.5


def _blocked_forward(q_BxKxQxH, k_BxKxTxH, v_BxKxTxH, enter_BxT, exit_BxT, back_BxI):
    """Return the attention [B, K, Q, H], and the arrays that the backward pass needs."""
    sharing, queries, block, scale = _sizes(q_BxKxQxH, k_BxKxTxH, back_BxI)

    def step(carry, row, index, keys, mask_QxS):
        out_BxKxQxH, normaliser_BxKxQ = carry
        end, stop = (index + 1) * queries, (index + 1) * block
        q_KxQxH = _cut(q_BxKxQxH, row, end, queries)
        k_KxSxH, v_KxSxH = _cut(k_BxKxTxH, row, stop, keys), _cut(v_BxKxTxH, row, stop, keys)
        scores = jnp.einsum("kqh,ksh->kqs", q_KxQxH, k_KxSxH, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(mask_QxS[None], scores, MASKED)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out_KxQxH = jnp.einsum("kqs,ksh->kqh", weights.astype(v_KxSxH.dtype), v_KxSxH) / total
        normaliser_KxQ = (highest + jnp.log(total))[..., 0]
        return (
            _put(out_BxKxQxH, out_KxQxH, row, end, add=False),
            _put(normaliser_BxKxQ, normaliser_KxQ, row, end, add=False),
        )

    q = q_BxKxQxH
    empty = (jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32) + 0 * q[..., 0].astype(jnp.float32))
    out_BxKxQxH, normaliser_BxKxQ = _for_each_block(step, empty, sharing, enter_BxT, exit_BxT, back_BxI)
    saved = (q_BxKxQxH, k_BxKxTxH, v_BxKxTxH, enter_BxT, exit_BxT, back_BxI, out_BxKxQxH, normaliser_BxKxQ)
    return out_BxKxQxH, saved


def _blocked_backward(saved, d_out_BxKxQxH):
    """Return the gradients of `_blocked`'s arguments. The softmax weights are computed again from the saved
    normaliser, as in flash attention (arXiv 2205.14135)."""
    q_BxKxQxH, k_BxKxTxH, v_BxKxTxH, enter_BxT, exit_BxT, back_BxI, out_BxKxQxH, normaliser_BxKxQ = saved
    sharing, queries, block, scale = _sizes(q_BxKxQxH, k_BxKxTxH, back_BxI)
    dtype = q_BxKxQxH.dtype
    shift_BxKxQ = jnp.sum(d_out_BxKxQxH.astype(jnp.float32) * out_BxKxQxH.astype(jnp.float32), axis=-1)

    def step(carry, row, index, keys, mask_QxS):
        d_q_BxKxQxH, d_k_BxKxTxH, d_v_BxKxTxH = carry
        end, stop = (index + 1) * queries, (index + 1) * block
        q_KxQxH = _cut(q_BxKxQxH, row, end, queries)
        k_KxSxH, v_KxSxH = _cut(k_BxKxTxH, row, stop, keys), _cut(v_BxKxTxH, row, stop, keys)
        d_KxQxH = _cut(d_out_BxKxQxH, row, end, queries)
        scores = jnp.einsum("kqh,ksh->kqs", q_KxQxH, k_KxSxH, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(mask_QxS[None], scores, MASKED)
        weights = jnp.exp(scores - _cut(normaliser_BxKxQ, row, end, queries)[..., None])
        d_weights = jnp.einsum("kqh,ksh->kqs", d_KxQxH, v_KxSxH, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - _cut(shift_BxKxQ, row, end, queries)[..., None]) * scale).astype(dtype)
        # The gradients of keys and values are computed transposed: on the CPU that order is twice as fast.
        d_v_KxSxH = jnp.einsum("kqh,kqs->khs", d_KxQxH, weights.astype(dtype)).swapaxes(1, 2)
        d_k_KxSxH = jnp.einsum("kqh,kqs->khs", q_KxQxH, d_scores).swapaxes(1, 2)
        d_q_KxQxH = jnp.einsum("kqs,ksh->kqh", d_scores, k_KxSxH)
        return (
            _put(d_q_BxKxQxH, d_q_KxQxH, row, end, add=False),
            _put(d_k_BxKxTxH, d_k_KxSxH, row, stop, add=True),
            _put(d_v_BxKxTxH, d_v_KxSxH, row, stop, add=True),
        )

    zeros = tuple(jnp.zeros_like(x) for x in (q_BxKxQxH, k_BxKxTxH, v_BxKxTxH))
    gradients = _for_each_block(step, zeros, sharing, enter_BxT, exit_BxT, back_BxI)
    return *gradients, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
