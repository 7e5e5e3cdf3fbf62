"""A task of a user in one file of at most 80 lines, which README shows, from data to latency; no other file changes."""

import re
import subprocess

import pytest

from apr_jax.evaluate.records import read_records
from apr_jax.export.exported import read_export
from apr_jax.tasks.task import load_task
from apr_jax.train.checkpoint import load_meta
from tests.experiments import whole_task
from tests.experiments.conftest import ROOT

FILE = ROOT / "tests" / "own_task.py"
CONFIG, SPEC = "--config=tests/own_task.py", "tests.own_task:Largest"
SMALL = (
    "--config.largest.most=19", "--config.data.train=1000", "--config.data.held_out=100", "--config.sft.row_length=384",
    "--config.sft.steps=90", "--config.grpo.steps=2", "--config.grpo.prompts=6", "--config.grpo.group=4",
    "--config.grpo.row_length=384", "--config.export.check_trees=2", "--config.evaluate.slots=32",
    "--config.grpo.slots=32",
)  # fmt: skip


def test_readme_shows_the_file_and_it_has_at_most_80_lines():
    text = FILE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert text in blocks and text.count("\n") <= 80


def test_nothing_else_knows_it():
    """The package, the experiments and the tools run a task that they have never heard of."""
    for path in (path for room in ("apr_jax", "experiments", "tools") for path in (ROOT / room).rglob("*.py")):
        assert "own_task" not in path.read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return whole_task.run_whole(tmp_path_factory.mktemp("runs") / "own", CONFIG, *SMALL)


def test_a_model_learns_it(run):
    for name in ("sft_halves", "grpo_halves"):
        found = whole_task.accuracy(run, name)
        assert found.n == 100 and found.right >= 0.75 and found.interval[0] > 0.6
        records = read_records(run / "evaluate" / f"{name}.jsonl")
        assert {(record.task, record.variant, record.children) for record in records} >= {(SPEC, "halves", 2)}
        assert sum(record.steps_right for record in records) > 0.9 * sum(record.steps for record in records) > 0
        meta = load_meta(run / name / "checkpoints")[1]
        assert (meta["task"], meta["task_settings"]) == (SPEC, {"most": 19})
    report = (run / "report.md").read_text()
    assert "| halves SFT |" in report and "| halves SFT+GRPO |" in report
    assert len(whole_task.metrics(run, "grpo_halves")) == 2


def test_its_export_and_a_drawing_know_it(run, capsys):
    whole_task.check_export(run)
    export = read_export(run / "export")
    assert (export.task.spec, export.variant, export.window) == (SPEC, "halves", 96)
    record = read_records(run / "evaluate" / "grpo_halves.jsonl")[3]
    printed, page = whole_task.drawing(run, "grpo_halves", capsys, index=3)
    assert f"numbers {tuple(record.problem['numbers'])}" in printed and "<html" in page


def test_its_latency_is_measured(run, tmp_path):
    """The fake server writes nonsense, the engine in process what was learned."""
    flags = ("--count=6", "--engine=sglang,jax", f"--launcher={whole_task.FAKE}")
    found = whole_task.latency_samples(run, tmp_path, *flags)
    assert len(found["sglang"]) == 6
    evaluated = read_records(run / "evaluate" / "grpo_halves.jsonl")[:6]
    assert [sample.correct for sample in found["jax"]] == [record.correct for record in evaluated]
    assert [sample.problem for sample in found["jax"]] == [record.problem for record in evaluated]


def test_wrong_problems_and_variants_are_named():
    task = load_task(SPEC)
    for row in ({}, {"numbers": 3}, {"numbers": [1, "2"]}, {"numbers": [1] * 7}):
        with pytest.raises(ValueError, match="a list of 8 integers"):
            task.read_problem(row)
    with pytest.raises(ValueError, match="variants of tests.own_task:Largest are halves, was given 'apr'"):
        task.protocol("apr")


@pytest.mark.slow
def test_the_documented_experiment_with_a_real_server(tmp_path):
    """README, "A task of your own": the file's own settings, and trees on SGLang that are those of the evaluation."""
    folder = whole_task.run_whole(tmp_path / "run", CONFIG, "--config.export.check_trees=5")
    evaluated = read_records(folder / "evaluate" / "grpo_halves.jsonl")[:20]
    assert whole_task.accuracy(folder, "grpo_halves").right > 0.9
    if subprocess.run([ROOT / "tools" / "serve_sglang.sh", "where"], capture_output=True).returncode:
        pytest.skip("no SGLang here: tools/serve_sglang.sh install")
    found = whole_task.latency_samples(folder, tmp_path / "latency", "--count=20")
    assert [sample.correct for sample in found["sglang"]] == [record.correct for record in evaluated]
