"""A city on disk: JPEG panoramas in tiles, and columns of poses, times and licences.

One folder holds
    city.json      format, name, panorama height, anchor, tables of licences and
                   attributions, settings of the generator
    captures.parquet  the columns of `Captures` and `Provenance`, see columns.py
    horizon/ panoramas/   TensorFlow Datasets folders (ArrayRecord, read without
                   TensorFlow) of JPEG tiles: the row around the horizon, and the rest,
                   see records.py
    pairs.parquet  mined pairs, written by data/pairs.py

Tiles let a crop decode 2.4 of 40: with random yaw 116 instead of 13 crops a second on
4096x2048 pixels. Panorama frames are OpenCV's (x right, y down, z the centre column).
"""

import functools
import os
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, Float64, Int, Int64, UInt8

from cityrag_jax.data.captures import (
    REBUILD,
    read_header,
)
from cityrag_jax.data.columns import (
    CAPTURES,
    read_captures,
    read_provenance,
)
from cityrag_jax.data.pairs import PAIRS
from cityrag_jax.data.provenance import Provenance
from cityrag_jax.data.records import APART, VERSION, Tiles, count_panoramas
from cityrag_jax.data.remote import bring, origin_of
from cityrag_jax.geo.panorama import (
    TILE_COLUMNS,
    TILE_ROWS,
    TILES,
    TileWindow,
    crop_angles,
    pad_panorama,
    tile_edges,
    touched_tiles,
)
from cityrag_jax.geo.retrieval import CaptureIndex, drive_edges, index_captures

DATASETS = tuple(f"{name}/{VERSION}" for name in APART)
TABLES = (
    *("city.json", CAPTURES, PAIRS, "import.json"),
    *(f"{dataset}/dataset_info.json" for dataset in DATASETS),
)

# Parts of a panorama's column that a crop's centre is rounded to; OpenCV itself rounds
# places to 32 parts. 0.003 degrees where a panorama is 2048 high.
FRACTIONS = 16


@functools.lru_cache(maxsize=32)
def _base_maps(
    panorama_height: int, height: int, width: int, fov_rad: float, pitch_rad: float
) -> tuple[Float32[np.ndarray, "H W"], Float32[np.ndarray, "H W"]]:
    """Give columns from the view's centre and rows, which no yaw changes."""
    longitude, depression = crop_angles(height, width, fov_rad, pitch_rad)
    per_radian = panorama_height / np.pi
    rows = (depression + np.pi / 2) * per_radian - 0.5
    return (longitude * per_radian).astype(np.float32), rows.astype(np.float32)


@functools.lru_cache(maxsize=2 * FRACTIONS)
def _fixed_maps(
    panorama_height: int,
    view: tuple[int, int, float, float],
    first_row: int,
    fraction: int,
) -> tuple[int, np.ndarray, np.ndarray]:
    """Give a column left of the view's centre, and maps in fixed point from it on.

    Sampling by them takes 60 % of the time, and nothing is computed for a crop.
    """
    columns, rows = _base_maps(panorama_height, *view)
    first = int(np.floor(columns.min()))
    columns = columns + np.float32(fraction / FRACTIONS - first)
    rows = rows - np.float32(first_row)
    return first, *cv2.convertMaps(columns, rows, cv2.CV_16SC2)


def _sample(canvas: np.ndarray, *maps: np.ndarray) -> np.ndarray:
    return cv2.remap(canvas, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


class City:
    """Reads a city: columns at once, pictures when asked for.

    Its folder may lie in an object store (see `remote`); `folder` is then the copy.
    Cheap to pickle and safe to fork: every process opens the records itself.
    """

    def __init__(self, folder: str | Path):
        self.folder = bring(folder, TABLES, DATASETS)
        self.header = read_header(self.folder)
        self.captures = read_captures(self.folder, self.header)
        stored = count_panoramas(self.folder)
        if stored != len(self):
            raise ValueError(
                f"{self.folder} holds {stored:g} panoramas but "
                f"{len(self)} poses in {CAPTURES}; {REBUILD}."
            )
        self._opened = (-1, None)

    def __len__(self) -> int:
        return len(self.captures)

    def __reduce__(self):
        return City, (self.folder,)

    def __repr__(self) -> str:
        return f"City({str(self.folder)!r}, {len(self)} captures)"

    @property
    def name(self) -> str:
        return self.header.name

    @functools.cached_property
    def provenance(self) -> Provenance:
        """Whose captures these are, by id, read when first asked for."""
        provenance = read_provenance(self.folder)
        if len(provenance) != len(self):
            raise ValueError(
                f"{self.folder} held {len(self)} captures when it was opened and holds "
                f"{len(provenance)} now; open it again."
            )
        return provenance

    @functools.cached_property
    def drive_edges(self) -> Int64[np.ndarray, " D"]:
        """Where drives begin, and the number of captures; workers need no index."""
        return drive_edges(self.captures.drive)

    @functools.cached_property
    def index(self) -> CaptureIndex:
        """The captures, findable by place."""
        columns = self.captures
        return index_captures(columns.ecef_from_camera, columns.drive, columns.time_s)

    def crops(
        self,
        captures: Int[np.ndarray, " n"],
        yaw_rad: Float64[np.ndarray, " n"],
        *,
        height: int,
        width: int,
        fov_deg: float,
        pitch_deg: float = 0.0,
    ) -> UInt8[np.ndarray, "n {height} {width} 3"]:
        """Crop perspective views, decoding only the tiles that they touch.

        Yaw turns right from the panorama's centre column, pitch up. The field of
        view is horizontal.
        """
        fov_rad, pitch_rad = float(np.deg2rad(fov_deg)), float(np.deg2rad(pitch_deg))
        view = (height, width, fov_rad, pitch_rad)
        crops = np.empty((len(captures), height, width, 3), np.uint8)
        for k, (capture, yaw) in enumerate(zip(captures, yaw_rad, strict=True)):
            crops[k] = self._crop(int(capture), float(yaw), *view)
        return crops

    def _crop(self, capture, yaw_rad, height, width, fov_rad, pitch_rad) -> np.ndarray:
        size, view = self.header.panorama_height, (height, width, fov_rad, pitch_rad)
        window = touched_tiles(
            size,
            yaw_rad,
            height=height,
            width=width,
            fov_rad=fov_rad,
            pitch_rad=pitch_rad,
        )
        centre = np.remainder(yaw_rad, 2 * np.pi) * size / np.pi + size - 0.5
        if window.whole:
            canvas = pad_panorama(self.panorama(capture))
            columns, rows = _base_maps(size, *view)
            columns = np.remainder(columns + np.float32(centre + 0.5), 2 * size) + 0.5
            return _sample(canvas, columns.astype(np.float32), rows + np.float32(1))
        row_edges, column_edges = tile_edges(size)
        canvas, first_row = self._canvas(capture, window), row_edges[window.row_start]
        centre -= window.column_start * column_edges[1]
        column, fraction = divmod(round(centre * FRACTIONS), FRACTIONS)
        first, *maps = _fixed_maps(size, view, first_row, fraction)
        if column + first >= 0:
            return _sample(canvas[:, column + first :], *maps)
        columns, rows = _base_maps(size, *view)  # a part of a column is missing
        columns, rows = columns + np.float32(centre), rows - np.float32(first_row)
        return _sample(canvas, columns, rows)

    def panorama(self, capture: int) -> UInt8[np.ndarray, "P W 3"]:
        """Decode one whole panorama."""
        rows, columns = TILE_ROWS, TILE_COLUMNS
        return self._canvas(capture, TileWindow(0, rows, 0, columns, True))

    def _canvas(self, capture: int, window: TileWindow) -> np.ndarray:
        """Decode the tiles of a window side by side."""
        if not 0 <= capture < len(self):
            raise ValueError(
                f"{self.folder} holds captures 0 to {len(self) - 1}, not {capture}."
            )
        edges, (_, tile_width, *_) = tile_edges(self.header.panorama_height)
        top, bottom = edges[window.row_start], edges[window.row_stop]
        canvas = np.empty((bottom - top, window.column_count * tile_width, 3), np.uint8)
        for row in range(window.row_start, window.row_stop):
            band = canvas[edges[row] - top : edges[row + 1] - top]
            for k in range(window.column_count):
                column = (window.column_start + k) % TILE_COLUMNS
                tile = self._tile(capture, row, column)
                band[:, k * tile_width : (k + 1) * tile_width] = tile
        return canvas

    def _tile(self, capture: int, row: int, column: int) -> np.ndarray:
        tile = row * TILE_COLUMNS + column
        edges, columns = tile_edges(self.header.panorama_height)
        expected = (edges[row + 1] - edges[row], columns[1], 3)
        try:
            jpeg = self._record(capture * TILES + tile)
            picture = simplejpeg.decode_jpeg(jpeg)
        except ValueError as error:
            cure = f"Restore tiles from a copy, or {REBUILD}"
            if origin_of(self.folder):
                cure = "Remove that folder: it is fetched anew"
            raise ValueError(
                f"{self.folder}: tile {tile} (row {row}, column {column}) of panorama "
                f"{capture} is not a readable JPEG: {error}. {cure}."
            ) from error
        if picture.shape != expected:
            raise ValueError(
                f"{self.folder}: tile {tile} of panorama {capture} is {picture.shape}, "
                f"expected {expected}; {REBUILD}."
            )
        return picture

    def _record(self, number: int) -> bytes:
        process, tiles = self._opened
        if process != os.getpid():
            process, tiles = self._opened = os.getpid(), Tiles(self.folder)
            # Crops are made in parallel by the loader; threads inside would compete.
            cv2.setNumThreads(1)
        return tiles[number]

    def check_pictures(self, count: int = 16) -> None:
        """Decode some whole panoramas over the city, to find damage before training."""
        for capture in np.unique(np.linspace(0, len(self) - 1, count).astype(int)):
            self.panorama(int(capture))
