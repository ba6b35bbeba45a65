"""The benchmark at tiny size: its parts run, fail alone, and count what they say."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import synthetic_city
from flax import nnx

from cityrag_jax.model.layers import MLP

ROOT = pathlib.Path(__file__).parent.parent
TOOL = ROOT / "tools/benchmark.py"
# The tools see one device, as their users do, and compile as quickly as the tests.
ONE = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
ONE_DEVICE = dict(PYTHONPATH=str(ROOT), XLA_FLAGS=ONE)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module
    spec.loader.exec_module(module)
    return module


def check(figures):
    assert figures["seconds"] > 0
    rate = figures["pflop"] / figures["seconds"] * 1e3
    assert figures["tflop_per_s"] == pytest.approx(rate)


def test_the_update_of_a_training_is_timed_by_its_config(tmp_path):
    """Two updates a call; one line of figures, then the table of kernels."""
    command = [sys.executable, ROOT / "tools/benchmark_training.py", "--calls=1"]
    command += [f"--config={ROOT}/configs/toy_city.py:test"]
    command += ["--config.train.updates_per_call=2", f"--profile={tmp_path}"]
    environment = os.environ | ONE_DEVICE
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line, kernels = done.stdout.splitlines()[:2]
    assert "batch 4" in line and "clips/s" in line and "TFLOP/s" in line
    assert " ms in " in kernels


def test_the_command_writes_the_figures_of_its_parts(tmp_path):
    out = tmp_path / "new" / "figures.json"
    command = [sys.executable, TOOL, "--size=tiny", "--repeats=1", "--parts=geo"]
    environment = os.environ | ONE_DEVICE
    done = subprocess.run(
        [*command, f"--out={out}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("geo ") and "TFLOP/s" in done.stdout
    figures = json.loads(out.read_text())["geo"]
    check(figures)
    assert figures["tokens"] == 2 * 1 * 2 and figures["device"] == "cpu"


def test_autoencoder_is_timed_both_ways(benchmark):
    figures = benchmark.time_autoencoder(benchmark.SIZES["tiny"], 1)
    check(figures["encode"])
    check(figures["decode"])


def test_peer_is_timed_on_the_same_operations(benchmark):
    size = benchmark.SIZES["tiny"]
    check(benchmark.time_peer_transformer(size, 1)["eagernative"])
    for part in benchmark.time_peer_autoencoder(size, 1).values():
        check(part)


def test_a_failing_variant_of_the_peer_leaves_its_error(benchmark):
    def broken():
        raise RuntimeError("no such kernel")

    figures = benchmark.time_peer({"good": lambda: None, "bad": broken}, 1, 10)
    check(figures["good"])
    assert figures["bad"] == {"error": "RuntimeError: no such kernel"}


def test_a_failing_part_leaves_the_others_their_figures(
    benchmark, tmp_path, monkeypatch, capsys
):
    good = {"seconds": 2.0, "tflop_per_s": 3.0, "peak_gib": 4.0}

    def run_part(part, size, repeats, timeout_s):
        return {"error": "out of memory"} if part == "geo" else good

    monkeypatch.setattr(benchmark, "run_part", run_part)
    out = tmp_path / "figures.json"
    status = benchmark.COMMAND.call(
        benchmark.main, ["--peer=diffusers", f"--out={out}"]
    )
    results = json.loads(out.read_text())
    assert status == 1
    assert list(results) == ["base", "geo", "vae", "peer_base", "peer_vae"]
    assert results["geo"] == {"error": "out of memory"}
    assert results["vae"] == results["peer_base"] == good
    printed = capsys.readouterr().out
    assert "geo                          failed: out of memory" in printed
    assert "2.0000 s       3.0 TFLOP/s     4.00 GiB" in printed


def test_a_part_that_hangs_is_stopped(benchmark):
    assert "raise --timeout" in benchmark.run_part("base", "tiny", 1, 0.01)["error"]


def test_unknown_parts_are_refused(benchmark, capsys):
    words = ["--parts=base,training"]
    assert benchmark.COMMAND.call(benchmark.main, words) == 2
    assert "no part training; choose from base, geo, vae" in capsys.readouterr().err


def test_random_weights_fill_every_parameter_in_its_own_type(benchmark):
    """Zeros would run faster than weights do, so none may stay at its zero start."""
    kinds = dict(dtype=jax.numpy.bfloat16, param_dtype=jax.numpy.bfloat16)

    def make():
        return MLP((6, 40, 50), jax.nn.silu, **kinds, rngs=nnx.Rngs(0))

    graph, state = benchmark.random_weights(make)
    model = nnx.merge(graph, state)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype == jax.numpy.bfloat16
        assert np.count_nonzero(np.float32(leaf)) > 0.9 * leaf.size
    assert np.float32(model.fc2.kernel[...]).std() == pytest.approx(0.02, rel=0.1)


def test_full_size_is_that_of_the_method(benchmark):
    size = benchmark.SIZES["full"]
    assert size.tokens() == 29_640
    config = benchmark.dit_config(size)
    assert (config.dim, config.num_layers, config.image_dim) == (5120, 40, 1280)


@pytest.mark.long
def test_the_loader_is_timed_beside_the_obvious_way(tmp_path, capsys):
    """Both see the same view; a worker reads without an index and without JAX."""
    spec = importlib.util.spec_from_file_location(
        "benchmark_loader", TOOL.with_name("benchmark_loader.py")
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    pose = synthetic_city.line([0, 0, 2], 30, 1)[0]
    picture = synthetic_city.direction_panorama(pose, 256)
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    tool.main(
        tool.COMMAND.parse([f"--pictures={tmp_path}", "--height=512", "--crops=9"])
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["panoramas"] == 1 and facts["crops_a_second"] > 0
    # A mosaic of smooth pictures, through JPEG twice, differs at its seams alone.
    assert facts["greys_apart"] < 2 and 50 < facts["worker_mib"] < 1000
