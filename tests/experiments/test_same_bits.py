"""Runs give the bits that were recorded before a change of the code."""

import json
from pathlib import Path

import pytest

from tests.experiments.same_bits import differences, processor, record

RECORDED = json.loads(Path(__file__).with_name("same_bits.json").read_text())


@pytest.mark.slow
def test_runs_give_the_recorded_bits():
    """Data are compared on every machine, weights and trees only on the recorded kind of processor."""
    assert differences(RECORDED, record()) == []


def test_differences_leave_out_weights_of_another_processor():
    assert differences(RECORDED, RECORDED) == []
    other = {name: "x" for name in RECORDED}
    assert len(differences(RECORDED, other | {"processor": RECORDED["processor"]})) == len(RECORDED) - 1
    lines = differences(RECORDED, other)
    assert len(lines) == 4 and all(" data: " in line for line in lines) and processor()
