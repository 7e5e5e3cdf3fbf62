"""What a command line of `tools.latency` asks for: its flags, and the plan that they make, all of it checked."""

import dataclasses
import hashlib
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from absl import flags

from apr_jax.data.dataset import ProblemFile
from apr_jax.errors import UserError
from apr_jax.io.files import write_text
from apr_jax.io.paths import read_json
from apr_jax.rollout.placement import PLACEMENTS
from apr_jax.tasks.countdown import CountdownProtocol
from apr_jax.tasks.countdown.problem import Problem, ProblemRange
from apr_jax.text.hub import HubTokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.run import Budget
from experiments.command import load_config

MODELS = ("sosp", "apr")
ENGINES = ("sglang", "jax")
LAUNCHER = Path(__file__).with_name("serve_sglang.sh")
WARM = 4  # trees that are run before the first is measured


def define_flags(values: flags.FlagValues) -> None:
    """The tool's flags; `make_plan` reads them."""

    def text(name: str, default: str | None, help: str) -> None:
        flags.DEFINE_string(name, default, help, flag_values=values)

    def numbers(name: str, default: list[str], help: str) -> None:
        flags.DEFINE_list(name, default, help, flag_values=values)

    text("config", None, "Preset of a run whose last models are measured.")
    text("workdir", None, "Folder of that run. Default: runs/NAME.")
    text("apr", None, "Folder of an exported APR model.")
    text("sosp", None, "Folder of an exported SoS+ model.")
    text("out", "runs/latency", "Folder of samples, figures and report; with --config latency/ of the run.")
    numbers("engine", ["sglang"], "sglang, jax (in this process) or both, one after the other.")
    text("servers", "", "How many to start, or URL,URL of running ones. Default: 1; one per GPU, where threads part.")
    place = "Where threads go: one server, round_robin, or roots_apart (the paper's: children to all but the first)."
    flags.DEFINE_enum("placement", "one", sorted(PLACEMENTS), place, flag_values=values)
    text("launcher", str(LAUNCHER), "Command that serves; FOLDER PORT is added after serve.")
    numbers("concurrency", ["1"], "Trees at once; several numbers, one pass each.")
    numbers("windows", [], "Tokens of a thread: budgets of both models. Default: what the model holds.")
    numbers("least_children", ["0"], "Children at least: budgets of the APR model.")
    usual = "With --config by default what its demonstrations had most often."
    numbers("apr_budgets", [], f"Of a conditioned APR model: children that the prompt asks for. {usual}")
    numbers("sosp_budgets", [], f"Of a conditioned SoS+ model: tokens that the prompt asks for. {usual}")
    flags.DEFINE_integer("depth", 1, "Levels of children.", lower_bound=0, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "Of the sampling.", lower_bound=0.0, flag_values=values)
    text("problems", None, "A held_out.npy; without it problems are drawn: up to 10, targets up to 30.")
    flags.DEFINE_integer("count", 50, "Problems.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("patience", 600, "Seconds to wait for servers.", lower_bound=1, flag_values=values)


@dataclasses.dataclass(frozen=True)
class Export:
    """A checkpoint in Hugging Face format, as `tools.export_hf` writes it."""

    model: str
    folder: Path
    tokenizer: Tokenizer | HubTokenizer
    words: int  # of the model
    context: int
    weights: str  # digest


def read_export(model: str, folder: str) -> Export:
    """Raises FileNotFoundError or ValueError where the folder holds no model that we can run."""
    path = Path(folder)
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    if not files[0].is_file() or len(files) < 2:
        raise FileNotFoundError(f"--{model}: no exported model in {folder} (python -m tools.export_hf writes one)")
    from apr_jax.export.imported import read_config  # here: it brings JAX

    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    config = read_config(path)
    tokenizer = load_tokenizer(str(path.absolute() / "tokenizer.json"))
    return Export(model, path, tokenizer, config.vocab_size, config.context, digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    out: Path
    engines: list[str]
    exports: list[Export]
    urls: list[str]  # of somebody else's servers
    servers: int
    placement: str
    launcher: list[str]
    environments: list[dict[str, str]]
    concurrency: list[int]
    windows: list[int]
    least_children: list[int]
    asked: dict[str, list[int]]  # by model: budgets that the prompt asks for
    depth: int
    temperature: float
    problems: Sequence[Problem]
    source: str  # digest of the file of problems, "" of drawn ones
    warm: Sequence[Problem]  # others, to warm up with
    patience: float

    def budgets(self, export: Export) -> Iterator[tuple[Budget, str]]:
        """Each with what stands first on the prompt. Raises UserError for those that the model cannot have."""
        for window in self.windows or [export.context]:
            if window > export.context:
                raise UserError(f"--windows: {export.folder} holds {export.context} tokens, was given {window}")
            for least in self.least_children if export.model == "apr" else [0]:
                budget = Budget(window, depth=self.depth if export.model == "apr" else 1, least_children=least)
                for asked in self.asked[export.model] or [None]:
                    yield budget, CountdownProtocol(export.model).condition(asked)


def make_plan(values: flags.FlagValues) -> Plan:
    """Raises UserError or OSError in one line for what cannot be done. With --config the last models of its run are
    exported here."""
    if values["config"].value:
        _take_from_run(values)
    elif values["workdir"].value:
        raise UserError("--workdir is a run's and goes with --config=FILE, its preset")
    engines = _among("engine", values["engine"].value, ENGINES)
    exports = [read_export(model, values[model].value) for model in MODELS if values[model].value]
    given = values["servers"].value
    urls = [url for url in given.split(",") if url] if "://" in given else []
    if wrong := [url for url in urls if not _is_url(url)]:
        raise UserError(f"--servers is a number from 1 or http://HOST:PORT,..., was given {wrong[0]!r}")
    if not urls and given and not (re.fullmatch("[0-9]{1,9}", given) and int(given)):
        raise UserError(f"--servers is a number from 1 or http://HOST:PORT,..., was given {given!r}")
    if urls and len(exports) > 1:
        raise UserError("running servers have one model: give --apr or --sosp, and the other in a second call")
    gpus = _gpus()
    one = values["placement"].value == "one"  # all threads go to the first
    servers = len(urls) or int(given or 0) or (1 if one else max(len(gpus), 1))
    path = values["problems"].value
    problems, warm = _problems(path, values["count"].value)
    source = hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest() if path else ""
    return Plan(
        Path(values["out"].value), engines, exports, urls, servers, values["placement"].value,
        _words(values["launcher"].value),
        [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(servers)] if gpus else [],
        _numbers("concurrency", values, 1), _numbers("windows", values, 32), _numbers("least_children", values, 0),
        {model: _numbers(f"{model}_budgets", values, 0) for model in MODELS},
        values["depth"].value, values["temperature"].value, problems, source, warm, values["patience"].value,
    )  # fmt: skip


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


def _numbers(name: str, values: flags.FlagValues, least: int) -> list[int]:
    given = values[name].value
    if not all(re.fullmatch("[0-9]{1,9}", one) and int(one) >= least for one in given):
        raise UserError(f"--{name} is numbers from {least}, was given {','.join(given)!r}")
    return list(dict.fromkeys(map(int, given)))


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: those that it leaves us, where it is set."""
    if os.environ.get("APR_SGLANG_DEVICE") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    there = [] if listed.returncode else [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(len(there))] if mask is None else [one for one in mask.split(",") if one]


def _problems(path: str | None, count: int) -> tuple[list[Problem], list[Problem]]:
    """Those to measure, and some others."""
    rng = random.Random(0)
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--problems: no file {path}")
        problems = list(ProblemFile(Path(path))[:count])
        if len(problems) < count:
            raise UserError(f"--count: {path} holds {len(problems)} problems, was given {count}")
    else:
        ranges = ProblemRange(max_number=10, max_target=30)
        problems = [ranges.draw(rng) for _ in range(count)]
    size = len(problems[0].numbers)
    largest, target = max(max(one.numbers) for one in problems), max(one.target for one in problems)
    others = ProblemRange(count=size, max_number=largest, max_target=max(target, 10))
    return problems, [others.draw(rng) for _ in range(WARM)]


# ---------------------------------------------------------------------- a run's models


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
        "temperature": config["evaluate"]["temperature"], "problems": str(run / "data" / "held_out.npy"),
    }  # fmt: skip
    for name, value in found.items():
        if not values[name].present:
            values[name].value = value
    if any(values[model].present for model in MODELS):
        return
    from apr_jax.train.checkpoint import last_step, load_meta  # here: it brings JAX

    last = {model: last_step(run / f"grpo_{model}") or last_step(run / f"sft_{model}") for model in MODELS}
    if not any(last.values()):
        raise FileNotFoundError(f"no checkpoint under {run}: run --stage=sft of it first")
    for model, checkpoint in last.items():
        if checkpoint is not None:
            asked = re.findall(r"\d+", load_meta(checkpoint)[1].get("condition", ""))
            if asked and not values[f"{model}_budgets"].present:
                values[f"{model}_budgets"].value = asked
            values[model].value = str(_exported(checkpoint, run / "latency" / "exports" / model))


def _exported(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint in Hugging Face format. By another process: JAX would keep a GPU's memory from the servers."""
    stamp, of = folder.with_suffix(".txt"), f"{checkpoint.absolute()} {checkpoint.stat().st_mtime_ns}\n"
    if not (folder / "config.json").is_file() or not stamp.is_file() or stamp.read_text() != of:
        words = [f"--checkpoint={checkpoint.absolute()}", f"--out={folder.absolute()}", "--check=0"]
        made = subprocess.run(
            [sys.executable, "-m", "tools.export_hf", *words], cwd=LAUNCHER.parent.parent, capture_output=True,
            text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        if made.returncode:
            _, sign, why = made.stderr.strip().rpartition("error: ")
            if not sign or "Traceback" in made.stderr:
                raise RuntimeError(f"{checkpoint} could not be exported:\n{made.stderr}")
            raise UserError(why)
        write_text(stamp, of)
    return folder
