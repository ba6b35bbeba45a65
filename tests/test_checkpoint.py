"""Models and training states survive the disk exactly, or a clear error is raised."""

import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from full_disk import files_up_to
from jax.sharding import NamedSharding, PartitionSpec

from cityrag_jax import checkpoint
from cityrag_jax.checkpoint import (
    Bundle,
    TrainingCheckpoints,
    abstract_model,
    computing_in,
    describe,
    hush_writers,
    latest_model,
    load_bundle,
    new_model,
    parameters,
    save_bundle,
    stacked_parameters,
    training,
    verify_bundle,
    with_parameters,
)
from cityrag_jax.checkpoint.digests import _summing, digest_json, sum_arrays
from cityrag_jax.checkpoint.files import renamed
from cityrag_jax.checkpoint.items import abstract_layer
from cityrag_jax.checkpoint.training import _unstack_onto
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import make_mesh

CONFIG = DiTConfig(
    dim=16,
    num_heads=2,
    num_layers=3,
    ffn_dim=24,
    in_channels=36,
    freq_dim=16,
    text_dim=8,
    text_len=2,
)
DESCRIPTION = describe(
    WanDiT, CONFIG, ((TrajectoryEncoder, {"hidden": 8}), (GeoBranch, {}))
)


@pytest.fixture(scope="module")
def model():
    return new_model(DESCRIPTION, seed=3)


def save(path, model, **kinds):
    """A bundle of the transformer alone."""
    bundle = Bundle({"transformer": model}, {"transformer": DESCRIPTION})
    return save_bundle(path, bundle, **kinds)


def load(path, **kinds):
    return latest_model(path, **kinds).modules["transformer"]


def _assert_equal(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


def _write_digested(path, config):
    del config["digest"]
    path.write_text(json.dumps(config | {"digest": digest_json(config)}))


def _flip_a_bit(folder, position=0.5):
    """Change one bit in every file of values."""
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 16
        path.write_bytes(content)


def test_a_bundle_of_one_module_round_trip(model, tmp_path):
    save(tmp_path / "m", model)
    loaded = load(tmp_path / "m")
    _assert_equal(parameters(model), parameters(loaded))
    assert loaded.config == CONFIG
    assert [type(b) for b in loaded.branches] == [TrajectoryEncoder, GeoBranch]


def test_every_layer_is_an_item_and_what_is_not_stacked_another(model, tmp_path):
    save(tmp_path / "m", model)
    folder = tmp_path / "m" / "transformer"
    digests = json.loads((folder / "digests.json").read_text())
    items = {"rest", "block_000", "block_001", "block_002"}
    assert digests.keys() == items
    assert {path.name for path in folder.iterdir()} == items | {"digests.json"}
    assert "blocks.ffn.fc1.kernel" in digests["block_002"]
    assert "branches.0.projection.kernel" in digests["block_000"]
    assert "head.linear.kernel" in digests["rest"]
    assert "blocks.ffn.fc1.kernel" not in digests["rest"]


def test_arrays_larger_than_what_is_written_at_a_time(model, tmp_path, monkeypatch):
    largest = max(x.nbytes for x in parameters(model).values())
    for limit in (1, largest, 2 * largest):
        monkeypatch.setattr(checkpoint.items, "WRITE_BYTES", limit)
        monkeypatch.setattr(checkpoint.items, "CHUNK_BYTES", 1024)
        save(tmp_path / str(limit), model)
        loaded = load(tmp_path / str(limit), verify=True)
        _assert_equal(parameters(model), parameters(loaded))


def test_a_bundle_holds_no_name_of_the_folder_it_was_made_in(model, tmp_path):
    """Orbax notes where it committed; shipped weights should not say."""
    save(tmp_path / "m", model)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_types_are_cast_on_save_and_on_load(model, tmp_path):
    save(tmp_path / "m", model, dtype=jnp.bfloat16)
    loaded = load(tmp_path / "m")
    kernel = parameters(loaded)["blocks.ffn.fc1.kernel"]
    rounded = parameters(model)["blocks.ffn.fc1.kernel"].astype(jnp.bfloat16)
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, rounded.astype(jnp.float32))
    low = load(tmp_path / "m", dtype=jnp.bfloat16)
    assert low.config.dtype == jnp.bfloat16
    assert {x.dtype for x in parameters(low).values()} == {jnp.dtype("bfloat16")}


def test_a_model_saved_on_one_mesh_loads_on_another(model, tmp_path):
    save(tmp_path / "m", model)
    sharded = load(tmp_path / "m", mesh=make_mesh(2, 4, 1))
    kernel = parameters(sharded)["blocks.self_attention.q.kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, ("fsdp",), None)
    save(tmp_path / "n", sharded)
    again = load(tmp_path / "n", mesh=make_mesh(1, 8, 1))
    _assert_equal(parameters(model), parameters(again))


# Orbax leaves its other reads running when one fails, in a loop that it then closes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_is_never_loaded_by_default(model, tmp_path):
    """A file also holds index pages that nobody reads: there a flip changes nothing."""
    save(tmp_path / "m", model)
    found = 0
    for i, position in enumerate(np.linspace(0.1, 0.9, 4)):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(tmp_path / "m", copy)
        _flip_a_bit(copy / "transformer" / "block_001", position)
        try:
            loaded = load(copy)
            _assert_equal(parameters(model), parameters(loaded))
        except ValueError as error:
            assert "damaged" in str(error)
            with pytest.raises(ValueError, match="block_001"):
                verify_bundle(copy)
            found += 1
    assert found >= 2


def test_all_damage_is_reported_at_once(model, tmp_path):
    """Digests that fit nothing, a layer that is gone, texts that were changed."""
    text = np.ones((2, 8), np.float32)
    bundle = Bundle({"transformer": model}, {"transformer": DESCRIPTION}, text)
    save_bundle(tmp_path / "m", bundle)
    verify_bundle(tmp_path / "m")
    folder = tmp_path / "m" / "transformer"
    digests = json.loads((folder / "digests.json").read_text())
    digests["rest"]["head.modulation"] += 1
    digests["block_002"]["blocks.modulation"] += 1
    (folder / "digests.json").write_text(json.dumps(digests))
    shutil.rmtree(folder / "block_001")
    np.save(tmp_path / "m" / "text.npy", text * 2)
    with pytest.raises(ValueError) as error:
        verify_bundle(tmp_path / "m")
    lines = str(error.value).splitlines()
    assert "damaged in 4 places" in lines[0]
    assert f"{folder}/rest: head.modulation" in str(error.value)
    assert f"{folder}/block_002: blocks.modulation" in str(error.value)
    assert f"{folder}/block_001: missing" in str(error.value)
    assert "text.npy" in lines[-1]


def test_all_differences_of_a_model_are_reported_at_once(model, tmp_path):
    save(tmp_path / "m", model)
    path = tmp_path / "m" / "config.json"
    changed = json.loads(path.read_text())
    changed["modules"]["transformer"]["config"]["ffn_dim"] = 32
    del changed["modules"]["transformer"]["branches"][1]
    _write_digested(path, changed)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "m")
    text = str(error.value)
    assert "blocks.ffn.fc1.kernel: stored (16, 24), the model has (16, 32)" in text
    assert "unknown to the model: branches.1.patch_embedding.kernel" in text


def test_a_folder_cannot_name_a_class_outside_the_models(model, tmp_path):
    save(tmp_path / "m", model)
    path = tmp_path / "m" / "config.json"
    text = path.read_text().replace("cityrag_jax.model.dit.WanDiT", "os.system")
    _write_digested(path, json.loads(text))
    with pytest.raises(ValueError, match="os.system"):
        load(tmp_path / "m")


def test_an_existing_folder_is_not_overwritten_unasked(model, tmp_path):
    save(tmp_path / "m", model)
    with pytest.raises(ValueError, match="exists"):
        save(tmp_path / "m", model)
    save(tmp_path / "m", model, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_leaves_nothing_and_says_one_line(model, tmp_path, monkeypatch):
    """The threads of the failed write go on, and say nothing."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    verbosity = logging.get_verbosity()
    hush_writers()
    told = re.escape(f"{tmp_path}/m could not be written (File too large). Raise the")
    with files_up_to(1000), pytest.raises(ValueError, match=told):
        save(tmp_path / "m", model)
    logging.set_verbosity(verbosity)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_of_this_machine_left_is_cleared(model, tmp_path):
    """That of one that lives, or of another machine's, is not."""
    own = renamed(tmp_path / "m", False).temporary.name.rpartition("-")[0]
    kept = [f"{own}-1", f".m.tmp-0-{2**22 + 1}", f".n{own[2:]}-{2**22 + 1}"]
    for name in (*kept, f"{own}-{2**22 + 1}"):
        (tmp_path / name).mkdir()
    save(tmp_path / "m", model)
    assert {path.name for path in tmp_path.iterdir()} == {"m", *kept}


def test_texts_source_and_licence_travel_with_a_bundle(tmp_path, rng):
    text, negative = rng.normal(size=(2, 3, 8)).astype(np.float32)
    bundle = Bundle({}, {}, text, "new", negative, {"from": "Wan"}, "Apache-2.0")
    save_bundle(tmp_path / "b", bundle)
    loaded = load_bundle(tmp_path / "b")
    np.testing.assert_array_equal(loaded.text, text)
    np.testing.assert_array_equal(loaded.negative_text, negative)
    assert (loaded.source, loaded.licence) == ({"from": "Wan"}, "Apache-2.0")
    np.save(tmp_path / "b" / "negative_text.npy", text)
    with pytest.raises(ValueError, match="negative_text"):
        load_bundle(tmp_path / "b")


def test_a_module_is_read_when_it_is_first_asked_for(model, tmp_path):
    """One whose files are gone hurts nobody who does not ask for it."""
    described = {"transformer": DESCRIPTION, "vae": DESCRIPTION}
    save_bundle(tmp_path / "b", Bundle({n: model for n in described}, described))
    shutil.rmtree(tmp_path / "b" / "vae" / "block_000")
    bundle = latest_model(tmp_path / "b")
    assert set(bundle.modules) == {"transformer", "vae"}
    assert bundle.modules["transformer"] is bundle.modules["transformer"]
    joined = bundle.modules | {"vae": model}
    assert joined["vae"] is model
    assert joined["transformer"] is bundle.modules["transformer"]
    with pytest.raises(ValueError, match="block_000 is missing, which .*digests.json"):
        bundle.modules["vae"]


def test_a_network_may_compute_in_another_type_than_it_was_described_with(model):
    """Its parameters stay, and nothing is read before it is asked for."""
    given = Bundle({"transformer": model}, {"transformer": DESCRIPTION})
    assert computing_in(given, "transformer", "") is given
    changed = computing_in(given, "transformer", "bfloat16")
    made = changed.modules["transformer"]
    assert made.blocks.ffn.fc1.dtype == jnp.bfloat16
    assert made.head.linear.dtype == jnp.float32  # as in any transformer
    kept = parameters(model)
    for name, value in parameters(made).items():
        assert value is kept[name]
    assert changed.descriptions["transformer"]["config"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="'half'; choose float32 or bfloat16"):
        computing_in(given, "vae", "half")


def test_the_documented_example_runs(model, tmp_path, capsys):
    """As it stands in the docstring, on a bundle with a transformer and a VAE."""
    sizes = dict(dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
    vae = describe(WanVAE, VAEConfig(base_dim=4, **sizes))
    modules = {"transformer": model, "vae": new_model(vae, seed=0)}
    descriptions = {"transformer": DESCRIPTION, "vae": vae}
    bundle = Bundle(modules, descriptions, np.zeros((2, 8), np.float32))
    save_bundle(tmp_path / "b", bundle)
    lines = checkpoint.__doc__.splitlines()
    example = "\n".join(line[4:] for line in lines if line.startswith("    "))
    exec(example, {"DIR": tmp_path / "b"})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"['transformer', 'vae'] (2, 8) {tmp_path / 'b'}"
    assert said[1] == "16 3"


def _state(rng, mesh=None):
    """A stand-in training state: a stack of 8 layers, its momentum, a counter."""
    values = {
        "blocks.w.kernel": rng.normal(size=(8, 16, 24)).astype(np.float32),
        "head.bias": rng.normal(size=5).astype(np.float32),
    }
    momentum = {"blocks.w.kernel": values["blocks.w.kernel"] * 2}
    state = {"params": values, "optimizer": (momentum, np.int32(7)), "ema": {}}

    def put(x):
        if mesh is None:
            return jnp.asarray(x)
        spec = PartitionSpec(*(None,) * (x.ndim - 1), "fsdp") if x.ndim == 3 else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, state)


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


STACKED = frozenset({"blocks.w.kernel"})


@pytest.mark.parametrize("sizes", [None, (2, 4, 1), (1, 8, 1)])
def test_training_state_round_trip_on_any_mesh(rng, tmp_path, sizes):
    written = _state(rng)
    with TrainingCheckpoints(tmp_path, writable=True) as checkpoints:
        checkpoints.save(5, written, {"position": [1, "a"]}, STACKED)
    mesh = sizes and make_mesh(*sizes)
    target = _state(np.random.default_rng(1), mesh)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [5]
        read, notes = checkpoints.restore(_abstract(target), STACKED)
    assert notes == {"position": [1, "a"]}
    for a, b, like in zip(*map(jax.tree.leaves, (written, read, target)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.sharding == like.sharding


def test_momentum_split_by_layers_is_restored_so(rng, tmp_path):
    mesh = make_mesh(2, 2, 2)
    by_layers = NamedSharding(mesh, PartitionSpec(mesh.axis_names, None, None))
    momentum = jax.device_put(_state(rng)["params"]["blocks.w.kernel"], by_layers)
    group = {"optimizer": {"blocks.w.kernel": momentum}}
    with TrainingCheckpoints(tmp_path, writable=True) as checkpoints:
        checkpoints.save(1, group, {}, STACKED)
        checkpoints.wait()
        read, _ = checkpoints.restore(_abstract(group), STACKED)
    assert read["optimizer"]["blocks.w.kernel"].sharding == by_layers
    np.testing.assert_array_equal(read["optimizer"]["blocks.w.kernel"], momentum)


def _split_by_layers():
    mesh = make_mesh(2, 2, 2)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names, None, None))
    x = np.random.default_rng(0).normal(size=(8, 16, 24)).astype(np.float32)
    return jax.device_put(x, sharding)


def test_layers_are_saved_from_shards_and_never_from_copies():
    """Momentum split over its layers: each of them becomes split over its rows."""
    x = _split_by_layers()
    layer = abstract_layer(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
    compiled = _unstack_onto(layer.sharding, len(x)).lower(x).compile()
    assert compiled.memory_analysis().output_size_in_bytes <= x.nbytes // 8 + 8 * 64
    assert not re.search(r"= \S+ (all-gather|all-reduce)", compiled.as_text())
    for whole, part in zip(x, _unstack_onto(layer.sharding, 8)(x), strict=True):
        assert part.addressable_shards[0].data.nbytes == part.nbytes // 8
        np.testing.assert_array_equal(part, whole)


def test_saving_needs_room_for_the_layers_of_one_parameter(tmp_path, monkeypatch):
    """Not for a second state, which at full size no device has."""
    stacks = {f"blocks.{n}.kernel": jnp.full((3, 64, 64), n) for n in range(4)}
    groups = {"params": stacks, "ema": jax.tree.map(jnp.negative, stacks)}
    peaks = []

    def on_devices():
        alive = jax.live_arrays()
        return sum(x.nbytes for x in alive if x.sharding.memory_kind == "device")

    def watch(arrays):
        peaks.append(on_devices())
        return sum_arrays(arrays)

    before = on_devices()
    monkeypatch.setattr(training, "sum_arrays", watch)
    with TrainingCheckpoints(tmp_path, writable=True) as checkpoints:
        checkpoints.save(1, groups, {}, frozenset(stacks))
    assert len(peaks) == 8
    assert max(peaks) - before <= 1.05 * next(iter(stacks.values())).nbytes


def test_sums_are_made_where_the_shards_are():
    """No device gets more than its own, and the mesh does not matter."""
    x = _split_by_layers()
    text = _summing(x.sharding).lower(x).compile().as_text()
    assert not re.search(r"all-(gather|reduce|to-all)|collective", text)
    alone = jnp.asarray(np.asarray(x))
    assert sum_arrays({"x": x}) == sum_arrays({"x": alone})
    mesh = make_mesh(2, 2, 2)
    for spec in ((None, "fsdp"), (None, None, ("data", "fsdp")), ("data", "fsdp"), ()):
        turned = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        with jax.set_mesh(mesh):  # as in a training
            assert sum_arrays({"x": turned}) == sum_arrays({"x": alone})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32"])
def test_a_sum_sees_every_bit_and_every_exchange(rng, dtype):
    x = np.array(jnp.asarray(rng.normal(size=(5, 7)) * 40, dtype))
    digest = lambda x: sum_arrays({"x": jnp.asarray(x)})["x"]  # noqa: E731
    before = digest(x)
    assert before >= 2**32  # no crc32
    assert digest(x.T) != before != digest(x.reshape(-1)[::-1].reshape(x.shape))
    bits = x.view(np.uint8).reshape(-1)
    for place in (0, 3, bits.size - 1):
        for bit in range(8):
            bits[place] ^= 1 << bit
            assert digest(x) != before
            bits[place] ^= 1 << bit
    assert digest(x) == before


def test_only_the_newest_are_kept(rng, tmp_path):
    state = _state(rng)
    with TrainingCheckpoints(tmp_path, keep=2, writable=True) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {}, STACKED)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 3]


def test_some_old_ones_may_stay(rng, tmp_path):
    state = _state(rng)
    kinds = dict(keep=1, keep_every=4, writable=True)
    with TrainingCheckpoints(tmp_path, **kinds) as checkpoints:
        for step in range(2, 12, 2):
            checkpoints.save(step, state, {}, STACKED)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 10]


def test_an_unfinished_save_is_ignored_and_cleaned(rng, tmp_path):
    """What a kill between start and commit leaves: a folder that was not renamed."""
    state = _state(rng)
    with TrainingCheckpoints(tmp_path, writable=True) as checkpoints:
        checkpoints.save(1, state, {"at": 1}, STACKED)
        checkpoints.save(2, state, {"at": 2}, STACKED)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    (tmp_path / "2").rename(unfinished)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        assert checkpoints.read_notes() == {"at": 1}
    with TrainingCheckpoints(tmp_path, writable=True) as checkpoints:
        checkpoints.save(2, state, {"at": 2}, STACKED)
    assert not unfinished.exists()


def test_arrays_may_be_donated_while_the_save_is_running(rng, tmp_path):
    state = _state(rng)
    before = jax.tree.map(np.array, state)
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
    )
    with TrainingCheckpoints(tmp_path, writable=True) as checkpoints:
        wanted = _abstract(state)
        checkpoints.save(1, state, {}, STACKED)
        state = overwrite(state)
        checkpoints.wait()
        read, _ = checkpoints.restore(wanted, STACKED)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_in_a_training_checkpoint_is_found(rng, tmp_path):
    state = _state(rng)
    with TrainingCheckpoints(tmp_path, writable=True) as checkpoints:
        checkpoints.save(1, state, {}, STACKED)
        checkpoints.wait()
        _flip_a_bit(tmp_path / "1" / "params")
        with pytest.raises(ValueError, match="damaged"):
            checkpoints.restore(_abstract(state), STACKED)


def test_a_failed_save_is_raised_and_never_counted(rng, tmp_path, monkeypatch):
    """A full disk at the commit: `wait` raises and the step does not exist."""
    from orbax.checkpoint._src.path import atomicity

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    state = _state(rng)
    checkpoints = TrainingCheckpoints(tmp_path, writable=True)
    checkpoints.save(1, state, {}, STACKED)
    checkpoints.wait()
    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", full)
    checkpoints.save(2, state, {}, STACKED)
    with pytest.raises(ValueError, match="step 2 .*No space.*step 1 is whole. Free"):
        while True:  # as a training does behind every update
            checkpoints.check()
    monkeypatch.undo()
    with TrainingCheckpoints(tmp_path) as reader:
        assert reader.steps == [1]


def test_the_newest_model_of_a_workdir_is_the_average_if_there_is_one(model, tmp_path):
    values = parameters(model)
    average = {n: x + 1 for n, x in values.items()}
    save_bundle(tmp_path / "base", Bundle({}, {"transformer": DESCRIPTION}))
    stacked = stacked_parameters(model)
    with TrainingCheckpoints(tmp_path / "checkpoints", writable=True) as checkpoints:
        notes = {"part": "transformer"}
        checkpoints.save(1, {"params": values, "ema": {}}, notes, stacked)
        checkpoints.wait()
        bundle = latest_model(tmp_path)
        _assert_equal(values, parameters(bundle.modules["transformer"]))
        checkpoints.save(2, {"params": values, "ema": average}, notes, stacked)
    bundle = latest_model(tmp_path)
    _assert_equal(average, parameters(bundle.modules["transformer"]))
    assert bundle.origin.endswith("2 (ema)")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        latest_model(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"format": 1, "modules": {}}')
    with pytest.raises(ValueError, match="has format 1; this code reads .* format 2"):
        latest_model(tmp_path / "old")
    with pytest.raises(ValueError, match="does not exist"):
        load_bundle(tmp_path)


def test_parameters_by_name_round_trip(model):
    copy = with_parameters(abstract_model(DESCRIPTION), parameters(model))
    _assert_equal(parameters(model), parameters(copy))
    assert "blocks.modulation" in stacked_parameters(model)
    assert "head.modulation" not in stacked_parameters(model)
