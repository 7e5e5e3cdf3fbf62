"""The one entry point: ``python -m experiments.run --config=experiments/configs/NAME.py``.

Any setting is changed with ``--config.a.b=value``; ``--sweep='seed=0,1,2'`` (repeatable) runs the product
of all sweeps, one folder each. A run that was stopped goes on when the same command is given again.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.settings import STAGES, read_settings
from experiments.sweep import expand, run_each

CONFIG = config_flags.DEFINE_config_file("config", None, "The preset, a file under experiments/configs.")
STAGE = flags.DEFINE_list("stage", "all", f"Stages to run, of {', '.join(STAGES)}; all: every one, in this order.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; default runs/NAME, NAME from the config.")
SWEEP = flags.DEFINE_multi_string("sweep", [], "KEY=VALUE,VALUE,...: one run per value; may be given again.")
CACHE = Path(__file__).resolve().parent.parent / ".jax_cache"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"no such argument: {argv[1]!r}; settings are given as --config.a.b=value")
    if CONFIG.value is None:
        raise ValueError("--config is needed, for example --config=experiments/configs/laptop.py")
    stages = STAGES if STAGE.value == ["all"] else STAGE.value
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"--stage is a choice of {', '.join(STAGES)} or all, was given {unknown[0]!r}")
    settings = read_settings(CONFIG.value)
    workdir = Path(WORKDIR.value or Path("runs") / settings.name)
    if SWEEP.value:
        run_each(expand(SWEEP.value, CONFIG.value), workdir, sys.argv)
        return
    if jax.config.jax_platforms == "cpu" or not _accelerator():
        jax.config.update("jax_num_cpu_devices", settings.devices)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file
    from experiments.stages import Run  # after the devices are set: it brings in everything else

    Run(settings, workdir).run(stages)


def _accelerator() -> bool:
    """Whether a GPU build of JAX sits here; asking JAX itself would fix the number of CPU devices."""
    from importlib.util import find_spec

    return find_spec("jax_cuda12_plugin") is not None or find_spec("jax_cuda13_plugin") is not None


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def cli() -> None:
    """Bad input and full disks end in one line; anything else keeps its traceback."""
    try:
        app.run(main)
    except (ValueError, OSError, RuntimeError, FloatingPointError, AttributeError, KeyError, TypeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    cli()
