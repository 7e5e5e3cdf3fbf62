"""One training step on a device mesh: local gradients, one reduction, one update.

A loss is a sum over tokens. The update divides the gradient by the total weight of the step, so that a token weighs the
same on every device. A mean of per-device means would give devices, not tokens, equal weights.

Each device adds up the gradients of its own microbatches. They are summed over devices once per step, at the update. To
keep the gradients local, weights are cast to "varying" inside `shard_map` before differentiation. Without the cast JAX
(check_vma) sums the gradient of replicated weights over devices in every microbatch.

XLA's partitioner distributes the update. The update is elementwise, except for Muon: there each device updates whole
layers.

The mesh has two axes, "data" and "fsdp", and the rows of a batch are split over both. Weights and optimizer state are
split over "fsdp" alone. A layer's weights are gathered just before the layer runs. The transpose of this gather sums
their gradient over "fsdp" and scatters it.
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
# (model, batch) -> (the loss, a sum over tokens; sums by name, of which metrics are made). The sum "weight" divides the
# loss. A value whose name begins with "max_" is a maximum, and is combined as one over devices and microbatches.
Loss = Callable[[Model, PackedBatch], tuple[Array, dict[str, Array]]]
AXES = ("data", "fsdp")


class NotFiniteError(UserError, FloatingPointError):
    """Raised when losses or gradients of training are NaN or infinite. Lower rates, another seed or other data help."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights", "optimizer", "step", "skipped"], meta_fields=[]
)
@dataclass
class TrainState:
    """All state that one training step passes to the next, as a pytree of arrays."""

    weights: Any  # the pure dictionary of an nnx.State
    optimizer: Any  # state of the optax transformation
    step: Array  # int32 scalar: steps done, skipped ones included
    skipped: Array  # int32 scalar: steps that were not applied, since their loss or gradient was not finite


def data_mesh(devices: int, fsdp: int = 1) -> Mesh:
    """Make a mesh of the first `devices` devices, [devices / fsdp, fsdp]; each group of `fsdp` devices shares one copy
    of the weights. Raises UserError if there are fewer devices, if `fsdp` does not divide them, or if several processes
    would leave some device unused."""
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
    """The axis of a parameter that is split into `parts` over "fsdp", counted from the end (-1 is the last).

    It is the longest axis that `parts` divides. None for vectors and where no axis divides: every device holds the
    whole parameter then. The layer axis of a stacked parameter is never split, since layers are gathered one by one.
    """
    layer_shape = shape[1:] if name.startswith("layers/") else shape
    axes = [axis for axis in range(-len(layer_shape), 0) if layer_shape[axis] % parts == 0]
    return max(axes, key=lambda axis: layer_shape[axis]) if parts > 1 and len(layer_shape) > 1 and axes else None


class Trainer:
    """The compiled gradient and update of one model, loss and optimizer on one mesh.

    `measurement(model, batch)` gives the sums that `measure` returns; the default is the loss and the sums beside it.
    `whole_layers` is for an optimizer that works on whole matrices (Muon): each device then updates whole layers of
    the stacked parameters.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        measurement: Callable[[Model, PackedBatch], dict[str, Array]] | None = None,
        whole_layers: bool = True,
    ):
        self._graphdef, self._template = nnx.split(model)
        self.mesh, self.optimizer = mesh, optimizer
        self._whole_layers = whole_layers
        self._shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(model)))
        self._axes = {path_name(path): split_axis(path_name(path), leaf.shape, mesh.shape["fsdp"])
                      for path, leaf in jax.tree.leaves_with_path(self._shapes)}  # fmt: skip
        self._specs = specs = self._by_parameter(lambda name, leaf: self._spec(name, leaf.ndim))
        gradient_specs = self._by_parameter(lambda name, leaf: self._gradient_spec(name, leaf.ndim))
        gradient_shardings = jax.tree.map(self._sharding, gradient_specs)
        replicated = self._sharding(P())

        def loss_and_sums(weights, batch):
            total, sums = loss(self._local_model(weights), batch)
            return total, dict(sums, loss=total)

        def with_device_axis(tree):
            """float32 [1, ...]: `shard_map` joins the first axes of all devices to [devices, ...]."""
            return jax.tree.map(lambda x: x.astype(jnp.float32)[None], tree)

        @functools.partial(jax.jit, donate_argnums=1)
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(specs, gradient_specs, P(AXES)), out_specs=(gradient_specs, P(AXES))
        )
        def accumulate(weights, gradients, batch):
            gradient, sums = jax.grad(loss_and_sums, has_aux=True)(self._varying(weights), batch)
            return jax.tree.map(jnp.add, gradients, with_device_axis(gradient)), with_device_axis(sums)

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P(AXES)), out_specs=P(AXES))
        def measure(weights, batch):
            weights = self._varying(weights)
            if measurement is None:
                return with_device_axis(loss_and_sums(weights, batch)[1])
            return with_device_axis(measurement(self._local_model(weights), batch))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(state: TrainState, gradients, sums, divisor, flags):
            totals = _reduce_devices(dict(sums, flags=flags))
            weight = totals["weight"] if divisor is None else divisor
            gradient = jax.tree.map(lambda x: x.sum(axis=0) / weight, gradients)
            gradient = jax.lax.with_sharding_constraint(gradient, self._by_parameter(self._update_sharding))
            norm = optax.tree.norm(gradient)
            change, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
            finite = jnp.isfinite(norm) & jnp.isfinite(totals["loss"])  # a loss of NaN can have a gradient of 0
            keep = lambda new, old: jax.tree.map(functools.partial(jnp.where, finite), new, old)  # noqa: E731
            state = TrainState(
                keep(optax.apply_updates(state.weights, change), state.weights),
                keep(optimizer_state, state.optimizer),
                state.step + 1,
                state.skipped + ~finite,
            )
            state = jax.lax.with_sharding_constraint(state, self._state_shardings)
            totals = dict(totals, gradient_norm=norm, skipped=state.skipped)
            return state, jax.lax.with_sharding_constraint(totals, jax.tree.map(lambda _: replicated, totals))

        self._accumulate, self._update, self._measure = accumulate, update, measure
        copies = self._gradient_copies
        self._zero_gradients = jax.jit(
            lambda: self._by_parameter(lambda name, leaf: jnp.zeros((copies(name), *leaf.shape), jnp.float32)),
            out_shardings=gradient_shardings,
        )
        self._reduce = jax.jit(_reduce_devices, out_shardings=replicated)
        state = jax.eval_shape(self._initial_state, self._shapes)
        self._state_shardings = jax.tree.map_with_path(self._state_leaf_sharding, state)

    # ------------------------------------------------------------------ shardings

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _by_parameter(self, function):
        """A dictionary like that of the weights, with `function(name, shape and dtype)` in the place of each array."""
        return jax.tree.map_with_path(lambda path, leaf: function(path_name(path), leaf), self._shapes)

    def _spec(self, name: str, ndim: int) -> P:
        """How a parameter is split over the mesh."""
        axis = self._axes[name]
        return P() if axis is None else P(*(None,) * (ndim + axis), "fsdp")

    def _gradient_spec(self, name: str, ndim: int) -> P:
        """How a parameter's local gradients are split over the mesh: their first axis counts the devices, or, where the
        parameter itself is split, the groups of devices that share one copy of the weights."""
        return P(AXES) if self._axes[name] is None else P("data", *self._spec(name, ndim))

    def _gradient_copies(self, name: str) -> int:
        """The length of the first axis of a parameter's local gradients, see `_gradient_spec`."""
        return self.mesh.size if self._axes[name] is None else self.mesh.shape["data"]

    def _update_sharding(self, name: str, leaf) -> NamedSharding:
        """How a parameter's update is split: stacked matrices by layers, if `whole_layers` is set and the layers divide
        evenly; else as the weights."""
        even = leaf.ndim > 2 and leaf.shape[0] % self.mesh.size == 0
        return self._sharding(P(AXES)) if self._whole_layers and even else self._sharding(self._spec(name, leaf.ndim))

    def _state_leaf_sharding(self, path, leaf) -> NamedSharding:
        """How a leaf of `TrainState` is split. Weights and the optimizer's moments are split as their parameter, whose
        path is the end of theirs; other leaves are replicated."""
        name = path_name(path)
        for known, shape in ((path_name(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(self._shapes)):
            if leaf.shape == shape and (name == known or name.endswith(f"/{known}")):
                return self._sharding(self._spec(known, len(shape)))
        return self._sharding(P())

    def _initial_state(self, weights) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(jax.tree.map(jnp.copy, weights), self.optimizer.init(weights), zero, zero)

    def _varying(self, weights):
        """Cast weights to varying over the mesh axes that they are not split over, inside `shard_map`: their gradients
        then stay local to a device."""
        axes = self._by_parameter(lambda name, _: AXES if self._axes[name] is None else AXES[:1])
        return jax.tree.map(lambda x, axes: jax.lax.pcast(x, axes, to="varying"), weights, axes)

    def _local_model(self, weights) -> Model:
        """The model on this device's shards of the weights, inside `shard_map`; it gathers each parameter on use."""
        model = self.rebuild(weights)

        def gather(name: str, shard: Array) -> Array:
            axis = self._axes[name]
            if axis is None:
                return shard
            return jax.lax.all_gather(shard, "fsdp", axis=shard.ndim + axis, tiled=True)

        if self.mesh.shape["fsdp"] > 1:
            model.gather = gather
        return model

    # ------------------------------------------------------------------ the interface to training loops

    def init(self, model: Model) -> TrainState:
        """The state before the first step, with the model's weights copied: updates donate the state's buffers."""
        weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
        return jax.jit(self._initial_state, out_shardings=self._state_shardings)(weights)

    def rebuild(self, weights) -> Model:
        """The model with the given weights, a pure dictionary. It also works inside a traced function."""
        state = jax.tree.map(lambda x: x, self._template)
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(self._graphdef, state)

    def model(self, state: TrainState) -> Model:
        """The model with the state's weights, whole on every device. Its buffers are copies: the next update donates
        those of the state."""
        return self.rebuild(self._whole(state.weights))

    @functools.cached_property
    def _whole(self):
        """The compiled copy of weights to every device. It is cached: a new `jax.jit` at each call would compile each
        time."""
        return jax.jit(lambda weights: jax.tree.map(jnp.copy, weights), out_shardings=self._sharding(P()))

    def put(self, arrays):
        """Put a pytree of arrays [B, ...] on the mesh, rows split over devices. B counts the rows of this process; they
        go to the devices of this process."""
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self._sharding(P(AXES))), arrays)

    def step(self, state: TrainState, batches: Iterable[PackedBatch], divisor: float | None = None, flag: bool = False):
        """One update from one or more batches (microbatches), whose rows are split over the devices. Returns (state,
        sums).

        The loss is divided by `divisor`, by default the sum of its weights. `sums` are those of the loss, added up over
        microbatches and devices, and

            gradient_norm   the global norm, frozen parameters included, before any clipping
            skipped         steps so far that were not applied, since their loss or gradient was not finite
            flags           above 0 if any process passed `flag`

        The call returns before the device is done: reading `sums` waits for the step.
        """
        gradients, sums = self._zero_gradients(), None
        for batch in batches:
            gradients, more = self._accumulate(state.weights, gradients, self.put(batch))
            sums = more if sums is None else _combine(sums, more)
        flags = self.put(np.full(self.mesh.local_mesh.size, flag, np.float32))  # [devices]
        return self._update(state, gradients, sums, None if divisor is None else jnp.float32(divisor), flags)

    def measure(self, state: TrainState, batch: PackedBatch) -> dict[str, Array]:
        """The sums by name for one batch, without an update: those of the trainer's `measurement`, or of its loss."""
        return self._reduce(self._measure(state.weights, self.put(batch)))

    def per_row(self, function: Callable[[Model, PackedBatch], Array]):
        """Compile `function(model, batch)`, which maps a batch of B rows to an array [B, ...]. Returns a function of
        (a state's weights, batch); each device computes its own rows."""

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=self.mesh, in_specs=(self._specs, P(AXES)), out_specs=P(AXES)
        )  # fmt: skip
        def mapped(weights, batch):
            return function(self._local_model(self._varying(weights)), batch)

        return lambda weights, batch: mapped(weights, self.put(batch))


def _reduce_devices(sums: dict[str, Array]) -> dict[str, Array]:
    """Reduce each array [devices] to a scalar: its sum, or its maximum if the name begins with "max_"."""
    return {name: x.max(axis=0) if name.startswith("max_") else x.sum(axis=0) for name, x in sums.items()}


@jax.jit
def _combine(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    """Combine the sums of two microbatches: add those of a name, or take the larger if the name begins with "max_"."""
    return {name: (jnp.maximum if name.startswith("max_") else jnp.add)(a[name], b[name]) for name in a}
