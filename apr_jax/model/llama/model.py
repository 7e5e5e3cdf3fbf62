"""Llama 2 (arXiv 2307.09288) in Flax NNX: config, parameters and forward pass.

The layers' parameters are stacked, with the layer as first axis (``q_LxDxNxH``): an optimizer sees one array instead of
L. `apr_jax.export.hf` unstacks them into Hugging Face tensors.
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
from apr_jax.settings import execution

Array = jax.Array
ATTENTIONS = ("auto", "blocked", "dense", "cudnn")
# Rematerialisation: which activations of a layer are saved for the backward pass. It computes the others again.
REMAT = {
    "none": None,  # all are saved
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights; attention's are not
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and settings of one Llama, a `ModelConfig` of apr_jax.model.family. The paper's model is the preset "base"
    (18 layers, width 1024, 16 heads) with the vocabulary of Llama 2.

    Raises UserError for a value out of bounds and for sizes that do not fit each other.
    """

    family: ClassVar[str] = "llama"
    vocab_size: int
    width: int = 128  # D
    layers: int = 4  # L
    heads: int = 4  # N, query heads
    kv_heads: int | None = None  # K; None: as many as heads
    feed_forward: int | None = None  # F; None: 8/3 of the width, up to a multiple of 32
    context: int = 1024  # the longest sequence, tokens
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    dtype: str = "float32"  # of the computation; parameters are float32
    attention: str = execution("auto")  # kind of attention over packed rows, see `attention.packed_attention`
    remat: str = execution("none")  # a key of REMAT
    scan: bool = execution(False)  # compile one layer for all of them, without a cache only; see `Llama.hidden`

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
    """Decorate a method of a model: the method and its gradient multiply float32 in full precision. By default JAX
    rounds the factors to TF32 on GPUs and to bfloat16 on TPUs. Shapes, and so roundings, differ between rollouts and
    training, so their log-probabilities would differ by more than 1e-4."""

    @functools.wraps(method)
    def exact(self, *args, **kwargs):
        with jax.default_matmul_precision("highest" if self.config.dtype == "float32" else "default"):
            return method(self, *args, **kwargs)

    return exact


class Llama(nnx.Module):
    """A Llama, a `Model` of apr_jax.model.family. The caller passes the attention function (`Attend`), so one forward
    pass serves prefill, decode and training on packed rows.
    """

    # See `Model.gather`. A layer's parameters are cast to the dtype of the computation before they are gathered.
    gather: Gather | None = None

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        L, D, N, K, H, F, V = (
            config.layers, config.width, config.heads, config.kv, config.head_size, config.hidden, config.vocab_size,
        )  # fmt: skip

        def normal(*shape: int, scale: float) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))

        into, out = D**-0.5, (2 * L) ** -0.5  # 2 L products add to the residual stream; `out` keeps the sum's size
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
        """Return (the last hidden states after the final norm [B, T, D], the layers' carries), as `Model.hidden` of
        apr_jax.model.family. With `config.scan` and no cache the list of carries is empty.

        With a cache the layers always run unrolled: a scan would, in JAX 0.10, copy every layer's cache out of a stack
        and back at every token. Without a cache `config.scan` decides. A scan compiles one layer instead of L, which
        pays from about ten layers on. But under a scan JAX differentiates the branches of blocked attention a second
        time, although they have their own gradient.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        B, T = tokens_BxT.shape
        # Outside attention, rows and time are one axis M, and every product is of two matrices. On a CPU the gradients
        # of products over more axes are not computed by the fast path (measured: half the time of a step).
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
            out_BxTxNxH, carry = attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, carry)
            x_MxD = x_MxD + out_BxTxNxH.reshape(M, -1) @ w["o_LxNxHxD"].reshape(-1, config.width)
            h_MxD = rms_norm(x_MxD, w["feed_forward_norm_LxD"], config.norm_epsilon)
            out_MxD = (jax.nn.silu(h_MxD @ w["gate_LxDxF"]) * (h_MxD @ w["up_LxDxF"])) @ w["down_LxFxD"]
            return x_MxD + out_MxD, carry

        weights = {name: parameter[...] for name, parameter in self.layers.items()}
        policy = REMAT[config.remat]
        body = layer if policy is None else jax.checkpoint(layer, policy=policy)
        carries = []
        if config.scan and cache is None:
            x_MxD, _ = jax.lax.scan(lambda x_MxD, w: (body(x_MxD, w, None)[0], None), x_MxD, weights)
            return self._normed(x_MxD).reshape(B, T, -1), carries
        for l in range(config.layers):
            x_MxD, carry = body(
                x_MxD, jax.tree.map(lambda value: value[l], weights), None if cache is None else cache[l]
            )
            carries.append(carry)
        return self._normed(x_MxD).reshape(B, T, -1), carries

    def before_rotation(self, kind: str, x_BxTxNxH: Array, w: dict[str, Array]) -> Array:
        """Return the queries (`kind` "q") or keys ("k") to which the rotary embedding is applied. `x_BxTxNxH` are the
        projected ones of a layer; `w` has the layer's weights by name. Llama returns `x_BxTxNxH` unchanged. A derived
        family may change it, as Qwen3 normalises queries and keys."""
        return x_BxTxNxH

    @_as_precise
    def logits(self, hidden: Array) -> Array:
        """Return the logits [..., V] in float32 of hidden states [..., D]."""
        name, table = ("embed_VxD", self.embed_VxD) if self.head_DxV is None else ("head_DxV", self.head_DxV)
        head = self._whole(name, table[...].astype(hidden.dtype))
        head_DxV = head.T if self.head_DxV is None else head
        return jnp.einsum("...d,dv->...v", hidden, head_DxV, preferred_element_type=jnp.float32)

    def _normed(self, x_MxD: Array) -> Array:
        return rms_norm(x_MxD, self._whole("norm_D", self.norm_D[...]), self.config.norm_epsilon)

    def _whole(self, name: str, shard: Array) -> Array:
        return shard if self.gather is None else self.gather(name, shard)


def rms_norm(x: Array, scale_D: Array, epsilon: float) -> Array:
    """Return the root-mean-square norm (arXiv 1910.07467) of `x` over its last axis, computed in float32 and returned
    in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary_frequencies(head_size: int, theta: float) -> np.ndarray:
    """Return the rotary frequencies in radians per position, float32 [H / 2]: 1 / theta ** (2 i / H) for the i-th pair
    of features, rounded to float32 at the places where transformers rounds.

    The bits are the same on every machine. A float32 power would differ in its last bits between processors, and the
    error of an angle is its frequency's error times the position. Here the power is computed in float64, and rounding
    to float32 drops the last bits.
    """
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    powers = np.array([theta ** float(exponent) for exponent in exponents])
    return np.float32(1) / powers.astype(np.float32)


def rotary_angles(positions_BxT: Array, head_size: int, theta: float) -> tuple[Array, Array]:
    """Return (cosine, sine) of the rotary angles (RoPE, arXiv 2104.09864), each float32 [B, T, 1, H / 2]."""
    frequencies = rotary_frequencies(head_size, theta)
    angles = positions_BxT[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH: Array, rotation: tuple[Array, Array]) -> Array:
    """Return queries or keys with the rotary position embedding, where `rotation` is from `rotary_angles`. Feature i
    and feature i + H / 2 are a pair, as in Hugging Face's Llama; the original Llama pairs neighbours."""
    cos, sin = rotation
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxNxH.dtype)
