"""Eight devices do what one does. They are virtual CPU devices in a process of their own (`eight_devices`)."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent.parent


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-m", "tests.train.eight_devices"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_a_step_on_eight_devices_is_the_step_on_one(found):
    """Tokens weigh the same wherever they are: the mean of the devices' means would fail here."""
    step = found["step"]
    assert step["per_row"][0] == 0 and max(step["per_row"]) > 5 * step["per_row"][1] > 0
    assert step["moved"] > 1e-2
    assert step["one_device"] < 1e-5 and step["plain"] < 1e-5 and step["norm"] < 1e-5


def test_microbatches_are_added_up_by_their_tokens(found):
    step = found["step"]
    assert step["microbatches"] < 1e-5 and step["weight"][0] == step["weight"][1]


def test_sampled_tokens_depend_on_no_number_of_devices(found):
    assert all(found["tokens"]["equal"]) and found["tokens"]["threads"] > 40


def test_the_paper_s_preset_builds_and_takes_a_step_of_each_kind_on_eight_devices(found):
    preset = found["preset"]
    assert set(preset["devices"]) == {8} and preset["slots"] == [2]
    assert preset["sft"] == pytest.approx(math.log(preset["vocabulary"]), rel=0.35)
    assert preset["sft_moved"] > 0 and preset["grpo_moved"] > 0
    grpo = preset["grpo"]
    assert preset["updates"] == 2 and grpo["train/threads"] >= 6 and grpo["train/threads_too_long"] == 0
    assert (
        grpo["train/engine_difference"] < 1e-4 and grpo["train/gradient_norm"] > 0 and math.isfinite(grpo["train/kl"])
    )
