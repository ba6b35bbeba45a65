"""Checksums of arrays, and comparisons that report everything at once.

Orbax has no checksum over array data: of twelve flipped bits twelve were restored
silently. Hence our own of every array, of two kinds. A crc32 is made of its bytes, by a
process that has them all. A sum is made on the devices, of every number mixed with its
place: any order of adding gives the same, so that each device adds up its own shards,
for any mesh, and nothing but the sum travels. Either finds every single flipped bit. A
sum is stored with `SUM` added, which no crc32 reaches.

Whatever reads weights compares them, unless it is told to `trust` the disks.
"""

import functools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, UInt32

from cityrag_jax.checkpoint.descriptions import Arrays

SUM = 2**32
TRUST = "do not compare weights with their digests while they are read"
_trusting = False


def trust(trusting: bool = True) -> None:
    """Read weights from now on without comparing them with their digests, or not so."""
    global _trusting
    _trusting = trusting


def trusted() -> bool:
    """Say whether weights are read without comparing them."""
    return _trusting


def digest_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Give crc32 where this process has all arrays, else their sums."""
    if not all(x.is_fully_addressable for x in arrays.values()):
        return sum_arrays(arrays)
    return crc32_arrays(arrays)


def crc32_arrays(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Give the crc32 of arrays, several at a time where this process has them all."""
    if not all(getattr(x, "is_fully_addressable", True) for x in arrays.values()):
        return {name: crc32(x) for name, x in arrays.items()}  # all processes as one
    with ThreadPoolExecutor() as pool:
        return dict(zip(arrays, pool.map(crc32, arrays.values()), strict=True))


def digest_json(document: Mapping[str, Any]) -> int:
    """Give the crc32 of a JSON object, whatever the spaces between its words."""
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def sum_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Give the sums of arrays, each device's part made by itself.

    Only the parts travel, all at once, and are added on the host.
    """
    made = {name: _summing(x.sharding)(x) for name, x in arrays.items()}
    parts = {
        name: sum(
            int(np.asarray(part.data).sum())
            for part in x.addressable_shards
            if part.replica_id == 0
        )
        % SUM
        for name, x in made.items()
    }
    totals = np.array(list(parts.values()), np.uint32)
    if jax.process_count() > 1:
        everyones = multihost_utils.process_allgather(totals)
        totals = everyones.sum(axis=0, dtype=np.uint32)
    return {name: SUM + int(x) for name, x in zip(parts, totals, strict=True)}


def crc32(x: Any) -> int:
    """Give the crc32 of an array's bytes, gathered where no process has them all."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    flat = np.ascontiguousarray(jax.device_get(x)).reshape(-1)
    return zlib.crc32(flat.view(np.uint8).data)


@functools.cache
def _summing(sharding: Sharding):
    """Jit an array's sum: on a mesh, one part from each device, in a row."""
    if not isinstance(sharding, NamedSharding):
        return jax.jit(lambda x: part_sum(x, x.shape, (0,) * x.ndim))
    mesh = sharding.mesh

    def sums(x):
        spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
        used = {n for names in spec for n in _as_tuple(names)}
        others = tuple(n for n in mesh.axis_names if n not in used)

        def local(part):
            starts = [
                jax.lax.axis_index(_as_tuple(names)) * size if names else 0
                for names, size in zip(spec, part.shape, strict=True)
            ]
            made = part_sum(part, x.shape, starts)
            if others:  # of replicas, one counts
                made = jnp.where(jax.lax.axis_index(others) == 0, made, 0)
            return made[None]

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=PartitionSpec(*spec),
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )(x)

    return jax.jit(sums)


def part_sum(
    part: Array, shape: tuple[int, ...], starts: Sequence[Array | int]
) -> UInt32[Array, ""]:
    """Add up every number's bits mixed with its place, modulo 2^32.

    `part` begins at `starts` of an array of `shape`.
    """
    place = jnp.zeros(part.shape, jnp.uint32)
    for axis, (size, start) in enumerate(zip(shape, starts, strict=True)):
        along = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis)
        place = place * np.uint32(size) + along + jnp.uint32(start)
    bits = jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}")
    mixed = _mix(bits.astype(jnp.uint32) + _mix(place))
    return mixed.sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "*any"]) -> UInt32[Array, "*any"]:
    """Scatter the bits, one to one: the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


class Damaged(ValueError):
    """What lies on the disk is not what was written."""


def check_digests(arrays: Arrays, digests: Mapping[str, int], path: Path) -> None:
    """Raise `Damaged` with the arrays whose checksum differs from the stored one."""
    raise_damaged(broken_arrays(arrays, digests), len(arrays), path)


def broken_arrays(
    arrays: Arrays, digests: Mapping[str, int], prefix: str = ""
) -> list[str]:
    """Name the arrays whose checksum differs from the stored one, of either kind."""
    found = sum_arrays({n: x for n, x in arrays.items() if digests.get(n, 0) >= SUM})
    found |= crc32_arrays({n: x for n, x in arrays.items() if n not in found})
    return [f"{prefix}{n}" for n in arrays if found[n] != digests.get(n)]


def raise_damaged(broken: list[str], count: int, path: Path) -> None:
    """Raise `Damaged` if any of `count` arrays is broken."""
    if broken:
        raise Damaged(
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


def unreadable(path: Path, error: Exception) -> Damaged:
    """Say that Orbax or tensorstore could not read a folder, with their first line."""
    return Damaged(
        f"{path} is damaged and cannot be read ({first_line(error)}). Delete this "
        "folder and take an older checkpoint or another copy."
    )


def first_line(error: Exception) -> str:
    """Give the first line of an error's text, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
