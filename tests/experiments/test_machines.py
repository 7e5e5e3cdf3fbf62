"""Machines that lack what a run needs: a GPU, a free port, the other process."""

import os
import socket
import time

import jax
import pytest

from apr_jax import devices
from tests.experiments.conftest import ROOT, SMOKE, finish, has, start

SMALL = ("--config.data.train=20", "--config.data.held_out=4")


@pytest.fixture
def plugin(tmp_path):
    """An environment with a CUDA plugin, without a GPU, and without JAX_PLATFORMS."""
    folder = tmp_path / "path" / "jax_cuda12_plugin"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return environment | {"PYTHONPATH": os.pathsep.join([str(folder.parent), str(ROOT)])}


@pytest.mark.skipif(devices.has_driver(), reason="there is a GPU")
def test_a_run_with_a_cuda_plugin_but_no_gpu_uses_the_cpu(plugin, tmp_path):
    small = (*SMALL, f"--workdir={tmp_path / 'run'}", "--config.sft.steps=2")
    done = finish(start(*small, "--stage=data,sft", "--variants=apr", env=plugin))
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "sft_apr" / "checkpoints" / "2").is_dir()


def test_virtual_cpu_devices_are_made_only_where_jax_runs_on_the_cpu(monkeypatch):
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.setattr(devices, "find_spec", lambda name: name == "jax_cuda13_plugin")
    for asked, driver, cpu in (
        ("", True, False), ("", False, True), ("cpu", True, True), ("cuda", False, False), (None, True, False),
        ("cuda,cpu", False, False),
    ):  # fmt: skip
        changed.clear()
        monkeypatch.setattr(devices, "has_driver", lambda driver=driver: driver)
        with monkeypatch.context() as patch:
            patch.setattr(type(jax.config), "jax_platforms", asked, raising=False)
            assert devices.set_cpu_devices(7) is cpu, (asked, driver)
        assert changed == ({"jax_platforms": "cpu", "jax_num_cpu_devices": 7} if cpu else {})


def test_the_data_stage_needs_no_devices(main, refused, tmp_path):
    many = (SMOKE, *SMALL, f"--workdir={tmp_path}", "--config.devices=64", "--config.sft.batch_rows=64")
    many += ("--config.grpo.batch_rows=64", "--config.grpo.slots=64", "--config.evaluate.slots=64")
    assert has(refused(*many, "--stage=data,sft"), "64 devices", 2)
    done = main(*many, "--stage=data")
    assert done.code == 0 and (tmp_path / "data" / "manifest.json").exists(), done.err


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_a_port_that_the_coordinator_cannot_use_is_refused(refused, tmp_path, address):
    with socket.create_server((address, 0)) as taken:
        port = taken.getsockname()[1]
        two = (f"--coordinator=localhost:{port}", "--processes=2", "--process=0", "--stage=data")
        line = refused(SMOKE, *two, f"--workdir={tmp_path}")
    assert has(line, "--coordinator", f"port {port}", "in use")
    for port in (0, 65536):
        two = (f"--coordinator=localhost:{port}", "--processes=2", "--process=0", "--stage=data")
        assert has(refused(SMOKE, *two, f"--workdir={tmp_path}"), "--coordinator", 1, 65535, f"'localhost:{port}'")


def test_when_one_of_two_processes_is_killed_the_other_ends_soon_in_one_line(tmp_path):
    """JAX alone would wait a minute for the killed process, and end with a stack dump."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    two = (f"--workdir={tmp_path}", "--stage=data,sft", "--variants=apr", "--config.sft.steps=4000", "--processes=2")
    two += ("--config.sft.save_every=4000",)  # no save is under way: that one would wait for the heartbeat
    first, second = (start(*two, f"--coordinator=localhost:{port}", f"--process={i}") for i in range(2))
    metrics = tmp_path / "sft_apr" / "metrics.jsonl"
    while not metrics.exists() and first.poll() is None and second.poll() is None:
        time.sleep(0.05)
    second.kill()
    began, done = time.monotonic(), finish(first)
    finish(second)
    assert done.code == 1 and time.monotonic() - began < 40, done.err
    lines = [line for line in done.err.splitlines() if " left" not in line]
    assert len(lines) == 1 and has(lines[0], "error", "another process"), done.err
