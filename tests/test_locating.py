"""A photo's heading is proposed by the panoramas around it, or said to be unsure."""

import importlib.util
import pathlib

import cv2
import numpy as np
import pytest
import synthetic_city as synthetic
import test_film as street

from cityrag_jax.data import locating
from cityrag_jax.data.video import write_image
from cityrag_jax.data.writing import write_city
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.geo.panorama import crop_panorama
from cityrag_jax.geo.photo import parse_photo_pose

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "locate_photo.py"


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A street of painted walls, with one capture near where the photo was taken."""
    height, street.HEIGHT = street.HEIGHT, 512
    try:
        way_m = np.array([22.0, 82.0])
        made = [street.street_panorama(at_m) for at_m in way_m]
        photographed = street.street_panorama(22.7)
    finally:
        street.HEIGHT = height
    columns = synthetic.columns([street.pose_at(at_m) for at_m in way_m])
    header = synthetic.header("street", 512)
    folder = tmp_path_factory.mktemp("located") / "street"
    return write_city(folder, header, columns, made), photographed


def photo_of(panorama, off_deg):
    """Take a photo, darker and noisy, beside the street's own direction."""
    kinds = dict(height=360, width=540, fov_rad=float(np.deg2rad(70)))
    view = crop_panorama(panorama, float(np.deg2rad(off_deg)), **kinds)
    noise = np.random.default_rng(1).normal(0, 4, view.shape)
    return (255 * (view / 255) ** 1.5 + noise).clip(0, 255).astype(np.uint8)


def locate(*words):
    spec = importlib.util.spec_from_file_location("locate_photo", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(tool.COMMAND.parse([*map(str, words)]))


@pytest.mark.long
def test_a_photo_beside_the_street_is_turned_to_its_heading(city, tmp_path, capsys):
    """The street goes north-east; the photo looks 40 degrees left of it."""
    built, panorama = city
    write_image(tmp_path / "photo.png", photo_of(panorama, -40.0))
    place = geodetic_from_ecef(
        (ecef_from_enu(*synthetic.ANCHOR) @ street.pose_at(22.7)[0])[:3, 3]
    )
    words = [f"--city={built.folder}", f"--image={tmp_path / 'photo.png'}"]
    words += [f"--place={place[0]:.7f},{place[1]:.7f}", "--fov-deg=70"]
    locate(*words, f"--out={tmp_path / 'match.jpg'}")
    said = capsys.readouterr().out
    pose = parse_photo_pose(said.split("--photo-pose=")[1].split()[0])
    # The nearest capture is 0.7 m away and the walls are 6 m: 7 degrees at the side.
    assert pose.heading_deg == pytest.approx(5.0, abs=3)
    assert pose.pitch_deg == pytest.approx(0.0, abs=2) and pose.fov_deg == 70
    assert cv2.imread(str(tmp_path / "match.jpg")).std() > 10


@pytest.mark.long
def test_a_photo_of_somewhere_else_has_no_heading(city, tmp_path, capsys):
    built, _ = city
    other = np.random.default_rng(3).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    other = cv2.resize(other, (540, 360), interpolation=cv2.INTER_CUBIC)
    write_image(tmp_path / "other.png", other)
    words = [f"--city={built.folder}", f"--image={tmp_path / 'other.png'}"]
    at = f"--place={synthetic.ANCHOR[0] + 1.3e-4},{synthetic.ANCHOR[1] + 2e-4}"
    with pytest.raises(SystemExit) as ended:
        locate(*words, at, "--fov-deg=70")
    assert ended.value.code == 3 and "no heading is sure" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no capture within 15 m .* swapped"):
        locate(*words, "--place=11.575,48.137", "--fov-deg=70")
    with pytest.raises(ValueError, match="does not tell its place; give --place"):
        locate(*words, "--fov-deg=70")
    with pytest.raises(ValueError, match="does not tell its focal length"):
        locate(*words, at)


def test_the_heading_is_where_most_pairs_agree(rng):
    """Of 300 wrong pairs and 60 true ones around north, half of them beyond it."""
    heading = np.concatenate([rng.uniform(0, 360, 300), rng.normal(0, 1.5, 60) % 360])
    capture = np.repeat([4, 7], [300, 60])
    found = locating.choose_heading(heading, np.zeros(360), capture)
    assert min(found.heading_deg, 360 - found.heading_deg) < 1.5
    assert found.capture == 7 and found.sure
    nothing = locating.choose_heading(heading[:300], np.zeros(300), capture[:300])
    assert not nothing.sure
