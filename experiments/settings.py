"""What an experiment can set: the tree of defaults, and its reading into the parts' own typed configs.

Every config file starts from `default_config(TASK)` and changes it; `read_settings` refuses a wrong value at
the start, before anything is built. The section of the task, called as the task is, holds the task's own settings.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import ml_collections

from apr_jax.checks import FieldError, check_type, check_values
from apr_jax.data.dataset import DataConfig
from apr_jax.errors import UserError
from apr_jax.io.paths import expand_home
from apr_jax.model.family import DEFAULT, Family, load_family
from apr_jax.tasks.task import Task, find_task, load_task
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget
from apr_jax.train.objective import GrpoConfig
from apr_jax.train.optimizer import OptimizerConfig
from apr_jax.train.reward import Penalties
from apr_jax.train.sft import SftConfig

# The top of the tree of settings; beside these the task's section, which is called as the task is.
SECTIONS = (
    "task", "name", "seed", "devices", "fsdp", "window", "data", "tokenizer", "model", "sft", "grpo", "budget",
    "evaluate", "export",
)  # fmt: skip
STAGES = ("data", "sft", "grpo", "evaluate", "export", "report")


# The least value of what no part's own config holds; of sizes and limits 0 means another than their number.
LEAST = {
    "devices": 1, "fsdp": 1, "window": 32, "sft.children": 0,
    "model.width": 0, "model.layers": 0, "model.heads": 0, "model.kv_heads": 0, "model.feed_forward": 0,
    "grpo.slots": 1, "budget.tokens": 0, "evaluate.slots": 1, "export.check_trees": 0,
}  # fmt: skip
# What a setting that is an empty tuple by default has elements of.
ELEMENTS = {"evaluate.extra_temperatures": float}


def default_config(task: str) -> ml_collections.ConfigDict:
    """Defaults that every preset of a task shares; `task` as `load_task` takes it. A tuple of two is a closed range."""
    kind = find_task(task)
    if kind.name in SECTIONS:
        raise UserError(f"the task {task} is called as the settings {kind.name} are: give it another name")
    c = ml_collections.ConfigDict()
    c.task = task
    c.name = "experiment"  # default workdir: runs/NAME
    c.seed = 0  # of everything: problems, traces, weights, order, rollouts
    c.devices = 2  # rows split over all of them; on a CPU as many virtual ones are made
    c.fsdp = 1  # devices that share one copy of weights and optimizer state in training, a divisor of devices
    c.window = 768  # tokens of one thread's context, training and evaluation alike

    c[kind.name] = _section(kind.Settings())

    c.data = ml_collections.ConfigDict()
    c.data.train = 6000  # problems
    c.data.held_out = 200  # distinct problems, never in training
    c.data.repeats = False  # whether a training problem may come twice

    c.tokenizer = ml_collections.ConfigDict()
    c.tokenizer.name = ""  # a Hugging Face tokenizer by folder or name in the place of the task's

    c.model = ml_collections.ConfigDict()  # the family's config; the vocabulary is the tokenizer's
    c.model.family = DEFAULT  # architecture: a built-in one by name, or package.module of your own
    c.model.preset = "tiny"  # the family's sizes that are 0 below: tiny (1 M), small (25 M) or base (228 M)
    c.model.width = 0
    c.model.layers = 0
    c.model.heads = 0
    c.model.kv_heads = 0  # 0: as many as heads
    c.model.feed_forward = 0  # 0: the preset's with the preset's width, else 8/3 of the width
    c.model.tie_embeddings = False
    c.model.checkpoint = ""  # a saved step, or a folder of them, whose weights SFT begins with; "": random ones
    c.model.dtype = "float32"  # of the computation, or bfloat16; weights are float32
    c.model.attention = "auto"  # in training: blocked, dense, cudnn; auto: by device and dtype
    c.model.remat = "none"  # what the backward pass computes again: none, dots (all but products), full
    c.model.scan = False  # layers under a scan in training: one to compile, for deep models

    c.sft = ml_collections.ConfigDict()  # the same for every variant
    c.sft.steps = 1000  # at most
    c.sft.tokens = 0  # after which a variant ends, if that is before `steps`; 0: no limit
    c.sft.batch_rows = 4  # multiple of devices times microbatches
    c.sft.microbatches = 1  # parts of a batch whose gradients are added up, to need the memory of one
    c.sft.row_length = 768  # tokens, at least the window
    c.sft.models = "separate"  # one for each variant, the paper's, or "joint": one trained on the trees of all
    c.sft.children = 0  # child threads of a tree that are trained on, those with a result first; 0: all, the paper's
    c.sft.loss_tokens = "sampled"  # or "all", the paper's
    c.sft.save_every = 200
    c.sft.log_every = 10
    c.sft.validate_every = 0  # steps; 0: at the end alone
    c.sft.max_skipped_steps = 10  # steps without an update (loss or gradient not finite) before the run stops
    c.sft.optimizer = _optimizer()

    c.grpo = ml_collections.ConfigDict()
    c.grpo.variants = kind.variants[:1]  # whose models are trained further
    c.grpo.steps = 10
    c.grpo.prompts = 12  # per step
    c.grpo.group = 6  # rollouts per prompt
    c.grpo.inner_steps = 1
    c.grpo.batch_rows = 8  # of one microbatch, multiple of devices
    c.grpo.row_length = 896  # a thread's piece is its window and its calls
    c.grpo.slots = 64  # of the rollout engine, multiple of devices
    c.grpo.clip_low = 0.2
    c.grpo.clip_high = 0.2
    c.grpo.kl = 0.0
    c.grpo.kl_estimator = "k3"  # or k1, in the advantage
    c.grpo.normalise = True
    c.grpo.aggregate = "tree"  # tree, sequence, paper (as the authors' code), token, constant (Dr. GRPO)
    c.grpo.tis_clip = 0.0  # of weights between engine and trainer; 0: none
    c.grpo.penalties = ml_collections.ConfigDict({field.name: 0.0 for field in dataclasses.fields(Penalties)})
    c.grpo.dynamic_sampling_rounds = 0  # most times that groups without a signal are replaced by those of fresh prompts
    c.grpo.temperature = 1.0
    c.grpo.save_every = 5
    c.grpo.validate_every = 0  # steps; 0: never. Else the weights that did best are kept, evaluated and exported
    c.grpo.validation = 200  # training problems held back from GRPO for it
    c.grpo.optimizer = _optimizer()

    c.budget = ml_collections.ConfigDict()  # of one tree
    c.budget.threads = 64
    c.budget.depth = 1  # levels of children
    c.budget.tokens = 0  # that the model may sample; 0: no limit but the threads' windows
    c.budget.min_children = 0  # of a root, which is made to spawn before it may end
    c.budget.malformed = "stop"  # what a spawn that cannot be run does to its thread, or "fail": its children fail

    c.evaluate = ml_collections.ConfigDict()
    c.evaluate.temperature = 0.0  # greedy
    c.evaluate.extra_temperatures = ()  # each with a table of its own (the paper's table 3: 0.1, 0.5, 1)
    # Of a variant whose demonstrations had conditions: budgets that prompts ask for, each with a table of its own.
    # (): the condition that the demonstrations had most often.
    c.evaluate.budgets = ml_collections.ConfigDict({variant: () for variant in kind.variants})
    c.evaluate.top_k = 0  # 0: all words
    c.evaluate.top_p = 1.0
    c.evaluate.slots = 64  # multiple of devices

    c.export = ml_collections.ConfigDict()
    c.export.dtype = "float32"
    c.export.check_trees = 20  # trees decoded by transformers and by us; 0: only logits
    return c


def _section(settings: Any) -> ml_collections.ConfigDict:
    """A dataclass of settings as a section, with its values; nested ones are sections of their own."""
    section = ml_collections.ConfigDict()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.init:
            section[field.name] = _section(value) if dataclasses.is_dataclass(value) else value
    return section


def _optimizer() -> ml_collections.ConfigDict:
    """As `OptimizerConfig`, with its defaults."""
    return ml_collections.ConfigDict({field.name: field.default for field in dataclasses.fields(OptimizerConfig)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """A config, read and checked."""

    config: dict[str, Any]
    name: str
    seed: int
    devices: int
    fsdp: int
    window: int
    task: Task
    data: DataConfig
    tokenizer: str
    family: Family
    model: dict[str, Any]  # values of the family's config but for the vocabulary
    checkpoint: str  # of the first weights; "": they are random
    sft: SftConfig
    grpo: GrpoConfig
    grpo_variants: tuple[str, ...]
    sft_joint: bool  # one supervised model for all variants
    sft_children: int  # of a tree, trained on; 0: all
    grpo_slots: int
    budget: Budget
    evaluate_sampling: Sampling
    evaluate_also: dict[float, Sampling]  # by temperature
    evaluate_budgets: dict[str, tuple[int, ...]]  # by variant; (): what its demonstrations had most often
    evaluate_slots: int
    export_dtype: str
    export_check_trees: int

    def budget_of(self, variant: str) -> Budget:
        """The budget of a variant's trees: no children can be asked for where threads have none."""
        return self.budget if self.task.spawns(variant) else dataclasses.replace(self.budget, min_children=0)


@functools.cache
def setting_types(task: str) -> dict[str, Any]:
    """The type of every setting of a task's experiments by its full name, as an annotation: int, tuple[float, ...]."""
    kind = find_task(task)
    types = _field_types(kind.Settings, f"{kind.name}.")

    def of(name: str, default: Any) -> Any:
        if name in types:
            return types[name]
        if not isinstance(default, tuple):
            return type(default)
        return tuple[ELEMENTS.get(name) or (type(default[0]) if default else int), ...]

    return {name: of(name, default) for name, default in _leaves(default_config(task).to_dict())}


def _field_types(kind: type, prefix: str) -> dict[str, Any]:
    """The annotations of a dataclass of settings and of those nested in it, by their full names."""
    annotations, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(annotations[field.name]):
            found |= _field_types(annotations[field.name], f"{prefix}{field.name}.")
        elif field.init:
            if not _is_read(annotations[field.name]):
                raise UserError(
                    f"{kind.__name__}.{field.name}: a setting is true or false, an integer, a number, a text or a "
                    f"tuple of one of these, its type is {annotations[field.name]}"
                )
            found[prefix + field.name] = annotations[field.name]
    return found


def _is_read(kind: Any) -> bool:
    """Whether values of a type can be given on a command line."""
    of = [one for one in typing.get_args(kind) if one is not ...] if typing.get_origin(kind) is tuple else [kind]
    return all(one in (bool, int, float, str) for one in of)


def read_settings(config: ml_collections.ConfigDict) -> Settings:
    """Raises UserError, in one line that says what was given and what is allowed."""
    c = config.to_dict()
    _check_types(c)

    def build(section: str, kind, *given, names: dict[str, str] = {}, **values):  # noqa: B006
        """`kind` of these values; an error says a field by its setting's full name (`names`: where that is not of
        the section)."""
        try:
            return kind(*given, **values)
        except FieldError as error:
            raise UserError(f"{names.get(error.field, f'{section}.{error.field}')} {error.says}") from None
        except UserError as error:
            raise UserError(f"{section}: {error}") from None

    for name, least in LEAST.items():
        _at_least(name, _value(c, name), least)
    place = PurePath(c["name"])  # under runs/
    if not place.parts or place.is_absolute() or ".." in place.parts or not c["name"].isprintable():
        raise UserError(f"name is that of a folder under runs/, was given {c['name']!r}")
    devices, window = c["devices"], c["window"]
    kind = find_task(c["task"])
    if unknown := set(c["grpo"]["variants"]) - set(kind.variants):
        raise UserError(
            f"grpo.variants is a choice of {', '.join(kind.variants)}, was given {', '.join(sorted(unknown))}"
        )
    if c["export"]["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f"export.dtype is float32 or bfloat16, was given {c['export']['dtype']!r}")

    if c["sft"]["models"] not in ("separate", "joint"):
        raise UserError(f"sft.models is separate or joint, was given {c['sft']['models']!r}")

    task = load_task(c["task"], _built(kind.Settings, c[kind.name], kind.name, build))
    data = {name: c["data"][name] for name in ("train", "held_out", "repeats")}
    build("data", check_values, DataConfig, **data)

    def section(name: str, kind, leave_out: tuple[str, ...] = ()):
        values = {key: value for key, value in c[name].items() if key not in leave_out}
        values["optimizer"] = build(f"{name}.optimizer", OptimizerConfig, **values["optimizer"])
        if "penalties" in values:
            values["penalties"] = build(f"{name}.penalties", Penalties, **values["penalties"])
        return build(name, kind, **values, seed=c["seed"], names={"seed": "seed"})

    sft, grpo = section("sft", SftConfig, ("children", "models")), section("grpo", GrpoConfig, ("variants", "slots"))
    family = build("model", load_family, c["model"]["family"])
    model = _model_sizes(c["model"], family)
    model["context"] = -(-max(window, grpo.row_length) // 128) * 128
    build("model", family.Config, vocab_size=8, **model)

    def sampling(temperature: float) -> Sampling:
        return build("evaluate", Sampling, temperature, c["evaluate"]["top_k"], c["evaluate"]["top_p"])

    temperatures = [c["evaluate"]["temperature"], *c["evaluate"]["extra_temperatures"]]
    if len(set(temperatures)) < len(temperatures):
        raise UserError(
            f"evaluate.extra_temperatures has other temperatures than evaluate.temperature ({temperatures[0]:g}), each "
            f"once, was given {c['evaluate']['extra_temperatures']}"
        )
    if long := [t for t in temperatures[1:] if float(f"{t:g}") != t]:  # files of records are named so
        raise UserError(f"evaluate.extra_temperatures has temperatures of at most 6 digits, was given {long[0]}")

    def budgets(variant: str) -> tuple[int, ...]:
        given = c["evaluate"]["budgets"][variant]
        if min(given, default=0) < 0 or len({*given}) < len(given):
            raise UserError(f"evaluate.budgets.{variant} is whole numbers from 0, each once, was given {given}")
        return given

    tokenizer = expand_home(c["tokenizer"]["name"])
    settings = Settings(
        config=c, name=c["name"], seed=c["seed"], devices=devices, fsdp=c["fsdp"], window=window, task=task,
        data=DataConfig(
            c["task"], task.settings, window=window, row_length=sft.row_length, tokenizer=tokenizer, seed=c["seed"],
            **data,
        ),
        tokenizer=tokenizer, family=family, model=model, checkpoint=expand_home(c["model"]["checkpoint"]),
        sft=sft, grpo=grpo,
        sft_joint=c["sft"]["models"] == "joint", sft_children=c["sft"]["children"],
        grpo_variants=tuple(c["grpo"]["variants"]), grpo_slots=c["grpo"]["slots"],
        budget=build("budget", Budget, context=window, **c["budget"] | {"tokens": c["budget"]["tokens"] or None}),
        evaluate_sampling=sampling(temperatures[0]), evaluate_also={t: sampling(t) for t in temperatures[1:]},
        evaluate_budgets={variant: budgets(variant) for variant in kind.variants},
        evaluate_slots=c["evaluate"]["slots"], export_dtype=c["export"]["dtype"],
        export_check_trees=c["export"]["check_trees"],
    )  # fmt: skip
    _check_together(settings)
    return settings


def _built(kind: type, section: dict[str, Any], name: str, build) -> Any:
    """A section of a task's settings as its dataclass, nested ones first."""
    annotations = typing.get_type_hints(kind)
    values = {
        key: _built(annotations[key], value, f"{name}.{key}", build) if isinstance(value, dict) else value
        for key, value in section.items()
    }
    return build(name, kind, **values)


def _check_types(c: dict[str, Any]) -> None:
    """Raises UserError where a tree of settings lacks one, has one too many, or one of another type."""
    if not isinstance(c.get("task"), str):
        raise UserError(f"task is a task's name or package.module:Class, was given {str(c.get('task'))[:80]!r}")
    known, given = setting_types(c["task"]), dict(_leaves(c))
    for name, kind in known.items():
        if name not in given:
            raise UserError(f"the setting {name} is missing: start from default_config(TASK)")
        check_type(name, given[name], kind)
    if unknown := given.keys() - known.keys():
        raise UserError(f"no setting {min(unknown, key=str)}")


def _check_together(settings: Settings) -> None:
    """Raises UserError for settings that do not go together."""
    c, devices, window = settings.config, settings.devices, settings.window
    for name in ("sft.batch_rows", "grpo.batch_rows", "grpo.slots", "evaluate.slots"):
        if (value := _value(c, name)) % devices:
            raise UserError(f"{name} is a multiple of devices ({devices}), was given {value}")
    if devices % settings.fsdp:
        raise UserError(f"fsdp divides devices ({devices}), was given {settings.fsdp}")
    if settings.sft.batch_rows % (devices * settings.sft.microbatches):
        raise UserError(
            f"sft.batch_rows is a multiple of devices times sft.microbatches ({devices} x "
            f"{settings.sft.microbatches}), was given {settings.sft.batch_rows}"
        )
    for name in ("sft.row_length", "grpo.row_length"):
        _at_least(name, _value(c, name), window)
    held_back = settings.grpo.validation if settings.grpo.validate_every else 0
    if settings.grpo.prompts + held_back > settings.data.train:
        also = f" less the {held_back} of grpo.validation" if held_back else ""
        raise UserError(
            f"grpo.prompts is at most data.train ({settings.data.train}){also}, was given {settings.grpo.prompts}"
        )
    for variant in settings.task.variants:
        if (levels := settings.task.levels(variant)) > settings.budget.depth:
            raise UserError(
                f"budget.depth, the levels that a model may open, is at least {levels}, those of the {variant} "
                f"demonstrations, was given {settings.budget.depth}"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is at least {least}, was given {value}")


def _value(tree: dict[str, Any], name: str) -> Any:
    """The setting of a full name."""
    for part in name.split("."):
        tree = tree[part]
    return tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value) of every setting; an empty section is a value."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _model_sizes(section: dict[str, Any], family: Family) -> dict[str, Any]:
    """A section "model" as the values of its family's config: what is 0 is the preset's, or left to the config."""
    section = {key: value for key, value in section.items() if key not in ("checkpoint", "family")}
    name = section.pop("preset")
    if name not in family.presets:
        raise UserError(f"model.preset is one of {', '.join(family.presets)}, was given {name!r}")
    preset = family.presets[name]
    if section["width"] not in (0, preset["width"]):
        preset = {**preset, "feed_forward": None}
    sizes = {key: section.get(key) or preset[key] for key in preset}
    return {**section, **sizes, "kv_heads": section["kv_heads"] or None}
