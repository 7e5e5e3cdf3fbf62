"""The command line of `experiments.run`: its flags, the config file, and changes of single settings.

Any wrong input raises UserError or OSError, in one line that says what was given and what is allowed.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from apr_jax.checks import describe
from apr_jax.errors import UserError
from apr_jax.io.paths import user_path
from apr_jax.model.family import DEFAULT
from apr_jax.tasks.task import find_task
from apr_jax.train.checkpoint import check_folder
from experiments.settings import NAMES, STAGES, Settings, default_config, read_settings, setting_types

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "experiments" / "configs"
# Renamed settings: the last part of the old name, and of the new name.
RENAMED = {
    "peak_rate": "peak_lr", "muon_rate": "muon_lr", "start_rate": "init_lr_fraction", "end_rate": "final_lr_fraction",
    "clip": "max_grad_norm", "importance_cap": "tis_clip", "fresh_rounds": "dynamic_sampling_rounds",
    "prices": "penalties", "wrong": "wrong_answer", "least_children": "min_children",
    "most_skipped": "max_skipped_steps", "also_at": "extra_temperatures",
}  # fmt: skip
SHARED_STAGES = ("data", "sft")  # stages that several processes can run together
FLAGS_HELP = f"""\
  --config=FILE        the preset: a Python file with get_config(), for example experiments/configs/laptop.py;
                       FILE:WORD calls get_config(WORD)
  --config.A.B=VALUE   changes one setting, for example --config.sft.steps=100 or
                       --config.evaluate.extra_temperatures=0.5,1; may be repeated;
                       --config.task=NAME or --config.task=package.module:Class selects another task
  --stage=STAGE,...    runs only these stages, in this order (default all: {", ".join(STAGES)})
  --variants=NAME,...  trains and evaluates only the models of these variants of the task (default all)
  --workdir=FOLDER     the run folder (default runs/NAME; NAME is the setting `name`)
  --store=FOLDER       the folder of the stages' outputs (default WORKDIR/store); runs with the same store share every
                       output that depends on equal settings, also when they run at the same time
  --sweep=A.B=V1,V2    starts one run per value, each in its own folder under the run folder, with one store;
                       if repeated, one run per combination of values
  --coordinator=HOST:PORT --processes=N --process=I
                       starts process I (from 0) of N that train together: the setting `devices` counts the devices
                       of all, and all use the same run folder; only for the stages {", ".join(SHARED_STAGES)}
  --debug              shows the traceback of any error
  --help               shows this help"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line, parsed and checked."""

    file: str  # as given to --config
    changes: tuple[str, ...]  # "A.B=VALUE", in their order
    settings: Settings
    stages: tuple[str, ...]
    variants: tuple[str, ...]  # the selected variants of the task
    workdir: Path
    store: Path
    sweeps: tuple[str, ...]
    coordinator: str = ""  # HOST:PORT where process 0 listens; "": there is only one process
    processes: int = 1
    process: int = 0
    debug: bool = False  # whether any error is shown with its traceback
    variants_given: str = "all"  # --variants as it was given


def parse(argv: Sequence[str]) -> Command | None:
    """Return the command in `argv`, whose first item is the program's name. With --help return None.

    Raises UserError or OSError if anything in the command, the config file or the settings is wrong.
    """
    changes = tuple(arg.lstrip("-").removeprefix("config.") for arg in argv[1:] if _is_change(arg))
    values = flags.FlagValues()  # not absl's global flags: tests parse many commands in one process
    for name in ("config", "workdir", "store", "coordinator"):
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
            "--config, --stage, --variants, --workdir, --store, --sweep, --coordinator, --processes, --process, "
            "--debug and --help, settings are given as --config.a.b=value"
        ) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if values.help:
        return None
    if rest:
        raise UserError(f"no such argument: {rest[0]!r}; settings are given as --config.a.b=value (--help explains)")
    if not values.config:
        raise UserError(f"--config=FILE is needed: {_presets()}, or a file of your own")
    stages = _selected("stage", values.stage, STAGES)
    settings = read_settings(change_settings(load_config(values.config), changes))
    variants = _selected("variants", values.variants, settings.task.variants)
    _check_processes(values, stages, settings)
    workdir = user_path(values.workdir or str(Path("runs") / settings.name))
    store = user_path(values.store) if values.store else workdir / "store"
    _check_folder("workdir", workdir)
    _check_folder("store", store)
    return Command(
        values.config, changes, settings, stages, variants, workdir, store, tuple(values.sweep),
        values.coordinator or "", values.processes, values.process, values.debug, ",".join(values.variants),
    )  # fmt: skip


def _check_folder(flag: str, folder: Path) -> None:
    """Raise UserError or NotADirectoryError if a flag's folder cannot be created or cannot hold checkpoints."""
    check_folder(folder)
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--{flag} is a folder, was given {folder}: {there} is a file")


def _selected(flag: str, given: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the items of `names` that a flag with a list selects; "all" selects all of them.

    Raises UserError for an unknown item or an empty list.
    """
    if "all" in given:
        return names
    allowed = f"--{flag} is all or some of {', '.join(names)}"
    if unknown := [name for name in given if name not in names]:
        raise UserError(f"{allowed}, was given {unknown[0]!r}{_nearest(unknown[0], names)}")
    if not given:
        raise UserError(f"{allowed}, was given nothing")
    return tuple(dict.fromkeys(given))


def _check_processes(values: flags.FlagValues, stages: Sequence[str], settings: Settings) -> None:
    """Raise UserError if the flags for several processes contradict each other, the stages or the settings."""
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
    """Return whether an argument changes a setting, such as ``--config.sft.steps=100``."""
    return arg.startswith(("--config.", "-config."))


def load_config(name: str) -> ConfigDict:
    """Return the config that get_config() of a Python file returns. `name` is FILE, or FILE:WORD for get_config(WORD).

    Raises FileNotFoundError if there is no such file, and UserError with the file and line for any error in it.
    """
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
    default = default_config(config.task, _family(config))
    known = set(_names(default))
    try:
        given = list(_names(config))
    except RecursionError:
        raise UserError(f"{file}: a section of its config contains itself") from None
    if extra := [name for name in given if name not in known]:
        raise UserError(f"{file}: {_no_setting(default, extra[0])}")
    if missing := known - set(given):
        raise UserError(f"{file} leaves out {min(missing)}: start from default_config(TASK)")
    return config


def change_settings(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """Apply changes such as ``A.B=VALUE`` to a config in their order, and return the config.

    Changes of `task` and `model.family` come first: a new task or family brings its own settings, with their defaults,
    in place of the old one's. In that case a new config is returned, otherwise `config` itself. Raises UserError.
    """
    given = dict(change.partition("=")[::2] for change in changes)
    first = ("task", "model.family")
    config = _with(config, given.get("task", config.task), given.get("model.family", _family(config)))
    for change in changes:
        if change.partition("=")[0] not in first:
            _change(config, change)
    return config


def _family(config: ConfigDict) -> str:
    """Return the model family in a config that is not checked yet; the default family if it has none."""
    model = config.get("model")
    family = model.get("family") if isinstance(model, ConfigDict) else None
    return family if isinstance(family, str) else DEFAULT


def _with(config: ConfigDict, task: str, family: str) -> ConfigDict:
    """Return the config of another task or family. It keeps the values of the settings that both have."""
    if (task, family) == (config.task, _family(config)):
        return config
    changed = default_config(task, family)
    for name in {*(NAMES if task != config.task else changed)} - {"task", "model"}:
        changed[name] = config[name]
    for name in changed.model:
        if name != "family" and name in config.model:
            changed.model[name] = config.model[name]
    if find_task(task).variants != find_task(config.task).variants:
        changed.grpo.variants, changed.evaluate.budgets = (), default_config(task).evaluate.budgets
    return changed


def _change(config: ConfigDict, change: str) -> None:
    """Set the setting in a change ``A.B=VALUE``. Raises UserError."""
    key, sign, given = change.partition("=")
    if not sign:
        raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
    if key not in _names(config):
        raise UserError(_no_setting(config, key))
    *sections, last = key.split(".")
    holder = config
    for name in sections:
        holder = holder[name]
    holder[last] = read_value(config, key, given)


def read_value(config: ConfigDict, key: str, given: str) -> Any:
    """Return the text `given` as a value of the type of the setting `key`.

    Raises UserError. If the setting's present value is a list, the message has it as an example of how to write one.
    """
    kind = setting_types(config.task, _family(config))[key]
    try:
        return _read(given, kind)
    except ValueError:
        says, example = describe(kind).replace("tuple", "list"), config
        for name in key.split("."):
            example = example[name]
        if isinstance(example, tuple) and example:
            says = f"a list like {','.join(map(str, example))}"
        raise UserError(f"{key} is {says}, was given {given!r}") from None


def _read(given: str, kind: Any) -> Any:
    """Return the text `given` as a value of a type such as int or tuple[float, ...]. Raises ValueError."""
    if isinstance(kind, types.UnionType):  # a type, or None
        return None if given.lower() == "none" else _read(given, typing.get_args(kind)[0])
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
    """Yield the full name of every setting, without sections."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _no_setting(config: ConfigDict, key: str) -> str:
    """Return the message about a key that is not a setting.

    It has the setting's new name if the setting was renamed. Otherwise it has the nearest name, and all names in the
    key's section.
    """
    if (renamed := ".".join(RENAMED.get(name, name) for name in key.split("."))) in _names(config):
        return f"{key} is called {renamed} now"
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
    """Return a hint such as " (did you mean --stage?)", or "" if no name is close to `given`.

    `before` is text before the name in the hint, such as "--".
    """
    found = difflib.get_close_matches(given, list(names), 1, 0.5)
    return f" (did you mean {before}{found[0]}?)" if found else ""


def _presets() -> str:
    """Return a list of the presets, as part of a sentence."""
    return "one of " + ", ".join(f"experiments/configs/{p.name}" for p in sorted(PRESETS.glob("[a-z]*.py")))
