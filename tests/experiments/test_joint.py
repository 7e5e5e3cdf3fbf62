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
    """The folder of a run with one supervised model for all variants, and what the run printed."""
    folder = tmp_path_factory.mktemp("joint")
    stages = "--stage=data,sft,grpo,evaluate,report"
    done = finish(start(f"--workdir={folder}", "--config.sft.models=joint", stages))
    assert done.code == 0, done.err
    return folder, done


def test_the_joint_model_is_saved_for_every_variant(joint_run):
    folder, done = joint_run
    joint = weights_of(load_model(folder / "sft_joint" / "checkpoints")[0])
    for variant in ("apr", "sos_plus"):
        found, meta = load_model(folder / f"sft_{variant}" / "checkpoints")
        assert (meta["variant"], meta["stage"]) == (variant, "sft")
        jax.tree.map(np.testing.assert_array_equal, weights_of(found), joint)
    assert load_meta(folder / "grpo_apr" / "checkpoints")[1]["step"] > 0
    rows = [line for line in done.out.splitlines() if line.startswith("| ") and " SFT |" in line]
    rows = rows[:2]  # further rows are at another temperature
    assert len(rows) == 2
    tokens = {row.split("|")[-2].strip() for row in rows}
    assert not (folder / "sft_apr" / "metrics.jsonl").exists()
    assert len(tokens) == 1 and tokens != {"0.00 M"}  # both rows have the tokens that the one model was trained on


def test_mixed_segments_join_sequences_in_their_order():
    mixed = MixedSegments(["ab", "c", "defg"])
    assert [mixed[i] for i in range(len(mixed))] == list("abcdefg")
    assert mixed.lengths.tolist() == [1] * 7
