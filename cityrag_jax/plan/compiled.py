"""The real update, compiled ahead of time for TPUs that are not there.

libtpu holds the compiler and the shapes of the machines; it needs no TPU. It may be
loaded once in a process, whose other devices are simulated on the CPU.
"""

import dataclasses
import importlib.util
import os
import re
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.parallel import fill_mesh, layout, make_mesh
from cityrag_jax.plan.chips import Topology
from cityrag_jax.plan.collectives import Collective, collectives
from cityrag_jax.training.program import Program

ASIDE = Path(sys.prefix, "tpu", "libtpu", "libtpu.so")  # where `make` puts it
# Without its search for the fastest convolutions the compiler is done ten times sooner;
# memory came out the same (2.23 GB, to 66 kB, for the autoencoder's widest one).
QUICK = {"exec_time_optimization_effort": -1.0}
# libtpu 0.0.42 aborts where it gives a TPU7x's sums to its sparse cores ("Check failed:
# std::abs(inc) < core_count()"); the tensor cores' own way is planned.
WITHOUT_SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "false"
    for kind in ("all_reduce", "reduce_scatter", "all_gather")
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of an update: bytes of a device, and who sends what.

    Where it did not fit, `asked` and `capacity` are the bytes in its refusal, and there
    is nothing else.
    """

    seconds: float
    arguments: int = 0
    temporaries: int = 0
    code: int = 0
    host: int = 0
    sent: tuple[Collective, ...] = ()
    asked: float = 0.0
    capacity: float = 0.0

    @property
    def peak(self) -> float:
        """Give the bytes that a device needs at once; results lie on the arguments."""
        return self.asked or self.arguments + self.temporaries + self.code


def pretend(topology: Topology) -> None:
    """Let this process see a topology's devices; call before any device is asked for.

    TPUs are the compiler's own. GPUs are simulated on the CPU: nothing is compiled for
    them, only shapes are laid out. Raises ValueError where the compiler is missing.
    """
    jax.config.update("jax_platforms", "cpu")
    if not topology.chip.is_tpu:
        count = f"--xla_force_host_platform_device_count={topology.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        return
    if ASIDE.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(ASIDE))
    elif importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"There is no libtpu, neither installed nor at {ASIDE}; to plan for "
            f"{topology.written}, run `make .venv/installed-tests` on Linux, x86-64."
        )
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # ask no cloud service what this machine is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }


def planned_mesh(config: ConfigDict, topology: Topology) -> Mesh | None:
    """Lay a config's mesh over a topology; None to train on one device.

    Raises ValueError where their counts of devices differ.
    """
    sizes = fill_mesh(dict(config.train.mesh), topology.devices)
    if topology.devices == 1 and set(sizes.values()) == {1}:
        return None
    devices = jax.devices()
    if topology.chip.is_tpu:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.written
        ).devices
    return make_mesh(**sizes, devices=devices)


def compile_update(
    program: Program, mesh: Mesh, config: ConfigDict, topology: Topology
) -> Compiled:
    """Compile a program's update, and read memory and collectives off the result."""
    began = time.monotonic()
    options = QUICK | (WITHOUT_SPARSE_CORES if topology.chip.devices > 1 else {})
    with layout(mesh, dict(config.train.rules)):
        lowered = program.update.lower(*program.arguments)
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            asked, capacity = _refusal(str(error))
            if not asked:
                raise
            took = time.monotonic() - began
            return Compiled(took, asked=asked, capacity=capacity)
    memory = compiled.memory_analysis()
    host = (
        memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes
        + memory.host_temp_size_in_bytes
    )
    return Compiled(
        seconds=time.monotonic() - began,
        arguments=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        # Those in the host's memory are counted in: 112 GiB compiled for a chip of 95.
        temporaries=memory.temp_size_in_bytes - memory.host_temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        host=host,
        sent=tuple(collectives(compiled.as_text())),
    )


def _refusal(message: str) -> tuple[float, float]:
    """Read bytes asked for and bytes there are from the compiler's refusal, else 0."""
    found = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", message)
    if found is None:
        return 0.0, 0.0
    size = {"K": 2**10, "M": 2**20, "G": 2**30}
    asked, unit, capacity, other = found.groups()
    return float(asked) * size[unit], float(capacity) * size[other]
