"""The compiled functions of the JAX engine: prefill of slots, copies between slots, and the decode loop.

A slot is one row of the key/value cache (`apr_jax.model.cache`). Each function runs under `shard_map` and contains no
collective: every device works on its own slots. So a device whose slots have all ended does not wait for the others.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from apr_jax.model.cache import LayerCache, cached_attention, copy, put, take
from apr_jax.model.family import Model

Array = jax.Array
BY_DEVICE, REPLICATED = PartitionSpec("data"), PartitionSpec()
NO_POSITION = jnp.iinfo(jnp.int32).max  # of padding and of slots that do not run: writes there are dropped


class SlotInputs(NamedTuple):
    """The inputs of one decode call for its P slots. A slot whose `steps` are 0 does not run."""

    rows: Array  # int32 [P], the slot's row in its device's cache; the number of rows stands for "no slot"
    tokens: Array  # int32 [P], the sequence's last id, whose key and value are not in the cache yet
    positions: Array  # int32 [P], the position of that id
    steps: Array  # int32 [P], most tokens to sample in this call
    keys: Array  # uint32 [P, 2], random key data that identifies the sequence


class SlotOutputs(NamedTuple):
    """The tokens that one decode call sampled for P slots. T is the largest number of steps of a call. In a slot's row
    the entries from its count on are 0."""

    tokens: Array  # int32 [P, T]
    logprobs: Array  # float32 [P, T], under the distribution that the token was drawn from
    model_logprobs: Array  # float32 [P, T], under the model's softmax: temperature 1, all tokens
    counts: Array  # int32 [P], tokens sampled


class DecodeState(NamedTuple):
    """The state that the decode loop carries from one token to the next."""

    step: Array  # int32 [], steps done so far: the next step writes this column of `out`
    cache: list[LayerCache]  # of the call's slots: k and v [P, K, width, H] for each layer
    tokens: Array  # int32 [P], the last id of each slot, whose key and value are not in the cache yet
    active: Array  # bool [P], whether the slot samples another token
    out: SlotOutputs  # filled up to column `step`


class Distribution(NamedTuple):
    """The values of a `Sampling` (apr_jax.threads.engine) as scalar arrays."""

    temperature: Array  # float32
    top_k: Array  # int32, at least 1
    top_p: Array  # float32


def sample(
    logits_PxV: Array, keys_Px2: Array, positions_P: Array, how: Distribution, truncated: bool
) -> tuple[Array, Array, Array]:
    """Sample one token for each of P rows.

    Returns three [P] arrays: the token, its log-probability under the distribution it was drawn from, and its
    log-probability under the model. A draw depends on its row's key and position alone. Temperature 0 takes the largest
    logit and returns the model's log-probability twice. Without `truncated` top-k and top-p are ignored, which saves a
    sort.

    Each row draws one uniform number and looks it up in the cumulative probabilities. Gumbel noise would need one
    number per row and token of the vocabulary, which on the CPU took a tenth of a small model's step.
    """
    greedy = how.temperature == 0
    scaled_PxV = logits_PxV / jnp.where(greedy, 1.0, how.temperature)
    if truncated:
        scaled_PxV = jnp.where(greedy, scaled_PxV, truncate(scaled_PxV, how))
    normaliser_P = jax.nn.logsumexp(scaled_PxV, axis=1)
    probabilities_PxV = jnp.exp(scaled_PxV - normaliser_P[:, None])
    # Partial sums are rounded differently, so the cumulative sum may rise at a token of probability 0. Such tokens are
    # excluded explicitly.
    possible_PxV = probabilities_PxV > 0
    cumulative_PxV = jnp.where(possible_PxV, jnp.cumsum(probabilities_PxV, axis=1), 0)

    def uniform(key, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position))

    u_P = jax.vmap(uniform)(keys_Px2, positions_P) * jnp.max(cumulative_PxV, axis=1)
    drawn_P = jnp.argmax(possible_PxV & (cumulative_PxV > u_P[:, None]), axis=1)
    tokens_P = jnp.where(greedy, jnp.argmax(scaled_PxV, axis=1), drawn_P).astype(jnp.int32)

    def chosen(x_PxV):
        return jnp.take_along_axis(x_PxV, tokens_P[:, None], axis=1)[:, 0]

    model_P = chosen(logits_PxV) - jax.nn.logsumexp(logits_PxV, axis=1)
    return tokens_P, chosen(scaled_PxV) - normaliser_P, model_P


def truncate(scaled_PxV: Array, how: Distribution) -> Array:
    """Mask logits by top-k and then top-p: tokens that are cut get minus infinity. `Sampling` defines both.

    At least one token stays, even where `top_p` rounds to 0 in float32. A `top_p` of 1 cuts none.
    """
    sorted_PxV = jnp.sort(scaled_PxV, axis=1, descending=True)
    V = sorted_PxV.shape[1]
    inside_1xV = jnp.arange(V)[None] < how.top_k
    probabilities_PxV = jax.nn.softmax(jnp.where(inside_1xV, sorted_PxV, -jnp.inf), axis=1)
    # The probability of a token and of all less likely ones together. A token is cut where this sum is at most
    # 1 - top_p. The smallest probabilities are added first, as in transformers.
    rest_PxV = jax.lax.cumsum(probabilities_PxV, axis=1, reverse=True)
    kept_PxV = inside_1xV & ((how.top_p >= 1) | (rest_PxV > 1 - how.top_p))
    count_P = jnp.maximum(jnp.sum(kept_PxV, axis=1), 1)
    least_Px1 = jnp.take_along_axis(sorted_PxV, count_P[:, None] - 1, axis=1)
    above_PxV, tied_PxV = scaled_PxV > least_Px1, scaled_PxV == least_Px1
    places_Px1 = count_P[:, None] - jnp.sum(above_PxV, axis=1, keepdims=True)  # left for ties at the last place
    chosen_PxV = above_PxV | (tied_PxV & (jnp.cumsum(tied_PxV, axis=1) <= places_Px1))
    return jnp.where(chosen_PxV, scaled_PxV, -jnp.inf)


@functools.cache
def make_prefill(graphdef, mesh: Mesh, width: int):
    """Make the jitted function prefill(weights, cache, rows [B], tokens [B, T], first [B], counts [B]) -> cache.

    It computes the keys and values of B prompts into their slots: of `tokens` the first `counts`, at the positions
    from `first` on. All positions must be below `width`. B is split over the devices; `rows` are the slots' rows in
    their device's cache, and the number of rows stands for "no slot". The cache is donated.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(REPLICATED, *(BY_DEVICE,) * 5), out_specs=BY_DEVICE)
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
    """Make the jitted function copy(cache, sources [B], targets [B]) -> cache.

    It copies the first `width` positions of slots to other slots of the same device. B is split over the devices;
    `sources` and `targets` are rows in the device's cache, and a target equal to the number of rows is dropped. The
    cache is donated.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(BY_DEVICE,) * 3, out_specs=BY_DEVICE)
    def copy_slots(pool: list[LayerCache], sources_B, targets_B):
        return copy(pool, sources_B, targets_B, width)

    return copy_slots


@functools.cache
def make_decode(graphdef, mesh: Mesh, width: int, steps: int, truncated: bool):
    """Make the jitted function decode(weights, cache, inputs, refill_at [devices], stop [V], how) -> (cache, outputs).

    It samples up to `steps` tokens for each of P slots, which need not be all slots. P is split over the devices. A
    slot ends with a token that `stop` marks, which is kept, or after its own `inputs.steps` tokens. A device's loop
    ends as soon as no more than its `refill_at` slots still run, so that the engine can refill the others. The
    position of every sampled token must be below `width`. The cache is donated.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(REPLICATED, BY_DEVICE, BY_DEVICE, BY_DEVICE, REPLICATED, REPLICATED),
        out_specs=BY_DEVICE,
    )
    def decode(weights, pool: list[LayerCache], inputs: SlotInputs, refill_at_1, stop_V, how: Distribution):
        model: Model = nnx.merge(graphdef, weights)
        P = inputs.tokens.shape[0]
        zeros_PxT = jnp.zeros((P, steps))
        blank = SlotOutputs(zeros_PxT.astype(jnp.int32), zeros_PxT, zeros_PxT, jnp.zeros(P, jnp.int32))
        blank = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), blank)

        def running(state: DecodeState):
            return (state.step < steps) & (jnp.sum(state.active) > refill_at_1[0])

        def body(state: DecodeState) -> DecodeState:
            step, cache, tokens_P, active_P, out = state
            # A slot that does not run gets NO_POSITION, so that its write to the cache is dropped.
            positions_P = jnp.where(active_P, inputs.positions + step, NO_POSITION)
            positions_Px1 = positions_P[:, None]
            hidden_Px1xD, cache = model.hidden(tokens_P[:, None], positions_Px1, cached_attention(positions_Px1), cache)
            drawn = sample(model.logits(hidden_Px1xD[:, 0]), inputs.keys, positions_P, how, truncated)

            def write_step(out_PxT, value_P):
                return out_PxT.at[:, step].set(jnp.where(active_P, value_P, 0))

            out = SlotOutputs(*map(write_step, out[:3], drawn), out.counts + active_P)
            active_P = active_P & ~stop_V[drawn[0]] & (step + 1 < inputs.steps)
            return DecodeState(step + 1, cache, drawn[0], active_P, out)

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
