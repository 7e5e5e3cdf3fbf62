"""Attention over packed rows of thread trees.

A row holds several trees of tokens, each laid out depth first. Node intervals say who sees whom: token i
sees token j where ``enter[j] <= enter[i] < exit[j]`` and j is not later in the row (on one path, row order
is path order). The same rule keeps the trees of one row apart; padding (both -1) sees nothing and
is seen by nothing.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
MASKED = -1e30  # finite: a row of padding, which sees nothing, must not give NaN


def visible(enter_BxT: Array, exit_BxT: Array) -> Array:
    """Which key (last axis) each query sees: bool [B, T, T]."""
    T = enter_BxT.shape[1]
    enter_q = enter_BxT[:, :, None]
    on_path = (enter_BxT[:, None, :] <= enter_q) & (enter_q < exit_BxT[:, None, :])
    return on_path & jnp.tri(T, dtype=bool)[None]


def attend_masked(q_BxTxNxH: Array, k_BxSxKxH: Array, v_BxSxKxH: Array, mask_BxTxS: Array) -> Array:
    """Dense softmax attention under a boolean mask; the oracle. Grouped heads share their K of N."""
    B, T, N, H = q_BxTxNxH.shape
    K = k_BxSxKxH.shape[2]
    q = q_BxTxNxH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BxSxKxH, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(mask_BxTxS[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BxSxKxH.dtype), v_BxSxKxH).reshape(B, T, N, H)


def packed_attention(enter_BxT: Array, exit_BxT: Array, kind: str = "auto", dtype: str = "float32"):
    """An `Attend` for packed rows (`Attend` of apr_jax.model.family).

    kind: "dense", the oracle; "blocked", whose cost follows the blocks that are seen, for CPUs; "cudnn", the fused
    kernel of NVIDIA's library, which takes the mask as a bias [B, 1, T, T] and bfloat16 only; "auto": blocked where
    JAX's default backend is the CPU, else cudnn for bfloat16 on CUDA, else dense.
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
    """Queries go block by block, row by row, each over the blocks from the first that it sees to its own:
    segments lie one behind the other in a row, so a thread never looks back past its own beginning. How many
    blocks those are picks one of a few compiled branches. `attend_masked` under `visible` is the oracle.
    """
    B, T = enter_BxT.shape
    block = _block_size(T)
    pad = -T % block
    n = (T + pad) // block
    enter, exit_ = (jnp.pad(x, ((0, 0), (0, pad)), constant_values=-1) for x in (enter_BxT, exit_BxT))
    back = _blocks_back(enter, exit_, block)

    def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, carry):
        N, H, K = *q_BxTxNxH.shape[2:], k_BxTxKxH.shape[2]
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH))
        # The N / K heads that share keys are more queries of a block: larger products, and nothing is repeated.
        q = q.reshape(B, n, block, K, N // K, H).transpose(0, 3, 1, 4, 2, 5).reshape(B, K, -1, H)
        out = _blocked(q, k.swapaxes(1, 2), v.swapaxes(1, 2), enter, exit_, back)
        out = out.reshape(B, K, n, N // K, block, H).transpose(0, 2, 4, 1, 3, 5)
        return out.reshape(B, T + pad, N, H)[:, :T], carry

    return attend


def _block_size(T: int) -> int:
    """At least 64 and at most sixteen blocks a row: every count of blocks is a branch to compile."""
    return min(T, max(64, -(-T // 16 // 64) * 64))


def _blocks_back(enter_BxT: Array, exit_BxT: Array, block: int) -> Array:
    """For each block of queries [B, T / block] over how many blocks of keys it must go, less one."""
    B, T = enter_BxT.shape
    n = T // block
    seen = visible(enter_BxT, exit_BxT).reshape(B, n, block, n, block).any(axis=(2, 4))
    return jnp.where(seen.any(axis=2), jnp.arange(n)[None, :] - jnp.argmax(seen, axis=2), 0)


def _for_each_block(step, carry, groups: int, enter: Array, exit_: Array, back: Array):
    """Scans ``step(carry, row, index, keys, mask)`` over all blocks of queries of all rows: `keys` is the number of
    keys that go with it (static), `mask` what it sees of them [groups * block, keys], the same for every group."""
    B, n = back.shape
    block = enter.shape[1] // n

    def branch(blocks: int):
        keys = blocks * block

        def run(carry, row, index):
            first = (index - blocks + 1) * block
            enter_q = jax.lax.dynamic_slice(enter, (row, index * block), (1, block))[0][:, None]
            enter_k, exit_k = (jax.lax.dynamic_slice(x, (row, first), (1, keys)) for x in (enter, exit_))
            not_later = jnp.arange(keys)[None, :] <= jnp.arange(keys - block, keys)[:, None]
            mask = (enter_k <= enter_q) & (enter_q < exit_k) & not_later
            return step(carry, row, index, keys, jnp.tile(mask, (groups, 1)))

        return run

    branches = [branch(blocks) for blocks in range(1, n + 1)]

    def body(carry, at):
        row, index = at // n, at % n
        return jax.lax.switch(back[row, index], branches, carry, row, index), None

    return jax.lax.scan(body, carry, jnp.arange(B * n))[0]


def _cut(x: Array, row, stop, length: int) -> Array:
    """[N, length, ...] of row `row` that ends before `stop`."""
    start = (row, 0, stop - length, *(0,) * (x.ndim - 3))
    return jax.lax.dynamic_slice(x, start, (1, x.shape[1], length, *x.shape[3:]))[0]


def _put(x: Array, value: Array, row, stop, add: bool) -> Array:
    """`x` with `value` [N, length, ...] written, or added, where `_cut` reads."""
    length = value.shape[1]
    if add:
        value = value + _cut(x, row, stop, length)
    return jax.lax.dynamic_update_slice(x, value[None].astype(x.dtype), (row, 0, stop - length, *(0,) * (x.ndim - 3)))


@jax.custom_vjp
def _blocked(q: Array, k: Array, v: Array, enter: Array, exit_: Array, back: Array) -> Array:
    """Attention of q [B, K, groups * T, H], block by block and group by group, and k, v [B, K, T, H], under the tree
    mask; the same shape as q."""
    return _blocked_forward(q, k, v, enter, exit_, back)[0]


def _sizes(q: Array, k: Array, back: Array) -> tuple[int, int, int, float]:
    """(groups that share a key, queries of a block over all groups, keys of a block, scale of scores)."""
    n = back.shape[1]
    return q.shape[2] // k.shape[2], q.shape[2] // n, k.shape[2] // n, q.shape[-1] ** -0.5


def _blocked_forward(q, k, v, enter, exit_, back):
    groups, queries, block, scale = _sizes(q, k, back)

    def step(carry, row, index, keys, mask):
        out, normaliser = carry
        end, stop = (index + 1) * queries, (index + 1) * block
        q_i, k_i, v_i = _cut(q, row, end, queries), _cut(k, row, stop, keys), _cut(v, row, stop, keys)
        scores = jnp.einsum("nqh,nkh->nqk", q_i, k_i, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(mask[None], scores, MASKED)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out_i = jnp.einsum("nqk,nkh->nqh", weights.astype(v.dtype), v_i) / total
        normaliser_i = (highest + jnp.log(total))[..., 0]
        return _put(out, out_i, row, end, add=False), _put(normaliser, normaliser_i, row, end, add=False)

    empty = (jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32) + 0 * q[..., 0].astype(jnp.float32))
    out, normaliser = _for_each_block(step, empty, groups, enter, exit_, back)
    return out, (q, k, v, enter, exit_, back, out, normaliser)


def _blocked_backward(saved, d_out):
    """The weights are computed again from the saved normaliser, as flash attention does."""
    q, k, v, enter, exit_, back, out, normaliser = saved
    groups, queries, block, scale = _sizes(q, k, back)
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def step(carry, row, index, keys, mask):
        d_q, d_k, d_v = carry
        end, stop = (index + 1) * queries, (index + 1) * block
        q_i, k_i, v_i = _cut(q, row, end, queries), _cut(k, row, stop, keys), _cut(v, row, stop, keys)
        d_i = _cut(d_out, row, end, queries)
        scores = jnp.einsum("nqh,nkh->nqk", q_i, k_i, preferred_element_type=jnp.float32) * scale
        weights = jnp.exp(jnp.where(mask[None], scores, MASKED) - _cut(normaliser, row, end, queries)[..., None])
        d_weights = jnp.einsum("nqh,nkh->nqk", d_i, v_i, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - _cut(shift, row, end, queries)[..., None]) * scale).astype(q.dtype)
        # The gradients of keys and values are made transposed: on the CPU that order is twice as fast.
        d_v_i = jnp.einsum("nqh,nqk->nhk", d_i, weights.astype(q.dtype)).swapaxes(1, 2)
        d_k_i = jnp.einsum("nqh,nqk->nhk", q_i, d_scores).swapaxes(1, 2)
        d_q_i = jnp.einsum("nqk,nkh->nqh", d_scores, k_i)
        return (
            _put(d_q, d_q_i, row, end, add=False),
            _put(d_k, d_k_i, row, stop, add=True),
            _put(d_v, d_v_i, row, stop, add=True),
        )

    zeros = tuple(jnp.zeros_like(x) for x in (q, k, v))
    d_q, d_k, d_v = _for_each_block(step, zeros, groups, enter, exit_, back)
    return d_q, d_k, d_v, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
