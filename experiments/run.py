r"""Trains, evaluates and reports one experiment, from problems to figures.

    python -m experiments.run --config=experiments/configs/smoke.py
    python -m experiments.run --config=experiments/configs/laptop.py --config.sft.steps=100 --workdir=runs/short
    python -m experiments.run --config=experiments/configs/laptop.py --stage=evaluate,report
    python -m experiments.run --config=experiments/configs/laptop.py --variants=apr
    python -m experiments.run --config=experiments/configs/laptop.py --sweep=seed=0,1,2 --sweep=sft.steps=100,200
    python -m experiments.run --config=experiments/configs/paper.py --stage=data,sft \
        --coordinator=HOST:PORT --processes=2 --process=0       # and the same with --process=1 on another machine

A run that was stopped goes on when the same command is given again; what is there already is not made again.
What can be set is listed, with its defaults, in experiments/settings.py and in the task's own `Settings`.
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

if __name__ == "__main__":  # the imports take seconds
    streams.open_closed()
    signal.signal(signal.SIGINT, interrupt.end_at_once)

import jax

from apr_jax.devices import no_backend, start_devices
from apr_jax.errors import UserError, end_in_error
from apr_jax.train.termination import Terminated
from experiments.command import FLAGS_HELP, Command, parse
from experiments.sweep import expand, run_each


def start(command: Command) -> None:
    """Runs the stages asked for."""
    settings = command.settings
    start_devices(settings.devices // command.processes)
    if command.processes > 1:
        jax.config.update("jax_enable_preemption_service", False)  # it would take our SIGTERM
        if command.process == 0:
            check_port(command.coordinator)
        jax.distributed.initialize(command.coordinator, command.processes, command.process)
    from experiments.stages import Run  # after the devices are set: it brings in everything else

    Run(settings, command.workdir, command.variants, command.stages).run(command.stages)


def check_port(coordinator: str) -> None:
    """Raises UserError where this process cannot listen at a coordinator's port: JAX would end in a segmentation
    fault."""
    port = int(coordinator.rpartition(":")[2])
    if not 0 < port < 65536:
        raise UserError(f"--coordinator is HOST:PORT with a port from 1 to 65535, was given {coordinator!r}")
    family, everywhere = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            one.bind((everywhere, port))
        except OSError as error:
            raise UserError(f"--coordinator={coordinator}: port {port}: {error.strerror}: give another one") from None


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, 1 after one line on stderr, 130 after an interrupt, 143 after a SIGTERM and a save. A bug keeps
    its traceback, with --debug any error. A second interrupt ends the process at once."""
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
    except Terminated as notice:
        print(f"stopped by SIGTERM: {notice}; the same command goes on from here", file=sys.stderr)
        if jax.process_count() > 1:
            jax.distributed.shutdown()  # waits for the others: the first one serves them
        return 143
    except Exception as error:
        if interrupt.given():  # what has become of it inside JAX
            return _stopped()
        return end_in_error(error, argv, _lost_process, no_backend)
    return 0


def _lost_process(error: Exception) -> str | None:
    """One line where what failed is the exchange with another process; None for any other error."""
    exchange = ("Gloo", "NCCL", "heartbeat", "oordination service", "Connection closed by peer")
    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(word in str(error) for word in exchange):
        return None
    return (
        f"another process of this run has ended or cannot be reached ({str(error).splitlines()[0]}); start all of them "
        "again, the same commands go on"
    )


def _stopped() -> int:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    return 130


def cli() -> None:
    """Ends the process. Silences the libraries' own accounts: Orbax tells of every file, and a save that fails, as on
    a full disk, is told by Orbax, asyncio and TensorStore in hundreds of lines beside the CheckpointError."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache")  # a run does without
    closed = "Event loop is closed"  # TensorStore's writes that were under way when the save had failed
    lost = lambda error: isinstance(error, KeyboardInterrupt) or closed in str(error)  # noqa: E731  the first is noted
    sys.unraisablehook = lambda found: lost(found.exc_value) or sys.__unraisablehook__(found)
    try:
        code = main(sys.argv)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()  # and no farewell, which would wait for the other processes
        code = 1
    sys.stdout.flush()
    if code:
        os._exit(code)  # without the farewells of threads whose files could not be written


if __name__ == "__main__":
    cli()
