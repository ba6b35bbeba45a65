"""What real captures get wrong: poses, times and places that cannot be.

Each refusal names the first capture, both values, and the cure.
"""

import numpy as np
from jaxtyping import Float64, Int64

from cityrag_jax.geo.ecef import ecef_from_geodetic, geodetic_from_ecef, invert_rigid
from cityrag_jax.geo.poses import guess_axes, least_upright, share_upright

UPRIGHT_SHARE = 0.95
EARLIEST_S, LATEST_S = 631152000.0, 4102444800.0  # 1990 and 2100
FASTEST_M_S, LONGEST_M = 70.0, 50.0
FROM_ANCHOR_M = 200_000.0


def check_upright(ecef_from_camera: Float64[np.ndarray, "N 4 4"], source: str) -> None:
    """Refuse cameras that lie on their side: usually other axes, or inverses."""
    share = share_upright(ecef_from_camera)
    if share >= UPRIGHT_SHARE:
        return
    worst, angle = least_upright(ecef_from_camera)
    guesses = guess_axes(ecef_from_camera) or ["level the panoramas and their poses"]
    raise ValueError(
        f"{source}: the y axis of capture {worst} is {angle:.0f} degrees from down; "
        f"only {share:.0%} of the cameras stand upright. Poses must be "
        "ecef_from_camera with x right, y down, z forward; perhaps "
        f"{', or '.join(guesses)}."
    )


def check_precision(position_m: Float64[np.ndarray, "N 3"], source: str) -> None:
    """Refuse positions that went through float32: half a metre is lost."""
    rounded = position_m.astype(np.float32).astype(np.float64)
    if len(position_m) > 2 and np.array_equal(rounded, position_m):
        raise ValueError(
            f"{source}: all positions are float32 numbers, such as "
            f"{position_m[0].tolist()}; ECEF metres need float64, as float32 steps are "
            "half a metre. Compute the poses again in float64."
        )


def check_times(time_s: Float64[np.ndarray, " N"], source: str) -> None:
    """Refuse times that are no Unix seconds of the years 1990 to 2100."""
    bad = ~((time_s >= EARLIEST_S) & (time_s <= LATEST_S))
    if not bad.any():
        return
    k = int(np.argmax(bad))
    cure = "give Unix time in seconds"
    for name, scale in (("milli", 1e3), ("micro", 1e6), ("nano", 1e9)):
        if EARLIEST_S <= time_s[k] / scale <= LATEST_S:
            cure = f"these are {name}seconds: divide by {scale:.0e}"
    raise ValueError(
        f"{source}: capture {k} was taken at {time_s[k]} s, {int(bad.sum())} captures "
        f"outside the years 1990 to 2100; {cure}."
    )


def check_speed(
    position_m: Float64[np.ndarray, "N 3"],
    time_s: Float64[np.ndarray, " N"],
    edges: Int64[np.ndarray, " D"],
    source: str,
) -> None:
    """Refuse leaps within a drive that no car makes."""
    step_m = np.linalg.norm(np.diff(position_m, axis=0), axis=1)
    fast = (step_m > LONGEST_M) & (step_m > FASTEST_M_S * np.diff(time_s))
    fast[edges[1:-1] - 1] = False
    if fast.any():
        k = int(np.argmax(fast))
        raise ValueError(
            f"{source}: capture {k + 1} is {step_m[k]:.0f} m from capture {k} of its "
            f"drive, taken {time_s[k + 1] - time_s[k]:.2f} s earlier; "
            f"{int(fast.sum())} such leaps. Correct the poses, or give what follows "
            "another drive number."
        )


def check_anchor(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    anchor: tuple[float, float, float],
    source: str,
) -> None:
    """Refuse captures in another part of the world than the city's anchor."""
    position_m = ecef_from_camera[:, :3, 3]
    anchor_m = ecef_from_geodetic(*(float(value) for value in anchor))
    distance_m = np.linalg.norm(position_m - anchor_m, axis=1)
    if distance_m.max() <= FROM_ANCHOR_M:
        return
    k = int(np.argmax(distance_m))
    latitude, longitude, height_m = (
        float(value) for value in geodetic_from_ecef(position_m[k])
    )
    cure = "correct the pose, or the anchor"
    inverse_m = invert_rigid(ecef_from_camera[k])[:3, 3]
    if np.linalg.norm(inverse_m - anchor_m) <= FROM_ANCHOR_M:
        cure = "poses are camera-from-world: invert them (geo.ecef.invert_rigid)"
    if abs(longitude) <= 90:
        swapped = ecef_from_geodetic(longitude, latitude, height_m)
        if np.linalg.norm(swapped - anchor_m) <= FROM_ANCHOR_M:
            cure = "latitude and longitude are swapped"
    raise ValueError(
        f"{source}: capture {k} lies at latitude {latitude:.5f}, longitude "
        f"{longitude:.5f}, {distance_m[k] / 1000:.0f} km from the city's anchor at "
        f"{anchor[0]:.5f}, {anchor[1]:.5f} (city.json); {cure}."
    )
