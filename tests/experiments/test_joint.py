"""One supervised model for all variants (`sft.models`)."""

import jax
import numpy as np
import pytest

from apr_jax.data.packing import MixedSegments
from apr_jax.train.checkpoint import load_meta, load_model
from tests.experiments.conftest import finish, start
from tests.experiments.test_first_weights import weights_of


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    stages = "--stage=data,sft,grpo,evaluate,report"
    done = finish(start(f"--workdir={folder}", "--config.sft.models=joint", stages))
    assert done.code == 0, done.err
    return folder, done


def test_every_variant_has_the_one_model(joint_run):
    folder, done = joint_run
    joint = weights_of(load_model(folder / "sft_joint" / "checkpoints")[0])
    for variant in ("apr", "sos_plus"):
        found, meta = load_model(folder / f"sft_{variant}" / "checkpoints")
        assert (meta["variant"], meta["stage"]) == (variant, "sft")
        jax.tree.map(np.testing.assert_array_equal, weights_of(found), joint)
    assert load_meta(folder / "grpo_apr" / "checkpoints")[1]["step"] > 0
    rows = [line for line in done.out.splitlines() if line.startswith("| ") and " SFT |" in line]
    rows = rows[:2]  # the others are at another temperature
    assert len(rows) == 2
    tokens = {row.split("|")[-2].strip() for row in rows}
    assert not (folder / "sft_apr" / "metrics.jsonl").exists()
    assert len(tokens) == 1 and tokens != {"0.00 M"}  # both rows say what the one model was trained on


def test_mixed_segments_are_those_of_the_first_then_of_the_next():
    mixed = MixedSegments(["ab", "c", "defg"])
    assert [mixed[i] for i in range(len(mixed))] == list("abcdefg")
    assert mixed.lengths.tolist() == [1] * 7
