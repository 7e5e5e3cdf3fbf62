"""Attention over packed rows of thread trees.

A row holds several trees of tokens, each laid out depth first. Node intervals say who sees whom: token i
sees token j where ``enter[j] <= enter[i] < exit[j]`` and j is not later in the row (on one path, row order
is path order). The same rule keeps the trees of one row apart; padding has an empty interval.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
MASKED = -1e30  # finite: a row of padding, which sees nothing, must not give NaN


def visible(enter_BxT: Array, exit_BxT: Array, start: int = 0, stop: int | None = None) -> Array:
    """Which keys 0..stop the queries start..stop see: bool [B, stop - start, stop]."""
    stop = enter_BxT.shape[1] if stop is None else stop
    enter_q = enter_BxT[:, start:stop, None]
    on_path = (enter_BxT[:, None, :stop] <= enter_q) & (enter_q < exit_BxT[:, None, :stop])
    not_later = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
    return on_path & not_later[None]


def attend_masked(q_BxTxNxH: Array, k_BxSxKxH: Array, v_BxSxKxH: Array, mask_BxTxS: Array) -> Array:
    """Dense softmax attention under a boolean mask; the oracle. Grouped heads share their K of N."""
    B, T, N, H = q_BxTxNxH.shape
    K = k_BxSxKxH.shape[2]
    q = q_BxTxNxH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BxSxKxH, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(mask_BxTxS[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BxSxKxH.dtype), v_BxSxKxH).reshape(B, T, N, H)


@jax.custom_vjp
def _softmax_attention(q_BxNxTxH: Array, k_BxNxSxH: Array, v_BxNxSxH: Array, mask_Bx1xTxS: Array) -> Array:
    return _softmax_attention_forward(q_BxNxTxH, k_BxNxSxH, v_BxNxSxH, mask_Bx1xTxS)[0]


def _softmax_attention_forward(q, k, v, mask):
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("bnts,bnsh->bnth", weights, v)
    return out, (q, k, v, weights, out)


def _softmax_attention_backward(saved, d_out):
    """Written out because it is half the passes over [T, S] that autodiff makes, and because the
    gradients of keys and values come out transposed: on the CPU that order of the product is twice as fast."""
    q, k, v, weights, out = saved
    d_v = jnp.einsum("bnth,bnts->bnhs", d_out, weights).swapaxes(2, 3)
    d_weights = jnp.einsum("bnth,bnsh->bnts", d_out, v)
    d_scores = weights * (d_weights - jnp.sum(d_out * out, axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    d_q = jnp.einsum("bnts,bnsh->bnth", d_scores, k)
    d_k = jnp.einsum("bnth,bnts->bnhs", q, d_scores).swapaxes(2, 3)
    return d_q, d_k, d_v, None


_softmax_attention.defvjp(_softmax_attention_forward, _softmax_attention_backward)


def packed_attention(enter_BxT: Array, exit_BxT: Array, block: int):
    """An `Attend` for packed rows, in blocks of queries that only look back: the half of the matrix above
    the diagonal costs nothing. `attend_masked` under `visible` is its oracle."""
    T = enter_BxT.shape[1]
    edges = [*range(0, T, block), T]
    spans = list(zip(edges, edges[1:]))
    masks = [visible(enter_BxT, exit_BxT, start, stop)[:, None] for start, stop in spans]

    def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, carry):
        repeats = q_BxTxNxH.shape[2] // k_BxTxKxH.shape[2]
        q, k, v = (x.swapaxes(1, 2) for x in (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH))
        if repeats > 1:
            k, v = (jnp.repeat(x, repeats, axis=1) for x in (k, v))
        out = [
            _softmax_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask)
            for (start, stop), mask in zip(spans, masks)
        ]
        return jnp.concatenate(out, axis=2).swapaxes(1, 2), carry

    return attend
