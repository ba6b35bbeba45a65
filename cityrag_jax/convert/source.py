"""What a folder of Wan 2.1 weights is: layout, files, and the sizes of its networks.

Official: `config.json` and the transformer's shards beside the autoencoder and CLIP as
pickles (or, converted by others, as safetensors of the same name). Diffusers: a folder
for each network. A transformer's folder alone, as tools/export_wan.py writes it, serves
for the transformer. Sizes come from config.json and from the shapes of tensors.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from cityrag_jax.checkpoint.files import read_json
from cityrag_jax.convert.files import INDEX_SUFFIX, STEM, CheckpointReader
from cityrag_jax.model.clip_vision import CLIPVisionConfig
from cityrag_jax.model.dit import DiTConfig
from cityrag_jax.model.vae import WAN_LATENT_MEAN, VAEConfig

OFFICIAL_FILES = {
    "vae": "Wan2.1_VAE.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
DIFFUSERS_FOLDERS = {
    "transformer": "transformer",
    "vae": "vae",
    "clip": "image_encoder",
}
OFFICIAL_CLASS, DIFFUSERS_CLASS = "WanModel", "WanTransformer3DModel"
CLIP_HEAD_DIM = 80  # of ViT-H/14; the official files do not say

# config.json of the two layouts -> DiTConfig.
OFFICIAL_SIZES = {
    "dim": "dim",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
}
DIFFUSERS_SIZES = {
    "dim": "attention_head_dim",  # times the heads
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
}


# The first linears behind text and image features: their width in is in no config.json
# of the official layout.
TEXT_LINEAR = (
    "text_embedding.0.weight",
    "condition_embedder.text_embedder.linear_1.weight",
)
IMAGE_LINEAR = (
    "img_emb.proj.1.weight",
    "condition_embedder.image_embedder.ff.net.0.proj.weight",
)


@dataclasses.dataclass(frozen=True)
class WanFolder:
    """A folder of Wan weights; `weights` says where each network's should be."""

    path: Path
    layout: str
    config: Mapping[str, Any]
    weights: Mapping[str, Path]

    @property
    def takes_image(self) -> bool:
        """Say whether it is an image-to-video model, which needs CLIP."""
        if self.layout == "official":
            return self.config.get("model_type") == "i2v"
        return self.config.get("image_dim") is not None


def open_folder(path: Path | str) -> WanFolder:
    """Find out what a folder is; ValueError if it is something else."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give one of published Wan weights.")
    parts = {name: path / folder for name, folder in DIFFUSERS_FOLDERS.items()}
    if (parts["transformer"] / "config.json").is_file():
        config = _read_config(parts["transformer"] / "config.json")
        kinds = {DIFFUSERS_CLASS: "diffusers"}
    else:
        config = _read_config(path / "config.json")
        parts = {name: _published(path / file) for name, file in OFFICIAL_FILES.items()}
        parts["transformer"] = _shards(path)
        kinds = {OFFICIAL_CLASS: "official", DIFFUSERS_CLASS: "diffusers"}
    found = config.get("_class_name")
    if found not in kinds:
        raise ValueError(
            f"{path} holds no Wan 2.1 transformer: its class is {found}, not "
            f"{' or '.join(kinds)}. Give the folder of the published weights."
        )
    return WanFolder(path, kinds[found], config, parts)


def read_dit_config(
    folder: WanFolder, reader: CheckpointReader, dtype: DTypeLike
) -> DiTConfig:
    """Give the transformer's sizes; `dtype` is that of its stored parameters."""
    keys = OFFICIAL_SIZES if folder.layout == "official" else DIFFUSERS_SIZES
    wrong = [
        key for key in keys.values() if not isinstance(folder.config.get(key), int)
    ]
    if wrong:
        raise ValueError(
            f"The transformer's config.json gives no number for {', '.join(wrong)}; "
            "take the published file."
        )
    sizes = {ours: folder.config[theirs] for ours, theirs in keys.items()}
    if folder.layout == "diffusers":
        sizes["dim"] *= sizes["num_heads"]
    return DiTConfig(
        **sizes,
        text_dim=_width_in(reader, TEXT_LINEAR),
        text_len=folder.config.get("text_len", 512),
        image_dim=_width_in(reader, IMAGE_LINEAR) if folder.takes_image else None,
        eps=folder.config.get("eps", 1e-6),
        dtype=jnp.bfloat16,
        param_dtype=dtype,
    )


def read_vae_config(reader: CheckpointReader, dtype: DTypeLike) -> VAEConfig:
    """Give the autoencoder's sizes by its encoder's shapes; statistics are Wan's."""
    found = {}
    for name in reader.names():
        if match := re.fullmatch(
            r"encoder\.(?:downsamples|down_blocks)\.(\d+)\."
            r"(?:residual\.6|conv2|resample\.1|time_conv)\.weight",
            name,
        ):
            kind = (
                "narrow" if "resample" in name else "time" if "time" in name else "wide"
            )
            found[int(match[1]), kind] = reader.shape(name)[0]
    first = next(
        (
            n
            for n in ("encoder.conv1.weight", "encoder.conv_in.weight")
            if n in reader.names()
        ),
        None,
    )
    last = (
        "conv2.weight" if first == "encoder.conv1.weight" else "post_quant_conv.weight"
    )
    halvings = sorted(index for index, kind in found if kind == "narrow")
    if first is None or last not in reader.names() or not halvings:
        raise ValueError(
            f"{reader.path} is no Wan autoencoder: it lacks the encoder's first "
            "convolution, its downsamplings or the decoder's first; take the published "
            "file."
        )
    base, z_dim = reader.shape(first)[0], reader.shape(last)[0]
    if z_dim != len(WAN_LATENT_MEAN):
        raise ValueError(
            f"{reader.path} has {z_dim} latent channels, Wan's autoencoder has "
            f"{len(WAN_LATENT_MEAN)}; its latents' statistics are known alone."
        )
    ends = [*(index - 1 for index in halvings), max(i for i, k in found if k == "wide")]
    return VAEConfig(
        base_dim=base,
        z_dim=z_dim,
        dim_mult=tuple(found.get((end, "wide"), base) // base for end in ends),
        num_res_blocks=halvings[0],
        temporal_downsample=tuple((index, "time") in found for index in halvings),
        dtype=jnp.bfloat16,
        param_dtype=dtype,
    )


def read_clip_config(
    folder: WanFolder, reader: CheckpointReader, dtype: DTypeLike
) -> CLIPVisionConfig:
    """Give CLIP's sizes by its shapes; the official layout's heads are 80 wide."""
    bare = any(name.startswith("embeddings.") for name in reader.names())
    vision = "" if bare else "vision_model."
    names = {
        "official": (
            "visual.patch_embedding.weight",
            "visual.pos_embedding",
            "visual.transformer.{i}.mlp.0.weight",
        ),
        "diffusers": (
            f"{vision}embeddings.patch_embedding.weight",
            f"{vision}embeddings.position_embedding.weight",
            f"{vision}encoder.layers.{{i}}.mlp.fc1.weight",
        ),
    }
    for patches, positions, mlp in names.values():
        if {patches, positions, mlp.format(i=0)} <= reader.names():
            break
    else:
        raise ValueError(
            f"{reader.path} is no CLIP with an image tower: it lacks {patches} or its "
            "like; take the published file."
        )
    dim, _, patch_size, _ = reader.shape(patches)
    side = round((reader.shape(positions)[-2] - 1) ** 0.5)
    layers = 0
    while mlp.format(i=layers) in reader.names():
        layers += 1
    heads = dim // CLIP_HEAD_DIM
    config = folder.weights["clip"] / "config.json"
    if config.is_file():
        settings = _read_config(config)
        heads = settings.get("vision_config", settings).get(
            "num_attention_heads", heads
        )
    return CLIPVisionConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        dim=dim,
        num_heads=heads,
        mlp_dim=reader.shape(mlp.format(i=0))[0],
        num_layers=layers,
        dtype=jnp.bfloat16,
        param_dtype=dtype,
    )


def _width_in(reader, names):
    """Give the second axis of whichever linear is there."""
    for name in names:
        if name in reader.names():
            return reader.shape(name)[1]
    raise ValueError(
        f"{reader.path} lacks {' or '.join(names)}, whose width is in no config.json; "
        "take the published files."
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} is something else than published Wan weights: it has no "
            f"{path.name}. Give the folder as it was fetched."
        )
    return read_json(path)


def _shards(path: Path) -> Path:
    """Find the transformer among other networks' files."""
    for name in (f"{STEM}{INDEX_SUFFIX}", f"{STEM}.safetensors"):
        if (path / name).is_file():
            return path / name
    return path


def _published(path: Path) -> Path:
    """Take a safetensors file of the same name where there is no pickle."""
    other = path.with_suffix(".safetensors")
    return other if not path.exists() and other.exists() else path
