"""Write transformers as checkpoints that PyTorch opens, CityRAG's branches included.

Wan's own parameters get official or diffusers names, those of the branches the names
that `names.BRANCH_MODULES` and README.md give. One tensor is in memory at a time, and
a folder has its name only when it is whole.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from cityrag_jax.checkpoint import Arrays, latest_model
from cityrag_jax.checkpoint.bundles import write_texts
from cityrag_jax.convert.files import write_checkpoint
from cityrag_jax.convert.lora import write_lora
from cityrag_jax.convert.names import (
    NAMINGS,
    Layout,
    NameTable,
    dit_names,
    transformer_names,
)
from cityrag_jax.convert.stored import (
    StoredParameters,
    in_memory,
    merge_adapters,
    open_transformer,
)
from cityrag_jax.model.adapters import adapter_scales
from cityrag_jax.model.dit import WanDiT
from cityrag_jax.progress import Progress

NAME = "transformer"
BASE = "Wan transformer"
PARTS = {"geo branch": "geo.", "pose branch": "pose."}  # what the names begin with
SHARD_BYTES = 5 * 10**9
BLOCK = 128  # rows and columns that fit a core's cache
HEADER_BYTES = 2**22  # headers, index, config and prompt take less

Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """What an export holds of one network."""

    name: str
    tensors: int
    parameters: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a tensor comes from: our parameter, one layer of it, and the axes."""

    ours: str
    layer: int | None
    layout: Layout
    written: jax.ShapeDtypeStruct


def export_dit(
    model: WanDiT,
    path: str | Path,
    naming: str = "official",
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the base part of a transformer, in its own type, so that PyTorch opens it.

    Branches are left out, adapters merged. `naming` is "official" or "diffusers". A
    path ending in .safetensors becomes one file, else a folder with shards, index and
    config.json.
    """
    stored = merge_adapters(model, in_memory(model))
    sources = _plan(stored.arrays, dit_names(model.config.patch), naming)
    write_checkpoint(
        path,
        {name: source.written for name, source in sources.items()},
        _reader(stored, sources),
        _config(model, naming, sources),
        max_shard_bytes=max_shard_bytes,
    )


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    naming: str = "official",
    *,
    base_only: bool = False,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> list[Part]:
    """Write the transformer of a bundle or training workdir to a new folder.

    The folder holds shards, index, config.json and, unless `base_only`, the branches'
    tensors and the prompts' rows. Adapters are merged. `dtype` casts; None keeps the
    stored type, of int8 kernels float32.
    Raises ValueError, and leaves nothing behind, if `out` is in use, the disk is short,
    a parameter has no name in PyTorch or a value is not finite.
    """
    out = Path(out).absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another --out.")
    bundle = _open(checkpoint)
    model, stored = open_transformer(bundle, NAME)
    stored = merge_adapters(model, stored)
    table = dit_names(model.config.patch)
    if not base_only:
        table = transformer_names(model.branches, model.config.patch)
        _refuse_unnamed(stored, table)
    sources = _plan(stored.arrays, table, naming, dtype)
    parts = _summary(sources)
    total = sum(part.num_bytes for part in parts)
    _check_space(out, total)
    with _appearing(out) as folder:
        with _watched(_reader(stored, sources), total) as read:
            write_checkpoint(
                folder,
                {name: source.written for name, source in sources.items()},
                read,
                _config(model, naming, sources),
                max_shard_bytes=max_shard_bytes,
            )
        if not base_only:
            write_texts(folder, bundle.text, bundle.negative_text)
    return parts


def export_lora(checkpoint: str | Path, out: str | Path, naming: str) -> int:
    """Write the adapters of a checkpoint's transformer as one LoRA file.

    Gives how many linears it changes. Raises ValueError, and leaves nothing behind, if
    `out` exists or is no .safetensors, or there are no adapters of the base.
    """
    out = Path(out).absolute()
    if out.suffix != ".safetensors" or out.exists():
        raise ValueError(f"--out={out} must be a new file ending in .safetensors.")
    model, stored = open_transformer(_open(checkpoint), NAME)
    temporary = out.with_name(f".{out.name}.partial.safetensors")
    try:
        count = write_lora(stored, adapter_scales(model), temporary, naming)
        os.rename(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _open(checkpoint):
    bundle = latest_model(checkpoint)
    if NAME not in bundle.modules:
        raise ValueError(
            f"{checkpoint} holds {', '.join(sorted(bundle.modules)) or 'nothing'}, no "
            "transformer; give a bundle or the workdir of a transformer's training."
        )
    return bundle


def _plan(arrays: Arrays, table: NameTable, naming, dtype=None) -> dict[str, _Source]:
    """Map torch's names to their sources: what has no layer first, then by layer."""
    if naming not in NAMINGS:
        raise ValueError(f"naming is {naming!r}; choose one of {', '.join(NAMINGS)}.")
    sources = {}
    for ours, x in arrays.items():
        name = table(ours)
        if name is None:
            continue
        shape = x.shape[1:] if name.stacked else x.shape
        layout = name.layout
        written = jax.ShapeDtypeStruct(
            layout.torch_shape(shape), x.dtype if dtype is None else dtype
        )
        for layer in range(x.shape[0]) if name.stacked else [None]:
            theirs = name.name(naming, layer)
            assert theirs not in sources, f"two parameters are called {theirs}"
            sources[theirs] = _Source(ours, layer, layout, written)
    order = sorted(sources, key=lambda name: _place(sources[name].layer))
    return {name: sources[name] for name in order}


def _place(layer: int | None) -> int:
    return -1 if layer is None else layer


def _reader(stored: StoredParameters, sources: dict[str, _Source]) -> Read:
    """Give the function that makes the tensor of a name in torch's axes."""

    def read(name: str) -> np.ndarray:
        source = sources[name]
        x = source.layout.to_torch(stored.read(source.ours, source.layer))
        return _as_it_lies(x).astype(source.written.dtype, copy=False)

    return read


def _as_it_lies(x: np.ndarray) -> np.ndarray:
    """Copy a transposed matrix block by block: NumPy goes line by line, at a seventh
    of the speed."""
    if x.ndim != 2 or x.flags.c_contiguous:
        return x
    copy = np.empty(x.shape, x.dtype)
    for i in range(0, x.shape[0], BLOCK):
        for j in range(0, x.shape[1], BLOCK):
            place = np.s_[i : i + BLOCK, j : j + BLOCK]
            copy[place] = x[place]
    return copy


@contextmanager
def _watched(read: Read, total: int) -> Iterator[Read]:
    """Show how far reading is, and complain at the end of all NaN and Inf."""
    broken = []
    with Progress("exporting", total, "byte") as bar:

        def watched(name: str) -> np.ndarray:
            x = read(name)
            if not np.isfinite(x).all():
                broken.append(name)
            bar.update(x.nbytes)
            return x

        yield watched
    if broken:
        raise ValueError(
            f"{len(broken)} tensors hold NaN or Inf; export an earlier checkpoint, or "
            "as float32 if they are too large:\n  " + "\n  ".join(broken)
        )


def _refuse_unnamed(stored, table):
    unnamed = [name for name in stored.arrays if table(name) is None]
    if unnamed:
        raise ValueError(
            f"{len(unnamed)} parameters have no name in PyTorch; export with "
            "--base-only:\n  " + "\n  ".join(unnamed)
        )


def _check_space(out, needed):
    """Ask before writing; shards, index and config are little more than the tensors."""
    parent = next(p for p in out.parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if needed + HEADER_BYTES > free:
        raise ValueError(
            f"{out} needs {needed + HEADER_BYTES:,} bytes, the disk has {free:,}; "
            "free some, export as --dtype=bfloat16, or choose another disk."
        )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` if all goes well, else disappears."""
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _part(name: str) -> str:
    return next((part for part, start in PARTS.items() if name.startswith(start)), BASE)


def _summary(sources: dict[str, _Source]) -> list[Part]:
    """Count tensors, parameters and bytes of each part that is there."""
    parts = []
    for part in (BASE, *PARTS):
        written = [s.written for name, s in sources.items() if _part(name) == part]
        count = sum(math.prod(x.shape) for x in written)
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in written)
        if written:
            parts.append(Part(part, len(written), count, size))
    return parts


def _config(model: WanDiT, naming: str, sources: dict[str, _Source]) -> dict[str, Any]:
    """Give the config.json that the naming's own classes are built from.

    What stands under "_cityrag" is for readers of the branches: diffusers passes over
    keys with an underscore.
    """
    ours = {}
    if "geo.patch_embedding.weight" in sources:
        shape = sources["geo.patch_embedding.weight"].written.shape
        ours["geo"] = {"latent_channels": shape[1]}
    if "geo.views.conv.weight" in sources:
        width = sources["geo.views.conv.weight"].written.shape[0]
        ours["geo"]["view_poses"] = width
    if "pose.conv.weight" in sources:
        ours["pose"] = {"hidden": sources["pose.conv.weight"].written.shape[0]}
    config = _dit_config(model.config, naming)
    return config | ({"_cityrag": ours} if ours else {})


def _dit_config(config, naming):
    """Give the config.json that the naming's own classes are built from."""
    if naming == "official":
        return {
            "_class_name": "WanModel",
            "model_type": "t2v" if config.image_dim is None else "i2v",
            "dim": config.dim,
            "eps": config.eps,
            "ffn_dim": config.ffn_dim,
            "freq_dim": config.freq_dim,
            "in_dim": config.in_channels,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "out_dim": config.out_channels,
            "text_dim": config.text_dim,
            "text_len": config.text_len,
        }
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": [1, *config.patch],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
