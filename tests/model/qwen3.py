"""Qwen3 as an example of a user's own model family, in one file. It is Llama with RMSNorm on the queries and keys of
each head, and its head size does not depend on the width."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from apr_jax.checks import at_least
from apr_jax.errors import UserError
from apr_jax.model.family import Family
from apr_jax.model.hugging_face import SAME, ConfigReader, HuggingFace, TensorName
from apr_jax.model.llama import RULES, Llama, LlamaConfig, hf
from apr_jax.model.llama.model import rms_norm


@dataclasses.dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    family: ClassVar[str] = __name__
    head_dim: int = 16
    norm_epsilon: float = 1e-6
    BOUNDS = (*LlamaConfig.BOUNDS, at_least(2, "head_dim"))

    def _check_head_size(self) -> None:
        if self.head_dim % 2:
            raise UserError(f"head_dim is even, was given {self.head_dim}")

    @property
    def head_size(self) -> int:
        return self.head_dim


class Qwen3(Llama):
    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        for kind in "qk":
            self.layers[f"{kind}_norm_LxH"] = nnx.Param(jnp.ones((config.layers, config.head_size)))

    def before_rotation(self, kind, x_BxTxNxH, w):
        return rms_norm(x_BxTxNxH, w[f"{kind}_norm_LxH"], self.config.norm_epsilon)


def read_config(reader: ConfigReader, context: int) -> Qwen3Config:
    if set(kinds := reader.get("layer_types", [])) - {"full_attention"}:
        raise reader.wrong("layer_types", "full_attention of every layer", kinds)
    sizes = hf.read_sizes(reader, context) | {"head_dim": reader.number("head_dim", default=128)}
    return hf.as_written(Qwen3Config, sizes)


FAMILY = Family(
    title="Qwen3",
    Config=Qwen3Config,
    Model=Qwen3,
    presets={"tiny": {"width": 128, "layers": 4, "heads": 4, "feed_forward": 352, "head_dim": 24}},
    rules=RULES,
    hugging_face=HuggingFace(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        names=(
            *hf.NAMES,
            TensorName(r"layers/([qk])_norm_LxH", r"model.layers.{}.self_attn.\1_norm.weight", SAME),
        ),
        write_config=hf.write_config,
        read_config=read_config,
        read=(*hf.READ, "layer_types", "max_window_layers"),  # max_window_layers: unused without sliding windows
        fixed=hf.FIXED,
        positions=32_768,
    ),
)
