"""The Hugging Face form of our Llama: tensor names and config.json of `LlamaForCausalLM`."""

from typing import Any

from apr_jax.model.hugging_face import INTO, OUT, SAME, ConfigReader, HuggingFace, TensorName
from apr_jax.model.llama.model import LlamaConfig

NAMES = (
    TensorName(r"embed_VxD", r"model.embed_tokens.weight", SAME),
    TensorName(r"norm_D", r"model.norm.weight", SAME),
    TensorName(r"head_DxV", r"lm_head.weight", INTO),
    TensorName(r"layers/attention_norm_LxD", r"model.layers.{}.input_layernorm.weight", SAME),
    TensorName(r"layers/feed_forward_norm_LxD", r"model.layers.{}.post_attention_layernorm.weight", SAME),
    TensorName(r"layers/([qkv])_LxDx[NK]xH", r"model.layers.{}.self_attn.\1_proj.weight", INTO),
    TensorName(r"layers/o_LxNxHxD", r"model.layers.{}.self_attn.o_proj.weight", OUT),
    TensorName(r"layers/(gate|up)_LxDxF", r"model.layers.{}.mlp.\1_proj.weight", INTO),
    TensorName(r"layers/down_LxFxD", r"model.layers.{}.mlp.down_proj.weight", OUT),
)
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "partial_rotary_factor": (1, None), "attention_dropout": (0, None), "rope_interleaved": (False, None),
    "is_causal": (True, None), "use_sliding_window": (False, None), "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0, None), "is_encoder_decoder": (False, None), "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None), "is_llama_config": (True, None), "quantization_config": (None,),
}  # fmt: skip
READ = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings",
)  # fmt: skip


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """Return the keys of config.json for a config. The base of the rotary angles is written twice: under the current
    key and under the key of older versions of transformers."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},
        "rope_theta": float(config.rope_theta),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_config(reader: ConfigReader, context: int) -> LlamaConfig:
    """Return the config that a config.json describes, with `context` as the longest sequence in tokens. Raises
    UserError for a wrong value, and for a head size other than the width over the heads."""
    sizes = read_sizes(reader, context)
    by_width = sizes["width"] / sizes["heads"]
    if reader.get("head_dim") not in (None, by_width):
        raise reader.wrong("head_dim", f"hidden_size / num_attention_heads, {by_width:g}")
    return as_written(LlamaConfig, sizes)


def read_sizes(reader: ConfigReader, context: int) -> dict[str, Any]:
    """Return the fields of a `LlamaConfig` that a config.json describes. A missing key has the default value of
    transformers. Raises UserError for a wrong value."""
    heads = reader.number("num_attention_heads")
    kv_heads = reader.number("num_key_value_heads", default=heads)
    return {
        "vocab_size": reader.number("vocab_size"),
        "width": reader.number("hidden_size"),
        "layers": reader.number("num_hidden_layers"),
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "feed_forward": reader.number("intermediate_size"),
        "context": context,
        "rope_theta": reader.rope_theta(),
        "norm_epsilon": reader.number("rms_norm_eps", float, 1e-6),
        "tie_embeddings": reader.flag("tie_word_embeddings"),
    }


def as_written(kind: type[LlamaConfig], sizes: dict[str, Any]) -> LlamaConfig:
    """Return a config of class `kind` with the fields `sizes`. Where the default feed-forward has the given size, the
    field `feed_forward` is None. So a config with the default feed-forward is unchanged by export and import."""
    by_width = kind(**sizes | {"feed_forward": None})
    return by_width if by_width.hidden == sizes["feed_forward"] else kind(**sizes)


HUGGING_FACE = HuggingFace(
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=NAMES,
    write_config=write_config,
    read_config=read_config,
    read=READ,
    fixed=FIXED,
    positions=2048,
    derived=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
