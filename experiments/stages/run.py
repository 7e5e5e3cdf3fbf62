"""One run: its settings, its folder, and values that several stages need."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from apr_jax.data.dataset import make_dataset, read_manifest
from apr_jax.data.folder import DataFolder
from apr_jax.errors import UserError
from apr_jax.model.family import Model, ModelConfig, abstract_model, config_json, parameter_count
from apr_jax.settings import shaping
from apr_jax.tasks.task import settings_json
from apr_jax.text.hub import load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads.run import Budget
from apr_jax.train.grpo import most_frequent
from apr_jax.train.step import data_mesh
from experiments.settings import STAGES, Settings
from experiments.stages import first_weights
from experiments.workspace import Output, Workspace, agree, describe, fingerprint_of

DATA_EDITION = 1


class Run:
    """A run that works on the models of some variants, or of all variants if `variants` is empty.

    Two processes may work on one folder, each on its own variants. Raises UserError for settings that this machine or
    the folder does not allow, before anything is written.
    """

    def __init__(
        self, settings: Settings, workdir: Path, variants: Sequence[str] = (), stages: Sequence[str] = STAGES,
        store: Path | None = None,
    ):  # fmt: skip
        self.settings, self.workdir, self.task = settings, workdir, settings.task
        self.variants = tuple(variants) or self.task.variants
        self.fingerprints: dict[Path, str] = {}  # of weights, by the folder of the saved step
        on_devices = not {*stages} <= {"data", "report"}
        if on_devices and settings.model["attention"] == "cudnn" and jax.default_backend() != "gpu":
            raise UserError(f"model.attention cudnn needs an NVIDIA GPU, JAX runs on {jax.default_backend()}")
        self._tokenizer_digest = _digest(settings.tokenizer) if settings.tokenizer else None
        self.mesh = data_mesh(settings.devices, settings.fsdp) if on_devices else None
        self.workspace = Workspace(workdir, store or workdir / "store", writes=jax.process_index() == 0)
        self.first_weights = first_weights.find(settings, self.workspace.store)
        if jax.process_count() > 1:
            self.attempt = agree(settings, self.variants)  # a random number that the processes of this start share
        if self.workspace.writes:
            self.workspace.claim(settings)
            if self.first_weights:
                first_weights.remember(self.first_weights, self.workspace.store)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self.workspace.close()

    # ------------------------------------------------------------------ data

    @cached_property
    def data(self) -> Output:
        """The `Output` (path and fingerprint) of the data set.

        A real folder `data` in the run folder is used as it is: it was imported, or made with the config in its
        config.json.
        """
        settings = {name: value for name, value in self.settings.data.described().items() if name != "format"}
        settings["task_edition"] = self.task.edition
        inputs = {"tokenizer": self._tokenizer_digest} if self._tokenizer_digest else {}
        own = self.workdir / "data"
        if own.is_dir() and not self.workspace.is_link(own):
            if read_manifest(own) is not None:
                make_dataset(self.settings.data, own)  # raises UserError for a data set with another config
            return Output("data", "data", describe("data", DATA_EDITION, settings, inputs), own, own)
        return self.workspace.output("data", "data", DATA_EDITION, settings, inputs)

    @cached_property
    def data_fingerprint(self) -> str:
        """The fingerprint of the data set: of its config, or of the manifest, with its hash, if it was imported."""
        manifest = read_manifest(self.data.path) if self.data.own else None
        return fingerprint_of(manifest) if manifest and manifest["config"].get("imported") else self.data.fingerprint

    @cached_property
    def dataset(self) -> DataFolder:
        """The data set, open for reading."""
        return DataFolder(self.data.path, self.task)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data set."""
        return self.dataset.tokenizer(self.settings.tokenizer)

    @property
    def evaluation_window(self) -> int:
        """The tokens of one thread's context in evaluation."""
        return self.settings.evaluate.window or self.settings.window

    def evaluation_budget(self, variant: str) -> Budget:
        """Return the budget of a variant's trees in evaluation."""
        return dataclasses.replace(self.settings.budget_of(variant), context=self.evaluation_window)

    def condition(self, variant: str) -> str:
        """Return the text that root prompts of a variant begin with by default.

        It is the most frequent condition of the variant's demonstrations, or "" if they had none.
        """
        return most_frequent(self.dataset.conditions(variant))

    # ------------------------------------------------------------------ models

    @property
    def model_config(self) -> ModelConfig:
        """The config of the run's models."""
        return self.settings.family.Config(vocab_size=len(self.tokenizer), **self.settings.model)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The settings that shape a model's weights, by full name.

        The context length is left out: positions are rotary, so no weight depends on it.
        """
        shape = shaping(self.settings.family.Config(vocab_size=8, **self.settings.model))
        left_out = ("vocab_size", "context")
        family = self.settings.family
        return {"model.family": family.name, "model.family_edition": family.edition} | {
            f"model.{name}": value for name, value in shape.items() if name not in left_out
        }

    @property
    def task_settings(self) -> dict[str, Any]:
        """The task's name and settings. Those of an imported data set are not the run's."""
        return {"task": self.task.spec, self.task.name: settings_json(self.task)}

    def section(self, name: str, config: Any, *left_out: str) -> dict[str, Any]:
        """Return the settings of a section that shape results, but for those in `left_out`, as {section: settings}."""
        return {name: {key: value for key, value in shaping(config).items() if key not in left_out}}

    def with_context(self, model: Model) -> Model:
        """Return the model with this run's context length. Another run with the same weights may have another one."""
        model.config = dataclasses.replace(model.config, context=self.settings.model["context"])
        return model

    def meta(self, config: ModelConfig, variant: str, stage: str) -> dict[str, Any]:
        """Return the metadata that is saved beside the weights of a model."""
        total, inner = parameter_count(abstract_model(config))
        return {
            "model": config_json(config), "task": self.task.spec, "task_settings": settings_json(self.task),
            "variant": variant, "stage": stage, "config": self.settings.config,
            "parameters": total, "parameters_without_embeddings": inner, "condition": self.condition(variant),
        }  # fmt: skip


def _digest(name: str) -> str:
    """Return the fingerprint of a tokenizer's content. `name` is a Hugging Face tokenizer's folder or name."""
    tokenizer = load_tokenizer(name)
    backend = getattr(tokenizer.backend, "backend_tokenizer", tokenizer.backend)
    content = backend.to_str() if hasattr(backend, "to_str") else backend.get_vocab()
    return fingerprint_of([content, sorted(tokenizer.ends)])
