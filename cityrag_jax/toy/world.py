"""Where everything stands in the toy city: an infinite hashed grid, no lists.

Streets run along x and y every `block_m` metres, centred on multiples of it. Between
them lie square blocks, cut into `lots x lots` cells; the outer cells carry buildings,
some merged in pairs, some left as walled gardens; a few blocks are parks. Whatever
stands somewhere is a hash of (city seed, place): a city of any size costs nothing.
Cars and people are a hash of (drive, place) and move along their lane with time.

Everything is jax.numpy on float32 metres, x east and y north of the city's anchor.
The finaliser of the hash is lowbias32 of github.com/skeeto/hash-prospector.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

ROAD_HALF_M = 5.0
STREET_HALF_M = 8.0
GARDEN_WALL_M = 2.7
# How far things that stand are drawn: a tree of 6 m is there 3 pixels of 160 high.
REACH_M = 200.0
TREE_SPACING_M = 8.0
LAMP_SPACING_M = 12.0
POST_SPACING_M = 6.0
_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What shapes the street grid: blocks, and lots along a side of one.

    Static where code is compiled.
    """

    block_m: float
    lots: int = 4

    @property
    def lot_m(self) -> float:
        """Give the side of a lot cell in metres."""
        return (self.block_m - 2 * STREET_HALF_M) / self.lots


class Lot(NamedTuple):
    """The building of a cell: its hash, height, and extents of the merged lot."""

    bits: UInt32[Array, "..."]
    height_m: Float32[Array, "..."]
    x_start: Float32[Array, "..."]
    x_width: Float32[Array, "..."]
    y_start: Float32[Array, "..."]
    y_width: Float32[Array, "..."]


class Things(NamedTuple):
    """The things of one sort around each camera; absent ones lie far away.

    `axis` is 0 where the thing's street runs along x and 1 where it runs along y,
    `way` is the sign of its direction along that street.
    """

    x: Float32[Array, "B K"]
    y: Float32[Array, "B K"]
    axis: Int32[Array, "B K"]
    way: Int32[Array, "B K"]
    bits: UInt32[Array, "B K"]


def scramble(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mix the 32 bits of an integer, so that neighbours share nothing."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def hashed(seed: Array, salt: int, *keys: Array) -> UInt32[Array, "..."]:
    """Hash integer keys to 32 bits; `salt` separates uses of the same keys."""
    h = seed + np.uint32(salt * 0x632BE5AB & 0xFFFFFFFF)
    for key, prime in zip(keys, _PRIMES, strict=False):
        h = h + key.astype(jnp.uint32) * np.uint32(prime)
    return scramble(h)


def fraction(bits: UInt32[Array, "..."], shift: int) -> Float32[Array, "..."]:
    """Read 8 bits of a hash as a number in [0, 1)."""
    byte = ((bits >> np.uint32(shift)) & np.uint32(255)).astype(jnp.int32)
    return byte.astype(jnp.float32) * np.float32(1 / 256)


def is_park(seed: Array, i: Array, j: Array) -> Bool[Array, "..."]:
    """Say whether block (i, j) is a park."""
    return (hashed(seed, 1, i, j) & np.uint32(15)) == np.uint32(3)


def _merged(bits: Array, cell: Array, low: int, high: int) -> tuple[Array, Array]:
    """Pair up a row of cells low..high; return the first cell and the count."""
    offset = (bits & np.uint32(1)).astype(jnp.int32)
    pair = (cell + offset) >> 1
    joined = ((bits >> (pair + 4).astype(jnp.uint32)) & np.uint32(1)) == np.uint32(1)
    first = jnp.maximum(2 * pair - offset, low)
    last = jnp.minimum(2 * pair - offset + 1, high)
    first = jnp.where(joined, first, cell)
    return first, jnp.where(joined, last - first + 1, 1)


def lot_at(grid: Grid, seed: Array, i: Array, j: Array, a: Array, b: Array) -> Lot:
    """Look up the lot of cell (a, b) of block (i, j).

    Cells inside the block are courtyards of height 0; a or b equal to `grid.lots`
    means street, also 0. Starts are metres from the block's first facade plane.
    """
    last = grid.lots - 1
    row = (b == 0) | (b == last)
    side = (a == 0) | (a == last)
    pairing = hashed(seed, 2, i, j, jnp.where(row, b, a + 40))
    along = jnp.where(row, a, b)
    first_row, count_row = _merged(pairing, along, 0, last)
    first_col, count_col = _merged(pairing, along, 1, last - 1)
    first = jnp.where(row, first_row, first_col)
    count = jnp.where(row, count_row, count_col)
    a0, na = jnp.where(row, first, a), jnp.where(row, count, 1)
    b0, nb = jnp.where(row, b, first), jnp.where(row, 1, count)
    bits = hashed(seed, 3, i, j, a0, b0)
    block = hashed(seed, 1, i, j)
    built = (row | side) & (a <= last) & (b <= last)
    built = built & ((block & np.uint32(15)) != np.uint32(3))
    floors = jnp.floor(1.0 + 2.5 * fraction(block, 8) + 4.0 * fraction(bits, 24))
    height = 4.6 + floors * (2.9 + 0.8 * fraction(bits, 16)) + fraction(bits, 12)
    height = jnp.where((bits & np.uint32(15)) == np.uint32(7), GARDEN_WALL_M, height)
    height = jnp.where(built, height, 0.0)
    lot = np.float32(grid.lot_m)
    return Lot(bits, height, a0 * lot, na * lot, b0 * lot, nb * lot)


def sunlit(
    grid: Grid, seed: Array, x: Array, y: Array, z: Array, sun: tuple[Array, ...]
) -> Float32[Array, "..."]:
    """Say (0 or 1) whether the sun reaches a point; the nearest rows hide it."""
    lit = jnp.ones_like(z)
    for points, toward, along_y in (
        ((x, y), (sun[0], sun[1]), False),
        ((y, x), (sun[1], sun[0]), True),
    ):
        size = jnp.maximum(jnp.abs(toward[0]), 1e-3)
        distance, height = _row_ahead(
            grid, seed, points, jnp.where(toward[0] >= 0, 1.0, -1.0),
            toward[1] / size, along_y,
        )  # fmt: skip
        lit = jnp.where(height > z + distance * (sun[2] / size), 0.0, lit)
    return lit


def _row_ahead(
    grid: Grid, seed: Array, point: tuple[Array, Array], sign: Array, drift: Array,
    along_y: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """Go along the first axis of `point` to the next row of facades that face back.

    `sign` is the direction, `drift` the metres across for each metre along. Returns
    the metres along, and the height of the building met there, 0 in a street.
    """
    block, half = np.float32(grid.block_m), np.float32(STREET_HALF_M)
    mirrored = sign * point[0]
    step = jnp.floor((mirrored - half) / block) + 1.0
    distance = step * block + half - mirrored
    across = point[1] + drift * distance
    j = jnp.floor(across / block)
    b = jnp.floor((across - j * block - half) / np.float32(grid.lot_m))
    inside = (b >= 0) & (b < grid.lots)
    i = jnp.where(sign > 0, step, -step - 1.0).astype(jnp.int32)
    a = jnp.broadcast_to(jnp.where(sign > 0, 0, grid.lots - 1), b.shape)
    j, b = j.astype(jnp.int32), jnp.clip(b, 0, grid.lots - 1).astype(jnp.int32)
    places = (j, i, b, a) if along_y else (i, j, a, b)
    return distance, jnp.where(inside, lot_at(grid, seed, *places).height_m, 0.0)


def _slots(
    grid: Grid, camera: Array, spacing_m: float, reach: tuple[int, int], shift_m: Array
) -> tuple[Array, Array, Array]:
    """List (axis, street, slot) around cameras: `reach` streets and slots each way.

    A camera lies between two streets of an axis; one of each is the least reach.
    """
    streets = np.arange(1 - reach[0], 1 + reach[0], dtype=np.int32)
    slots = np.arange(-reach[1], reach[1], dtype=np.int32)
    batch = camera.shape[0]
    shape = (batch, 2, len(streets), len(slots))
    across = jnp.floor(camera[:, ::-1] / np.float32(grid.block_m)).astype(jnp.int32)
    street = across[:, :, None, None] + streets[None, None, :, None]
    here = jnp.floor((camera - shift_m[:, None]) / np.float32(spacing_m))
    slot = here.astype(jnp.int32)[:, :, None, None] + slots[None, None, None, :]
    axis = jnp.arange(2)[None, :, None, None]
    return tuple(
        jnp.broadcast_to(v, shape).reshape(batch, -1) for v in (axis, street, slot)
    )


def _standing(grid: Grid, camera: Array, spacing_m: float) -> tuple[Array, ...]:
    """List all slots within `REACH_M` of cameras."""
    reach = tuple(int(np.ceil(REACH_M / m)) + 1 for m in (grid.block_m, spacing_m))
    return _slots(grid, camera, spacing_m, reach, jnp.zeros_like(camera[:, 0]))


def _placed(
    grid: Grid,
    slots: tuple[Array, Array, Array],
    along: Array,
    lateral: Array,
    bits: Array,
    way: int,
    present: Array,
) -> Things:
    """Stand things on their streets, the absent ones a thousand kilometres away."""
    axis, street, _ = slots
    across = street * np.float32(grid.block_m) + lateral
    x = jnp.where(axis == 0, along, across)
    y = jnp.where(axis == 0, across, along)
    x = jnp.where(present, x, 1e6)
    return Things(x, y, axis, jnp.full_like(axis, way), bits)


def _from_junction(grid: Grid, along: Array) -> Array:
    """Give the distance along a street from the nearest junction's centre."""
    block = np.float32(grid.block_m)
    return jnp.abs(along - block * jnp.round(along / block))


def _join(groups: list[Things]) -> Things:
    return Things(
        *(jnp.concatenate(parts, axis=1) for parts in zip(*groups, strict=True))
    )


def _nearest(camera: Array, groups: list[Things], keep: int) -> Things:
    """Keep the `keep` things nearest to each camera: traffic, which comes and goes."""
    joined = _join(groups)
    distance = jnp.hypot(joined.x - camera[:, :1], joined.y - camera[:, 1:])
    _, order = jax.lax.top_k(-distance, keep)
    return Things(*(jnp.take_along_axis(part, order, axis=1) for part in joined))


def trees(grid: Grid, seed: Array, camera: Float32[Array, "B 2"]) -> Things:
    """Find all trees within `REACH_M`: avenues, parks, gardens and courtyards."""
    groups = []
    slots = axis, street, slot = _standing(grid, camera, TREE_SPACING_M)
    for side in (-1, 1):
        bits = hashed(seed, 10 + side, axis, street, slot)
        along = (slot + 0.5) * TREE_SPACING_M + 2.0 * (fraction(bits, 0) - 0.5)
        stretch = jnp.floor(along / np.float32(grid.block_m)).astype(jnp.int32)
        avenue = hashed(seed, 12, axis, street, stretch)
        present = (fraction(avenue, 0) < 0.6) & (fraction(bits, 8) < 0.75)
        present &= _from_junction(grid, along) > STREET_HALF_M + 1.5
        lateral = jnp.full_like(along, side * (ROAD_HALF_M + 0.9))
        groups.append(_placed(grid, slots, along, lateral, bits, 1, present))
    return _join([*groups, _block_trees(grid, seed, camera)])


def _block_trees(grid: Grid, seed: Array, camera: Array) -> Things:
    """List the trees that stand inside the blocks within `REACH_M` of each camera."""
    n, batch = grid.lots, camera.shape[0]
    corner = jnp.floor(camera / np.float32(grid.block_m)).astype(jnp.int32)
    reach = int(np.ceil(REACH_M / grid.block_m))
    step = np.arange(-reach, reach + 1, dtype=np.int32)
    shape = (batch, len(step), len(step), n, n)
    cell = np.arange(n, dtype=np.int32)
    i, j, a, b = (
        jnp.broadcast_to(v, shape).reshape(batch, -1)
        for v in (
            corner[:, 0, None, None, None, None] + step[None, :, None, None, None],
            corner[:, 1, None, None, None, None] + step[None, None, :, None, None],
            cell[None, None, None, :, None],
            cell[None, None, None, None, :],
        )
    )
    bits = hashed(seed, 14, i, j, a, b)
    present = (lot_at(grid, seed, i, j, a, b).height_m <= GARDEN_WALL_M) & (
        fraction(bits, 8) < jnp.where(is_park(seed, i, j), 0.8, 0.4)
    )
    lot = np.float32(grid.lot_m)

    def middle(block: Array, cell: Array, shift: int) -> Array:
        inside = (cell + 0.3 + 0.4 * fraction(bits, shift)) * lot
        return block * np.float32(grid.block_m) + STREET_HALF_M + inside

    x = jnp.where(present, middle(i, a, 16), 1e6)
    return Things(x, middle(j, b, 24), jnp.zeros_like(i), jnp.ones_like(i), bits)


def furniture(grid: Grid, seed: Array, camera: Float32[Array, "B 2"]) -> Things:
    """Find all posts within `REACH_M`; `way` is 0 lamp, 1 bin, 2 bollard, 3 sign."""
    groups = []
    lamps = axis, street, slot = _standing(grid, camera, LAMP_SPACING_M)
    side = jnp.where((slot & 1) == 0, 1.0, -1.0)
    along = (slot + 0.5) * LAMP_SPACING_M
    present = _from_junction(grid, along) > ROAD_HALF_M + 1.0
    bits = hashed(seed, 20, axis, street, slot)
    groups.append(
        _placed(grid, lamps, along, side * (ROAD_HALF_M + 0.5), bits, 0, present)
    )
    small = axis, street, slot = _standing(grid, camera, POST_SPACING_M)
    for side in (-1, 1):
        bits = hashed(seed, 22 + side, axis, street, slot)
        along = (slot + fraction(bits, 0)) * POST_SPACING_M
        present = fraction(bits, 8) < 0.55
        present &= _from_junction(grid, along) > ROAD_HALF_M + 1.0
        lateral = side * (ROAD_HALF_M + 0.4 + 0.6 * fraction(bits, 16))
        kind = 1 + ((bits >> np.uint32(28)) % np.uint32(3)).astype(jnp.int32)
        things = _placed(grid, small, along, lateral, bits, 1, present)
        groups.append(things._replace(way=kind))
    return _join(groups)


def cars(
    grid: Grid, drive_seed: Array, camera: Float32[Array, "B 2"], time_s: Array
) -> Things:
    """Find the nearest cars of a drive at a time: parked at the kerb or driving by.

    A moving car about to touch the camera is left out.
    """
    still = jnp.zeros_like(camera[:, 0])
    drive = drive_seed[:, None]
    groups = []
    slots = axis, street, slot = _slots(grid, camera, 5.6, (1, 10), still)
    for way in (-1, 1):
        bits = hashed(drive, 30 + way, axis, street, slot)
        along = (slot + 0.5) * 5.6 + 0.6 * (fraction(bits, 0) - 0.5)
        present = fraction(bits, 8) < 0.5
        present &= _from_junction(grid, along) > STREET_HALF_M + 4.0
        lateral = _right_of(axis, way) * (ROAD_HALF_M - 1.0)
        groups.append(_placed(grid, slots, along, lateral, bits, way, present))
    for way in (-1, 1):
        speed = 7.0 + 2.0 * way
        shift = way * speed * time_s
        slots = axis, street, slot = _slots(grid, camera, 15.0, (1, 4), shift)
        bits = hashed(drive, 34 + way, axis, street, slot)
        along = (slot + 0.4 * fraction(bits, 0)) * 15.0 + shift[:, None]
        lateral = _right_of(axis, way) * 1.7
        things = _placed(
            grid, slots, along, lateral, bits, way, fraction(bits, 8) < 0.4
        )
        gap = jnp.stack([things.x, things.y]) - camera.T[:, :, None]
        close = jnp.hypot(gap[0], gap[1]) < 5.0
        groups.append(things._replace(x=jnp.where(close, 1e6, things.x)))
    return _nearest(camera, groups, 24)


def people(
    grid: Grid, drive_seed: Array, camera: Float32[Array, "B 2"], time_s: Array
) -> Things:
    """Find the people of a drive nearest to each camera, walking on the pavements."""
    drive = drive_seed[:, None]
    groups = []
    for lane, (side, way) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))):
        shift = way * (1.0 + 0.12 * lane) * time_s
        slots = axis, street, slot = _slots(grid, camera, 6.0, (1, 5), shift)
        bits = hashed(drive, 40 + lane, axis, street, slot)
        along = (slot + fraction(bits, 0)) * 6.0 + shift[:, None]
        lateral = side * (ROAD_HALF_M + 1.2 + 1.4 * fraction(bits, 16))
        present = fraction(bits, 8) < 0.35
        things = _placed(grid, slots, along, lateral, bits, way, present)
        groups.append(things)
    return _nearest(camera, groups, 16)


def _right_of(axis: Array, way: int) -> Array:
    """Give the side of the road that traffic of a direction keeps to: the right."""
    return jnp.where(axis == 0, -1.0, 1.0) * way
