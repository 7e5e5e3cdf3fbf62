"""The jitted parts of the JAX engine: prefill of some slots, and a decode loop over some of them.

Both run under `shard_map`: every device has its own slots and its own loop, with no collective inside, so
that a device whose slots have all ended does not wait for the others.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from apr_jax.model.cache import LayerCache, cached_attention, put, take
from apr_jax.model.llama import Llama

Array = jax.Array


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
    counts: Array  # int32 [S], tokens sampled


def sample(logits_SxV: Array, keys_Sx2: Array, positions_S: Array, temperature: Array) -> tuple[Array, Array]:
    """A token per row and its log-probability. The draw depends on the row's own key and position alone.
    Temperature 0 takes the largest logit and reports the model's own log-probability."""
    greedy = temperature == 0
    scaled = logits_SxV / jnp.where(greedy, 1.0, temperature)

    def draw(key, position, row):
        noise = jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key), position), row.shape)
        return jnp.argmax(row + jnp.where(greedy, 0.0, noise))

    tokens_S = jax.vmap(draw)(keys_Sx2, positions_S, scaled)
    chosen = jnp.take_along_axis(scaled, tokens_S[:, None], axis=1)[:, 0]
    return tokens_S.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=1)


@functools.cache
def make_prefill(graphdef, mesh: Mesh):
    """prefill(weights, cache, rows [B], tokens [B, T], positions [B, T]) -> cache.

    B splits over the devices; `rows` count within a device's own slots, one past its last is no slot; a
    position past the window is no token.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), *(P("data"),) * 4), out_specs=P("data"))
    def prefill(weights, cache: list[LayerCache], rows_B, tokens_BxT, positions_BxT):
        model: Llama = nnx.merge(graphdef, weights)
        _, cache = model.hidden(tokens_BxT, positions_BxT, cached_attention(rows_B, positions_BxT), cache)
        return cache

    return prefill


@functools.cache
def make_decode(graphdef, mesh: Mesh, width: int, steps: int):
    """decode(weights, cache, inputs [S], stop [V], temperature) -> (cache, outputs): up to `steps` tokens a
    slot, none of which may come to stand at position `width` or later.

    S splits over the devices and need not be all slots. A slot ends with a stop token (kept) or when its own
    steps are spent.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data"), P(), P()), out_specs=P("data"))
    def decode(weights, pool: list[LayerCache], inputs: SlotInputs, stop_V, temperature):
        model: Llama = nnx.merge(graphdef, weights)
        S = inputs.tokens.shape[0]
        blank = SlotOutputs(jnp.zeros((S, steps), jnp.int32), jnp.zeros((S, steps)), jnp.zeros(S, jnp.int32))
        blank = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), blank)

        def running(state):
            step, _, _, active_S, _ = state
            return (step < steps) & jnp.any(active_S)

        def body(state):
            step, cache, tokens_S, active_S, out = state
            # A slot that does not run writes past the window, that is nowhere.
            positions_S = jnp.where(active_S, inputs.positions + step, jnp.iinfo(jnp.int32).max)
            positions_Sx1 = positions_S[:, None]
            hidden_Sx1xD, cache = model.hidden(
                tokens_S[:, None], positions_Sx1, cached_attention(None, positions_Sx1), cache
            )
            drawn_S, logprobs_S = sample(model.logits(hidden_Sx1xD[:, 0]), inputs.keys, positions_S, temperature)
            out = SlotOutputs(
                out.tokens.at[:, step].set(jnp.where(active_S, drawn_S, 0)),
                out.logprobs.at[:, step].set(jnp.where(active_S, logprobs_S, 0.0)),
                out.counts + active_S,
            )
            active_S = active_S & ~stop_V[drawn_S] & (step + 1 < inputs.steps)
            return step + 1, cache, drawn_S, active_S, out

        state = (jnp.zeros((), jnp.int32), take(pool, inputs.rows, width), inputs.tokens, inputs.steps > 0, blank)
        _, cache, _, _, out = jax.lax.while_loop(running, body, state)
        return put(pool, inputs.rows, cache), out

    return decode
