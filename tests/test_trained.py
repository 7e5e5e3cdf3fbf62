"""`apr_jax.load`: a checkpoint and its export solve the same problems in the same threads, for any task."""

import asyncio
import subprocess
import sys

import pytest

import apr_jax
from apr_jax.errors import UserError
from apr_jax.export.hf import export_hf
from apr_jax.model.family import config_json
from apr_jax.rollout.engine import JaxEngine
from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.countdown.problem import ProblemRange
from apr_jax.tasks.countdown.task import Countdown, CountdownSettings
from apr_jax.tasks.task import load_task, settings_json
from apr_jax.threads import decode_tree
from apr_jax.threads.engine import Sampling
from apr_jax.threads.metrics import children
from apr_jax.threads.run import Budget, TreeRunner
from apr_jax.train.checkpoint import save_model
from apr_jax.train.step import data_mesh
from apr_jax.trained import describe
from tests.evaluate.nonsense import SPEC, Question
from tests.threads.recorder import Recorder, check_recorded
from tests.tiny import SIZES, TOKENIZER, make_model, spawning_model, without_logprobs

COUNTDOWN = Countdown(CountdownSettings(ProblemRange(max_number=10, max_target=30), largest_token=30))
METAS = {
    "countdown": {"task": "countdown", "task_settings": settings_json(COUNTDOWN), "variant": "apr"},
    "nonsense": {"task": SPEC, "task_settings": {"width": 3}, "variant": "threads", "condition": "Sub Call Budget: 4 "},
}
PROBLEMS = {
    "countdown": (Problem((3, 5, 7, 8), 24), {"numbers": [3, 5, 7, 8], "target": 24}),
    "nonsense": (Question(7), {"number": 7}),
}
WINDOW = 96


def save(folder, model, meta, tokenizer=TOKENIZER):
    """Save a model as the stage grpo_apr of a run, and return the stage's folder."""
    (folder / "data").mkdir(parents=True)
    tokenizer.save(folder / "data" / "tokenizer.json")
    meta = {"step": 7, "model": config_json(model.config), "config": {"window": WINDOW}, **meta}
    save_model(folder / "grpo_apr" / "checkpoints", model, meta)
    return folder / "grpo_apr"


@pytest.fixture(scope="module", params=METAS)
def stage(request, tmp_path_factory):
    """(folder of a stage, folder of its export, name of the task) of a model with random weights."""
    folder, meta = tmp_path_factory.mktemp(request.param), METAS[request.param]
    model = spawning_model(1)
    export_hf(model, TOKENIZER, folder / "exported", meta | {"window": WINDOW})
    return save(folder, model, meta), folder / "exported", request.param


def by_hand(name, temperature, seed):
    """Return the tree of a task's problem from a runner, an engine and settings that are made here."""
    meta = METAS[name]
    task = load_task(meta["task"], meta["task_settings"])
    engine = JaxEngine(spawning_model(1), data_mesh(1), slots=8, context=WINDOW)
    runner = TreeRunner(engine, task.protocol(meta["variant"]), TOKENIZER, Budget(WINDOW), Sampling(temperature))
    return asyncio.run(runner.run(PROBLEMS[name][0], (seed,), meta.get("condition", "")))


def test_a_checkpoint_and_its_export_solve_in_the_threads_of_a_runner(stage):
    folder, export, name = stage
    problem, row = PROBLEMS[name]
    model, exported = apr_jax.load(folder), apr_jax.load(export)
    assert (model.task.spec, model.variant) == (METAS[name]["task"], METAS[name]["variant"])
    recorder = Recorder()
    for temperature, seed in ((0.0, 0), (1.0, 2)):
        tree = model.solve(problem, temperature=temperature, seed=seed)
        right = by_hand(name, temperature, seed)
        for same in (tree, exported.solve(row, temperature=temperature, seed=seed)):
            assert without_logprobs(same) == without_logprobs(right) and same.outcome == right.outcome
    watched = model.solve(row, temperature=1.0, seed=2, observer=recorder)
    assert without_logprobs(watched) == without_logprobs(tree)
    check_recorded(recorder, {(2,): watched})
    assert without_logprobs(model.solve(problem, temperature=1.0, seed=3)) != without_logprobs(tree)
    assert model.text(tree) == decode_tree(tree, TOKENIZER.decode)
    if name == "nonsense":
        assert children(tree) >= 3 and model.text(tree).root.text.startswith("Sub Call Budget: 4 ")


def test_any_folder_of_a_checkpoint_is_taken(stage):
    folder, _, name = stage
    for place in (folder, folder / "checkpoints", str(folder / "checkpoints" / "7")):
        found = describe(place)
        assert (found.task.spec, found.window, found.context) == (METAS[name]["task"], WINDOW, SIZES["context"])
        assert settings_json(found.task).items() >= METAS[name]["task_settings"].items()


def test_it_solves_inside_a_running_event_loop_as_in_a_notebook(stage):
    folder, _, name = stage
    model = apr_jax.load(folder)

    async def cell():
        return model.solve(PROBLEMS[name][0])

    assert asyncio.run(cell()) == model.solve(PROBLEMS[name][0])


def test_a_folder_variant_or_problem_that_does_not_fit_is_refused_in_one_line(tmp_path, stage):
    folder, export, name = stage
    other = {"apr": "sos_plus", "threads": "serial"}[METAS[name]["variant"]]
    save(tmp_path / "none", make_model(1), {})
    refused = [
        (lambda: describe(tmp_path / "nowhere"), "nowhere"),
        (lambda: describe(tmp_path), str(tmp_path)),
        (lambda: describe(tmp_path / "none" / "grpo_apr"), "no task"),
        (lambda: apr_jax.load(folder, variant=other), f"{METAS[name]['variant']}.*{other}"),
        (lambda: apr_jax.load(export, variant=other), f"{METAS[name]['variant']}.*{other}"),
        (lambda: apr_jax.load(folder, variant="wide"), "wide"),
        (lambda: apr_jax.load(folder).solve({"letters": "abc"}), "letters"),
    ]
    for call, says in refused:
        with pytest.raises((UserError, FileNotFoundError), match=says) as error:
            call()
        assert "\n" not in str(error.value)
    (tmp_path / "alone").mkdir()
    (folder / "checkpoints").rename(tmp_path / "alone" / "checkpoints")  # away from its tokenizer
    try:
        with pytest.raises(FileNotFoundError, match="tokenizer"):
            describe(tmp_path / "alone" / "checkpoints")
        given = str(folder.parent / "data" / "tokenizer.json")
        assert describe(tmp_path / "alone", tokenizer=given).folder == tmp_path / "alone" / "checkpoints"
    finally:
        (tmp_path / "alone" / "checkpoints").rename(folder / "checkpoints")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    meta = METAS["countdown"]
    folder = save(tmp_path, make_model(1), meta, COUNTDOWN.tokenizer())
    describe(folder)
    Countdown().tokenizer().save(tmp_path / "data" / "tokenizer.json")
    with pytest.raises(UserError, match=rf"{len(Countdown().tokenizer())} tokens.*{len(TOKENIZER)}"):
        describe(folder)


def test_importing_the_package_imports_neither_jax_nor_a_part_of_it():
    code = "import sys, apr_jax; print(*(name for name in sys.modules if 'jax' in name)); apr_jax.load; import jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["apr_jax"]), done.stderr
    with pytest.raises(AttributeError, match="nothing"):
        apr_jax.nothing
