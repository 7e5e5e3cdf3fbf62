"""Tasks other than Countdown, and a task of a user's own, through all stages by the same command."""

import json

import numpy as np
import pytest

from apr_jax.evaluate.records import read_records
from apr_jax.export.exported import read_export
from apr_jax.threads.metrics import depth
from apr_jax.train.checkpoint import load_meta
from tests.experiments.conftest import ROOT, has
from tools import view

SMALL = (
    "--config.data.train=60", "--config.data.held_out=6", "--config.model.width=32", "--config.sft.steps=4",
    "--config.sft.batch_rows=4", "--config.grpo.steps=1", "--config.grpo.prompts=2", "--config.grpo.group=2",
    "--config.grpo.slots=8", "--config.evaluate.slots=8", "--config.export.check_trees=2",
)  # fmt: skip
FACTORS = "--config=experiments/configs/factors.py:grpo"


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    """The folder of a run of all stages on factor search, with both variants."""
    folder = tmp_path_factory.mktemp("factors") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.config.update", lambda *_: None)
        from experiments.run import main

        # After four steps a model never answers right. The penalty gives the tokens of children a gradient.
        changes = ("--config.grpo.penalties.token=0.001", "--config.budget.min_children=2")
        assert main(["run", FACTORS, f"--workdir={folder}", *SMALL, *changes]) == 0
    return folder


def test_every_stage_makes_the_outputs_that_it_makes_for_countdown(factors):
    names = ["sft_fresh", "sft_inherit", "grpo_fresh", "grpo_inherit"]
    assert {path.name for path in factors.iterdir()} == {
        "config.json", "versions.json", "data", "evaluate", "export", "figures", "report.md", "store", "summary.json",
        *names,
    }  # fmt: skip
    assert json.loads((factors / "config.json").read_text())["factors"] == {"largest": 60}
    for name in names:
        variant = name.partition("_")[2]
        meta = load_meta(factors / name / "checkpoints")[1]
        assert (meta["task"], meta["task_settings"], meta["variant"]) == ("factors", {"largest": 60}, variant)
        records = read_records(factors / "evaluate" / f"{name}.jsonl")
        assert len(records) == 6 and {(record.task, record.variant) for record in records} == {("factors", variant)}
        assert all(set(record.problem) == {"number", "first", "last"} for record in records)
    check = json.loads((factors / "export" / "check.json").read_text())
    assert check["model"] == "grpo_fresh" and check["trees_equal"] == check["trees"] == 2
    text = (factors / "report.md").read_text()
    assert "| inherit SFT+GRPO |" in text and "GRPO over fresh SFT on the same problems" in text
    assert "paper" not in text and "The fresh demonstrations of 60 training problems" in text


def test_demonstrations_are_nested_and_children_inherit_in_one_variant(factors):
    from apr_jax.data.store import TreeStore

    for variant in ("fresh", "inherit"):
        trees = list(TreeStore(factors / "data" / f"{variant}_train"))
        assert max(map(depth, trees)) == 2
        inherits = {thread.inherits for tree in trees for thread in tree.threads() if thread is not tree.root}
        assert inherits == {variant == "inherit"}


def test_an_export_and_a_drawing_have_the_task(factors, capsys):
    export = read_export(factors / "export")
    assert (export.task.spec, export.variant, export.window) == ("factors", "fresh", 128)
    assert export.task.settings.largest == 60
    assert "`factors`" in (factors / "export" / "README.md").read_text()
    capsys.readouterr()
    assert view.main(["view", str(factors / "evaluate" / "sft_inherit.jsonl"), "--index=2"]) == 0
    assert "sft_inherit, problem 2: a divisor of " in capsys.readouterr().out


def accuracies(folder):
    """Return the accuracy of each model on held-out problems, and its mean number of children, by the model's name."""
    paths = (folder / "evaluate").glob("*.jsonl")
    records = {path.stem: read_records(path) for path in paths}
    return {name: np.mean([(one.correct, one.children) for one in of], axis=0) for name, of in records.items()}


@pytest.mark.slow
def test_both_variants_learn_factor_search(tmp_path):
    from experiments.run import main

    assert main(["run", FACTORS.removesuffix(":grpo"), f"--workdir={tmp_path}", "--stage=data,sft,evaluate"]) == 0
    for right, children in accuracies(tmp_path).values():
        assert right >= 0.97 and children > 4  # measured: accuracy 1.0 for both


@pytest.mark.slow
def test_a_penalty_on_tokens_changes_the_number_of_children(tmp_path):
    from experiments.run import main

    found = {}
    for penalised in ("sequential", "total"):
        folder, config = tmp_path / penalised, f"--config=experiments/configs/sums.py:{penalised}"
        assert main(["run", config, f"--workdir={folder}", "--stage=data,sft,grpo,evaluate"]) == 0
        found[penalised] = accuracies(folder)
        assert found[penalised]["grpo_shared"][0] > 0.9
    before = found["total"]["sft_shared"][1]
    assert found["sequential"]["grpo_shared"][1] > before + 1 > before - 1 > found["total"]["grpo_shared"][1]


MINE = """
import dataclasses
from apr_jax.tasks.tagged.factors import Factors, FactorSettings

@dataclasses.dataclass(frozen=True)
class Settings(FactorSettings):
    largest: int = 30
    louder: bool = False  # a setting of its own

class Mine(Factors):
    name, variants, Settings = "mine", ("fresh",), Settings
"""


def test_a_user_s_own_task_runs_by_the_same_command(tmp_path, monkeypatch, main, refused):
    (tmp_path / "my_task.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    command = (FACTORS.replace("experiments/", f"{ROOT}/experiments/"), "--config.task=my_task:Mine", *SMALL)
    done = main(*command, "--workdir=run", "--config.mine.louder=true", "--stage=data,sft,grpo,evaluate,report")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["mine"] == {"largest": 30, "louder": True} and "factors" not in config
    assert {record.task for record in read_records(tmp_path / "run" / "evaluate" / "grpo_fresh.jsonl")} == {
        "my_task:Mine"
    }
    assert has(refused(*command, "--config.mine.loud=true"), "mine.loud", "mine.louder")
    assert has(refused(command[0], "--config.task=my_task:Yours"), "task", "'my_task:Yours'")
    assert has(refused(*command, "--variants=inherit"), "--variants", "fresh", "'inherit'")
