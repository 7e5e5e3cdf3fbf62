"""The command line of `experiments.run`: its flags, the config file, and the settings changed by hand.

Whatever is wrong raises UserError or OSError in one line that says what was given and what is allowed.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
import traceback
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from apr_jax.checks import describe
from apr_jax.errors import UserError
from apr_jax.io.paths import user_path
from apr_jax.tasks.task import find_task
from apr_jax.train.checkpoint import check_folder
from experiments.settings import SECTIONS, STAGES, Settings, default_config, read_settings, setting_types

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "experiments" / "configs"
SHARED_STAGES = ("data", "sft")  # what several processes can run together
FLAGS_HELP = f"""\
  --config=FILE        the preset: a Python file with get_config(), for example experiments/configs/laptop.py;
                       FILE:WORD gives WORD to get_config
  --config.A.B=VALUE   changes one setting, as --config.sft.steps=100 or --config.evaluate.extra_temperatures=0.5,1;
                       may be repeated; --config.task=NAME or --config.task=package.module:Class is another task
  --stage=STAGE,...    runs only these stages, in this order (default all: {", ".join(STAGES)})
  --variants=NAME,...  trains and evaluates the models of these variants of the task alone (default all)
  --workdir=FOLDER     the run folder (default runs/NAME, NAME from the config)
  --sweep=A.B=V1,V2    one run per value, each in its own folder under the run folder; repeated: the product of all
  --coordinator=HOST:PORT --processes=N --process=I
                       this is process I of N (from 0) that train together, on `devices` in all and one run folder
                       that all of them see: stages {", ".join(SHARED_STAGES)}
  --debug              shows the whole traceback of any error
  --help               shows this"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What was asked for, all of it checked."""

    file: str  # as given to --config
    changes: tuple[str, ...]  # "A.B=VALUE", in their order
    settings: Settings
    stages: tuple[str, ...]
    variants: tuple[str, ...]  # of the task
    workdir: Path
    sweeps: tuple[str, ...]
    coordinator: str = ""  # where the first of several processes listens; "": there is one
    processes: int = 1
    process: int = 0
    debug: bool = False  # whether every error keeps its traceback
    variants_given: str = "all"  # as it was typed


def parse(argv: Sequence[str]) -> Command | None:
    """The command in `argv`, the program's name first; None where --help was asked for."""
    changes = tuple(arg.lstrip("-").removeprefix("config.") for arg in argv[1:] if _is_change(arg))
    values = flags.FlagValues()  # its own, so that tests can parse many commands in one process
    for name in ("config", "workdir", "coordinator"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name, default in (("processes", 1), ("process", 0)):
        flags.DEFINE_integer(name, default, "", flag_values=values)
    for name in ("stage", "variants"):
        flags.DEFINE_list(name, "all", "", flag_values=values)
    flags.DEFINE_multi_string("sweep", [], "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    flags.DEFINE_boolean("debug", False, "", flag_values=values)
    try:
        rest = values([argv[0], *(arg for arg in argv[1:] if not _is_change(arg))])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"no such flag: --{error.flagname}{_nearest(error.flagname, values, '--')}; flags are "
            f"--config, --stage, --variants, --workdir, --sweep, --coordinator, --processes, --process, --debug and "
            f"--help, settings are given as --config.a.b=value"
        ) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if values.help:
        return None
    if rest:
        raise UserError(f"no such argument: {rest[0]!r}; settings are given as --config.a.b=value (--help explains)")
    if not values.config:
        raise UserError(f"--config=FILE is needed: {_presets()}, or a file of your own")
    stages = _some("stage", values.stage, STAGES)
    settings = read_settings(change_settings(load_config(values.config), changes))
    variants = _some("variants", values.variants, settings.task.variants)
    _check_processes(values, stages, settings)
    workdir = user_path(values.workdir or str(Path("runs") / settings.name))
    check_folder(workdir)
    for folder in (workdir, *workdir.parents):
        if folder.exists():
            if not folder.is_dir():
                raise NotADirectoryError(f"--workdir is a folder, was given {workdir}: {folder} is a file")
            break
    return Command(
        values.config, changes, settings, stages, variants, workdir, tuple(values.sweep),
        values.coordinator or "", values.processes, values.process, values.debug, ",".join(values.variants),
    )  # fmt: skip


def _some(flag: str, given: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """What a list flag chooses of `names`. Raises UserError."""
    if "all" in given:
        return names
    allowed = f"--{flag} is all or some of {', '.join(names)}"
    if unknown := [name for name in given if name not in names]:
        raise UserError(f"{allowed}, was given {unknown[0]!r}{_nearest(unknown[0], names)}")
    if not given:
        raise UserError(f"{allowed}, was given nothing")
    return tuple(dict.fromkeys(given))


def _check_processes(values: flags.FlagValues, stages: Sequence[str], settings: Settings) -> None:
    """Raises UserError for what several processes cannot run together."""
    if values.processes < 1:
        raise UserError(f"--processes is at least 1, was given {values.processes}")
    if values.coordinator and not re.fullmatch(r".+:\d+", values.coordinator):
        raise UserError(f"--coordinator is HOST:PORT, was given {values.coordinator!r}")
    if bool(values.coordinator) != (values.processes > 1):
        raise UserError(
            f"--coordinator=HOST:PORT goes with --processes=2 or more, was given {values.coordinator!r} and "
            f"{values.processes}"
        )
    if not 0 <= values.process < values.processes:
        raise UserError(f"--process is from 0 to {values.processes - 1}, was given {values.process}")
    if values.processes == 1:
        return
    if alone := [stage for stage in stages if stage not in SHARED_STAGES]:
        raise UserError(
            f"several processes run --stage={','.join(SHARED_STAGES)}, was given {alone[0]!r}: run it with one process"
        )
    if values.sweep:
        raise UserError("--sweep starts runs of its own: not with --processes")
    if settings.devices % values.processes:
        raise UserError(f"--processes divides devices ({settings.devices}), was given {values.processes}")


def _is_change(arg: str) -> bool:
    return arg.startswith(("--config.", "-config."))


def load_config(name: str) -> ConfigDict:
    """What get_config() of a file returns; ``FILE:WORD`` gives it WORD. Any error in the file is its writer's."""
    file, sign, word = name.partition(":")
    path = user_path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {file!r}: give {_presets()}, or a file of your own")
    if path.suffix != ".py":
        raise UserError(f"--config is a Python file, FILE.py, was given {file!r}")
    spec = importlib.util.spec_from_file_location("config", path.resolve())
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*[word] if sign else []) if hasattr(module, "get_config") else None
    except (Exception, SystemExit) as error:
        own = str(path.resolve())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
        line = getattr(error, "lineno", None) or (lines or [1])[-1]
        text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise UserError(f"{file}, line {line}: {type(error).__name__}: {text}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file} needs a function get_config() that returns a changed default_config(TASK)")
    if not isinstance(config.get("task"), str):
        raise UserError(f"{file} names no task: start from default_config(TASK)")
    default = default_config(config.task)
    known = set(_names(default))
    try:
        given = list(_names(config))
    except RecursionError:
        raise UserError(f"{file}: a section of its config holds itself") from None
    if extra := [name for name in given if name not in known]:
        raise UserError(f"{file}: {_no_setting(default, extra[0])}")
    if missing := known - set(given):
        raise UserError(f"{file} leaves out {min(missing)}: start from default_config(TASK)")
    return config


def change_settings(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """A config with changes like ``A.B=VALUE``, in their order, a change of the task first: the new task has its own
    section, with its defaults, in the place of the old one's."""
    for change in changes:
        if change.partition("=")[::2][0] == "task":
            config = _with_task(config, change.partition("=")[2])
    for change in changes:
        if not change.startswith("task="):
            _change(config, change)
    return config


def _with_task(config: ConfigDict, task: str) -> ConfigDict:
    """The config of another task: what does not depend on the task stays. Settings of variants have the defaults of the
    new task."""
    if task == config.task:
        return config
    changed = default_config(task)
    for name in SECTIONS:
        if name != "task":
            changed[name] = config[name]
    if find_task(task).variants != find_task(config.task).variants:
        fresh = default_config(task)
        changed.grpo.variants, changed.evaluate.budgets = fresh.grpo.variants, fresh.evaluate.budgets
    return changed


def _change(config: ConfigDict, change: str) -> None:
    """Sets ``A.B=VALUE``, read as the type that the setting has."""
    key, sign, given = change.partition("=")
    if not sign:
        raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
    if key not in _names(config):
        raise UserError(_no_setting(config, key))
    *sections, last = key.split(".")
    holder = config
    for name in sections:
        holder = holder[name]
    holder[last] = read_value(config.task, key, given, holder[last])


def read_value(task: str, key: str, given: str, example: Any = None) -> Any:
    """The value of a setting of a task's experiments, as its type. An `example` helps to say how a list is written.
    Raises UserError."""
    kind = setting_types(task)[key]
    try:
        return _read(given, kind)
    except ValueError:
        says = describe(kind).replace("tuple", "list")
        if isinstance(example, tuple) and example:
            says = f"a list like {','.join(map(str, example))}"
        raise UserError(f"{key} is {says}, was given {given!r}") from None


def _read(given: str, kind: Any) -> Any:
    """`given` as a setting's type, int or tuple[float, ...]; raises ValueError."""
    if kind is bool:
        if given.lower() not in ("true", "false"):
            raise ValueError(given)
        return given.lower() == "true"
    if typing.get_origin(kind) is tuple:
        items = [item.strip(" '\"") for item in given.strip(" ()[]").split(",")]
        return tuple(_read(item, typing.get_args(kind)[0]) for item in items if item)
    value = kind(given)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(given)
    return value


def _names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """The settings by their full names, sections left out."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _no_setting(config: ConfigDict, key: str) -> str:
    """What to say of a key that is no setting: the nearest one, and those of its section."""
    section, here = "", config
    for name in key.split("."):
        if not isinstance(here.get(name), ConfigDict):
            break
        section, here = f"{section}{name}.", here[name]
    if section == key + ".":
        return f"{key} is a section of settings, set one of {', '.join(section + name for name in here)}"
    last = key.rpartition(".")[2]
    elsewhere = [name for name in _names(config) if name.rpartition(".")[2] == last]
    near = _nearest(key, elsewhere if elsewhere and not section else list(_names(config)))
    return f"no setting {key}{near}; {section.rstrip('.') or 'the top'} has {', '.join(here)}"


def _nearest(given: str, names: Iterable[str], before: str = "") -> str:
    """What was perhaps meant, as words to put behind `given`."""
    found = difflib.get_close_matches(given, list(names), 1, 0.5)
    return f" (did you mean {before}{found[0]}?)" if found else ""


def _presets() -> str:
    """The presets, as words of a sentence."""
    return "one of " + ", ".join(f"experiments/configs/{p.name}" for p in sorted(PRESETS.glob("[a-z]*.py")))
