"""Checkpoints of the published layouts, of any width, filled with random numbers.

Every tensor depends on its name alone, so that the same checkpoint can be written in
both layouts and types, tensor by tensor.
"""

import argparse
import dataclasses
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import torch

from cityrag_jax.checkpoint import abstract_model, describe, parameters
from cityrag_jax.checkpoint import stacked_parameters as stacked
from cityrag_jax.convert.files import write_checkpoint
from cityrag_jax.convert.names import (
    clip_names,
    transformer_names,
    vae_names,
)
from cityrag_jax.model.clip_vision import CLIPVision, CLIPVisionConfig
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import VAEConfig, WanVAE

DIT = DiTConfig(
    dim=48,
    num_heads=2,
    num_layers=2,
    ffn_dim=64,
    in_channels=36,
    freq_dim=32,
    text_dim=24,
    image_dim=80,
)
T2V = dataclasses.replace(DIT, in_channels=16, image_dim=None)
VAE = VAEConfig(
    base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)
)
CLIP = CLIPVisionConfig(
    image_size=28, patch_size=14, dim=80, num_heads=1, mlp_dim=32, num_layers=3
)
BRANCHES = ((TrajectoryEncoder, {"hidden": 12}), (GeoBranch, {}))
VAE_FILE = "Wan2.1_VAE.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def value(name: str, shape: tuple[int, ...], dtype="float32") -> np.ndarray:
    """Make the tensor of a name: float32 normals, as any type."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, np.float32).astype(np.dtype(dtype), copy=False)


def shapes(model_class, config, table, naming, branches=()) -> dict:
    """Give torch's names and shapes of a network."""
    model = abstract_model(describe(model_class, config, branches))
    layered = stacked(model)
    found = {}
    for ours, x in parameters(model).items():
        for layer in range(x.shape[0]) if ours in layered else [None]:
            shape = x.shape if layer is None else x.shape[1:]
            found |= table(ours).shapes(naming, shape, layer)
    return found


def dit_shapes(config, naming, branches=()):
    table = transformer_names([branch for branch, _ in branches])
    return shapes(WanDiT, config, table, naming, branches)


def vae_shapes(naming, config=VAE):
    return shapes(WanVAE, config, vae_names(config.num_res_blocks), naming)


def clip_shapes(naming):
    """With the last block, which is never read."""
    whole = dataclasses.replace(CLIP, num_layers=CLIP.num_layers + 1)
    return shapes(CLIPVision, whole, clip_names(CLIP.patch_size), naming)


def dit_json(config: DiTConfig, naming: str) -> dict:
    """Give what the published config.json holds, and no more."""
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
            "text_len": config.text_len,
        }
    return {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": config.head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
    }


def write_dit(folder, config=DIT, naming="official", dtype="float32", **kinds) -> None:
    """Write shards, index and config.json."""
    branches, limit = kinds.get("branches", ()), kinds.get("max_shard_bytes", 60_000)
    found = dit_shapes(config, naming, branches)
    write_checkpoint(
        folder,
        {n: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for n, shape in found.items()},
        lambda name: value(name, found[name], dtype),
        dit_json(config, naming),
        max_shard_bytes=limit,
    )


def write_safetensors(path, found, extra=()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = found | dict(extra)
    write_checkpoint(
        path,
        {n: jax.ShapeDtypeStruct(shape, np.float32) for n, shape in found.items()},
        lambda name: value(name, found[name]),
        {},
    )


def write_pickle(path, found, extra=()) -> None:
    found = found | dict(extra)
    torch.save({n: torch.from_numpy(value(n, s)) for n, s in found.items()}, path)


def write_official(folder: Path, config: DiTConfig = DIT, **kinds) -> Path:
    """Write the official repository's layout, without the text encoder."""
    write_dit(folder, config, "official", **kinds)
    write_pickle(folder / VAE_FILE, vae_shapes("official"))
    if config.image_dim is not None:
        unused = {"textual.a.weight": (3, 4), "log_scale": (1,)}
        unused |= {"visual.head": (80, 16), "visual.post_norm.weight": (80,)}
        write_pickle(folder / CLIP_FILE, clip_shapes("official"), unused)
    return folder


def write_diffusers(folder: Path, config: DiTConfig = DIT, **kinds) -> Path:
    """Write diffusers' layout of the same sizes, without the text encoder."""
    write_dit(folder / "transformer", config, "diffusers", **kinds)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    write_safetensors(vae, vae_shapes("diffusers"))
    (folder / "model_index.json").write_text("{}")
    if config.image_dim is not None:
        clip = folder / "image_encoder" / "model.safetensors"
        write_safetensors(clip, clip_shapes("diffusers"))
        settings = {"num_attention_heads": CLIP.num_heads}
        (clip.parent / "config.json").write_text(json.dumps(settings))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a large transformer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dim", type=int, default=5120)
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    sizes = dict(dim=given.dim, num_heads=given.dim // 128, ffn_dim=given.ffn)
    write_dit(
        given.folder,
        DiTConfig.i2v_14b(**sizes, num_layers=given.layers),
        dtype=given.dtype,
        max_shard_bytes=5 * 10**9,
    )
