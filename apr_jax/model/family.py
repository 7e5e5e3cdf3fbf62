"""A model family: all that a user writes to train models of another architecture, and all that the rest of the code
knows of one.

A family is a module, or a package, with a `Family` called ``FAMILY``:

    Config          sizes and settings of one model (`ModelConfig`)
    Model           parameters, and the way of tokens through them (`Model`)
    presets         sizes by name
    rules           how the optimizer trains each parameter
    hugging_face    names of parameters and config.json of transformers (apr_jax/model/hugging_face.py)

It is chosen by name, or by ``package.module`` for one of a user's own (`load_family`). A saved model says its family.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
from flax import nnx

from apr_jax.errors import UserError
from apr_jax.io.module import load_module
from apr_jax.model.hugging_face import HuggingFace

Array = jax.Array
# (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, layer's carry or None) -> (out_BxTxNxH, what the layer leaves behind)
Attend = Callable[[Array, Array, Array, object], tuple[Array, object]]
# (name of a parameter, the share of it that this device holds, for one layer where it is stacked) -> the whole
Gather = Callable[[str, Array], Array]

BUILT_IN = {"llama": "apr_jax.model.llama"}
DEFAULT = "llama"


class ModelConfig(Protocol):
    """Sizes of one model: a frozen dataclass that checks its own values (UserError).

    Its fields take at least `vocab_size` and the settings of an experiment's section "model": width, layers, heads,
    kv_heads, feed_forward (the last two None for a default), context, tie_embeddings, dtype, attention, remat, scan.
    Fields beyond these have defaults; presets may set them, and a checkpoint's own are kept.
    """

    family: ClassVar[str]  # the name that `load_family` takes; ``__name__`` in a module of a user's own
    vocab_size: int
    width: int  # D
    layers: int  # L
    heads: int  # N, query heads
    context: int  # longest position, tokens
    tie_embeddings: bool
    dtype: str  # of the computation, float32 or bfloat16; parameters are float32
    attention: str  # how packed rows attend, see `attention.packed_attention`

    @property
    def kv(self) -> int:
        """K, key/value heads."""

    @property
    def head_size(self) -> int:
        """H."""

    @property
    def hidden(self) -> int:
        """F, width of the feed-forward."""


class Model(Protocol):
    """An ``nnx.Module``, made by ``Model(config, rngs=nnx.Rngs(seed))``.

    Parameters: `embed_VxD`; `head_DxV`, None where it is the embedding; `layers`, an ``nnx.Dict`` of arrays with the
    layer axis in front, gains of two axes and matrices of more; any others. All are float32.
    """

    config: ModelConfig
    # Makes a whole parameter of the share that a device holds, where weights are sharded: `Trainer` sets it, and the
    # model calls it for every parameter just before it is used, a layer's as ``layers/NAME``. None: all are whole.
    gather: Gather | None

    def hidden(
        self, tokens_BxT: Array, positions_BxT: Array, attend: Attend, cache: list | None = None
    ) -> tuple[Array, list]:
        """Last hidden states [B, T, D], normed, and what `attend` left behind in each layer. `cache` has an entry per
        layer, handed to `attend` as its carry."""

    def logits(self, hidden: Array) -> Array:
        """float32 logits over V of hidden states with any leading axes."""


class Rule(NamedTuple):
    """How the parameters are trained whose name `pattern` matches from its beginning.

    `muon`: (axes summed over, axes produced) of a matrix that Muon makes orthogonal, layer by layer; None: trained by
    Adam, as Muon's authors do with tables, heads and gains. `decay`: whether weight decay applies.
    """

    pattern: str
    muon: tuple[tuple[int, ...], tuple[int, ...]] | None
    decay: bool


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's module has as ``FAMILY``."""

    title: str  # for people, "Llama"
    Config: type[ModelConfig]
    Model: type[Model]
    presets: Mapping[str, Mapping[str, Any]]  # sizes by name, as values of `Config`: "tiny", "small" and "base"
    rules: tuple[Rule, ...]  # the first match wins; a parameter without a rule is refused
    hugging_face: HuggingFace

    @property
    def name(self) -> str:
        return self.Config.family


def load_family(name: str) -> Family:
    """A family by its name or ``package.module``, looked for also in the current folder. Raises UserError."""
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
        raise UserError(f"{allowed}, was given {name!r}: its models say that their family is {found.name!r}")
    return found


def family_of(config: ModelConfig) -> Family:
    return load_family(config.family)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A config as a JSON object, its family among the fields; `read_config` reads it."""
    return {"family": config.family, **dataclasses.asdict(config)}


def read_config(content: Mapping[str, Any]) -> ModelConfig:
    """The config of its JSON form. Raises UserError where it says no family, or one that is not found."""
    sizes = dict(content)
    if (name := sizes.pop("family", None)) is None:
        raise UserError(f"the sizes of its model say no family, one of {', '.join(BUILT_IN)} or package.module")
    return load_family(name).Config(**sizes)


def make_model(config: ModelConfig, seed: int) -> Model:
    """A model with random weights."""
    return family_of(config).Model(config, rngs=nnx.Rngs(seed))


def abstract_model(config: ModelConfig) -> Model:
    """A model of shapes in the place of arrays: to count, or to be filled with weights."""
    return nnx.eval_shape(lambda: make_model(config, 0))


def parameter_count(model: Model) -> tuple[int, int]:
    """(all parameters, those outside the embedding and the head). The model may be abstract."""
    sizes = Counter()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        sizes[path[0]] += math.prod(leaf.shape)
    total = sum(sizes.values())
    return total, total - sizes["embed_VxD"] - sizes["head_DxV"]
