"""Training and sampling on eight devices equal those on one. `eight_devices` runs with virtual CPU devices, in a
process of its own, and prints the measurements that are checked here."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apr_jax.train.step import data_mesh
from tests.train import processes
from tests.train.processes import weights_of

ROOT = Path(__file__).absolute().parent.parent.parent


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-m", "tests.train.eight_devices"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_a_step_on_eight_devices_is_the_step_on_one(found):
    """Tokens weigh the same on every device, though devices have very different numbers of them: a mean of per-device
    means would fail."""
    step = found["step"]
    assert step["per_row"][0] == 0 and max(step["per_row"]) > 5 * step["per_row"][1] > 0
    assert step["moved"] > 1e-2
    assert step["one_device"] < 1e-5 and step["plain"] < 1e-5 and step["norm"] < 1e-5


def test_microbatches_are_weighted_by_their_tokens(found):
    step = found["step"]
    assert step["microbatches"] < 1e-5 and step["weight"][0] == step["weight"][1]


@pytest.mark.parametrize("optimizer, shards", [("muon", {"8/1": 1, "8/2": 1 / 2}), ("adamw", {"8/8": 1 / 8})])
def test_sharded_weights_train_like_replicated_ones(found, optimizer, shards):
    """Shards of a half and of an eighth, with scan, remat and microbatches. Frozen parameters do not change."""
    sharded = found["sharded"]
    assert {mesh: sharded[f"{optimizer} {mesh} shard"] for mesh in shards} == shards
    assert sharded[f"{optimizer} moved"] > 1e-2
    # AdamW's first steps divide by the gradient's own size, however small it is.
    most = 1e-5 if optimizer == "muon" else 1e-4
    assert all(sharded[f"{optimizer} {mesh}"] < most for mesh in shards), sharded
    assert (sharded[f"{optimizer} q moved"] > 1e-2) == (optimizer == "muon")


def test_a_run_resumes_on_another_number_of_devices(found):
    assert 0 <= found["resumed"] < 1e-5


def test_two_processes_train_as_one(tmp_path):
    """Two processes of four devices each, joined by `jax.distributed`, with two microbatches and weights sharded within
    a process, give the weights of one process on one device. A SIGTERM to one of the two ends both after the same step,
    and the same command resumes them."""
    for code, extra in ((143, ["SIGTERM"]), (0, [])):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "tests.train.processes", address]
        started = [
            subprocess.Popen([*command, str(i), tmp_path, *extra], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]
        for process in started:
            _, errors = process.communicate(timeout=1800)
            assert process.returncode == code, errors[-4000:]
            assert not extra or "step 4 of 8" in errors
    model = processes.train(data_mesh(1), tmp_path / "alone")
    alone, (together, other) = weights_of(model), (dict(np.load(tmp_path / f"{i}.npz")) for i in range(2))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        np.testing.assert_array_equal(together[name], other[name])
        np.testing.assert_allclose(together[name], value, atol=1e-5)
    logs = [[json.loads(line) for line in (tmp_path / f / "metrics.jsonl").open()] for f in ("alone", "together")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    for a, b in zip(*logs, strict=True):
        for name in {"loss", "tokens", "gradient_norm", "validation_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_sampled_tokens_do_not_depend_on_the_number_of_devices(found):
    assert all(found["tokens"]["equal"]) and found["tokens"]["threads"] > 40


def test_eight_devices_update_a_policy_as_one_does(found):
    """With sharded weights; reference and old log-probabilities are computed on the device that has the row."""
    policy = found["policy"]
    assert policy["distance"] < 1e-4 and policy["moved"] > 5e-3
    for name, (eight, one) in policy["metrics"].items():
        assert eight == pytest.approx(one, rel=1e-3, abs=1e-5), name


def test_the_paper_s_preset_takes_an_sft_and_a_grpo_step_on_eight_devices(found):
    preset = found["preset"]
    assert set(preset["devices"]) == {8} and preset["slots"] == [2]
    assert preset["sft"] == pytest.approx(math.log(preset["vocabulary"]), rel=0.35)
    assert preset["sft_moved"] > 0 and preset["grpo_moved"] > 0
    grpo = preset["grpo"]
    assert preset["updates"] == 2 and grpo["train/threads"] >= 6 and grpo["train/threads_too_long"] == 0
    assert grpo["train/logprob_mismatch"] < 1e-4 and grpo["train/gradient_norm"] > 0 and math.isfinite(grpo["train/kl"])
