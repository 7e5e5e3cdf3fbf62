"""The flags of `tools.latency`, and the checked plan that is made from them."""

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
WARM_UP = 4  # least number of trees that are run before the first sample


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of `tools.latency`; `make_plan` reads them."""

    def text(name: str, default: str | None, help: str) -> None:
        flags.DEFINE_string(name, default, help, flag_values=values)

    def numbers(name: str, default: list[str], help: str) -> None:
        flags.DEFINE_list(name, default, help, flag_values=values)

    def repeated(name: str, help: str) -> None:
        flags.DEFINE_multi_string(name, [], help, flag_values=values)

    text("config", None, "Preset of a run whose last models are measured.")
    text("workdir", None, "Folder of that run. Default: runs/ and the preset's name.")
    repeated("model", "Folder of an exported model. Repeat it for other variants of the same task.")
    text("out", "runs/latency", "Folder of samples, figures and report. With --config: latency/ of the run.")
    numbers("engine", ["sglang"], "sglang, jax (in this process), or sglang,jax for both in turn.")
    text(
        "servers",
        "",
        "Servers to start, or URL,URL of running ones. Default: 1, or one per GPU unless --placement=one.",
    )
    place = "Server of a thread: one, round_robin, or roots_apart (the paper's: roots to the first server)."
    flags.DEFINE_enum("placement", "one", sorted(PLACEMENTS), place, flag_values=values)
    text("launcher", str(LAUNCHER), "Command that starts a server; 'serve FOLDER PORT' is appended.")
    numbers("concurrency", ["1"], "Trees at once. Several numbers: one pass for each.")
    numbers("windows", [], "Most tokens of a thread. Several numbers: one pass for each. Default: as in training.")
    numbers(
        "min_children", ["0"], "Fewest children of a root, for models that spawn. Several numbers: one pass for each."
    )
    usual = "Default: the condition of most demonstrations."
    repeated("budgets", f"N,N or VARIANT:N,N: budgets that prompts ask a model for. Repeat it per variant. {usual}")
    levels = "Levels of children below the root. Default: as in the task's demonstrations."
    flags.DEFINE_integer("depth", None, levels, lower_bound=0, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 is greedy.", lower_bound=0.0, flag_values=values)
    text(
        "problems",
        None,
        "JSON Lines file, e.g. a run's held_out.jsonl. Default: held-out problems of the task.",
    )
    flags.DEFINE_integer("count", 50, "Problems to measure.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("patience", 600, "Most seconds to wait for a server.", lower_bound=1, flag_values=values)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked values of the flags of `tools.latency`, with the models and problems that they name."""

    out: Path
    engines: list[str]
    exports: list[Export]  # models of one task, each of another variant
    urls: list[str]  # of servers that are already running; empty: servers are started
    servers: int  # number of servers
    placement: str  # key of `PLACEMENTS`
    launcher: list[str]  # command that starts a server
    environments: list[dict[str, str]]  # environment variables of each started server
    concurrency: list[int]  # trees at once, per pass
    windows: list[int]  # empty: each model's own
    min_children: list[int]
    budgets: dict[str, list[int]]  # variant -> budgets that prompts ask for
    depth: int | None  # None: as in the demonstrations
    temperature: float
    problems: Sequence[Any]
    source: str  # digest of the file of problems; "": the problems come from the task
    warm_up: Sequence[Any]  # further problems, which are run before the first sample
    patience: float  # seconds to wait for a server

    def conditions(self, export: Export) -> Iterator[tuple[Budget, str]]:
        """Yield each budget of a model with the condition at the start of the root's prompt. Raises UserError for a
        window that is longer than the model's context."""
        levels = export.task.levels(export.variant)
        depth = levels if self.depth is None or not levels else self.depth
        for window in self.windows or [export.window]:
            if window > export.context:
                raise UserError(f"--windows: {export.folder} holds {export.context} tokens, was given {window}")
            for min_children in self.min_children if levels else [0]:
                budget = Budget(window, depth=max(1, depth), min_children=min_children)
                for asked in self.budgets.get(export.variant) or [None]:
                    yield budget, export.condition if asked is None else export.task.condition(export.variant, asked)


def make_plan(values: flags.FlagValues) -> Plan:
    """Make the plan that the flags ask for. With --config, the last models of the run are exported here. Raises
    UserError or OSError for flags, files or folders that are wrong."""
    if values["config"].value:
        _take_from_run(values)
    elif values["workdir"].value:
        raise UserError("--workdir is the folder of a run and needs --config=FILE, its preset")
    engines = _among("engine", values["engine"].value, ENGINES)
    exports = _exports(values["model"].value)
    urls, servers = _servers(values["servers"].value)
    if urls and len(exports) > 1:
        raise UserError("running servers have one model: give one --model per call")
    gpus = visible_gpus()
    one = values["placement"].value == "one"  # all threads go to one server, so that more servers would be idle
    servers = len(urls) or servers or (1 if one else max(len(gpus), 1))
    problems, warm_up, source = _problems(values["problems"].value, values["count"].value, exports)
    return Plan(
        Path(values["out"].value), engines, exports, urls, servers, values["placement"].value,
        _launcher(values["launcher"].value),
        [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(servers)] if gpus else [],
        _numbers("concurrency", values["concurrency"].value, 1), _numbers("windows", values["windows"].value, 32),
        _numbers("min_children", values["min_children"].value, 0), _budgets(values["budgets"].value, exports),
        values["depth"].value, values["temperature"].value, problems, source, warm_up, values["patience"].value,
    )  # fmt: skip


def _exports(folders: Sequence[str]) -> list[Export]:
    """Read the exported models. Raises UserError if they are of several tasks, or two are of one variant."""
    exports = [read_export(user_path(folder)) for folder in folders]
    if len({export.task.spec for export in exports}) > 1:
        named = ", ".join(f"{export.folder} of {export.task.spec}" for export in exports)
        raise UserError(f"--model: all models of a call must be of one task, was given {named}")
    variants = [export.variant for export in exports]
    if twice := [variant for variant in dict.fromkeys(variants) if variants.count(variant) > 1]:
        raise UserError(
            f"--model: one model of each variant, was given several of {twice[0]}: use another --out for the second"
        )
    return exports


def _servers(given: str) -> tuple[list[str], int]:
    """Return the addresses of running servers, and how many servers to start (0: not given). Raises UserError."""
    urls = [url for url in given.split(",") if url] if "://" in given else []
    if wrong := [url for url in urls if not _is_url(url)]:
        raise UserError(f"--servers must be a number from 1 or http://HOST:PORT,..., was given {wrong[0]!r}")
    if not urls and given and not (re.fullmatch("[0-9]{1,9}", given) and int(given)):
        raise UserError(f"--servers must be a number from 1 or http://HOST:PORT,..., was given {given!r}")
    return urls, 0 if urls else int(given or 0)


def _budgets(given: Sequence[str], exports: Sequence[Export]) -> dict[str, list[int]]:
    """Return the budgets of each variant. They are given as "VARIANT:N,N", or as "N,N" if there is one model. Raises
    UserError, also for a variant whose prompts cannot ask for a budget."""
    variants = {export.variant: export.task for export in exports}
    found: dict[str, list[int]] = {}
    for one in given:
        variant, sign, text = one.rpartition(":")
        if not sign and len(variants) > 1:
            raise UserError(f"--budgets is VARIANT:N,N with several models ({', '.join(variants)}), was given {one!r}")
        for name in [variant] if sign else variants:
            if name not in variants:
                raise UserError(f"--budgets: the variants are {', '.join(variants) or 'none'}, was given {one!r}")
            found[name] = found.get(name, []) + _numbers("budgets", text.split(","), 0)
            variants[name].condition(name, found[name][0])  # raises UserError for a variant without budgets
    return found


def _launcher(given: str) -> list[str]:
    """Split the command that starts a server as a shell would. Raises UserError."""
    try:
        command = shlex.split(given)
    except ValueError as error:  # a quote is not closed
        raise UserError(f"--launcher must be a command, was given {given!r}: {error}") from None
    if not command:
        raise UserError("--launcher must be a command, was given nothing")
    return command


def _is_url(given: str) -> bool:
    try:
        parts = urlsplit(given)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in given
    except ValueError:  # a port or an IPv6 address is malformed
        return False


def _among(name: str, given: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Return the distinct values of a flag. Raises UserError for a value that is not allowed, or none at all."""
    if not given or set(given) - set(allowed):
        raise UserError(f"--{name}: allowed are {', '.join(allowed)}, was given {','.join(given)!r}")
    return list(dict.fromkeys(given))


def _numbers(name: str, given: Sequence[str], minimum: int) -> list[int]:
    """Return the distinct numbers of a flag. Raises UserError for anything but integers from `minimum`."""
    if not all(re.fullmatch("[0-9]{1,9}", one) and int(one) >= minimum for one in given):
        raise UserError(f"--{name}: numbers from {minimum} are allowed, was given {','.join(given)!r}")
    return list(dict.fromkeys(map(int, given)))


def _problems(path: str | None, count: int, exports: Sequence[Export]) -> tuple[list[Any], list[Any], str]:
    """Return the problems to measure, further problems to warm up with, and a digest of the file of problems. Without a
    model there are no problems. Raises UserError or OSError."""
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"--problems: no file {path}")
    if not exports:
        return [], [], ""
    task, source = exports[0].task, ""
    if path:
        problems, after = ProblemFile(task, Path(path))[:count], count
        source = hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest()
    else:
        problems, after = first_problems(task, HELD_OUT, count)
    if len(problems) < count:
        raise UserError(f"--count: {path or task.spec} holds {len(problems)} problems, was given {count}")
    warm_up, _ = first_problems(task, HELD_OUT, WARM_UP, after)
    return problems, warm_up or problems[:WARM_UP], source


def _take_from_run(values: flags.FlagValues) -> None:
    """Set the flags that were not given from the run that --config names, and export its last models. Raises UserError
    or OSError if there is no such run."""
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
