"""Settings of every test."""

import atexit
import os
import shutil
import tempfile

# Numbers are compared with those of a CPU; and with libtpu installed JAX would look for TPUs first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jaxtyping
import pytest

# Examples are few, because shapes are fixed and seeds vary, and the same on every run; compiling takes any time.
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=8)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=200)
hypothesis.settings.load_profile("quick")  # --hypothesis-profile=thorough looks for what the few do not find

# Arrays of different rank do not broadcast unless someone wrote that they should: a missing axis is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Runs of the same program compile it once for the session, also in other processes of it. Kept in the environment, so
# that pytest's workers and programs that tests start share it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jmoe-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_configure(config):
    """Has quick tests compile quickly: their arrays are tiny, and most of their time is the compiler's."""
    if config.option.markexpr == "not slow":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for programs that tests start
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def untyped(monkeypatch):
    """Turns jaxtyping's checks off, as they are for users: then it is our own sentence that refuses an argument."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
