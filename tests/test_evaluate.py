"""Baselines and figures of the evaluation, from known errors."""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_city
from test_sampling import model_of_no_zeros
from test_train import get_config

from cityrag_jax import evaluate as door
from cityrag_jax import generator
from cityrag_jax.batch import Clip, Conditions
from cityrag_jax.checkpoint import Bundle, abstract_model, describe, new_model
from cityrag_jax.data.columns import write_columns
from cityrag_jax.data.masks import mask_path
from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.data.pairs import PairConfig, save_pairs
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image, write_image
from cityrag_jax.evaluate import (
    ELSEWHERE,
    FULL,
    GEO_ALONE,
    NEITHER,
    POSE_ALONE,
    RECOLOURED,
    fit_length,
    make_videos,
    plan_clips,
    read_clips,
    recolour,
    score,
    swap_places,
)
from cityrag_jax.generator import Generator
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.sampling import Sampler, denoise
from cityrag_jax.training.examples import open_cities


@pytest.fixture
def clips(rng) -> Clip:
    """Three clips of 9 frames with conditions of 5, 7 and 13 frames, padded to 13."""

    def pixels(*shape):
        return rng.integers(256, size=shape).astype(np.uint8)

    lengths = np.array([5, 7, 13], np.int32)
    condition = pixels(3, 13, 32, 48, 3)
    index = np.minimum(np.arange(13)[None], lengths[:, None] - 1)
    return Clip(
        frames=pixels(3, 9, 32, 48, 3),
        first_from_camera=np.broadcast_to(np.eye(4, dtype=np.float32), (3, 9, 4, 4)),
        condition=condition[np.arange(3)[:, None], index],
        condition_length=lengths,
        clip_id=np.arange(3, dtype=np.uint32),
    )


@pytest.fixture
def conditions(rng) -> Conditions:
    """Of three clips, with latents of 2, 2 and 4 real frames."""
    return Conditions(
        text=jnp.zeros((3, 1, 8)),
        first_frame=jnp.asarray(rng.normal(size=(3, 3, 4, 6, 20)).astype(np.float32)),
        geo_latents=jnp.asarray(rng.normal(size=(3, 4, 4, 6, 16)).astype(np.float32)),
        geo_length=jnp.array([2, 2, 4]),
        poses=jnp.asarray(rng.normal(size=(3, 9, 4, 4)).astype(np.float32)),
    )


def test_no_clip_keeps_its_place_when_places_are_swapped(conditions):
    swapped = swap_places(conditions)
    np.testing.assert_array_equal(swapped.geo_length, [4, 2, 2])
    own = np.asarray(conditions.geo_latents)
    np.testing.assert_array_equal(swapped.geo_latents[1:], own[:-1])
    np.testing.assert_array_equal(swapped.geo_latents[0], own[-1])
    for name in ("text", "first_frame", "poses"):
        np.testing.assert_array_equal(getattr(swapped, name), getattr(conditions, name))


def test_one_clip_has_no_other_place(conditions):
    alone = jax.tree.map(lambda x: x[:1], conditions)
    with pytest.raises(ValueError, match="needs two clips"):
        swap_places(alone)


def test_conditions_are_cut_or_their_last_frame_repeated(clips):
    fitted = fit_length(clips)
    assert fitted.shape == clips.frames.shape
    np.testing.assert_array_equal(fitted[2], clips.condition[2, :9])
    for frame in range(4, 9):
        np.testing.assert_array_equal(fitted[0, frame], clips.condition[0, 4])
    short = Clip(
        clips.frames,
        clips.first_from_camera,
        clips.condition[:, :6],
        np.array([5, 6, 6], np.int32),
        clips.clip_id,
    )
    np.testing.assert_array_equal(fit_length(short)[:, 8], clips.condition[:, 5])


def test_recolouring_undoes_a_change_of_colours(clips):
    """Conditions that show the truth in other light; half a step of 255 by rounding."""
    frames = clips.frames // 2 + 60
    dimmed = (frames * np.array([0.5, 0.75, 1.0]) + np.array([20, 0, -20])).round()
    lit = Clip(
        frames,
        clips.first_from_camera,
        np.pad(dimmed.astype(np.uint8), ((0, 0), (0, 4), (0, 0), (0, 0), (0, 0))),
        np.full(3, 9, np.int32),
        clips.clip_id,
    )
    np.testing.assert_allclose(recolour(lit).astype(int), frames, atol=2)


def test_known_errors_have_known_scores():
    """Errors of 25.5 of 255 are 20 dB; 51 are 20 - 20 log10(2)."""
    truth = np.full((1, 9, 4, 6, 3), 100, np.uint8)
    video = truth + np.uint8(51)
    video[:, 1:7] = truth[:, 1:7] + np.array([25, 26] * 9).reshape(
        1, 1, 1, 6, 3
    ).astype(np.uint8)
    low = 20 - 20 * np.log10(2)
    middle = -10 * np.log10((25**2 + 26**2) / 2 / 255**2)
    figures = score(video, truth)
    np.testing.assert_allclose(figures["PSNR"], (6 * middle + 2 * low) / 8)
    np.testing.assert_allclose(figures["last quarter"], low)
    mean_square = (6 * 10 ** (-middle / 10) + 2 * 10 ** (-low / 10)) / 8
    np.testing.assert_allclose(figures["of clip"], -10 * np.log10(mean_square))


def test_frame_0_does_not_count_and_equal_videos_are_infinitely_good(clips):
    video = clips.frames.copy()
    video[:, 0] = 255 - video[:, 0]
    figures = score(video, clips.frames)
    for name in ("PSNR", "of clip", "last quarter"):
        np.testing.assert_array_equal(figures[name], [np.inf] * 3)
    for name in ("sharpness", "gradient cosine"):
        np.testing.assert_allclose(figures[name], [1] * 3, rtol=1e-12)


def test_sharpness_is_averaged_over_frames_whose_truth_is_not_flat(clips):
    """Half the contrast is a quarter of the energy; half the frames are flat."""
    truth = 2 * (clips.frames // 4)
    truth[:, ::2] = 50
    figures = score(truth // 2, truth)
    np.testing.assert_allclose(figures["sharpness"], [0.25] * 3)
    np.testing.assert_allclose(figures["gradient cosine"], [1] * 3)


def test_one_program_serves_all_ways_to_fill_a_clip(clips):
    """Compiling takes longer than sampling; the videos are those of other programs.

    One step of 255: latents agree to 1e-5, which may be rounded apart.
    """
    vae = new_model(describe(WanVAE, VAEConfig(base_dim=4)), 0)
    modules = {"vae": vae, "transformer": model_of_no_zeros()}
    bundle = Bundle(modules, {}, np.ones((1, 8), np.float32))
    ways = make_videos(Generator(bundle, Sampler(3)), clips, 0)
    names = (FULL, POSE_ALONE, GEO_ALONE, NEITHER, ELSEWHERE)
    before = denoise._cache_size()
    made = {name: ways[name]().astype(int) for name in names}
    assert denoise._cache_size() == before + 1
    for name, left_out in {POSE_ALONE: ("geo",), NEITHER: ("pose", "geo")}.items():
        other = Generator(bundle, Sampler(3, without=left_out))(clips, 0)
        np.testing.assert_allclose(made[name], other, atol=1)
        assert np.abs(made[name] - made[FULL]).max() > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_city.build_city(tmp_path_factory.mktemp("evaluate") / "city")


def test_clips_that_do_not_fill_batches_or_cities_are_refused(folder):
    sources = open_cities(str(folder))
    config = get_config("toy_city", eval__table_clips=3, eval__batch_size=2)
    with pytest.raises(ValueError, match="table_clips 3 must be a multiple of the 1"):
        plan_clips(config, sources)
    config = get_config("toy_city", eval__table_clips=3, eval__batch_size=1)
    with pytest.raises(ValueError, match="multiple of the 2 cities"):
        plan_clips(config, sources * 2)


def test_clips_come_in_batches_of_every_city(folder):
    config = get_config(
        "toy_city",
        eval__table_clips=4,
        eval__batch_size=2,
        eval__min_rotation_deg=0.0,
    )
    batches = plan_clips(config, open_cities(f"{folder},{folder}"))
    clips = [read_clips(config, plans) for plans in batches]
    assert [len(batch.frames) for batch in clips] == [2, 2]
    again = plan_clips(config, open_cities(str(folder)))
    ids = [plan.clip_id for _, plan in again[0]]
    np.testing.assert_array_equal(clips[0].clip_id, ids)


WAYS = (FULL, POSE_ALONE, RECOLOURED)


@pytest.fixture
def score_all(folder, monkeypatch):
    """Evaluate four clips in two batches, by ways that need no network."""
    vae = abstract_model(describe(WanVAE, VAEConfig(base_dim=4)))
    bundle = Bundle({"vae": vae, "transformer": vae}, {}, np.zeros((1, 8)))
    monkeypatch.setattr(generator, "latest_model", lambda *_, **__: bundle)
    monkeypatch.setattr(door, "identify_model", lambda _: "these")
    monkeypatch.setattr(door, "ROWS", WAYS)

    def score_all(out, seen=lambda way: None, city=folder, **changes):
        def make_videos(_, clips, seed):
            def make(way, video):
                seen(way)
                return video

            videos = (clips.frames ^ 1, clips.frames ^ 3, recolour(clips))
            both = zip(WAYS, videos, strict=True)
            return {way: partial(make, way, video) for way, video in both}

        monkeypatch.setattr(door, "make_videos", make_videos)
        sizes = dict(eval__table_clips=4, eval__batch_size=2)
        config = get_config("toy_city", **sizes | changes)
        return door.evaluate(config, "model", str(city), out)

    return score_all


@pytest.fixture
def table(score_all, tmp_path):
    score_all(tmp_path / "whole")
    return tmp_path / "whole"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_table_of_all_clips_is_written(score_all, tmp_path):
    means = score_all(tmp_path / "out")
    np.testing.assert_allclose(means[FULL]["PSNR"], 20 * np.log10(255))
    assert means[POSE_ALONE]["PSNR"] < means[FULL]["PSNR"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| {FULL} | 48.13 | 48.13 | 48.13 |" in table
    stored = json.loads((tmp_path / "out" / "table.json").read_text())
    assert stored["mean"] == means
    assert len(stored["clips"][RECOLOURED]["PSNR"]) == 4
    assert set(contents(tmp_path / "out")) == {*FILES}


FILES = ("table.md", "table.json", "examples.png")


def test_rows_are_written_as_they_come(score_all, tmp_path):
    """After each way of each batch, in the table's order, of whole batches' clips."""
    out, seen = tmp_path / "out", []

    def look(way):
        table = out / "table.md"
        lines = table.read_text().splitlines() if table.exists() else []
        seen.append([line.split(" | ")[0].strip("| ") for line in lines])

    score_all(out, look)
    title = "2 of 4 unseen clips, PSNR in dB"
    rows = [line[2:] for line in seen]
    assert rows[:3] == [[], [FULL], [FULL, POSE_ALONE]]
    assert rows[3:] == [list(WAYS)] * 3
    assert all(line[0] == title for line in seen[1:])
    assert (out / "table.md").read_text().startswith("| 4 unseen clips, PSNR in dB |")


def test_ended_at_any_row_it_goes_on_to_the_same_files(score_all, table, tmp_path):
    """No row of a batch that stands in the folder is made again."""
    done, tries = [], 0

    def end(way):  # each start gets one row farther
        if len(done) == tries:
            raise KeyboardInterrupt
        done.append(way)

    for tries in range(6):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            score_all(tmp_path / "out", end)
    for _ in range(2):
        score_all(tmp_path / "out", done.append)
        assert done == list(WAYS) * 2
        assert contents(tmp_path / "out") == contents(table)


def test_a_table_of_other_settings_is_refused_with_the_key(score_all, table):
    before = contents(table)
    with pytest.raises(ValueError, match=r"sample.num_steps is \d+ there, 9 here"):
        score_all(table, sample__num_steps=9)
    with pytest.raises(ValueError, match="eval.seed is 0 there, 1 here. Choose ano"):
        score_all(table, eval__seed=1)
    assert contents(table) == before
    for text, told in {
        "{": "table.json is damaged",
        "{}": "no table that can be gone on with",
        '{"made of": {}, "clips": {"x": 1}}': "no table that can",
    }.items():
        (table / "table.json").write_text(text)
        with pytest.raises(ValueError, match=told):
            score_all(table)


def test_a_picture_that_was_deleted_is_drawn_again(score_all, table):
    before, made = contents(table), []
    (table / "examples.png").unlink()
    score_all(table, made.append)
    assert made == list(WAYS) and contents(table) == before


def test_people_are_masked_in_the_examples(score_all, table, folder, tmp_path):
    """Or it is said that they are not; the figures are those of the pictures."""
    bare = tmp_path / "city"
    shutil.copytree(folder, bare)
    city = City(bare)
    captures = dataclasses.replace(city.captures, anonymised=np.zeros(len(city), bool))
    write_columns(bare, city.header, captures, city.provenance)
    config = PairConfig(num_frames=9, stride=2, min_condition=13, held_out=(1,))
    save_pairs(bare, mine_pairs(captures, city.name, config))
    means = score_all(tmp_path / "bare", city=bare)
    seen = contents(tmp_path / "bare")
    assert seen["examples.png"] == contents(table)["examples.png"]
    told = "captures shown are not anonymised: in"
    assert told in seen["table.md"].decode() and told in seen["table.json"].decode()
    (bare / "masks").mkdir()
    for name in city.provenance.id.to_pylist():
        path = mask_path(city, 0).with_stem(name)
        write_image(path, np.full((20, 40, 3), 255, np.uint8))
    assert score_all(tmp_path / "masked", city=bare) == means
    assert "masked by masks/" in (tmp_path / "masked" / "table.md").read_text()
    before, after = (
        read_image(tmp_path / name / "examples.png").astype(int)
        for name in ("bare", "masked")
    )
    changed = np.any(before != after, axis=(1, 2))
    strips = np.split(changed[: len(changed) // 2 // 6 * 6], 6)
    assert all(rows.mean() > 0.5 for rows in strips)  # every kind of strip


def test_a_folder_that_cannot_be_written_to_is_refused_first(tmp_path):
    """In one line, before cities and models are looked for."""
    (tmp_path / "out").write_text("a file")
    config = training_city.ROOT / "configs" / "toy_city.py"
    given = dict(config=config, checkpoint="x", city="x", out=tmp_path / "out")
    ended = subprocess.run(
        [sys.executable, "-m", "cityrag_jax.evaluate"]
        + [f"--{name}={value}" for name, value in given.items()],
        cwd=training_city.ROOT,
        env=training_city.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/out cannot be written to")
    assert "Traceback" not in ended.stderr
