"""Every test sees eight CPU devices, and warnings and rank promotion are errors.

Only `pytest -m gpu` leaves JAX the machine's own devices.
"""

import os

from compilation import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        QUICK,
    ]
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu":
        jax.config.update("jax_platforms", "cuda")
    elif jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        # Programs are compiled once for all tests and for the next run; --cache-clear
        # forgets them. A folder for each worker: JAX writes no file at one stroke.
        worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        folder = config.cache.mkdir("compiled") / worker
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# The longest files of the quick tests and of the long ones.
FIRST = (
    "test_train.py",
    "test_toy_weights.py",
    "test_wheel.py",
    "test_toy_end_to_end.py",
    "test_kill.py",
    "test_splash_compile.py",
    "test_distributed_training.py",
    "test_toy_city.py",
)


def pytest_collection_modifyitems(items):
    """Put the longest files first, so that no worker waits for one at the end."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))
