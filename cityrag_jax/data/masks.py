"""Masks of what must not be recognised, and what is done with them (appendix G.1).

A mask is a grey picture, white where people and plates are, of any size: it covers
what its picture covers. Hidden parts become blocks of one colour, 4.5 degrees of a
panorama wide: a face or a plate is then a number or two, which no sharpening undoes.

Masks of a city's panoramas lie in its folder, level as they are: masks/ID.png, where an
id that ends like a picture's name ends in .png instead. They are used for whatever is
shown to people; what a model learns from is not changed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int, UInt8

from cityrag_jax.data.remote import fetch
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image
from cityrag_jax.geo.panorama import crop_angles

WHITE = 128
BLOCKS = 40  # along a panorama's height
GROWN = 0.004  # of a picture's height, around what is white


def read_mask(path: Path) -> Bool[np.ndarray, "h w"]:
    """Read a mask; ValueError if it is no picture."""
    return read_image(path).max(axis=-1) >= WHITE


def hide(
    picture: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "h w"],
    blocks: int = BLOCKS,
) -> UInt8[np.ndarray, "H W 3"]:
    """Give a picture in which the masked parts are coarse blocks."""
    height, width, _ = picture.shape
    if not mask.any():
        return picture
    size, kind = (width, height), cv2.INTER_AREA  # means: a single pixel counts
    white = cv2.resize(mask.astype(np.float32), size, interpolation=kind) > 0
    grown = 2 * max(1, round(GROWN * height)) + 1
    white = cv2.dilate(white.astype(np.uint8), np.ones((grown, grown), np.uint8)) > 0
    coarse = (max(1, blocks * width // height), blocks)
    small = cv2.resize(picture, coarse, interpolation=kind)
    large = cv2.resize(small, size, interpolation=cv2.INTER_NEAREST)
    return np.where(white[..., None], large, picture)


class Shown(NamedTuple):
    """How many of the captures that are shown are not anonymised, and how many of these
    have a mask."""

    not_anonymised: int = 0
    masked: int = 0

    def add(self, other: "Shown") -> "Shown":
        """Count other captures, too."""
        return Shown(*(a + b for a, b in zip(self, other, strict=True)))

    def describe(self) -> str:
        """Say what a person should know before pictures are passed on."""
        bare = self.not_anonymised - self.masked
        told = f"{self.not_anonymised} captures shown are not anonymised: "
        if not bare:
            return told + "people and plates are masked by masks/ of the city"
        covered = f"{self.masked} are masked, " if self.masked else ""
        return (
            f"{told}{covered}in {bare} people and plates can be recognised (put masks "
            "into masks/ of the city)"
        )


def mask_path(city: City, capture: int) -> Path:
    """Give where a capture's mask lies, if it has one."""
    name = Path(city.provenance.id[capture].as_py())
    pictures = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
    stem = name.stem if name.suffix.lower() in pictures else name.name
    return city.folder / "masks" / name.parent / f"{stem}.png"


def cover_views(
    city: City,
    captures: Int[np.ndarray, " n"],
    yaw_rad: Float64[np.ndarray, " n"],
    frames: UInt8[np.ndarray, "n H W 3"],
    fov_deg: float,
) -> tuple[UInt8[np.ndarray, "n H W 3"], Shown]:
    """Mask people and plates in views of a city that are to be shown.

    Views are those of `City.crops`. Captures that are anonymised stay as they are.
    """
    bare = [int(c) for c in np.unique(captures) if not city.captures.anonymised[c]]
    paths = {c: path for c in bare if (path := fetch(mask_path(city, c))).exists()}
    if paths:
        frames = frames.copy()
    masks: dict[int, np.ndarray] = {}
    for k, capture in enumerate(captures.tolist()):
        if capture in paths:
            if capture not in masks:
                masks = {capture: read_mask(paths[capture])}  # one at a time
            view = _look(masks[capture], float(yaw_rad[k]), frames[k].shape, fov_deg)
            frames[k] = hide(frames[k], view, _blocks(frames[k].shape, fov_deg))
    return frames, Shown(len(bare), len(paths))


def _blocks(shape: Sequence[int], fov_deg: float) -> int:
    """Give how many blocks as wide as a panorama's a view is high."""
    height, width, _ = shape
    down = 2 * np.arctan(np.tan(np.deg2rad(fov_deg) / 2) * height / width)
    return max(1, round(float(down) / np.pi * BLOCKS))


def _look(mask: np.ndarray, yaw_rad: float, shape: Sequence[int], fov_deg: float):
    """Give the part of a panorama's mask that a view shows."""
    height, width = mask.shape
    fov_rad = float(np.deg2rad(fov_deg))
    longitude, depression = crop_angles(shape[0], shape[1], fov_rad)
    columns = ((longitude + yaw_rad) / (2 * np.pi) + 0.5) * width
    rows = (depression / np.pi + 0.5) * height
    columns = np.floor(columns).astype(int) % width
    return mask[np.floor(rows).astype(int).clip(0, height - 1), columns]
