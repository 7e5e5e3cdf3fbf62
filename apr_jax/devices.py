"""How JAX is started by all command lines: how many devices it has, where its compiled functions are kept.

It is told before JAX is asked for a device: asking fixes their number.
"""

import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import jax

from apr_jax.compilation import use_cache

CACHE = Path(__file__).resolve().parent.parent / ".jax_cache"  # of a checkout
# XLA ends a process whose devices have waited 40 s for each other, which virtual ones on busy cores may.
COLLECTIVES_WAIT = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# What NVIDIA's driver puts there: on a machine, in a container, under WSL, on a Tegra board.
DRIVER = ("/dev/nvidia*", "/proc/driver/nvidia", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvmap")


def start_devices(count: int, cache: bool = True) -> None:
    """Starts JAX with its GPUs, or with `count` virtual devices of the CPU where it finds none. With `cache` all
    compiled functions are kept in the checkout's `CACHE`."""
    if set_cpu_devices(count) and jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process, and
        given = os.environ.get("XLA_FLAGS", "")  # later versions were not tried
        if COLLECTIVES_WAIT not in given:
            os.environ["XLA_FLAGS"] = f"{COLLECTIVES_WAIT} {given}"
    if cache:
        use_cache(CACHE)


def set_cpu_devices(count: int) -> bool:
    """Makes `count` virtual devices of the CPU where JAX finds no GPU; before its first device is asked for. Whether it
    did. JAX_PLATFORMS decides where it is set."""
    if any(name in sys.modules or find_spec(name) for name in PLUGINS):
        asked = jax.config.jax_platforms
        if asked not in (None, "", "cpu") or (not asked and has_driver()):
            return False
        jax.config.update("jax_platforms", "cpu")  # a plugin without a GPU would complain, and leave one device
    jax.config.update("jax_num_cpu_devices", count)
    return True


def has_driver() -> bool:
    """Whether a driver of NVIDIA's is loaded."""
    return any(found for pattern in DRIVER for found in Path("/").glob(pattern.removeprefix("/")))


def no_backend(error: Exception) -> str | None:
    """One line where JAX has nothing to run on, as JAX_PLATFORMS asks for it; None for any other error."""
    text, frames = str(error).partition("\n")[0], traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and frames and frames[-1].filename.endswith("xla_bridge.py"):
        text = "none of them is there"  # JAX 0.10.2 asserts that one is
    elif not isinstance(error, RuntimeError) or not text.startswith("Unable to initialize backend"):
        return None
    return f"JAX_PLATFORMS is {jax.config.jax_platforms!r}: {text}; JAX_PLATFORMS=cpu runs on the processor"
