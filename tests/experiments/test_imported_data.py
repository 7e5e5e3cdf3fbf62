"""Runs on imported data sets, complete ones and ones that lack something."""

import json
import shutil

import pytest

from apr_jax.data.store import TreeStore
from tests.experiments.conftest import SMOKE, has
from tools import data


def problems_of(run, split):
    return [json.loads(line) for line in (run / "data" / f"{split}.jsonl").read_text().splitlines()]


def write_problems(run, split, rows):
    (run / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def exported(whole_run, tmp_path_factory):
    """A folder with the run's trees and held-out problems in the format of the paper's authors."""
    folder = tmp_path_factory.mktemp("exported")
    for variant in ("apr", "sos_plus"):
        store = str(whole_run.folder / "data" / f"{variant}_train")
        assert data.main(["data", "export", store, f"--out={folder}/{variant}.json"]) == 0
    rows = problems_of(whole_run.folder, "held_out")
    problems = [{"nums": row["numbers"], "target": row["target"]} for row in rows]
    (folder / "held_out.json").write_text(json.dumps(problems))
    return folder


@pytest.fixture
def import_data(exported, tmp_path):
    """Imports the traces of some variants as the data of a run folder. Returns the run folder."""

    def make(*variants, window=256):
        files = [f"{exported}/{variant}.json" for variant in variants]
        line = [*files, f"--held_out={exported}/held_out.json", f"--out={tmp_path}/run/data", f"--window={window}"]
        assert data.main(["data", "import", "--task=countdown", *line]) == 0
        return tmp_path / "run"

    return make


def test_a_data_set_may_have_one_variant(whole_run, import_data, main, refused):
    """A run of both variants is refused before it trains. A run of APR alone gets as far as the report."""
    run = import_data("apr")
    line = refused(SMOKE, f"--workdir={run}", "--stage=data,sft")
    assert has(line, "sos_plus", "--variants=apr") and not list(run.glob("sft_*"))
    shutil.copytree(
        whole_run.folder / "evaluate", run / "evaluate", ignore=shutil.ignore_patterns("*sos_plus*", "grpo*")
    )
    done = main(SMOKE, f"--workdir={run}", "--variants=apr", "--stage=data,report")
    assert done.code == 0, done.err
    text = (run / "report.md").read_text()
    assert "| APR SFT |" in text and "The APR demonstrations of " in text and "The SoS+" not in text


def test_threads_longer_than_a_row_are_counted_and_reported(import_data, whole_run, main, refused):
    """If the data set has a wider window than the run, SFT prints and logs the count, and the report has it."""
    run = import_data("apr")
    short = [f"--config.{name}=96" for name in ("window", "sft.row_length", "grpo.row_length")]
    command = (SMOKE, f"--workdir={run}", "--variants=apr", *short, "--config.sft.steps=1", "--config.sft.children=0")
    lengths = TreeStore(run / "data" / "apr_train").thread_tokens
    left_out = int((lengths > 96).sum())
    assert 0 < left_out < len(lengths)
    done = main(*command, "--stage=data,sft")
    assert done.code == 0, done.err
    assert any(has(line, "sft_apr", left_out, len(lengths), 96) for line in done.err.splitlines())
    assert "sft_apr validation: " in done.err
    first, *_ = (run / "sft_apr" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["threads_too_long"] == left_out
    shutil.copytree(
        whole_run.folder / "evaluate", run / "evaluate", ignore=shutil.ignore_patterns("*sos_plus*", "grpo*")
    )
    shutil.rmtree(run / "sft_apr" / "checkpoints")  # else the report would refuse the records, which have other weights
    assert main(*command, "--stage=report").code == 0
    assert f"SFT left out {left_out} APR threads" in (run / "report.md").read_text()


def change_manifest(run, **changes):
    path = run / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_data_without_held_out_problems_are_refused_in_the_data_stage(import_data, refused):
    """Early versions of the import allowed such data sets."""
    run = import_data("apr", "sos_plus")
    write_problems(run, "held_out", [])
    change_manifest(run, held_out_problems=0)
    assert has(refused(SMOKE, f"--workdir={run}", "--stage=data"), "held-out problems", "--held_out=FILE")
    write_problems(run, "held_out", problems_of(run, "train")[:1])
    line = refused(SMOKE, f"--workdir={run}", "--stage=evaluate")
    assert has(line, "held_out.jsonl", 1, 0, "import") and "delete" not in line


def test_data_with_held_out_problems_in_training_are_refused_in_the_data_stage(import_data, refused):
    """Early versions of the import made such data sets, since GRPO drew from all problems."""
    run = import_data("apr", "sos_plus")
    train, held_out = (problems_of(run, split) for split in ("train", "held_out"))
    turned = [row | {"numbers": row["numbers"][::-1]} for row in held_out[:3]]
    write_problems(run, "train", train + turned)
    change_manifest(run, train_problems=len(train) + 3)
    assert has(refused(SMOKE, f"--workdir={run}", "--stage=data"), "3 held-out problems", run / "data")


def test_data_of_another_tokenizer_are_refused_in_the_data_stage(import_data, refused):
    run = import_data("apr", "sos_plus")
    own = f"--config.tokenizer.name={run}/data/tokenizer.json"
    line = refused(SMOKE, f"--workdir={run}", "--stage=data", own)
    assert has(line, run / "data", "tokenizer.name", "''")


def test_a_broken_file_of_data_is_made_again_after_the_steps_in_the_message(whole_run, tmp_path, main, refused):
    run = tmp_path / "run"
    shutil.copytree(whole_run.folder / "data", run / "data")
    whole = (run / "data" / "held_out.jsonl").read_bytes()
    (run / "data" / "held_out.jsonl").write_bytes(whole[:-90])
    line = refused(SMOKE, f"--workdir={run}", "--stage=evaluate")
    assert has(line, "delete", f"{run}/data/held_out.jsonl", f"{run}/data/manifest.json", "--stage=data")
    for name in ("held_out.jsonl", "manifest.json"):
        (run / "data" / name).unlink()
    assert main(SMOKE, f"--workdir={run}", "--stage=data").code == 0
    assert (run / "data" / "held_out.jsonl").read_bytes() == whole


def test_validation_on_all_problems_is_refused_in_the_data_stage(import_data, refused):
    run = import_data("apr", "sos_plus")
    change = ("--config.grpo.validate_every=1", "--config.grpo.validation=150")
    assert "GRPO has no problem left to sample" in refused(SMOKE, f"--workdir={run}", "--stage=data", *change)
