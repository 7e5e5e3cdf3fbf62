"""Llama 2 in Flax NNX: RMSNorm, RoPE, SwiGLU, grouped heads, stacked layers under one scan.

Parameters carry the layer axis in front (``q_LxDxNxH``), so that `jax.lax.scan` runs one compiled layer
L times; `apr_jax.export.hf` unstacks them into the Hugging Face names.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array
# (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, layer's carry or None) -> (out_BxTxNxH, what the layer leaves behind)
Attend = Callable[[Array, Array, Array, object], tuple[Array, object]]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of one model. The paper's (`base`) is 18 layers, width 1024, 16 heads, Llama-2 vocabulary."""

    vocab_size: int
    width: int = 128  # D
    layers: int = 4  # L
    heads: int = 4  # N, query heads
    kv_heads: int | None = None  # K; None: as many as heads
    feed_forward: int | None = None  # F; None: 8/3 of the width, up to a multiple of 32
    context: int = 1024  # longest position, tokens
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute a layer's activations in the backward pass

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} over {self.heads} heads must give an even head size")
        if self.heads % self.kv:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is float32 or bfloat16, was given {self.dtype!r}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden(self) -> int:
        return self.feed_forward or -(-self.width * 8 // 3 // 32) * 32


class Llama(nnx.Module):
    """The parameters and one way through them; what attention sees is the caller's (`Attend`)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        L, D, N, K, H, F, V = (
            config.layers, config.width, config.heads, config.kv, config.head_size, config.hidden, config.vocab_size,
        )  # fmt: skip

        def normal(*shape: int, scale: float) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))

        into, out = D**-0.5, (2 * L) ** -0.5  # residual writes start smaller the deeper the model
        self.embed_VxD = normal(V, D, scale=1.0 if not config.tie_embeddings else into)
        self.layers = nnx.Dict(
            attention_norm_LxD=nnx.Param(jnp.ones((L, D))),
            q_LxDxNxH=normal(L, D, N, H, scale=into),
            k_LxDxKxH=normal(L, D, K, H, scale=into),
            v_LxDxKxH=normal(L, D, K, H, scale=into),
            o_LxNxHxD=normal(L, N, H, D, scale=into * out),
            feed_forward_norm_LxD=nnx.Param(jnp.ones((L, D))),
            gate_LxDxF=normal(L, D, F, scale=into),
            up_LxDxF=normal(L, D, F, scale=into),
            down_LxFxD=normal(L, F, D, scale=F**-0.5 * out),
        )
        self.norm_D = nnx.Param(jnp.ones(D))
        self.head_DxV = None if config.tie_embeddings else normal(D, V, scale=into)

    def hidden(self, tokens_BxT: Array, positions_BxT: Array, attend: Attend, cache: list | None = None):
        """Last hidden states [B, T, D], normed, and the cache as `attend` left it.

        `cache` has an entry per layer, handed to `attend` as its carry. Layers then run unrolled: under a
        scan every layer's cache would be copied out of the stack and back at every token.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        x_BxTxD = self.embed_VxD[...][tokens_BxT].astype(dtype)
        rotation = _rotation(positions_BxT, config.head_size, config.rope_theta)

        def layer(x_BxTxD, inputs):
            w, carry = inputs
            w = jax.tree.map(lambda value: value.astype(dtype), w)
            h_BxTxD = rms_norm(x_BxTxD, w["attention_norm_LxD"], config.norm_epsilon)
            q_BxTxNxH = rotate(jnp.einsum("btd,dnh->btnh", h_BxTxD, w["q_LxDxNxH"]), rotation)
            k_BxTxKxH = rotate(jnp.einsum("btd,dkh->btkh", h_BxTxD, w["k_LxDxKxH"]), rotation)
            v_BxTxKxH = jnp.einsum("btd,dkh->btkh", h_BxTxD, w["v_LxDxKxH"])
            out_BxTxNxH, left = attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, carry)
            x_BxTxD = x_BxTxD + jnp.einsum("btnh,nhd->btd", out_BxTxNxH, w["o_LxNxHxD"])
            h_MxD = rms_norm(x_BxTxD, w["feed_forward_norm_LxD"], config.norm_epsilon).reshape(-1, config.width)
            # Rows and time as one axis: on the CPU the weights' gradients are more than twice as fast.
            out_MxD = (jax.nn.silu(h_MxD @ w["gate_LxDxF"]) * (h_MxD @ w["up_LxDxF"])) @ w["down_LxFxD"]
            x_BxTxD = x_BxTxD + out_MxD.reshape(x_BxTxD.shape)
            return x_BxTxD, left

        weights = {name: parameter[...] for name, parameter in self.layers.items()}
        if cache is None:
            body = jax.checkpoint(layer) if config.remat else layer
            x_BxTxD, _ = jax.lax.scan(body, x_BxTxD, (weights, None))
        else:
            cache = list(cache)
            for l, carry in enumerate(cache):
                x_BxTxD, cache[l] = layer(x_BxTxD, (jax.tree.map(lambda value: value[l], weights), carry))
        return rms_norm(x_BxTxD, self.norm_D[...].astype(dtype), config.norm_epsilon), cache

    def logits(self, hidden: Array) -> Array:
        """float32 logits over V of hidden states with any leading axes."""
        head_DxV = self.embed_VxD[...].T if self.head_DxV is None else self.head_DxV[...]
        return jnp.einsum("...d,dv->...v", hidden, head_DxV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def rms_norm(x: Array, scale_D: Array, epsilon: float) -> Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _rotation(positions_BxT: Array, head_size: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, each [B, T, 1, H/2], float32."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions_BxT[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotary position embedding, halves paired as in Hugging Face's Llama (not interleaved)."""
    cos, sin = rotation
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxNxH.dtype)


def parameter_count(model: Llama) -> tuple[int, int]:
    """(all parameters, those outside the embedding and the head)."""
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    tables = model.embed_VxD[...].size + (0 if model.head_DxV is None else model.head_DxV[...].size)
    return total, total - tables
