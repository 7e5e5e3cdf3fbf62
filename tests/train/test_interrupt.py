"""An interrupt ends training, rollouts and progress, even if JAX loses the exception that the signal raised."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from apr_jax import interrupt
from apr_jax.io.progress import Progress
from apr_jax.rollout.engine import JaxEngine
from apr_jax.threads.engine import Sampling
from apr_jax.train.metrics import MetricsLog
from apr_jax.train.step import data_mesh
from tests.tiny import make_model
from tests.train import runs
from tests.train.test_resume import bits, lines


def lose_an_interrupt():
    """Send SIGINT to this process and suppress its KeyboardInterrupt."""
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_lost_interrupt_ends_training_at_the_next_step_and_the_run_resumes(tmp_path, monkeypatch):
    handler, expected = signal.getsignal(signal.SIGINT), bits(runs.sft(tmp_path / "whole"))
    write, logged = MetricsLog.write, []

    def log(self, step, values):
        write(self, step, values)
        logged.append(step)
        if step == 3:
            lose_an_interrupt()

    with monkeypatch.context() as patch, interrupt.Interrupt():
        patch.setattr(MetricsLog, "write", log)
        with pytest.raises(KeyboardInterrupt):
            runs.sft(tmp_path / "run")
    assert max(logged) <= 4
    assert signal.getsignal(signal.SIGINT) is handler  # a shell may have set it to "ignored"
    assert bits(runs.sft(tmp_path / "run")) == expected and lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.parametrize("other", [None, RuntimeError("INTERNAL: KeyboardInterrupt")])
def test_an_interrupt_that_jax_lost_ends_a_rollout(other, monkeypatch):
    """JAX drops the exception or raises another error instead. Neither counts as a failure of the decoded tree."""
    engine = JaxEngine(make_model(), data_mesh(1), slots=1, context=64, steps=2)
    decode, failures = JaxEngine._run_decode, []

    def interrupted(self, *arguments):
        lose_an_interrupt()
        if other is not None:
            raise other
        return decode(self, *arguments)

    async def one():
        try:
            return await engine.decode(engine.open((1, 2), (0,)), frozenset(), 60, Sampling(0.0))
        except Exception as error:
            failures.append(error)

    monkeypatch.setattr(JaxEngine, "_run_decode", interrupted)
    with interrupt.Interrupt(), pytest.raises(KeyboardInterrupt):
        asyncio.run(one())
    assert not failures


def test_progress_raises_a_lost_interrupt(capfd):
    progress = Progress("x", 3, "steps")
    progress.update(1)
    with interrupt.Interrupt():
        lose_an_interrupt()
        assert interrupt.given()
        with pytest.raises(KeyboardInterrupt):
            progress.update(2)
    with interrupt.Interrupt():
        progress.update(3)  # a new context has no pending interrupt


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(number, code):
    program = f"""
import contextlib, os, time
from apr_jax import interrupt
with interrupt.Interrupt(SystemExit(9), {int(number)}):
    with contextlib.suppress(SystemExit):
        os.kill(os.getpid(), {int(number)})
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == code
