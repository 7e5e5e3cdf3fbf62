"""The jitted parts of the JAX engine: prefill of some slots, copies between slots, and a decode loop over some of them.

All run under `shard_map`: every device has its own slots and its own loop, with no collective inside, so that a device
whose slots have all ended does not wait for the others.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from apr_jax.model.cache import LayerCache, cached_attention, copy, put, take
from apr_jax.model.family import Model

Array = jax.Array
NO_POSITION = jnp.iinfo(jnp.int32).max  # of a token that is none: past every width


class SlotInputs(NamedTuple):
    """What the loop needs of its slots, [S] each. A slot with no steps left does not run."""

    rows: Array  # int32, the slot's row among its device's own; one past the last is no slot
    tokens: Array  # int32, the last id, not yet in the cache
    positions: Array  # int32, its position
    steps: Array  # int32, most tokens to sample in this call
    keys: Array  # uint32 [S, 2], the sequence's identity


class SlotOutputs(NamedTuple):
    tokens: Array  # int32 [S, n]
    logprobs: Array  # float32 [S, n], under the distribution drawn from
    model_logprobs: Array  # float32 [S, n], under the model's own
    counts: Array  # int32 [S], tokens sampled


class DecodeState(NamedTuple):
    """What the loop carries from one token to the next."""

    step: Array  # int32 [], tokens drawn so far: the column of `out` that comes next
    cache: list[LayerCache]  # of the call's slots: by layer k and v [S, K, width, H]
    tokens: Array  # int32 [S], the last id of each slot, not yet in the cache
    active: Array  # bool [S], which slots go on
    out: SlotOutputs  # [S, n] each, filled up to column `step`


class Distribution(NamedTuple):
    """How a token is drawn, as numbers; `apr_jax.threads.engine.Sampling` says what they mean."""

    temperature: Array  # float32
    top_k: Array  # int32, at least 1
    top_p: Array  # float32


def sample(
    logits_SxV: Array, keys_Sx2: Array, positions_S: Array, how: Distribution, truncated: bool
) -> tuple[Array, Array, Array]:
    """A token per row, its log-probability under the distribution drawn from and under the model. The draw depends on
    the row's own key and position alone. Temperature 0 takes the largest logit and reports the model's own
    log-probability. `truncated`: whether top-k and top-p are looked at, which costs a sort.

    One uniform number a row, looked up in the cumulated probabilities: Gumbel noise would need a number per row and
    word, which on the CPU took a tenth of a small model's step.
    """
    greedy = how.temperature == 0
    scaled_SxV = logits_SxV / jnp.where(greedy, 1.0, how.temperature)
    if truncated:
        scaled_SxV = jnp.where(greedy, scaled_SxV, truncate(scaled_SxV, how))
    normaliser_S = jax.nn.logsumexp(scaled_SxV, axis=1)
    probabilities_SxV = jnp.exp(scaled_SxV - normaliser_S[:, None])
    # Sums of different words are rounded differently, so a cumulated one may rise at a word of probability 0: such
    # words are left out by name.
    possible_SxV = probabilities_SxV > 0
    cumulated_SxV = jnp.where(possible_SxV, jnp.cumsum(probabilities_SxV, axis=1), 0)

    def uniform(key, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position))

    u_S = jax.vmap(uniform)(keys_Sx2, positions_S) * jnp.max(cumulated_SxV, axis=1)
    drawn_S = jnp.argmax(possible_SxV & (cumulated_SxV > u_S[:, None]), axis=1)
    tokens_S = jnp.where(greedy, jnp.argmax(scaled_SxV, axis=1), drawn_S).astype(jnp.int32)

    def chosen(x_SxV):
        return jnp.take_along_axis(x_SxV, tokens_S[:, None], axis=1)[:, 0]

    model_S = chosen(logits_SxV) - jax.nn.logsumexp(logits_SxV, axis=1)
    return tokens_S, chosen(scaled_SxV) - normaliser_S, model_S


def truncate(scaled_SxV: Array, how: Distribution) -> Array:
    """Logits with all but the tokens that top-k and then top-p keep at minus infinity; `Sampling` defines both. At
    least one token stays, whatever float32 makes of `top_p`, and `top_p` 1 takes none away."""
    sorted_SxV = jnp.sort(scaled_SxV, axis=1, descending=True)
    V = sorted_SxV.shape[1]
    inside_1xV = jnp.arange(V)[None] < how.top_k
    probabilities_SxV = jax.nn.softmax(jnp.where(inside_1xV, sorted_SxV, -jnp.inf), axis=1)
    # The mass of a token and of all behind it. A token goes where this fits into what may be left out; the small ones
    # are added up first, as in transformers.
    rest_SxV = jax.lax.cumsum(probabilities_SxV, axis=1, reverse=True)
    kept_SxV = inside_1xV & ((how.top_p >= 1) | (rest_SxV > 1 - how.top_p))
    count_S = jnp.maximum(jnp.sum(kept_SxV, axis=1), 1)
    least_Sx1 = jnp.take_along_axis(sorted_SxV, count_S[:, None] - 1, axis=1)
    above_SxV, tied_SxV = scaled_SxV > least_Sx1, scaled_SxV == least_Sx1
    places_Sx1 = count_S[:, None] - jnp.sum(above_SxV, axis=1, keepdims=True)  # left for tokens that are tied
    chosen_SxV = above_SxV | (tied_SxV & (jnp.cumsum(tied_SxV, axis=1) <= places_Sx1))
    return jnp.where(chosen_SxV, scaled_SxV, -jnp.inf)


@functools.cache
def make_prefill(graphdef, mesh: Mesh, width: int):
    """prefill(weights, cache, rows [B], tokens [B, T], first [B], counts [B]) -> cache: the first `counts` of `tokens`
    stand at the positions from `first` on, all before `width`.

    B splits over the devices; `rows` count within a device's own slots, one past its last is no slot.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), *(P("data"),) * 5), out_specs=P("data"))
    def prefill(weights, pool: list[LayerCache], rows_B, tokens_BxT, first_B, counts_B):
        model: Model = nnx.merge(graphdef, weights)
        T = tokens_BxT.shape[1]
        at_1xT = jnp.arange(T)[None]
        positions_BxT = jnp.where(at_1xT < counts_B[:, None], first_B[:, None] + at_1xT, NO_POSITION)
        _, cache = model.hidden(tokens_BxT, positions_BxT, cached_attention(positions_BxT), take(pool, rows_B, width))
        return put(pool, rows_B, cache, first_B, T)

    return prefill


@functools.cache
def make_copy(mesh: Mesh, width: int):
    """copy(cache, sources [B], targets [B]) -> cache: slots' first `width` positions; B splits over the devices, rows
    count within a device's own slots."""

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"))
    def copy_slots(pool: list[LayerCache], sources_B, targets_B):
        return copy(pool, sources_B, targets_B, width)

    return copy_slots


@functools.cache
def make_decode(graphdef, mesh: Mesh, width: int, steps: int, truncated: bool):
    """decode(weights, cache, inputs [S], leave [devices], stop [V], how) -> (cache, outputs): up to `steps` tokens a
    slot, none of which may come to stand at position `width` or later.

    S splits over the devices and need not be all slots. A slot ends with a stop token (kept) or when its own
    steps are spent; a device's loop ends when no more than its `leave` slots run.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data"), P(), P()), out_specs=P("data")
    )
    def decode(weights, pool: list[LayerCache], inputs: SlotInputs, leave_1, stop_V, how: Distribution):
        model: Model = nnx.merge(graphdef, weights)
        S = inputs.tokens.shape[0]
        zeros_Sxn = jnp.zeros((S, steps))
        blank = SlotOutputs(zeros_Sxn.astype(jnp.int32), zeros_Sxn, zeros_Sxn, jnp.zeros(S, jnp.int32))
        blank = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), blank)

        def running(state: DecodeState):
            return (state.step < steps) & (jnp.sum(state.active) > leave_1[0])

        def body(state: DecodeState) -> DecodeState:
            step, cache, tokens_S, active_S, out = state
            # A slot that does not run writes past the width, that is nowhere.
            positions_S = jnp.where(active_S, inputs.positions + step, NO_POSITION)
            positions_Sx1 = positions_S[:, None]
            hidden_Sx1xD, cache = model.hidden(tokens_S[:, None], positions_Sx1, cached_attention(positions_Sx1), cache)
            drawn = sample(model.logits(hidden_Sx1xD[:, 0]), inputs.keys, positions_S, how, truncated)

            def noted(column_Sxn, value_S):
                return column_Sxn.at[:, step].set(jnp.where(active_S, value_S, 0))

            out = SlotOutputs(*map(noted, out[:3], drawn), out.counts + active_S)
            active_S = active_S & ~stop_V[drawn[0]] & (step + 1 < inputs.steps)
            return DecodeState(step + 1, cache, drawn[0], active_S, out)

        begin = DecodeState(
            step=jnp.zeros((), jnp.int32),
            cache=take(pool, inputs.rows, width),
            tokens=inputs.tokens,
            active=inputs.steps > 0,
            out=blank,
        )
        end = jax.lax.while_loop(running, body, begin)
        return put(pool, inputs.rows, end.cache, inputs.positions, min(steps, width)), end.out

    return decode
