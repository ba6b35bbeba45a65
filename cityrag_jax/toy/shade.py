"""How the surfaces of the toy city look: facades, ground, sky, cars, people, trees.

A `Surface` is an albedo, light of its own, and how much it mirrors the sky. Colours
are tuples of three equal arrays, linear, so that XLA fuses a whole pixel into one
loop. Fine patterns fade with distance, or they would alias: at 512 columns a window
is a pixel at 85 m.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from cityrag_jax.toy.world import ROAD_HALF_M, STREET_HALF_M, fraction, hashed

Value = Array | np.ndarray | np.generic | float | bool
Color = tuple[Value, Value, Value]


class Light(NamedTuple):
    """A scene's numbers as arrays [B, 1, 1], colours as tuples of them."""

    sun: Color
    sun_rgb: Color
    ambient_rgb: Color
    zenith_rgb: Color
    horizon_rgb: Color
    clouds: Float32[Array, "B 1 1"]
    wet: Float32[Array, "B 1 1"]
    lamps: Float32[Array, "B 1 1"]
    seed: Array


class Surface(NamedTuple):
    """What a point looks like before light falls on it."""

    albedo: Color
    glow: Color
    mirror: Array


def mix(base: Color, over: Color, alpha: Value) -> Color:
    """Lay a colour over another with a coverage in [0, 1]."""
    return tuple(b + (o - b) * alpha for b, o in zip(base, over, strict=True))


def pick(mask: Array, yes: Color, no: Color) -> Color:
    """Choose a colour where a mask holds."""
    return tuple(jnp.where(mask, y, n) for y, n in zip(yes, no, strict=True))


def scale(color: Color, factor: Value) -> Color:
    """Multiply a colour by one number."""
    return tuple(c * factor for c in color)


def rgb(r: float, g: float, b: float) -> Color:
    """Name a constant colour."""
    return np.float32(r), np.float32(g), np.float32(b)


def fade(distance_m: Array, near: float, far: float) -> Array:
    """Fall from 1 at `near` to 0 at `far`."""
    return jnp.clip((far - distance_m) * np.float32(1 / (far - near)), 0.0, 1.0)


def paint(warm: Value, light: Value, cool: Value) -> Color:
    """Make a colour a wall can have: grey to brick, or its cool mirror image."""
    red = light
    green = light * (1.0 - 0.5 * warm)
    blue = light * (1.0 - 0.72 * warm)
    return jnp.where(cool, blue, red), green, jnp.where(cool, red, blue)


def pack(color: Color) -> Array:
    """Put a colour into 32 bits, by its square roots: one array is computed once."""
    r, g, b = (jnp.sqrt(jnp.clip(c, 0.0, 1.0)) for c in color)
    parts = ((r * 2047.0, 21), (g * 2047.0, 10), (b * 1023.0, 0))
    return sum(
        (v + 0.5).astype(jnp.int32).astype(jnp.uint32) << np.uint32(shift)
        for v, shift in parts
    )


def unpack(packed: Array) -> Color:
    """Take a colour out of `pack`."""
    parts = ((21, 2047), (10, 2047), (0, 1023))
    roots = (
        ((packed >> np.uint32(shift)) & np.uint32(top)).astype(jnp.int32)
        * np.float32(1 / top)
        for shift, top in parts
    )
    return tuple(root * root for root in roots)


def wave(x: Array) -> Array:
    """Swing like sin(2 pi x), by parabolas."""
    t = 2.0 * (x - jnp.floor(x)) - 1.0
    return 4.0 * t * (jnp.abs(t) - 1.0)


def facade(
    bits: Array, u: Array, z: Array, width: Array, top: Array, blank: Array, s: Array,
    light: Light,
) -> Surface:  # fmt: skip
    """Paint a building's face: u metres along the lot, z up, s metres away.

    `blank` marks party walls, which have no windows; the lot's hash decides the rest.
    """
    more = hashed(bits, 50)
    cool = (more & np.uint32(3)) == np.uint32(1)
    warm, pale = fraction(bits, 2), fraction(more, 8)
    warm = jnp.where(cool, 0.5 * warm, 0.1 + 0.9 * warm)
    wall = paint(warm, 0.24 + 0.56 * pale, cool)
    ground = 3.7 + 0.9 * fraction(more, 4)
    upper = (z > ground) & ~blank
    near = fade(s, 25.0, 85.0)
    wall = _brickwork(wall, more, u, z, fade(s, 8.0, 35.0))
    trim = tuple(0.45 * c + 0.35 for c in wall)
    edge = (z > top - 0.5) | (jnp.abs(z - ground) < 0.18)
    wall = pick(edge & (top > 3.0), trim, wall)
    pane, frame, glow = _windows(bits, more, u, z - ground, width, near, light)
    wall = mix(wall, trim, jnp.where(upper & (z < top - 0.9), frame, 0.0))
    pane = jnp.where(upper & (z < top - 0.9), pane, 0.0)
    shop, shop_pane, shop_glow = _ground_floor(more, wall, u, z, width, ground, near)
    street_level = (z <= ground) & ~blank & (top > 3.0)
    color = pick(street_level, shop, wall)
    pane = jnp.where(street_level, shop_pane, pane)
    glow = jnp.where(street_level, shop_glow * light.lamps, glow)
    garden = top <= 3.0
    hedge = garden & ((bits & np.uint32(16)) == np.uint32(16))
    color = pick(hedge, paint(0.3 + 0.3 * fraction(bits, 9), 0.2, False), color)
    color = pick(hedge, (color[0] * 0.6, color[1] * 1.2, color[2] * 0.5), color)
    glass = rgb(0.05, 0.065, 0.08)
    color = mix(color, glass, pane)
    lamp = (1.0 * glow, 0.72 * glow, 0.38 * glow)
    window = jnp.floor(u * 0.4).astype(jnp.int32), jnp.floor(z * 0.3).astype(jnp.int32)
    sheen = 0.12 + 0.3 * fraction(hashed(more, 56, *window), 8)
    return Surface(color, lamp, sheen * jnp.clip(pane, 0.0, 1.0))


def _brickwork(wall: Color, more: Array, u: Array, z: Array, near: Array) -> Color:
    """Add courses, stains and a darker foot to a wall."""
    course = jnp.floor(z * 3.3)
    brick = jnp.floor(u * 1.6 + 0.5 * (course - 2.0 * jnp.floor(course * 0.5)))
    grain = fraction(
        hashed(more, 51, course.astype(jnp.int32), brick.astype(jnp.int32)), 8
    )
    rough = jnp.where((more & np.uint32(12)) == np.uint32(0), 0.08, 0.4)
    shade = 1.0 + rough * near * (grain - 0.5)
    return scale(wall, shade * (0.8 + 0.2 * jnp.clip(z * 0.8, 0.0, 1.0)))


def _windows(
    bits: Array, more: Array, u: Array, above: Array, width: Array, near: Array,
    light: Light,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Cover a face with a grid of windows; return glass, frame and light."""
    bay = 1.7 + 2.0 * fraction(bits, 8)
    bays = jnp.maximum(jnp.floor(width / bay), 1.0)
    across = u * bays / width
    column = jnp.floor(across)
    across = across - column - 0.5
    storey = 2.9 + 0.8 * fraction(bits, 16)
    upward = above / storey
    floor = jnp.floor(upward)
    upward = upward - floor - 0.5
    style = (more >> np.uint32(20)) & np.uint32(7)
    ribbon, tall = style == np.uint32(0), (style & np.uint32(3)) == np.uint32(1)
    half = jnp.where(ribbon, 0.485, 0.17 + 0.2 * fraction(more, 14))
    high = jnp.where(tall, 0.42, 0.22 + 0.12 * fraction(bits, 20))
    inset_u, inset_v = half - jnp.abs(across), high - jnp.abs(upward - 0.02)
    pane = ((inset_u > 0.0) & (inset_v > 0.0)).astype(jnp.float32)
    bars = (inset_u < 0.03) | (inset_v < 0.025) | (jnp.abs(across) < 0.015)
    frame = ((inset_u > -0.05) & (inset_v > -0.06)).astype(jnp.float32)
    sill = (inset_v < 0.0) & (inset_v > -0.05) & (upward < 0.0) & (inset_u > -0.08)
    window = hashed(more, 52, column.astype(jnp.int32), floor.astype(jnp.int32))
    recess = (inset_v < 0.07) & (upward > 0.0)
    curtain = jnp.where((window & np.uint32(7)) < np.uint32(2), 0.45, 0.0)
    curtain = jnp.where(upward > high * (2.0 * fraction(window, 8) - 0.6), curtain, 0.0)
    glass = pane * jnp.where(recess, 1.15, 1.0 - 0.7 * bars) * (1.0 - curtain)
    mean = 4.0 * half * high * 0.8
    glass = mean + near * (glass - mean)
    frame = near * jnp.maximum(frame, sill.astype(jnp.float32))
    evening = hashed(
        more + light.seed, 53, column.astype(jnp.int32), floor.astype(jnp.int32)
    )
    lit = (fraction(evening, 4) < 0.35 * light.lamps) & (pane > 0.0)
    return (
        glass,
        frame,
        jnp.where(lit, 0.25 + 0.75 * fraction(evening, 16), 0.0) * (0.2 + 0.8 * near),
    )


def _ground_floor(
    more: Array,
    wall: Color,
    u: Array,
    z: Array,
    width: Array,
    ground: Array,
    near: Array,
) -> tuple[Color, Array, Array]:
    """Paint a ground floor, a shop or a house; return colour, glass and its light."""
    extra = hashed(more, 54)
    shop = fraction(more, 24) < 0.6
    sign = paint(
        fraction(extra, 0),
        0.15 + 0.7 * fraction(extra, 8),
        (extra >> np.uint32(30)) < np.uint32(2),
    )
    from_edge = jnp.minimum(u, width - u)
    letter = hashed(extra, 55, jnp.floor(u * 3.0).astype(jnp.int32))
    text = (
        letter >> jnp.clip((z - 3.0) * 10.0, 0.0, 6.0).astype(jnp.uint32)
    ) & np.uint32(1)
    text = (
        (text == np.uint32(1))
        & (jnp.abs(z - 3.25) < 0.2)
        & (jnp.abs(u - 0.5 * width) < 0.3 * width)
    )
    dark_sign = fraction(extra, 8) < 0.45
    ink = jnp.where(dark_sign, 0.85, 0.04)
    board = pick(text & (near > 0.3), (ink, ink, ink), sign)
    awning = ((extra & np.uint32(0x3000)) == 0) & (z > 2.25) & (z < 2.95)
    stripe = jnp.floor(u * 1.6) * 0.5
    stripe = (stripe - jnp.floor(stripe)) > 0.25
    cloth = pick(stripe, rgb(0.75, 0.73, 0.68), sign)
    door_u = width * (0.2 + 0.6 * fraction(extra, 16))
    door = (jnp.abs(u - door_u) < 0.55) & (z < 2.3)
    mullion = u * 0.55 - jnp.floor(u * 0.55)
    show = (z > 0.55) & (z < 2.75) & (from_edge > 0.4) & (mullion > 0.06)
    color = pick((z > 2.85) & (z < 3.65) & (from_edge > 0.25), board, scale(sign, 0.6))
    color = pick(awning, cloth, color)
    pane = jnp.where(show & ~awning, 0.9, 0.0)
    bay = jnp.maximum(jnp.floor(width * 0.4), 1.0) / width * u
    small = (jnp.abs(bay - jnp.floor(bay) - 0.5) < 0.2) & (jnp.abs(z - 1.9) < 0.75)
    home = scale(wall, 0.85)
    color = pick(shop, color, home)
    pane = jnp.where(shop, pane, jnp.where(small, 0.85, 0.0))
    wood = paint(
        fraction(extra, 20),
        0.1 + 0.3 * fraction(extra, 4),
        (extra & np.uint32(1)) == np.uint32(1),
    )
    color = pick(door, wood, color)
    pane = jnp.where(door, jnp.where(shop & (z > 1.0), 0.5, 0.0), pane)
    mean = jnp.where(shop, 0.45, 0.15)
    pane = mean + (0.25 + 0.75 * near) * (pane - mean)
    glow = jnp.where(shop, pane * 0.75, pane * 0.2)
    return color, pane, glow


def ground(
    block_m: float, seed: Array, x: Array, y: Array, s: Array, light: Light
) -> Surface:
    """Paint the ground at (x, y): asphalt, marks, kerbs, pavement, park grass."""
    block = np.float32(block_m)
    i, j = jnp.round(x / block), jnp.round(y / block)
    fx, fy = jnp.abs(x - i * block), jnp.abs(y - j * block)
    cross, along = jnp.minimum(fx, fy), jnp.maximum(fx, fy)
    runs_y = fx < fy
    length = jnp.where(runs_y, y, x)
    signed = jnp.where(runs_y, x - i * block, y - j * block)
    near, mid = fade(s, 6.0, 22.0), fade(s, 40.0, 95.0)
    fine = hashed(
        seed,
        60,
        jnp.floor(x * 5.0).astype(jnp.int32),
        jnp.floor(y * 5.0).astype(jnp.int32),
    )
    patch = hashed(
        seed,
        61,
        jnp.floor(length * 0.22).astype(jnp.int32),
        jnp.floor(signed * 0.5).astype(jnp.int32),
        jnp.where(runs_y, i, j).astype(jnp.int32),
    )
    grain = 1.0 + 0.3 * near * (fraction(fine, 8) - 0.5)
    tar = 0.085 + 0.05 * fraction(patch, 3) * mid
    tar = tar * grain
    asphalt = (tar, tar * 1.01, tar * 1.04)
    asphalt = mix(
        asphalt,
        rgb(0.62, 0.62, 0.6),
        0.85 * mid * _marks(seed, i, j, cross, along, length, signed),
    )
    slab_u, slab_v = x * 1.1, y * 1.1
    slab = (slab_u - jnp.floor(slab_u) < 0.05) | (slab_v - jnp.floor(slab_v) < 0.05)
    stone = (0.3 + 0.06 * fraction(patch, 9)) * grain * (1.0 - 0.3 * slab * near)
    pavement = (stone, stone * 0.97, stone * 0.92)
    kerb = jnp.abs(cross - ROAD_HALF_M) < 0.14
    pavement = pick(cross < ROAD_HALF_M + 0.14, rgb(0.42, 0.41, 0.4), pavement)
    lawn = hashed(
        seed,
        62,
        jnp.floor(x * 1.3).astype(jnp.int32),
        jnp.floor(y * 1.3).astype(jnp.int32),
    )
    green = (0.1 + 0.06 * fraction(lawn, 2) * mid) * grain
    park = cross > STREET_HALF_M
    color = pick(park, (green, 1.35 * green, 0.5 * green), pavement)
    road = (cross < ROAD_HALF_M) & ~(kerb & (along > ROAD_HALF_M))
    color = pick(road, asphalt, color)
    puddle = 0.35 + 0.65 * (fraction(patch, 13) > 0.55)
    mirror = light.wet * jnp.where(road, puddle, jnp.where(park, 0.0, 0.35))
    pool = length * np.float32(1 / 12)
    pool = pool - jnp.floor(pool) - 0.5
    glow = light.lamps * 0.25 * jnp.clip(1.0 - 5.0 * pool * pool, 0.0, 1.0)
    glow = jnp.where(cross < STREET_HALF_M, glow, 0.0)
    warm = (1.3 * glow, 1.0 * glow, 0.65 * glow)
    return Surface(
        color, tuple(w * c for w, c in zip(warm, color, strict=True)), mirror
    )


def _marks(
    seed: Array,
    i: Array,
    j: Array,
    cross: Array,
    along: Array,
    length: Array,
    signed: Array,
) -> Array:
    """Say where paint lies on the road: dashes, zebras, stop and parking lines."""
    junction = hashed(seed, 63, i.astype(jnp.int32), j.astype(jnp.int32))
    open_road = along > ROAD_HALF_M + 5.0
    dash = length * 0.22
    dash = (dash - jnp.floor(dash) < 0.5) & (cross < 0.09) & open_road
    bar = signed * 0.95
    zebra = (bar - jnp.floor(bar) < 0.5) & (cross < ROAD_HALF_M - 0.3)
    zebra &= (along > ROAD_HALF_M + 0.7) & (along < ROAD_HALF_M + 3.3)
    zebra &= (junction & np.uint32(3)) != np.uint32(0)
    stop = (jnp.abs(along - ROAD_HALF_M - 4.2) < 0.22) & (cross < ROAD_HALF_M - 2.0)
    parking = (jnp.abs(cross - 2.95) < 0.06) & (along > STREET_HALF_M + 3.5)
    return (dash | zebra | stop | parking).astype(jnp.float32)


def sky(dx: Array, dy: Array, m: Array, time_s: Array, light: Light) -> Color:
    """Paint the sky in a horizontal direction at slope m: gradient, clouds, the sun."""
    size = 1.0 / jnp.sqrt(1.0 + m * m)
    up = jnp.clip(m * size, 0.0, 1.0)
    color = mix(light.horizon_rgb, light.zenith_rgb, jnp.sqrt(up) * (1.6 - 0.6 * up))
    reach = 1.4 / (jnp.maximum(m, 0.0) + 0.15)
    phase = (light.seed & np.uint32(1023)).astype(jnp.float32) + 0.004 * time_s
    px, py = dx * reach + phase, dy * reach + 0.7 * phase
    px, py = px * 0.16, py * 0.16
    swirl = wave(1.3 * px + 0.27 * wave(0.9 * py)) + wave(1.9 * py - 1.1 * px)
    swirl = swirl + 0.5 * wave(3.7 * px + 0.32 * swirl)
    swirl = swirl + 0.3 * wave(7.1 * py + 0.16 * swirl)
    cover = jnp.clip(1.1 * swirl - 1.6 + 3.6 * light.clouds, 0.0, 1.0)
    white = tuple(
        0.75 * a + 0.5 * b + 0.25 * h
        for a, b, h in zip(
            light.ambient_rgb, light.sun_rgb, light.horizon_rgb, strict=True
        )
    )
    cover = 0.85 * cover * jnp.clip(up * 7.0, 0.0, 1.0)
    color = mix(color, white, cover)
    toward = (dx * light.sun[0] + dy * light.sun[1] + m * light.sun[2]) * size
    glare = jnp.clip(toward, 0.0, 1.0)
    glare = glare * glare
    halo = glare * glare
    halo = halo * halo
    disc = (toward > 0.9992) * 6.0 * (1.0 - cover)
    disc = disc * jnp.clip(3.0 * light.sun_rgb[0] - 0.6, 0.0, 1.0)
    halo = 0.35 * halo * halo + disc
    return tuple(c + b * halo for c, b in zip(color, light.sun_rgb, strict=True))


def car(
    bits: Array, lx: Array, ly: Array, z: Array, half_length: Array, tall: Array
) -> Surface:
    """Paint a car at (lx forward, ly left, z up) from its middle."""
    body = paint(
        fraction(bits, 16) * 0.9,
        0.04 + 0.6 * fraction(bits, 20),
        (bits >> np.uint32(31)) == np.uint32(1),
    )
    plain = (bits & np.uint32(7)) < np.uint32(4)
    grey = fraction(bits, 20) * 0.6 + 0.03
    body = pick(plain, (grey, grey, grey), body)
    window = (z > 0.97) & (z < tall - 0.12)
    end = jnp.abs(lx) > half_length - 0.06
    pillar = (jnp.abs(jnp.abs(lx + 0.2) - 0.55) < 0.05) & ~end
    color = pick(window & ~pillar, rgb(0.03, 0.035, 0.045), body)
    wheel = (jnp.abs(lx) - 0.62 * half_length) ** 2 + (z - 0.32) ** 2 < 0.11
    wheel = (wheel & (jnp.abs(ly) > 0.7)) | (z < 0.25)
    color = pick(wheel, rgb(0.02, 0.02, 0.022), color)
    lights = end & (jnp.abs(z - 0.66) < 0.1) & (jnp.abs(ly) > 0.45)
    front = lights & (lx > 0)
    back = lights & (lx <= 0)
    color = pick(front, rgb(0.8, 0.8, 0.75), pick(back, rgb(0.45, 0.02, 0.02), color))
    shine = jnp.where(front, 1.0, 0.0)
    zero = jnp.zeros_like(z)
    tail = jnp.where(back, 0.6, zero)
    return Surface(
        color,
        (shine + tail, 0.95 * shine, 0.8 * shine),
        jnp.where(window, 0.16, 0.05) + zero,
    )


def post(kind: Array, bits: Array, q: Array, z: Array) -> Surface:
    """Paint a static post: 0 lamp, 1 bin, 2 bollard, 3 sign; q metres off its axis."""
    metal = rgb(0.07, 0.08, 0.08)
    tub = paint(fraction(bits, 4), 0.25, (bits & np.uint32(1)) == np.uint32(0))
    color = pick(kind == 1, tub, metal)
    color = pick((kind == 2) & (z > 0.7), rgb(0.6, 0.6, 0.58), color)
    face = (kind == 3) & (z > 2.1)
    rim = q * q + (z - 2.45) ** 2 > 0.06
    red, blue = rgb(0.6, 0.03, 0.03), rgb(0.03, 0.1, 0.45)
    board = pick((bits & np.uint32(256)) == np.uint32(0), red, blue)
    color = pick(face, pick(rim, board, rgb(0.75, 0.75, 0.75)), color)
    head = ((kind == 0) & (z > 5.3)).astype(jnp.float32)
    return Surface(color, (1.6 * head, 1.3 * head, 0.9 * head), jnp.zeros_like(z))


def person(bits: Array, q: Array, z: Array) -> Surface:
    """Paint someone: shoes and trousers, a coat, a head with hair."""
    more = hashed(bits, 70)
    legs = paint(
        0.4 * fraction(bits, 0),
        0.03 + 0.25 * fraction(bits, 20),
        (more & np.uint32(1)) == 0,
    )
    coat = paint(
        fraction(more, 0), 0.05 + 0.55 * fraction(more, 8), (more >> np.uint32(30)) == 0
    )
    skin = paint(0.55 + 0.0 * q, 0.12 + 0.5 * fraction(more, 16), False)
    hair = paint(0.4 + 0.0 * q, 0.03 + 0.2 * fraction(more, 24), False)
    color = pick(z > 0.85, coat, legs)
    color = pick(z > 1.45, pick(z > 1.62, hair, skin), color)
    zero = jnp.zeros_like(z)
    return Surface(color, (zero, zero, zero), zero)


def tree(bits: Array, x: Array, y: Array, z: Array, crown: Array, s: Array) -> Surface:
    """Paint a tree: bark, or leaves in clumps."""
    clump = hashed(
        bits,
        71,
        jnp.floor(x * 2.0).astype(jnp.int32),
        jnp.floor(y * 2.0).astype(jnp.int32),
        jnp.floor(z * 2.0).astype(jnp.int32),
    )
    grain = 0.75 + 0.6 * (fraction(clump, 8) - 0.3) * fade(s, 12.0, 60.0)
    warm = fraction(bits, 12)
    leaf = scale(
        (0.1 + 0.12 * warm * warm, 0.19 + 0.0 * warm, 0.05 + 0.02 * warm), grain
    )
    bark = rgb(0.11, 0.085, 0.065)
    zero = jnp.zeros_like(z)
    return Surface(pick(crown, leaf, bark), (zero, zero, zero), zero)
