"""Results are of the weights that are there, and a failure of the system is none."""

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
from tests.experiments.conftest import SMOKE, finish, same_weights, snapshot, start
from tests.tiny import without_logprobs


def assert_same_records(a: Path, b: Path) -> None:
    """Log-probabilities may differ in their last place: trees decoded beside others, and some processors round products
    of other shapes otherwise."""
    for one, two in zip(read_records(a), read_records(b), strict=True):
        assert dataclasses.replace(one, tree=None) == dataclasses.replace(two, tree=None)
        trees = one.thread_tree, two.thread_tree
        assert without_logprobs(trees[0]) == without_logprobs(trees[1])
        np.testing.assert_allclose(*map(logprobs_of, trees), atol=2e-3)


def logprobs_of(tree) -> list[float]:
    parts = [item.call if isinstance(item, Spawn) else (item,) for thread in tree.threads() for item in thread.blocks]
    return [logprob for part in parts for block in part for logprob in block.logprobs or ()]


@pytest.mark.parametrize("stage, decodes", [("evaluate", 16), ("grpo", 5), ("export", 2)])
def test_an_engine_that_breaks_ends_the_stage_and_the_same_command_goes_on(
    whole_run, tmp_path, main, monkeypatch, stage, decodes
):
    """Never an answer that is wrong: what had ended before stays, and the end is that of a run that nothing stopped."""
    folder, results = tmp_path / "run", {"evaluate": "evaluate", "grpo": "grpo_apr", "export": "export"}
    shutil.copytree(whole_run.folder, folder, ignore=shutil.ignore_patterns(results[stage]))
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
        first, begun = (folder / "evaluate" / name for name in ("sft_apr.jsonl", "sft_apr@1.jsonl.partial"))
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


# ---------------------------------------------------------------------- results are of the weights that are there


def test_a_model_that_is_trained_anew_has_results_of_its_own(whole_run, tmp_path, main):
    folder, fresh = tmp_path / "run", tmp_path / "fresh"
    shutil.copytree(whole_run.folder, folder)
    shutil.rmtree(folder / "grpo_apr")
    others = snapshot(folder, "evaluate/sft_*")
    changes = ("--config.grpo.optimizer.muon_lr=0.5", "--config.grpo.penalties.token=0.001")  # a penalty is a signal
    done = finish(start(f"--workdir={folder}", *changes))
    assert done.code == 0, done.err
    assert "evaluate grpo_apr: " in done.err and "evaluate sft" not in done.err
    model, _ = load_model(folder / "grpo_apr" / "checkpoints")
    old, _ = load_model(whole_run.folder / "grpo_apr" / "checkpoints")
    assert fingerprint(model) != fingerprint(old)

    for part in ("data", "sft_apr", "grpo_apr"):
        shutil.copytree(folder / part, fresh / part)
    assert main(SMOKE, f"--workdir={fresh}", *changes, "--variants=apr", "--stage=evaluate").code == 0
    mine, theirs = (snapshot(run, "evaluate/grpo_apr*") for run in (folder, fresh))
    assert len(mine) == 3 and mine == theirs
    assert mine["evaluate/grpo_apr@1.jsonl"] != (whole_run.folder / "evaluate" / "grpo_apr@1.jsonl").read_bytes()
    assert snapshot(folder, "evaluate/sft_*") == others

    exported = load_file(folder / "export" / "model.safetensors")
    for name, array in hf_arrays(model).items():
        np.testing.assert_array_equal(exported[name], array)
    assert json.loads((folder / "export" / "check.json").read_text())["trees_equal"] == 4
    records = read_records(folder / "evaluate" / "grpo_apr@1.jsonl")
    told = json.loads((folder / "summary.json").read_text())["APR SFT+GRPO at temperature 1"]
    assert told["total_tokens"] == sum(record.total_tokens for record in records) / 12


def test_weights_that_are_still_trained_are_told_by_their_step(whole_run, tmp_path, main, refused):
    """Evaluation and report say so, an export is refused; when training has ended nothing of it is left."""
    shutil.copytree(whole_run.folder / "data", tmp_path / "data")
    last = Path("sft_apr", "checkpoints", "40")
    shutil.copytree(whole_run.folder / "sft_apr", tmp_path / "sft_apr", ignore=shutil.ignore_patterns("40"))
    command = (SMOKE, f"--workdir={tmp_path}", "--variants=apr")
    done = main(*command, "--stage=evaluate,report")
    assert done.code == 0 and "evaluate sft_apr (step 20 of 40): " in done.err
    assert "| APR SFT (step 20 of 40) |" in done.out and "| APR SFT |" not in done.out
    assert list(json.loads((tmp_path / "summary.json").read_text()))[0] == "APR SFT (step 20 of 40)"
    assert "sft_apr stands at step 20 of 40: finish --stage=sft first" in refused(*command, "--stage=export")
    assert not (tmp_path / "export").exists()
    shutil.copytree(whole_run.folder / last, tmp_path / last)
    assert "is of other weights than sft_apr has now" in refused(*command, "--stage=report")
    done = main(*command, "--stage=evaluate,report")
    assert done.code == 0 and "| APR SFT |" in done.out and "step 20" not in done.out
    assert snapshot(tmp_path, "evaluate/*") == snapshot(whole_run.folder, "evaluate/sft_apr*")


def test_grpo_of_other_supervised_weights_does_not_go_on(whole_run, tmp_path, refused):
    folder = tmp_path / "run"
    shutil.copytree(whole_run.folder, folder)
    model, meta = load_model(folder / "sft_apr" / "checkpoints")
    shutil.rmtree(folder / "sft_apr" / "checkpoints")
    model.embed_VxD[...] = model.embed_VxD[...] + 1e-6
    save_model(folder / "sft_apr" / "checkpoints", model, meta)
    line = refused(SMOKE, f"--workdir={folder}", "--stage=grpo")
    assert "grpo_apr began with other weights than sft_apr has now" in line
