"""Engines under the clock: SGLang's servers and the JAX engine in this process."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import httpx
import jax

from apr_jax.errors import UserError
from apr_jax.evaluate.latency.sample import Setting
from apr_jax.model.family import Model
from apr_jax.rollout.engine import JaxEngine
from apr_jax.rollout.measure import Measurements, TimedEngine
from apr_jax.rollout.placement import PLACEMENTS
from apr_jax.rollout.sglang import Patience, SglangEngine, context_of_servers, make_client
from apr_jax.threads.engine import Sampling
from apr_jax.train.step import data_mesh

SLOTS = 64  # of the JAX engine, per device
PATIENCE = Patience(request=600.0, retry=5.0)  # short: a sample that had to wait for a server is of no use


async def sglang_engine(
    urls: Sequence[str], setting: Setting, vocab_size: int, measurements: Measurements
) -> SglangEngine:
    """An engine on servers that are ready. Raises UserError where they hold fewer tokens than the window."""
    context = await context_of_servers(urls)
    if context < setting.window:
        raise UserError(f"the servers hold {context} tokens, the window is {setting.window}")
    return SglangEngine(
        urls, context=context, vocabulary=vocab_size, patience=PATIENCE,
        placement=PLACEMENTS[setting.placement](), measurements=measurements, logprobs="none",
        at_once=max(64, 16 * setting.concurrency),  # no request of a tree waits here, or it would not be load
    )  # fmt: skip


def jax_engine(model: Model, setting: Setting, sampling: Sampling, measurements: Measurements) -> TimedEngine:
    """An engine on all devices of this process, with all of its shapes compiled."""
    mesh = data_mesh(jax.device_count())
    slots = min(max(8, 8 * setting.concurrency // mesh.size), SLOTS) * mesh.size
    engine = JaxEngine(model, mesh, slots=slots, context=setting.window)
    print(f"the JAX engine compiled {engine.compile(sampling)} shapes", file=sys.stderr, flush=True)
    return TimedEngine(engine, "jax", measurements)


async def empty_caches(urls: Sequence[str]) -> None:
    """Empties the servers' caches, which a pass before may have filled with these very problems."""
    async with make_client() as client:
        for url in urls:
            try:
                async with asyncio.timeout(30):
                    answer = await client.get(f"{url}/flush_cache")
                if answer.status_code == 200:
                    continue
            except (httpx.RequestError, TimeoutError):
                pass
            print(f"{url} did not empty its cache: cached tokens may be another pass's", file=sys.stderr)


def visible_gpus() -> list[str]:
    """The GPUs that servers may have, as CUDA_VISIBLE_DEVICES names them: where it is set, the ones in it."""
    if os.environ.get("APR_SGLANG_DEVICE") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    there = [] if listed.returncode else [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(len(there))] if mask is None else [one for one in mask.split(",") if one]
