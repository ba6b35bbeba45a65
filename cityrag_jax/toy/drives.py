"""The toy city: named cities, their streets, and the drives that were made there.

Junctions lie on a square grid. A neighbourhood is `blocks x blocks` blocks with the
streets around it; one row of blocks separates neighbours, so no street is shared. A
route walks along streets and turns at junctions in arcs; each drive of a route follows
it in its own lane position, at its own speed, at another time in other weather.

The city is drawn by `render`; what stands where is decided in `world`.
Frames: cameras are OpenCV (x right, y down, z forward), the world is east-north-up
metres about the anchor.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from cityrag_jax.toy.scene import WEATHERS, Scene, draw_scene

Junction = tuple[int, int]
PATH_STEP_M = 0.05
CAPTURE_INTERVAL_S = 0.1
CAMERA_HEIGHT_M = 2.2
TURN_RADIUS_M = 6.0
TURNS, STOPS = 0.3, 0.15  # how likely at a junction

# Latitude, longitude (degrees) and height over the ellipsoid (metres) of real centres.
ANCHORS = {
    "paris": (48.8566, 2.3522, 79.0),
    "honolulu": (21.3069, -157.8583, 21.0),
    "philadelphia": (39.9526, -75.1652, -22.0),
    "london": (51.5074, -0.1278, 58.0),
    "tokyo": (35.6762, 139.6503, 77.0),
    "sydney": (-33.8688, 151.2093, 42.0),
    "sao_paulo": (-23.5505, -46.6333, 757.0),
    "reykjavik": (64.1466, -21.9426, 81.0),
}


@dataclasses.dataclass(frozen=True)
class CityConfig:
    """A toy city: its anchor on Earth, its size, and how it is driven through.

    `neighbourhoods` and `blocks` count along a side. `routes` limits the routes of a
    neighbourhood; None makes as many as cover every street. `step_m` bounds a drive's
    mean distance between captures.
    """

    name: str
    seed: int
    latitude_deg: float
    longitude_deg: float
    height_m: float
    neighbourhoods: int = 2
    blocks: int = 3
    block_m: float = 48.0
    routes: int | None = None
    route_streets: int = 10
    drives_per_route: int = 2
    step_m: tuple[float, float] = (0.25, 0.5)
    supersample: int = 2

    def __post_init__(self) -> None:
        counts = ("neighbourhoods", "blocks", "route_streets")
        for key in (*counts, "drives_per_route", "supersample"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; give 1 or more.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more.")
        if not 30.0 <= self.block_m <= 200.0:
            raise ValueError(
                f"block_m is {self.block_m}; give 30 to 200 m, streets take 16 of it."
            )
        if not 0.0 < self.step_m[0] <= self.step_m[1]:
            raise ValueError(f"step_m is {self.step_m}; give 0 < slowest <= fastest.")


@dataclasses.dataclass(frozen=True)
class Drive:
    """One passage along a route: a pose and a time for each capture, and its light."""

    index: int
    route: int
    neighbourhood: int
    enu_from_camera: Float[np.ndarray, "N 4 4"]
    time_s: Float[np.ndarray, " N"]
    scene: Scene


def city(name: str, **overrides) -> CityConfig:
    """Give a named city, anchored at its real centre; `overrides` replace fields."""
    if name not in ANCHORS:
        raise ValueError(f"City {name!r} is unknown; take one of {sorted(ANCHORS)}.")
    latitude, longitude, height = ANCHORS[name]
    seed = 1000 + sorted(ANCHORS).index(name)
    fields = {"seed": seed, "latitude_deg": latitude, "longitude_deg": longitude}
    return CityConfig(name=name, **{**fields, "height_m": height, **overrides})


def drives(config: CityConfig) -> list[Drive]:
    """Make every drive of a city; drives of a route follow each other in the list."""
    made = []
    route = 0
    for neighbourhood in range(config.neighbourhoods**2):
        for junctions in routes(config, neighbourhood):
            offsets = None
            for repeat in range(config.drives_per_route):
                rng = np.random.default_rng([config.seed, 7, route, repeat])
                if offsets is None:
                    offsets = rng.uniform(1.1, 1.9)
                offset = offsets + (repeat > 0) * rng.uniform(-0.7, 0.7)
                weather = _weather(config, route, repeat)
                scene = draw_scene(
                    rng, weather, config.latitude_deg, config.longitude_deg
                )
                poses = drive_along(config, junctions, offset, rng)
                seconds = CAPTURE_INTERVAL_S * np.arange(len(poses))
                time_s = float(scene.start_time_s) + seconds
                made.append(
                    Drive(len(made), route, neighbourhood, poses, time_s, scene)
                )
            route += 1
    return made


def _weather(config: CityConfig, route: int, repeat: int) -> str:
    """Choose a drive's weather; the drives of a route all differ where they can."""
    rng = np.random.default_rng([config.seed, 8, route])
    order = rng.permutation(WEATHERS)
    return str(order[repeat % len(order)])


def streets(config: CityConfig, neighbourhood: int) -> set[frozenset[Junction]]:
    """List a neighbourhood's streets as pairs of junctions that they join."""
    junctions = _junctions(config, neighbourhood)
    return {
        frozenset((place, (place[0] + dx, place[1] + dy)))
        for place in junctions
        for dx, dy in ((1, 0), (0, 1))
        if (place[0] + dx, place[1] + dy) in junctions
    }


def _junctions(config: CityConfig, neighbourhood: int) -> set[Junction]:
    row, column = divmod(neighbourhood, config.neighbourhoods)
    stride = config.blocks + 2
    return {
        (column * stride + i, row * stride + j)
        for i in range(config.blocks + 1)
        for j in range(config.blocks + 1)
    }


def routes(config: CityConfig, neighbourhood: int) -> list[list[Junction]]:
    """Walk the junctions of a neighbourhood until every street was taken.

    A route never turns back; it prefers streets not yet taken, and turns at a junction
    by `TURNS` where it has the choice.
    """
    rng = np.random.default_rng([config.seed, 6, neighbourhood])
    junctions = _junctions(config, neighbourhood)
    left = streets(config, neighbourhood)
    made: list[list[Junction]] = []
    while left and (config.routes is None or len(made) < config.routes):
        first = sorted(sorted(street) for street in left)[rng.integers(len(left))]
        route = list(first if rng.uniform() < 0.5 else first[::-1])
        while len(route) <= config.route_streets:
            ahead = _choices(junctions, route)
            weights = np.array(
                [
                    _turn_weight(route, place)
                    * (1.0 if frozenset((route[-1], place)) in left else 0.2)
                    for place in ahead
                ]
            )
            pick = rng.choice(len(ahead), p=weights / weights.sum())
            left.discard(frozenset(route[-2:]))
            route.append(ahead[pick])
        left.discard(frozenset(route[-2:]))
        made.append(route)
    return made


def _choices(junctions: set[Junction], route: list[Junction]) -> list[Junction]:
    (px, py), (x, y) = route[-2:]
    around = [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
    return [place for place in around if place in junctions and place != (px, py)]


def _turn_weight(route: list[Junction], place: Junction) -> float:
    (px, py), (x, y) = route[-2:]
    straight = (2 * x - px, 2 * y - py) == place
    return 1.0 - TURNS if straight else TURNS / 2


def centre_line(
    config: CityConfig, junctions: list[Junction]
) -> tuple[Float[np.ndarray, "M 2"], Float[np.ndarray, " M"]]:
    """Trace a route's centre line: points every `PATH_STEP_M` and headings.

    Headings are radians anticlockwise from east, continuous along the route. Corners
    are arcs of `TURN_RADIUS_M` that touch both streets.
    """
    radius = TURN_RADIUS_M
    corners = np.asarray(junctions, float) * config.block_m
    legs = np.diff(corners, axis=0)
    heading = np.arctan2(legs[:, 1], legs[:, 0])
    turn = (np.diff(heading) + np.pi) % (2 * np.pi) - np.pi
    heading = heading[0] + np.concatenate([[0.0], np.cumsum(turn)])
    points, angles = [], []
    for k, leg in enumerate(legs):
        direction = leg / np.linalg.norm(leg)
        start = radius if k > 0 and abs(turn[k - 1]) > 1e-6 else 0.0
        stop = radius if k < len(turn) and abs(turn[k]) > 1e-6 else 0.0
        count = int(round((config.block_m - start - stop) / PATH_STEP_M))
        along = start + PATH_STEP_M * np.arange(count)
        points.append(corners[k] + along[:, None] * direction)
        angles.append(np.full(count, heading[k]))
        if stop:
            swept = np.arange(0.0, np.pi / 2, PATH_STEP_M / radius) * np.sign(turn[k])
            centre = corners[k + 1] - radius * direction
            angle = heading[k] + swept
            left = np.sign(turn[k]) * radius
            centre = centre + left * np.array([-direction[1], direction[0]])
            points.append(centre + left * np.stack([np.sin(angle), -np.cos(angle)], 1))
            angles.append(angle)
    return np.concatenate(points), np.concatenate(angles)


def drive_along(
    config: CityConfig,
    junctions: list[Junction],
    offset_m: float,
    rng: np.random.Generator,
) -> Float[np.ndarray, "N 4 4"]:
    """Drive a route `offset_m` right of its centre line; return enu_from_camera.

    The offset wanders by 0.2 m, the speed by a quarter within `config.step_m`, and at
    some junctions the car stands for a few captures.
    """
    points, heading = centre_line(config, junctions)
    travelled = PATH_STEP_M * np.arange(len(points))
    wander = 0.2 * np.sin(travelled / rng.uniform(15, 25) + rng.uniform(0, 6.28))
    right = np.stack([np.sin(heading), -np.cos(heading)], axis=1)
    points = points + (offset_m + wander)[:, None] * right
    length = np.concatenate(
        [[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    )
    at = _captures(config, length[-1], rng)
    place = np.stack([np.interp(at, length, points[:, k]) for k in range(2)], axis=1)
    angle = np.interp(at, length, heading)
    poses = np.zeros((len(at), 4, 4))
    poses[:, :2, 0] = np.stack([np.sin(angle), -np.cos(angle)], axis=1)
    poses[:, 2, 1] = -1.0
    poses[:, :2, 2] = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    poses[:, :2, 3] = place
    poses[:, 2, 3] = CAMERA_HEIGHT_M
    poses[:, 3, 3] = 1.0
    return poses


def _captures(
    config: CityConfig, length_m: float, rng: np.random.Generator
) -> Float[np.ndarray, " N"]:
    """Space captures along a drive: a wandering speed, stops of 4 to 12 captures."""
    slow, fast = config.step_m
    mean, phase = rng.uniform(slow, fast), rng.uniform(0, 6.28)
    at = [0.0]
    stops = np.arange(config.block_m, length_m, config.block_m) - 10.0
    stops = list(stops[rng.uniform(size=len(stops)) < STOPS])
    while at[-1] < length_m:
        if stops and at[-1] >= stops[0]:
            stops.pop(0)
            at.extend(at[-1] + 0.01 * np.arange(1, rng.integers(4, 13)))
        speed = mean * (1.0 + 0.25 * np.sin(at[-1] / 12.0 + phase))
        at.append(at[-1] + float(np.clip(speed, slow, fast)))
    return np.asarray(at[:-1])
