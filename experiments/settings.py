"""The settings of an experiment: the tree that a config file changes, and the checks of a changed tree.

Every setting is a field of the dataclass that uses it, declared there with its default, bounds and comment.
`default_config` makes the tree of these defaults. `read_settings` makes the dataclasses from a changed tree. The
sections of the tree, and the dataclasses that declare their settings:

    (top)        TopSettings below
    TASK         the task's own `Settings`; the section has the name of the task
    data         apr_jax/data/dataset.py        DataConfig
    model        ModelSettings below, and the config of the model's family, such as LlamaConfig
    sft          SftSettings below, with        SftConfig and OptimizerConfig of apr_jax/train
    grpo         GrpoSettings below, with       GrpoConfig, OptimizerConfig and Penalties of apr_jax/train
    budget       apr_jax/threads/run.py         Budget
    tokenizer    evaluate    export             below
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from apr_jax.checks import SEED, FieldError, at_least, check_fields, check_type
from apr_jax.data.dataset import DataConfig
from apr_jax.errors import UserError
from apr_jax.io.paths import expand_home
from apr_jax.model.family import DEFAULT, Family, load_family, model_setting_types, model_settings
from apr_jax.settings import build, defaults, execution, leaves, types
from apr_jax.tasks.task import Task, find_task, load_task
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget
from apr_jax.train.objective import GrpoConfig
from apr_jax.train.sft import SftConfig

STAGES = ("data", "sft", "grpo", "evaluate", "export", "report")
WINDOW = 32  # the smallest window that is accepted, in tokens


@dataclasses.dataclass(frozen=True)
class TopSettings:
    """Settings of the whole experiment."""

    name: str = "experiment"  # the default folder is runs/NAME
    seed: int = 0  # of all random choices: problems, traces, weights, order, rollouts
    devices: int = execution(2)  # rows are split over all devices; on a CPU they are virtual devices
    fsdp: int = execution(1)  # devices that share one copy of weights and optimizer state, a divisor of devices
    window: int = 768  # tokens of one thread's context, in training and in evaluation

    BOUNDS = (at_least(1, "devices", "fsdp"), at_least(WINDOW, "window"), *SEED)

    def __post_init__(self):
        check_fields(self)
        place = PurePath(self.name)
        if not place.parts or place.is_absolute() or ".." in place.parts or not self.name.isprintable():
            raise FieldError("name", f"is the name of a folder under runs/, was given {self.name!r}")
        if self.devices % self.fsdp:
            raise FieldError("fsdp", f"divides devices ({self.devices}), was given {self.fsdp}")


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """Settings of the tokenizer."""

    name: str = ""  # folder or name of a Hugging Face tokenizer; "": the task's own tokenizer


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Settings of the model that do not depend on its family (architecture).

    The section `model` also has the fields of the family's config, such as `width`. None stands for the value in
    `preset`.
    """

    family: str = DEFAULT  # architecture: the name of a built-in one, or package.module of your own
    preset: str = "tiny"  # sizes: llama has tiny (1 M parameters), small (25 M) and base (228 M)
    checkpoint: str = ""  # SFT begins with this saved step, or the last one of a folder; "": random weights


@dataclasses.dataclass(frozen=True)
class SftSettings(SftConfig):
    """Settings of supervised training (SFT), the same for every variant."""

    models: str = "separate"  # one model per variant, as in the paper; or "joint": one model for all
    children: int = 0  # trained child threads per tree, those with a result first; 0: all, as in the paper

    BOUNDS = (*SftConfig.BOUNDS, at_least(0, "children"))

    def __post_init__(self):
        super().__post_init__()
        if self.models not in ("separate", "joint"):
            raise FieldError("models", f"is separate or joint, was given {self.models!r}")


@dataclasses.dataclass(frozen=True)
class GrpoSettings(GrpoConfig):
    """Settings of reinforcement learning with GRPO."""

    variants: tuple[str, ...] = execution(())  # variants to train; (): the task's first variant
    slots: int = execution(64)  # threads decoded at the same time, a multiple of devices

    BOUNDS = (*GrpoConfig.BOUNDS, at_least(1, "slots"))


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Settings of the evaluation on held-out problems."""

    window: int | None = None  # tokens of one thread's context; None: the experiment's window
    temperature: float = 0.0  # 0: greedy
    extra_temperatures: tuple[float, ...] = ()  # a further table for each (the paper's table 3: 0.1, 0.5, 1)
    # By variant, for models whose demonstrations had conditions: the budgets that prompts ask for, a table for each.
    # (): the most frequent condition of the demonstrations.
    budgets: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict, metadata={"shared": "evaluate.budgets"}
    )
    top_k: int = 0  # 0: the whole vocabulary
    top_p: float = 1.0
    slots: int = execution(64)  # threads decoded at the same time, a multiple of devices

    BOUNDS = (at_least(1, "slots"), at_least(WINDOW, "window"))

    def __post_init__(self):
        check_fields(self)
        temperatures = [self.temperature, *self.extra_temperatures]
        for temperature in temperatures:
            self.sampling(temperature)
        if len(set(temperatures)) < len(temperatures):
            raise FieldError(
                "extra_temperatures",
                f"has other temperatures than evaluate.temperature ({self.temperature:g}), each once, was given "
                f"{self.extra_temperatures}",
            )
        if long := [t for t in self.extra_temperatures if float(f"{t:g}") != t]:  # digits in names of records files
            raise FieldError("extra_temperatures", f"has temperatures of at most 6 digits, was given {long[0]}")
        for variant, given in self.budgets.items():
            if min(given, default=0) < 0 or len({*given}) < len(given):
                raise FieldError("budgets", f"has whole numbers from 0 for {variant}, each once, was given {given}")

    def sampling(self, temperature: float | None = None) -> Sampling:
        """Return how tokens are sampled at a temperature. None stands for the setting `temperature`."""
        return Sampling(self.temperature if temperature is None else temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Settings of the export in Hugging Face format."""

    dtype: str = "float32"  # of the exported weights: float32 or bfloat16
    check_trees: int = 20  # trees decoded by transformers and by us, to compare; 0: only logits are compared

    BOUNDS = (at_least(0, "check_trees"),)

    def __post_init__(self):
        check_fields(self)
        if self.dtype not in ("float32", "bfloat16"):
            raise FieldError("dtype", f"is float32 or bfloat16, was given {self.dtype!r}")


SECTIONS = {
    "data": DataConfig, "tokenizer": TokenizerSettings, "sft": SftSettings, "grpo": GrpoSettings, "budget": Budget,
    "evaluate": EvaluateSettings, "export": ExportSettings,
}  # fmt: skip
TOP = tuple(field.name for field in dataclasses.fields(TopSettings))
NAMES = ("task", *TOP, *SECTIONS, "model")  # names that a task cannot have


def default_config(task: str, family: str = DEFAULT) -> ConfigDict:
    """Return the tree of default settings of a task and a model family. `task` is a name or package.module:Class.

    Raises UserError if the task has the name of a setting or a section.
    """
    kind = find_task(task)
    if kind.name in NAMES:
        raise UserError(f"the task {task} has the name of the settings {kind.name}: give it another name")
    tree = {"task": task, **defaults(TopSettings), kind.name: defaults(kind.Settings)}
    tree |= {name: defaults(section) for name, section in SECTIONS.items()}
    tree["evaluate"]["budgets"] = {variant: () for variant in kind.variants}
    tree["model"] = defaults(ModelSettings) | {"family": family} | model_settings(load_family(family))
    return ConfigDict(tree)


@functools.cache
def setting_types(task: str, family: str = DEFAULT) -> dict[str, Any]:
    """Return the type annotation of every setting by its full name, such as int, tuple[float, ...] or int | None."""
    kind = find_task(task)
    found = {"task": str, **types(TopSettings), **types(kind.Settings, f"{kind.name}.")}
    for name, section in {**SECTIONS, "model": ModelSettings}.items():
        found |= types(section, f"{name}.")
    found |= {f"model.{name}": annotation for name, annotation in model_setting_types(load_family(family)).items()}
    return found | {f"evaluate.budgets.{variant}": tuple[int, ...] for variant in kind.variants}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an experiment, checked by `read_settings`."""

    config: dict[str, Any]  # the tree that was read
    top: TopSettings
    task: Task
    data: DataConfig
    tokenizer: str  # folder or name of a Hugging Face tokenizer; "": the task's own
    family: Family
    model: dict[str, Any]  # arguments of the family's config, without vocab_size
    checkpoint: str  # path of the weights that SFT begins with; "": random weights
    sft: SftSettings
    grpo: GrpoSettings
    budget: Budget
    evaluate: EvaluateSettings
    export: ExportSettings

    name = property(lambda self: self.top.name)
    seed = property(lambda self: self.top.seed)
    devices = property(lambda self: self.top.devices)
    fsdp = property(lambda self: self.top.fsdp)
    window = property(lambda self: self.top.window)

    @property
    def joint(self) -> bool:
        """Whether one supervised model is trained for all variants."""
        return self.sft.models == "joint"

    @property
    def grpo_variants(self) -> tuple[str, ...]:
        """The variants whose models GRPO trains: `grpo.variants`, or the task's first variant if that is empty."""
        return self.grpo.variants or self.task.variants[:1]

    def budget_of(self, variant: str) -> Budget:
        """Return the budget of a variant's trees. If its threads have no children, `min_children` is 0."""
        return self.budget if self.task.spawns(variant) else dataclasses.replace(self.budget, min_children=0)


def read_settings(config: ConfigDict) -> Settings:
    """Return the settings in a tree, checked.

    Raises UserError in one line that says which setting is wrong, what was given and what is allowed.
    """
    c = config.to_dict()
    _check_types(c)
    kind, family = find_task(c["task"]), load_family(c["model"]["family"])
    top = build(TopSettings, {name: c[name] for name in TOP})
    task = load_task(c["task"], build(kind.Settings, c[kind.name], f"{kind.name}."))
    given = {
        "task": c["task"], "task settings": task.settings, "seed": top.seed, "window": top.window,
        "sft.row_length": c["sft"]["row_length"], "tokenizer.name": expand_home(c["tokenizer"]["name"]),
        "evaluate.budgets": c["evaluate"]["budgets"],
    }  # fmt: skip
    sections = {name: build(section, c[name], f"{name}.", given) for name, section in SECTIONS.items()}
    model = _model_sizes(c["model"], family)
    longest = max(top.window, sections["evaluate"].window or 0, sections["grpo"].row_length)
    model["context"] = -(-longest // 128) * 128
    try:
        family.Config(vocab_size=8, **model)
    except FieldError as error:
        raise UserError(f"model.{error}") from None
    except UserError as error:
        raise UserError(f"model: {error}") from None
    settings = Settings(
        c, top, task, family=family, model=model, checkpoint=expand_home(c["model"]["checkpoint"]),
        **sections | {"tokenizer": given["tokenizer.name"]},
    )  # fmt: skip
    _check_together(settings)
    return settings


def _model_sizes(section: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the arguments of the family's config for a section `model`.

    None stands for the preset's value, or for the config's default if the preset has none. If `width` differs from the
    preset's, `feed_forward` is not taken from the preset.
    """
    if section["preset"] not in family.presets:
        raise UserError(f"model.preset is one of {', '.join(family.presets)}, was given {section['preset']!r}")
    preset = dict(family.presets[section["preset"]])
    own = {name: section[name] for name in model_settings(family)}
    if own["width"] not in (None, preset["width"]):
        preset.pop("feed_forward", None)
    values = {name: preset.get(name) if value is None else value for name, value in own.items()}
    allowed = {field.name: field.default for field in dataclasses.fields(family.Config)}
    return {name: allowed[name] if value is None else value for name, value in values.items()}


def _check_types(c: dict[str, Any]) -> None:
    """Raise UserError if a tree lacks a setting, has an unknown setting, or has a value of the wrong type."""
    if not isinstance(c.get("task"), str):
        raise UserError(f"task is a task's name or package.module:Class, was given {str(c.get('task'))[:80]!r}")
    family = c["model"].get("family") if isinstance(c.get("model"), dict) else None
    known = setting_types(c["task"], family if isinstance(family, str) else DEFAULT)
    given = {name: value for name, value in leaves(c) if value != {}}  # a task may have no settings
    for name, kind in known.items():
        if name not in given:
            raise UserError(f"the setting {name} is missing: start from default_config(TASK)")
        check_type(name, given[name], kind)
    if unknown := given.keys() - known.keys():
        raise UserError(f"no setting {min(unknown, key=str)}")


def _check_together(settings: Settings) -> None:
    """Raise UserError if settings contradict each other."""
    devices, window, sft, grpo, task = settings.devices, settings.window, settings.sft, settings.grpo, settings.task
    for name, value in (
        ("sft.batch_rows", sft.batch_rows), ("grpo.batch_rows", grpo.batch_rows), ("grpo.slots", grpo.slots),
        ("evaluate.slots", settings.evaluate.slots),
    ):  # fmt: skip
        if value % devices:
            raise UserError(f"{name} is a multiple of devices ({devices}), was given {value}")
    if sft.batch_rows % (devices * sft.microbatches):
        raise UserError(
            f"sft.batch_rows is a multiple of devices times sft.microbatches ({devices} x {sft.microbatches}), was "
            f"given {sft.batch_rows}"
        )
    for name, value in (("sft.row_length", sft.row_length), ("grpo.row_length", grpo.row_length)):
        if value < window:
            raise UserError(f"{name} is at least {window}, was given {value}")
    if unknown := set(grpo.variants) - set(task.variants):
        raise UserError(
            f"grpo.variants is a choice of {', '.join(task.variants)}, was given {', '.join(sorted(unknown))}"
        )
    held_back = grpo.validation if grpo.validate_every else 0
    if grpo.prompts + held_back > settings.data.train:
        also = f" less the {held_back} of grpo.validation" if held_back else ""
        raise UserError(f"grpo.prompts is at most data.train ({settings.data.train}){also}, was given {grpo.prompts}")
    for variant in task.variants:
        if (levels := task.levels(variant)) > settings.budget.depth:
            raise UserError(
                f"budget.depth, the levels that a model may open, is at least {levels}, those of the {variant} "
                f"demonstrations, was given {settings.budget.depth}"
            )
