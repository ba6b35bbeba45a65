"""PyTorch checkpoints on disk, read and written one tensor at a time.

A checkpoint is a single file, or a folder with shards, the index that says which shard
holds which tensor, and `config.json`; the layout of huggingface/diffusers. Pickles are
read through torch, mapped into memory, as `weights_only`.
"""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from cityrag_jax.files import named, write_whole

STEM = "diffusion_pytorch_model"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".bin")
WRITTEN_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
READ_TYPES = {theirs: ours for ours, theirs in WRITTEN_TYPES.items()}


class CheckpointReader:
    """Names, shapes, types and tensors of a checkpoint, without reading it whole.

    `path` is a safetensors file, an index file, a folder that holds either, or a pickle
    (`.pth`, `.pt`, `.bin`), which needs torch. Raises one ValueError that names every
    file that is missing or cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[Path, _Safetensors | _Pickle] = {}
        self._file_of: dict[str, Path] = {}
        problems = []
        for file in _locate(self.path):
            if not file.is_file():
                problems.append(f"{file} is missing; fetch it.")
                continue
            try:
                kind = _Pickle if file.suffix in PICKLES else _Safetensors
                self._files[file] = kind(file)
            except ValueError as error:
                problems.append(str(error))
                continue
            self._file_of |= dict.fromkeys(self._files[file].names(), file)
        if problems:
            raise ValueError("\n".join(problems))

    def names(self) -> set[str]:
        """Give the names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape without reading it."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> str:
        """Give a tensor's type without reading it, by NumPy's name if it has one."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in the type it is stored in; it may be a view of the file."""
        return self._file(name).read(name)

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Read some rows of a tensor, not the rest."""
        return self._file(name).read_rows(name, rows)

    def _file(self, name):
        return self._files[self._file_of[name]]


class _Safetensors:
    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="numpy")
        except Exception as error:  # the library has an error class of its own
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}); fetch it again, "
                "or if it is a pickle, name it .pth."
            ) from error

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        kind = self._file.get_slice(name).get_dtype()
        return READ_TYPES.get(kind, kind)

    def read(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        stored = self._file.get_slice(name)
        return np.concatenate([stored[row : row + 1] for row in map(int, rows)])


class _Pickle:
    """A torch file, mapped into memory; whatever is not a tensor by name is refused.

    Nothing else in this package unpickles, and `weights_only` runs no code.
    """

    def __init__(self, path: Path):
        try:
            import torch
        except ImportError as error:
            raise ValueError(
                f"{path} is a pickle, which only torch reads; install it with "
                "`pip install 'cityrag-jax[torch]'`."
            ) from error
        self._tensors = _unpickle(path, torch)
        odd = [
            str(name)
            for name, value in self._tensors.items()
            if not (isinstance(name, str) and isinstance(value, torch.Tensor))
        ]
        if odd:
            raise ValueError(
                f"{path} holds other things than tensors by name ({', '.join(odd[:3])}"
                f"{', ...' if len(odd) > 3 else ''}); save a plain state dict."
            )

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> np.ndarray:
        return self._to_numpy(self._tensors[name])

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        tensor = self._tensors[name]
        parts = [self._to_numpy(tensor[row : row + 1]) for row in map(int, rows)]
        return np.concatenate(parts)

    def _to_numpy(self, tensor):
        import torch

        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _unpickle(path, torch):
    options = dict(map_location="cpu", weights_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused anyway
            # Only the zip format of torch 1.6 and later can be mapped.
            return dict(torch.load(path, mmap=zipfile.is_zipfile(path), **options))
    except pickle.UnpicklingError as error:
        # What torch writes around it advises to run the code.
        reason = " ".join(str(error).split()).partition("WeightsUnpickler error: ")[2]
        raise ValueError(
            f"{path} is refused: it is damaged or carries more than tensors, such as "
            f"code to run ({reason[:80]}). None was run; take the published file."
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is not a whole torch file ({reason}); fetch it again."
        ) from error


def _locate(path):
    """List the files of a checkpoint; of a folder, its index decides."""
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
        return _indexed(path)
    return [path]


def _indexed(path):
    try:
        shards = set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has no weight_map; give a {INDEX_SUFFIX} file."
        ) from error
    outside = sorted(repr(name) for name in shards if not _is_file_name(name))
    if outside:
        raise ValueError(
            f"{path} names {outside[0]}, which is outside its folder; only files "
            "beside the index are read."
        )
    return sorted(path.parent / name for name in shards)


def _is_file_name(name: Any) -> bool:
    """Say whether a name from a file is that of a file beside it, on any system."""
    return (
        isinstance(name, str)
        and not set(name) & set("/\\:\0")
        and name not in ("", ".", "..", "~")
    )


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
    write_whole(path / "config.json", json.dumps(config, indent=2) + "\n")
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
        write_whole(path / f"{STEM}{INDEX_SUFFIX}", text)


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
    with named(path), open(path, "wb") as file:
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
