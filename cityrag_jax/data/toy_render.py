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
CAR, TREE, TRUNK, POST, PERSON = range(1, 6)


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


class Hit(NamedTuple):
    """The nearest thing along each ray: distance, sort, place of its middle, hash."""

    s: Array
    sort: Array
    x: Array
    y: Array
    way: Array
    bits: Array


def make_rays(
    lens: Lens, fov_deg: Array, position: Float32[Array, "B 3"], rotation: Array
) -> Rays:
    """Cast a ray through every sample of a batch of cameras."""
    rows, columns = lens.height * lens.supersample, lens.width * lens.supersample
    u = ((np.arange(columns) + 0.5) / columns).astype(np.float32)
    v = ((np.arange(rows) + 0.5) / rows).astype(np.float32)
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

    def step(_: int, state: tuple) -> tuple:
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


def _columns(
    rays: Rays, things: Things, reach: Array | float, count: int
) -> list[tuple[Array, ...]]:
    """Pick the `count` nearest things within `reach` metres beside each column.

    Returns for each: distance to its middle, metres off the ray to the left, and its
    fields. The distance is `FAR` where there are fewer.
    """
    ox, oy = rays.x[:, None], rays.y[:, None]
    gx = things.x[:, :, None, None] - ox
    gy = things.y[:, :, None, None] - oy
    dx, dy = rays.dx[:, None], rays.dy[:, None]
    s, q = gx * dx + gy * dy, gy * dx - gx * dy
    key = jnp.where((jnp.abs(q) < reach) & (s > 0.3) & (s < 150.0), s, FAR)
    order = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :, None, None]
    picked = []
    for _ in range(count):
        best = jnp.argmin(key, axis=1).astype(jnp.int32)
        distance = jnp.min(key, axis=1)
        key = jnp.where(order == best[:, None], FAR, key)
        flat = best.reshape(best.shape[0], -1)
        fields = [
            jnp.take_along_axis(part, flat, axis=1).reshape(best.shape)
            for part in things
        ]
        off = (fields[1] - rays.y) * rays.dx - (fields[0] - rays.x) * rays.dy
        picked.append((distance, off, *fields))
    return picked


def _keep(hit: Hit, mask: Array, s: Array, sort: int, thing: tuple) -> Hit:
    """Take a new thing where the mask holds and it is nearer than what was hit."""
    x, y, _, way, bits = thing
    nearer = mask & (s < hit.s)
    new = (s, sort, x, y, way, bits)
    return Hit(*(jnp.where(nearer, n, old) for n, old in zip(new, hit)))


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


def _hit_cars(rays: Rays, things: Things, hit: Hit, street: Array) -> tuple[Hit, Array]:
    """Meet the nearest cars; also say where a ground point lies under or beside one."""
    shade = jnp.zeros(rays.slope.shape, bool)
    for distance, _, *thing in _columns(rays, things, 2.5, 3):
        x, y, axis, way, bits = thing
        half, tall, cabin = car_size(bits)
        back = -0.12 * half * way
        along, wide = axis == 0, jnp.where(axis == 0, 0.9, 0.9)
        hx, hy = jnp.where(along, half, wide), jnp.where(along, wide, half)
        gone = distance >= FAR
        enter, leave = _slab(rays, x, y, hx, hy)
        enter, leave = jnp.where(gone, FAR, enter), jnp.where(gone, FAR, leave)
        body = _box(rays, enter, leave, jnp.full_like(x, 0.92))
        cx, cy = x + jnp.where(along, back, 0.0), y + jnp.where(along, 0.0, back)
        hx, hy = jnp.where(along, cabin, 0.8), jnp.where(along, 0.8, cabin)
        over = _box(rays, *_slab(rays, cx, cy, hx, hy), tall)
        s = jnp.minimum(body, jnp.where(enter < FAR, over, FAR))
        hit = _keep(hit, s < FAR, s, CAR, thing)
        shade |= (street > enter - 0.25) & (street < leave + 0.25) & (enter < FAR)
    return hit, shade


def _hit_posts(rays: Rays, things: Things, hit: Hit, sort: int) -> Hit:
    """Meet lamps, bins, bollards and signs, or people: outlines turned to the camera."""
    for s, q, *thing in _columns(rays, things, 0.45, 2):
        kind = thing[3]
        z = rays.z + rays.slope * s
        q = jnp.abs(q)
        if sort == PERSON:
            legs = (z < 0.85) & (q < 0.17)
            coat = (z < 1.45) & (q < 0.24) & (z > 0.7)
            head = (z > 1.4) & (q * q + (z - 1.6) ** 2 < 0.018)
            inside = legs | coat | head
        else:
            lower = jnp.where(kind == 0, 0.07, jnp.where(kind == 1, 0.27, 0.05))
            low = jnp.where(kind == 0, 5.3, jnp.where(kind == 1, 0.95, 0.9))
            low = jnp.where(kind == 3, 2.2, low)
            upper = jnp.where(kind == 0, 0.32, 0.3) + 0.0 * z
            disc = (kind == 3) & (q * q + (z - 2.45) ** 2 < 0.09)
            head = (kind == 0) & (z >= 5.3) & (z < 5.5) & (q < upper)
            inside = ((q < lower) & (z < low)) | disc | head
        hit = _keep(hit, inside & (s < FAR), s + 0.0 * z, sort, thing)
    return hit


def tree_size(bits: Array) -> tuple[Array, Array, Array]:
    """Give a crown's radius, half height, and the height of its middle."""
    radius = 1.4 + 1.0 * toy_world.fraction(bits, 16)
    tall = 1.5 + 1.5 * toy_world.fraction(bits, 24)
    return radius, tall, 2.3 + tall


def _hit_trees(rays: Rays, things: Things, hit: Hit) -> Hit:
    """Meet trunks and ragged ellipsoid crowns."""
    for distance, q, *thing in _columns(rays, things, 2.4, 3):
        bits = thing[4]
        radius, tall, middle = tree_size(bits)
        trunk = (jnp.abs(q) < 0.14) & (rays.z + rays.slope * distance < middle)
        hit = _keep(
            hit, trunk & (distance < FAR), distance + 0.0 * rays.slope, TRUNK, thing
        )
        m, z = rays.slope / tall, (rays.z - middle) / tall
        a = 1.0 / (radius * radius) + m * m
        b = distance / (radius * radius) - m * z
        c = (distance * distance + q * q) / (radius * radius) + z * z - 1.0
        root = b * b - a * c
        s = (b - jnp.sqrt(jnp.maximum(root, 0.0))) / a
        edge = root / (a * (1.0 - (q / radius) ** 2 + 1e-3))
        px, py = rays.x + rays.dx * s, rays.y + rays.dy * s
        pz = rays.z + rays.slope * s
        leaf = toy_world.hashed(
            bits, 80, *(jnp.floor(p * 3.0).astype(jnp.int32) for p in (px, py, pz))
        )
        ragged = edge > 0.5 * toy_world.fraction(leaf, 8)
        solid = (root > 0.0) & (s > 0.3) & (distance < FAR) & ragged
        hit = _keep(hit, solid, s, TREE, thing)
    return hit


def _nearest_wall(rays: Rays, walls: Walls) -> tuple[Array, ...]:
    """Choose each sample's facade: the nearest whose top is above the ray."""
    shape = rays.slope.shape
    chosen = tuple(jnp.broadcast_to(part[-1], shape) for part in walls)
    chosen = (jnp.full(shape, FAR), *chosen[1:])
    for k in reversed(range(FACADES)):
        below = rays.z + rays.slope * walls.s[k] < walls.top[k]
        chosen = tuple(
            jnp.where(below, part[k], old) for part, old in zip(walls, chosen)
        )
    return chosen


def _shade(
    grid: Grid, seed: Array, light: Light, haze: Array, rays: Rays, time_s: Array,
    walls: Walls, nearby: tuple[Things, ...],
) -> tuple[tuple[Array, ...], Array, Array]:  # fmt: skip
    """Colour every sample; return linear colours, horizontal distance, transients."""
    s_wall, top, u, width, wall_bits, face = _nearest_wall(rays, walls)
    street = jnp.where(
        rays.slope < -1e-6, -rays.z / jnp.minimum(rays.slope, -1e-6), FAR
    )
    none = jnp.zeros(rays.slope.shape, jnp.int32)
    hit = Hit(
        jnp.minimum(s_wall, street), none, 0.0 * rays.slope, 0.0 * rays.slope, none,
        none.astype(jnp.uint32),
    )  # fmt: skip
    parked, trees, posts, walkers = nearby
    hit = _hit_trees(rays, trees, hit)
    hit = _hit_posts(rays, posts, hit, POST)
    hit, under = _hit_cars(rays, parked, hit, street)
    hit = _hit_posts(rays, walkers, hit, PERSON)
    s = hit.s
    open_sky = s >= FAR
    sort = hit.sort
    is_ground = (sort == 0) & (street < s_wall)
    under &= is_ground
    s_near = jnp.minimum(s, 1e4)
    x, y, z = (
        rays.x + rays.dx * s_near,
        rays.y + rays.dy * s_near,
        rays.z + rays.slope * s_near,
    )
    blank = face > 4
    face = jnp.where(blank, face - 8, face)
    surface = toy_shade.facade(wall_bits, u, z, width, top, blank, s_near, light)
    sun = light.sun
    toward = jnp.where(
        jnp.abs(face) == 1, -jnp.sign(face) * sun[0], -jnp.sign(face) * sun[1]
    )
    road = toy_shade.ground(grid.block_m, seed, x, y, s_near, light)
    surface = _choose(is_ground, road, surface)
    facing = jnp.where(is_ground, sun[2], jnp.maximum(toward, 0.0))
    gx, gy = x - hit.x, y - hit.y
    off = gy * rays.dx - gx * rays.dy
    axis_y = jnp.abs(hit.way) == 2
    sign = jnp.sign(hit.way)
    lx, ly = jnp.where(axis_y, gy, gx) * sign, jnp.where(axis_y, gx, gy) * sign
    half, tall, _ = car_size(hit.bits)
    surface = _choose(
        sort == CAR, toy_shade.car(hit.bits, lx, ly, z, half, tall), surface
    )
    flat_top = (jnp.abs(z - tall) < 0.02) | (jnp.abs(z - 0.92) < 0.015)
    length_sun = jnp.where(axis_y, sun[1], sun[0]) * jnp.sign(lx) * sign
    width_sun = jnp.where(axis_y, sun[0], sun[1]) * jnp.sign(ly) * sign
    side_sun = jnp.where(jnp.abs(ly) > 0.79, width_sun, length_sun)
    car_sun = jnp.where(flat_top, sun[2], jnp.maximum(side_sun, 0.0))
    surface = _choose(
        (sort == TREE) | (sort == TRUNK),
        toy_shade.tree(hit.bits, x, y, z, sort == TREE, s_near),
        surface,
    )
    radius, high, middle = tree_size(hit.bits)
    ball = (gx * sun[0] + gy * sun[1]) / radius + (z - middle) / high * sun[2]
    surface = _choose(sort == POST, toy_shade.post(hit.way, hit.bits, off, z), surface)
    surface = _choose(sort == PERSON, toy_shade.person(hit.bits, off, z), surface)
    facing = jnp.where(sort == CAR, car_sun, facing)
    facing = jnp.where(sort == TREE, jnp.clip(0.45 + 0.55 * ball, 0.0, 1.0), facing)
    facing = jnp.where(sort > TREE, 0.5, facing)
    facing = facing * toy_world.sunlit(grid, seed, x, y, z, sun)
    sky_light = jnp.where(under, 0.35, jnp.where(sort == TREE, 0.75 + 0.25 * ball, 1.0))
    sky_light = sky_light * (0.72 + 0.28 * jnp.clip(z * 0.12, 0.0, 1.0))
    lit = tuple(
        c * (a * sky_light + b * facing) + g
        for c, a, b, g in zip(
            surface.albedo, light.ambient_rgb, light.sun_rgb, surface.glow
        )
    )
    grazing = jnp.where(is_ground, 1.0 / (1.0 + 2.5 * jnp.abs(rays.slope)), 0.8)
    mirror = surface.mirror * grazing
    rise = jnp.abs(rays.slope) * jnp.maximum(walls.s[0] - s_near, 0.0)
    dark = is_ground & (rise < walls.top[0])
    shown = mix(light.horizon_rgb, light.zenith_rgb, np.float32(0.4))
    lit = mix(lit, scale(shown, jnp.where(dark, 0.35, 1.0)), mirror)
    air = 1.0 - jnp.exp(-haze * s_near)
    lit = mix(lit, light.horizon_rgb, air)
    above = toy_shade.sky(rays.dx, rays.dy, rays.slope, time_s[:, None, None], light)
    above = _skyline(seed, rays, light, above)
    color = pick(open_sky, above, lit)
    return color, s, (sort == CAR) | (sort == PERSON) | under


def _skyline(seed: Array, rays: Rays, light: Light, above: tuple) -> tuple:
    """Close the ends of the streets with hazy towers, too far to have a depth."""
    bearing = jnp.floor(jnp.arctan2(rays.dy, rays.dx) * 45.0).astype(jnp.int32)
    height = 0.02 + 0.06 * toy_world.fraction(toy_world.hashed(seed, 90, bearing), 8)
    tower = mix(light.horizon_rgb, light.zenith_rgb, np.float32(0.35))
    return pick(rays.slope < height, scale(tower, np.float32(0.8)), above)


def _choose(
    mask: Array, new: toy_shade.Surface, old: toy_shade.Surface
) -> toy_shade.Surface:
    return toy_shade.Surface(
        pick(mask, new.albedo, old.albedo),
        pick(mask, new.glow, old.glow),
        jnp.where(mask, new.mirror, old.mirror),
    )


def _resolve(
    lens: Lens, light_tint: Array, color: tuple, s: Array, slope: Array, moving: Array
) -> tuple[Array, Array, Array]:
    """Average the samples of each pixel; depth is the nearest surface's mean."""
    k, h, w = lens.supersample, lens.height, lens.width

    def samples(v: Array) -> Array:
        return v.reshape(v.shape[0], h, k, w, k)

    depth = samples(jnp.where(s < FAR, s * jnp.sqrt(1.0 + slope * slope), jnp.inf))
    nearest = jnp.min(depth, axis=(2, 4), keepdims=True)
    close = depth <= 1.05 * nearest
    total = jnp.sum(jnp.where(close, 1.0 / depth, 0.0), axis=(2, 4))
    depth = jnp.sum(close, axis=(2, 4)) / total
    depth = jnp.where(jnp.isfinite(nearest[:, :, 0, :, 0]), depth, jnp.inf)
    mean = [
        jnp.mean(jnp.minimum(samples(c), 1.0), axis=(2, 4))
        * light_tint[:, n, None, None]
        for n, c in enumerate(color)
    ]
    rgb = jnp.sqrt(jnp.clip(jnp.stack(mean, axis=-1), 0.0, 1.0))
    moving = jnp.any(samples(moving), axis=(2, 4))
    return jnp.round(rgb * 255.0).astype(jnp.uint8), depth, moving


@functools.partial(jax.jit, static_argnums=(0, 1))
def render_on_device(
    grid: Grid, lens: Lens, seed: Array, fov_deg: Array, scene: Scene, position: Array,
    rotation: Array, time_s: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Render one batch; `scene` has a leading axis B, `time_s` counts from its start."""
    rays = make_rays(lens, fov_deg, position, rotation)
    split = lambda v: tuple(v[:, n, None, None] for n in range(3))  # noqa: E731
    light = Light(
        *(split(v) for v in (scene.sun, scene.sun_rgb, scene.ambient_rgb)),
        *(split(v) for v in (scene.zenith_rgb, scene.horizon_rgb)),
        *(v[:, None, None] for v in (scene.clouds, scene.wet, scene.lamps, scene.seed)),
    )
    place = position[:, :2]
    nearby = (
        toy_world.cars(grid, scene.seed, place, time_s),
        toy_world.trees(grid, seed, place),
        toy_world.furniture(grid, seed, place),
        toy_world.people(grid, scene.seed, place, time_s),
    )
    # A car's street and direction travel as one number: +-1 along x, +-2 along y.
    parked = nearby[0]
    nearby = (parked._replace(way=parked.way * (1 + parked.axis)), *nearby[1:])
    walls = walk(grid, seed, rays)
    color, s, moving = _shade(
        grid, seed, light, scene.haze_per_m[:, None, None], rays, time_s, walls, nearby
    )
    return _resolve(lens, scene.tint_rgb, color, s, rays.slope, moving)


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
    stacked = _stack(scenes)
    elapsed_s = np.asarray(time_s - stacked.start_time_s, np.float32)
    stacked = dataclasses.replace(stacked, start_time_s=elapsed_s)
    chunk = _chunk(height * width * config.supersample**2)
    for first in range(0, count, chunk):
        rows = np.minimum(np.arange(first, first + chunk), count - 1)
        used = slice(first, min(first + chunk, count))
        part = jax.tree.map(lambda v, rows=rows: v[rows], stacked)
        made = render_on_device(
            grid, lens, np.uint32(config.seed), np.float32(fov_deg), part,
            enu_from_camera[rows, :3, 3].astype(np.float32),
            rotation[rows].astype(np.float32), elapsed_s[rows],
        )  # fmt: skip
        size = used.stop - used.start
        for target, values in zip((rgb, depth_m, moving), made):
            target[used] = np.asarray(values)[:size]
    return Rendering(rgb, depth_m, moving)


def _stack(scenes: list[Scene]) -> Scene:
    return jax.tree.map(lambda *v: np.stack(v), *scenes)


def _chunk(samples: int) -> int:
    """Choose how many cameras to render at once: what caches or a GPU's memory like."""
    budget = 1 << (21 if jax.default_backend() == "cpu" else 25)
    return max(1, min(64, budget // samples))
