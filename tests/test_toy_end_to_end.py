"""The whole road at the smallest size: a city, two trainings, a generated video."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_train import get_config

from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image, read_video
from cityrag_jax.request import Request, generate, generate_into
from cityrag_jax.toy.build import build_toy_city, toy_config
from cityrag_jax.train import train
from cityrag_jax.training.examples import clip_config
from cityrag_jax.training.log import read_metrics

pytestmark = pytest.mark.long

HEIGHT, FRAMES = 128, 9


@pytest.fixture(scope="module")
def city(tmp_path_factory) -> City:
    """Four neighbourhoods of one block, one held out; captures 1 to 2 m apart."""
    plan = toy_config(
        "paris", "test", route_streets=1, step_m=(1.0, 2.0), supersample=1
    )
    folder = tmp_path_factory.mktemp("toy") / "city"
    return build_toy_city(plan, folder, height=HEIGHT, num_frames=FRAMES)


@pytest.fixture(scope="module")
def config(city) -> ConfigDict:
    return get_config(
        "toy_city",
        data__city=str(city.folder),
        model__vae=str(city.folder.parent / "vae"),
        optimizer__warmup_steps=20,
        train__steps=300,
        train__pool=64,
        train__log_interval=50,
        train__checkpoint_interval=300,
        eval__interval=300,
        sample__spacing_m=1.5,
    )


@pytest.fixture(scope="module")
def trained(city, config) -> Path:
    """The autoencoder first, then CityRAG on its latents."""
    autoencoder = get_config(
        "toy_vae",
        data__city=str(city.folder),
        model__autoencoder__num_res_blocks=1,
        optimizer__warmup_steps=10,
        train__steps=40,
        train__batch_size=2,
        train__pool=32,
        train__log_interval=20,
        train__checkpoint_interval=40,
        eval__interval=40,
    )
    train(autoencoder, city.folder.parent / "vae")
    train(config, city.folder.parent / "cityrag")
    return city.folder.parent / "cityrag"


def held_out_losses(workdir: Path) -> list[float]:
    lines = read_metrics(workdir)
    return [line["held_out"] for line in lines if "held_out" in line]


def test_held_out_losses_fall_by_30_percent(trained):
    """On a street never trained on, the same noise and times at every measurement."""
    velocities = held_out_losses(trained)
    assert velocities[-1] < 0.7 * velocities[0]
    reconstructions = held_out_losses(trained.parent / "vae")
    assert reconstructions[-1] < 0.7 * reconstructions[0]


def test_a_video_is_generated_along_the_held_out_street(
    city, config, trained, tmp_path
):
    """Two clips chained, with conditions found from the path alone."""
    clips = clip_config(config.data)
    start = int(load_pairs(city.folder).evaluation.start_a[0])
    poses = city.captures.ecef_from_camera[start : start + 12]
    held_out = city.captures.neighbourhood[start]
    photo = city.crops(
        np.array([start]), np.zeros(1), height=64, width=96, fov_deg=clips.fov_deg
    )[0]
    wanted = Request(config, trained, city, photo, poses, seed=1)
    made = list(generate(wanted))
    frames = np.concatenate([clip.frames for clip in made])
    assert frames.shape == (len(poses), 32, 48, 3)
    for clip in made:
        captures = clip.views.captures
        assert clip.condition.shape == (len(captures), 32, 48, 3)
        assert (city.captures.neighbourhood[captures] == held_out).all()
    other = next(generate(dataclasses.replace(wanted, seed=2)))
    assert not np.array_equal(other.frames[1:], made[0].frames[1:])

    heard = []
    whole = generate_into(tmp_path, wanted, on_clip=lambda _, clip: heard.append(clip))
    assert whole and len(heard) == len(made) == 2
    for clip, again in zip(made, heard, strict=True):
        np.testing.assert_array_equal(again.frames, clip.frames)
    shown, fps = read_video(tmp_path / "video.mp4")
    assert (shown.shape, fps) == (frames.shape, 10.0)
    assert np.abs(shown.astype(int) - frames).mean() < 8
    assert read_image(tmp_path / "overview.png").size
    sidecar = json.loads((tmp_path / "generate.json").read_text())
    assert sidecar["sources"] == [
        dict(licence="CC0-1.0", attribution="rendered by cityrag_jax", anonymised=True)
    ]
