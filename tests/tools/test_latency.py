"""Tests of the latency tool by its command line, with a fake SGLang server and with the JAX engine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import safe_open

from apr_jax.evaluate.latency.sample import read_samples
from apr_jax.evaluate.run import NAME_TAG
from apr_jax.export.hf import export_hf
from apr_jax.model.family import config_json
from apr_jax.rollout.sglang import SglangEngine
from apr_jax.train.checkpoint import save_model
from tests.evaluate.nonsense import SPEC
from tests.rollout.fake_server import FakeServer
from tests.tiny import TOKENIZER, make_model, spawning_model
from tools import latency

CONFIG = {"window": 128, "budget": {"depth": 1}, "evaluate": {"temperature": 0.0}, "task": SPEC}
FAKE = shlex.join([sys.executable, "-m", "tests.rollout.fake_server"])


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for variant, model in (("threads", spawning_model()), ("serial", make_model(1))):
        export_hf(model, TOKENIZER, folder / variant, meta_of(variant))
    return folder


def meta_of(variant, condition=""):
    """Return the metadata of a checkpoint that was trained on a variant of the test task."""
    trained_on = {"task": SPEC, "task_settings": {"first": 100}, "variant": variant, "condition": condition}
    return trained_on | {"config": {"window": 128}}


def run(*arguments):
    return latency.main(["latency", *map(str, arguments)])


def refused(capsys, *arguments):
    """Run a wrong command, and return its one line of error."""
    capsys.readouterr()
    assert run(*arguments) == 1
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err
    return last


def test_a_call_writes_samples_figures_and_a_report(exports, tmp_path, capsys):
    flags = [f"--model={exports}/threads", f"--model={exports}/serial", f"--out={tmp_path}", "--count=5",
             "--min_children=0,2", "--concurrency=1,3", "--servers=2", "--placement=roots_apart"]  # fmt: skip
    assert run(*flags, f"--launcher={FAKE}") == 0
    table = capsys.readouterr().out
    samples = read_samples(tmp_path / "samples.jsonl")
    assert len(samples) == 5 * (2 * 2 + 2)  # "threads" has two budgets, "serial" one; each has two concurrencies
    assert [sample.problem["number"] for sample in samples[:5]] == [
        100,
        101,
        102,
        103,
        105,
    ]  # the task has no problem 104
    assert "2 SGLang servers, roots apart" in table and "predicted" in table and "at least 2 children" in table
    assert "| In threads | 2" in table and "| Alone | 2" in table
    assert (tmp_path / "report.md").read_text().strip() == table.strip()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary) == 6 and all(row["throughput"]["samples"] == 5 for row in summary)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    engine = "2_sglang_servers_roots_apart"
    assert names == {f"latency_accuracy_{engine}.png", f"latency_within_{engine}.png", "latency_load.png"}
    assert run(*flags[:2], f"--out={tmp_path}/asked", "--count=2", "--budgets=threads:1,4",
               f"--launcher={FAKE}") == 0  # fmt: skip
    assert "window 128, Sub Call Budget: 4" in capsys.readouterr().out
    # No sample is missing, so no server is started. Without a model, only the report is written again.
    assert run(*flags, "--launcher=no_such_command") == 0 and run(f"--out={tmp_path}") == 0
    assert read_samples(tmp_path / "samples.jsonl") == samples


def test_the_last_models_of_a_run_are_measured_on_its_problems(tmp_path, capsys):
    """The best GRPO model of a variant, or else its last SFT model, is exported, and again if there is a newer one."""
    preset = "--config=experiments/configs/smoke.py"
    flags = [preset, "--count=2", f"--launcher={FAKE}", f"--workdir={tmp_path}"]
    assert str(tmp_path) in refused(capsys, *flags)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"task": None}))
    assert "config.json" in (error := refused(capsys, *flags)) and "task" in error
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"evaluate": {"temperature": 0.5}}))
    assert "checkpoint" in (error := refused(capsys, *flags)) and str(tmp_path) in error

    def save(folder, seed, step):
        model = spawning_model(seed)
        meta = meta_of(folder.partition("/")[0].partition("_")[2])
        save_model(tmp_path / folder, model, {"step": step, "model": config_json(model.config), **meta})

    save("sft_serial/checkpoints", 1, 7)
    save("sft_threads/checkpoints", 2, 9)
    save("grpo_threads/best", 3, 4)
    (tmp_path / "data").mkdir()
    TOKENIZER.save(tmp_path / "data" / "tokenizer.json")
    (tmp_path / "data" / "held_out.jsonl").write_text('{"number": 10}\n{"number": 26}\n{"number": 27}\n')
    assert run(*flags) == 0
    exports = tmp_path / "latency" / "exports"
    with safe_open(exports / "threads" / "model.safetensors", "np") as stored:
        best = spawning_model(3).embed_VxD[...]
        np.testing.assert_array_equal(stored.get_tensor("model.embed_tokens.weight"), best)
    written = (exports / "serial" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "grpo_serial/checkpoints/2.left-behind").mkdir(parents=True)
    save("grpo_serial/checkpoints", 4, 1)
    assert run(*flags) == 0
    assert (exports / "serial" / "model.safetensors").stat().st_mtime_ns > written
    samples = read_samples(tmp_path / "latency" / "samples.jsonl")
    assert [(one.variant, one.problem["number"]) for one in samples] == [
        ("serial", 10), ("serial", 26), ("threads", 10), ("threads", 26), ("serial", 10), ("serial", 26)
    ]  # fmt: skip
    assert {(one.setting["window"], one.setting["temperature"]) for one in samples} == {(128, 0.5)}
    assert "--config" in (error := refused(capsys, f"--workdir={tmp_path}")) and "--workdir" in error


def test_a_conditioned_model_is_prompted_with_its_checkpoints_condition_unless_budgets_are_given(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = spawning_model(2)
    meta = {"step": 9, "model": config_json(model.config), **meta_of("threads", "Sub Call Budget: 4 ")}
    save_model(tmp_path / "sft_threads" / "checkpoints", model, meta)
    (tmp_path / "data").mkdir()
    TOKENIZER.save(tmp_path / "data" / "tokenizer.json")
    (tmp_path / "data" / "held_out.jsonl").write_text('{"number": 10}\n')
    flags = ["--config=experiments/configs/smoke.py", "--count=1", f"--launcher={FAKE}", f"--workdir={tmp_path}"]
    assert run(*flags) == 0 and run(*flags, "--budgets=2") == 0
    samples = read_samples(tmp_path / "latency" / "samples.jsonl")
    assert [sample.setting["condition"] for sample in samples] == ["Sub Call Budget: 4 ", "Sub Call Budget: 2 "]


def test_running_servers_are_used_for_one_model(exports, tmp_path, capsys):
    with FakeServer() as server:
        flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--count=2", f"--servers={server.url}"]
        assert run(*flags) == 0
    assert "1 SGLang server |" in capsys.readouterr().out
    assert "one --model" in refused(capsys, *flags, f"--model={exports}/serial")
    assert re.search(f"{server.url}: .* 1 s", refused(capsys, *flags, "--count=3", "--patience=1"))


def test_a_warm_up_is_repeated_after_a_server_error(exports, tmp_path, capsys):
    flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--count=2"]
    with FakeServer(["html"]) as server:
        assert run(*flags, f"--servers={server.url}") == 0
        assert capsys.readouterr().err.count("warming up again: http") == 1
    with FakeServer(["html"] * 99) as server:
        assert f"{server.url}: " in refused(capsys, *flags, "--count=3", f"--servers={server.url}")


def test_an_engine_that_raises_leaves_no_sample_and_its_servers_are_stopped(exports, tmp_path, capsys, monkeypatch):
    flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--count=3", f"--launcher={FAKE}"]
    decode, asked = SglangEngine.decode, []

    async def breaks(self, sequence, *rest):
        if sequence.origin.name[:2] == (NAME_TAG, 1):
            asked.append(rest)
            raise ZeroDivisionError("on purpose")
        return await decode(self, sequence, *rest)

    monkeypatch.setattr(SglangEngine, "decode", breaks)
    with pytest.raises(ZeroDivisionError):
        run(*flags)
    assert len(asked) == 1 and [sample.index for sample in read_samples(tmp_path / "samples.jsonl")] == [0]
    left = subprocess.run(["pgrep", "-f", f"tests.rollout.fake_server serve {exports}"], capture_output=True, text=True)
    assert not left.stdout
    assert run(f"--out={tmp_path}") == 0
    monkeypatch.setattr(SglangEngine, "decode", decode)
    assert run(*flags) == 0
    assert [sample.index for sample in read_samples(tmp_path / "samples.jsonl")] == [0, 1, 2]
    assert "| 3 of 3 |" in capsys.readouterr().out


def test_the_jax_engine_is_measured_and_compared_with_sglang(exports, tmp_path, capsys):
    flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--windows=64", "--count=2", f"--launcher={FAKE}"]
    assert run(*flags, "--engine=sglang,jax", "--concurrency=2") == 0
    table = capsys.readouterr().out
    assert "JAX engine, in process" in table and "1 SGLang server" in table and "tokens/s in process" in table
    assert re.search("[0-2] of 2 trees", table)
    engines = [sample.setting["engine"] for sample in read_samples(tmp_path / "samples.jsonl")]
    assert engines == ["sglang"] * 2 + ["jax"] * 2
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert len(costs) == 2 and all(cost["token"] > 0 for cost in costs.values())


def test_a_stopped_call_stops_its_servers_and_can_be_resumed(exports, tmp_path):
    flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--count=12", f"--launcher={FAKE}"]
    command = [sys.executable, "-m", "tools.latency", *flags]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, "FAKE_WAIT": "0.15"}, stdout=file, stderr=file)
    samples = tmp_path / "samples.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and (not samples.exists() or samples.read_text().count("\n") < 2):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, log.read_text()
    begun = read_samples(samples)
    assert 2 <= len(begun) < 12
    left = subprocess.run(["pgrep", "-f", f"tests.rollout.fake_server serve {exports}"], capture_output=True, text=True)
    assert not left.stdout
    assert run(*flags) == 0
    found = read_samples(samples)
    assert sorted(sample.index for sample in found) == list(range(12)) and found[: len(begun)] == begun


def test_wrong_flags_are_refused_in_one_line(exports, tmp_path, capsys):
    model, out, problems = f"--model={exports}/threads", f"--out={tmp_path}", tmp_path / "p.jsonl"
    both = (model, f"--model={exports}/serial", out)

    def names(says, *arguments):
        assert re.search(says, refused(capsys, *arguments)), says

    names(f"{tmp_path}", f"--model={tmp_path}", out)
    names("--model.* threads", model, model, out)
    names("--budgets.*VARIANT:N,N.*'4'", *both, "--budgets=4")
    names("--budgets.*threads, serial.*'x:4'", *both, "--budgets=x:4")
    names("serial .*budget", *both, "--budgets=serial:4")
    names("--budgets.* 0 .*'x'", model, out, "--budgets=threads:x")
    names(f"samples.*{tmp_path}", out)
    names("--engine.*sglang, jax.*'vllm'", model, out, "--engine=vllm")
    names("--servers.*http://HOST:PORT.*'none'", model, out, "--servers=none")
    names("--concurrency.* 1 .*'0'", model, out, "--concurrency=0")
    names("--windows.* 256 .* 300", model, out, "--windows=300")
    names("--problems.*nowhere.jsonl", model, out, "--problems=nowhere.jsonl")
    problems.write_text('{"number": 10}\n')
    names("--count.* 1 .* 50", model, out, f"--problems={problems}")
    problems.write_text('{"target": 10}\n')
    names("p.jsonl, line 1: ", model, out, f"--problems={problems}")
    names("'apr'", "apr", out)
    names("no_such_command", model, out, "--launcher=no_such_command")
    for launcher in ("'x", ""):
        names(f"--launcher.*{launcher}", model, out, f"--launcher={launcher}")
    for number in ("²²", "9" * 5000):
        names(f"--windows.* 32 .*'{number}'", model, out, f"--windows={number}")
    # The tool would wait for wrong addresses, ten minutes by default.
    for url in (
        "http://",
        "ftp://x",
        "http://:1",
        "http://x:port",
        "http://x:99999",
        "http://[::1",
        "http://a,http://b c",
    ):
        names("--servers.*http://HOST:PORT", model, out, f"--servers={url}")
