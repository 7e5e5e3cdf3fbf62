"""The evaluation stage: one record for each held-out problem, of every trained model."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from apr_jax.errors import UserError
from apr_jax.evaluate.run import evaluate
from apr_jax.rollout.engine import JaxEngine
from apr_jax.settings import shaping
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import TreeRunner
from experiments.stages import models, trained
from experiments.stages.run import Run
from experiments.workspace import Output

EDITION = 1


@dataclass(frozen=True)
class Question:
    """One way to evaluate the models of a variant: a condition (text at the start of prompts) and a sampling."""

    variant: str
    budget: int | None  # in the condition; None: the demonstrations' most frequent condition
    condition: str  # text at the start of root prompts
    temperature: float | None  # None: the setting `temperature`
    sampling: Sampling

    def records(self, model: str) -> str:
        """Return the name of a model's records for this evaluation."""
        return records_name(model, self.temperature, self.budget)


def records_name(model: str, temperature: float | None = None, budget: int | None = None) -> str:
    """Return the name of a model's records, which is the name of their file without the suffix.

    It is "sft_apr" for the main records, and "sft_apr+4@0.5" for prompts that ask for a budget of 4, at the extra
    temperature 0.5.
    """
    name = model if budget is None else f"{model}+{budget}"
    return name if temperature is None else f"{name}@{temperature:g}"


def questions(run: Run, variant: str) -> Iterator[Question]:
    """Yield each way in which the settings evaluate the models of a variant."""
    settings = run.settings.evaluate
    asked = {budget: run.task.condition(variant, budget) for budget in settings.budgets[variant]}
    samplings = {None: settings.sampling(), **{t: settings.sampling(t) for t in settings.extra_temperatures}}
    for (budget, condition), (temperature, sampling) in itertools.product(
        (asked or {None: run.condition(variant)}).items(), samplings.items()
    ):
        yield Question(variant, budget, condition, temperature, sampling)


def output(run: Run, name: str, weights: str, question: Question) -> Output:
    """Return the `Output` (path and fingerprint) of a model's records. `weights` is the fingerprint of its weights,
    which change during training."""
    settings: dict[str, Any] = {
        "model": name, "window": run.evaluation_window, "seed": run.settings.seed, "condition": question.condition,
        "sampling": vars(question.sampling), "budget": shaping(run.evaluation_budget(question.variant)),
    }  # fmt: skip
    trained_model = trained.outputs(run, [question.variant])[name].fingerprint
    inputs = {"data": run.data_fingerprint, "model": trained_model, "weights": weights}
    return run.workspace.output(
        f"evaluate/{question.records(name)}.jsonl", "evaluate", EDITION, settings, inputs, file=f"{name}.jsonl"
    )


def possible(run: Run, note: Mapping[str, Any]) -> Iterator[Output]:
    """Yield the outputs that this run's evaluation has for the weights of a note."""
    weights = note.get("inputs", {}).get("weights", "")
    for variant in run.task.variants:
        for name in trained.outputs(run, [variant]):
            for question in questions(run, variant):
                yield output(run, name, weights, question)


def run(run: Run) -> None:
    """Evaluate every trained model of the run's variants.

    Raises FileNotFoundError if no model is trained, and UserError if `evaluate.budgets` asks for conditions that a
    variant's demonstrations did not have.
    """
    problems = run.dataset.held_out()
    saved = trained.saved(run)
    if not saved:
        raise FileNotFoundError(f"no checkpoint under {run.workdir}: run --stage=sft first")
    for variant in run.variants:
        if run.settings.evaluate.budgets[variant] and not any(run.dataset.conditions(variant)):
            raise UserError(
                f"evaluate.budgets.{variant} is for a model whose demonstrations had conditions, these had none: "
                f"set them in {run.task.name}, the task's settings"
            )
    loaded = {name: models.load(run, name, step.parent) for name, step in saved.items()}
    for name, (model, meta) in loaded.items():
        step, variant = saved[name], meta["variant"]
        reached, steps = models.reached(run, name, step.parent.parent)
        if step.parent.name == "checkpoints":
            reached = meta["step"]  # an earlier step was loaded if the newest one is broken
        position = {"step": meta["step"], "steps": steps, "finished": reached >= steps}
        title = name if position["finished"] else f"{name} (step {meta['step']} of {steps})"
        weights = models.weights(run, step, model)
        engine = JaxEngine(
            model, run.mesh, slots=run.settings.evaluate.slots, context=run.evaluation_window, seed=run.settings.seed
        )
        for question in questions(run, variant):
            runner = TreeRunner(
                engine, run.task.protocol(variant), run.tokenizer, run.evaluation_budget(variant), question.sampling
            )
            with run.workspace.making(output(run, name, weights, question), position) as path:
                evaluate(
                    runner, problems, path, task=run.task, variant=variant, condition=question.condition,
                    weights=weights, progress_title=f"evaluate {title}{question.records(name).removeprefix(name)}",
                    at_once=max(256, run.settings.evaluate.slots),
                )  # fmt: skip
