"""Render any camera at any place and time of any drive through the toy city.

Panoramas and pinhole views are the same code on other rays. A ray is a horizontal unit
direction and a slope (rise for each horizontal metre). Everything that depends on the
horizontal direction alone, such as the walk through the grid of lots and the nearest
cars and trees, is done once a column where cameras are level, once a sample where they
are not: arrays are [B, 1, W] or [B, H, W] and broadcast. Only facades, marks and leaves
are per sample.

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

from cityrag_jax.data import toy_shade, toy_world
from cityrag_jax.data.toy_city import CityConfig
from cityrag_jax.data.toy_scene import Scene
from cityrag_jax.data.toy_shade import Light, mix, pick, scale
from cityrag_jax.data.toy_world import Grid, Things

WALK_STEPS = 36
FACADES = 5
FAR = np.float32(1e9)
TRUNK_M = 2.3

# How many things of a sort each column may meet, in the order of `Seen.index`.
CARS, PEOPLE, TREES, POSTS = 3, 2, 3, 2
TRANSIENT = CARS + PEOPLE
GROUND = TRANSIENT + TREES + POSTS


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Pictures, metres along each ray (infinite in the sky), and what was passing by."""

    rgb: UInt8[np.ndarray, "B H W 3"]
    depth_m: Float32[np.ndarray, "B H W"]
    transient: Bool[np.ndarray, "B H W"]


class Lens(NamedTuple):
    """What decides the shapes of a rendering: static where code is compiled."""

    panorama: bool
    level: bool
    height: int
    width: int
    supersample: int


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


class Rays(NamedTuple):
    """Rays of a batch: origins [B, 1, 1], directions [B, 1 or H, W], slopes [B, H, W]."""

    x: Array
    y: Array
    z: Array
    dx: Array
    dy: Array
    slope: Array


class Walls(NamedTuple):
    """The facades that a ray can see, nearest first: lists of [B, 1 or H, W]."""

    s: list[Array]
    top: list[Array]
    u: list[Array]
    width: list[Array]
    bits: list[Array]
    face: list[Array]


class Near(NamedTuple):
    """A thing near a column: metres to its middle, metres off the ray, its fields."""

    distance: Array
    off: Array
    x: Array
    y: Array
    axis: Array
    way: Array
    bits: Array


class Seen(NamedTuple):
    """What each sample sees: its horizontal distance, which thing, which facade.

    `index` counts through `near`, then `GROUND`, then a facade, then the sky; `wall`
    counts through `walls`. `under` marks ground beneath cars.
    """

    s: Array
    index: Array
    wall: Array
    under: Array
    near: list[Near]
    walls: Walls


def make_rays(
    lens: Lens, fov_deg: Array, position: Float32[Array, "B 3"], rotation: Array
) -> Rays:
    """Cast a ray through every sample of a batch of cameras.

    The k x k samples of a pixel lie in k x k pictures side by side, not next to each
    other: their mean is then a sum of whole pictures, which vectorises.
    """
    k = lens.supersample
    shift = (np.arange(k)[:, None] + 0.5) / k
    u = (((np.arange(lens.width) + shift) / lens.width).ravel()).astype(np.float32)
    v = (((np.arange(lens.height) + shift) / lens.height).ravel()).astype(np.float32)
    rows, columns = len(v), len(u)
    if lens.panorama:
        azimuth = (2 * np.pi * u - np.pi)[None, :]
        elevation = (np.pi * (0.5 - v))[:, None]
        right, forward = jnp.sin(azimuth), jnp.cos(azimuth)
        level_slope = jnp.tan(elevation)
        cosine, down = jnp.cos(elevation), -jnp.sin(elevation)
    else:
        half = jnp.tan(jnp.deg2rad(fov_deg) / 2)
        x = ((2 * u - 1) * half)[None, :]
        down = ((2 * v - 1) * half * np.float32(rows / columns))[:, None]
        flat = jnp.sqrt(1.0 + x * x)
        right, forward = x / flat, 1.0 / flat
        level_slope, cosine, down = -down / flat, 1.0, down / flat
    origin = (position[:, k, None, None] for k in range(3))
    r = rotation[..., None, None]
    if lens.level:
        dx = r[:, 0, 0] * right[None] + r[:, 0, 2] * forward[None]
        dy = r[:, 1, 0] * right[None] + r[:, 1, 2] * forward[None]
        shape = (position.shape[0], rows, columns)
        return Rays(*origin, dx, dy, jnp.broadcast_to(level_slope[None], shape))
    ray = (cosine * right, jnp.broadcast_to(down, (rows, columns)), cosine * forward)
    dx, dy, dz = (
        sum(
            r[:, k, n] * jnp.broadcast_to(ray[n], (rows, columns))[None]
            for n in range(3)
        )
        for k in range(3)
    )
    flat = jnp.maximum(jnp.hypot(dx, dy), 1e-6)
    return Rays(*origin, dx / flat, dy / flat, dz / flat)


def walk(grid: Grid, seed: Array, rays: Rays) -> Walls:
    """Walk each ray from cell to cell and list the facades that rise above the last.

    A cell counts if its top is seen above all nearer ones; the first `FACADES` do.
    """
    lines = grid.lots + 1
    half, lot, block = (
        np.float32(v) for v in (toy_world.STREET_HALF_M, grid.lot_m, grid.block_m)
    )

    def cell_of(p: Array) -> Array:
        period = jnp.floor(p / block)
        inside = jnp.floor((p - period * block - half) / lot)
        inside = jnp.clip(inside, -1, grid.lots)
        return (period * lines + inside).astype(jnp.int32)

    def line_at(n: Array) -> Array:
        period = jnp.floor((n.astype(jnp.float32) + 0.5) / lines)
        return period * block + half + (n - period * lines) * lot

    def split(n: Array) -> tuple[Array, Array]:
        period = jnp.floor((n.astype(jnp.float32) + 0.5) / lines).astype(jnp.int32)
        return period, n - period * lines

    shape = jnp.broadcast_shapes(rays.x.shape, rays.dx.shape)
    dx = jnp.where(jnp.abs(rays.dx) < 1e-6, 1e-6, rays.dx)
    dy = jnp.where(jnp.abs(rays.dy) < 1e-6, 1e-6, rays.dy)
    step_x, step_y = jnp.sign(dx).astype(jnp.int32), jnp.sign(dy).astype(jnp.int32)
    zeros = jnp.zeros(shape, jnp.float32)
    none = zeros.astype(jnp.int32)
    slots = Walls(
        *([zeros + fill] * FACADES for fill in (FAR, -FAR, 0.0, 1.0)),
        [none.astype(jnp.uint32)] * FACADES,
        [none] * FACADES,
    )
    start = (
        jnp.broadcast_to(cell_of(rays.x), shape),
        jnp.broadcast_to(cell_of(rays.y), shape),
        zeros - FAR,
        zeros,
        none,
        slots,
    )

    def step(_: Array, state: tuple) -> tuple:
        cx, cy, horizon, before, count, slots = state
        sx = (line_at(cx + (step_x > 0)) - rays.x) / dx
        sy = (line_at(cy + (step_y > 0)) - rays.y) / dy
        along_x = sx < sy
        s = jnp.maximum(jnp.minimum(sx, sy), 1e-3)
        cx = cx + jnp.where(along_x, step_x, 0)
        cy = cy + jnp.where(along_x, 0, step_y)
        (i, a), (j, b) = split(cx), split(cy)
        found = toy_world.lot_at(grid, seed, i, j, a, b)
        p = jnp.where(along_x, rays.y + dy * s - j * block, rays.x + dx * s - i * block)
        u = p - half - jnp.where(along_x, found.y_start, found.x_start)
        width = jnp.where(along_x, found.y_width, found.x_width)
        face = jnp.where(along_x, step_x, 2 * step_y)
        face = jnp.where(before > 3.0, face + 8, face)
        rise = (found.height_m - rays.z) / s
        seen = (rise > horizon) & (found.height_m > 0.0)
        values = (s, found.height_m, u, width, found.bits, face)
        slots = Walls(
            *(
                [jnp.where(seen & (count == k), new, old) for k, old in enumerate(part)]
                for new, part in zip(values, slots)
            )
        )
        horizon = jnp.where(seen, rise, horizon)
        return cx, cy, horizon, found.height_m, count + seen, slots

    return jax.lax.fori_loop(0, WALK_STEPS, step, start)[-1]


def _columns(rays: Rays, things: Things, reach_m: float, count: int) -> list[Near]:
    """Pick the `count` nearest things within `reach_m` metres beside each column.

    Where there are fewer, the distance is `FAR`.
    """
    gx = things.x[:, :, None, None] - rays.x[:, None]
    gy = things.y[:, :, None, None] - rays.y[:, None]
    dx, dy = rays.dx[:, None], rays.dy[:, None]
    s, q = gx * dx + gy * dy, gy * dx - gx * dy
    key = jnp.where((jnp.abs(q) < reach_m) & (s > 0.3) & (s < 150.0), s, FAR)
    order = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :, None, None]
    picked = []
    for _ in range(count):
        distance = jnp.min(key, axis=1)
        first = jnp.where(key == distance[:, None], order, key.shape[1])
        best = jnp.minimum(jnp.min(first, axis=1), key.shape[1] - 1)
        key = jnp.where(order == best[:, None], FAR, key)
        flat = best.reshape(best.shape[0], -1)
        x, y, *rest = (
            jnp.take_along_axis(part, flat, axis=1).reshape(best.shape)
            for part in things
        )
        off = (y - rays.y) * rays.dx - (x - rays.x) * rays.dy
        picked.append(Near(distance, off, x, y, *rest))
    return picked


def _slab(rays: Rays, x: Array, y: Array, hx: Array, hy: Array) -> tuple[Array, Array]:
    """Cross a footprint: where a column enters and leaves an axis-aligned rectangle."""
    dx = jnp.where(jnp.abs(rays.dx) < 1e-6, 1e-6, rays.dx)
    dy = jnp.where(jnp.abs(rays.dy) < 1e-6, 1e-6, rays.dy)
    mx, my = (x - rays.x) / dx, (y - rays.y) / dy
    rx, ry = jnp.abs(hx / dx), jnp.abs(hy / dy)
    enter, leave = jnp.maximum(mx - rx, my - ry), jnp.minimum(mx + rx, my + ry)
    missed = (leave <= enter) | (enter < 0.05)
    return jnp.where(missed, FAR, enter), jnp.where(missed, FAR, leave)


def _box(rays: Rays, enter: Array, leave: Array, top: Array) -> Array:
    """Meet a box from outside: its side, or its top between enter and leave."""
    side = rays.z + rays.slope * enter < top
    over = rays.z + rays.slope * leave < top
    down = (top - rays.z) / jnp.minimum(rays.slope, -1e-6)
    return jnp.where(side, enter, jnp.where(over, down, FAR))


def car_size(bits: Array) -> tuple[Array, Array, Array]:
    """Give a car's half length, its height, and the half length of its cabin."""
    van = (bits & np.uint32(0xE00)) == 0
    half = 1.9 + 0.4 * toy_world.fraction(bits, 24) + jnp.where(van, 0.5, 0.0)
    tall = jnp.where(van, 2.05, 1.42 + 0.15 * toy_world.fraction(bits, 20))
    return half, tall, half * jnp.where(van, 0.92, 0.56)


def _car_footprint(rays: Rays, near: Near) -> tuple[Array, Array]:
    """Say where a column enters and leaves the footprint of a car."""
    half, _, _ = car_size(near.bits)
    along = near.axis == 0
    hx, hy = jnp.where(along, half, 0.9), jnp.where(along, 0.9, half)
    enter, leave = _slab(rays, near.x, near.y, hx, hy)
    gone = near.distance >= FAR
    return jnp.where(gone, FAR, enter), jnp.where(gone, FAR, leave)


def _meet_car(rays: Rays, near: Near) -> Array:
    """Measure the way to a car: a low body and a shorter cabin on it."""
    half, tall, cabin = car_size(near.bits)
    enter, leave = _car_footprint(rays, near)
    body = _box(rays, enter, leave, jnp.full_like(enter, 0.92))
    back = -0.12 * half * near.way
    along = near.axis == 0
    x, y = near.x + jnp.where(along, back, 0.0), near.y + jnp.where(along, 0.0, back)
    hx, hy = jnp.where(along, cabin, 0.8), jnp.where(along, 0.8, cabin)
    inside, outside = _slab(rays, x, y, hx, hy)
    inside = jnp.where(enter < FAR, inside, FAR)
    outside = jnp.where(enter < FAR, outside, FAR)
    return jnp.minimum(body, _box(rays, inside, outside, tall))


def _meet_person(rays: Rays, near: Near) -> Array:
    """Measure the way to a person: an outline turned to the camera."""
    z, q = rays.z + rays.slope * near.distance, jnp.abs(near.off)
    stride = 0.015 + 0.1 * toy_world.fraction(near.bits, 5) * (0.85 - z)
    legs = (z < 0.85) & (jnp.abs(q - 0.09 - stride) < 0.075)
    shoulder = (
        0.25 - 1.2 * jnp.maximum(z - 1.36, 0.0) - 0.06 * jnp.maximum(1.3 - z, 0.0)
    )
    coat = (z < 1.47) & (q < shoulder) & (z > 0.75)
    head = (z > 1.4) & (q * q + (z - 1.6) * (z - 1.6) < 0.018)
    return jnp.where(legs | coat | head, near.distance, FAR)


def _meet_post(rays: Rays, near: Near) -> Array:
    """Measure the way to a lamp, bin, bollard or sign (`way` 0 to 3), likewise."""
    z, q, kind = rays.z + rays.slope * near.distance, jnp.abs(near.off), near.way
    thick = jnp.where(kind == 0, 0.07, jnp.where(kind == 1, 0.27, 0.05))
    high = jnp.where(kind == 0, 5.3, jnp.where(kind == 3, 2.2, 0.93))
    disc = (kind == 3) & (q * q + (z - 2.45) * (z - 2.45) < 0.09)
    head = (kind == 0) & (jnp.abs(z - 5.4) < 0.1) & (q < 0.32)
    inside = ((q < thick) & (z < high)) | disc | head
    return jnp.where(inside, near.distance, FAR)


def tree_size(bits: Array) -> tuple[Array, Array, Array]:
    """Give a crown's radius, half height, and the height of its middle."""
    radius = 1.4 + 1.0 * toy_world.fraction(bits, 16)
    tall = 1.5 + 1.5 * toy_world.fraction(bits, 24)
    return radius, tall, TRUNK_M + tall


def _meet_tree(rays: Rays, near: Near) -> Array:
    """Measure the way to a tree: a thin trunk under a ragged ellipsoid."""
    radius, tall, middle = tree_size(near.bits)
    ahead, q = near.distance / radius, near.off / radius
    m, z = rays.slope * (radius / tall), (rays.z - middle) / tall
    a = 1.0 + m * m
    b = ahead - m * z
    root = b * b - a * (ahead * ahead + q * q + z * z - 1.0)
    s = (b - jnp.sqrt(jnp.maximum(root, 0.0))) / a * radius
    points = rays.x + rays.dx * s, rays.y + rays.dy * s, rays.z + rays.slope * s
    leaf = toy_world.hashed(
        near.bits, 80, *(jnp.floor(p * 3.0).astype(jnp.int32) for p in points)
    )
    ragged = root > 0.5 * a * (1.0 - q * q) * toy_world.fraction(leaf, 8)
    crown = jnp.where((root > 0.0) & (s > 0.3) & ragged, s, FAR)
    foot = rays.z + rays.slope * near.distance < TRUNK_M + 0.2
    trunk = jnp.where((jnp.abs(near.off) < 0.14) & foot, near.distance, FAR)
    return jnp.where(near.distance < FAR, jnp.minimum(crown, trunk), FAR)


def _by_index(index: Array, choices: Sequence[Array]) -> Array:
    """Read the choice that each sample's index names; the last for any other."""
    shape = jnp.broadcast_shapes(index.shape, choices[-1].shape)
    value = jnp.broadcast_to(choices[-1], shape)
    for k, choice in enumerate(choices[:-1]):
        value = jnp.where(index == k, choice, value)
    return value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cast(
    grid: Grid, lens: Lens, seed: Array, fov_deg: Array, scene: Scenes,
    position: Array, rotation: Array, time_s: Array,
) -> tuple[Rays, Walls, list[Near]]:  # fmt: skip
    """Cast the rays and find what stands along each column."""
    rays = make_rays(lens, fov_deg, position, rotation)
    place = position[:, :2]
    near = [
        *_columns(rays, toy_world.cars(grid, scene.seed, place, time_s), 2.6, CARS),
        *_columns(rays, toy_world.people(grid, scene.seed, place, time_s), 0.3, PEOPLE),
        *_columns(rays, toy_world.trees(grid, seed, place), 2.4, TREES),
        *_columns(rays, toy_world.furniture(grid, seed, place), 0.35, POSTS),
    ]
    return rays, walk(grid, seed, rays), near


@jax.jit
def _measure(rays: Rays, walls: Walls, near: list[Near]) -> tuple[list[Array], Array]:
    """Measure the way to each thing, the ground and the wall; name each wall."""
    wall = jnp.full(rays.slope.shape, FACADES, jnp.int32)
    for k in reversed(range(FACADES)):
        below = rays.z + rays.slope * walls.s[k] < walls.top[k]
        wall = jnp.where(below, k, wall)
    s_wall = _by_index(wall, [*walls.s, jnp.full_like(walls.s[0], FAR)])
    street = -rays.z / jnp.minimum(rays.slope, -1e-6)
    street = jnp.where(rays.slope < -1e-6, street, FAR)
    meet = [_meet_car] * CARS + [_meet_person] * PEOPLE
    meet += [_meet_tree] * TREES + [_meet_post] * POSTS
    ways = [measure(rays, thing) for measure, thing in zip(meet, near, strict=True)]
    return [*ways, street, s_wall], wall


@jax.jit
def _first(rays: Rays, near: list[Near], ways: list[Array]) -> tuple[Array, ...]:
    """Choose what each sample sees first: distance, index, whether under a car."""
    s = functools.reduce(jnp.minimum, ways)
    index = jnp.full(s.shape, len(ways), jnp.int32)
    for k in reversed(range(len(ways))):
        index = jnp.where((ways[k] == s) & (s < FAR), k, index)
    feet = [_car_footprint(rays, car) for car in near[:CARS]]
    under = [(s > a - 0.25) & (s < b + 0.25) & (a < FAR) for a, b in feet]
    return s, index, functools.reduce(jnp.logical_or, under) & (index == GROUND)


@functools.partial(jax.jit, static_argnums=0)
def shade(
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
    road = toy_shade.ground(grid.block_m, seed, x, y, s, light)
    surface = _choose(on_ground, road, surface)
    facing = jnp.where(on_ground, light.sun[2], facing)
    surface, facing, ambient = _shade_things(
        rays, seen, (x, y, z), s, light, surface, facing
    )
    facing = facing * toy_world.sunlit(grid, seed, x, y, z, light.sun)
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
    above = toy_shade.sky(rays.dx, rays.dy, rays.slope, time_s[:, None, None], light)
    above = _skyline(seed, rays, light, haze_per_m, above)
    return toy_shade.pack(pick(seen.s >= FAR, above, color))


def _shade_wall(
    seen: Seen, z: Array, s: Array, light: Light
) -> tuple[toy_shade.Surface, Array]:
    """Paint each sample's facade and say how much it faces the sun."""
    top, u, width, bits, face = (_by_index(seen.wall, part) for part in seen.walls[1:])
    blank = face > 4
    face = jnp.where(blank, face - 8, face)
    along = jnp.where(jnp.abs(face) == 1, light.sun[0], light.sun[1])
    facing = jnp.maximum(-jnp.sign(face).astype(jnp.float32) * along, 0.0)
    return toy_shade.facade(bits, u, z, width, top, blank, s, light), facing


def _shade_things(
    rays: Rays, seen: Seen, point: tuple[Array, Array, Array], s: Array, light: Light,
    surface: toy_shade.Surface, facing: Array,
) -> tuple[toy_shade.Surface, Array, Array]:  # fmt: skip
    """Paint cars, people, trees and posts over walls and ground.

    Returns the surface, how much it faces the sun, and how much sky it sees.
    """
    x, y, z = point
    index, sun = seen.index, light.sun
    gx = x - _by_index(index, [near.x for near in seen.near])
    gy = y - _by_index(index, [near.y for near in seen.near])
    bits = _by_index(index, [near.bits for near in seen.near])
    way = _by_index(index, [near.way for near in seen.near])
    off = gx * rays.dy - gy * rays.dx
    is_car, is_person = index < CARS, (index >= CARS) & (index < TRANSIENT)
    is_tree = (index >= TRANSIENT) & (index < TRANSIENT + TREES)
    is_post = (index >= TRANSIENT + TREES) & (index < GROUND)
    runs_y = _by_index(index, [near.axis for near in seen.near[:CARS]]) == 1
    lx = jnp.where(runs_y, gy, gx) * way
    ly = jnp.where(runs_y, gx, gy) * way
    half, tall, _ = car_size(bits)
    surface = _choose(is_car, toy_shade.car(bits, lx, ly, z, half, tall), surface)
    on_top = (jnp.abs(z - tall) < 0.02) | (jnp.abs(z - 0.92) < 0.015)
    beside = jnp.abs(ly) > 0.79
    across = jnp.where(beside == runs_y, sun[0], sun[1])
    outward = jnp.sign(jnp.where(beside, ly, lx)) * way
    car_sun = jnp.where(on_top, sun[2], jnp.maximum(across * outward, 0.0))
    crown = is_tree & (z > TRUNK_M)
    surface = _choose(is_tree, toy_shade.tree(bits, x, y, z, crown, s), surface)
    radius, high, middle = tree_size(bits)
    ball = (gx * sun[0] + gy * sun[1]) / radius + (z - middle) / high * sun[2]
    surface = _choose(is_post, toy_shade.post(way, bits, off, z), surface)
    surface = _choose(is_person, toy_shade.person(bits, off, z), surface)
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
    height = 0.02 + 0.06 * toy_world.fraction(toy_world.hashed(seed, 90, bearing), 8)
    tower = mix(light.horizon_rgb, light.zenith_rgb, np.float32(0.35))
    tower = mix(tower, light.horizon_rgb, 1.0 - jnp.exp(-400.0 * haze_per_m))
    return pick(
        rays.slope < height,
        scale(tower, 0.8 + 0.2 * jnp.tanh(150.0 * haze_per_m)),
        above,
    )


def _choose(
    mask: Array, new: toy_shade.Surface, old: toy_shade.Surface
) -> toy_shade.Surface:
    return toy_shade.Surface(
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
    colors = [toy_shade.unpack(v) for v in samples(packed)]
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

    Five compiled stages and not one: inside one, XLA on CPUs computes a stage anew for
    each of its readers, which costs twenty times as much. Do not wrap it in jax.jit.
    """
    rays, walls, near = _cast(
        grid, lens, seed, fov_deg, scene, position, rotation, time_s
    )
    ways, wall = _measure(rays, walls, near)
    s, index, under = _first(rays, near, ways)
    seen = Seen(s, index, wall, under, near, walls)
    color = shade(grid, seed, scene, rays, time_s, seen)
    return _resolve(lens, scene.tint_rgb, color, seen, rays.slope)


def render_panoramas(
    config: CityConfig,
    scene: Scene | Sequence[Scene],
    enu_from_camera: Float[np.ndarray, "B 4 4"],
    time_s: Float[np.ndarray, " B"],
    height: int,
    width: int | None = None,
) -> Rendering:
    """Render equirectangular panoramas.

    The centre column looks forward, columns go clockwise seen from above, the top row
    looks up; pixel centres are at +0.5. `width` is twice the height if not given.
    `scene` is one for all or one for each; `time_s` is in unix seconds.
    """
    width = 2 * height if width is None else width
    return _render(config, scene, enu_from_camera, time_s, (True, height, width), 0.0)


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
    level = bool(np.all(np.abs(rotation[:, 2, [0, 2]]) < 1e-6))
    lens = Lens(panorama, level, height, width, config.supersample)
    grid = Grid(config.block_m, config.lots)
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
        for target, values in zip((rgb, depth_m, moving), made):
            target[used] = np.asarray(values)[:size]
    return Rendering(rgb, depth_m, moving)


def _chunk(samples: int) -> int:
    """Choose how many cameras to render at once: what caches or a GPU's memory like."""
    budget = 1 << (21 if jax.default_backend() == "cpu" else 25)
    return max(1, min(64, budget // samples))
