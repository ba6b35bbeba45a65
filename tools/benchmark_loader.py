"""Time the reading of training views from panoramas, beside the obvious way.

    python tools/benchmark_loader.py --pictures=DIR [--height=2048] [--crops=400]

Equirectangular pictures become a city of tiles in a temporary folder; those smaller
than its panoramas are put side by side, so that a pixel keeps a real one's detail. One
thread then crops views of 832x480 and 65 degrees at random headings. The obvious way
decodes whole panoramas and samples by py360convert (`pip install py360convert`), which
is timed in the same run. Seconds are a processor's, of the best of ten parts.
Memory is that of a process that reads and holds nothing else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from cityrag_jax.commands import Command
from cityrag_jax.data.captures import Captures, CityHeader
from cityrag_jax.data.records import APART, dataset_info
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image
from cityrag_jax.data.writing import Writing, write_city
from cityrag_jax.geo.poses import poses_from_geodetic

VIEW = {"height": 480, "width": 832, "fov_deg": 65.0}
ANCHOR = (48.137, 11.575, 520.0)
ROUNDS = 10
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".webp")
# What a worker does, and what it then holds.
WORKER = """
import re, sys
import numpy as np
from cityrag_jax.data.records import APART, dataset_info
from cityrag_jax.data.store import City
city, count, view = City(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
rng = np.random.default_rng(1)
for _ in range(count):
    city.crops(rng.integers(0, len(city), 1), rng.uniform(0, 7, 1), **view)
assert "index" not in vars(city) and "jax" not in sys.modules
# What getrusage says would begin with the parent's own.
print(int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**10)
"""

COMMAND = Command(__doc__)
COMMAND.needs("--pictures", type=Path, help="folder of panoramas")
COMMAND.takes("--height", type=int, default=2048, help="of the city's panoramas")
COMMAND.takes("--crops", type=int, default=400, help="to time")
COMMAND.takes("--quality", type=int, default=90, help="of the JPEGs")


def read_panoramas(folder: Path, height: int) -> list[np.ndarray]:
    """Read a folder's panoramas at one height; small ones are put side by side."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures; give {', '.join(SUFFIXES)}.")
    panoramas = []
    for path in paths:
        picture = read_image(path)
        times = max(1, height // picture.shape[0])
        size = (2 * height // times, height // times)
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        panoramas.append(np.tile(small, (times, times, 1)))
    return panoramas


def make_city(folder: Path, panoramas: list[np.ndarray], quality: int) -> City:
    """Write panoramas as a drive of a city."""
    count = len(panoramas)
    longitude = ANCHOR[1] + 1e-5 * np.arange(count)
    zeros = np.zeros(count, np.int32)
    latitude, height_m = np.full(count, ANCHOR[0]), np.full(count, ANCHOR[2])
    poses = poses_from_geodetic(latitude, longitude, height_m, np.full(count, 90.0))
    time_s, whole = 1.7e9 + np.arange(count, dtype=float), np.ones(count, bool)
    captures = Captures(poses, time_s, zeros, zeros, zeros, zeros, whole)
    header = CityHeader("benchmark", panoramas[0].shape[0], ANCHOR, ("",), ("",))
    return write_city(folder, header, captures, panoramas, how=Writing(quality))


def per_second(
    crop: Callable[[int, float], object], count: int, panoramas: int
) -> float:
    """Give crops a second of processor time, the best of `ROUNDS` parts of them.

    Random panoramas and headings. Other processes only ever slow a part down.
    """
    rng, best_s = np.random.default_rng(0), float("inf")
    crop(0, 0.0)
    for _ in range(ROUNDS):
        places = rng.integers(0, panoramas, count).tolist()
        yaws = rng.uniform(0, 2 * np.pi, count).tolist()
        began = time.process_time()
        for place, yaw in zip(places, yaws, strict=True):
            crop(place, yaw)
        best_s = min(best_s, (time.process_time() - began) / count)
    return 1 / best_s


def obvious_crop(jpegs: list[bytes], place: int, yaw_rad: float) -> np.ndarray:
    """Decode a whole panorama and look into it by py360convert."""
    import py360convert

    picture = simplejpeg.decode_jpeg(jpegs[place])
    aspect = VIEW["height"] / VIEW["width"]
    upright = np.rad2deg(
        2 * np.arctan(np.tan(np.deg2rad(VIEW["fov_deg"] / 2)) * aspect)
    )
    angles = (VIEW["fov_deg"], float(upright))
    size = (VIEW["height"], VIEW["width"])
    return py360convert.e2p(picture, angles, float(np.rad2deg(yaw_rad)), 0, size)


def main(given: argparse.Namespace) -> None:
    """Time both ways and say how they compare."""
    cv2.setNumThreads(1)
    panoramas = read_panoramas(given.pictures, given.height)
    jpegs = [simplejpeg.encode_jpeg(p, quality=given.quality) for p in panoramas]
    with tempfile.TemporaryDirectory() as folder:
        city = make_city(Path(folder) / "city", panoramas, given.quality)

        def crop(place: int, yaw_rad: float) -> np.ndarray:
            return city.crops(np.array([place]), np.array([yaw_rad]), **VIEW)[0]

        def obvious(place: int, yaw_rad: float) -> np.ndarray:
            return obvious_crop(jpegs, place, yaw_rad)

        apart = np.abs(crop(0, 1.0).astype(float) - obvious(0, 1.0)).mean()
        each = max(1, given.crops // ROUNDS)
        rates = [per_second(crop, each, len(city))]
        rates.append(per_second(obvious, max(1, each // 10), len(city)))
        words = [sys.executable, "-c", WORKER, str(city.folder), "100", repr(VIEW)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        sizes = [dataset_info(city.folder / name)["numBytes"] for name in APART]
    facts = {
        "panoramas": len(panoramas),
        "megabytes_each": round(float(np.mean([len(x) for x in jpegs])) / 1e6, 2),
        "horizon_share": round(sizes[0] / sum(sizes), 3),
        "crops_a_second": round(rates[0], 1),
        "obvious_a_second": round(rates[1], 2),
        "times": round(rates[0] / rates[1], 1),
        "greys_apart": round(float(apart), 2),
        "worker_mib": round(float(done.stdout)),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    COMMAND.run(main)
