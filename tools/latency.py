"""Measures the latency of thread trees, and draws accuracy against latency (the paper's figure 6, right).

    tools/serve_sglang.sh install
    python -m tools.latency --config=experiments/configs/workstation.py          # the last models of that run
    python -m tools.latency --model=exported --out=runs/latency    # a folder that tools.export_hf wrote
    python -m tools.latency --out=runs/latency                     # only writes the report and figures again
    python -m tools.latency --engine=jax --model=exported          # no server: the JAX engine in this process

--config is the preset of a run, whose folder is runs/NAME or --workdir. The run's last models are exported and
measured, with the run's problems, window, depth and temperature; a flag overrides each of these. --model names an
exported model instead, which says its task and variant. It is measured on held-out problems of that task, or on
--problems=FILE. Repeat --model for other variants of the same task.

The tool starts one SGLang server, or --servers=N, and starts a server again when it dies. With --servers=URL,URL it
uses servers that are already running, and waits for one that is down; such a call takes one model. Each problem is one
sample, a line of OUT/samples.jsonl. An interrupted call, given again, measures only the missing samples.
--concurrency=1 is the paper's setting. Several numbers give a curve of latency under load.
--engine=sglang,jax --concurrency=64 compares the throughput of the two engines on one machine.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from apr_jax import interrupt
from apr_jax.evaluate.latency.costs import stored_costs
from apr_jax.evaluate.latency.engines import empty_caches, jax_engine, sglang_engine
from apr_jax.evaluate.latency.passes import ATTEMPTS, measure, warm_up
from apr_jax.evaluate.latency.sample import Setting, measured_samples, read_samples
from apr_jax.evaluate.records import problem_rows
from apr_jax.export.exported import Export
from apr_jax.export.imported import import_hf
from apr_jax.rollout.client import ServerError
from apr_jax.rollout.measure import Measurements
from apr_jax.rollout.servers import Servers, StartedServers
from apr_jax.rollout.sglang import SglangEngine
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from experiments.latency_report import write_report
from tools import command
from tools.latency_flags import WARM_UP, Plan, define_flags, make_plan


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    plan = make_plan(values)
    for engine in plan.engines if plan.exports else ():
        for export in plan.exports:
            _measure_model(plan, engine, export)
    print(write_report(plan.out))


def _measure_model(plan: Plan, engine: str, export: Export) -> None:
    """Measure every setting of one model on one engine that has samples missing."""
    samples, rows = read_samples(plan.out / "samples.jsonl"), problem_rows(export.task, plan.problems)
    passes = [
        (setting, budget)
        for setting, budget in _settings(plan, engine, export)
        if len(measured_samples(samples, setting, rows)) < len(rows)
    ]
    if not passes:
        return
    with _servers(plan, export) if engine == "sglang" else contextlib.nullcontext() as servers:
        for setting, budget in passes:
            asyncio.run(_pass(plan, export, setting, budget, servers))


def _settings(plan: Plan, engine: str, export: Export) -> Iterator[tuple[Setting, Budget]]:
    """Yield each setting of one model on one engine, and its budget."""
    servers = plan.servers if engine == "sglang" else 1
    for budget, condition in plan.conditions(export):
        for concurrency in plan.concurrency:
            setting = Setting(
                export.task.spec, export.variant, export.task.title(export.variant), export.weights, engine, servers,
                plan.placement if servers > 1 else "one", concurrency, budget.context, budget.depth,
                budget.min_children, plan.temperature, condition, plan.source,
            )  # fmt: skip
            yield setting, budget


@contextlib.contextmanager
def _servers(plan: Plan, export: Export) -> Iterator[Servers]:
    """Give the running servers of the plan, or start servers of the export and stop them at the end."""
    if plan.urls:
        yield Servers(plan.urls, plan.patience)
        return
    launcher = [*plan.launcher, "serve", str(export.folder)]
    with StartedServers(launcher, plan.servers, plan.out / "servers", plan.environments, plan.patience) as servers:
        yield servers


async def _pass(plan: Plan, export: Export, setting: Setting, budget: Budget, servers: Servers | None) -> None:
    """Warm the engine up, measure its costs, and measure the missing samples of one setting."""
    measurements, sampling = Measurements(), Sampling(plan.temperature)

    async def no_recovery() -> None:
        raise RuntimeError("an engine in this process has no servers to wait for")

    if servers is None:
        model = import_hf(export.folder, export.family)
        engine, recover = jax_engine(model, setting, sampling, measurements), no_recovery
    else:
        await servers.ready()
        engine = await sglang_engine(servers.urls, setting, export.vocab_size, measurements)
        recover = servers.ready
    runner = TreeRunner(engine, export.task.protocol(export.variant), export.tokenizer, budget, sampling)
    costs_of = f"{setting.task} {setting.variant} {setting.weights} {setting.engine}"
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await warm_up(
                    runner, measurements, (plan.warm_up * setting.concurrency)[: max(WARM_UP, setting.concurrency)]
                )
                costs = await stored_costs(plan.out / "costs.json", costs_of, engine, measurements, export.vocab_size)
                break
            except ServerError as error:
                if attempt == ATTEMPTS:
                    raise
                print(f"warming up again: {error}", file=sys.stderr)
                await recover()
        if servers is None:
            engine.split = (
                setting.concurrency == 1
            )  # else first tokens come in calls of their own, which lowers the throughput
        else:
            await empty_caches(servers.urls)
        path = plan.out / "samples.jsonl"
        await measure(runner, export.task, plan.problems, path, setting, measurements, costs, recover)
    finally:
        if isinstance(engine, SglangEngine):
            await engine.close()


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, define_flags, _work, argv, devices=True)


if __name__ == "__main__":
    # A SIGTERM raises SystemExit, so that the servers are stopped before this process ends.
    with interrupt.Interrupt(SystemExit(143), signal.SIGTERM):
        try:
            code = main(sys.argv)
        finally:
            interrupt.check()
    sys.exit(code)
