"""Set-up for all tests: where JAX runs, its compile cache, hypothesis profiles, and which marked tests run.

APR_TEST_GPU=1 leaves the platform to JAX and runs the tests marked gpu; APR_LONG=1 runs those marked slow and gives
property tests more examples. `make test` runs two workers; a file's tests share one, since they share what it set up.
"""

import os
import pathlib

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
_GPU = os.environ.get("APR_TEST_GPU", "0") not in ("", "0")
LONG = os.environ.get("APR_LONG", "0") not in ("", "0")

# In the environment too, so that processes that tests start get the same.
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


SHARED = ("experiments",)  # folders whose files share what they set up, too
LONGEST = ("experiments", "test_devices", "test_resume", "test_hf")  # begun first, or a worker ends with them alone


def pytest_collection_modifyitems(items):
    for item in items:
        group = item.path.parent.name if item.path.parent.name in SHARED else item.path.stem
        item.add_marker(pytest.mark.xdist_group(f"{LONGEST.index(group) if group in LONGEST else 9} {group}"))
        if not _GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: APR_TEST_GPU=1"))
        if not LONG and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="long form: APR_LONG=1 (make test-long)"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0][0])
