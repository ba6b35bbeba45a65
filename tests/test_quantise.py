"""Folders with int8 kernels: how near, how small, and read by whoever reads folders."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_wan
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from cityrag_jax.batch import Conditions
from cityrag_jax.checkpoint import (
    Bundle,
    abstract_model,
    describe,
    latest_model,
    parameters,
    save_bundle,
    stacked_parameters,
    verify_bundle,
    with_parameters,
)
from cityrag_jax.checkpoint.items import item_arrays, read_some, write_item
from cityrag_jax.convert import bundle as conversion
from cityrag_jax.convert import export_checkpoint
from cityrag_jax.int8 import from_int8, to_int8
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.parallel import make_mesh

ROOT = Path(__file__).parents[1]
CONFIG = DiTConfig(
    dim=128,
    num_heads=2,
    num_layers=3,
    ffn_dim=160,
    in_channels=36,
    freq_dim=128,
    text_dim=8,
    text_len=2,
)
DESCRIPTION = describe(
    WanDiT, CONFIG, ((TrajectoryEncoder, {"hidden": 128}), (GeoBranch, {}))
)
# What reads poses, text rows and latents of few channels: fewer than 128 inputs.
FEW_INPUTS = {
    "branches.0.conv.kernel",
    "branches.1.patch_embedding.kernel",
    "text_embedding.fc1.kernel",
}
FC1 = "blocks.ffn.fc1.kernel"


def random_model(description, seed=0):
    """Every parameter normal; the layers of a stack differ a hundredfold in size."""
    model = abstract_model(description)
    rng = np.random.default_rng(seed)
    values = {}
    for name, x in parameters(model).items():
        value = rng.normal(size=x.shape).astype(np.float32)
        if name.endswith("kernel"):
            value *= np.float32(x.shape[-2] ** -0.5)
        if name in stacked_parameters(model) and name.endswith("kernel"):
            sizes = 10.0 ** np.arange(len(value)) / 100
            value *= sizes.reshape(-1, *[1] * (value.ndim - 1)).astype(np.float32)
        values[name] = jnp.asarray(value)
    return with_parameters(model, values)


@pytest.fixture(scope="module")
def model():
    return random_model(DESCRIPTION)


def save(path, model, dtype="int8"):
    bundle = Bundle({"transformer": model}, {"transformer": DESCRIPTION})
    return save_bundle(path, bundle, dtype=dtype)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save(tmp_path_factory.mktemp("int8") / "m", model)


def load(path, **kinds):
    return latest_model(path, **kinds).modules["transformer"]


def read_item(path):
    stored = item_arrays(path)
    return {n: np.asarray(x) for n, x in read_some(path, stored, stored).items()}


def read_digests(folder, name="transformer"):
    return json.loads((folder / name / "digests.json").read_text())


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), name)


# The rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(200, 24), (3, 3, 3, 8, 16)])
def test_no_weight_moves_by_more_than_half_a_step_of_its_output_channel(rng, shape):
    w = rng.normal(size=shape) * 10.0 ** rng.uniform(-8, 3, size=shape[-1])
    w = jnp.asarray(w, jnp.float32)
    q, scale = to_int8(w)
    assert (q.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, shape[-1:])
    others = tuple(range(w.ndim - 1))
    np.testing.assert_array_equal(np.abs(q).max(others), 127)
    moved = np.abs(np.asarray(from_int8(q, scale) - w)).max(others)
    # Half a step, and the last bits of a float32 division and product of up to 127.
    assert np.all(moved <= np.asarray(scale) * (0.5 + 127 * 2**-22))


def test_halves_go_to_the_even_neighbour():
    column = jnp.array([[0.5], [1.5], [2.5], [-0.5], [-1.5], [127.0]])
    np.testing.assert_array_equal(to_int8(column)[0][:, 0], [0, 2, 2, 0, -2, 127])


def test_a_channel_of_zeros_stays_zeros_and_one_of_nan_stays_loud():
    w = jnp.ones((300, 4)).at[:, 1].set(0).at[2, 2].set(jnp.nan).at[9, 3].set(jnp.inf)
    back = from_int8(*jax.jit(to_int8)(w))
    np.testing.assert_allclose(back[:, 0], 1, rtol=1e-6)
    np.testing.assert_array_equal(back[:, 1], 0)
    assert np.isnan(back[:, 2:]).all()


# The folder ---------------------------------------------------------------------------


def test_kernels_are_near_and_everything_else_is_exact(model, folder):
    true, read = parameters(model), parameters(load(folder))
    for name, x in true.items():
        if not name.endswith("kernel") or name in FEW_INPUTS:
            np.testing.assert_array_equal(np.asarray(read[name]), np.asarray(x), name)
            continue
        # Each layer's largest weight of an output channel is 127 steps.
        largest = np.abs(x).max(axis=-2, keepdims=True)
        moved = np.abs(np.asarray(read[name] - x))
        assert np.all(moved <= largest / 127 * (0.5 + 127 * 2**-22)), name
        assert moved.any(), name


def test_every_layer_has_its_own_scales(folder):
    """Layers a hundred times larger do not take the steps of the small ones."""
    layers = [read_item(folder / "transformer" / f"block_{i:03}") for i in range(3)]
    means = [layer[f"{FC1}.scale"].mean() for layer in layers]
    np.testing.assert_allclose(np.array(means) / means[0], [1, 10, 100], rtol=0.1)
    for layer in layers:
        assert layer[FC1].dtype == np.int8
        np.testing.assert_array_equal(np.abs(layer[FC1].astype(int)).max(0), 127)
        assert layer["blocks.ffn.fc1.bias"].dtype == np.float32


def test_a_folder_is_about_a_quarter_of_float32(model, folder, tmp_path):
    """Its arrays: Orbax's own files come on top, how many depends on its threads."""

    def size(path):
        items = [p for p in (path / "transformer").iterdir() if p.is_dir()]
        arrays = [x for item in items for x in item_arrays(item).values()]
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)

    whole = size(save(tmp_path / "m", model, "float32"))
    assert whole == sum(x.nbytes for x in parameters(model).values())
    # Kernels a quarter; norms, biases, modulation and scales stay float32.
    assert 0.25 < size(folder) / whole < 0.29
    on_disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert on_disk < 0.4 * whole


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 4, 2)])
def test_a_mesh_reads_the_same_as_one_device(folder, sizes, dtype):
    plain = parameters(load(folder, dtype=dtype))
    mesh = make_mesh(*sizes)
    sharded = parameters(load(folder, dtype=dtype, mesh=mesh, verify=True))
    assert_same(plain, sharded)
    q = sharded["blocks.self_attention.q.kernel"]
    assert q.sharding.spec == PartitionSpec(None, ("fsdp",), None)
    # The other way round: here the scales are split as the outputs are.
    o = sharded["blocks.self_attention.o.kernel"]
    assert o.sharding.spec == PartitionSpec(None, None, ("fsdp",))


def test_a_mesh_writes_the_same_as_one_device(model, folder, tmp_path):
    sharded = load(save(tmp_path / "full", model, None), mesh=make_mesh(2, 4, 1))
    assert read_digests(save(tmp_path / "m", sharded)) == read_digests(folder)


def test_storing_again_changes_no_step(folder, tmp_path):
    """A scale may turn in its last bit; the integers do not."""
    again = save(tmp_path / "again", load(folder))
    for item, digests in read_digests(folder).items():
        stored = read_digests(again)[item]
        same = {n for n, digest in digests.items() if stored[n] == digest}
        assert {n for n in digests if not n.endswith("kernel.scale")} <= same


@pytest.mark.parametrize("name", [FC1, f"{FC1}.scale"])
def test_a_flipped_bit_is_found_and_named(folder, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    verify_bundle(copy)
    path = copy / "transformer" / "block_001"
    arrays = {n: x.copy() for n, x in read_item(path).items()}
    arrays[name].view(np.uint8).reshape(-1)[17] ^= 4
    shutil.rmtree(path)
    write_item(path, {n: jnp.asarray(x) for n, x in arrays.items()})
    with pytest.raises(ValueError) as error:
        verify_bundle(copy)
    assert "damaged in 1 places" in str(error.value)
    assert str(error.value).endswith(f"block_001: {name}")
    with pytest.raises(ValueError, match=f"of {len_of(folder)} arrays .*{name}"):
        load(copy, verify=True)


def len_of(folder):
    return sum(map(len, read_digests(folder).values()))


def test_lost_scales_are_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "transformer" / "rest"
    arrays = read_item(path)
    del arrays["head.linear.kernel.scale"]
    shutil.rmtree(path)
    write_item(path, {n: jnp.asarray(x) for n, x in arrays.items()})
    lost = "missing in the checkpoint: head.linear.kernel.scale"
    with pytest.raises(ValueError, match=lost):
        load(copy)
    with pytest.raises(ValueError, match="rest: no head.linear.kernel.scale"):
        verify_bundle(copy)


# Those who read and write folders -----------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_holds_what_is_read_in_full(folder, tmp_path, dtype):
    """As float32 unless asked otherwise, each tensor what `load_bundle` gives."""
    asked = {} if dtype == "float32" else {"dtype": dtype}
    parts = export_checkpoint(folder, tmp_path / "out", "official", **asked)
    tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    assert {x.dtype.name for x in tensors.values()} == {dtype}
    values = parameters(load(folder))
    assert sum(part.parameters for part in parts) == sum(
        x.size for x in values.values()
    )
    fc1 = np.asarray(values[FC1].astype(dtype))
    for layer in range(CONFIG.num_layers):
        np.testing.assert_array_equal(
            tensors[f"blocks.{layer}.ffn.0.weight"].T, fc1[layer]
        )
    scale = np.asarray(values["blocks.self_attention.norm_q.scale"].astype(dtype))
    np.testing.assert_array_equal(tensors["blocks.2.self_attn.norm_q.weight"], scale[2])


SOURCE = DiTConfig(
    dim=128,
    num_heads=2,
    num_layers=2,
    ffn_dim=160,
    in_channels=36,
    freq_dim=32,
    text_dim=24,
    image_dim=80,
)


def convert(source, out, dtype):
    plan = conversion.plan_conversion(
        source, out, dtype=dtype, parts=("transformer", "vae")
    )
    return conversion.convert(plan)


def test_a_conversion_is_what_a_float32_conversion_is_stored_as(tmp_path):
    """To the bit, copied branches too; only the type that it asks to be read in is
    bfloat16. The table counts parameters, its bytes scales too."""
    source = synthetic_wan.write_official(tmp_path / "wan", SOURCE)
    rows = convert(source, tmp_path / "int8", "int8")
    full = convert(source, tmp_path / "float32", "float32")
    for row, whole in zip(rows, full, strict=True):
        assert (row.parameters, row.tensors) == (row.expected, whole.tensors)
        assert row.num_bytes < 0.4 * whole.num_bytes
    verify_bundle(tmp_path / "int8")
    true = latest_model(tmp_path / "float32")
    save_bundle(tmp_path / "again", true, dtype="int8")
    for name in ("transformer", "vae"):
        for item in read_digests(tmp_path / "again", name):
            converted = read_item(tmp_path / "int8" / name / item)
            assert_same(converted, read_item(tmp_path / "again" / name / item))
    q = "branches.1.layers.attention.q.kernel"
    assert f"{q}.scale" in read_digests(tmp_path / "int8")["block_000"]
    assert parameters(load(tmp_path / "int8"))[q].dtype == jnp.bfloat16


def test_a_conversion_finds_what_is_not_finite(tmp_path, monkeypatch):
    name = "blocks.1.ffn.0.weight"
    value = synthetic_wan.value

    def with_nan(asked, *arguments):
        x = value(asked, *arguments)
        if asked == name:
            x[3, 5] = np.nan
        return x

    monkeypatch.setattr(synthetic_wan, "value", with_nan)
    source = synthetic_wan.write_official(tmp_path / "wan", SOURCE)
    with pytest.raises(ValueError, match=f"1 tensors hold NaN .*int8(.|\n)*{name}"):
        convert(source, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def run_tool(*options):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "store_int8.py", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_a_random_block_of_the_14b_moves_by_a_hundredth():
    """Narrow here; 5120 wide it is 1.5 % and 0.3 %: the more weights, the larger their
    largest, and so the steps."""
    figures = run_tool("--random-14b", "--dim=256")
    for dtype, low, high in (("int8", 0.007, 0.016), ("bfloat16", 0.002, 0.005)):
        errors = figures[dtype]["velocity_error"].values()
        assert all(low < error < high for error in errors), figures


def test_the_tool_stores_a_folder_and_says_what_it_lost(model, tmp_path):
    """Figures of the right size: a network of few layers moves by some hundredths."""
    save(tmp_path / "m", model, "float32")
    figures = run_tool(f"--checkpoint={tmp_path / 'm'}", f"--out={tmp_path / 'int8'}")
    assert all(1e-4 < e < 0.05 for e in figures["velocity_error"].values())
    verify_bundle(tmp_path / "int8")


# In memory ----------------------------------------------------------------------------

STACKED = ("transformer.blocks.*", "transformer.branches.*")


def predict(model, x):
    """Latents' velocity under both branches, and the gradient by the latents."""
    conditions = Conditions(
        text=jnp.ones((1, 2, 8)),
        image=None,
        first_frame=jnp.repeat(x[..., :1], 20, axis=-1),
        geo_latents=1 - x,
        geo_length=jnp.full(1, 2, jnp.int32),
        keep_geo=jnp.ones(1),
        poses=jnp.broadcast_to(jnp.eye(4), (1, 5, 4, 4)),
        keep_pose=jnp.ones(1),
    )

    def loss(x, model):
        given = jnp.concatenate([x, conditions.first_frame], axis=-1)
        prepared = model.prepare(conditions)
        made = model(given, jnp.full(1, 500.0), conditions.text, None, prepared)
        return jnp.sum(made * jnp.cos(made)), made

    (_, made), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, model)
    return made, gradient


def test_kernels_that_stay_int8_in_memory_compute_the_same(model, folder, tmp_path):
    """As if multiplied out when they were read, forward and backward, to the bit.

    So does what is quantised as it is read, and what a mesh holds in parts.
    """
    x = jax.random.normal(jax.random.key(0), (1, 2, 4, 4, 16))
    dense = load(folder, dtype=jnp.float32)
    held = load(folder, dtype=jnp.float32, int8=STACKED)
    arrays = parameters(held)
    for name, value in parameters(dense).items():
        matrix = name in stacked_parameters(dense) and name.endswith("kernel")
        assert (arrays[name].dtype == jnp.int8) == matrix, name
        assert (f"{name}.scale" in arrays) == matrix, name
        assert matrix or np.array_equal(arrays[name], value)
    for one, other in zip(predict(held, x), predict(dense, x), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(one).max() > 0
    plain = save(tmp_path / "plain", model, "float32")
    kinds = dict(dtype=jnp.float32, int8=STACKED, mesh=make_mesh(1, 4, 2))
    sharded = parameters(load(plain, **kinds))
    coarse = {n: x for n, x in arrays.items() if n in sharded and x.dtype == jnp.int8}
    coarse |= {f"{n}.scale": arrays[f"{n}.scale"] for n in coarse}
    assert_same(coarse, {n: sharded[n] for n in coarse})
    split = PartitionSpec(None, ("fsdp",))
    assert sharded["blocks.self_attention.o.kernel.scale"].sharding.spec == split
    again = save(tmp_path / "again", held, None)  # written as it is held
    read = load(again, dtype=jnp.float32, int8=STACKED)
    assert_same(arrays, parameters(read))
    half = save(tmp_path / "half", held, "bfloat16")
    wanted = {n: x.astype(jnp.bfloat16) for n, x in parameters(dense).items()}
    assert_same(wanted, parameters(load(half, dtype=jnp.bfloat16)))
