"""What each ray through the toy city meets first, and how far away.

A ray is a horizontal unit direction and a slope (rise for each horizontal metre).
Everything that depends on the horizontal direction alone, such as the walk through the
grid of lots and the first cars and trees, is done once a column where cameras are
level, once a sample where they are not: arrays are [B, 1, W] or [B, H, W] and
broadcast. Distances `s` are horizontal metres; `FAR` means nothing is there.

The functions with `jax.jit` are the stages of a rendering, compiled one by one: within
one program, XLA on CPUs computes a stage anew for each of its readers.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from cityrag_jax.toy import world
from cityrag_jax.toy.world import Grid, Things

WALK_STEPS = 36
FACADES = 5
FAR = np.float32(1e9)
TRUNK_M = 2.3
TREE_TOP_M = TRUNK_M + 6.0
LAMP_M = 5.5
POST_RADIUS_M = 0.32

# How many things of a sort each column may meet, in the order of `Seen.index`.
# Of 29 columns one passes more than 3 trees before the first high wall, of 150 one more
# than 5; posts are sparser.
CARS, PEOPLE, TREES, POSTS = 3, 2, 4, 2
TRANSIENT = CARS + PEOPLE
GROUND = TRANSIENT + TREES + POSTS


class Lens(NamedTuple):
    """What decides the shapes of a rendering: static where code is compiled."""

    panorama: bool
    level: bool
    height: int
    width: int
    supersample: int


class Rays(NamedTuple):
    """Origins [B, 1, 1], directions [B, 1 or H, W] and slopes [B, H, W] of rays."""

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


@functools.partial(jax.jit, static_argnums=0)
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


@functools.partial(jax.jit, static_argnums=0)
def walk(grid: Grid, seed: Array, rays: Rays) -> Walls:
    """Walk each ray from cell to cell and list the facades that rise above the last.

    A cell counts if its top is seen above all nearer ones; the first `FACADES` do.
    """
    lines = grid.lots + 1
    half, lot, block = (
        np.float32(v) for v in (world.STREET_HALF_M, grid.lot_m, grid.block_m)
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
    none = jnp.zeros((FACADES, *shape), jnp.int32)
    order = jnp.arange(FACADES, dtype=jnp.int32)[:, None, None, None]
    start = (
        jnp.broadcast_to(cell_of(rays.x), shape),
        jnp.broadcast_to(cell_of(rays.y), shape),
        zeros - FAR,
        zeros,
        zeros.astype(jnp.int32),
        (none.astype(jnp.float32) + FAR, none, none, none),
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
        height = world.lot_at(grid, seed, i, j, a, b).height_m
        face = jnp.where(along_x, step_x, 2 * step_y) + jnp.where(before > 3.0, 8, 0)
        rise = (height - rays.z) / s
        seen = (rise > horizon) & (height > 0.0)
        free = seen[None] & (count[None] == order)
        slots = tuple(
            jnp.where(free, new[None], old)
            for new, old in zip((s, cx, cy, face), slots, strict=True)
        )
        horizon = jnp.where(seen, rise, horizon)
        return cx, cy, horizon, height, count + seen, slots

    s, cx, cy, face = jax.lax.fori_loop(0, WALK_STEPS, step, start)[-1]
    (i, a), (j, b) = split(cx), split(cy)
    lot_seen = world.lot_at(grid, seed, i, j, a, b)
    along_x = jnp.abs(jnp.where(face > 4, face - 8, face)) == 1
    px, py = (
        rays.x[None] + dx[None] * s - i * block,
        rays.y[None] + dy[None] * s - j * block,
    )
    u = jnp.where(along_x, py - lot_seen.y_start, px - lot_seen.x_start) - half
    width = jnp.where(along_x, lot_seen.y_width, lot_seen.x_width)
    top = jnp.where(s < FAR, lot_seen.height_m, -FAR)
    return Walls(*(list(part) for part in (s, top, u, width, lot_seen.bits, face)))


def _columns(
    rays: Rays, things: Things, radius_m: Array, hidden_m: Array, count: int
) -> list[Near]:
    """Pick the first `count` things that each column passes within their radius.

    `hidden_m` is where a wall hides whatever stands behind. Where there are fewer, the
    distance is `FAR`. The things are looked through some at a time: there are thousands
    around a camera, and as many columns as samples where cameras are not level. Those
    within reach come first, and the rest is not looked at.
    """
    shape = jnp.broadcast_shapes(rays.x.shape, rays.dx.shape)
    total = things.x.shape[1]
    pairs_at_once = 1 << (18 if jax.default_backend() == "cpu" else 23)
    some = min(total, max(8, pairs_at_once // math.prod(shape)))
    apart = jnp.hypot(things.x - rays.x[..., 0], things.y - rays.y[..., 0])
    within = apart < world.REACH_M + radius_m + 1.0
    order = jnp.argsort(~within, axis=1, stable=True)
    things = Things(*(jnp.take_along_axis(part, order, axis=1) for part in things))
    radius_m = jnp.take_along_axis(radius_m, order, axis=1)
    parts = -(-jnp.max(jnp.sum(within, axis=1)) // some)
    x, y, radius_m = (
        jnp.pad(v, ((0, 0), (0, -total % some)), mode="edge")
        for v in (things.x, things.y, radius_m)
    )

    def look(part: Array) -> tuple[Array, Array]:
        """Give where each column passes some of the things, and which they are."""
        at_x, at_y, radius = (
            jax.lax.dynamic_slice_in_dim(v, part * some, some, axis=1)[..., None, None]
            for v in (x, y, radius_m)
        )
        gx, gy = at_x - rays.x[:, None], at_y - rays.y[:, None]
        dx, dy = rays.dx[:, None], rays.dy[:, None]
        s, q = gx * dx + gy * dy, gy * dx - gx * dy
        met = (jnp.abs(q) < radius) & (s > 0.3) & (s < world.REACH_M)
        met &= s - radius < hidden_m[:, None]
        which = (part * some + jnp.arange(some, dtype=jnp.int32))[None, :, None, None]
        met &= which < total
        return jnp.where(met, s, FAR), jnp.broadcast_to(which, met.shape)

    def merge(part: Array, first: tuple[Array, Array]) -> tuple[Array, Array]:
        both = zip(first, look(part), strict=True)
        return _first(*(jnp.concatenate(pair, axis=1) for pair in both), count)

    none = jnp.zeros((shape[0], count, *shape[1:]), jnp.int32)
    nothing = none.astype(jnp.float32) + FAR, none
    distance, index = jax.lax.fori_loop(0, parts, merge, nothing)
    picked = []
    for k in range(count):
        flat = index[:, k].reshape(shape[0], -1)
        at_x, at_y, *rest = (
            jnp.take_along_axis(part, flat, axis=1).reshape(shape) for part in things
        )
        off = (at_y - rays.y) * rays.dx - (at_x - rays.x) * rays.dy
        picked.append(Near(distance[:, k], off, at_x, at_y, *rest))
    return picked


def _first(key: Array, which: Array, count: int) -> tuple[Array, Array]:
    """Sort out the `count` smallest keys of axis 1, and which they are."""
    order = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :, None, None]
    keys, chosen = [], []
    for _ in range(count):
        least = jnp.min(key, axis=1, keepdims=True)
        at = jnp.min(
            jnp.where(key == least, order, key.shape[1]), axis=1, keepdims=True
        )
        keys.append(least)
        chosen.append(jnp.sum(jnp.where(order == at, which, 0), axis=1, keepdims=True))
        key = jnp.where(order == at, FAR, key)
    return jnp.concatenate(keys, axis=1), jnp.concatenate(chosen, axis=1)


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
    half = 1.9 + 0.4 * world.fraction(bits, 24) + jnp.where(van, 0.5, 0.0)
    tall = jnp.where(van, 2.05, 1.42 + 0.15 * world.fraction(bits, 20))
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
    stride = 0.015 + 0.1 * world.fraction(near.bits, 5) * (0.85 - z)
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
    radius = 1.4 + 1.0 * world.fraction(bits, 16)
    tall = 1.5 + 1.5 * world.fraction(bits, 24)
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
    leaf = world.hashed(
        near.bits, 80, *(jnp.floor(p * 3.0).astype(jnp.int32) for p in points)
    )
    ragged = root > 0.5 * a * (1.0 - q * q) * world.fraction(leaf, 8)
    crown = jnp.where((root > 0.0) & (s > 0.3) & ragged, s, FAR)
    foot = rays.z + rays.slope * near.distance < TRUNK_M + 0.2
    trunk = jnp.where((jnp.abs(near.off) < 0.14) & foot, near.distance, FAR)
    return jnp.where(near.distance < FAR, jnp.minimum(crown, trunk), FAR)


def by_index(index: Array, choices: Sequence[Array]) -> Array:
    """Read the choice that each sample's index names; the last for any other."""
    shape = jnp.broadcast_shapes(index.shape, choices[-1].shape)
    value = jnp.broadcast_to(choices[-1], shape)
    for k, choice in enumerate(choices[:-1]):
        value = jnp.where(index == k, choice, value)
    return value


@functools.partial(jax.jit, static_argnums=0)
def find_things(
    grid: Grid, seed: Array, drive_seed: Array, position: Array, time_s: Array
) -> tuple[Things, ...]:
    """Find the cars, people, trees and posts around each camera."""
    place = position[:, :2]
    return (
        world.cars(grid, drive_seed, place, time_s),
        world.people(grid, drive_seed, place, time_s),
        world.trees(grid, seed, place),
        world.furniture(grid, seed, place),
    )


@jax.jit
def line_up(rays: Rays, walls: Walls, things: tuple[Things, ...]) -> list[Near]:
    """List what stands along each column, in the order of `Seen.index`."""
    cars, people, trees, posts = things
    everywhere = jnp.full_like(walls.s[0], FAR)
    sorts = (
        (cars, jnp.full_like(cars.x, 2.6), everywhere, CARS),
        (people, jnp.full_like(people.x, 0.3), everywhere, PEOPLE),
        (trees, tree_size(trees.bits)[0], _behind(walls, TREE_TOP_M), TREES),
        (posts, jnp.full_like(posts.x, POST_RADIUS_M), _behind(walls, LAMP_M), POSTS),
    )
    return [
        near
        for sort, radius_m, hidden_m, count in sorts
        for near in _columns(rays, sort, radius_m, hidden_m, count)
    ]


def _behind(walls: Walls, height_m: float) -> Array:
    """Say where the first wall stands that hides whatever is no higher behind it."""
    return functools.reduce(
        jnp.minimum,
        (
            jnp.where(top >= height_m, s, FAR)
            for s, top in zip(walls.s, walls.top, strict=True)
        ),
    )


@jax.jit
def measure(rays: Rays, walls: Walls, near: list[Near]) -> tuple[list[Array], Array]:
    """Measure the way to each thing, the ground and the wall; name each wall."""
    wall = jnp.full(rays.slope.shape, FACADES, jnp.int32)
    for k in reversed(range(FACADES)):
        below = rays.z + rays.slope * walls.s[k] < walls.top[k]
        wall = jnp.where(below, k, wall)
    s_wall = by_index(wall, [*walls.s, jnp.full_like(walls.s[0], FAR)])
    street = -rays.z / jnp.minimum(rays.slope, -1e-6)
    street = jnp.where(rays.slope < -1e-6, street, FAR)
    meet = [_meet_car] * CARS + [_meet_person] * PEOPLE
    meet += [_meet_tree] * TREES + [_meet_post] * POSTS
    ways = [meet_one(rays, thing) for meet_one, thing in zip(meet, near, strict=True)]
    return [*ways, street, s_wall], wall


@jax.jit
def choose_first(rays: Rays, near: list[Near], ways: list[Array]) -> tuple[Array, ...]:
    """Choose what each sample sees first: distance, index, whether under a car."""
    s = functools.reduce(jnp.minimum, ways)
    index = jnp.full(s.shape, len(ways), jnp.int32)
    for k in reversed(range(len(ways))):
        index = jnp.where((ways[k] == s) & (s < FAR), k, index)
    feet = [_car_footprint(rays, car) for car in near[:CARS]]
    under = [(s > a - 0.25) & (s < b + 0.25) & (a < FAR) for a, b in feet]
    return s, index, functools.reduce(jnp.logical_or, under) & (index == GROUND)
