"""Llama 2 in Flax NNX: sizes, parameters and the way of tokens through them.

Parameters carry the layer axis in front (``q_LxDxNxH``), so that an optimiser sees one array where a model
has L; `apr_jax.export.hf` unstacks them into the Hugging Face names.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.checks import above, at_least, check_fields
from apr_jax.errors import UserError
from apr_jax.model.family import Attend, Gather

Array = jax.Array
ATTENTIONS = ("auto", "blocked", "dense", "cudnn")
# What the backward pass finds of a layer's activations; the rest it computes again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights, not attention's
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input alone
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of one model. The paper's (`base`) is 18 layers, width 1024, 16 heads, Llama-2 vocabulary."""

    family: ClassVar[str] = "llama"
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
    attention: str = "auto"  # how packed rows attend, see `attention.packed_attention`
    remat: str = "none"  # see REMAT
    scan: bool = False  # one compiled layer for all, where no cache is carried; see `Llama.hidden`

    BOUNDS = (
        at_least(1, "vocab_size", "width", "layers", "heads", "kv_heads", "feed_forward", "context"),
        at_least(0, "norm_epsilon"), above(0, "rope_theta"),
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        for name, allowed in (("attention", ATTENTIONS), ("remat", tuple(REMAT))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is one of {', '.join(allowed)}, was given {getattr(self, name)!r}")
        self._check_head_size()
        if self.heads % self.kv:
            raise UserError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is float32 or bfloat16, was given {self.dtype!r}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise UserError(f"attention cudnn needs dtype bfloat16, was given {self.dtype!r}")

    def _check_head_size(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(f"width {self.width} over {self.heads} heads must give an even head size")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden(self) -> int:
        return self.feed_forward or -(-self.width * 8 // 3 // 32) * 32


def _as_precise(method):
    """Makes a model's method, and its gradient, multiply float32 as float32. JAX by default rounds it to TF32 on GPUs
    and to bfloat16 on TPUs, in products whose shapes, and so roundings, differ between rollouts and training."""

    @functools.wraps(method)
    def exact(self, *args, **kwargs):
        with jax.default_matmul_precision("highest" if self.config.dtype == "float32" else "default"):
            return method(self, *args, **kwargs)

    return exact


class Llama(nnx.Module):
    """The parameters and one way through them; what attention sees is the caller's (`Attend`).

    `gather` makes a whole parameter of the share that a device holds, where weights are sharded (`Trainer` sets it):
    a layer's just before the layer uses them, in the dtype of the computation.
    """

    gather: Gather | None = None

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

    @_as_precise
    def hidden(self, tokens_BxT: Array, positions_BxT: Array, attend: Attend, cache: list | None = None):
        """Last hidden states [B, T, D], normed, and the cache as `attend` left it.

        `cache` has an entry per layer, handed to `attend` as its carry. With a cache, layers run unrolled: a scan would
        in JAX 0.10 copy every layer's cache out of a stack and back at every token. Without one they run as
        `config.scan` says. A scan compiles one layer for all, which pays from some ten layers on; but it makes JAX
        differentiate the branches of blocked attention a second time in spite of their own gradient.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        B, T = tokens_BxT.shape
        # Rows and time are one axis M outside attention, and every product is one of two matrices: on the CPU
        # the gradients of products over more axes fall off the fast path (measured: half the step).
        M = B * T
        x_MxD = self._whole("embed_VxD", self.embed_VxD[...])[tokens_BxT.reshape(M)].astype(dtype)
        rotation = rotary_angles(positions_BxT, config.head_size, config.rope_theta)

        def project(h_MxD, w_DxNxH):
            return (h_MxD @ w_DxNxH.reshape(config.width, -1)).reshape(B, T, -1, config.head_size)

        def layer(x_MxD, w, carry):
            w = {name: self._whole(f"layers/{name}", value.astype(dtype)) for name, value in w.items()}
            h_MxD = rms_norm(x_MxD, w["attention_norm_LxD"], config.norm_epsilon)
            q_BxTxNxH = rotate(self.before_rotation("q", project(h_MxD, w["q_LxDxNxH"]), w), rotation)
            k_BxTxKxH = rotate(self.before_rotation("k", project(h_MxD, w["k_LxDxKxH"]), w), rotation)
            v_BxTxKxH = project(h_MxD, w["v_LxDxKxH"])
            out_BxTxNxH, left = attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, carry)
            x_MxD = x_MxD + out_BxTxNxH.reshape(M, -1) @ w["o_LxNxHxD"].reshape(-1, config.width)
            h_MxD = rms_norm(x_MxD, w["feed_forward_norm_LxD"], config.norm_epsilon)
            out_MxD = (jax.nn.silu(h_MxD @ w["gate_LxDxF"]) * (h_MxD @ w["up_LxDxF"])) @ w["down_LxFxD"]
            return x_MxD + out_MxD, left

        weights = {name: parameter[...] for name, parameter in self.layers.items()}
        policy = REMAT[config.remat]
        body = layer if policy is None else jax.checkpoint(layer, policy=policy)
        left = []
        if config.scan and cache is None:
            x_MxD, _ = jax.lax.scan(lambda x_MxD, w: (body(x_MxD, w, None)[0], None), x_MxD, weights)
            return self._normed(x_MxD).reshape(B, T, -1), left
        for l in range(config.layers):
            x_MxD, after = body(
                x_MxD, jax.tree.map(lambda value: value[l], weights), None if cache is None else cache[l]
            )
            left.append(after)
        return self._normed(x_MxD).reshape(B, T, -1), left

    def before_rotation(self, kind: str, x_BxTxNxH: Array, w: dict[str, Array]) -> Array:
        """The queries ("q") or keys ("k") that are rotated, of those that were projected, and one layer's weights by
        name. Other families norm them here; Llama leaves them."""
        return x_BxTxNxH

    @_as_precise
    def logits(self, hidden: Array) -> Array:
        """float32 logits over V of hidden states with any leading axes."""
        name, table = ("embed_VxD", self.embed_VxD) if self.head_DxV is None else ("head_DxV", self.head_DxV)
        head = self._whole(name, table[...].astype(hidden.dtype))
        head_DxV = head.T if self.head_DxV is None else head
        return jnp.einsum("...d,dv->...v", hidden, head_DxV, preferred_element_type=jnp.float32)

    def _normed(self, x_MxD: Array) -> Array:
        return rms_norm(x_MxD, self._whole("norm_D", self.norm_D[...]), self.config.norm_epsilon)

    def _whole(self, name: str, share: Array) -> Array:
        return share if self.gather is None else self.gather(name, share)


def rms_norm(x: Array, scale_D: Array, epsilon: float) -> Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary_frequencies(head_size: int, theta: float) -> np.ndarray:
    """Radians per position of each pair [H/2], float32: 1 / theta ** (2 i / H), rounded where transformers rounds.

    The same bits on every machine: a float32 power differs in its last bits between processors, and an angle is off by
    its frequency's error times the position. Here the power is a float64, whose last bits the rounding drops.
    """
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    powers = np.array([theta ** float(exponent) for exponent in exponents])
    return np.float32(1) / powers.astype(np.float32)


def rotary_angles(positions_BxT: Array, head_size: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, each [B, T, 1, H/2], float32."""
    frequencies = rotary_frequencies(head_size, theta)
    angles = positions_BxT[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotary position embedding, halves paired as in Hugging Face's Llama (not interleaved)."""
    cos, sin = rotation
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxNxH.dtype)
