"""The latency tool from its command line, with a fake server in the place of SGLang and with the JAX engine."""

import json
import os
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
        export_hf(model, TOKENIZER, folder / variant, said_of(variant))
    return folder


def said_of(variant, condition=""):
    """What a checkpoint says of its task."""
    told = {"task": SPEC, "task_settings": {"first": 100}, "variant": variant, "condition": condition}
    return told | {"config": {"window": 128}}


def run(*arguments):
    return latency.main(["latency", *map(str, arguments)])


def refused(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 1
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err
    return last


def test_a_run_leaves_samples_figures_and_a_report(exports, tmp_path, capsys):
    flags = [f"--model={exports}/threads", f"--model={exports}/serial", f"--out={tmp_path}", "--count=5",
             "--min_children=0,2", "--concurrency=1,3", "--servers=2", "--placement=roots_apart"]  # fmt: skip
    assert run(*flags, f"--launcher={FAKE}") == 0
    table = capsys.readouterr().out
    samples = read_samples(tmp_path / "samples.jsonl")
    assert len(samples) == 5 * (2 * 2 + 2)  # in threads at two budgets, alone at one, each at two concurrencies
    assert [sample.problem["number"] for sample in samples[:5]] == [100, 101, 102, 103, 105]  # 104 is no problem
    assert "2 SGLang servers, roots apart" in table and "predicted" in table and "2 children at least" in table
    assert "| In threads | 2" in table and "| Alone | 2" in table
    assert (tmp_path / "report.md").read_text().strip() == table.strip()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary) == 6 and all(row["throughput"]["samples"] == 5 for row in summary)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    way = "2_sglang_servers_roots_apart"
    assert names == {f"latency_accuracy_{way}.png", f"latency_within_{way}.png", "latency_load.png"}
    assert run(*flags[:2], f"--out={tmp_path}/asked", "--count=2", "--budgets=threads:1,4",
               f"--launcher={FAKE}") == 0  # fmt: skip
    assert "window 128, Sub Call Budget: 4" in capsys.readouterr().out
    # Again: nothing is measured, so that no server is needed. And drawn again without a model.
    assert run(*flags, "--launcher=no_such_command") == 0 and run(f"--out={tmp_path}") == 0
    assert read_samples(tmp_path / "samples.jsonl") == samples


def test_the_last_models_of_a_run_are_measured_on_its_problems(tmp_path, capsys):
    """Of GRPO the best, of what had none the last of SFT; again only when there is a newer one."""
    preset = "--config=experiments/configs/smoke.py"
    flags = [preset, "--count=2", f"--launcher={FAKE}", f"--workdir={tmp_path}"]
    assert f"no run in {tmp_path}" in refused(capsys, *flags)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"task": None}))
    assert "config.json names no task" in refused(capsys, *flags)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"evaluate": {"temperature": 0.5}}))
    assert "no checkpoint under" in refused(capsys, *flags)

    def save(folder, seed, step):
        model = spawning_model(seed)
        said = said_of(folder.partition("/")[0].partition("_")[2])
        save_model(tmp_path / folder, model, {"step": step, "model": config_json(model.config), **said})

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
    assert "goes with --config=FILE" in refused(capsys, f"--workdir={tmp_path}")


def test_a_conditioned_model_of_a_run_is_asked_for_what_its_demonstrations_had_most_often(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = spawning_model(2)
    meta = {"step": 9, "model": config_json(model.config), **said_of("threads", "Sub Call Budget: 4 ")}
    save_model(tmp_path / "sft_threads" / "checkpoints", model, meta)
    (tmp_path / "data").mkdir()
    TOKENIZER.save(tmp_path / "data" / "tokenizer.json")
    (tmp_path / "data" / "held_out.jsonl").write_text('{"number": 10}\n')
    flags = ["--config=experiments/configs/smoke.py", "--count=1", f"--launcher={FAKE}", f"--workdir={tmp_path}"]
    assert run(*flags) == 0 and run(*flags, "--budgets=2") == 0
    samples = read_samples(tmp_path / "latency" / "samples.jsonl")
    assert [sample.setting["condition"] for sample in samples] == ["Sub Call Budget: 4 ", "Sub Call Budget: 2 "]


def test_running_servers_are_taken_as_they_are(exports, tmp_path, capsys):
    with FakeServer() as server:
        flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--count=2", f"--servers={server.url}"]
        assert run(*flags) == 0
    assert "1 SGLang server |" in capsys.readouterr().out
    assert "running servers have one model" in refused(capsys, *flags, f"--model={exports}/serial")
    assert f"{server.url}: not ready within 1 s" in refused(capsys, *flags, "--count=3", "--patience=1")


def test_a_server_that_fails_while_it_is_warmed_up(exports, tmp_path, capsys):
    flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--count=2"]
    with FakeServer(["html"]) as server:
        assert run(*flags, f"--servers={server.url}") == 0
        assert capsys.readouterr().err.count("warming up anew: http") == 1
    with FakeServer(["html"] * 99) as server:
        assert "no stream of JSON" in refused(capsys, *flags, "--count=3", f"--servers={server.url}")


def test_an_engine_that_breaks_is_no_sample_and_its_servers_are_stopped(exports, tmp_path, capsys, monkeypatch):
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


def test_the_jax_engine_takes_the_same_harness_and_says_so(exports, tmp_path, capsys):
    flags = [f"--model={exports}/threads", f"--out={tmp_path}", "--windows=64", "--count=2", f"--launcher={FAKE}"]
    assert run(*flags, "--engine=sglang,jax", "--concurrency=2") == 0
    table = capsys.readouterr().out
    assert "JAX engine, in process" in table and "1 SGLang server" in table and "tokens/s in process" in table
    assert "of 2 trees are the same token for token" in table
    engines = [sample.setting["engine"] for sample in read_samples(tmp_path / "samples.jsonl")]
    assert engines == ["sglang"] * 2 + ["jax"] * 2
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert len(costs) == 2 and all(cost["token"] > 0 for cost in costs.values())


def test_a_stopped_run_stops_its_servers_and_goes_on(exports, tmp_path):
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


def test_wrong_flags_are_one_line(exports, tmp_path, capsys):
    model, out = f"--model={exports}/threads", f"--out={tmp_path}"
    assert "no exported model in" in refused(capsys, f"--model={tmp_path}", out)
    assert "one model of each variant, was given several of threads" in refused(capsys, model, model, out)
    both = (model, f"--model={exports}/serial", out)
    assert "--budgets is VARIANT:N,N" in refused(capsys, *both, "--budgets=4")
    assert "--budgets is for a model of threads, serial, was given 'x:4'" in refused(capsys, *both, "--budgets=x:4")
    assert "cannot be asked for a budget" in refused(capsys, *both, "--budgets=serial:4")
    assert "--budgets is numbers from 0, was given 'x'" in refused(capsys, model, out, "--budgets=threads:x")
    assert "no samples in" in refused(capsys, out)
    assert "--engine is of sglang, jax, was given 'vllm'" in refused(capsys, model, out, "--engine=vllm")
    assert "--servers is a number from 1 or http" in refused(capsys, model, out, "--servers=none")
    assert "--concurrency is numbers from 1, was given '0'" in refused(capsys, model, out, "--concurrency=0")
    assert "holds 256 tokens, was given 300" in refused(capsys, model, out, "--windows=300")
    assert "--problems: no file" in refused(capsys, model, out, "--problems=nowhere.jsonl")
    (tmp_path / "p.jsonl").write_text('{"number": 10}\n')
    assert "holds 1 problems, was given 50" in refused(capsys, model, out, f"--problems={tmp_path}/p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"target": 10}\n')
    assert "p.jsonl, line 1: a problem has a number" in refused(capsys, model, out, f"--problems={tmp_path}/p.jsonl")
    assert "only flags are taken" in refused(capsys, "apr", out)
    assert "cannot be run" in refused(capsys, model, out, "--launcher=no_such_command")
    for launcher in ("'x", ""):
        assert "--launcher is a command, was given" in refused(capsys, model, out, f"--launcher={launcher}")
    for number in ("²²", "9" * 5000):
        assert "--windows is numbers from 32" in refused(capsys, model, out, f"--windows={number}")
    # Else they would be waited for, ten minutes by default.
    for url in (
        "http://",
        "ftp://x",
        "http://:1",
        "http://x:port",
        "http://x:99999",
        "http://[::1",
        "http://a,http://b c",
    ):
        assert "--servers is a number from 1 or http" in refused(capsys, model, out, f"--servers={url}")
