"""The flags of `tools.latency`, and the plan that they make, all of it checked."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from absl import flags

from apr_jax.data.problems import ProblemFile
from apr_jax.errors import UserError
from apr_jax.evaluate.latency.engines import visible_gpus
from apr_jax.export.exported import Export, read_export
from apr_jax.io.paths import read_json, user_path
from apr_jax.rollout.placement import PLACEMENTS
from apr_jax.tasks.task import HELD_OUT, first_problems
from apr_jax.threads.run import Budget
from experiments.command import load_config
from tools.run_exports import export_last_models

ENGINES = ("sglang", "jax")
LAUNCHER = Path(__file__).with_name("serve_sglang.sh")
WARM = 4  # trees that are run before the first is measured


def define_flags(values: flags.FlagValues) -> None:
    """The tool's flags; `make_plan` reads them."""

    def text(name: str, default: str | None, help: str) -> None:
        flags.DEFINE_string(name, default, help, flag_values=values)

    def numbers(name: str, default: list[str], help: str) -> None:
        flags.DEFINE_list(name, default, help, flag_values=values)

    def repeated(name: str, help: str) -> None:
        flags.DEFINE_multi_string(name, [], help, flag_values=values)

    text("config", None, "Preset of a run whose last models are measured.")
    text("workdir", None, "Folder of that run. Default: runs/NAME.")
    repeated("model", "Folder of an exported model. Repeated: one of each variant of a task.")
    text("out", "runs/latency", "Folder of samples, figures and report; with --config latency/ of the run.")
    numbers("engine", ["sglang"], "sglang, jax (in this process) or both, one after the other.")
    text("servers", "", "How many to start, or URL,URL of running ones. Default: 1; one per GPU, where threads part.")
    place = "Where threads go: one server, round_robin, or roots_apart (the paper's: children to all but the first)."
    flags.DEFINE_enum("placement", "one", sorted(PLACEMENTS), place, flag_values=values)
    text("launcher", str(LAUNCHER), "Command that serves; FOLDER PORT is added after serve.")
    numbers("concurrency", ["1"], "Trees at once; several numbers, one pass each.")
    numbers("windows", [], "Tokens of a thread: budgets of all models. Default: what a model was trained in.")
    numbers("min_children", ["0"], "Children at least: budgets of models that spawn.")
    usual = "Default: what its demonstrations had most often."
    repeated("budgets", f"N,N or VARIANT:N,N: budgets that a model's prompts ask for. Repeated: for others. {usual}")
    levels = "Levels of children. Default: those of the task's demonstrations."
    flags.DEFINE_integer("depth", None, levels, lower_bound=0, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "Of the sampling.", lower_bound=0.0, flag_values=values)
    text("problems", None, "File of JSON lines, a held_out.jsonl of a run. Default: held-out problems of the task.")
    flags.DEFINE_integer("count", 50, "Problems.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("patience", 600, "Seconds to wait for servers.", lower_bound=1, flag_values=values)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    out: Path
    engines: list[str]
    exports: list[Export]  # of one task, each of another variant
    urls: list[str]  # of somebody else's servers
    servers: int
    placement: str
    launcher: list[str]
    environments: list[dict[str, str]]
    concurrency: list[int]
    windows: list[int]
    min_children: list[int]
    budgets: dict[str, list[int]]  # by variant: the ones that prompts ask for
    depth: int | None  # None: the demonstrations'
    temperature: float
    problems: Sequence[Any]
    source: str  # digest of the file of problems, "" of the task's own
    warm: Sequence[Any]  # further problems, to warm up with
    patience: float

    def conditions(self, export: Export) -> Iterator[tuple[Budget, str]]:
        """Each budget of a model with what stands first on the root's prompt. Raises UserError for one that the model
        cannot have."""
        levels = export.task.levels(export.variant)
        depth = levels if self.depth is None or not levels else self.depth
        for window in self.windows or [export.window]:
            if window > export.context:
                raise UserError(f"--windows: {export.folder} holds {export.context} tokens, was given {window}")
            for least in self.min_children if levels else [0]:
                budget = Budget(window, depth=max(1, depth), min_children=least)
                for asked in self.budgets.get(export.variant) or [None]:
                    yield budget, export.condition if asked is None else export.task.condition(export.variant, asked)


def make_plan(values: flags.FlagValues) -> Plan:
    """Raises UserError or OSError in one line for what cannot be done. With --config the last models of its run are
    exported here."""
    if values["config"].value:
        _take_from_run(values)
    elif values["workdir"].value:
        raise UserError("--workdir is a run's and goes with --config=FILE, its preset")
    engines = _among("engine", values["engine"].value, ENGINES)
    exports = _exports(values["model"].value)
    urls, servers = _servers(values["servers"].value)
    if urls and len(exports) > 1:
        raise UserError("running servers have one model: give one --model, and another in a second call")
    gpus = visible_gpus()
    one = values["placement"].value == "one"  # all threads go to the first
    servers = len(urls) or servers or (1 if one else max(len(gpus), 1))
    problems, warm, source = _problems(values["problems"].value, values["count"].value, exports)
    return Plan(
        Path(values["out"].value), engines, exports, urls, servers, values["placement"].value,
        _words(values["launcher"].value),
        [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(servers)] if gpus else [],
        _numbers("concurrency", values["concurrency"].value, 1), _numbers("windows", values["windows"].value, 32),
        _numbers("min_children", values["min_children"].value, 0), _budgets(values["budgets"].value, exports),
        values["depth"].value, values["temperature"].value, problems, source, warm, values["patience"].value,
    )  # fmt: skip


def _exports(folders: Sequence[str]) -> list[Export]:
    """The models in their order. Raises UserError where two cannot stand beside each other."""
    exports = [read_export(user_path(folder)) for folder in folders]
    if len({export.task.spec for export in exports}) > 1:
        named = ", ".join(f"{export.folder} of {export.task.spec}" for export in exports)
        raise UserError(f"--model: models of one call are of one task, was given {named}")
    variants = [export.variant for export in exports]
    if twice := [variant for variant in dict.fromkeys(variants) if variants.count(variant) > 1]:
        raise UserError(
            f"--model: one model of each variant, was given several of {twice[0]}: measure the second with --out"
        )
    return exports


def _servers(given: str) -> tuple[list[str], int]:
    """The addresses of running servers, or how many are to be started; 0: not told."""
    urls = [url for url in given.split(",") if url] if "://" in given else []
    if wrong := [url for url in urls if not _is_url(url)]:
        raise UserError(f"--servers is a number from 1 or http://HOST:PORT,..., was given {wrong[0]!r}")
    if not urls and given and not (re.fullmatch("[0-9]{1,9}", given) and int(given)):
        raise UserError(f"--servers is a number from 1 or http://HOST:PORT,..., was given {given!r}")
    return urls, 0 if urls else int(given or 0)


def _budgets(given: Sequence[str], exports: Sequence[Export]) -> dict[str, list[int]]:
    """By variant, from "VARIANT:N,N", or "N,N" where there is one model. Raises UserError, also for a variant that
    cannot be asked."""
    variants = {export.variant: export.task for export in exports}
    found: dict[str, list[int]] = {}
    for one in given:
        variant, sign, text = one.rpartition(":")
        if not sign and len(variants) > 1:
            raise UserError(f"--budgets is VARIANT:N,N for one of several models ({', '.join(variants)}), got {one!r}")
        for name in [variant] if sign else variants:
            if name not in variants:
                raise UserError(f"--budgets is for a model of {', '.join(variants) or 'none'}, was given {one!r}")
            found[name] = found.get(name, []) + _numbers("budgets", text.split(","), 0)
            variants[name].condition(name, found[name][0])
    return found


def _words(launcher: str) -> list[str]:
    try:
        words = shlex.split(launcher)
    except ValueError as error:  # of its quotes
        raise UserError(f"--launcher is a command, was given {launcher!r}: {error}") from None
    if not words:
        raise UserError("--launcher is a command, was given nothing")
    return words


def _is_url(given: str) -> bool:
    try:
        parts = urlsplit(given)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in given
    except ValueError:  # of the port or an IPv6 address
        return False


def _among(name: str, given: Sequence[str], allowed: Sequence[str]) -> list[str]:
    if not given or set(given) - set(allowed):
        raise UserError(f"--{name} is of {', '.join(allowed)}, was given {','.join(given)!r}")
    return list(dict.fromkeys(given))


def _numbers(name: str, given: Sequence[str], least: int) -> list[int]:
    if not all(re.fullmatch("[0-9]{1,9}", one) and int(one) >= least for one in given):
        raise UserError(f"--{name} is numbers from {least}, was given {','.join(given)!r}")
    return list(dict.fromkeys(map(int, given)))


def _problems(path: str | None, count: int, exports: Sequence[Export]) -> tuple[list[Any], list[Any], str]:
    """The problems to measure, further ones to warm up with, and a digest of the file. None without a model."""
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"--problems: no file {path}")
    if not exports:
        return [], [], ""
    task, source = exports[0].task, ""
    if path:
        problems, behind = ProblemFile(task, Path(path))[:count], count
        source = hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest()
    else:
        problems, behind = first_problems(task, HELD_OUT, count)
    if len(problems) < count:
        raise UserError(f"--count: {path or task.spec} holds {len(problems)} problems, was given {count}")
    warm, _ = first_problems(task, HELD_OUT, WARM, behind)
    return problems, warm or problems[:WARM], source


def _take_from_run(values: flags.FlagValues) -> None:
    """Gives the flags that were left out the values of the run that --config names. Raises UserError or OSError where
    there is no such run."""
    preset = load_config(values["config"].value)
    run = Path(values["workdir"].value or Path("runs") / preset.name)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"no run in {run}: give --workdir=FOLDER, or run experiments.run first")
    config = read_json(run / "config.json", "run experiments.run again with the run's settings")
    found = {
        "out": str(run / "latency"), "windows": [str(config["window"])], "depth": config["budget"]["depth"],
        "temperature": config["evaluate"]["temperature"], "problems": str(run / "data" / "held_out.jsonl"),
    }  # fmt: skip
    for name, value in found.items():
        if not values[name].present:
            values[name].value = value
    if not values["model"].present:
        if not isinstance(config.get("task"), str):
            raise UserError(f"{run / 'config.json'} names no task: run experiments.run again with the run's settings")
        values["model"].value = list(map(str, export_last_models(run, config["task"])))
