"""Results belong to the current weights, and a failure of the system never becomes a result."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from apr_jax.evaluate.records import read_records, whole_records
from apr_jax.export.hf import hf_arrays
from apr_jax.rollout.engine import JaxEngine
from apr_jax.threads import Spawn
from apr_jax.train.checkpoint import fingerprint, load_model, save_model
from tests.experiments.conftest import SMOKE, copy_run, finish, has, same_weights, snapshot, start
from tests.tiny import without_logprobs


def assert_same_records(a: Path, b: Path) -> None:
    """Assert that two files have the same records.

    Log-probabilities may differ in their last place. They depend on the trees decoded at the same time, since some
    processors round products of other shapes differently.
    """
    for one, two in zip(read_records(a), read_records(b), strict=True):
        assert dataclasses.replace(one, tree=None) == dataclasses.replace(two, tree=None)
        trees = one.thread_tree, two.thread_tree
        assert without_logprobs(trees[0]) == without_logprobs(trees[1])
        np.testing.assert_allclose(*map(logprobs_of, trees), atol=2e-3)


def logprobs_of(tree) -> list[float]:
    parts = [item.call if isinstance(item, Spawn) else (item,) for thread in tree.threads() for item in thread.blocks]
    return [logprob for part in parts for block in part for logprob in block.logprobs or ()]


@pytest.mark.parametrize("stage, decodes", [("evaluate", 16), ("grpo", 5), ("export", 2)])
def test_an_engine_that_breaks_ends_the_stage_and_the_same_command_resumes(
    whole_run, tmp_path, main, monkeypatch, stage, decodes
):
    """No problem counts as wrong. Finished work is kept, and the results are those of an uninterrupted run."""
    folder = copy_run(whole_run.folder, tmp_path / "run", f"{stage}*")
    command = (SMOKE, f"--workdir={folder}", "--variants=apr", f"--stage={stage}")
    decode, done = JaxEngine.decode, []

    async def breaks(self, *asked):
        done.append(await decode(self, *asked))
        if len(done) > decodes:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory")
        return done[-1]

    monkeypatch.setattr(JaxEngine, "decode", breaks)
    with pytest.raises(MemoryError, match="RESOURCE_EXHAUSTED"):
        main(*command)
    if stage == "evaluate":
        first, (begun,) = folder / "evaluate" / "sft_apr.jsonl", folder.glob("store/*/*.partial")
        assert snapshot(folder, "evaluate/sft_apr.jsonl") == snapshot(whole_run.folder, "evaluate/sft_apr.jsonl")
        kept = whole_records(begun)
        whole = read_records(whole_run.folder / "evaluate" / "sft_apr@1.jsonl")
        assert first.exists() and 0 < len(kept) < 12 and all(record == whole[record.index] for record in kept)
    assert not (folder / "export" / "check.json").exists() or stage != "export"
    monkeypatch.setattr(JaxEngine, "decode", decode)
    assert main(*command).code == 0
    if stage == "evaluate":
        names = sorted(path.name for path in (whole_run.folder / "evaluate").glob("*apr*.jsonl"))
        assert len(names) == 4
        for name in names:
            assert_same_records(folder / "evaluate" / name, whole_run.folder / "evaluate" / name)
    if stage == "export":
        assert snapshot(folder, "export/*.json") == snapshot(whole_run.folder, "export/*.json")
    if stage == "grpo":
        assert same_weights(folder / "grpo_apr" / "checkpoints", whole_run.folder / "grpo_apr" / "checkpoints")


# ---------------------------------------------------------------------- results belong to the current weights


def test_a_model_trained_with_other_settings_gets_its_own_results(whole_run, tmp_path, main):
    folder = copy_run(whole_run.folder, tmp_path / "run")
    others = snapshot(folder, "evaluate/sft_*")
    changes = (
        "--config.grpo.optimizer.muon_lr=0.5",
        "--config.grpo.penalties.token=0.001",
    )  # the penalty gives GRPO a gradient
    done = finish(start(f"--workdir={folder}", *changes))
    assert done.code == 0, done.err
    assert "evaluate grpo_apr: " in done.err and "evaluate sft" not in done.err
    model, _ = load_model(folder / "grpo_apr" / "checkpoints")
    old, _ = load_model(whole_run.folder / "grpo_apr" / "checkpoints")
    assert fingerprint(model) != fingerprint(old)

    fresh = copy_run(folder, tmp_path / "fresh", "evaluate*")
    assert main(SMOKE, f"--workdir={fresh}", *changes, "--variants=apr", "--stage=evaluate").code == 0
    mine, theirs = (snapshot(run, "evaluate/grpo_apr*") for run in (folder, fresh))
    assert len(mine) == 2 and mine == theirs
    assert mine["evaluate/grpo_apr@1.jsonl"] != (whole_run.folder / "evaluate" / "grpo_apr@1.jsonl").read_bytes()
    assert snapshot(folder, "evaluate/sft_*") == others

    exported = load_file(folder / "export" / "model.safetensors")
    for name, array in hf_arrays(model).items():
        np.testing.assert_array_equal(exported[name], array)
    assert json.loads((folder / "export" / "check.json").read_text())["trees_equal"] == 4
    records = read_records(folder / "evaluate" / "grpo_apr@1.jsonl")
    summary = json.loads((folder / "summary.json").read_text())["APR SFT+GRPO at temperature 1"]
    assert summary["total_tokens"] == sum(record.total_tokens for record in records) / 12


def test_results_of_unfinished_training_are_reported_with_their_step(whole_run, tmp_path, main, refused):
    """Evaluation and report give the step, and an export is refused. After training nothing of this is left."""
    copy_run(whole_run.folder, tmp_path, "*sos_plus", "grpo*", "evaluate*", "export*")
    last = Path("sft_apr", "checkpoints", "40")
    shutil.rmtree(tmp_path / last)
    command = (SMOKE, f"--workdir={tmp_path}", "--variants=apr")
    done = main(*command, "--stage=evaluate,report")
    assert done.code == 0 and "evaluate sft_apr (step 20 of 40): " in done.err
    assert "| APR SFT (step 20 of 40) |" in done.out and "| APR SFT |" not in done.out
    assert list(json.loads((tmp_path / "summary.json").read_text()))[0] == "APR SFT (step 20 of 40)"
    assert has(refused(*command, "--stage=export"), "sft_apr", 20, 40, "--stage=sft")
    assert not (tmp_path / "export").exists()
    shutil.copytree(whole_run.folder / last, tmp_path / last)
    assert has(refused(*command, "--stage=report"), "sft_apr", "other weights", "--stage=evaluate")
    done = main(*command, "--stage=evaluate,report")
    assert done.code == 0 and "| APR SFT |" in done.out and "step 20" not in done.out
    assert snapshot(tmp_path, "evaluate/*") == snapshot(whole_run.folder, "evaluate/sft_apr*")


def test_grpo_does_not_resume_with_other_supervised_weights(whole_run, tmp_path, refused):
    folder = copy_run(whole_run.folder, tmp_path / "run")
    model, meta = load_model(folder / "sft_apr" / "checkpoints")
    shutil.rmtree(folder / "sft_apr" / "checkpoints")
    model.embed_VxD[...] = model.embed_VxD[...] + 1e-6
    save_model(folder / "sft_apr" / "checkpoints", model, meta)
    line = refused(SMOKE, f"--workdir={folder}", "--stage=grpo")
    assert has(line, (folder / "grpo_apr").resolve(), "sft_apr", "other weights")
