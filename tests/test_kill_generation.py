"""A generation killed at any moment and started again makes the same video.

The door runs in another process, with a random model, and is killed by SIGKILL at
random moments: while it starts, in a clip, while a clip is written.
"""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import synthetic_city as synthetic
import training_city
from test_generator import DIT, bundle_of_no_zeros

from cityrag_jax.checkpoint import save_bundle
from cityrag_jax.data.video import write_image
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef

CLIPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A city, a model, a photo, and a path of 40 frames: five clips of nine."""
    folder = tmp_path_factory.mktemp("killed")
    drives = [synthetic.line([0, 0, 2], 0, 100), synthetic.line([1.5, -1, 2], 0, 100)]
    city = synthetic.build(folder / "city", drives)
    save_bundle(folder / "model", bundle_of_no_zeros())
    photo = city.crops(np.array([10]), np.zeros(1), height=64, width=96, fov_deg=65.0)[
        0
    ]
    write_image(folder / "photo.png", photo)
    ends = ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line([0.5, 2, 2], 0, 2, 29.3)
    rows = zip(*geodetic_from_ecef(ends[:, :3, 3]), strict=True)
    (folder / "path.csv").write_text("".join(f"{a},{b},{h}\n" for a, b, h in rows))
    return folder


def command(folder, out):
    given = dict(
        config=f"{training_city.ROOT}/configs/toy_city.py:test",
        checkpoint=folder / "model",
        city=folder / "city",
        image=folder / "photo.png",
        path=folder / "path.csv",
        out=out,
    )
    script = [sys.executable, "-m", "cityrag_jax.generate"]
    keys = {"sample.spacing_m": 0.75, "sample.num_steps": 3}
    keys["model.transformer.dim"] = DIT.dim
    keys["model.transformer.patch"] = DIT.patch
    return [
        *script,
        *(f"--{name}={value}" for name, value in given.items()),
        *(f"--config.{name}={value}" for name, value in keys.items()),
    ]


def start(folder, out):
    return subprocess.Popen(
        command(folder, out),
        cwd=training_city.ROOT,
        env=training_city.environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder, out) -> list[int]:
    """Run to the end and give the numbers of the clips that were made, from 1."""
    process = start(folder, out)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    return clips_in(said)


def clips_in(said: str) -> list[int]:
    lines = [line.split() for line in said.splitlines() if line.startswith("clip ")]
    return [int(line[1]) for line in lines]


def count(out) -> int:
    return sum(path.name.isdigit() for path in (out / "clips").glob("*"))


def wait_for(process, condition):
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.005)


def check_equal(out, whole):
    for name in ("video.mp4", "conditions.mp4", "poses.tum"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (out / "clips").exists()
    made = json.loads((out / "generate.json").read_text())
    assert len(made["clips"]) == CLIPS


@pytest.fixture(scope="module")
def whole(folder):
    assert finish(folder, folder / "whole") == list(range(1, CLIPS + 1))
    return folder / "whole"


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(3, marks=pytest.mark.long, id="three"),
        pytest.param(20, marks=pytest.mark.faults, id="twenty"),
    ],
)
def test_killed_at_random_moments(folder, whole, kills):
    """Whoever starts makes the missing clips alone."""
    moments, out, done = random.Random(kills), folder / f"killed{kills}", 0
    for number in range(kills):
        process, before = start(folder, out), count(out)
        share = kills / (CLIPS - 1)  # so many kills before a clip is waited for
        if (number + 1) % max(1, round(share)) == 0:
            wait_for(process, lambda before=before: count(out) > before)
            time.sleep(moments.uniform(0, 0.3))
        else:
            time.sleep(moments.uniform(0, 12.0))
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        done += 1
        assert clips_in(said) == list(
            range(before + 1, before + 1 + len(clips_in(said)))
        )
    assert done >= min(kills, 3)
    before = count(out)
    assert finish(folder, out) == list(range(before + 1, CLIPS + 1))
    check_equal(out, whole)
    assert finish(folder, out) == []


@pytest.mark.long
def test_sigterm_parks_at_the_last_clip(folder, whole):
    """With the exit code of a process that the signal ends, and nothing lost."""
    out = folder / "parked"
    process = start(folder, out)
    wait_for(process, lambda: count(out) > 0)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors[-2000:]
    assert "the same command goes on" in said
    made = count(out)
    assert clips_in(said) == list(range(1, made + 1))
    assert finish(folder, out) == list(range(made + 1, CLIPS + 1))
    check_equal(out, whole)
