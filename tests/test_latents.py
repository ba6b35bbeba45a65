"""Clips that are encoded once are the clips that a training would have encoded."""

import importlib.util
import itertools
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import training_city

from cityrag_jax import train as trainer
from cityrag_jax.checkpoint import Damaged
from cityrag_jax.data.clips import clip_id
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.training.checks import check_config
from cityrag_jax.training.examples import open_cities, stream
from cityrag_jax.training.latents import Latents, describe_latents, write_latents
from cityrag_jax.training.log import read_metrics
from cityrag_jax.training.program import make_program
from cityrag_jax.training.start import open_encoders, read_start

TOOL = training_city.ROOT / "tools" / "encode_latents.py"
CLIPS, SHARD = 10, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    training_city.build_city(folder / "city")
    training_city.save_vae(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    paths = dict(data__city=str(folder / "city"), model__vae=str(folder / "vae"))
    sizes = dict(train__pool=0, train__batch_size=4, train__encode_batch=2)
    return training_city.get_config("toy_city", **paths, **sizes)


@pytest.fixture(scope="module")
def program(config):
    start = read_start(config)
    program = make_program(config, None, start)
    return program, open_encoders(program, start)


@pytest.fixture(scope="module")
def made(folder, config, program):
    """Two side by side made them."""
    for number in range(2):
        write(folder / "out", config, program, share=(number, 2))
    return folder / "out"


def write(out, config, program, clips=CLIPS, **kinds):
    program, encoders = program
    sources = open_cities(config.data.city)
    record = describe_latents(config, sources, encoders)
    record |= dict(clips=clips, shard_clips=SHARD, dtype="float32")

    def encode(clip):
        return program.encode(encoders, clip)

    write_latents(out, config, encode, sources, record, **kinds)


def test_batches_are_those_of_the_stream_and_then_begin_anew(made, config, program):
    """Bit by bit, from any update on; behind the last of ten clips comes the first."""
    program, encoders = program
    latents, sources = Latents(made), open_cities(config.data.city)
    encoded = [
        jax.device_get(program.encode(encoders, clip))
        for clip in itertools.islice(stream(sources, config, 0, None, 2), 5)
    ]
    wanted = {n: np.concatenate([x[n] for x in encoded]) for n in encoded[0]}
    for first in (0, 1):
        found = list(itertools.islice(latents.batches(config, first, None), 3))
        for step, batch in enumerate(found, first):
            rows = (4 * step + np.arange(4)) % CLIPS
            assert batch.keys() == wanted.keys()
            for name, x in batch.items():
                np.testing.assert_array_equal(x, wanted[name][rows], err_msg=name)


def test_what_is_there_is_not_made_again_and_what_is_missing_is(made, config, program):
    names = [f"{n:05}.safetensors" for n in range(3)]
    assert sorted(p.name for p in made.iterdir()) == [*names, "latents.json"]
    before = {p.name: p.stat().st_mtime_ns for p in made.iterdir()}
    content = (made / names[1]).read_bytes()
    (made / names[1]).unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards, first 00001"):
        Latents(made)
    write(made, config, program)
    assert (made / names[1]).read_bytes() == content
    after = {p.name: p.stat().st_mtime_ns for p in made.iterdir()}
    assert [n for n in before if before[n] != after[n]] == [names[1]]
    with pytest.raises(ValueError, match="clips: 10 there, 11 here"):
        write(made, config, program, clips=11)


def test_latents_of_other_data_or_another_autoencoder_are_refused(
    made, config, program
):
    program, encoders = program
    latents, sources = Latents(made), open_cities(config.data.city)
    described = describe_latents(config, sources, encoders)
    examples = jax.eval_shape(program.encode, encoders, program.batch)
    latents.check(described, examples)
    other = config.copy_and_resolve_references()
    other.data.fov_deg = 80.0
    for changes, message in (
        (dict(data=other.data.to_dict()), "data.fov_deg: 65.0 there, 80.0 here"),
        (dict(seed=7), "seed: 0 there, 7 here"),
        (dict(encoders={"vae": 5}), r"encoders.vae: \d+ there, 5 here"),
    ):
        with pytest.raises(ValueError, match=message):
            latents.check(described | changes, {})


def test_a_flipped_bit_is_found_and_the_clip_named(made, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 4
    shard.write_bytes(content)
    latents = Latents(tmp_path)
    latents.read(list(range(8)))
    with pytest.raises(Damaged, match="00002.safetensors is damaged: .* of clip [89]"):
        latents.read([8, 9])


def test_a_takedown_leaves_the_clips_that_show_others(
    made, folder, config, program, tmp_path, capsys
):
    """As they were, under the numbers that their pairs have now; again and again."""
    for name, source in (("city", folder / "city"), ("latents", made)):
        shutil.copytree(source, tmp_path / name)
    city, before = City(tmp_path / "city"), Latents(made).read(list(range(CLIPS)))
    shown = {  # windows of 9, conditions of 18 at most; drive 0 ends at 40, 1 at 90
        clip_id(city.name, a, b): {
            *range(a, a + 9),
            *range(b, min(b + 18, 40 if b < 40 else 90)),
        }
        for a, b in starts(city.folder)
    }
    kept = list(range(CLIPS))
    for row in (16, 60):
        was = len(kept)
        kept = [k for k in kept if row not in shown[int(before["clip_id"][k])]]
        assert 0 < len(kept) < was
        take_down(city, row, tmp_path / "latents")
        told = f"removed {was - len(kept)} clips from the latents"
        assert told in capsys.readouterr().out
        latents = Latents(tmp_path / "latents")
        after = latents.read(list(range(len(kept))))
        assert latents.clips == len(kept)
        for part in before.keys() - {"clip_id"}:
            np.testing.assert_array_equal(after[part], before[part][kept])
        now = {clip_id(city.name, a, b) for a, b in starts(city.folder)}
        assert set(after["clip_id"].tolist()) <= now
    # A training takes them: what they were made of is the city as it is now.
    program, encoders = program
    sources = open_cities(str(tmp_path / "city"))
    examples = jax.eval_shape(program.encode, encoders, program.batch)
    latents.check(describe_latents(config, sources, encoders), examples)
    (tmp_path / "latents" / "00000.safetensors").unlink()
    take_down(city, 40, tmp_path / "latents")
    assert "whole: " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["city"]


def take_down(city, row, latents):
    path = training_city.ROOT / "tools" / "takedown.py"
    spec = importlib.util.spec_from_file_location("takedown_tool", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    name = city.provenance.id[row].as_py()
    words = [f"--city={city.folder}", f"--latents={latents}", f"--id={name}"]
    tool.main(tool.COMMAND.parse(words))


def starts(folder):
    """Give the starts of a city's training pairs."""
    pairs = load_pairs(folder).training
    return list(zip(pairs.start_a.tolist(), pairs.start_b.tolist(), strict=True))


def test_a_pool_beside_latents_is_refused(config):
    changed = config.copy_and_resolve_references()
    changed.train.latents = "there"
    changed.train.pool = 8
    with pytest.raises(ValueError, match="train.latents is 'there' and train.pool 8"):
        check_config(changed)


@pytest.mark.long
def test_a_training_on_latents_is_the_one_that_encodes(folder, config):
    """Through both doors; 1e-6 as of one program and another of the same sums."""
    out = folder / "door"
    command = [sys.executable, TOOL, f"--out={out}", "--clips=8", "--shard-clips=4"]
    command += [f"--config={training_city.ROOT}/configs/toy_city.py:test"]
    command += [f"--config.data.city={folder}/city", f"--config.model.vae={folder}/vae"]
    command += ["--config.train.pool=0", "--config.train.encode_batch=2"]
    environment = training_city.environment(folder)
    environment["PYTHONPATH"] = str(training_city.ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 clips of" in done.stdout
    losses = []
    for name, latents in (("streamed", ""), ("read", str(out))):
        changed = config.copy_and_resolve_references()
        changed.train.update(dict(latents=latents, steps=2, log_interval=1))
        changed.train.update(dict(checkpoint_interval=2))
        changed.eval.update(dict(interval=2, noise_levels=(), draws=1))
        trainer.train(changed, folder / name)
        lines = read_metrics(folder / name)
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
