"""Set-up for all tests: JAX's devices and compilation cache, hypothesis profiles, and the choice of marked tests.

Tests run on two virtual CPU devices. APR_TEST_GPU=1 leaves the platform to JAX and also runs the tests marked gpu.
APR_LONG=1 also runs the tests marked slow and gives property tests more examples. `make test` runs two workers. All
tests of a file run in one worker, since they share fixtures and compiled functions.
"""

import os
import pathlib

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
_GPU = os.environ.get("APR_TEST_GPU", "0") not in ("", "0")
LONG = os.environ.get("APR_LONG", "0") not in ("", "0")

# In the environment, too, for processes that tests start.
if not _GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

if not _GPU:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("long" if LONG else "default")


SHARED = ("experiments",)  # folders whose files share fixtures, so that all of them run in one worker
LONGEST = ("experiments", "test_devices", "test_resume", "test_hf")  # run first, so that the workers end together


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Assign tests to workers by groups, skip tests by their marks, and put the longest groups first."""
    for item in items:
        group = item.path.parent.name if item.path.parent.name in SHARED else item.path.stem
        item.add_marker(pytest.mark.xdist_group(f"{LONGEST.index(group) if group in LONGEST else 9} {group}"))
        if not _GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: APR_TEST_GPU=1"))
        if not LONG and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: APR_LONG=1 (make test-long)"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0][0])


def pytest_collection_finish(session):
    """Stop where xdist sees no groups, as with pytest 9.2 and xdist 3.8: every worker would make all set-ups."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest and pytest-xdist do not go together: install the versions of requirements.lock")
