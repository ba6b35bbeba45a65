"""Safetensors checkpoints on disk, read and written one tensor at a time.

A checkpoint is a single file, or a folder with shards, the index that says which shard
holds which tensor, and `config.json`; the layout of huggingface/diffusers.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives NumPy its bfloat16)
import numpy as np
from safetensors import safe_open

STEM = "diffusion_pytorch_model"
INDEX_SUFFIX = ".safetensors.index.json"
WRITTEN_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class CheckpointReader:
    """Names, shapes and tensors of a checkpoint, without reading it whole.

    `path` is a safetensors file, an index file, or a folder that holds either.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files = {}
        self._file_of = {}
        for file in _locate(self.path):
            if not file.is_file():
                raise ValueError(
                    f"{self.path} needs {file}, which is missing; fetch it."
                )
            try:
                self._files[file] = safe_open(file, framework="numpy")
            except Exception as error:
                raise ValueError(
                    f"{file} is not a readable safetensors file ({error}); "
                    "fetch it again, or convert a pickle to safetensors."
                ) from error
            self._file_of |= dict.fromkeys(self._files[file].keys(), file)

    def names(self) -> set[str]:
        """Give the names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape without reading it."""
        file = self._files[self._file_of[name]]
        return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in the type it is stored in."""
        return self._files[self._file_of[name]].get_tensor(name)


def _locate(path):
    """List the safetensors files of a checkpoint; of a folder, its index decides."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a file, a folder or an index.")
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        found = indices or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(
                f"{path} should hold one shard index or one safetensors file, it has "
                f"{names}; give the path of the file or of the index itself."
            )
        path = found[0]
    if path.name.endswith(".json"):
        index = json.loads(path.read_text())
        if "weight_map" not in index:
            raise ValueError(f"{path} has no weight_map; give a {INDEX_SUFFIX} file.")
        return sorted({path.parent / file for file in index["weight_map"].values()})
    return [path]


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors, asking `read` for each when its turn comes: one is in memory.

    A path ending in .safetensors becomes one file, with the config in its metadata;
    else a folder of shards with index and config.json. The index is written last: a
    folder without it is an unfinished export. Raises ValueError if the folder holds
    a checkpoint already.
    """
    path = Path(path)
    metadata = {"format": "pt"}
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata["config"] = json.dumps(config)
        return _write_file(path, tensors, read, metadata)
    path.mkdir(parents=True, exist_ok=True)
    old = sorted([*path.glob("*.safetensors"), *path.glob(f"*{INDEX_SUFFIX}")])
    if old:
        raise ValueError(
            f"{path} already holds a checkpoint ({old[0].name}); choose an empty "
            "folder or delete the old one."
        )
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards = _plan_shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        count = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = path / f"{STEM}{count}.safetensors"
        _write_file(file, shard, read, metadata)
        weight_map |= dict.fromkeys(shard, file.name)
    total = sum(_num_bytes(tensor) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if len(shards) > 1:
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (path / f"{STEM}{INDEX_SUFFIX}").write_text(text)


def _write_file(path, tensors, read, metadata):
    """Write header and tensors one after the other; safetensors' own writer wants all.

    Wide types come first, so that every tensor is aligned to its type.
    """
    names = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        begin, end = end, end + _num_bytes(tensors[name])
        header[name] = {
            "dtype": WRITTEN_TYPES[np.dtype(tensors[name].dtype).name],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = np.ascontiguousarray(read(name))
            wanted = tensors[name]
            assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype), name
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _plan_shards(tensors, max_shard_bytes):
    """Cut the tensors, in order, into shards no larger than the limit if possible."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _num_bytes(tensor) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += _num_bytes(tensor)
    return shards


def _num_bytes(tensor):
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
