"""JAX's compilation cache on disk, with entries that are written whole and mended when they are damaged.

JAX 0.10.2 writes an entry in place, so that a kill leaves half of it. It recompiles what it cannot read, but never
writes over a file that is there: a damaged entry would be compiled anew by every run. Both are mended in JAX's own
modules, which have no public way in; where another version has other names, nothing is changed.
"""

from pathlib import Path

import jax

from apr_jax.io.files import whole


def use_cache(folder: Path) -> None:
    """Keeps all compiled functions under `folder`; before the first one is compiled."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _mend()


def _mend() -> None:
    try:
        from jax._src import compilation_cache
        from jax._src.lru_cache import LRUCache

        read, write = compilation_cache.get_executable_and_time, LRUCache.put
    except (ImportError, AttributeError):
        return
    if getattr(read, "mended", False):
        return

    def read_or_remove(key, *arguments, **options):
        try:
            return read(key, *arguments, **options)
        except Exception:
            _entry(jax.config.jax_compilation_cache_dir, key).unlink(missing_ok=True)
            return None, None  # as for a key that is not there: it is compiled, and written

    def write_whole(cache, key, value):
        path = _entry(cache.path, key)
        if cache.eviction_enabled or path.exists():  # the first keeps books of its own
            return write(cache, key, value)
        with whole(path) as part:
            part.write_bytes(value)

    read_or_remove.mended = True
    compilation_cache.get_executable_and_time, LRUCache.put = read_or_remove, write_whole


def _entry(folder: Path | str, key: str) -> Path:
    return Path(str(folder)) / f"{key}-cache"
