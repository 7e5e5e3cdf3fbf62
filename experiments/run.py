"""Trains, evaluates and reports one experiment, from problems to figures.

    python -m experiments.run --config=experiments/configs/smoke.py
    python -m experiments.run --config=experiments/configs/laptop.py --config.sft.steps=100 --workdir=runs/short
    python -m experiments.run --config=experiments/configs/laptop.py --stage=evaluate,report
    python -m experiments.run --config=experiments/configs/laptop.py --sweep=seed=0,1,2 --sweep=sft.steps=100,200

A run that was stopped goes on when the same command is given again; what is there already is not made again.
What can be set is listed, with its defaults, in experiments/settings.py.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import jax
from absl import logging

from experiments.command import FLAGS_HELP, Command, parse, reason
from experiments.sweep import expand, run_each

CACHE = Path(__file__).resolve().parent.parent / ".jax_cache"


def start(command: Command) -> None:
    """Runs the stages asked for."""
    settings = command.settings
    # Asking JAX itself whether there is an accelerator would fix the number of CPU devices.
    accelerator = find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin")
    if jax.config.jax_platforms == "cpu" or not accelerator:
        jax.config.update("jax_num_cpu_devices", settings.devices)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file
    from experiments.stages import Run  # after the devices are set: it brings in everything else

    Run(settings, command.workdir).run(command.stages)


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, 1 after one line on stderr, 130 after an interrupt. A bug keeps its traceback."""
    try:
        command = parse(argv)
        if command is None:
            print(f"{__doc__}\nFlags:\n{FLAGS_HELP}")
        elif command.sweeps:
            run_each(command, expand(command))
        else:
            start(command)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if (line := reason(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
