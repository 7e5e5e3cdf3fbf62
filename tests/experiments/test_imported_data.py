"""Runs on data sets that were imported, whole or with something missing."""

import json
import shutil

import pytest

from apr_jax.data.store import TreeStore
from tests.experiments.conftest import SMOKE
from tools import data


def problems_of(run, split):
    return [json.loads(line) for line in (run / "data" / f"{split}.jsonl").read_text().splitlines()]


def write_problems(run, split, rows):
    (run / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def exported(whole_run, tmp_path_factory):
    """The run's trees and held-out problems as the authors' files: their folder."""
    folder = tmp_path_factory.mktemp("exported")
    for style in ("apr", "sos_plus"):
        store = str(whole_run.folder / "data" / f"{style}_train")
        assert data.main(["data", "export", store, f"--out={folder}/{style}.json"]) == 0
    rows = problems_of(whole_run.folder, "held_out")
    problems = [{"nums": row["numbers"], "target": row["target"]} for row in rows]
    (folder / "held_out.json").write_text(json.dumps(problems))
    return folder


@pytest.fixture
def import_data(exported, tmp_path):
    """Imports traces of some styles as the data of a run folder, which it returns."""

    def make(*styles, window=256):
        files = [f"{exported}/{style}.json" for style in styles]
        line = [*files, f"--held_out={exported}/held_out.json", f"--out={tmp_path}/run/data", f"--window={window}"]
        assert data.main(["data", "import", "--task=countdown", *line]) == 0
        return tmp_path / "run"

    return make


def test_apr_traces_alone_are_a_data_set(whole_run, import_data, main, refused):
    """A run of both styles is told before it trains; one of APR goes on to the report."""
    run = import_data("apr")
    line = refused(SMOKE, f"--workdir={run}", "--stage=data,sft")
    assert "has no sos_plus demonstrations: give --variants=apr" in line and not list(run.glob("sft_*"))
    shutil.copytree(
        whole_run.folder / "evaluate", run / "evaluate", ignore=shutil.ignore_patterns("*sos_plus*", "grpo*")
    )
    done = main(SMOKE, f"--workdir={run}", "--variants=apr", "--stage=data,report")
    assert done.code == 0, done.err
    text = (run / "report.md").read_text()
    assert "| APR SFT |" in text and "The APR demonstrations of " in text and "The SoS+" not in text


def test_threads_longer_than_a_row_are_counted_and_told(import_data, whole_run, main, refused):
    """A data set of a wider window than the run's: in what SFT prints and logs, and in the report."""
    run = import_data("apr")
    short = [f"--config.{name}=96" for name in ("window", "sft.row_length", "grpo.row_length")]
    command = (SMOKE, f"--workdir={run}", "--variants=apr", *short, "--config.sft.steps=1", "--config.sft.children=0")
    lengths = TreeStore(run / "data" / "apr_train").thread_tokens
    left_out = int((lengths > 96).sum())
    assert 0 < left_out < len(lengths)
    done = main(*command, "--stage=data,sft")
    assert done.code == 0, done.err
    assert f"sft sft_apr: {left_out} of {len(lengths)} threads are longer than a row of 96 tokens" in done.err
    assert "sft_apr validation: " in done.err
    first, *_ = (run / "sft_apr" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["threads_too_long"] == left_out
    shutil.copytree(
        whole_run.folder / "evaluate", run / "evaluate", ignore=shutil.ignore_patterns("*sos_plus*", "grpo*")
    )
    shutil.rmtree(run / "sft_apr" / "checkpoints")  # or the report would find that these records are of other weights
    assert main(*command, "--stage=report").code == 0
    assert f"SFT left out {left_out} APR threads" in (run / "report.md").read_text()


def change_manifest(run, **changes):
    path = run / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_data_without_held_out_problems_end_a_run_at_its_start(import_data, refused):
    """As an import made them before it asked for some."""
    run = import_data("apr", "sos_plus")
    write_problems(run, "held_out", [])
    change_manifest(run, held_out_problems=0)
    assert "no held-out problems to evaluate on: import it again" in refused(SMOKE, f"--workdir={run}", "--stage=data")
    write_problems(run, "held_out", problems_of(run, "train")[:1])
    line = refused(SMOKE, f"--workdir={run}", "--stage=evaluate")
    assert "holds 1 problems, its data set 0: import the data set again" in line and "delete" not in line


def test_data_with_held_out_problems_in_training_end_a_run_at_its_start(import_data, refused):
    """As an import made them before: GRPO drew from all problems."""
    run = import_data("apr", "sos_plus")
    train, held_out = (problems_of(run, split) for split in ("train", "held_out"))
    turned = [row | {"numbers": row["numbers"][::-1]} for row in held_out[:3]]
    write_problems(run, "train", train + turned)
    change_manifest(run, train_problems=len(train) + 3)
    assert "3 held-out problems of" in refused(SMOKE, f"--workdir={run}", "--stage=data")


def test_data_in_the_tokens_of_another_tokenizer_end_a_run_at_its_start(import_data, refused):
    run = import_data("apr", "sos_plus")
    own = f"--config.tokenizer.name={run}/data/tokenizer.json"
    line = refused(SMOKE, f"--workdir={run}", "--stage=data", own)
    assert "was imported in the tokens of our own tokenizer: set tokenizer.name to ''" in line


def test_a_file_of_made_data_that_is_broken_is_mended_as_the_error_says(whole_run, tmp_path, main, refused):
    run = tmp_path / "run"
    shutil.copytree(whole_run.folder / "data", run / "data")
    whole = (run / "data" / "held_out.jsonl").read_bytes()
    (run / "data" / "held_out.jsonl").write_bytes(whole[:-90])
    line = refused(SMOKE, f"--workdir={run}", "--stage=evaluate")
    assert f"delete it and {run}/data/manifest.json, and run --stage=data again" in line
    for name in ("held_out.jsonl", "manifest.json"):
        (run / "data" / name).unlink()
    assert main(SMOKE, f"--workdir={run}", "--stage=data").code == 0
    assert (run / "data" / "held_out.jsonl").read_bytes() == whole


def test_validation_that_leaves_grpo_nothing_ends_a_run_at_its_start(import_data, refused):
    run = import_data("apr", "sos_plus")
    change = ("--config.grpo.validate_every=1", "--config.grpo.validation=150")
    assert "GRPO has no problem left to sample" in refused(SMOKE, f"--workdir={run}", "--stage=data", *change)
