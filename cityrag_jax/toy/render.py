"""Render any camera at any place and time of any drive through the toy city.

Panoramas and pinhole views are the same code on other rays (`rays`); this file
puts light on what the rays meet, averages the samples of each pixel, and holds the
public calls.

Frames: cameras are OpenCV (x right, y down, z forward), the world is east-north-up
metres about the city's anchor. Cameras stand on the ground, below the roofs: roofs are
not drawn. Depth is metres along the ray, infinite in the sky.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

from cityrag_jax.toy import shade, world
from cityrag_jax.toy.drives import CityConfig
from cityrag_jax.toy.rays import (
    CARS,
    FAR,
    GROUND,
    TRANSIENT,
    TREES,
    TRUNK_M,
    Lens,
    Rays,
    Seen,
    by_index,
    car_size,
    choose_first,
    find_things,
    line_up,
    make_rays,
    measure,
    tree_size,
    walk,
)
from cityrag_jax.toy.scene import Scene
from cityrag_jax.toy.shade import Light, mix, pick, scale
from cityrag_jax.toy.world import Grid

# A camera tilted by less is drawn as level, which is quicker: 0.07 pixels of 832 at 65
# degrees. The Earth's curve alone tilts it so far 640 m from the anchor.
LEVEL = 1e-4


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Pictures, metres along each ray (infinite in the sky), what was passing by."""

    rgb: UInt8[np.ndarray, "B H W 3"]
    depth_m: Float32[np.ndarray, "B H W"]
    transient: Bool[np.ndarray, "B H W"]


class Scenes(NamedTuple):
    """Scenes of a batch, each field of `Scene` with a leading axis B."""

    sun: Array
    sun_rgb: Array
    ambient_rgb: Array
    zenith_rgb: Array
    horizon_rgb: Array
    tint_rgb: Array
    clouds: Array
    haze_per_m: Array
    wet: Array
    lamps: Array
    seed: Array


@functools.partial(jax.jit, static_argnums=0)
def paint(
    grid: Grid, seed: Array, scene: Scenes, rays: Rays, time_s: Array, seen: Seen
) -> Array:
    """Colour every sample; return packed colours."""
    light = _light(scene)
    haze_per_m = scene.haze_per_m[:, None, None]
    s = jnp.minimum(seen.s, 1e4)
    x, y, z = rays.x + rays.dx * s, rays.y + rays.dy * s, rays.z + rays.slope * s
    index = seen.index
    surface, facing = _shade_wall(seen, z, s, light)
    on_ground = index == GROUND
    road = shade.ground(grid.block_m, seed, x, y, s, light)
    surface = _choose(on_ground, road, surface)
    facing = jnp.where(on_ground, light.sun[2], facing)
    surface, facing, ambient = _shade_things(
        rays, seen, (x, y, z), s, light, surface, facing
    )
    facing = facing * world.sunlit(grid, seed, x, y, z, light.sun)
    ambient = ambient * (0.72 + 0.28 * jnp.clip(z * 0.12, 0.0, 1.0))
    color = tuple(
        c * (a * ambient + b * facing) + g
        for c, a, b, g in zip(
            surface.albedo, light.ambient_rgb, light.sun_rgb, surface.glow, strict=True
        )
    )
    grazing = jnp.where(on_ground, 1.0 / (1.0 + 2.5 * jnp.abs(rays.slope)), 0.8)
    rise = jnp.abs(rays.slope) * jnp.maximum(seen.walls.s[0] - s, 0.0)
    dark = on_ground & (rise < seen.walls.top[0])
    shown = mix(light.horizon_rgb, light.zenith_rgb, np.float32(0.4))
    shown = scale(shown, jnp.where(dark, 0.35, 1.0))
    color = mix(color, shown, surface.mirror * grazing)
    color = mix(color, light.horizon_rgb, 1.0 - jnp.exp(-haze_per_m * s))
    above = shade.sky(rays.dx, rays.dy, rays.slope, time_s[:, None, None], light)
    above = _skyline(seed, rays, light, haze_per_m, above)
    return shade.pack(pick(seen.s >= FAR, above, color))


def _shade_wall(
    seen: Seen, z: Array, s: Array, light: Light
) -> tuple[shade.Surface, Array]:
    """Paint each sample's facade and say how much it faces the sun."""
    top, u, width, bits, face = (by_index(seen.wall, part) for part in seen.walls[1:])
    blank = face > 4
    face = jnp.where(blank, face - 8, face)
    along = jnp.where(jnp.abs(face) == 1, light.sun[0], light.sun[1])
    facing = jnp.maximum(-jnp.sign(face).astype(jnp.float32) * along, 0.0)
    return shade.facade(bits, u, z, width, top, blank, s, light), facing


def _shade_things(
    rays: Rays, seen: Seen, point: tuple[Array, Array, Array], s: Array, light: Light,
    surface: shade.Surface, facing: Array,
) -> tuple[shade.Surface, Array, Array]:  # fmt: skip
    """Paint cars, people, trees and posts over walls and ground.

    Returns the surface, how much it faces the sun, and how much sky it sees.
    """
    x, y, z = point
    index, sun = seen.index, light.sun
    gx = x - by_index(index, [near.x for near in seen.near])
    gy = y - by_index(index, [near.y for near in seen.near])
    bits = by_index(index, [near.bits for near in seen.near])
    way = by_index(index, [near.way for near in seen.near])
    off = gx * rays.dy - gy * rays.dx
    is_car, is_person = index < CARS, (index >= CARS) & (index < TRANSIENT)
    is_tree = (index >= TRANSIENT) & (index < TRANSIENT + TREES)
    is_post = (index >= TRANSIENT + TREES) & (index < GROUND)
    runs_y = by_index(index, [near.axis for near in seen.near[:CARS]]) == 1
    lx = jnp.where(runs_y, gy, gx) * way
    ly = jnp.where(runs_y, gx, gy) * way
    half, tall, _ = car_size(bits)
    surface = _choose(is_car, shade.car(bits, lx, ly, z, half, tall), surface)
    on_top = (jnp.abs(z - tall) < 0.02) | (jnp.abs(z - 0.92) < 0.015)
    beside = jnp.abs(ly) > 0.79
    across = jnp.where(beside == runs_y, sun[0], sun[1])
    outward = jnp.sign(jnp.where(beside, ly, lx)) * way
    car_sun = jnp.where(on_top, sun[2], jnp.maximum(across * outward, 0.0))
    crown = is_tree & (z > TRUNK_M)
    surface = _choose(is_tree, shade.tree(bits, x, y, z, crown, s), surface)
    radius, high, middle = tree_size(bits)
    ball = (gx * sun[0] + gy * sun[1]) / radius + (z - middle) / high * sun[2]
    surface = _choose(is_post, shade.post(way, bits, off, z), surface)
    surface = _choose(is_person, shade.person(bits, off, z), surface)
    facing = jnp.where(index < GROUND, 0.5, facing)
    facing = jnp.where(is_car, car_sun, facing)
    facing = jnp.where(crown, jnp.clip(0.45 + 0.55 * ball, 0.0, 1.0), facing)
    ambient = jnp.where(crown, 0.75 + 0.25 * ball, 1.0)
    return surface, facing, jnp.where(seen.under, 0.35, ambient)


def _skyline(
    seed: Array, rays: Rays, light: Light, haze_per_m: Array, above: tuple
) -> tuple:
    """Close the ends of the streets with hazy towers, too far to have a depth."""
    bearing = jnp.floor(jnp.arctan2(rays.dy, rays.dx) * 45.0).astype(jnp.int32)
    height = 0.02 + 0.06 * world.fraction(world.hashed(seed, 90, bearing), 8)
    tower = mix(light.horizon_rgb, light.zenith_rgb, np.float32(0.35))
    tower = mix(tower, light.horizon_rgb, 1.0 - jnp.exp(-400.0 * haze_per_m))
    return pick(
        rays.slope < height,
        scale(tower, 0.8 + 0.2 * jnp.tanh(150.0 * haze_per_m)),
        above,
    )


def _choose(mask: Array, new: shade.Surface, old: shade.Surface) -> shade.Surface:
    return shade.Surface(
        pick(mask, new.albedo, old.albedo),
        pick(mask, new.glow, old.glow),
        jnp.where(mask, new.mirror, old.mirror),
    )


@functools.partial(jax.jit, static_argnums=0)
def _resolve(
    lens: Lens, tint: Array, packed: Array, seen: Seen, slope: Array
) -> tuple[Array, Array, Array]:
    """Average the samples of each pixel; depth is the nearest surface's mean."""
    k, h, w = lens.supersample, lens.height, lens.width

    def samples(v: Array) -> list[Array]:
        return [
            v[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
            for r in range(k)
            for c in range(k)
        ]

    s = seen.s
    inverse = jnp.where(s < FAR, 1.0 / (s * jnp.sqrt(1.0 + slope * slope)), 0.0)
    moving = (seen.index < TRANSIENT) | seen.under
    inverses = samples(inverse)
    nearest = functools.reduce(jnp.maximum, inverses)
    kept = [(v >= nearest / 1.05).astype(jnp.float32) for v in inverses]
    total = sum(v * keep for v, keep in zip(inverses, kept, strict=True))
    depth = jnp.where(nearest > 0.0, sum(kept) / jnp.maximum(total, 1e-9), jnp.inf)
    colors = [shade.unpack(v) for v in samples(packed)]
    mean = [sum(part) / len(colors) for part in zip(*colors, strict=True)]
    rgb = [
        jnp.sqrt(jnp.clip(c * tint[:, n, None, None], 0.0, 1.0)) * 255.0 + 0.5
        for n, c in enumerate(mean)
    ]
    rgb = jnp.stack([c.astype(jnp.uint8) for c in rgb], axis=-1)
    return rgb, depth, functools.reduce(jnp.logical_or, samples(moving))


def _light(scene: Scenes) -> Light:
    """Spread a batch of scenes over pictures."""

    def spread(v: Array) -> tuple[Array, Array, Array]:
        return v[:, 0, None, None], v[:, 1, None, None], v[:, 2, None, None]

    return Light(
        *(spread(v) for v in (scene.sun, scene.sun_rgb, scene.ambient_rgb)),
        *(spread(v) for v in (scene.zenith_rgb, scene.horizon_rgb)),
        *(v[:, None, None] for v in (scene.clouds, scene.wet, scene.lamps, scene.seed)),
    )


def render_on_device(
    grid: Grid, lens: Lens, seed: Array, fov_deg: Array, scene: Scenes, position: Array,
    rotation: Array, time_s: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Render one batch; `scene` has a leading axis B, `time_s` counts from its start.

    Stages compiled one by one, see `rays`: as one program they take twenty times as
    long on CPUs. Do not wrap it in jax.jit.
    """
    rays = make_rays(lens, fov_deg, position, rotation)
    walls = walk(grid, seed, rays)
    things = find_things(grid, seed, scene.seed, position, time_s)
    near = line_up(rays, walls, things)
    ways, wall = measure(rays, walls, near)
    s, index, under = choose_first(rays, near, ways)
    seen = Seen(s, index, wall, under, near, walls)
    color = paint(grid, seed, scene, rays, time_s, seen)
    return _resolve(lens, scene.tint_rgb, color, seen, rays.slope)


def render_panoramas(
    config: CityConfig,
    scene: Scene | Sequence[Scene],
    enu_from_camera: Float[np.ndarray, "B 4 4"],
    time_s: Float[np.ndarray, " B"],
    height: int,
) -> Rendering:
    """Render equirectangular panoramas, twice as wide as high.

    The centre column looks forward, columns go clockwise seen from above, the top row
    looks up; pixel centres are at +0.5.
    `scene` is one for all or one for each; `time_s` is in unix seconds.
    """
    shape = (True, height, 2 * height)
    return _render(config, scene, enu_from_camera, time_s, shape, 0.0)


def render_views(
    config: CityConfig,
    scene: Scene | Sequence[Scene],
    enu_from_camera: Float[np.ndarray, "B 4 4"],
    time_s: Float[np.ndarray, " B"],
    height: int,
    width: int,
    fov_deg: float,
) -> Rendering:
    """Render pinhole views with square pixels and a horizontal field of view."""
    if not 0.0 < fov_deg < 180.0:
        raise ValueError(f"fov_deg is {fov_deg}; a pinhole sees between 0 and 180.")
    shape = (False, height, width)
    return _render(config, scene, enu_from_camera, time_s, shape, fov_deg)


def _render(
    config: CityConfig,
    scene: Scene | Sequence[Scene],
    enu_from_camera: Float[np.ndarray, "B 4 4"],
    time_s: Float[np.ndarray, " B"],
    shape: tuple[bool, int, int],
    fov_deg: float,
) -> Rendering:
    """Render in chunks of one size, so that any number of cameras compiles once."""
    count = len(enu_from_camera)
    scenes = [scene] * count if isinstance(scene, Scene) else list(scene)
    if not count == len(time_s) == len(scenes):
        raise ValueError(
            f"{count} poses, {len(time_s)} times and {len(scenes)} scenes; "
            "give as many of each, or one scene for all."
        )
    panorama, height, width = shape
    rotation = enu_from_camera[:, :3, :3]
    level = bool(np.all(np.abs(rotation[:, 2, [0, 2]]) < LEVEL))
    lens = Lens(panorama, level, height, width, config.supersample)
    grid = Grid(config.block_m)
    rgb = np.empty((count, height, width, 3), np.uint8)
    depth_m = np.empty((count, height, width), np.float32)
    moving = np.empty((count, height, width), bool)
    started_s = np.stack([one.start_time_s for one in scenes])
    elapsed_s = (time_s - started_s).astype(np.float32)
    stacked = Scenes(
        *(np.stack([getattr(one, key) for one in scenes]) for key in Scenes._fields)
    )
    chunk = _chunk(height * width * config.supersample**2)
    for first in range(0, count, chunk):
        rows = np.minimum(np.arange(first, first + chunk), count - 1)
        used = slice(first, min(first + chunk, count))
        part = Scenes(*(jnp.asarray(field[rows]) for field in stacked))
        made = render_on_device(
            grid,
            lens,
            *(jnp.asarray(v) for v in (np.uint32(config.seed), np.float32(fov_deg))),
            part,
            jnp.asarray(enu_from_camera[rows, :3, 3].astype(np.float32)),
            jnp.asarray(rotation[rows].astype(np.float32)),
            jnp.asarray(elapsed_s[rows]),
        )
        size = used.stop - used.start
        for target, values in zip((rgb, depth_m, moving), made, strict=True):
            target[used] = np.asarray(values)[:size]
    return Rendering(rgb, depth_m, moving)


def _chunk(samples: int) -> int:
    """Choose how many cameras to render at once: what caches or a GPU's memory like."""
    budget, most = (20, 8) if jax.default_backend() == "cpu" else (25, 64)
    return max(1, min(most, (1 << budget) // samples))
