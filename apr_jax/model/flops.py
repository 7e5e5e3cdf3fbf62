"""Floating-point operations of training and of a device's peak, for the model FLOPs utilisation (MFU) as in the PaLM
paper, appendix B."""

import functools
import math

import jax
from flax import nnx

from apr_jax.model.family import ModelConfig, abstract_model

# Peak operations per second for dense products, from NVIDIA's data sheets. bfloat16 runs on tensor cores. float32 runs
# on CUDA cores, since our models do not use TF32.
PEAK = {
    "H200": {"bfloat16": 989.5e12, "float32": 66.9e12},
    "H100": {"bfloat16": 989.5e12, "float32": 66.9e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
}


@functools.cache
def product_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that every token is multiplied with: the layers' matrices and the head."""
    layers = nnx.state(abstract_model(config).layers, nnx.Param)
    matrices = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layers) if len(leaf.shape) > 2)
    return matrices + config.width * config.vocab_size


def training_flops(config: ModelConfig, tokens: float, seen: float) -> float:
    """Return the operations of a forward and backward pass over `tokens` tokens. `seen` is the number of tokens that a
    token sees in attention, itself included, summed over all of them. Padding and the work that rematerialisation
    repeats are not counted."""
    return 6 * product_parameters(config) * tokens + 12 * config.layers * config.heads * config.head_size * seen


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Return a device's peak operations per second; None for a kind of device that is not in `PEAK`."""
    return next((rates[dtype] for kind, rates in PEAK.items() if kind in device.device_kind), None)
