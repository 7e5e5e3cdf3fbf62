"""Start-up of JAX for all command lines: the number of devices and the compilation cache.

Both must be set before JAX is first asked for a device, which fixes the number of devices.
"""

import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import jax

from apr_jax.compilation import use_cache

CACHE = Path(__file__).resolve().parent.parent / ".jax_cache"  # in the checkout's folder
# XLA ends a process when a device has waited 40 s for the others. Virtual devices on busy cores may wait longer.
COLLECTIVES_WAIT = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Files that exist where NVIDIA's driver is loaded: on a machine, in a container, under WSL, on a Tegra board.
DRIVER = ("/dev/nvidia*", "/proc/driver/nvidia", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvmap")


def start_devices(count: int, cache: bool = True) -> None:
    """Start JAX with its GPUs, or with `count` virtual CPU devices where there is no GPU. With `cache` all compiled
    functions are kept in the folder `CACHE`."""
    # An unknown flag makes XLA end the process, and the flags were not tried with later versions.
    if set_cpu_devices(count) and jax.__version_info__ < (0, 11):
        given = os.environ.get("XLA_FLAGS", "")
        if COLLECTIVES_WAIT not in given:
            os.environ["XLA_FLAGS"] = f"{COLLECTIVES_WAIT} {given}"
    if cache:
        use_cache(CACHE)


def set_cpu_devices(count: int) -> bool:
    """Give JAX `count` virtual CPU devices where there is no GPU, and return whether it did. Where the environment
    variable JAX_PLATFORMS is set, it decides. Must be called before JAX is asked for a device."""
    if any(name in sys.modules or find_spec(name) for name in PLUGINS):
        asked = jax.config.jax_platforms
        if asked not in (None, "", "cpu") or (not asked and has_driver()):
            return False
        jax.config.update("jax_platforms", "cpu")  # else JAX's CUDA plugin warns of a missing GPU and leaves one device
    jax.config.update("jax_num_cpu_devices", count)
    return True


def has_driver() -> bool:
    """Return whether NVIDIA's driver is loaded."""
    return any(found for pattern in DRIVER for found in Path("/").glob(pattern.removeprefix("/")))


def no_backend(error: Exception) -> str | None:
    """Return one line for the error that JAX raises where no platform of JAX_PLATFORMS is available. Returns None for
    any other error."""
    text, frames = str(error).partition("\n")[0], traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and frames and frames[-1].filename.endswith("xla_bridge.py"):
        text = "none of them is there"  # JAX 0.10.2 fails an assertion in this case
    elif not isinstance(error, RuntimeError) or not text.startswith("Unable to initialize backend"):
        return None
    return f"JAX_PLATFORMS is {jax.config.jax_platforms!r}: {text}; JAX_PLATFORMS=cpu runs on the processor"
