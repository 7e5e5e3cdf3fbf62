"""The compilation cache: a damaged entry is compiled and written again."""

import itertools
import subprocess
import sys

from tests.experiments.conftest import ROOT

PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax import monitoring
if sys.argv[2] == "mended":
    from apr_jax.compilation import use_cache
    use_cache(Path(sys.argv[1]))
else:
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
total = sum(float(jax.jit(lambda x: (x * 2 + n).sum())(jnp.arange(5.0))) for n in range(5))
print(total, events.count("cache_hits"), len(events) > 0)
"""


def run(folder, how="mended"):
    """Run a tiny program in another process and return (its result, the number of functions found in the cache).
    `how` is "mended" for our cache, or another word for JAX's own."""
    command = [sys.executable, "-c", PROGRAM, str(folder), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    total, hits, _ = done.stdout.split()
    assert "compilation cache" not in done.stderr or how != "mended"
    return float(total), int(hits)


def middle(content):
    """Return the content with its middle third overwritten."""
    third = len(content) // 3
    return content[:third] + b"\xff" * third + content[2 * third :]


DAMAGE = [lambda content: content[: len(content) // 2], lambda content: b"x" * len(content), lambda _: b"", middle]


def test_a_damaged_entry_is_written_again(tmp_path):
    """Entries are cut short, overwritten, emptied, or changed in their middle."""
    assert run(tmp_path) == (150.0, 0)
    entries = sorted(tmp_path.glob("*-cache"))
    assert len(entries) >= len(DAMAGE) and not list(tmp_path.glob("*.part"))
    assert run(tmp_path) == (150.0, len(entries))
    for path, damage in zip(entries, itertools.cycle(DAMAGE)):
        path.write_bytes(damage(path.read_bytes()))
    assert run(tmp_path) == (150.0, 0)
    assert run(tmp_path) == (150.0, len(entries))
    assert sorted(tmp_path.glob("*-cache")) == entries
