"""SFT: its metrics (losses by kind of token, tokens, FLOP/s), its token budget, and microbatches."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.packing import flatten_thread, flatten_tree, pack_rows
from apr_jax.data.store import CALL_FORCED, CALL_SAMPLED, FORCED, JOIN, SAMPLED
from apr_jax.errors import UserError
from apr_jax.model import flops
from apr_jax.model.flops import training_flops
from apr_jax.threads import Block, Thread
from apr_jax.train.checkpoint import load_meta
from apr_jax.train.loss import KINDS, batch_sums, loss_by_kind, row_logits
from apr_jax.train.sft import SftConfig, SftJob, run_sft, validation_metrics
from apr_jax.train.step import data_mesh
from tests.data.test_packing import nested_tree
from tests.tiny import log_softmax, make_model, paths
from tests.train import runs

MODEL = make_model(3)


@pytest.fixture(scope="module")
def rows():
    segments = flatten_tree(nested_tree())
    return pack_rows([segments[::2], segments[1::2]], 128)


def test_the_loss_of_a_kind_is_the_sum_over_its_tokens(rows):
    logprobs = np.take_along_axis(log_softmax(np.asarray(row_logits(MODEL, rows))), rows.tokens[:, :, None], -1)
    sums = loss_by_kind(MODEL, rows)
    for name, role in {"written": SAMPLED, "call": CALL_SAMPLED, "prompt": FORCED, "join": JOIN}.items():
        chosen = (rows.role == role) & (rows.predecessors >= 0)
        assert float(sums[f"count/{name}"]) == chosen.sum() > 0
        np.testing.assert_allclose(sums[f"loss/{name}"], -logprobs[:, :, 0][chosen].sum(), rtol=1e-5)
    every = (rows.role >= 0) & (rows.role != CALL_FORCED) & (rows.predecessors >= 0)
    assert sum(float(sums[f"count/{name}"]) for name in KINDS) == every.sum()


def test_validation_means_leave_out_kinds_that_do_not_occur():
    totals = {f"{what}/{kind}": 0.0 for what in ("loss", "correct", "count") for kind in KINDS}
    totals |= {"loss/written": 6.0, "count/written": 2.0, "correct/written": 1.0}
    totals |= {"loss/prompt": 5.0, "count/prompt": 1.0}
    found = validation_metrics(totals, "sampled")
    assert found["validation_loss"] == found["validation_loss/written"] == 3.0
    assert found["validation_accuracy"] == 0.5 and found["validation_loss/prompt"] == 5.0
    assert "validation_loss/join" not in found
    assert validation_metrics(totals, "all")["validation_loss"] == pytest.approx(11 / 3)


def test_validation_threads_that_fit_no_row_are_refused_before_the_first_step(tmp_path):
    """Without the early check the error came after the last step."""
    short, long = (flatten_thread(Thread((Block(tuple(range(5, 5 + n)), sampled=True),))) for n in (20, 65))
    config = SftConfig(1, 2, 64, runs.OPTIMIZER)
    with pytest.raises(UserError, match=" 64 tokens"):
        run_sft(SftJob(make_model(0), config, [short] * 4, data_mesh(2), tmp_path, [long]))
    assert not list(tmp_path.iterdir())


def test_attended_pairs_are_each_token_with_its_path_up_to_itself(rows):
    sums = batch_sums(rows)
    enter, exit_ = rows.enter, rows.exit
    T = enter.shape[1]
    sees = (enter[:, None, :] <= enter[:, :, None]) & (enter[:, :, None] < exit_[:, None, :]) & np.tri(T, dtype=bool)
    assert int(sums["attended"]) == sees.sum() and int(sums["tokens"]) == (exit_ > enter).sum()


def test_unshared_tokens_are_those_of_all_paths_without_sharing(rows):
    lengths = [len(path) for thread in nested_tree().threads() for path in paths(thread)]
    assert int(batch_sums(rows)["unshared"]) == sum(lengths) > int(batch_sums(rows)["tokens"])


def test_a_run_logs_losses_by_kind_and_its_flops(tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "PEAK", {"cpu": {"float32": 1e12}})
    runs.sft(tmp_path / "run", validate_every=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert all({"validation_loss/written", "validation_loss/prompt"} <= line.keys() for line in validated)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    for line in trained:
        assert line["model_flops_utilisation"] == pytest.approx(line["model_flops_per_second"] / 2e12)  # two devices
        per_token = line["model_flops_per_second"] / line["tokens_per_second"]
        assert per_token > training_flops(MODEL.config, 1, 1)
    assert trained[0]["packing"] == trained[0]["tokens"] / 128 and 0 <= trained[0]["tokens_saved"] < 1


def test_a_budget_of_tokens_ends_a_run_and_its_schedule(tmp_path):
    """A run with a budget of tokens ends in the bits of a run with as many steps, also if it is resumed. With both
    limits the earlier one counts."""
    four = runs.sft(tmp_path / "four", steps=4)
    lines = [json.loads(line) for line in (tmp_path / "four" / "metrics.jsonl").open()]
    tokens = (
        int(sum(line["tokens"] for line in lines if "loss" in line and line["step"] < 4)) + 1
    )  # the fourth step exceeds it
    for name, limits in {"tokens": {"tokens": tokens}, "both": {"steps": 4, "tokens": 10**9}}.items():
        found = runs.sft(tmp_path / name, **limits)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(four))
        _, meta = load_meta(tmp_path / name / "checkpoints")
        assert (meta["step"], meta["steps"]) == (4, 4)
    shutil.rmtree(tmp_path / "tokens" / "checkpoints" / "4")
    again = runs.sft(tmp_path / "tokens", tokens=tokens)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(four))


def test_microbatches_change_nothing_but_the_order_of_addition(tmp_path):
    found = [runs.sft(tmp_path / str(parts), batch_rows=4, microbatches=parts, validation=False) for parts in (1, 2)]
    for a, b in zip(*(jax.tree.leaves(nnx.state(model)) for model in found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in "12"]
    for a, b in zip(*logs, strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_batch_rows_that_devices_times_microbatches_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_rows .2.*2 devices.*2 microbatches"):
        runs.sft(tmp_path / "run", microbatches=2)
