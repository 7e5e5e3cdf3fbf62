"""How much arithmetic training takes, and how much a device could do: model FLOPs utilisation (PaLM, appendix B)."""

import functools
import math

import jax
from flax import nnx

from apr_jax.model.family import ModelConfig, abstract_model

# Dense products a second, from NVIDIA's data sheets: bfloat16 on tensor cores; float32 on CUDA cores, for
# models do not use TF32.
PEAK = {
    "H200": {"bfloat16": 989.5e12, "float32": 66.9e12},
    "H100": {"bfloat16": 989.5e12, "float32": 66.9e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
}


@functools.cache
def product_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: the matrices of the layers and the head."""
    layers = nnx.state(abstract_model(config).layers, nnx.Param)
    matrices = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layers) if len(leaf.shape) > 2)
    return matrices + config.width * config.vocab_size


def training_flops(config: ModelConfig, tokens: float, seen: float) -> float:
    """Of a forward and backward pass over `tokens` that together see `seen` tokens, themselves among them. What
    rematerialisation computes again is not counted, nor is padding."""
    return 6 * product_parameters(config) * tokens + 12 * config.layers * config.heads * config.head_size * seen


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """What a device could do in a second; None where its kind is not in `PEAK`."""
    return next((rates[dtype] for kind, rates in PEAK.items() if kind in device.device_kind), None)
