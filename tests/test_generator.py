"""Generation on a mesh against one device, and models that are read for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import (
    COMPUTING,
    Bundle,
    abstract_model,
    abstract_parameters,
    describe,
    latest_model,
    new_model,
    parameter_shardings,
    parameters,
    save_bundle,
    with_parameters,
)
from cityrag_jax.generator import Generator, open_mesh, read_mesh
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import layout
from cityrag_jax.sampling import Sampler

DIT = DiTConfig(
    dim=64,
    num_heads=8,
    num_layers=2,
    ffn_dim=48,
    in_channels=36,
    freq_dim=32,
    text_dim=8,
    text_len=1,
)
BRANCHES = ((TrajectoryEncoder, dict(hidden=16)), (GeoBranch, {}))
SAMPLER = Sampler(3, guidance="joint", scales=(2.0,))


def bundle_of_no_zeros(mesh=None, config: DiTConfig = DIT) -> Bundle:
    """A model in which every condition changes the velocity, laid out on a mesh."""
    told = {
        "transformer": describe(WanDiT, config, BRANCHES),
        "vae": describe(WanVAE, VAEConfig(base_dim=4, num_res_blocks=1)),
    }
    empty = abstract_model(told["transformer"])
    rng = np.random.default_rng(0)
    values = {
        name: jax.device_put(rng.normal(0, 0.2, x.shape).astype(x.dtype), x.sharding)
        for name, x in abstract_parameters(
            empty, parameter_shardings(empty, mesh)
        ).items()
    }
    vae = new_model(told["vae"], 0)
    if mesh is not None:
        places = parameter_shardings(vae, mesh)
        vae = with_parameters(vae, jax.device_put(parameters(vae), places))
    modules = {"transformer": with_parameters(empty, values), "vae": vae}
    return Bundle(modules, told, np.ones((1, 8), np.float32))


@pytest.fixture(scope="module")
def clips() -> Clip:
    """Two clips of 9 frames: 36 tokens, which do not divide over 8 devices."""
    rng = np.random.default_rng(1)
    poses = rng.normal(size=(2, 9, 4, 4)).astype(np.float32)
    return Clip(
        frames=rng.integers(256, size=(2, 1, 32, 96, 3)).astype(np.uint8),
        first_from_camera=poses,
        condition=rng.integers(256, size=(2, 13, 32, 96, 3)).astype(np.uint8),
        condition_length=np.array([13, 6], np.int32),
        clip_id=np.array([5, 6], np.uint32),
    )


@pytest.fixture(scope="module")
def alone(clips) -> np.ndarray:
    return Generator(bundle_of_no_zeros(), SAMPLER)(clips, 7)


@pytest.mark.parametrize(
    "sizes",
    [
        "fsdp:2,sequence:4",
        *(
            pytest.param(sizes, marks=pytest.mark.long)
            for sizes in ("sequence:2", "sequence:4", "data:2,sequence:2", "sequence:8")
        ),
    ],
)
def test_a_mesh_makes_the_video_of_one_device(clips, alone, sizes):
    """The noise is the same; sums in another order round to another 255th here and
    there: never by more than one, and in less than one value of a thousand.
    """
    mesh = open_mesh(read_mesh(sizes))
    with layout(mesh):
        bundle = bundle_of_no_zeros(mesh)
    made = Generator(bundle, SAMPLER, mesh)(clips, 7)
    difference = np.abs(made.astype(int) - alone.astype(int))
    assert alone.std() > 5
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_a_condition_that_was_begun_gives_the_same_bytes(clips, alone):
    generator = Generator(bundle_of_no_zeros(), SAMPLER)
    begun = generator.begin(clips)
    unseen = dataclasses.replace(clips, condition=np.zeros_like(clips.condition))
    np.testing.assert_array_equal(generator(unseen, 7, begun), alone)


def test_numbers_that_are_not_finite_make_no_video(clips):
    """Neither of latents nor of what the autoencoder makes of sound ones."""
    bundle = bundle_of_no_zeros()
    broken = parameters(bundle.modules["transformer"])
    broken["head.linear.bias"] = broken["head.linear.bias"].at[0].set(jnp.nan)
    modules = dict(bundle.modules)
    modules["transformer"] = with_parameters(modules["transformer"], broken)
    generator = Generator(dataclasses.replace(bundle, modules=modules), SAMPLER)
    with pytest.raises(FloatingPointError, match="2 of 2 clips.*not finite from new"):
        generator(clips, 7)


def test_meshes_are_read_and_use_the_first_devices():
    assert read_mesh("sequence:4") == dict(data=1, fsdp=1, sequence=4)
    assert read_mesh("data:2,sequence:-1") == dict(data=2, fsdp=1, sequence=-1)
    assert open_mesh(read_mesh("")) is None
    assert dict(open_mesh(read_mesh("data:2,sequence:-1")).shape)["sequence"] == 4
    assert list(open_mesh(read_mesh("sequence:4")).devices.flat) == jax.devices()[:4]
    for wrong in ("rows:2", "sequence", "sequence:two", "4"):
        with pytest.raises(ValueError, match=f"--mesh={wrong}: .* as in --mesh=seq"):
            read_mesh(wrong)
    with pytest.raises(ValueError, match="needs 16 devices, there are 8"):
        open_mesh(read_mesh("sequence:16"))
    with pytest.raises(ValueError, match="sizes are 1 or more"):
        open_mesh(read_mesh("sequence:0"))


def test_a_float32_model_is_read_in_the_types_that_it_computes_in(tmp_path):
    """Half of the memory for linears, and the same bits: they cast anyway."""
    config = dataclasses.replace(DIT, dtype=jnp.bfloat16)
    bundle = bundle_of_no_zeros(config=config)
    told = dataclasses.replace(bundle, modules=dict(bundle.modules))
    save_bundle(tmp_path / "model", told)
    whole = latest_model(tmp_path / "model").modules["transformer"]
    lean = latest_model(tmp_path / "model", dtype=COMPUTING).modules["transformer"]
    types = {name: x.dtype for name, x in parameters(lean).items()}
    for name in ("blocks.ffn.fc1.kernel", "branches.1.layers.attention.q.bias"):
        assert types[name] == jnp.bfloat16
    for name in (
        *("head.linear.kernel", "time_projection.kernel", "blocks.modulation"),
        *("blocks.self_attention.norm_q.scale", "branches.0.projection.kernel"),
    ):
        assert types[name] == jnp.float32
    assert {x.dtype for x in parameters(whole).values()} == {jnp.dtype("float32")}
    latents = jax.random.normal(jax.random.key(0), (1, 3, 4, 6, 36))
    arguments = latents, jnp.array([500.0]), jnp.ones((1, 1, 8))
    forward = jax.jit(lambda model: model(*arguments))
    np.testing.assert_array_equal(forward(lean), forward(whole))


def test_a_bundle_that_cannot_generate_is_refused():
    """With what it lacks; the parameters are never looked at."""
    vae = abstract_model(describe(WanVAE, VAEConfig(base_dim=4)))
    with pytest.raises(ValueError, match="lacks transformer; generation needs"):
        Generator(Bundle({"vae": vae}, {}), Sampler())
    both = {"vae": vae, "transformer": vae}
    with pytest.raises(ValueError, match="new lacks text features"):
        Generator(Bundle(both, {}), Sampler())
