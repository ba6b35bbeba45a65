"""The toy city as a real recording would have it: wrong in known ways, on request.

What was driven changes (`misbehave`: gaps, ways back, streets driven twice in one go,
standing still), and so do the poses that are written down of it (`record`: noise,
drift, altitude, a hill). Pictures are always those of the true poses, tilted where the
camera is said to wobble. Without any of it all is as it was.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from cityrag_jax.geo.poses import level_from_tilted
from cityrag_jax.toy.drives import CAPTURE_INTERVAL_S, CityConfig, Drive
from cityrag_jax.toy.scene import WEATHERS, draw_scene

DRIFT_M = 30.0  # of way, after which satellites err another way
GAP_M = 25.0  # of way that a gap takes: longer than a step may be
HILL_M = 150.0  # from foot to top


@dataclasses.dataclass(frozen=True)
class Trouble:
    """What is wrong with a recording; zero is nothing.

    Poses err by `noise_m` each and by `drift_m` in common, east and north;
    `altitude_m` is each drive's own error of height, `hill_m` how high a hill is.
    `tilt_deg` is by how much pitch and roll wobble, untold. Of every drive `gaps`
    stretches are missing; `stops` captures stand still after a fifth of it, and jitter
    by the noise. `reversed` drives per route come back the other way on another day,
    `doubled` go there and back in one.
    """

    noise_m: float = 0.0
    drift_m: float = 0.0
    altitude_m: float = 0.0
    hill_m: float = 0.0
    tilt_deg: float = 0.0
    gaps: int = 0
    stops: int = 0
    reversed: int = 0
    doubled: int = 0


ALL = Trouble(0.3, 2.0, 6.0, 20.0, 3.0, 1, 40, 1, 1)


def read_trouble(text: str | None) -> Trouble | None:
    """Read `noise_m=0.3,gaps=1,...`, or `all`; None where nothing is asked for."""
    if not text:
        return None
    if text == "all":
        return ALL
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Trouble)}
    given = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        try:
            given[name] = kinds[name](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"--trouble holds {word!r}; give NAME=NUMBER of {', '.join(kinds)}, "
                "separated by commas, or all."
            ) from None
    return Trouble(**given)


def misbehave(config: CityConfig, made: list[Drive], trouble: Trouble) -> list[Drive]:
    """Give what was really driven: the drives with their gaps and stops, and more."""
    more = []
    firsts = {drive.route: drive for drive in reversed(made)}
    for route, drive in sorted(firsts.items()):
        for k in range(trouble.reversed + trouble.doubled):
            rng = np.random.default_rng([config.seed, 9, route, k])
            back = turn_back(drive.enu_from_camera)
            if k >= trouble.reversed:
                back = np.concatenate([drive.enu_from_camera, back])
            weather = str(rng.choice(WEATHERS))
            place = (config.latitude_deg, config.longitude_deg)
            scene = draw_scene(rng, weather, *place)
            seconds = CAPTURE_INTERVAL_S * np.arange(len(back))
            time_s = float(scene.start_time_s) + seconds
            more.append(Drive(0, route, drive.neighbourhood, back, time_s, scene))
    drives = [
        _interrupt(_stand(drive, trouble), trouble, [config.seed, 10, number])
        for number, drive in enumerate([*made, *more])
    ]
    return [dataclasses.replace(d, index=k) for k, d in enumerate(drives)]


def turn_back(
    enu_from_camera: Float64[np.ndarray, "N 4 4"],
) -> Float64[np.ndarray, "N 4 4"]:
    """Drive the same way back on the other lane, looking ahead."""
    back = enu_from_camera[::-1].copy()
    back[:, :3, 3] -= 3.0 * back[:, :3, 0]
    back[:, :3, [0, 2]] *= -1
    return back


def _stand(drive: Drive, trouble: Trouble) -> Drive:
    """Let a drive stand after a fifth of it; what comes behind comes later."""
    if not trouble.stops:
        return drive
    place, step_s = len(drive.time_s) // 5, np.diff(drive.time_s[:2])
    rows = np.sort(
        np.concatenate([np.arange(len(drive.time_s)), [place] * trouble.stops])
    )
    time_s = drive.time_s[0] + step_s * np.arange(len(rows))
    poses = drive.enu_from_camera[rows]
    return dataclasses.replace(drive, enu_from_camera=poses, time_s=time_s)


def _interrupt(drive: Drive, trouble: Trouble, seed: list[int]) -> Drive:
    """Lose stretches of a drive, each at a place of its own."""
    along_m, kept = _along(drive.enu_from_camera), np.ones(len(drive.time_s), bool)
    starts_m = np.linspace(0, along_m[-1], trouble.gaps + 2)[1:-1]
    starts_m += np.random.default_rng(seed).uniform(-5, 5, len(starts_m))
    for start_m in starts_m.tolist():
        kept &= (along_m < start_m) | (along_m > start_m + GAP_M)
    poses, time_s = drive.enu_from_camera[kept], drive.time_s[kept]
    return dataclasses.replace(drive, enu_from_camera=poses, time_s=time_s)


def wobble(config: CityConfig, drive: Drive, trouble: Trouble) -> Drive:
    """Tilt a drive's cameras, for what they see; their poses do not tell."""
    if not trouble.tilt_deg:
        return drive
    rng = np.random.default_rng([config.seed, 11, drive.index])
    angles = np.deg2rad(rng.normal(0, trouble.tilt_deg, (2, len(drive.time_s))))
    poses = drive.enu_from_camera.copy()
    poses[:, :3, :3] = poses[:, :3, :3] @ level_from_tilted(*angles)
    return dataclasses.replace(drive, enu_from_camera=poses)


def record(config: CityConfig, drive: Drive, trouble: Trouble) -> Drive:
    """Give the poses that are written down of a drive."""
    rng = np.random.default_rng([config.seed, 12, drive.index])
    poses = drive.enu_from_camera.copy()
    place_m = poses[:, :2, 3].copy()
    poses[:, :2, 3] += rng.normal(0, trouble.noise_m, place_m.shape)
    poses[:, :2, 3] += trouble.drift_m * drift(_along(poses), rng)
    poses[:, 2, 3] += rng.normal(0, trouble.altitude_m)
    far = np.linalg.norm(place_m, axis=1) / HILL_M
    poses[:, 2, 3] += trouble.hill_m * np.cos(np.minimum(far, 1) * np.pi / 2) ** 2
    return dataclasses.replace(drive, enu_from_camera=poses)


def drift(
    along_m: Float64[np.ndarray, " N"], rng: np.random.Generator
) -> Float64[np.ndarray, "N 2"]:
    """Give errors of deviation 1 that change over `DRIFT_M` of way, and while standing
    not at all."""
    knots = np.arange(0, along_m[-1] + 4 * DRIFT_M, DRIFT_M)
    values = rng.normal(0, 1, (len(knots), 2))
    place = along_m / DRIFT_M
    before, share = np.floor(place).astype(int), (place % 1)[:, None]
    # Weights whose squares add up to 1 keep the deviation between the knots.
    angle = share * np.pi / 2
    return np.cos(angle) * values[before] + np.sin(angle) * values[before + 1]


def _along(poses: np.ndarray) -> Float64[np.ndarray, " N"]:
    steps_m = np.linalg.norm(np.diff(poses[:, :2, 3], axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps_m)])
