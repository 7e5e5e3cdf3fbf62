"""Server processes: started, waited for, started again when they die, stopped; or servers that somebody else runs,
which are only waited for."""

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
from apr_jax.rollout.sglang import ServerError, make_client

PROBE = 20.0  # seconds that one look at a server's health may take; SGLang's own takes one at least
STOP = 30.0  # seconds for a server to stop before it is made to
RESTARTS = 5  # of one server
MARK = "APR_JAX_SERVER"


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Servers:
    """Servers by their addresses. `ready()` waits for all of them, `patience` seconds each time; `tell` gets one line
    whenever it waits for something that takes long."""

    def __init__(self, urls: Sequence[str], patience: float = 600.0, tell: Callable[[str], None] = _tell):
        self.urls, self.patience, self.tell = list(urls), patience, tell

    async def ready(self) -> None:
        """Returns when every server answers. Raises ServerError."""
        async with make_client() as client:
            await asyncio.gather(*(self._ready(index, client) for index in range(len(self.urls))))

    async def _ready(self, index: int, client: httpx.AsyncClient) -> None:
        url, began, told = self.urls[index], time.monotonic(), False
        while not await self._healthy(url, client):
            self._look_after(index)
            if time.monotonic() - began > self.patience:
                raise ServerError(f"{url}: not ready within {self.patience:g} s{self._where(index)}")
            if not told and time.monotonic() - began > 1:
                self.tell(f"waiting for the server at {url}")
                told = True
            await asyncio.sleep(0.2)
        if told:
            self.tell(f"{url} is ready after {time.monotonic() - began:.0f} s")

    @staticmethod
    async def _healthy(url: str, client: httpx.AsyncClient) -> bool:
        try:
            async with asyncio.timeout(PROBE):
                return (await client.get(f"{url}/health")).status_code == 200
        except (httpx.RequestError, TimeoutError):
            return False

    def _look_after(self, index: int) -> None:
        """What is done about a server that does not answer."""

    def _where(self, index: int) -> str:
        return ""

    def stop(self) -> None:
        """Ends what was started here."""


class StartedServers(Servers):
    """`count` processes on this machine, each ``command PORT`` on a free port of its own.

    `environments`, one per server, are added to this process's. What a server prints goes to ``FOLDER/server_N.log``.
    Use as a context: servers end with it. Where this process was killed before it could end them, the next one with the
    same folder does: they are known by a mark in their environment, which ``FOLDER/server_N.json`` tells.
    """

    def __init__(
        self, command: Sequence[str], count: int, folder: Path, environments: Sequence[Mapping[str, str]] = (),
        patience: float = 600.0, tell: Callable[[str], None] = _tell,
    ):  # fmt: skip
        ports = _free_ports(count)
        super().__init__([f"http://127.0.0.1:{port}" for port in ports], patience, tell)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("server_*.json"):
            if (pid := _left_over(left)) is not None:
                self.tell(f"ending a server that an earlier run left (process {pid})")
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

    def _look_after(self, index: int) -> None:
        process = self._processes[index]
        if process is not None and process.poll() is None:
            return
        url = self.urls[index]
        if process is not None:
            if self._starts[index] > RESTARTS:
                raise ServerError(f"{url}: ended {self._starts[index]} times{self._where(index)}")
            _end(process, signal.SIGKILL)  # what its group has left
            self.tell(f"the server at {url} ended (exit code {process.returncode}), starting it again")
        self._starts[index] += 1
        with self._logs[index].open("ab") as log:
            try:
                self._processes[index] = subprocess.Popen(
                    self._commands[index], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env={**os.environ, **self._environments[index], MARK: self._mark},
                )  # fmt: skip
            except OSError as error:
                raise ServerError(f"{url}: {self._commands[index][0]} cannot be run: {error.strerror}") from None
        known = {"pid": self._processes[index].pid, "mark": self._mark}
        write_text(self._known(index), json.dumps(known))

    async def _ready(self, index: int, client: httpx.AsyncClient) -> None:
        process = self._processes[index]
        if process is None or process.poll() is not None:
            self._look_after(index)  # before the first look: another's server may answer on a port that was ours
        await super()._ready(index, client)

    def _where(self, index: int) -> str:
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
            self._known(index).unlink(missing_ok=True)

    def _known(self, index: int) -> Path:
        return self._folder / f"server_{index}.json"


def _end(process: subprocess.Popen, how: signal.Signals) -> None:
    """To its whole group: a server is several processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


def _left_over(known: Path) -> int | None:
    """The process that a file tells of, if it still runs and bears the file's mark. Without /proc: None."""
    try:
        found = json.loads(known.read_text())
        environment = Path(f"/proc/{found['pid']}/environ").read_bytes().split(b"\0")
        return found["pid"] if f"{MARK}={found['mark']}".encode() in environment else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
