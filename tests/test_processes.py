"""Two processes open one bundle; each reads its own shards, and they are right.

The processes are this file run as a script, with two CPU devices each.
"""

import json
import os
import re
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
from cityrag_jax.parallel import make_mesh

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
DESCRIPTION = describe(WanDiT, CONFIG, ((GeoBranch, {}),))


@pytest.mark.long
def test_every_process_reads_its_part(tmp_path, monkeypatch):
    """Kernels are cut into chunks as those of 14B are, a hundred times smaller."""
    monkeypatch.setattr(items, "CHUNK_BYTES", items.CHUNK_BYTES // 100)
    model = new_model(DESCRIPTION, seed=5)
    np.savez(tmp_path / "expected.npz", **parameters(model))
    bundle = Bundle({"transformer": model}, {"transformer": DESCRIPTION})
    save_bundle(tmp_path / "m", bundle)
    stored = sum(path.stat().st_size for path in (tmp_path / "m").rglob("*"))
    for verify in (False, True):
        reports = _run(tmp_path / "m", verify)
        assert [r["shards"] for r in reports] == [DEVICES * len(parameters(model))] * 2
        assert all(r["largest_difference"] == 0 for r in reports)
        for report in reports:
            # Its half of the kernels, vectors of which every device has a copy, Orbax's
            # notes and the index of chunks: measured 0.53 to 0.60.
            assert 0.4 * stored < report["bytes_read"] < 0.7 * stored, report


def _run(path: Path, verify: bool) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(path), address, str(i), str(int(verify))],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
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
    print(json.dumps(_report(path, verify == "1")), flush=True)
    jax.distributed.shutdown()
