"""The stages of one run, each able to run alone and to go on where it was stopped.

A run folder holds:

    config.json                    what was run; devices, slots and the like as last called (checkpoints have theirs)
    versions.json                  device and packages, `earlier` ones where a run went on elsewhere
    data/                          problems, traces, tokenizer.json, manifest.json
    sft_STYLE/ grpo_STYLE/         checkpoints/, metrics.jsonl, tensorboard/; of GRPO with validation best/
    evaluate/MODEL.jsonl           one record per held-out problem, in their order; MODEL+BUDGET@TEMPERATURE.jsonl where
                                   those were asked for; MODEL.stamp.json: of which weights
    export/                        the last APR model in Hugging Face format
    report.md summary.json figures/
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import time
import zlib
from collections.abc import Iterator, Sequence, Set
from functools import cached_property
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from apr_jax import interrupt
from apr_jax.data.dataset import read_manifest
from apr_jax.errors import UserError
from apr_jax.evaluate.run import evaluate
from apr_jax.export.hf import check_export, check_trees, export_hf
from apr_jax.io.files import write_text
from apr_jax.io.paths import read_json
from apr_jax.model.llama import Llama, LlamaConfig, abstract_llama, parameter_count
from apr_jax.rollout.engine import JaxEngine
from apr_jax.tasks.countdown import CountdownProtocol
from apr_jax.tasks.stand_in import StandIn
from apr_jax.text.hub import find_tokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.run import TreeRunner
from apr_jax.train.checkpoint import CheckpointError, fingerprint, last_step, load_meta, load_model, newest_step
from apr_jax.train.grpo import GrpoJob, RolloutSpec, most_frequent, run_grpo
from apr_jax.train.sft import SftJob, run_sft
from apr_jax.train.step import data_mesh
from experiments.dataset import (
    load_conditions,
    load_held_out,
    load_pieces,
    load_problems,
    load_run_tokenizer,
    make_data,
)
from experiments.report import records_name, write_report
from experiments.settings import STAGES, STYLES, Settings, default_config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "transformers", "torch")


POLL_SECONDS = 1.0  # between two looks at what another process has made

# How the same run is computed, logged and saved: a run may go on with other values of these.
EXECUTION = {
    "devices", "fsdp", "model.attention", "model.remat", "model.scan", "sft.microbatches", "sft.save_every",
    "sft.log_every", "sft.most_skipped", "grpo.batch_rows", "grpo.slots", "grpo.save_every", "evaluate.slots",
    "evaluate.also_at", "evaluate.apr_budgets", "evaluate.sosp_budgets",
}  # fmt: skip
# Settings that a run may still change as long as these folders, of the stages that read them, are not there.
UNTIL = {"grpo": ("grpo_*",), "evaluate": ("evaluate", "grpo_*/best"), "export": ("export",)}


class Run:
    """One run folder and the stages that fill it, with the models of some styles or all. Two processes may work on one
    folder, each on a style of its own, once its data are made."""

    def __init__(
        self, settings: Settings, workdir: Path, styles: Sequence[str] = STYLES, stages: Sequence[str] = STAGES
    ):
        self.settings, self.workdir, self.styles = settings, workdir, styles
        self._counted: dict[str, dict[str, int]] = {}  # conditions, by style
        self._weights: dict[Path, str] = {}  # fingerprints of saved steps, as far as stages have read them
        on_devices = not {*stages} <= {"data", "report"}
        if on_devices and settings.model["attention"] == "cudnn" and jax.default_backend() != "gpu":
            raise UserError(f"model.attention cudnn needs an NVIDIA GPU, JAX runs on {jax.default_backend()}")
        # First: a refusal must not leave its config in the folder.
        if settings.tokenizer and not (workdir / "config.json").exists():
            load_tokenizer(settings.tokenizer)
        self.mesh = data_mesh(settings.devices, settings.fsdp) if on_devices else None
        for style in styles:
            if first := self._first_checkpoint(style):
                try:
                    given, _ = load_meta(first)
                except CheckpointError as error:
                    raise UserError(f"model.checkpoint: {error}") from None
                self._check_sizes(first, given)
        if jax.process_count() > 1:
            self._attempt = self._agree()
        if jax.process_index() == 0:
            self._claim()

    def run(self, stages: Sequence[str]) -> None:
        for stage in stages:
            interrupt.check()
            getattr(self, stage)()

    def _agree(self) -> int:
        """A number that the processes of this start share, and no other start. Raises UserError where one of them was
        given other settings."""
        mine = zlib.crc32(json.dumps([self.settings.config, self.styles], sort_keys=True).encode())
        drawn = int.from_bytes(os.urandom(4), "little")
        settings, numbers = multihost_utils.process_allgather(np.array([mine, drawn], np.uint32)).T.tolist()
        if len(set(settings)) > 1:
            raise UserError(
                "the processes were given different settings: all need the same --config, --styles and changes"
            )
        return numbers[0]

    def _claim(self) -> None:
        """Writes config and versions; refuses a folder that holds a run of another config."""
        path = self.workdir / "config.json"
        mine = json.loads(json.dumps(self.settings.config))
        if path.exists():
            theirs = read_json(path, "delete it, if the config is the one it was begun with")
            theirs = _completed(theirs, json.loads(json.dumps(default_config().to_dict())))
            begun = {name for name, folders in UNTIL.items() if any(any(self.workdir.glob(f)) for f in folders)}
            if differences := list(_differences(theirs, mine, free=UNTIL.keys() - begun)):
                raise UserError(
                    f"{self.workdir} holds a run of another config ({'; '.join(differences[:3])}): "
                    "give another --workdir, or the config it was begun with"
                )
        write_text(path, json.dumps(mine, indent=1))
        versions = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": jax.devices()[0].device_kind,
        }
        versions |= {name: _version(name) for name in PACKAGES}
        noted = _read_json(self.workdir / "versions.json")
        before = noted.pop("earlier", [])
        known = [*(before if isinstance(before, list) else []), noted] if noted else []
        if earlier := [one for one in known if one != versions]:
            versions["earlier"] = earlier
        write_text(self.workdir / "versions.json", json.dumps(versions, indent=1))

    # ------------------------------------------------------------------ stages

    def data(self) -> None:
        """The first process makes the data, which can take its time; the others wait for the manifest, and end with
        the first one's error where it leaves one."""
        folder = self.workdir / "data"
        if jax.process_count() > 1:
            failure = self.workdir / f"data_failed.{self._attempt}"
            if jax.process_index() == 0:
                self._make_first(folder, failure)
            while read_manifest(folder) is None:
                if failure.exists():
                    raise UserError(f"process 0 ended in the data stage: {failure.read_text()}")
                time.sleep(POLL_SECONDS)
        make_data(self.settings, folder)  # where it is made: only looks whether this run can use it

    def _make_first(self, folder: Path, failure: Path) -> None:
        """Makes the data. Of an error one line stands in `failure` until the other processes have read it."""
        try:
            make_data(self.settings, folder)
        except BaseException as error:
            line = (str(error).strip().splitlines() or [""])[0]
            with contextlib.suppress(OSError):
                write_text(failure, line if isinstance(error, UserError) else f"{type(error).__name__}: {line}")
                time.sleep(5 * POLL_SECONDS)
                failure.unlink()
            raise

    def sft(self) -> None:
        for style in self.styles:
            model = self._first_model(style)
            children = self.settings.children if style == "apr" else 0
            pieces, validation = (
                load_pieces(self.workdir / "data", style, part, children, self.settings.seed)
                for part in ("train", "validation")
            )
            job = SftJob(
                model, self.settings.sft, pieces, self.mesh, self.workdir / f"sft_{style}", validation,
                self._meta(model.config, style, "sft"),
            )  # fmt: skip
            run_sft(job)

    def grpo(self) -> None:
        for style in self.settings.grpo_styles if self.settings.grpo.steps else ():
            if style not in self.styles:
                continue
            folder = self.workdir / f"sft_{style}" / "checkpoints"
            if newest_step(folder) is None:
                raise FileNotFoundError(f"no checkpoint at {folder}: run --stage=sft first")
            self._check_finished(f"sft_{style}")
            model, _ = self._load(f"sft_{style}", folder)
            began_with = fingerprint(model)
            begun = last_step(self.workdir / f"grpo_{style}")
            if begun and load_meta(begun)[1].get("began_with", began_with) != began_with:
                raise UserError(
                    f"{self.workdir / f'grpo_{style}'} began with other weights than sft_{style} has now: remove it, "
                    "or give another --workdir"
                )
            rollouts = RolloutSpec(
                CountdownProtocol(style), self.tokenizer, self.settings.budget_of(style), self.settings.grpo_slots,
                self._conditions(style),
            )  # fmt: skip
            job = GrpoJob(
                model, self.settings.grpo, rollouts, load_problems(self.workdir / "data" / "train.npy"), self.mesh,
                self.workdir / f"grpo_{style}", key=lambda problem: problem.key,
                meta=self._meta(model.config, style, "grpo") | {"began_with": began_with},
                validation_sampling=self.settings.evaluate_sampling,
            )  # fmt: skip
            run_grpo(job)

    def evaluate(self) -> None:
        problems = load_held_out(self.workdir / "data")
        models = self.models()
        if not models:
            raise FileNotFoundError(f"no checkpoint under {self.workdir}: run --stage=sft first")
        for style in self.styles:
            if self.settings.evaluate_budgets[style] and not any(self._conditions(style)):
                raise UserError(
                    f"evaluate.{style}_budgets is for a model whose demonstrations had budgets, these had none: make "
                    f"them with {style}.conditioned=true, in another --workdir"
                )
        for name, (model, meta) in models.items():
            folder = self.workdir / "evaluate"
            reached, steps = self._reached(name)
            if self.saved()[name].parent.name == "checkpoints":
                reached = meta["step"]  # the newest step may be broken
            stamp = {
                "weights": fingerprint(model), "step": meta["step"], "steps": steps, "finished": reached >= steps,
                "problems": len(problems),
            }  # fmt: skip
            known = _read_json(folder / f"{name}.stamp.json")
            if any(known.get(key) != stamp[key] for key in ("weights", "problems")):
                for old in folder.glob(f"{name}[.@+]*"):  # of other weights
                    old.unlink()
            if known != stamp:
                write_text(folder / f"{name}.stamp.json", json.dumps(stamp))
            self._weights[last_step(self.workdir / name)] = stamp["weights"]
            title = name if stamp["finished"] else f"{name} (step {meta['step']} of {steps})"
            engine = JaxEngine(
                model,
                self.mesh,
                slots=self.settings.evaluate_slots,
                context=self.settings.window,
                seed=self.settings.seed,
            )
            protocol = CountdownProtocol(meta["style"])
            usual = most_frequent(self._conditions(meta["style"]))
            asked = {budget: protocol.condition(budget) for budget in self.settings.evaluate_budgets[meta["style"]]}
            samplings = {None: self.settings.evaluate_sampling, **self.settings.evaluate_also}
            for (budget, condition), (temperature, sampling) in itertools.product(
                (asked or {None: usual}).items(), samplings.items()
            ):
                records = records_name(name, temperature, budget)
                runner = TreeRunner(
                    engine, protocol, self.tokenizer, self.settings.budget_of(meta["style"]), sampling
                )  # fmt: skip
                evaluate(
                    runner, problems, folder / f"{records}.jsonl", task=StandIn("countdown"), variant=meta["style"],
                    condition=condition, weights=stamp["weights"],
                    progress_title=f"evaluate {title}{records.removeprefix(name)}",
                    at_once=max(256, self.settings.evaluate_slots),
                )  # fmt: skip

    def export(self) -> None:
        saved = self.saved()
        name = next((name for name in ("grpo_apr", "sft_apr") if name in saved), None)
        if name is None:
            if "apr" not in self.styles:
                return
            raise FileNotFoundError(f"no APR checkpoint under {self.workdir}: run --stage=sft first")
        self._check_finished(name, "; python -m tools.export_hf exports any checkpoint")
        model, meta = self._load(name, saved[name].parent)
        if saved[name].parent.name == "checkpoints" and meta["step"] < (steps := self._reached(name)[1]):
            stage = name.partition("_")[0]
            raise UserError(
                f"the newest readable step of {name} is {meta['step']} of {steps}: finish --stage={stage} first"
            )
        folder = self.workdir / "export"
        self._weights[saved[name]] = fingerprint(model)
        described = {"model": name, "step": meta["step"], "weights": self._weights[saved[name]]}
        if _read_json(folder / "check.json").items() >= described.items():
            return  # the check is the last thing written
        export_hf(model, self.tokenizer, folder, meta, self.settings.export_dtype)
        held_out = load_held_out(self.workdir / "data")
        pieces = load_pieces(self.workdir / "data", "apr", "validation")
        check = {
            **described,
            **check_export(model, self.tokenizer, folder, [pieces[i].tokens[:64] for i in range(min(8, len(pieces)))]),
        }
        if self.settings.export_check_trees:
            problems = held_out[: self.settings.export_check_trees]
            equal, total = check_trees(
                model, self.tokenizer, folder, CountdownProtocol("apr"), problems, self.settings.budget,
                progress_title="export check", condition=most_frequent(self._conditions("apr")),
            )  # fmt: skip
            check |= {"trees_equal": equal, "trees": total}
        write_text(folder / "check.json", json.dumps(check, indent=1))
        print(f"export {folder}: {json.dumps(check)}")

    def report(self) -> None:
        print(
            write_report(
                self.workdir, tuple(self.settings.evaluate_also), self._weights, self.settings.evaluate_budgets
            )
        )

    # ------------------------------------------------------------------ what stages share

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_run_tokenizer(self.workdir / "data", self.settings.tokenizer)

    def _conditions(self, style: str) -> dict[str, int]:
        """Of a style's demonstrations, as `load_conditions` counts them."""
        if style not in self._counted:
            self._counted[style] = load_conditions(self.workdir / "data", style, self.tokenizer)
        return self._counted[style]

    @property
    def model_config(self) -> LlamaConfig:
        return LlamaConfig(vocab_size=len(self.tokenizer), **self.settings.model)

    def _first_checkpoint(self, style: str) -> str | Path:
        """Where SFT finds its first weights, "" for random ones. Once it has saved a step, that has the model's sizes
        too, and model.checkpoint may be gone."""
        own = self.workdir / f"sft_{style}" / "checkpoints"
        return self.settings.checkpoint and (own if newest_step(own) else self.settings.checkpoint)

    def _first_model(self, style: str) -> Llama:
        """The model that SFT begins with. Raises UserError where a given one is not the run's, CheckpointError where
        it cannot be read."""
        first = self._first_checkpoint(style)
        if not first:
            return Llama(self.model_config, rngs=nnx.Rngs(self.settings.seed))
        model, _ = load_model(first)
        self._check_sizes(first, model.config)
        self._check_vocabulary(first, model.config)
        # Rotary base and norm are no settings: they stay those that the weights were trained with.
        model.config = dataclasses.replace(
            self.model_config, rope_theta=model.config.rope_theta, norm_epsilon=model.config.norm_epsilon
        )
        return model

    def _check_sizes(self, checkpoint: str | Path, given: LlamaConfig) -> None:
        """Raises UserError, also where the run's threads are longer than the model's context."""
        run = LlamaConfig(given.vocab_size, **self.settings.model)
        for name, theirs, ours in (
            ("width", given.width, run.width),
            ("layers", given.layers, run.layers),
            ("heads", given.heads, run.heads),
            ("kv_heads", given.kv, run.kv),
            ("feed_forward", given.hidden, run.hidden),
            ("tie_embeddings", given.tie_embeddings, run.tie_embeddings),
        ):
            if theirs != ours:
                raise UserError(
                    f"model.checkpoint {checkpoint} has {name} {theirs}, the run's model {ours}: set model.{name}"
                )
        if self.settings.window > given.context:
            raise UserError(
                f"window is at most the context of model.checkpoint ({given.context}), was given {self.settings.window}"
            )

    def _check_vocabulary(self, checkpoint: str | Path, given: LlamaConfig) -> None:
        """Raises UserError where the weights' words are others than the run's, as far as it is known."""
        if given.vocab_size != len(self.tokenizer):
            raise UserError(
                f"model.checkpoint {checkpoint} has a vocabulary of {given.vocab_size}, the run's tokenizer has "
                f"{len(self.tokenizer)}: set tokenizer.name or tokenizer.max_number"
            )
        try:
            path = find_tokenizer(Path(checkpoint))
        except FileNotFoundError:
            return
        tokenizer = load_tokenizer(str(path))
        theirs, ours = tokenizer.backend.get_vocab(), self.tokenizer.backend.get_vocab()
        if others := sorted(theirs.items() - ours.items(), key=lambda item: item[1]):
            word, index = others[0]
            raise UserError(
                f"model.checkpoint {checkpoint} has other words than the run's tokenizer, such as {word!r} for the "
                f"number {index}: set tokenizer.name to {path}"
            )
        if ends := sorted(tokenizer.ends - self.tokenizer.ends):
            raise UserError(
                f"model.checkpoint {checkpoint} also ends a text with the token {ends[0]}, the run's tokenizer does "
                f"not: set tokenizer.name to {path}"
            )

    def saved(self) -> dict[str, Path]:
        """The folder of every trained model of these styles, by the name of its stage: sft_sosp, sft_apr, ... Of GRPO
        with validation what validated best."""
        names = (f"{kind}_{style}" for kind in ("sft", "grpo") for style in self.styles)
        return {name: step for name in names if (step := last_step(self.workdir / name))}

    def models(self) -> dict[str, tuple[Llama, dict]]:
        """The models of `saved` with their meta."""
        return {name: self._load(name, step.parent) for name, step in self.saved().items()}

    def _load(self, name: str, folder: Path) -> tuple[Llama, dict]:
        """`load_model`. Raises UserError where the checkpoint is not of the stage and style whose folder it lies in."""
        model, meta = load_model(folder)
        if f"{meta.get('stage')}_{meta.get('style')}" != name or not isinstance(meta.get("step"), int):
            raise UserError(
                f"{folder} holds no checkpoint of {name}, but step {meta.get('step')} of {meta.get('stage')}_"
                f"{meta.get('style')}: move it back where it was made"
            )
        if model.config.vocab_size != len(self.tokenizer):
            raise UserError(
                f"{folder} has a vocabulary of {model.config.vocab_size}, the tokenizer of {self.workdir / 'data'} has "
                f"{len(self.tokenizer)}: give the data set the tokenizer.json back that it was made with"
            )
        return model, meta

    def _reached(self, name: str) -> tuple[int, int]:
        """(the newest step that a stage has saved, its last step). They differ while it is trained."""
        steps = (self.settings.sft if name.startswith("sft") else self.settings.grpo).steps
        if (saved := newest_step(self.workdir / name / "checkpoints")) is None:
            return 0, steps
        meta = load_meta(saved)[1]
        return meta["step"], meta.get("steps", steps)  # what sft.tokens make of sft.steps

    def _check_finished(self, name: str, also: str = "") -> None:
        """Raises UserError for a model that is still trained."""
        reached, steps = self._reached(name)
        if reached < steps:
            stage = name.partition("_")[0]
            raise UserError(f"{name} stands at step {reached} of {steps}: finish --stage={stage} first{also}")

    def _meta(self, config: LlamaConfig, style: str, kind: str) -> dict:
        total, inner = parameter_count(abstract_llama(config))
        return {
            "model": dataclasses.asdict(config), "style": style, "stage": kind, "config": self.settings.config,
            "parameters": total, "parameters_without_embeddings": inner,
            "condition": most_frequent(self._conditions(style)),  # first on a root's prompt, where nothing else is said
        }  # fmt: skip


def _version(package: str) -> str | None:
    """None where it is not installed, as torch need not be."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read_json(path: Path) -> dict:
    """What a stage noted of its work; nothing where it noted none or the file is broken."""
    try:
        return read_json(path, "")
    except (FileNotFoundError, UserError):
        return {}


def _completed(config: dict, default: dict) -> dict:
    """A config with the default of every setting that there was not yet when it was written."""
    completed = dict(config)
    for key, value in default.items():
        theirs = config.get(key, value)
        completed[key] = _completed(theirs, value) if isinstance(value, dict) and isinstance(theirs, dict) else theirs
    return completed


def _differences(old: dict, new: dict, prefix: str = "", free: Set[str] = frozenset()) -> Iterator[str]:
    """What would make another run; `free` are sections that may differ."""
    for key in sorted(set(old) | set(new)):
        if f"{prefix}{key}" in EXECUTION | free:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} was {a!r}, is {b!r}"
