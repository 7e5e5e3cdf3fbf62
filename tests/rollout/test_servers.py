"""Server processes: errors of servers that do not start, and servers that a killed run leaves behind."""

import asyncio
import json
import os
import signal
import sys
import time

import pytest

from apr_jax.rollout.client import ServerError
from apr_jax.rollout.servers import RESTARTS, Servers, StartedServers

SERVE = [sys.executable, "-m", "tests.rollout.fake_server", "serve"]


def test_a_server_that_never_answers_is_an_error_in_bounded_time():
    began = time.monotonic()
    with pytest.raises(ServerError, match="http://127.0.0.1:1: .*0.5 s"):
        asyncio.run(Servers(["http://127.0.0.1:1"], patience=0.5).ready())
    assert time.monotonic() - began < 5


def test_the_error_of_a_server_that_cannot_start_has_its_last_line(tmp_path):
    command = ["sh", "-c", "echo starting; echo no room on the disk"]
    with StartedServers(command, 1, tmp_path, patience=60, log=lambda line: None) as servers:
        with pytest.raises(ServerError, match=f" {RESTARTS + 1} times.*server_0.log: no room on the disk"):
            asyncio.run(servers.ready())
    with pytest.raises(ServerError, match="no_such_command"):
        asyncio.run(StartedServers(["no_such_command"], 1, tmp_path, patience=60).ready())


def test_a_server_that_a_killed_run_left_is_killed_by_the_next(tmp_path):
    lines = []
    killed = StartedServers([*SERVE, str(tmp_path)], 1, tmp_path, patience=60, log=lambda line: None)
    asyncio.run(killed.ready())
    left = killed._processes[0]
    stranger = tmp_path / "server_7.json"
    stranger.write_text(json.dumps({"pid": os.getpid(), "mark": "of another"}))
    with StartedServers([*SERVE, str(tmp_path)], 1, tmp_path, patience=60, log=lines.append):
        assert left.wait(10) == -signal.SIGKILL and not stranger.exists()
    [line] = lines
    assert str(left.pid) in line
    assert not list(tmp_path.glob("server_*.json"))
