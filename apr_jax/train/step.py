"""One training step on a mesh: gradients of sums, added up, then one update.

Losses are sums over tokens and are divided by the whole step's weight at the update. Inside `shard_map`
with ``check_vma=True`` the gradient with respect to replicated weights comes out summed over the devices,
which is what a sum wants; a mean of per-device means would weigh devices, not tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apr_jax.model.llama import Llama

Array = jax.Array
Rows = dict[str, np.ndarray]
# (model, rows) -> (loss as a sum, sums that make metrics; "weight" divides the loss)
Loss = Callable[[Llama, dict[str, Array]], tuple[Array, dict[str, Array]]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights", "optimizer", "step"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """Everything that training carries from step to step, as pure pytrees."""

    weights: Any  # pure dictionary of an nnx.State
    optimizer: Any
    step: Array  # int32, updates done


def data_mesh(devices: int) -> Mesh:
    """A mesh with the one axis "data". Raises ValueError where there are fewer devices."""
    if not 1 <= devices <= jax.device_count():
        raise ValueError(f"{devices} devices were asked for, {jax.device_count()} are there")
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


class Trainer:
    """Compiled gradient and update of one model, loss and optimiser on one mesh."""

    def __init__(self, model: Llama, loss: Loss, optimizer: optax.GradientTransformation, mesh: Mesh):
        self._graphdef, self._template = nnx.split(model)
        self.mesh, self.optimizer = mesh, optimizer
        self._replicated, self._by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

        def summed(weights, rows):
            total, metrics = loss(self.rebuild(weights), rows)
            return total, dict(metrics, loss=total)

        @functools.partial(jax.jit, donate_argnums=1)
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
        def accumulate(weights, sums, rows):
            gradient, metrics = jax.grad(summed, has_aux=True)(weights, rows)
            metrics = jax.tree.map(lambda x: jax.lax.psum(x.astype(jnp.float32), "data"), metrics)
            return jax.tree.map(jnp.add, sums, gradient), metrics

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        def measure(weights, rows):
            _, metrics = summed(weights, rows)
            return jax.tree.map(lambda x: jax.lax.psum(x.astype(jnp.float32), "data"), metrics)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(state: TrainState, sums, weight):
            gradient = jax.tree.map(lambda x: x / weight, sums)
            # Muon's iterations are a fifth of a small model's step: each device does its own layers.
            shared = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self._by_layer(x)), gradient)
            change, optimizer_state = optimizer.update(shared, state.optimizer, state.weights)
            change, optimizer_state = jax.lax.with_sharding_constraint((change, optimizer_state), self._replicated)
            weights = optax.apply_updates(state.weights, change)
            return TrainState(weights, optimizer_state, state.step + 1), optax.tree.norm(gradient)

        self._accumulate, self._update, self._measure = accumulate, update, measure
        self._zeros = jax.jit(lambda weights: jax.tree.map(jnp.zeros_like, weights))

    def _by_layer(self, x: Array) -> NamedSharding:
        """Stacked matrices split over their layers where that comes out even, all else whole."""
        even = x.ndim > 2 and x.shape[0] % self.mesh.devices.size == 0
        return self._by_row if even else self._replicated

    def init(self, model: Llama) -> TrainState:
        weights = jax.device_put(nnx.to_pure_dict(nnx.state(model)), self._replicated)
        weights = jax.tree.map(jnp.copy, weights)  # the updates donate their buffers, the model keeps its own
        state = TrainState(weights, jax.jit(self.optimizer.init)(weights), jnp.zeros((), jnp.int32))
        return jax.device_put(state, self._replicated)

    def rebuild(self, weights) -> Llama:
        """The model with these weights (a pure dictionary), also inside a traced function."""
        state = jax.tree.map(lambda x: x, self._template)
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(self._graphdef, state)

    def model(self, state: TrainState) -> Llama:
        """The model as trained so far, with buffers of its own: the next update donates the state's."""
        return self.rebuild(jax.tree.map(jnp.copy, state.weights))

    def step(self, state: TrainState, batches: Iterable[Rows], divisor: float | None = None):
        """One update from one or more batches of packed rows, whose rows split over the devices. The loss is
        divided by `divisor`, by default the sum of its weights. Returns (state, sums, gradient norm), the
        last two still on their way: reading them waits for the device."""
        sums, totals = self._zeros(state.weights), None
        for rows in batches:
            rows = jax.device_put(rows, self._by_row)
            sums, metrics = self._accumulate(state.weights, sums, rows)
            totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
        state, norm = self._update(state, sums, totals["weight"] if divisor is None else jnp.float32(divisor))
        return state, totals, norm

    def measure(self, state: TrainState, rows: Rows) -> dict[str, Array]:
        """The sums of one batch without an update."""
        return self._measure(state.weights, jax.device_put(rows, self._by_row))
