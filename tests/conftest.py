"""Every test sees eight CPU devices, and warnings and rank promotion are errors.

Only `pytest -m gpu` leaves JAX the machine's own devices.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests spend their time compiling: without LLVM's optimisation that takes a quarter.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu":
        jax.config.update("jax_platforms", "cuda")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def pytest_collection_modifyitems(items):
    """Put the longest file first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_train.py")
