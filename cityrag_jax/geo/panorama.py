"""Equirectangular panoramas and perspective crops of them.

A panorama has twice as many columns as rows. Its frame is OpenCV's: x right, y down,
z forward. The centre column looks forward, columns go clockwise seen from above, the
top row is up. Pixel centres lie at whole coordinates: column c looks at longitude
2 pi (c + 0.5) / W - pi, row r at pi (r + 0.5) / H - pi / 2 below the horizon.

A crop turns by its yaw (positive to the right) and then its pitch (positive up), and
does not roll. Its field of view is horizontal. Angles are radians here.

On disk a panorama of height P is a grid of 5 x 8 JPEG tiles, P / 4 wide; the middle
row holds the horizon, 22.5 degrees up and down, which is what a level crop needs.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Float64, Num

TILE_COLUMNS = 8
TILE_ROW_EIGHTHS = (0, 1, 3, 5, 7, 8)
TILE_ROWS = len(TILE_ROW_EIGHTHS) - 1
TILES = TILE_ROWS * TILE_COLUMNS
HORIZON = tuple(range(2 * TILE_COLUMNS, 3 * TILE_COLUMNS))  # tiles of the middle row


@dataclasses.dataclass(frozen=True)
class TileWindow:
    """Tiles that a crop touches: rows, and columns that may run past the seam.

    Columns start .. start + count - 1 are counted modulo 8. `whole` says that the
    crop reaches over the seam of a full turn or over a pole, so that all columns
    are needed and neighbours must be found on the sphere.
    """

    row_start: int
    row_stop: int
    column_start: int
    column_count: int
    whole: bool


def crop_rays(
    height: int, width: int, fov_rad: float
) -> Float64[np.ndarray, "{height} {width} 3"]:
    """Give the direction of every pixel of a crop in its camera frame, with z = 1."""
    if not 0 < fov_rad < np.pi:
        raise ValueError(
            f"A field of view of {np.rad2deg(fov_rad):.1f} degrees is not one of a "
            "perspective image; give one between 0 and 180."
        )
    focal = width / 2 / np.tan(fov_rad / 2)
    x = (np.arange(width) + 0.5 - width / 2) / focal
    y = (np.arange(height) + 0.5 - height / 2) / focal
    rays = np.ones((height, width, 3))
    rays[..., 0] = x[None, :]
    rays[..., 1] = y[:, None]
    return rays


@functools.lru_cache(maxsize=32)
def crop_angles(
    height: int, width: int, fov_rad: float, pitch_rad: float = 0.0
) -> tuple[
    Float64[np.ndarray, "{height} {width}"], Float64[np.ndarray, "{height} {width}"]
]:
    """Give longitude (from the crop's yaw) and depression of every pixel of a crop.

    Independent of the yaw, so that one cached result serves all frames. Read-only.
    """
    x, y, z = np.moveaxis(crop_rays(height, width, fov_rad), -1, 0)
    sine, cosine = np.sin(pitch_rad), np.cos(pitch_rad)
    y, z = cosine * y - sine * z, sine * y + cosine * z
    longitude = np.arctan2(x, z)
    depression = np.arctan2(y, np.hypot(x, z))
    longitude.flags.writeable = depression.flags.writeable = False
    return longitude, depression


def sampling_map(
    panorama_height: int,
    yaw_rad: float,
    *,
    height: int,
    width: int,
    fov_rad: float,
    pitch_rad: float = 0.0,
) -> tuple[
    Float64[np.ndarray, "{height} {width}"], Float64[np.ndarray, "{height} {width}"]
]:
    """Give the panorama column and row that every pixel of a crop looks at.

    Columns are not wrapped: they may leave [0, W) and mean the column modulo W.
    Rows lie in [-0.5, P - 0.5]: beyond the last centre, the neighbour is across
    the pole.
    """
    longitude, depression = crop_angles(height, width, fov_rad, pitch_rad)
    per_radian = panorama_height / np.pi
    turn = np.remainder(yaw_rad, 2 * np.pi)
    columns = (longitude + (turn + np.pi)) * per_radian - 0.5
    rows = (depression + np.pi / 2) * per_radian - 0.5
    return columns, rows


def pad_panorama(
    panorama: Num[np.ndarray, "P W C"],
) -> Num[np.ndarray, "P+2 W+2 C"]:
    """Add one pixel on every side as the sphere continues there.

    Left and right wrap around; above the top row lies that row half a turn away.
    """
    half = panorama.shape[1] // 2
    padded = np.concatenate(
        [
            np.roll(panorama[:1], half, axis=1),
            panorama,
            np.roll(panorama[-1:], half, axis=1),
        ]
    )
    return np.concatenate([padded[:, -1:], padded, padded[:, :1]], axis=1)


def crop_panorama(
    panorama: Num[np.ndarray, "P W C"],
    yaw_rad: float,
    *,
    height: int,
    width: int,
    fov_rad: float,
    pitch_rad: float = 0.0,
) -> Float[np.ndarray, "{height} {width} C"]:
    """Crop a perspective view by exact bilinear interpolation, in float64.

    The slow and plain form, for truth; `data.store` does the same on stored tiles.
    """
    check_panorama_shape(panorama.shape[0], panorama.shape[1])
    columns, rows = sampling_map(
        panorama.shape[0],
        yaw_rad,
        height=height,
        width=width,
        fov_rad=fov_rad,
        pitch_rad=pitch_rad,
    )
    padded = pad_panorama(panorama).astype(np.float64)
    columns = np.remainder(columns + 0.5, panorama.shape[1]) + 0.5
    rows = rows + 1
    c, r = np.floor(columns).astype(int), np.floor(rows).astype(int)
    right, below = (columns - c)[..., None], (rows - r)[..., None]
    top = padded[r, c] * (1 - right) + padded[r, c + 1] * right
    r = np.minimum(r + 1, padded.shape[0] - 1)
    bottom = padded[r, c] * (1 - right) + padded[r, c + 1] * right
    return top * (1 - below) + bottom * below


def check_panorama_shape(height: int, width: int) -> None:
    """Refuse what is no full panorama or does not cut into whole tiles."""
    if width != 2 * height or height % 8 or height < 16:
        raise ValueError(
            f"A panorama of {width}x{height} cannot be cut into tiles: it must be "
            "twice as wide as high and its height a multiple of 8; resize it, for "
            f"example to {2 * max(16, height // 8 * 8)}x{max(16, height // 8 * 8)}."
        )


@functools.lru_cache(maxsize=32)
def tile_edges(panorama_height: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the rows and the columns at which a panorama is cut into tiles."""
    check_panorama_shape(panorama_height, 2 * panorama_height)
    rows = tuple(panorama_height * k // 8 for k in TILE_ROW_EIGHTHS)
    columns = tuple(panorama_height * k // 4 for k in range(TILE_COLUMNS + 1))
    return rows, columns


@functools.lru_cache(maxsize=32)
def _angle_range(
    height: int, width: int, fov_rad: float, pitch_rad: float
) -> tuple[float, float, float, float]:
    longitude, depression = crop_angles(height, width, fov_rad, pitch_rad)
    ends = (longitude.min(), longitude.max(), depression.min(), depression.max())
    return tuple(float(end) for end in ends)


def touched_tiles(
    panorama_height: int,
    yaw_rad: float,
    *,
    height: int,
    width: int,
    fov_rad: float,
    pitch_rad: float = 0.0,
) -> TileWindow:
    """Give the tiles that bilinear sampling of a crop reads."""
    row_edges, column_edges = tile_edges(panorama_height)
    left, right, top, bottom = _angle_range(height, width, fov_rad, pitch_rad)
    per_radian = panorama_height / np.pi
    turn = float(np.remainder(yaw_rad, 2 * np.pi)) + np.pi
    first_row = int(np.floor((top + np.pi / 2) * per_radian - 0.5))
    last_row = int(np.floor((bottom + np.pi / 2) * per_radian - 0.5)) + 1
    over_pole = first_row < 0 or last_row >= panorama_height
    row_start = int(np.searchsorted(row_edges, max(first_row, 0), "right")) - 1
    last_row = min(last_row, panorama_height - 1)
    row_stop = int(np.searchsorted(row_edges, last_row, "right"))
    tile = column_edges[1]
    first = int(np.floor((left + turn) * per_radian - 0.5)) // tile
    last = (int(np.floor((right + turn) * per_radian - 0.5)) + 1) // tile
    # A crop spans more than half a turn only if a pole lies inside it.
    if over_pole or right - left > np.pi or last - first + 1 >= TILE_COLUMNS:
        return TileWindow(row_start, row_stop, 0, TILE_COLUMNS, True)
    return TileWindow(row_start, row_stop, first, last - first + 1, False)
