"""The recipe of the shipped weights, whole, at its smallest size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cityrag_jax.checkpoint import latest_model

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_one_command_makes_weights_from_nothing(tmp_path):
    """And the same command, given again, makes nothing anew."""
    command = [
        *(sys.executable, "tools/toy_weights.py", f"--out={tmp_path}", "--start="),
        *("--size=test", "--cities=1", "--updates=30", "--autoencoder-updates=20"),
        "--transformer-flags=--config.model.geo.view_poses=8",
    ]

    one_device = {n: x for n, x in os.environ.items() if n != "XLA_FLAGS"}

    def run():
        done = subprocess.run(
            command, cwd=ROOT, env=one_device, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run()
    assert "geo + trajectory" in first and "autoencoder alone" in first
    assert set(latest_model(tmp_path / "weights").modules) == {"transformer", "vae"}
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/d/*")}
    assert "geo + trajectory" not in run()
    assert {path: path.stat().st_mtime_ns for path in made} == made
