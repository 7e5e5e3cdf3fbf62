"""Several processes of one run, where one of them fails."""

import json
import socket

import pytest

from apr_jax.data.dataset import FORMAT
from tests.experiments.conftest import finish, start


@pytest.mark.parametrize("broken", ["config", "range"])
def test_the_others_end_with_the_cause_when_the_first_fails_in_the_data_stage(tmp_path, broken):
    """They waited for a manifest that nobody would write, until JAX aborted them with a stack dump."""
    if broken == "config":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "config.json").write_text(json.dumps({"format": FORMAT, "seed": 99}))
        changes, says = (), "holds a data set of another config"
    else:
        changes = (
            "--config.countdown.problems.max_number=3",
            "--config.data.repeats=false",
            "--config.countdown.problems.max_target=12",
        )
        says = "countdown gives about"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator=localhost:{free.getsockname()[1]}"
    line = (f"--workdir={tmp_path}", "--stage=data,sft", "--processes=2", address, *changes)
    first, other = (finish(one) for one in [start(*line, f"--process={i}") for i in range(2)])
    assert first.code == other.code == 1
    for done in (first, other):
        (error,) = [text for text in done.err.splitlines() if text.startswith("error: ")]
        assert says in error and "Traceback" not in done.err
    assert "process 0 ended in the data stage" in other.err
    assert not list(tmp_path.glob("data_failed*")) and not list(tmp_path.glob("sft_*"))
