"""Tests of the server script: its errors and its pinned versions. If its environment is installed, a real SGLang server
runs a model of ours, and its trees must equal those of the JAX engine, token for token."""

import asyncio
import os
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from apr_jax.export.hf import export_hf
from apr_jax.rollout.client import context_of_servers
from apr_jax.rollout.engine import JaxEngine
from apr_jax.rollout.measure import Measurements
from apr_jax.rollout.servers import StartedServers
from apr_jax.rollout.sglang import SglangEngine
from apr_jax.tasks.countdown import CountdownProtocol, Problem, ProblemRange
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.threads import Spawn
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner, run_all
from apr_jax.train.checkpoint import load_model
from apr_jax.train.step import data_mesh
from tests.tiny import log_softmax, plain_logits, without_logprobs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "serve_sglang.sh"
TRAINED = ROOT / "experiments" / "results" / "workstation"  # the folder of a model that spawns
WINDOW = 768  # the window that it was trained with


def call(*words, **environment):
    return subprocess.run([SCRIPT, *map(str, words)], capture_output=True, text=True, env={**os.environ, **environment})


def test_wrong_arguments_are_refused_in_one_line(tmp_path):
    away = {"APR_SGLANG_ENV": str(tmp_path / "env"), "APR_SGLANG_DEVICE": "cpu"}
    (tmp_path / "config.json").write_text("{}")
    for arguments, message in (
        (["serve"], "CHECKPOINT PORT"),
        (["serve", tmp_path / "no", 80], "no.*config.json"),
        (["serve", tmp_path, "http"], "port.* http"),
        (["serve", tmp_path, 80], f"{tmp_path}/env.*serve_sglang.sh install"),
    ):
        found = call(*arguments, **away)
        assert found.returncode == 1 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
        assert re.search(message, found.stderr)
    assert re.search("APR_SGLANG_DEVICE.*cuda.*cpu.*tpu", call("where", APR_SGLANG_DEVICE="tpu").stderr)
    assert call("where", **away).returncode == 1
    assert "install" in call().stdout and "serve CHECKPOINT PORT" in call("help").stdout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_version_is_pinned(device):
    lines = (SCRIPT.parent / "sglang" / f"{device}.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.+]+", pin) for pin in pins)
    versions = dict(pin.split("==") for pin in pins)
    assert f"VERSION={versions['sglang']}\n" in SCRIPT.read_text()
    assert versions["torch"].endswith("+cpu") == (device == "cpu")
    assert any("nvidia" in name for name in versions) == (device == "cuda")


# ---------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(a model, its tokenizer, the addresses of servers that run it)"""
    if call("where").returncode:
        pytest.skip("no SGLang here: tools/serve_sglang.sh install")
    folder, (model, _) = tmp_path_factory.mktemp("served"), load_model(TRAINED / "checkpoints")
    tokenizer = Tokenizer.load(TRAINED / "tokenizer.json")
    export_hf(model, tokenizer, folder / "model")
    with StartedServers([str(SCRIPT), "serve", str(folder / "model")], 1, folder) as servers:
        asyncio.run(servers.ready())
        yield model, tokenizer, servers.urls


def engine_of(urls, model, measurements=None):
    context = asyncio.run(context_of_servers(urls))
    assert context >= model.config.context
    return SglangEngine(urls, context=context, vocab_size=model.config.vocab_size, measurements=measurements)


@pytest.mark.slow
def test_greedy_trees_of_a_real_server_equal_those_of_the_jax_engine(served):
    model, tokenizer, urls = served
    budget, measurements, rng = Budget(WINDOW), Measurements(), random.Random(0)
    problems = [ProblemRange(max_number=10, max_target=30).draw(rng) for _ in range(20)]

    def trees(engine):
        runner = TreeRunner(engine, CountdownProtocol("apr"), tokenizer, budget, Sampling(0.0))
        return asyncio.run(run_all([lambda i=i, p=p: runner.run(p, (0, i)) for i, p in enumerate(problems)]))

    theirs = trees(engine_of(urls, model, measurements))
    mine = trees(JaxEngine(model, data_mesh(1), slots=64, context=budget.context))
    assert list(map(without_logprobs, theirs)) == list(map(without_logprobs, mine))
    assert sum(1 for tree in mine for _ in tree.threads()) > 40
    for a, b in zip(_sampled(theirs), _sampled(mine), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert all(one.first is not None and one.start <= one.first <= one.end for one in measurements)
    assert all(one.server_queue is not None and one.server_seconds > 0 for one in measurements)
    begun = {one.thread: one.prompt_tokens for one in reversed(measurements)}
    later = [one for one in measurements if one.prompt_tokens > begun[one.thread]]
    assert later and all(one.cached_tokens >= begun[one.thread] for one in later)


def _sampled(trees):
    def of(item):
        return [part for call in item.call for part in of(call)] if isinstance(item, Spawn) else [item]

    threads = [thread for tree in trees for thread in tree.threads()]
    return [block for thread in threads for item in thread.blocks for block in of(item) if block.sampled and len(block)]


@pytest.mark.slow
def test_log_probabilities_of_a_real_server_equal_those_of_the_model(served):
    model, tokenizer, urls = served
    prompt = CountdownProtocol("apr").root_prompt(Problem((3, 5, 7, 8), 24))
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]

    async def decode(sampling, limit):
        engine = engine_of_running
        sequence = engine.open(ids, (1,))
        try:
            return await engine.decode(sequence, frozenset({tokenizer.pad}), limit, sampling)
        finally:
            engine.free(sequence)

    # Sampled text differs from run to run, so it stays within the window of training: beyond it, float32 rounding moves
    # the log-probabilities of unlikely tokens by up to 1e-4. Greedy text is always the same, so it fills the context.
    for temperature, limits in ((0.0, (20, model.config.context)), (1.0, (20, WINDOW)), (0.7, (20, WINDOW))):
        for limit in limits:
            engine_of_running = engine_of(urls, model)
            found = asyncio.run(decode(Sampling(temperature), limit))
            rows = np.arange(len(ids) - 1, len(ids) + len(found.ids) - 1)
            logits = plain_logits(model, [*ids, *found.ids][: model.config.context + 8])[rows]
            own = log_softmax(logits)[np.arange(len(rows)), found.ids]
            drawn = log_softmax(logits / (temperature or 1.0))[np.arange(len(rows)), found.ids]
            np.testing.assert_allclose(found.model_logprobs, own, atol=1e-4)
            np.testing.assert_allclose(found.logprobs, drawn, atol=1e-4 / (temperature or 1.0))
