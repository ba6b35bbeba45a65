"""Masks of what must not be recognised, and what is done with them.

A mask is a grey picture, white where people and plates are, of any size: it covers
what its picture covers. Hidden parts become blocks of one colour, 4.5 degrees of a
panorama wide: a face or a plate is then a number or two, which no sharpening undoes.
"""

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from cityrag_jax.data.video import read_image

WHITE = 128
BLOCKS = 40  # along a panorama's height
GROWN = 0.004  # of a picture's height, around what is white


def read_mask(path: Path) -> Bool[np.ndarray, "h w"]:
    """Read a mask; ValueError if it is no picture."""
    return read_image(path).max(axis=-1) >= WHITE


def hide(
    picture: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Give a picture in which the masked parts are coarse blocks."""
    height, width, _ = picture.shape
    if not mask.any():
        return picture
    size, kind = (width, height), cv2.INTER_AREA  # means: a single pixel counts
    white = cv2.resize(mask.astype(np.float32), size, interpolation=kind) > 0
    grown = 2 * max(1, round(GROWN * height)) + 1
    white = cv2.dilate(white.astype(np.uint8), np.ones((grown, grown), np.uint8)) > 0
    coarse = (max(1, BLOCKS * width // height), BLOCKS)
    small = cv2.resize(picture, coarse, interpolation=kind)
    blocks = cv2.resize(small, size, interpolation=cv2.INTER_NEAREST)
    return np.where(white[..., None], blocks, picture)
