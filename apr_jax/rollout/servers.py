"""SGLang servers: processes that are started, restarted when they die, and stopped, or servers that run elsewhere and
are only waited for."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from apr_jax.io.files import write_text
from apr_jax.rollout.client import ServerError, make_http_client

PROBE = 20.0  # seconds that one health check may take; SGLang answers it after one second at the earliest
STOP = 30.0  # seconds that servers get to stop by SIGTERM before SIGKILL
RESTARTS = 5  # most restarts of one server
MARK = "APR_JAX_SERVER"  # environment variable of a started server; its value identifies the run


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Servers:
    """Servers at the addresses `urls`. `ready()` waits for all of them, at most `patience` seconds for each call. `log`
    receives one line when a wait takes longer than a second, and one when it ends."""

    def __init__(self, urls: Sequence[str], patience: float = 600.0, log: Callable[[str], None] = _print_to_stderr):
        self.urls, self.patience, self.log = list(urls), patience, log

    async def ready(self) -> None:
        """Return when every server answers. Raises ServerError if one does not within `patience` seconds."""
        async with make_http_client() as client:
            await asyncio.gather(*(self._ready(index, client) for index in range(len(self.urls))))

    async def _ready(self, index: int, client: httpx.AsyncClient) -> None:
        url, began, logged = self.urls[index], time.monotonic(), False
        while not await self._healthy(url, client):
            self._recover(index)
            if time.monotonic() - began > self.patience:
                raise ServerError(f"{url}: not ready within {self.patience:g} s{self._last_line(index)}")
            if not logged and time.monotonic() - began > 1:
                self.log(f"waiting for the server at {url}")
                logged = True
            await asyncio.sleep(0.2)
        if logged:
            self.log(f"{url} is ready after {time.monotonic() - began:.0f} s")

    @staticmethod
    async def _healthy(url: str, client: httpx.AsyncClient) -> bool:
        try:
            async with asyncio.timeout(PROBE):
                return (await client.get(f"{url}/health")).status_code == 200
        except (httpx.RequestError, TimeoutError):
            return False

    def _recover(self, index: int) -> None:
        """Try to bring back a server that does not answer. Does nothing for servers that run elsewhere."""

    def _last_line(self, index: int) -> str:
        """The end of an error message: the last line that the server printed. Empty for servers that run elsewhere."""
        return ""

    def stop(self) -> None:
        """Stop the servers that this object started."""


class StartedServers(Servers):
    """`count` server processes on this machine, each started as ``command PORT`` with a free port of its own.

    Server N gets this process's environment variables and those of ``environments[N]``, and prints to
    ``FOLDER/server_N.log``. Use the object as a context manager, which stops the servers at its end. If this process is
    killed before that, the next run with the same folder kills the servers that are left. It recognises them by a mark
    in their environment, which ``FOLDER/server_N.json`` contains.
    """

    def __init__(
        self, command: Sequence[str], count: int, folder: Path, environments: Sequence[Mapping[str, str]] = (),
        patience: float = 600.0, log: Callable[[str], None] = _print_to_stderr,
    ):  # fmt: skip
        ports = _free_ports(count)
        super().__init__([f"http://127.0.0.1:{port}" for port in ports], patience, log)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("server_*.json"):
            if (pid := _left_over(left)) is not None:
                self.log(f"ending a server that an earlier run left (process {pid})")
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            left.unlink()
        self._folder, self._mark = folder, uuid.uuid4().hex
        self._commands = [[*command, str(port)] for port in ports]
        self._logs = [folder / f"server_{index}.log" for index in range(count)]
        self._environments = list(environments) or [{}] * count
        self._processes: list[subprocess.Popen | None] = [None] * count
        self._starts = [0] * count

    def __enter__(self) -> "StartedServers":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _recover(self, index: int) -> None:
        """Start a server that does not run. Raises ServerError if it cannot be run or has ended too often."""
        process = self._processes[index]
        if process is not None and process.poll() is None:
            return
        url = self.urls[index]
        if process is not None:
            if self._starts[index] > RESTARTS:
                raise ServerError(f"{url}: ended {self._starts[index]} times{self._last_line(index)}")
            _end(process, signal.SIGKILL)  # child processes of the dead server may still run
            self.log(f"the server at {url} ended (exit code {process.returncode}), starting it again")
        self._starts[index] += 1
        with self._logs[index].open("ab") as log:
            try:
                self._processes[index] = subprocess.Popen(
                    self._commands[index], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env={**os.environ, **self._environments[index], MARK: self._mark},
                )  # fmt: skip
            except OSError as error:
                raise ServerError(f"{url}: {self._commands[index][0]} cannot be run: {error.strerror}") from None
        started = {"pid": self._processes[index].pid, "mark": self._mark}
        write_text(self._pid_file(index), json.dumps(started))

    async def _ready(self, index: int, client: httpx.AsyncClient) -> None:
        process = self._processes[index]
        if process is None or process.poll() is not None:
            self._recover(index)  # before the health check: another process may have taken a dead server's port
        await super()._ready(index, client)

    def _last_line(self, index: int) -> str:
        lines = self._logs[index].read_text(errors="replace").split("\n") if self._logs[index].exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"; the last line of {self._logs[index]}: {last[:200]}"

    def stop(self) -> None:
        processes = [process for process in self._processes if process is not None]
        for process in processes:
            _end(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            _end(process, signal.SIGKILL)
            process.wait()
        self._processes = [None] * len(self._processes)
        for index in range(len(self.urls)):
            self._pid_file(index).unlink(missing_ok=True)

    def _pid_file(self, index: int) -> Path:
        return self._folder / f"server_{index}.json"


def _end(process: subprocess.Popen, how: signal.Signals) -> None:
    """Send a signal to a server's process group: a server may consist of several processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


def _left_over(pid_file: Path) -> int | None:
    """Return the process id in `pid_file` if that process still runs and has the file's mark in its environment. None
    also on systems without /proc."""
    try:
        found = json.loads(pid_file.read_text())
        environment = Path(f"/proc/{found['pid']}/environ").read_bytes().split(b"\0")
        return found["pid"] if f"{MARK}={found['mark']}".encode() in environment else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _free_ports(count: int) -> list[int]:
    """Return distinct ports that are free now. All are held open at once so that none is given out twice."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
