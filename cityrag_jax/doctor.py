"""Say what this machine has, what fits on it, and what is missing:

    python -m cityrag_jax.doctor

Versions, devices and their memory, a product computed on one of them, the weights of
each size of model beside that memory, and every optional package, tried, with the
command that brings it. Ends with 1 if something that every door needs does not work.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import av
import jax
import jax.numpy as jnp

from cityrag_jax.checkpoint import abstract_model, parameters
from cityrag_jax.commands import Command, load_config
from cityrag_jax.parallel import KEPT
from cityrag_jax.training.optimizer import label_parameters
from cityrag_jax.training.tasks import describe_model

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
CONFIGS = ("toy_city", "cityrag_1_3b", "cityrag_14b")
PRODUCT = 2048
# Bytes of a parameter. Muon's are: master weight, momentum, gradient, all float32; Adam
# holds two moments. What is frozen, and what only generates, is bfloat16.
BYTES = {"muon": 12, "adam": 16, "frozen": 2}
GENERATING = 2


@dataclasses.dataclass(frozen=True)
class Extra:
    """A package that some doors need: what it is for, and what installs it."""

    module: str
    purpose: str
    install: str


EXTRAS = (
    Extra("torch", "reads pickles (.pth) of published weights", "cityrag-jax[torch]"),
    Extra("diffusers", "opens exports in PyTorch", "diffusers torch"),
    Extra("jax_cuda13_plugin", "runs on NVIDIA GPUs", "cityrag-jax[cuda13]"),
    Extra("libtpu", "runs on TPUs", "cityrag-jax[tpu]"),
    Extra("starlette", "the map in a browser", "cityrag-jax[ui]"),
    Extra("pytest", "the tests", "cityrag-jax[test]"),
)

COMMAND = Command(__doc__)


def main(given: argparse.Namespace) -> int:
    """Print every section; say what is broken."""
    broken = []
    for title, section in (
        ("versions", describe_versions),
        ("devices", describe_devices),
        ("disk", describe_disk),
        ("weights of a model, in memory", describe_fit),
        ("optional packages", describe_extras),
    ):
        print(f"\n{title}")
        try:
            for line in section():
                print(f"  {line}", flush=True)
        except Exception as error:  # a machine may be broken in any way: that is news
            broken.append(title)
            print(f"  BROKEN: {type(error).__name__}: {first_line(error)}")
    end = f"{', '.join(broken)}: broken." if broken else "All that is needed works."
    print(f"\n{end}")
    return 1 if broken else 0


def describe_versions() -> Iterator[str]:
    """Name Python, the system, and the packages that all stands on."""
    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield f"cityrag_jax in {Path(__file__).parent}"


def describe_devices() -> Iterator[str]:
    """List devices with their memory, and compute something on one."""
    kinds = [device.device_kind for device in jax.devices()]
    memory = memory_of(jax.local_devices()[0])
    for kind in dict.fromkeys(kinds):
        yield f"{kinds.count(kind)} x {kind}, {_gib(memory)} each"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"
    yield f"host: {cores} cores, {_gib(host_memory())}"
    x = jnp.ones((PRODUCT, PRODUCT), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    if not bool((multiply(x) == PRODUCT).all()):
        raise ValueError(f"a product of ones is not {PRODUCT}")
    began = time.monotonic()
    jax.block_until_ready(multiply(x))
    rate = 2 * PRODUCT**3 / (time.monotonic() - began)
    yield f"a product of {PRODUCT} x {PRODUCT} in bfloat16: {rate / 1e9:,.0f} GFLOP/s"


def describe_disk() -> Iterator[str]:
    """Say what is free here, where programs are kept, and if video can be written."""
    yield f"{_gib(shutil.disk_usage('.').free)} free in {Path.cwd()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / KEPT
    kept = next(p for p in (cache, *cache.parents) if p.exists())
    writable = os.access(kept, os.W_OK)
    yield f"compiled programs are kept in {cache}" + ", NOT WRITABLE" * (not writable)
    av.codec.Codec("libx264", "w")
    yield "video is written as H.264"


def describe_fit() -> Iterator[str]:
    """Compare the weights of each config with the devices' memory."""
    memory, count = memory_of(jax.local_devices()[0]), jax.device_count()
    yield f"{'':<14}{'parameters':>16}{'to generate':>24}{'to train, whole state':>32}"
    for name in CONFIGS:
        generating, training, size = bytes_of(name)
        to_generate = _verdict(generating, memory, 1)
        to_train = _verdict(training, memory, count)
        yield f"{name:<14}{size:>16,}{to_generate:>24}{to_train:>32}"
    yield "Activations come on top (14B, 73 frames of 832x480: README, Results)."


def bytes_of(name: str) -> tuple[int, int, int]:
    """Count a config's bytes to generate, to train, and its parameters."""
    config = load_config(f"configs/{name}.py")
    arrays = parameters(abstract_model(describe_model(config)))
    labels = label_parameters(arrays, config.optimizer.frozen)
    sizes = {n: math.prod(x.shape) for n, x in arrays.items()}
    total = sum(sizes.values())
    training = sum(BYTES[labels[n]] * size for n, size in sizes.items())
    return GENERATING * total, training, total


def _verdict(needed: int, memory: int, devices: int) -> str:
    """Say if something that is split over all devices fits."""
    each = needed / devices
    if each < memory:
        return f"{each / GIB:,.1f} GiB: fits"
    return f"{needed / GIB:,.1f} GiB: {math.ceil(needed / memory)} devices"


def describe_extras() -> Iterator[str]:
    """Try every optional package."""
    for extra in EXTRAS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(extra.module)
            found = "works"
        except ModuleNotFoundError:
            found = f"pip install '{extra.install}'"
        except Exception as error:  # half installed, another CUDA, ...
            found = f"BROKEN ({first_line(error)}); pip install '{extra.install}'"
        yield f"{extra.module:<20}{extra.purpose:<44}{found}"


def memory_of(device: jax.Device) -> int:
    """Give the bytes of a device; of a CPU the host's, shared by all such devices."""
    stats = device.memory_stats() or {}
    alone = host_memory() // max(1, jax.local_device_count())
    return stats.get("bytes_limit", alone)


def host_memory() -> int:
    """Give the bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def first_line(error: Exception) -> str:
    """Give the first line of an error."""
    return (str(error).splitlines() or [""])[0][:100]


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    COMMAND.run(main)
