"""The table of parameters against the fact sheet's numbers."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from flax import nnx

from cityrag_jax.model.layers import Linear

ROOT = pathlib.Path(__file__).parent.parent
TOOL = ROOT / "tools/count_parameters.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("count_parameters", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_i2v_14b_is_counted_part_by_part(tool, capsys):
    models = tool.preset_models("i2v_14b")
    parts = tool.count_parts(models["transformer"])
    assert parts["GeoBranch.layers.attention"] == (4_195_532_800, 40)
    assert parts["blocks.cross_attention"] == (40 * 157_332_480, 40)
    assert parts["text_embedding"] == (47_196_160, 1)
    assert list(parts)[0] == "patch_embedding"
    assert list(parts)[-1] == "TrajectoryEncoder.projection"
    sums = tool.sums(parts)
    assert sums["one block"] == 403_838_464
    assert sums["without branches"] == 16_394_878_784
    assert tool.sums(tool.count_parts(models["autoencoder"]))["all"] == 126_892_531

    tool.print_table("transformer", parts)
    assert "16,394,878,784" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, expected", [("t2v_14b", 14_288_491_584), ("t2v_1_3b", 1_418_996_800)]
)
def test_text_to_video_presets_have_the_published_counts(tool, name, expected):
    parts = tool.count_parts(tool.preset_models(name)["transformer"])
    assert tool.sums(parts)["without branches"] == expected


def test_a_plain_module_is_counted_by_attribute(tool):
    kinds = dict(dtype="float32", param_dtype="float32", axes=(None, None))
    linear = nnx.eval_shape(lambda: Linear(3, 5, rngs=nnx.Rngs(0), **kinds))
    assert tool.count_parts(linear) == {"bias": (5, 1), "kernel": (15, 1)}


def test_the_command_wants_either_a_preset_or_a_config():
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    run = dict(env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, TOOL], **run)
    assert done.returncode and "either --preset or --config" in done.stderr
    done = subprocess.run([sys.executable, TOOL, "--preset=t2v_1_3b"], **run)
    assert done.returncode == 0 and "1,418,996,800" in done.stdout
