"""The stages of one run, each able to run alone and to go on where it was stopped.

A run folder holds:

    config.json                    what was run; devices, slots and the like as last called (checkpoints have theirs)
    versions.json                  device and packages, `earlier` ones where a run went on elsewhere
    data/                          problems, traces, tokenizer.json, manifest.json
    sft_VARIANT/ grpo_VARIANT/     checkpoints/, metrics.jsonl, tensorboard/; of GRPO with validation best/
    sft_joint/                     the same of the one supervised model of all variants (sft.models)
    evaluate/MODEL.jsonl           one record per held-out problem, in their order; MODEL+BUDGET@TEMPERATURE.jsonl where
                                   those were asked for; MODEL.stamp.json: of which weights
    export/                        the last model of the first variant in Hugging Face format
    report.md summary.json figures/
"""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import jax

from apr_jax import interrupt
from apr_jax.data.dataset import read_manifest
from apr_jax.data.folder import PARTS, DataFolder
from apr_jax.data.packing import MixedSegments, Segment
from apr_jax.errors import UserError
from apr_jax.evaluate.run import evaluate
from apr_jax.export.hf import check_export, check_trees, export_hf
from apr_jax.io.files import write_text
from apr_jax.model.family import Model, ModelConfig, abstract_model, config_json, make_model, parameter_count
from apr_jax.rollout.engine import JaxEngine
from apr_jax.tasks.task import settings_json
from apr_jax.text.hub import find_tokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.run import TreeRunner
from apr_jax.train.checkpoint import CheckpointError, fingerprint, last_step, load_meta, load_model, newest_step
from apr_jax.train.grpo import GrpoJob, RolloutSpec, most_frequent, run_grpo
from apr_jax.train.sft import SftConfig, SftJob, run_sft
from apr_jax.train.step import data_mesh
from experiments.data_stage import make_data
from experiments.report import records_name, write_report
from experiments.settings import STAGES, Settings
from experiments.workspace import agree, claim, read_note

JOINT = "joint"  # in the place of a variant: the supervised model of all variants
POLL_SECONDS = 1.0  # between two looks at what another process has made


class Run:
    """One run folder and the stages that fill it, with the models of some variants or all (). Two processes may work on
    one folder, each on a variant of its own, once its data are made."""

    def __init__(self, settings: Settings, workdir: Path, variants: Sequence[str] = (), stages: Sequence[str] = STAGES):
        self.settings, self.workdir, self.task = settings, workdir, settings.task
        self.variants = tuple(variants) or self.task.variants
        self.dataset = DataFolder(workdir / "data", self.task)
        self._weights: dict[Path, str] = {}  # fingerprints of saved steps, as far as stages have read them
        on_devices = not {*stages} <= {"data", "report"}
        if on_devices and settings.model["attention"] == "cudnn" and jax.default_backend() != "gpu":
            raise UserError(f"model.attention cudnn needs an NVIDIA GPU, JAX runs on {jax.default_backend()}")
        # First: a refusal must not leave its config in the folder.
        if settings.tokenizer and not (workdir / "config.json").exists():
            load_tokenizer(settings.tokenizer)
        self.mesh = data_mesh(settings.devices, settings.fsdp) if on_devices else None
        for variant in (JOINT,) if settings.sft_joint else self.variants:
            if first := self._first_checkpoint(variant):
                try:
                    given, _ = load_meta(first)
                except CheckpointError as error:
                    raise UserError(f"model.checkpoint: {error}") from None
                self._check_sizes(first, given)
        if jax.process_count() > 1:
            self._attempt = agree(settings, self.variants)
        if jax.process_index() == 0:
            claim(workdir, settings)

    def run(self, stages: Sequence[str]) -> None:
        for stage in stages:
            interrupt.check()
            getattr(self, stage)()

    # ------------------------------------------------------------------ stages

    def data(self) -> None:
        """The first process makes the data, which can take its time; the others wait for the manifest, and end with
        the first one's error where it leaves one."""
        folder = self.dataset.folder
        if jax.process_count() > 1:
            failure = self.workdir / f"data_failed.{self._attempt}"
            if jax.process_index() == 0:
                self._make_first(failure)
            while read_manifest(folder) is None:
                if failure.exists():
                    raise UserError(f"process 0 ended in the data stage: {failure.read_text()}")
                time.sleep(POLL_SECONDS)
        make_data(self.settings, folder)  # where it is made: only looks whether this run can use it

    def _make_first(self, failure: Path) -> None:
        """Makes the data. Of an error one line stands in `failure` until the other processes have read it."""
        try:
            make_data(self.settings, self.dataset.folder)
        except BaseException as error:
            line = (str(error).strip().splitlines() or [""])[0]
            with contextlib.suppress(OSError):
                write_text(failure, line if isinstance(error, UserError) else f"{type(error).__name__}: {line}")
                time.sleep(5 * POLL_SECONDS)
                failure.unlink()
            raise

    def sft(self) -> None:
        segments = {  # of all variants before the first is trained: what is missing or broken is told at once
            variant: [
                self.dataset.segments(variant, part, self.settings.sft_children, self.settings.seed) for part in PARTS
            ]
            for variant in (self.task.variants if self.settings.sft_joint else self.variants)
        }
        config, joint = self.settings.sft, None
        if self.settings.sft_joint:  # what is saved for each variant is the one model, without a step of its own
            joint = self._train(JOINT, config, *(MixedSegments(part) for part in zip(*segments.values())))
            config = dataclasses.replace(config, steps=0)
        for variant, (train, validation) in segments.items():
            self._train(variant, config, train, validation, joint)

    def _train(
        self, variant: str, config: SftConfig, train: Sequence[Segment], validation: Sequence[Segment],
        model: Model | None = None,
    ) -> Model:  # fmt: skip
        """The supervised model of a variant, or of all (`JOINT`); `model` is what training begins with."""
        model = model or self._first_model(variant)
        meta = self._meta(model.config, variant, "sft")
        return run_sft(SftJob(model, config, train, self.mesh, self.workdir / f"sft_{variant}", validation, meta))

    def grpo(self) -> None:
        for variant in self.settings.grpo_variants if self.settings.grpo.steps else ():
            if variant not in self.variants:
                continue
            folder = self.workdir / f"sft_{variant}" / "checkpoints"
            if newest_step(folder) is None:
                raise FileNotFoundError(f"no checkpoint at {folder}: run --stage=sft first")
            self._check_finished(f"sft_{variant}")
            model, _ = self._load(f"sft_{variant}", folder)
            began_with = fingerprint(model)
            begun = last_step(self.workdir / f"grpo_{variant}")
            if begun and load_meta(begun)[1].get("began_with", began_with) != began_with:
                raise UserError(
                    f"{self.workdir / f'grpo_{variant}'} began with other weights than sft_{variant} has now: remove "
                    "it, or give another --workdir"
                )
            rollouts = RolloutSpec(
                self.task.protocol(variant), self.tokenizer, self.settings.budget_of(variant), self.settings.grpo_slots,
                self.dataset.conditions(variant),
            )  # fmt: skip
            job = GrpoJob(
                model, self.settings.grpo, rollouts, self.dataset.problems("train"), self.mesh,
                self.workdir / f"grpo_{variant}", key=self.task.key,
                meta=self._meta(model.config, variant, "grpo") | {"began_with": began_with},
                validation_sampling=self.settings.evaluate_sampling,
            )  # fmt: skip
            run_grpo(job)

    def evaluate(self) -> None:
        problems = self.dataset.held_out()
        models = self.models()
        if not models:
            raise FileNotFoundError(f"no checkpoint under {self.workdir}: run --stage=sft first")
        for variant in self.variants:
            if self.settings.evaluate_budgets[variant] and not any(self.dataset.conditions(variant)):
                raise UserError(
                    f"evaluate.budgets.{variant} is for a model whose demonstrations had conditions, these had none: "
                    f"set them in {self.task.name}, the task's settings, with another --workdir"
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
            known = read_note(folder / f"{name}.stamp.json")
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
            variant = meta["variant"]
            usual = most_frequent(self.dataset.conditions(variant))
            asked = {b: self.task.condition(variant, b) for b in self.settings.evaluate_budgets[variant]}
            samplings = {None: self.settings.evaluate_sampling, **self.settings.evaluate_also}
            for (budget, condition), (temperature, sampling) in itertools.product(
                (asked or {None: usual}).items(), samplings.items()
            ):
                records = records_name(name, temperature, budget)
                runner = TreeRunner(
                    engine, self.task.protocol(variant), self.tokenizer, self.settings.budget_of(variant), sampling
                )
                evaluate(
                    runner, problems, folder / f"{records}.jsonl", task=self.task, variant=variant,
                    condition=condition, weights=stamp["weights"],
                    progress_title=f"evaluate {title}{records.removeprefix(name)}",
                    at_once=max(256, self.settings.evaluate_slots),
                )  # fmt: skip

    def export(self) -> None:
        saved, variant = self.saved(), self.task.variants[0]
        if variant not in self.variants:
            return  # another process may be at work on it, in the same folder
        name = next((name for name in (f"grpo_{variant}", f"sft_{variant}") if name in saved), None)
        if name is None:
            raise FileNotFoundError(f"no {variant} checkpoint under {self.workdir}: run --stage=sft first")
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
        if read_note(folder / "check.json").items() >= described.items():
            return  # the check is the last thing written
        export_hf(model, self.tokenizer, folder, meta, self.settings.export_dtype)
        held_out, demonstrations = self.dataset.held_out(), self.dataset.segments(variant, "validation")
        texts = [demonstrations[i].tokens[:64] for i in range(min(8, len(demonstrations)))]
        if find_spec("torch") is None:
            print(f"export {folder}: not compared with transformers, torch is not installed (the extra `check`)")
            write_text(folder / "check.json", json.dumps(described, indent=1))
            return
        check = {
            **described,
            **check_export(model, self.tokenizer, folder, texts),
        }
        if self.settings.export_check_trees:
            problems = held_out[: self.settings.export_check_trees]
            equal, total = check_trees(
                model, self.tokenizer, folder, self.task.protocol(variant), problems, self.settings.budget_of(variant),
                progress_title="export check", condition=most_frequent(self.dataset.conditions(variant)),
            )  # fmt: skip
            check |= {"trees_equal": equal, "trees": total}
        write_text(folder / "check.json", json.dumps(check, indent=1))
        print(f"export {folder}: {json.dumps(check)}")

    def report(self) -> None:
        settings = self.settings
        print(
            write_report(self.dataset, self.workdir, settings.evaluate_also, self._weights, settings.evaluate_budgets)
        )

    # ------------------------------------------------------------------ what stages share

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.dataset.tokenizer(self.settings.tokenizer)

    @property
    def model_config(self) -> ModelConfig:
        return self.settings.family.Config(vocab_size=len(self.tokenizer), **self.settings.model)

    def _first_checkpoint(self, variant: str) -> str | Path:
        """Where SFT finds its first weights, "" for random ones. Once it has saved a step, that has the model's sizes
        too, and model.checkpoint may be gone."""
        own = self.workdir / f"sft_{variant}" / "checkpoints"
        return self.settings.checkpoint and (own if newest_step(own) else self.settings.checkpoint)

    def _first_model(self, variant: str) -> Model:
        """The model that SFT begins with. Raises UserError where a given one is not the run's, CheckpointError where
        it cannot be read."""
        first = self._first_checkpoint(variant)
        if not first:
            return make_model(self.model_config, self.settings.seed)
        model, _ = load_model(first)
        self._check_sizes(first, model.config)
        self._check_vocabulary(first, model.config)
        # What is no setting, such as the rotary base, stays as the weights were trained with.
        known = {"vocab_size", "context", *self.settings.config["model"]}
        kept = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config) if f.name not in known}
        model.config = dataclasses.replace(self.model_config, **kept)
        return model

    def _check_sizes(self, checkpoint: str | Path, given: ModelConfig) -> None:
        """Raises UserError, also where the run's threads are longer than the model's context."""
        run = self.settings.family.Config(vocab_size=given.vocab_size, **self.settings.model)
        for name, theirs, ours in (
            ("family", given.family, run.family),
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

    def _check_vocabulary(self, checkpoint: str | Path, given: ModelConfig) -> None:
        """Raises UserError where the weights' words are others than the run's, as far as it is known."""
        if given.vocab_size != len(self.tokenizer):
            raise UserError(
                f"model.checkpoint {checkpoint} has a vocabulary of {given.vocab_size}, the run's tokenizer has "
                f"{len(self.tokenizer)}: set tokenizer.name, or the settings of the task's tokenizer"
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
        """The folder of every trained model of these variants, by the name of its stage: sft_VARIANT, grpo_VARIANT. Of
        GRPO with validation what validated best."""
        names = (f"{kind}_{variant}" for kind in ("sft", "grpo") for variant in self.variants)
        return {name: step for name in names if (step := last_step(self.workdir / name))}

    def models(self) -> dict[str, tuple[Model, dict]]:
        """The models of `saved` with their meta."""
        return {name: self._load(name, step.parent) for name, step in self.saved().items()}

    def _load(self, name: str, folder: Path) -> tuple[Model, dict]:
        """`load_model`. Raises UserError where the checkpoint is of another task, stage or variant than its folder."""
        model, meta = load_model(folder)
        theirs = f"{meta.get('stage')}_{meta.get('variant')}"
        if (meta.get("task"), theirs) != (self.task.spec, name) or not isinstance(meta.get("step"), int):
            raise UserError(
                f"{folder} holds no checkpoint of {self.task.spec}'s {name}, but step {meta.get('step')} of "
                f"{meta.get('task')}'s {theirs}: move it back where it was made"
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

    def _meta(self, config: ModelConfig, variant: str, kind: str) -> dict:
        total, inner = parameter_count(abstract_model(config))
        return {
            "model": config_json(config), "task": self.task.spec, "task_settings": settings_json(self.task),
            "variant": variant, "stage": kind, "config": self.settings.config,
            "parameters": total, "parameters_without_embeddings": inner,
            # First on a root's prompt, where nothing else is said.
            "condition": most_frequent(self.dataset.conditions(variant)),
        }  # fmt: skip
