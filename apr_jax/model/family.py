"""Model families: the interface through which all other code uses a model architecture, such as Llama. To train another
architecture, a user writes another family.

A family is a module or a package with a `Family` called ``FAMILY``:

    Config          sizes and settings of one model (`ModelConfig`)
    Model           parameters and the forward pass (`Model`)
    presets         sizes by name
    rules           how the optimizer trains each parameter
    hugging_face    names of parameters and the config.json of transformers (apr_jax/model/hugging_face.py)

A family is chosen by its name, or by ``package.module`` for a user's own (`load_family`). A saved model records the
name.
"""

import dataclasses
import math
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
from flax import nnx

from apr_jax.errors import UserError
from apr_jax.io.module import load_module
from apr_jax.model.hugging_face import HuggingFace
from apr_jax.settings import annotations_of

Array = jax.Array
# Attention of one layer: (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, the layer's carry) -> (out_BxTxNxH, the new carry). The
# carry is the layer's key/value cache, or None without a cache.
Attend = Callable[[Array, Array, Array, object], tuple[Array, object]]
# (name of a parameter, this device's shard of it) -> the whole parameter. A shard of a stacked parameter is of one
# layer.
Gather = Callable[[str, Array], Array]

BUILT_IN = {"llama": "apr_jax.model.llama"}
DEFAULT = "llama"


class ModelConfig(Protocol):
    """Sizes and settings of one model: a frozen dataclass that raises UserError for wrong values.

    It has at least the field `vocab_size` and the settings of an experiment's section "model": width, layers, heads,
    kv_heads, feed_forward (None for a default in these two), context, tie_embeddings, dtype, attention, remat, scan.
    Further fields need defaults. Presets may set them, and a checkpoint stores their values.
    """

    family: ClassVar[str]  # the name for `load_family`; ``__name__`` in a user's own module
    vocab_size: int
    width: int  # D
    layers: int  # L
    heads: int  # N, query heads
    context: int  # the longest sequence, tokens
    tie_embeddings: bool
    dtype: str  # of the computation, float32 or bfloat16; parameters are float32
    attention: str  # kind of attention over packed rows, see `attention.packed_attention`

    @property
    def kv(self) -> int:
        """The number of key/value heads, K."""

    @property
    def head_size(self) -> int:
        """The width of one head, H."""

    @property
    def hidden(self) -> int:
        """The width of the feed-forward, F."""


class Model(Protocol):
    """A language model: an ``nnx.Module``, constructed by ``Model(config, rngs=nnx.Rngs(seed))``.

    Parameters, all float32: `embed_VxD`; `head_DxV`, which is None where the embedding serves as head; `layers`, an
    ``nnx.Dict`` of arrays whose first axis is the layer (norm gains have two axes, matrices more); any others.
    """

    config: ModelConfig
    # Returns a whole parameter for this device's shard of it. `Trainer` sets it where weights are sharded. The model
    # must call it on every parameter just before use, on a layer's parameter by the name ``layers/NAME``. None: every
    # parameter is whole.
    gather: Gather | None

    def hidden(
        self, tokens_BxT: Array, positions_BxT: Array, attend: Attend, cache: list | None = None
    ) -> tuple[Array, list]:
        """Return (the last hidden states after the final norm [B, T, D], the carries that `attend` returned). `cache`
        has one entry per layer, the carry that is passed to `attend`. Without a cache the carry is None."""

    def logits(self, hidden: Array) -> Array:
        """Return the logits [..., V] in float32 of hidden states [..., D]."""


class Rule(NamedTuple):
    """How the optimizer trains the parameters whose name begins with a match of `pattern`.

    `muon` is for matrices that are trained by Muon, which orthogonalises their updates layer by layer: (the axes over
    which the product sums, the axes that it produces). None: the parameter is trained by Adam, as Muon's authors do for
    embeddings, heads and gains. `decay`: whether weight decay applies.
    """

    pattern: str  # a regular expression
    muon: tuple[tuple[int, ...], tuple[int, ...]] | None
    decay: bool


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family: the object that its module exports as ``FAMILY``."""

    title: str  # the name in messages, "Llama"
    Config: type[ModelConfig]
    Model: type[Model]
    presets: Mapping[str, Mapping[str, Any]]  # fields of `Config` by the name of a size: "tiny", "small" and "base"
    rules: tuple[Rule, ...]  # the first match applies; a parameter without a rule is an error
    hugging_face: HuggingFace
    edition: int = 1  # raise it when a change of the code changes what a model computes: runs train it again then

    @property
    def name(self) -> str:
        """The name by which `load_family` finds this family."""
        return self.Config.family


def load_family(name: str) -> Family:
    """Return the family of a name: a built-in one or ``package.module``, which may be in the current folder. Raises
    UserError where there is no such module, where it has no ``FAMILY``, or where its Config has another name."""
    allowed = f"family is one of {', '.join(BUILT_IN)} or package.module"
    place = BUILT_IN.get(name, name)
    if not all(part.isidentifier() for part in place.split(".")):
        raise UserError(f"{allowed}, was given {name!r}")
    try:
        found = getattr(load_module(place), "FAMILY", None)
    except UserError as error:
        raise UserError(f"{allowed}, was given {name!r}: {error}") from None
    if not isinstance(found, Family):
        raise UserError(f"{allowed}, was given {name!r}: {place} has no Family called FAMILY")
    if found.name != name:
        raise UserError(f"{allowed}, was given {name!r}: the family of its Config is {found.name!r}")
    return found


# Fields of every family's config that are settings of an experiment, beside those that its presets set.
COMMON = ("kv_heads", "feed_forward", "tie_embeddings", "dtype", "attention", "remat", "scan")


def model_setting_types(family: Family) -> dict[str, Any]:
    """Return the annotations of a family's settings by name: the fields in COMMON and the sizes that its presets set.
    A size may also be None."""
    sizes = {name for preset in family.presets.values() for name in preset}
    annotations = annotations_of(family.Config)
    return {
        field.name: annotations[field.name] | None if field.name in sizes else annotations[field.name]
        for field in dataclasses.fields(family.Config)
        if field.name in sizes or field.name in COMMON
    }


def model_settings(family: Family) -> dict[str, Any]:
    """Return the defaults of a family's settings by name. A size is None by default: the preset sets it then."""
    own = {field.name: field.default for field in dataclasses.fields(family.Config)}
    return {
        name: None if types.NoneType in typing.get_args(kind) else own[name]
        for name, kind in model_setting_types(family).items()
    }


def family_of(config: ModelConfig) -> Family:
    """Return the family of a config. Raises UserError as `load_family` does."""
    return load_family(config.family)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return a config as a JSON object with its fields and its "family". `read_config` is the inverse."""
    return {"family": config.family, **dataclasses.asdict(config)}


def read_config(content: Mapping[str, Any]) -> ModelConfig:
    """Return the config of a JSON object that `config_json` made. Raises UserError where the object has no "family",
    where the family is not found, or where a value is wrong."""
    sizes = dict(content)
    if (name := sizes.pop("family", None)) is None:
        raise UserError(f"the model's config has no key family, one of {', '.join(BUILT_IN)} or package.module")
    return load_family(name).Config(**sizes)


def make_model(config: ModelConfig, seed: int) -> Model:
    """Return a model with random weights, drawn from `seed`."""
    return family_of(config).Model(config, rngs=nnx.Rngs(seed))


def abstract_model(config: ModelConfig) -> Model:
    """Return a model with shapes in place of arrays, for counting parameters and for restoring weights into it."""
    return nnx.eval_shape(lambda: make_model(config, 0))


def parameter_count(model: Model) -> tuple[int, int]:
    """Return (the number of all parameters, the number outside the embedding and the head). The model may be one of
    `abstract_model`."""
    sizes = Counter()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        sizes[path[0]] += math.prod(leaf.shape)
    total = sum(sizes.values())
    return total, total - sizes["embed_VxD"] - sizes["head_DxV"]
