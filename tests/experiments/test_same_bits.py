"""Runs give the bits that were recorded before the code was rearranged."""

import json
from pathlib import Path

import pytest

from tests.experiments.same_bits import differences, processor, record

RECORDED = json.loads(Path(__file__).with_name("same_bits.json").read_text())


@pytest.mark.slow
def test_runs_give_the_bits_that_were_recorded():
    """Data on every machine; weights and trees on the kind of processor that they were recorded on."""
    assert differences(RECORDED, record()) == []


def test_a_difference_is_told_and_weights_of_another_processor_are_not_compared():
    assert differences(RECORDED, RECORDED) == []
    other = {name: "x" for name in RECORDED}
    assert len(differences(RECORDED, other | {"processor": RECORDED["processor"]})) == len(RECORDED) - 1
    told = differences(RECORDED, other)
    assert len(told) == 4 and all(" data: " in line for line in told) and processor()
