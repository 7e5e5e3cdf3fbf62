"""A trained model with its task, from a checkpoint or an export: `apr_jax.load` returns it, ready to solve problems."""

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.export.exported import read_export
from apr_jax.export.hf import trained_on
from apr_jax.export.imported import import_hf
from apr_jax.model.family import Model
from apr_jax.rollout.engine import JaxEngine
from apr_jax.rollout.shapes import FEW_SHAPES
from apr_jax.tasks.task import Task, load_task
from apr_jax.text.hub import HubTokenizer, find_tokenizer, load_tokenizer
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import ThreadTree, decode_tree
from apr_jax.threads.engine import Engine, Sampling
from apr_jax.threads.observer import Observer
from apr_jax.threads.run import Budget, TreeRunner
from apr_jax.train.checkpoint import last_step, load_meta, load_model
from apr_jax.train.step import data_mesh

SLOTS = 8  # of the engine: a root or its children; further children wait
STEPS = 32  # tokens of a thread in one call of the engine: an observer sees them that often


@dataclasses.dataclass(frozen=True)
class Description:
    """What a folder says about its model, without the weights. Lengths are in tokens."""

    folder: Path  # an export, a saved step, or a folder of saved steps
    family: str | None  # of an export, as `load_family` takes it; None: the folder holds a checkpoint
    task: Task
    variant: str
    condition: str  # text at the start of the root's prompt, the one that most demonstrations had
    window: int  # longest thread in training
    context: int  # longest sequence that the model takes
    vocab_size: int
    tokenizer: Tokenizer | HubTokenizer

    def runner(self, engine: Engine, sampling: Sampling, observer: Observer | None = None) -> TreeRunner:
        """Return a runner of the model's threads in `engine`, in the window and to the depth of its training."""
        budget = Budget(self.window, depth=max(1, self.task.levels(self.variant)))
        return TreeRunner(engine, self.task.protocol(self.variant), self.tokenizer, budget, sampling, observer)


def describe(folder: Path | str, variant: str | None = None, tokenizer: str | None = None) -> Description:
    """Describe the model of a folder: a folder that `tools.export_hf` wrote, a saved step (``.../checkpoints/1000``),
    a folder of steps (``.../checkpoints``), or the folder of a training stage.

    `variant` is the variant that is wanted; None: the one that the model was trained on. `tokenizer` is a
    tokenizer.json; None: the nearest one in the folder or above it. Raises UserError or FileNotFoundError for a folder
    without a model, and UserError for a model of no task, of another variant, or with fewer tokens than the tokenizer.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no model at {folder}")
    found = _describe_export(folder) if any(folder.glob("*.safetensors")) else _describe_checkpoint(folder, tokenizer)
    if variant is not None and found.task.check_variant(variant) != found.variant:
        raise UserError(f"the model in {folder} was trained on the variant {found.variant}, was asked for {variant}")
    return found


def _describe_export(folder: Path) -> Description:
    export = read_export(folder)
    return Description(
        folder, export.family, export.task, export.variant, export.condition, export.window, export.context,
        export.vocab_size, export.tokenizer,
    )  # fmt: skip


def _describe_checkpoint(folder: Path, tokenizer: str | None) -> Description:
    if (step := last_step(folder)) is not None:  # the folder of a stage
        folder = step.parent
    config, meta = load_meta(folder)
    if "task" not in meta:
        raise UserError(f"the model in {folder} was trained on no task")
    known, path = trained_on(meta, config), find_tokenizer(folder, tokenizer)
    encoder = load_tokenizer(str(path))
    if len(encoder) > config.vocab_size:
        raise UserError(
            f"{path} has {len(encoder)} tokens, the model in {folder} {config.vocab_size}: name another one"
        )
    return Description(
        folder, None, load_task(known["task"], known["task_settings"]), known["variant"], known["condition"],
        min(known["window"], config.context), config.context, config.vocab_size, encoder,
    )  # fmt: skip


class TrainedModel:
    """A model with its weights, and an engine that decodes its threads on one device.

    The engine has `slots` slots. It compiles its functions when they are first needed, which takes seconds; JAX's own
    compilation cache (``jax_compilation_cache_dir``) keeps them for later processes where it is set.
    """

    def __init__(self, description: Description, model: Model, slots: int = SLOTS):
        self.description, self.model = description, model
        self.task, self.variant, self.tokenizer = description.task, description.variant, description.tokenizer
        mesh = data_mesh(1)
        shapes = FEW_SHAPES if mesh.devices.flat[0].platform == "cpu" else None
        self.engine = JaxEngine(model, mesh, slots=slots, context=description.window, steps=STEPS, shapes=shapes)

    def solve(
        self, problem: Any, *, temperature: float = 0.0, seed: int = 0, observer: Observer | None = None
    ) -> ThreadTree:
        """Run the threads of one problem and return their tree of token ids, with its outcome.

        `problem` is a problem of the task or its JSON form, a dictionary. Above temperature 0 another `seed` gives
        another tree. Raises UserError for a dictionary that is no problem of the task.
        """
        if isinstance(problem, Mapping):
            problem = self.task.read_problem(problem)
        runner = self.description.runner(self.engine, Sampling(temperature), observer)
        return _wait_for(runner.run(problem, (seed,), self.description.condition))

    def text(self, tree: ThreadTree) -> ThreadTree:
        """Return a tree with text in place of token ids."""
        return decode_tree(tree, self.tokenizer.decode)


def load(
    folder: Path | str, variant: str | None = None, tokenizer: str | None = None, slots: int = SLOTS
) -> TrainedModel:
    """Load the model of a checkpoint or an export. The arguments and errors are those of `describe`; `slots` is the
    number of threads that decode at the same time. Raises CheckpointError or HfFolderError for weights that cannot be
    read."""
    found = describe(folder, variant, tokenizer)
    return TrainedModel(found, load_weights(found), slots)


def load_weights(description: Description) -> Model:
    """Load the model that a folder describes."""
    if description.family is not None:
        return import_hf(description.folder, description.family)
    return load_model(description.folder)[0]


def _wait_for(work: Coroutine[Any, Any, ThreadTree]) -> ThreadTree:
    """Run a coroutine to its end, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
