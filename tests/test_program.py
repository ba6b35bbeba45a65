"""The program of a training: abstract, whole, and the one that the trainer runs."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_city
from jax.sharding import NamedSharding

from cityrag_jax import train as trainer
from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import (
    Bundle,
    abstract_model,
    draw_parameters,
    latest_model,
    new_model,
    parameter_shardings,
    parameters,
    save_bundle,
)
from cityrag_jax.parallel import make_mesh
from cityrag_jax.training import start as start_values
from cityrag_jax.training.optimizer import split_frozen
from cityrag_jax.training.program import abstract_clips, assumed_start, make_program
from cityrag_jax.training.tasks import describe_model, make_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A city, an autoencoder and a model to start from."""
    folder = tmp_path_factory.mktemp("program")
    training_city.build_city(folder / "city")
    training_city.save_vae(folder / "vae")
    vae = latest_model(folder / "vae")
    drawn = describe_model(_config(folder))
    modules = {"transformer": new_model(drawn, 0), "vae": vae.modules["vae"]}
    described = vae.descriptions | {"transformer": drawn}
    text = np.ones((1, 8), np.float32)
    save_bundle(folder / "started", Bundle(modules, described, text))
    return folder


def _config(folder, **changes):
    paths = dict(data__city=str(folder / "city"), model__vae=str(folder / "vae"))
    few = dict(eval__draws=1, eval__noise_levels=())
    return training_city.get_config("toy_city", **paths | few | changes)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_14b_is_a_program_without_values_or_files():
    """Encoders and prompt are arguments: constants are tables of 2.2 MB, no more."""
    config = training_city.get_config("cityrag_14b", None)
    mesh = make_mesh(data=1, fsdp=4, sequence=2)
    program = make_program(config, mesh, assumed_start(config))
    leaves = jax.tree.leaves(program.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    assert all(isinstance(x.sharding, NamedSharding) for x in leaves)
    assert _bytes(program.state.params) == pytest.approx(4 * 14.35e9, rel=1e-3)
    assert _bytes(program.frozen) == pytest.approx(2 * 6.35e9, rel=1e-3)
    kinds = {n: x.dtype for n, x in program.frozen.items() if x.dtype != jnp.bfloat16}
    assert set(kinds.values()) == {jnp.dtype("float32")}
    assert all("norm" in name for name in kinds)  # linears compute in bfloat16
    assert program.batch.frames.shape == (32, 73, 480, 832, 3)
    with jax.set_mesh(mesh):
        traced = program.update.trace(*program.arguments)
        assert _bytes(traced.jaxpr.consts) < 4e6  # the prompt alone is 8.4 MB
        lowered = traced.lower()
    state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(
        lambda x: x.shape, program.state
    )
    assert metrics["loss"].shape == (1,)


def test_one_card_holds_the_14b_with_an_int8_base():
    """Head and time embedding compute in float32, and are frozen in it."""
    config = training_city.get_config("cityrag_14b", "one_gpu80")
    program = make_program(config, None, assumed_start(config))
    trained = sum(x.size for x in program.state.params.values())
    assert trained == pytest.approx(4.30e9, rel=1e-3)
    # Momentum is half of what it belongs to.
    assert _bytes(program.state) == pytest.approx((4 + 2) * trained, rel=5e-3)
    matrices = [x for x in program.frozen.values() if x.dtype == jnp.int8]
    assert sum(x.size for x in matrices) == pytest.approx(16.15e9, rel=1e-3)
    assert _bytes(program.frozen) < 1.06 * 16.15e9
    for name in ("head.linear.kernel", "time_projection.kernel", "blocks.modulation"):
        assert program.frozen[name].dtype == jnp.float32


class _LookingUpdate:
    """In place of the jitted update: looks at its arguments and changes nothing."""

    def __init__(self, look):
        self.look = look

    def lower(self, *arguments):
        return self

    def compile(self):
        return self

    def __call__(self, *values):
        self.look(*values)
        nothing = dict.fromkeys(("loss", "gradient_norm", "refused"), jnp.zeros(1))
        return values[0], nothing


def _look(monkeypatch, config, workdir, look):
    """Run a training of one update, which looks at its arguments and does nothing."""

    def make(*given, **kinds):
        program = make_program(*given, **kinds)
        update = _LookingUpdate(functools.partial(look, program))
        return dataclasses.replace(program, update=update)

    monkeypatch.setattr(trainer, "make_program", make)
    trainer.train(config, workdir)


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes, pool", [((1, 1, 1), 0), ((2, 2, 2), 0), ((2, 2, 2), 8)]
)
def test_values_are_what_the_program_says(folder, tmp_path, monkeypatch, sizes, pool):
    """Shape, type and shards of every argument: what is planned is what runs."""
    mesh = dict(zip(("data", "fsdp", "sequence"), sizes, strict=True))
    config = _config(
        folder,
        **{f"train__mesh__{name}": size for name, size in mesh.items()},
        train__steps=1,
        train__pool=pool,
        train__pool_start=0,
        optimizer__frozen=("text_embedding.*",),
    )

    def look(program, *values):
        seen.append(program)
        assert jax.tree.structure(values) == jax.tree.structure(program.arguments)
        for value, wanted in zip(
            jax.tree.leaves(values), jax.tree.leaves(program.arguments), strict=True
        ):
            assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
            if isinstance(value, jax.Array):
                assert value.sharding.is_equivalent_to(wanted.sharding, value.ndim)

    seen = []
    _look(monkeypatch, config, tmp_path, look)
    assert len(seen) == 1


def test_the_start_model_is_garbage_once_training_starts(folder, tmp_path, monkeypatch):
    """Neither task nor trainer keeps it: at 14B it would hold 41 GB."""
    config = _config(
        folder,
        train__steps=1,
        train__init_from=str(folder / "started"),
        train__pool=0,
    )
    kept, seen = [], []

    def read(*given):
        start = start_values.read_start(*given)
        kept.extend([weakref.ref(start), weakref.ref(start.modules["transformer"])])
        return start

    def look(program, state, *others):
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        shape = state.params["branches.1.layers.attention.q.kernel"].shape
        held = {id(x) for x in jax.tree.leaves(state) if x.shape == shape}
        alive = {id(x) for x in jax.live_arrays() if x.shape == shape}
        assert alive - before == held - before
        seen.append(held)

    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    monkeypatch.setattr(trainer, "read_start", read)
    _look(monkeypatch, config, tmp_path, look)
    assert len(kept) == 2 and len(seen) == 1


def test_a_frozen_base_in_its_computing_type_is_the_starts_own(folder):
    """Cast to float32 first, the 14B's would take 66 GB more of one card."""
    config = _config(folder, train__init_from=str(folder / "started"))
    start = latest_model(folder / "started", dtype=jnp.bfloat16)
    task = make_task(config, start)
    shardings = parameter_shardings(abstract_model(task.description), None)
    frozen = {n: jnp.dtype("bfloat16") for n in shardings if n.startswith("blocks.")}
    made = task.initial_parameters(start, shardings, frozen)
    given = parameters(start.modules["transformer"])
    for name, x in made.items():
        same = x.unsafe_buffer_pointer() == given[name].unsafe_buffer_pointer()
        assert same == (name in frozen)
        assert x.dtype == frozen.get(name, jnp.float32)


def _random_clips(config, count):
    rng = np.random.default_rng(0)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_clips(config.data, count, here)
    pixels = lambda x: rng.integers(0, 256, x.shape, np.uint8)  # noqa: E731
    return Clip(
        frames=pixels(shapes.frames),
        first_from_camera=rng.normal(size=shapes.first_from_camera.shape).astype("f4"),
        condition=pixels(shapes.condition),
        condition_length=np.resize(np.array([5, 13, 9], np.int32), count),
        clip_id=np.arange(count, dtype=np.uint32),
    )


@pytest.fixture(scope="module")
def first_update(folder):
    """Loss and change of the parameters, by batch and number of its parts."""
    start = latest_model(folder / "vae", dtype=jnp.float32)

    def update(encoded: bool, micro_batches: int):
        config = _config(
            folder,
            train__pool=0,
            train__batch_size=8,
            train__micro_batches=micro_batches,
            train__mismatch_probability=0.4,
            train__ema_decay=0.0,
            optimizer__frozen=("text_embedding.*",),
        )
        program = make_program(config, None, start, encoders_dtype=jnp.float32)
        clips = _random_clips(config, 8)
        text = jnp.asarray(program.task.text)
        encoders = {"vae": start.modules["vae"], "text": text}
        batch = program.encode(encoders, clips) if encoded else clips
        drawn = draw_parameters(program.task.description, 0)
        rng = np.random.default_rng(0)
        drawn = {
            n: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
            for n, x in drawn.items()
        }
        params, frozen = split_frozen(drawn, program.labels)
        before = jax.device_get(params)
        state, metrics = program.update(program.begin(params), frozen, encoders, batch)
        assert not metrics["refused"]
        change = {n: np.float64(x) - before[n] for n, x in state.params.items()}
        return metrics["loss"][0], metrics["gradient_norm"][0], change

    return update


@pytest.mark.long  # four programs of a whole update
def test_streamed_clips_and_encoded_ones_make_the_same_update(first_update):
    """Swapped conditions included: the pixels of one are the latents of the other.

    Adam divides small gradients by themselves, so changes are compared by their size.
    """
    expected = first_update(encoded=True, micro_batches=1)
    for encoded, parts in ((False, 1), (False, 2), (True, 4)):
        loss, norm, change = first_update(encoded, parts)
        assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
        assert float(norm) == pytest.approx(float(expected[1]), rel=1e-5)
        size = np.sqrt(sum((x**2).sum() for x in expected[2].values()))
        gap = np.sqrt(sum(((change[n] - x) ** 2).sum() for n, x in expected[2].items()))
        assert gap < 1e-3 * size
