"""Runs of several processes, one of which fails."""

import json
import socket

import pytest

from apr_jax.data.dataset import FORMAT
from tests.experiments.conftest import finish, has, start


@pytest.mark.parametrize("broken", ["config", "range"])
def test_all_processes_end_with_the_error_of_process_0_in_the_data_stage(tmp_path, broken):
    """Without the error, the others would wait for the manifest until JAX aborts them with a stack dump."""
    if broken == "config":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "config.json").write_text(json.dumps({"format": FORMAT, "seed": 99}))
        changes, parts = (), (tmp_path / "data", "another")
    else:
        changes = (
            "--config.countdown.problems.max_number=3",
            "--config.data.repeats=false",
            "--config.countdown.problems.max_target=12",
        )
        parts = ("problems", "countdown", "data.repeats")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator=localhost:{free.getsockname()[1]}"
    line = (f"--workdir={tmp_path}", "--stage=data,sft", "--processes=2", address, *changes)
    first, other = (finish(one) for one in [start(*line, f"--process={i}") for i in range(2)])
    assert first.code == other.code == 1
    for done in (first, other):
        (error,) = [text for text in done.err.splitlines() if text.startswith("error: ")]
        assert has(error, *parts) and "Traceback" not in done.err
    assert has(other.err, "process 0", "data stage")
    assert not list(tmp_path.glob("data_failed*")) and not list(tmp_path.glob("sft_*"))
