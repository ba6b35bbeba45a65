"""Two processes open one bundle; each reads its own shards, and they are right.

The processes are this file run as a script, with two CPU devices each.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cityrag_jax.checkpoint import (
    Bundle,
    describe,
    items,
    load_bundle,
    new_model,
    parameters,
    save_bundle,
)
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.parallel import make_mesh

pytestmark = pytest.mark.long

TOOL = Path(__file__).parents[1] / "tools" / "time_checkpoint.py"
PROCESSES, DEVICES = 2, 2
CONFIG = DiTConfig(
    dim=512,
    num_heads=4,
    num_layers=3,
    ffn_dim=2048,
    in_channels=36,
    freq_dim=64,
    text_dim=128,
    text_len=2,
)
DESCRIPTION = describe(
    WanDiT, CONFIG, ((TrajectoryEncoder, {"hidden": 16}), (GeoBranch, {}))
)


@pytest.fixture(scope="module", params=["float32", "int8"])
def folder(tmp_path_factory, request):
    """A bundle and what it holds; chunks of as many weights as those of 14B, a hundred
    times fewer."""
    folder = tmp_path_factory.mktemp("processes")
    model = new_model(DESCRIPTION, seed=5)
    bundle = Bundle({"transformer": model}, {"transformer": DESCRIPTION})
    smaller = 100 * 4 // np.dtype(request.param).itemsize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items, "CHUNK_BYTES", items.CHUNK_BYTES // smaller)
        save_bundle(folder / "m", bundle, dtype=request.param)
    if request.param == "int8":  # what one process makes of it
        model = load_bundle(folder / "m").modules["transformer"]
    np.savez(folder / "expected.npz", **parameters(model))
    yield folder / "m"
    shutil.rmtree(folder)


@pytest.mark.parametrize("verify", [False, True])
def test_every_process_reads_its_part(folder, verify):
    reports = _run(
        lambda address, process: [__file__, folder, address, process, verify]
    )
    with np.load(folder.with_name("expected.npz")) as expected:
        count = len(expected)
    assert [r["shards"] for r in reports] == [DEVICES * count] * PROCESSES
    for report in reports:
        assert report["largest_difference"] == 0
        # Its half of the kernels, vectors of which every device has a copy, Orbax's
        # notes and the index of chunks: measured 0.53 to 0.60.
        assert 0.4 * _stored(folder) < report["bytes_read"] < 0.7 * _stored(folder)


def test_the_tool_times_reading_and_a_step(folder):
    options = [f"--checkpoint={folder}", "--dtype=float32", "--frames=9"]
    options += ["--height=32", "--width=32", f"--fsdp={PROCESSES * DEVICES}"]
    reports = _run(lambda address, process: [TOOL, *options, "--distributed"])
    for report in reports:
        assert report["devices"] == f"{PROCESSES * DEVICES} x cpu"
        assert report["finite"] and len(report["step_s"]) == 2
        read = report["read_by_this_process"] * 1e9  # rounded to 10 MB
        assert 0.3 * _stored(folder) < read < 0.75 * _stored(folder)


def _stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def _run(arguments) -> list[dict]:
    """Start all processes on `arguments(address, process)`; give what they print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    count = f"--xla_force_host_platform_device_count={DEVICES}"
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments(address, process))],
            env={
                **os.environ,
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(PROCESSES),
                "JAX_PROCESS_ID": str(process),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, ended, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def _bytes_read() -> int:
    """Read how many bytes this process has asked of files (Linux)."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def _report(path: str, verify: bool) -> dict:
    mesh = make_mesh(fsdp=jax.device_count())
    bundle = load_bundle(path, mesh=mesh, verify=verify)
    before = _bytes_read()
    found = parameters(bundle.modules["transformer"])
    jax.block_until_ready(found)
    after = _bytes_read()
    with np.load(Path(path).with_name("expected.npz")) as expected:
        pairs = [
            (shard.data, expected[name][shard.index])
            for name, x in found.items()
            for shard in x.addressable_shards
        ]
    return {
        "bytes_read": after - before,
        "shards": len(pairs),
        "largest_difference": float(max(np.abs(a - b).max() for a, b in pairs)),
    }


if __name__ == "__main__":
    path, address, process, verify = sys.argv[1:]
    jax.distributed.initialize(address, PROCESSES, int(process))
    print(json.dumps(_report(path, verify == "True")), flush=True)
    jax.distributed.shutdown()
