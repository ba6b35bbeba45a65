"""Apache Beam writes a city as this process does, from an environment of its own."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from test_importers import (
    DRIVES,
    EVENING,
    MORNING,
    SHORT,
    build,
    photograph,
    same_files,
)

from cityrag_jax.data import shards
from cityrag_jax.data.columns import captures_digest
from cityrag_jax.data.pairs import load_pairs

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = pathlib.Path(sys.prefix, "beam", "bin", "python")  # as the Makefile makes it
PROGRAM = """
import runpy, sys
from cityrag_jax.data import shards
from cityrag_jax.data.columns import captures_digest
from cityrag_jax.data.pairs import load_pairs
shards.SHARD = 10
sys.argv = sys.argv[1:]
try:
    sys.argv[1] = sys.argv[1].replace("Direct", "Undirect")
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 2
    sys.argv[1] = sys.argv[1].replace("Undirect", "Direct")
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_beam_writes_the_same_bytes(tmp_path, monkeypatch):
    """By the command line, five files in a pipeline on this machine."""
    assert PYTHON.exists(), "make .venv/installed-beam, as make test-long does"
    monkeypatch.setattr(shards, "SHARD", 10)
    photos = tmp_path / "photos"
    photograph(photos / "morning", DRIVES[0], MORNING)
    photograph(photos / "evening", DRIVES[1], EVENING)
    words = ["--source=folder", f"--from={photos}", *SHORT]
    build(*words, f"--out={tmp_path / 'alone' / 'munich'}")
    options = "--beam=--runner=BundleBasedDirectRunner"
    command = [PYTHON, "-c", PROGRAM, ROOT / "tools" / "build_city.py", options, *words]
    done = subprocess.run(
        [*map(str, command), f"--out={tmp_path / 'beam' / 'munich'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "error: --beam=--runner=BundleBasedUndirectRunner: Unexpected" in done.stderr
    alone, piped = (tmp_path / name / "munich" for name in ("alone", "beam"))
    # The tables name the version of Arrow that wrote them; digests are of the values.
    same_files(alone, piped, files=5, but=".parquet")
    assert captures_digest(alone) == captures_digest(piped)
    left, right = load_pairs(alone), load_pairs(piped)
    assert len(left) > 0
    for name, column in vars(left).items():
        np.testing.assert_array_equal(column, getattr(right, name))


def test_without_beam_it_is_said_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    words = ["--source=folder", f"--from={tmp_path}", f"--out={tmp_path / 'x'}", *SHORT]
    with pytest.raises(ValueError, match=r"beam/bin/pip install -e '\.\[beam\]'"):
        build(*words, "--beam=--runner=DirectRunner")
    with pytest.raises(ValueError, match="one of them, share an import"):
        build(*words, "--beam=", "--workers=2")
