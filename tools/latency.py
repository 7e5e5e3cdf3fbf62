"""Measures the latency of thread trees, and draws accuracy against it (the paper's figure 6, right).

    tools/serve_sglang.sh install
    python -m tools.latency --config=experiments/configs/workstation.py          # the last models of that run
    python -m tools.latency --apr=runs/export/apr --sosp=runs/export/sosp --out=runs/latency
    python -m tools.latency --out=runs/latency                     # only draws again
    python -m tools.latency --engine=jax --apr=runs/export/apr     # no server: the JAX engine in this process

--config names a run by its preset (and --workdir, where it is not in runs/NAME): its last models are exported, and
problems, window, depth and temperature are the run's own where no flag says otherwise.

Servers are started here, one or --servers=N of them, and started again when they die; with --servers=URL,URL
they are somebody else's (one model a call then) and waited for. One problem is one sample, one line of
OUT/samples.jsonl; a call that was stopped goes on where it was. --concurrency=1 is the paper's; further numbers make a
curve of latency under load, and --engine=sglang,jax --concurrency=64 compares what the two get through on one machine.
"""

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator, Sequence

import httpx
from absl import flags

from apr_jax import interrupt
from apr_jax.errors import UserError
from apr_jax.evaluate.costs import Costs, calibrate
from apr_jax.evaluate.latency import TRIES, Setting, measure, read_samples, warm_up
from apr_jax.io.files import write_text
from apr_jax.io.paths import read_json
from apr_jax.rollout.measure import Measurements, TimedEngine
from apr_jax.rollout.placement import PLACEMENTS
from apr_jax.rollout.servers import Servers, StartedServers
from apr_jax.rollout.sglang import Patience, ServerError, SglangEngine, context_of_servers, make_client
from apr_jax.tasks.countdown import CountdownProtocol
from apr_jax.threads.engine import Engine, Sampling
from apr_jax.threads.run import Budget, TreeRunner
from experiments.latency_report import write_report
from tools import command
from tools.latency_plan import WARM, Export, Plan, define_flags, make_plan

SLOTS = 64  # of the JAX engine, per device
PATIENCE = Patience(request=600.0, retry=5.0)  # short: a sample that had to wait for a server is of no use


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    plan = make_plan(values)
    for engine in plan.engines if plan.exports else ():
        for export in plan.exports:
            _measure_model(plan, engine, export)
    print(write_report(plan.out))


def _measure_model(plan: Plan, engine: str, export: Export) -> None:
    """All passes of one model through one engine that lack a sample."""
    passes = []
    for budget, condition in plan.budgets(export):
        for concurrency in plan.concurrency:
            many = plan.servers if engine == "sglang" else 1
            setting = Setting(
                export.model, export.weights, engine, many, plan.placement if many > 1 else "one", concurrency,
                budget.context, budget.depth, budget.least_children, plan.temperature, condition, plan.source,
            )  # fmt: skip
            if not _measured(plan, setting):
                passes.append((setting, budget))
    if not passes:
        return
    with _servers(plan, export) if engine == "sglang" else contextlib.nullcontext() as servers:
        for setting, budget in passes:
            asyncio.run(_pass(plan, export, setting, budget, servers))


def _measured(plan: Plan, setting: Setting) -> bool:
    where = dataclasses.asdict(setting)
    samples = read_samples(plan.out / "samples.jsonl")
    found = {(sample.index, json.dumps(sample.problem)) for sample in samples if sample.setting == where}
    return all((index, json.dumps(dataclasses.asdict(problem))) in found for index, problem in enumerate(plan.problems))


@contextlib.contextmanager
def _servers(plan: Plan, export: Export) -> Iterator[Servers]:
    if plan.urls:
        yield Servers(plan.urls, plan.patience)
        return
    words = [*plan.launcher, "serve", str(export.folder)]
    with StartedServers(words, plan.servers, plan.out / "servers", plan.environments, plan.patience) as servers:
        yield servers


async def _pass(plan: Plan, export: Export, setting: Setting, budget: Budget, servers: Servers | None) -> None:
    """Measures what one setting lacks."""
    measurements = Measurements()
    sampling = Sampling(plan.temperature)

    async def nothing() -> None:
        raise RuntimeError("an engine in this process has no servers to wait for")

    if servers is None:
        engine, recover = _jax_engine(export, setting, sampling, measurements), nothing
    else:
        await servers.ready()
        context = await context_of_servers(servers.urls)
        if context < budget.context:
            raise UserError(f"the servers hold {context} tokens, the window is {budget.context}")
        engine, recover = (
            SglangEngine(
                servers.urls, context=context, vocabulary=export.words, patience=PATIENCE,
                placement=PLACEMENTS[setting.placement](), measurements=measurements, logprobs="none",
                at_once=max(64, 16 * setting.concurrency),  # no request of a tree waits here, or it would not be load
            ),
            servers.ready,
        )  # fmt: skip
    protocol = CountdownProtocol(export.model)
    runner = TreeRunner(engine, protocol, export.tokenizer, budget, sampling)
    try:
        for tries in range(1, TRIES + 1):
            try:
                await warm_up(runner, measurements, (plan.warm * setting.concurrency)[: max(WARM, setting.concurrency)])
                costs = await _costs(plan, setting, engine, measurements, export.words)
                break
            except ServerError as error:
                if tries == TRIES:
                    raise
                print(f"warming up anew: {error}", file=sys.stderr)
                await recover()
        if servers is None:
            engine.split = setting.concurrency == 1  # under load it would measure itself
        else:
            await _flush(servers.urls)
        await measure(runner, plan.problems, plan.out / "samples.jsonl", setting, measurements, costs, recover)
    finally:
        if isinstance(engine, SglangEngine):
            await engine.close()


async def _costs(plan: Plan, setting: Setting, engine: Engine, measurements: Measurements, words: int) -> Costs:
    """Of this model on this engine, measured once: passes and restarts are predicted by the same."""
    path = plan.out / "costs.json"
    known = read_json(path, "delete it, it is measured again") if path.exists() else {}
    key = f"{setting.model} {setting.weights} {setting.engine}"
    if key not in known:
        known[key] = dataclasses.asdict(await calibrate(engine, measurements, words))
        write_text(path, json.dumps(known, indent=1) + "\n")
    return Costs(**known[key])


async def _flush(urls: Sequence[str]) -> None:
    """Empties the caches, which a pass before may have filled with these very problems."""
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


def _jax_engine(export: Export, setting: Setting, sampling: Sampling, measurements: Measurements) -> TimedEngine:
    import jax  # here: with servers nobody needs it

    from apr_jax.export.imported import import_hf
    from apr_jax.rollout.engine import JaxEngine
    from apr_jax.train.step import data_mesh

    mesh = data_mesh(jax.device_count())
    slots = min(max(8, 8 * setting.concurrency // mesh.size), SLOTS) * mesh.size
    engine = JaxEngine(import_hf(export.folder), mesh, slots=slots, context=setting.window)
    print(f"the JAX engine compiled {engine.compile(sampling)} shapes", file=sys.stderr, flush=True)
    return TimedEngine(engine, "jax", measurements)


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, define_flags, _work, argv, devices=True)


if __name__ == "__main__":
    # So that servers are stopped before this process is gone.
    with interrupt.Interrupt(SystemExit(143), signal.SIGTERM):
        try:
            code = main(sys.argv)
        finally:
            interrupt.check()
    sys.exit(code)
