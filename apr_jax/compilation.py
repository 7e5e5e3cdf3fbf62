"""JAX's compilation cache on disk, protected against damaged entries.

JAX 0.10.2 writes an entry in place, so a kill can leave half an entry. JAX compiles again what it cannot read, but
never overwrites an existing file, so every later run would compile a damaged entry again. This module writes entries
atomically and deletes entries that cannot be read. It replaces two functions in JAX's private modules, because there is
no public interface. Where another version of JAX has other names, nothing is replaced.
"""

from pathlib import Path

import jax

from apr_jax.io.files import whole


def use_cache(folder: Path) -> None:
    """Make JAX keep all compiled functions in `folder`, also for later processes. Must be called before the first
    function is compiled."""
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
            return None, None  # JAX's answer for a missing entry: it compiles the function and writes the entry

    def write_whole(cache, key, value):
        path = _entry(cache.path, key)
        if cache.eviction_enabled or path.exists():  # with eviction JAX writes further files
            return write(cache, key, value)
        with whole(path) as part:
            part.write_bytes(value)

    read_or_remove.mended = True
    compilation_cache.get_executable_and_time, LRUCache.put = read_or_remove, write_whole


def _entry(folder: Path | str, key: str) -> Path:
    return Path(str(folder)) / f"{key}-cache"
