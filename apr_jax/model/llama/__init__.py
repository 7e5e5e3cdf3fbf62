"""The model family of Llama 2: RMSNorm, rotary positions, SwiGLU and grouped key/value heads. A family with small
differences can reuse its parts."""

from apr_jax.model.family import Family, Rule
from apr_jax.model.llama.hf import HUGGING_FACE
from apr_jax.model.llama.model import Llama, LlamaConfig

# Sizes by name: about 1 M, 25 M and the paper's 228 M parameters outside the embedding and the head.
PRESETS = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "feed_forward": 352},
    "small": {"width": 512, "layers": 8, "heads": 8, "feed_forward": 1376},
    "base": {"width": 1024, "layers": 18, "heads": 16, "feed_forward": 2752},
}
RULES = (
    Rule(r".*norm_", None, False),
    Rule(r"layers/[qkv]_", ((1,), (2, 3)), True),
    Rule(r"layers/o_", ((1, 2), (3,)), True),
    Rule(r"layers/(gate|up|down)_", ((1,), (2,)), True),
    Rule(r"embed_|head_", None, True),
)
FAMILY = Family("Llama", LlamaConfig, Llama, PRESETS, RULES, HUGGING_FACE)
