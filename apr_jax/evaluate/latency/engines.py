"""The engines whose latency is measured: SGLang servers, and the JAX engine in this process."""

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
from apr_jax.rollout.client import Patience, context_of_servers, make_http_client
from apr_jax.rollout.engine import JaxEngine
from apr_jax.rollout.measure import Measurements, TimedEngine
from apr_jax.rollout.placement import PLACEMENTS
from apr_jax.rollout.sglang import SglangEngine
from apr_jax.threads.engine import Sampling
from apr_jax.train.step import data_mesh

SLOTS = 64  # at most, of the JAX engine on each device
PATIENCE = Patience(request=600.0, retry=5.0)  # seconds; retries end soon, since a retried sample is discarded anyway


async def sglang_engine(
    urls: Sequence[str], setting: Setting, vocab_size: int, measurements: Measurements
) -> SglangEngine:
    """Return an engine on servers that are ready. Raises UserError if their context is shorter than the window."""
    context = await context_of_servers(urls)
    if context < setting.window:
        raise UserError(f"the servers hold {context} tokens, the window is {setting.window}")
    return SglangEngine(
        urls, context=context, vocab_size=vocab_size, patience=PATIENCE,
        placement=PLACEMENTS[setting.placement](), measurements=measurements, logprobs="none",
        at_once=max(64, 16 * setting.concurrency),  # high enough that requests wait in the servers only
    )  # fmt: skip


def jax_engine(model: Model, setting: Setting, sampling: Sampling, measurements: Measurements) -> TimedEngine:
    """Return a timed engine on all devices of this process. All of its shapes are compiled here, before any sample."""
    mesh = data_mesh(jax.device_count())
    slots = min(max(8, 8 * setting.concurrency // mesh.size), SLOTS) * mesh.size
    engine = JaxEngine(model, mesh, slots=slots, context=setting.window)
    print(f"the JAX engine compiled {engine.compile(sampling)} shapes", file=sys.stderr, flush=True)
    return TimedEngine(engine, "jax", measurements)


async def empty_caches(urls: Sequence[str]) -> None:
    """Empty the servers' prefix caches, which an earlier pass may have filled with the same problems. Prints a warning
    for a server that does not do so within 30 seconds."""
    async with make_http_client() as client:
        for url in urls:
            try:
                async with asyncio.timeout(30):
                    answer = await client.get(f"{url}/flush_cache")
                if answer.status_code == 200:
                    continue
            except (httpx.RequestError, TimeoutError):
                pass
            print(f"{url} did not empty its cache: cached tokens may come from an earlier pass", file=sys.stderr)


def visible_gpus() -> list[str]:
    """List the GPUs that started servers may use, in the notation of CUDA_VISIBLE_DEVICES. If that variable is set,
    only its GPUs are listed. The list is empty without an NVIDIA GPU and with APR_SGLANG_DEVICE=cpu."""
    if os.environ.get("APR_SGLANG_DEVICE") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    there = [] if listed.returncode else [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(len(there))] if mask is None else [one for one in mask.split(",") if one]
