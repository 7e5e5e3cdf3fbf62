"""Measures the latency of thread trees, and draws accuracy against it (the paper's figure 6, right).

    tools/serve_sglang.sh install
    python -m tools.latency --config=experiments/configs/workstation.py          # the last models of that run
    python -m tools.latency --model=exported --out=runs/latency    # of tools.export_hf; repeated: other variants
    python -m tools.latency --out=runs/latency                     # only draws again
    python -m tools.latency --engine=jax --model=exported          # no server: the JAX engine in this process

--config names a run by its preset (and --workdir, where it is not in runs/NAME): its last models are exported, and
problems, window, depth and temperature are the run's own where no flag says otherwise. An exported folder says of which
task and variant it is; its problems are held-out ones of that task, or those of --problems=FILE.

Servers are started here, one or --servers=N of them, and started again when they die; with --servers=URL,URL
they are somebody else's (one model a call then) and waited for. One problem is one sample, one line of
OUT/samples.jsonl; a call that was stopped goes on where it was. --concurrency=1 is the paper's; further numbers make a
curve of latency under load, and --engine=sglang,jax --concurrency=64 compares what the two get through on one machine.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from apr_jax import interrupt
from apr_jax.evaluate.latency.costs import known_costs
from apr_jax.evaluate.latency.engines import empty_caches, jax_engine, sglang_engine
from apr_jax.evaluate.latency.passes import TRIES, measure, warm_up
from apr_jax.evaluate.latency.sample import Setting, measured_samples, read_samples
from apr_jax.evaluate.records import problem_rows
from apr_jax.export.exported import Export
from apr_jax.export.imported import import_hf
from apr_jax.rollout.measure import Measurements
from apr_jax.rollout.servers import Servers, StartedServers
from apr_jax.rollout.sglang import ServerError, SglangEngine
from apr_jax.threads.engine import Sampling
from apr_jax.threads.run import Budget, TreeRunner
from experiments.latency_report import write_report
from tools import command
from tools.latency_flags import WARM, Plan, define_flags, make_plan


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    plan = make_plan(values)
    for engine in plan.engines if plan.exports else ():
        for export in plan.exports:
            _measure_model(plan, engine, export)
    print(write_report(plan.out))


def _measure_model(plan: Plan, engine: str, export: Export) -> None:
    """All passes of one model through one engine that lack a sample."""
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
    if plan.urls:
        yield Servers(plan.urls, plan.patience)
        return
    words = [*plan.launcher, "serve", str(export.folder)]
    with StartedServers(words, plan.servers, plan.out / "servers", plan.environments, plan.patience) as servers:
        yield servers


async def _pass(plan: Plan, export: Export, setting: Setting, budget: Budget, servers: Servers | None) -> None:
    """Measures the samples that one setting lacks."""
    measurements, sampling = Measurements(), Sampling(plan.temperature)

    async def nothing() -> None:
        raise RuntimeError("an engine in this process has no servers to wait for")

    if servers is None:
        engine, recover = jax_engine(import_hf(export.folder, export.family), setting, sampling, measurements), nothing
    else:
        await servers.ready()
        engine = await sglang_engine(servers.urls, setting, export.vocab_size, measurements)
        recover = servers.ready
    runner = TreeRunner(engine, export.task.protocol(export.variant), export.tokenizer, budget, sampling)
    costs_of = f"{setting.task} {setting.variant} {setting.weights} {setting.engine}"
    try:
        for tries in range(1, TRIES + 1):
            try:
                await warm_up(runner, measurements, (plan.warm * setting.concurrency)[: max(WARM, setting.concurrency)])
                costs = await known_costs(plan.out / "costs.json", costs_of, engine, measurements, export.vocab_size)
                break
            except ServerError as error:
                if tries == TRIES:
                    raise
                print(f"warming up anew: {error}", file=sys.stderr)
                await recover()
        if servers is None:
            engine.split = setting.concurrency == 1  # under load it would measure itself
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
    # So that servers are stopped before this process is gone.
    with interrupt.Interrupt(SystemExit(143), signal.SIGTERM):
        try:
            code = main(sys.argv)
        finally:
            interrupt.check()
    sys.exit(code)
