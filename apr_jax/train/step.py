"""One training step on a mesh: every device's own gradient, then one reduction and one update.

Losses are sums over tokens and are divided by the whole step's weight at the update; a mean of per-device means
would weigh devices, not tokens. Inside `shard_map` weights are cast to varying before the gradient is taken, so that
it stays each device's own (under check_vma a gradient with respect to replicated weights comes out summed, once
per microbatch). Microbatches add up on each device, and the sum over devices is taken once, at the update, which is
left to the partitioner: it is elementwise, but for Muon's matrices, of which each device does its own layers.

The mesh has two axes, and rows split over both. Over "fsdp" weights and optimiser state are split too: a layer's are
gathered just before it runs, and what their gradient is scattered into are sums over that axis.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apr_jax.data.packing import PackedBatch
from apr_jax.errors import UserError
from apr_jax.model.family import Model
from apr_jax.train.optimizer import path_name

Array = jax.Array
# (model, batch) -> (loss as a sum, sums that make metrics; "weight" divides the loss; a name that begins with "max_" is
# no sum but the largest of all)
Loss = Callable[[Model, PackedBatch], tuple[Array, dict[str, Array]]]
AXES = ("data", "fsdp")


class NotFiniteError(UserError, FloatingPointError):
    """Training whose losses or gradients are no finite numbers: other rates, another seed or other data are needed."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights", "optimizer", "step", "skipped"], meta_fields=[]
)
@dataclass
class TrainState:
    """Everything that training carries from step to step, as pure pytrees."""

    weights: Any  # pure dictionary of an nnx.State
    optimizer: Any
    step: Array  # int32, steps done, those that were skipped among them
    skipped: Array  # int32, steps whose loss or gradient was not finite and that were not applied


def data_mesh(devices: int, fsdp: int = 1) -> Mesh:
    """A mesh of `devices`, `fsdp` of which share one copy of the weights. Raises UserError where there are fewer
    devices, `fsdp` does not divide them, or a process among several would have none."""
    if jax.process_count() > 1 and devices != jax.device_count():
        raise UserError(
            f"several processes train on all of their devices: devices is {jax.device_count()}, was given {devices}"
        )
    if not 1 <= devices <= jax.device_count():
        hint = "; JAX_PLATFORMS=cpu makes virtual ones of the CPU" if jax.config.jax_platforms != "cpu" else ""
        raise UserError(f"{devices} devices were asked for, {jax.device_count()} are there{hint}")
    if not 1 <= fsdp <= devices or devices % fsdp:
        raise UserError(f"fsdp divides devices ({devices}), was given {fsdp}")
    shape, chosen = (devices // fsdp, fsdp), jax.devices()[:devices]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=chosen)


def split_axis(name: str, shape: tuple[int, ...], parts: int) -> int | None:
    """Which axis of a parameter is split over "fsdp", counted from the end: the longest that divides, of matrices
    only. Never the layers' axis: a layer is gathered when it runs. None: every device holds it whole."""
    own = shape[1:] if name.startswith("layers/") else shape
    axes = [axis for axis in range(-len(own), 0) if own[axis] % parts == 0]
    return max(axes, key=lambda axis: own[axis]) if parts > 1 and len(own) > 1 and axes else None


class Trainer:
    """Compiled gradient and update of one model, loss and optimiser on one mesh.

    `measures` makes the sums that `measure` tells; by default they are the loss and its own. `whole_layers` is for an
    optimiser that works on matrices (Muon): each device updates whole layers of the stacked ones.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        measures: Callable[[Model, PackedBatch], dict[str, Array]] | None = None,
        whole_layers: bool = True,
    ):
        self._graphdef, self._template = nnx.split(model)
        self.mesh, self.optimizer = mesh, optimizer
        self._whole_layers = whole_layers
        self._shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(model)))
        self._axes = {path_name(path): split_axis(path_name(path), leaf.shape, mesh.shape["fsdp"])
                      for path, leaf in jax.tree.leaves_with_path(self._shapes)}  # fmt: skip
        self._specs = specs = self._by_parameter(lambda name, leaf: self._spec(name, leaf.ndim))
        own_specs = self._by_parameter(lambda name, leaf: self._own_spec(name, leaf.ndim))
        own_at = jax.tree.map(self._at, own_specs)
        replicated = self._at(P())

        def summed(weights, batch):
            total, metrics = loss(self._sharded(weights), batch)
            return total, dict(metrics, loss=total)

        def own(tree):
            return jax.tree.map(lambda x: x.astype(jnp.float32)[None], tree)

        @functools.partial(jax.jit, donate_argnums=1)
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(specs, own_specs, P(AXES)), out_specs=(own_specs, P(AXES))
        )
        def accumulate(weights, sums, batch):
            gradient, metrics = jax.grad(summed, has_aux=True)(self._varying(weights), batch)
            return jax.tree.map(jnp.add, sums, own(gradient)), own(metrics)

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P(AXES)), out_specs=P(AXES))
        def measure(weights, batch):
            weights = self._varying(weights)
            return own(summed(weights, batch)[1] if measures is None else measures(self._sharded(weights), batch))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(state: TrainState, sums, metrics, divisor, flags):
            totals = _over_devices(dict(metrics, flags=flags))
            weight = totals["weight"] if divisor is None else divisor
            gradient = jax.tree.map(lambda x: x.sum(axis=0) / weight, sums)
            gradient = jax.lax.with_sharding_constraint(gradient, self._by_parameter(self._updated_at))
            norm = optax.tree.norm(gradient)
            change, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
            finite = jnp.isfinite(norm) & jnp.isfinite(totals["loss"])  # a loss of NaN can have a gradient of 0
            kept = lambda new, old: jax.tree.map(functools.partial(jnp.where, finite), new, old)  # noqa: E731
            state = TrainState(
                kept(optax.apply_updates(state.weights, change), state.weights),
                kept(optimizer_state, state.optimizer),
                state.step + 1,
                state.skipped + ~finite,
            )
            state = jax.lax.with_sharding_constraint(state, self._state_at)
            totals = dict(totals, gradient_norm=norm, skipped=state.skipped)
            return state, jax.lax.with_sharding_constraint(totals, jax.tree.map(lambda _: replicated, totals))

        self._accumulate, self._update, self._measure = accumulate, update, measure
        self._zeros = jax.jit(
            lambda: self._by_parameter(lambda name, leaf: jnp.zeros((self._copies(name), *leaf.shape), jnp.float32)),
            out_shardings=own_at,
        )
        self._total = jax.jit(_over_devices, out_shardings=replicated)
        state = jax.eval_shape(self._fresh, self._shapes)
        self._state_at = jax.tree.map_with_path(self._state_leaf_at, state)

    # ------------------------------------------------------------------ what lies where

    def _at(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _by_parameter(self, function):
        """A dictionary like the weights', of what `function(name, shape)` says."""
        return jax.tree.map_with_path(lambda path, leaf: function(path_name(path), leaf), self._shapes)

    def _spec(self, name: str, ndim: int) -> P:
        axis = self._axes[name]
        return P() if axis is None else P(*(None,) * (ndim + axis), "fsdp")

    def _own_spec(self, name: str, ndim: int) -> P:
        """Of a parameter's gradients before they are added up: an axis in front, of which each device, or each group
        that shares one copy of the weights, has its own."""
        return P(AXES) if self._axes[name] is None else P("data", *self._spec(name, ndim))

    def _copies(self, name: str) -> int:
        return self.mesh.size if self._axes[name] is None else self.mesh.shape["data"]

    def _updated_at(self, name: str, leaf) -> NamedSharding:
        """Where a parameter is updated: stacked matrices by layers where that is wanted and comes out even."""
        even = leaf.ndim > 2 and leaf.shape[0] % self.mesh.size == 0
        return self._at(P(AXES)) if self._whole_layers and even else self._at(self._spec(name, leaf.ndim))

    def _state_leaf_at(self, path, leaf) -> NamedSharding:
        """An optimiser's moments lie as their parameter does: their paths end alike."""
        name = path_name(path)
        for known, shape in ((path_name(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(self._shapes)):
            if leaf.shape == shape and (name == known or name.endswith(f"/{known}")):
                return self._at(self._spec(known, len(shape)))
        return self._at(P())

    def _fresh(self, weights) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(jax.tree.map(jnp.copy, weights), self.optimizer.init(weights), zero, zero)

    def _varying(self, weights):
        """Inside `shard_map`, of each device its own, so that gradients are, too."""
        axes = self._by_parameter(lambda name, _: AXES if self._axes[name] is None else AXES[:1])
        return jax.tree.map(lambda x, axes: jax.lax.pcast(x, axes, to="varying"), weights, axes)

    def _sharded(self, weights) -> Model:
        """The model whose weights are this device's shares, inside `shard_map`."""
        model = self.rebuild(weights)

        def gather(name: str, share: Array) -> Array:
            axis = self._axes[name]
            if axis is None:
                return share
            return jax.lax.all_gather(share, "fsdp", axis=share.ndim + axis, tiled=True)

        if self.mesh.shape["fsdp"] > 1:
            model.gather = gather
        return model

    # ------------------------------------------------------------------ what a training loop calls

    def init(self, model: Model) -> TrainState:
        """A state of copies: the updates donate their buffers, the model keeps its own."""
        weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
        return jax.jit(self._fresh, out_shardings=self._state_at)(weights)

    def rebuild(self, weights) -> Model:
        """The model with these weights (a pure dictionary), also inside a traced function."""
        state = jax.tree.map(lambda x: x, self._template)
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(self._graphdef, state)

    def model(self, state: TrainState) -> Model:
        """The model as trained so far, whole on every device, with buffers of its own: the next update donates the
        state's."""
        return self.rebuild(self._whole(state.weights))

    @functools.cached_property
    def _whole(self):
        """Copies of weights, whole on every device; kept, since a jit made anew at each call compiles at each call."""
        return jax.jit(lambda weights: jax.tree.map(jnp.copy, weights), out_shardings=self._at(P()))

    def put(self, arrays):
        """The same pytree on the devices, its arrays [B, ...] split over them by rows: this process' rows over its own
        devices, which with one process are all."""
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self._at(P(AXES))), arrays)

    def step(self, state: TrainState, batches: Iterable[PackedBatch], divisor: float | None = None, flag: bool = False):
        """One update from one or more batches, whose rows split over the devices. The loss is divided
        by `divisor`, by default the sum of its weights. Returns (state, sums), the sums still on their way: reading
        them waits for the device. Among them are `gradient_norm`; `skipped`, how many steps so far had a loss or
        gradient that was not finite and were not applied; and `flags`, above 0 where any process raised its `flag`."""
        sums, metrics = self._zeros(), None
        for batch in batches:
            sums, more = self._accumulate(state.weights, sums, self.put(batch))
            metrics = more if metrics is None else _both(metrics, more)
        flags = self.put(np.full(self.mesh.local_mesh.size, flag, np.float32))
        return self._update(state, sums, metrics, None if divisor is None else jnp.float32(divisor), flags)

    def measure(self, state: TrainState, batch: PackedBatch) -> dict[str, Array]:
        """The sums of one batch without an update."""
        return self._total(self._measure(state.weights, self.put(batch)))

    def per_row(self, function: Callable[[Model, PackedBatch], Array]):
        """`function(model, batch)`, an array [B, ...] of a batch of B rows, compiled as (weights, batch) -> array:
        every device does its own rows. The weights are a state's."""

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=self.mesh, in_specs=(self._specs, P(AXES)), out_specs=P(AXES)
        )  # fmt: skip
        def mapped(weights, batch):
            return function(self._sharded(self._varying(weights)), batch)

        return lambda weights, batch: mapped(weights, self.put(batch))


def _over_devices(metrics: dict[str, Array]) -> dict[str, Array]:
    """What each device has [devices], as one number."""
    return {name: x.max(axis=0) if name.startswith("max_") else x.sum(axis=0) for name, x in metrics.items()}


@jax.jit
def _both(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    return {name: (jnp.maximum if name.startswith("max_") else jnp.add)(a[name], b[name]) for name in a}
