"""Checksums of arrays, and comparisons that report everything at once.

Orbax has no checksum over array data: of twelve flipped bits twelve were restored
silently. Hence our own crc32 of every array.
"""

import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cityrag_jax.checkpoint.descriptions import Arrays


def digest_arrays(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Give the crc32 of every array, some at a time where one process has them all."""
    if jax.process_count() > 1:
        return {name: crc32(x) for name, x in arrays.items()}
    with ThreadPoolExecutor() as pool:
        return dict(zip(arrays, pool.map(crc32, arrays.values()), strict=True))


def crc32(x: Any) -> int:
    """Give the crc32 of an array's bytes, gathered from all processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    flat = np.ascontiguousarray(jax.device_get(x)).reshape(-1)
    return zlib.crc32(flat.view(np.uint8).data)


def check_digests(arrays: Arrays, digests: Mapping[str, int], path: Path) -> None:
    """Raise ValueError with the arrays whose checksum differs from the stored one."""
    raise_damaged(broken_arrays(arrays, digests), len(arrays), path)


def broken_arrays(
    arrays: Arrays, digests: Mapping[str, int], prefix: str = ""
) -> list[str]:
    """Name the arrays whose checksum differs from the stored one."""
    return [f"{prefix}{n}" for n, x in arrays.items() if crc32(x) != digests.get(n)]


def raise_damaged(broken: list[str], count: int, path: Path) -> None:
    """Raise ValueError if any of `count` arrays is broken."""
    if broken:
        raise ValueError(
            f"{path} is damaged: the checksum of {len(broken)} of {count} arrays "
            f"differs from the one stored ({_some(broken)}). Delete this folder and "
            "take an older checkpoint or another copy."
        )


def compare_names(wanted: Arrays, stored: Mapping[str, Any], path: Path) -> None:
    """Raise once with every name and shape that differs."""
    lines = [f"missing in the checkpoint: {n}" for n in wanted if n not in stored]
    lines += [f"unknown to the model: {n}" for n in stored if n not in wanted]
    lines += [
        f"{n}: stored {tuple(stored[n].shape)}, the model has {tuple(x.shape)}"
        for n, x in wanted.items()
        if n in stored and tuple(stored[n].shape) != tuple(x.shape)
    ]
    # One line stands for all layers of a stack.
    lines = list(dict.fromkeys(re.sub(r"@\d+", "", line) for line in lines))
    if lines:
        shown = "\n  ".join(lines[:40] + ["..."] * (len(lines) > 40))
        raise ValueError(
            f"{path} does not fit the model ({len(lines)} differences):\n  {shown}\n"
            "Use the config that it was made with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def unreadable(path: Path, error: Exception) -> ValueError:
    """Say that Orbax or tensorstore could not read a folder, with their first line."""
    return ValueError(
        f"{path} is damaged and cannot be read ({first_line(error)}). Delete this "
        "folder and take an older checkpoint or another copy."
    )


def first_line(error: Exception) -> str:
    """Give the first line of an error's text, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
