r"""Train, evaluate and report one experiment, from problems to figures.

    python -m experiments.run --config=experiments/configs/smoke.py
    python -m experiments.run --config=experiments/configs/laptop.py --config.sft.steps=100 --workdir=runs/short
    python -m experiments.run --config=experiments/configs/laptop.py --stage=evaluate,report
    python -m experiments.run --config=experiments/configs/laptop.py --variants=apr
    python -m experiments.run --config=experiments/configs/laptop.py --sweep=seed=0,1,2 --sweep=sft.steps=100,200
    python -m experiments.run --config=experiments/configs/paper.py --stage=data,sft \
        --coordinator=HOST:PORT --processes=2 --process=0       # and the same with --process=1 on another machine

A stopped run resumes when the same command is given again. Outputs that exist already are not made again. The settings
and their defaults are in the dataclasses that experiments/settings.py lists, and in the task's own `Settings`.
"""

import logging
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Sequence

from apr_jax import interrupt
from apr_jax.io import streams

if __name__ == "__main__":  # before the imports below, which take seconds
    streams.open_closed()
    signal.signal(signal.SIGINT, interrupt.end_at_once)

import jax

from apr_jax.devices import no_backend, start_devices
from apr_jax.errors import UserError, end_in_error
from apr_jax.train.termination import Terminated
from experiments.command import FLAGS_HELP, Command, parse
from experiments.sweep import expand, run_each


def start(command: Command) -> None:
    """Run the stages of a command."""
    settings = command.settings
    start_devices(settings.devices // command.processes)
    if command.processes > 1:
        jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM instead of us
        if command.process == 0:
            check_port(command.coordinator)
        jax.distributed.initialize(command.coordinator, command.processes, command.process)
    # Imported only after the devices are set, since these modules import everything else.
    from experiments.stages import data, evaluate, export, grpo, links, report, sft
    from experiments.stages.run import Run

    modules = {"data": data, "sft": sft, "grpo": grpo, "evaluate": evaluate, "export": export, "report": report}
    with Run(settings, command.workdir, command.variants, command.stages, command.store) as run:
        links.refresh(run)
        for stage in command.stages:
            interrupt.check()
            modules[stage].run(run)


def check_port(coordinator: str) -> None:
    """Raise UserError if this process cannot listen at the coordinator's port.

    Without this check JAX would end in a segmentation fault.
    """
    port = int(coordinator.rpartition(":")[2])
    if not 0 < port < 65536:
        raise UserError(f"--coordinator is HOST:PORT with a port from 1 to 65535, was given {coordinator!r}")
    family, everywhere = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not block the port
        try:
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            one.bind((everywhere, port))
        except OSError as error:
            raise UserError(f"--coordinator={coordinator}: port {port}: {error.strerror}: give another one") from None


def main(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    The code is 0 after success, 1 after an error that is printed as one line on stderr, 130 after an interrupt
    (SIGINT), and 143 after a SIGTERM, when a checkpoint was saved. A bug raises its exception with the traceback; with
    --debug any error does. A second interrupt ends the process at once.
    """
    with interrupt.Interrupt():
        code = _main(argv)
        return 130 if interrupt.given() else code


def _main(argv: Sequence[str]) -> int:
    try:
        command = parse(argv)
        if command is None:
            print(f"{__doc__}\nFlags:\n{FLAGS_HELP}")
        elif command.sweeps:
            run_each(command, expand(command))
        else:
            start(command)
        interrupt.check()
    except KeyboardInterrupt:
        return _stopped()
    except Terminated as saved:
        print(f"stopped by SIGTERM: {saved}; the same command continues from here", file=sys.stderr)
        if jax.process_count() > 1:
            jax.distributed.shutdown()  # waits for the other processes: process 0 serves them
        return 143
    except Exception as error:
        if interrupt.given():  # an error that the interrupt became inside JAX
            return _stopped()
        return end_in_error(error, argv, _lost_process, no_backend)
    return 0


def _lost_process(error: Exception) -> str | None:
    """Return one line if an error comes from the exchange with another process. Return None for any other error."""
    exchange = ("Gloo", "NCCL", "heartbeat", "oordination service", "Connection closed by peer")
    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(word in str(error) for word in exchange):
        return None
    return (
        f"another process of this run has ended or cannot be reached ({str(error).splitlines()[0]}); start all of them "
        "again, the same commands continue"
    )


def _stopped() -> int:
    """Print that the run was interrupted and can be resumed. Return the exit code, 130."""
    print("\nstopped; the same command continues from here", file=sys.stderr)
    return 130


def cli() -> None:
    """Run this process's command line, and end the process with its exit code.

    Messages of the libraries are silenced. Orbax logs every file. After a failed save, for example on a full disk,
    Orbax, asyncio and TensorStore log hundreds of lines, beside our own CheckpointError.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache")  # a run works without it
    closed = "Event loop is closed"  # of TensorStore's writes that were running when the save failed
    # An interrupt is recorded elsewhere, so both kinds of error are dropped here.
    lost = lambda error: isinstance(error, KeyboardInterrupt) or closed in str(error)  # noqa: E731
    sys.unraisablehook = lambda found: lost(found.exc_value) or sys.__unraisablehook__(found)
    try:
        code = main(sys.argv)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()  # os._exit below skips the exit handler that waits for other processes
        code = 1
    sys.stdout.flush()
    if code:
        os._exit(code)  # skips the exit handlers of threads whose files could not be written


if __name__ == "__main__":
    cli()
