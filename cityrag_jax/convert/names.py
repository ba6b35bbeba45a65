"""What PyTorch calls our parameters, and how it lays them out: one table a network.

Every table maps a module's path in ours to its (official, diffusers) names; `{i}` is
the layer of a stacked module. Layouts are pairs of einops patterns, torch's and ours,
so that each works in both directions.

Source: the state dicts of Wan-Video/Wan2.1 and huggingface/diffusers 0.42.1.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from cityrag_jax.batch import PATCH, TIME_STRIDE
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder

NAMINGS = ("official", "diffusers")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor's axes in torch and in ours, as einops patterns."""

    torch: str
    ours: str
    sizes: tuple[tuple[str, int], ...] = ()

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Bring a torch tensor to our axes."""
        return rearrange(tensor, f"{self.torch} -> {self.ours}", **dict(self.sizes))

    def to_torch(self, tensor: np.ndarray) -> np.ndarray:
        """Bring our tensor to torch's axes."""
        return rearrange(tensor, f"{self.ours} -> {self.torch}", **dict(self.sizes))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give torch's shape of our tensor of this shape, without allocating it."""
        return self.to_torch(np.broadcast_to(np.zeros((), np.int8), shape)).shape


@dataclasses.dataclass(frozen=True)
class TorchName:
    """A parameter's name in both namings, and its layout."""

    official: str
    diffusers: str
    layout: Layout

    def name(self, naming: str, layer: int | None = None) -> str:
        """Give the name in a naming, for one layer of a stacked parameter."""
        name = {"official": self.official, "diffusers": self.diffusers}[naming]
        return name if layer is None else name.replace("{i}", str(layer))

    @property
    def stacked(self) -> bool:
        """Say whether our parameter has a leading layer axis."""
        return "{i}" in self.official


NameTable = Callable[[str], TorchName | None]

VECTOR = Layout("D", "D")
LINEAR = Layout("o i", "i o")
MODULATION = Layout("1 S D", "S D")
# Tokens flatten a patch channel-major; only time, of length 1, has nothing to flatten.
PATCHES = Layout("D C 1 p q", "(C p q) D", (("p", PATCH), ("q", PATCH)))
CONV_3D = Layout("o i t y x", "t y x i o")
CONV_2D = Layout("o i y x", "1 y x i o")
# A convolution over whole groups of frames: ours flattens a group frame by frame.
FRAME_GROUPS = Layout("o i k", "(k i) o", (("k", TIME_STRIDE),))


def _dit_modules():
    """List the transformer's modules as (ours, official, diffusers)."""
    embedder = "condition_embedder"
    yield "patch_embedding", "patch_embedding", "patch_embedding"
    for kind in "text", "time":
        theirs = f"{embedder}.{kind}_embedder.linear_"
        yield f"{kind}_embedding.fc1", f"{kind}_embedding.0", f"{theirs}1"
        yield f"{kind}_embedding.fc2", f"{kind}_embedding.2", f"{theirs}2"
    yield "time_projection", "time_projection.1", f"{embedder}.time_proj"
    image = f"{embedder}.image_embedder"
    yield "image_embedding.norm1", "img_emb.proj.0", f"{image}.norm1"
    yield "image_embedding.mlp.fc1", "img_emb.proj.1", f"{image}.ff.net.0.proj"
    yield "image_embedding.mlp.fc2", "img_emb.proj.3", f"{image}.ff.net.2"
    yield "image_embedding.norm2", "img_emb.proj.4", f"{image}.norm2"
    for ours, official, diffusers in (
        ("self_attention", "self_attn", "attn1"),
        ("cross_attention", "cross_attn", "attn2"),
    ):
        ours, official = f"blocks.{ours}", f"blocks.{{i}}.{official}"
        diffusers = f"blocks.{{i}}.{diffusers}"
        for part in "qkv":
            yield f"{ours}.{part}", f"{official}.{part}", f"{diffusers}.to_{part}"
        yield f"{ours}.o", f"{official}.o", f"{diffusers}.to_out.0"
        for norm in "norm_q", "norm_k":
            yield f"{ours}.{norm}", f"{official}.{norm}", f"{diffusers}.{norm}"
    for part, theirs in (
        ("k_img", "add_k_proj"),
        ("v_img", "add_v_proj"),
        ("norm_k_img", "norm_added_k"),
    ):
        official, diffusers = f"blocks.{{i}}.cross_attn.{part}", "blocks.{i}.attn2"
        yield f"blocks.cross_attention.{part}", official, f"{diffusers}.{theirs}"
    yield "blocks.cross_norm", "blocks.{i}.norm3", "blocks.{i}.norm2"
    yield "blocks.ffn.fc1", "blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"
    yield "blocks.ffn.fc2", "blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"
    yield "head.linear", "head.head", "proj_out"


DIT_MODULES = {ours: names for ours, *names in _dit_modules()}
DIT_MODULATIONS = {
    "blocks.modulation": ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    "head.modulation": ("head.modulation", "scale_shift_table"),
}
# Published diffusers checkpoints may hold these; nothing reads them.
DIT_IGNORED = ("norm_added_q.weight",)


def dit_name(path: str) -> TorchName | None:
    """Name a parameter of `WanDiT`; None if Wan has no such parameter (branches)."""
    if path in DIT_MODULATIONS:
        return TorchName(*DIT_MODULATIONS[path], MODULATION)
    module, _, leaf = path.rpartition(".")
    if module not in DIT_MODULES:
        return None
    layout = LINEAR if leaf == "kernel" else VECTOR
    layout = PATCHES if path == "patch_embedding.kernel" else layout
    leaf = "bias" if leaf == "bias" else "weight"
    official, diffusers = DIT_MODULES[module]
    return TorchName(f"{official}.{leaf}", f"{diffusers}.{leaf}", layout)


def _geo_modules():
    """List the geo branch's modules as (ours, theirs)."""
    yield "patch_embedding", "geo.patch_embedding"
    yield "layers.norm", "geo.blocks.{i}.norm"
    for part in ("q", "k", "v", "o", "norm_q", "norm_k"):
        yield f"layers.attention.{part}", f"geo.blocks.{{i}}.attn.{part}"


# CityRAG has no PyTorch original: these names are ours, the same in both namings.
BRANCH_MODULES = {
    GeoBranch: dict(_geo_modules()),
    TrajectoryEncoder: {
        "conv": "pose.conv",
        "mlp.fc1": "pose.mlp.0",
        "mlp.fc2": "pose.mlp.2",
        "projection": "pose.out.{i}",
    },
}
BRANCH_CONVOLUTIONS = {
    "geo.patch_embedding.weight": PATCHES,
    "pose.conv.weight": FRAME_GROUPS,
}


def branch_names(branches: Sequence[Any]) -> NameTable:
    """Give the table of a `WanDiT`'s `branches.*`, from its branches or their classes.

    None for all other parameters, and for those of branches that are not CityRAG's.
    """
    classes = [b if isinstance(b, type) else type(b) for b in branches]

    def name(path: str) -> TorchName | None:
        first, _, rest = path.partition(".")
        if first != "branches":
            return None
        index, _, rest = rest.partition(".")
        module, _, leaf = rest.rpartition(".")
        theirs = BRANCH_MODULES.get(classes[int(index)], {}).get(module)
        if theirs is None:
            return None
        theirs = f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}"
        layout = LINEAR if leaf == "kernel" else VECTOR
        layout = BRANCH_CONVOLUTIONS.get(theirs, layout)
        return TorchName(theirs, theirs, layout)

    return name


def transformer_names(branches: Sequence[Any] = ()) -> NameTable:
    """Give the table of a whole `WanDiT`: Wan's own parameters and its branches'."""
    of_branches = branch_names(branches)

    def name(path: str) -> TorchName | None:
        return dit_name(path) or of_branches(path)

    return name


# Parts of a residual block, of a resampling layer and of an attention block.
VAE_PARTS = {
    "norm1": ("residual.0", "norm1"),
    "conv1": ("residual.2", "conv1"),
    "norm2": ("residual.3", "norm2"),
    "conv2": ("residual.6", "conv2"),
    "shortcut": ("shortcut", "conv_shortcut"),
    "conv": ("resample.1", "resample.1"),
    "time_conv": ("time_conv", "time_conv"),
    "norm": ("norm", "norm"),
    "to_qkv": ("to_qkv", "to_qkv"),
    "proj": ("proj", "proj"),
}
VAE_ENDS = {
    "conv_in": ("conv1", "conv_in"),
    "norm_out": ("head.0", "norm_out"),
    "conv_out": ("head.2", "conv_out"),
}
VAE_OUTER = {
    "quant_conv": ("conv1", "quant_conv"),
    "post_quant_conv": ("conv2", "post_quant_conv"),
}
VAE_MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
# Convolutions that are 2-D in torch; all others are 3-D there.
VAE_2D = ("conv", "to_qkv", "proj")


def vae_names(num_res_blocks: int) -> NameTable:
    """Give the table of `WanVAE`, whose decoder is grouped in levels by diffusers."""

    def name(path: str) -> TorchName | None:
        *modules, leaf = path.split(".")
        official, diffusers = _vae_module(modules, num_res_blocks + 2)
        layout, official_leaf = VECTOR, leaf
        if leaf == "kernel":
            layout = CONV_2D if modules[-1] in VAE_2D else CONV_3D
            official_leaf = "weight"
        if leaf == "scale":
            ones = "1 1" if modules[-1] == "norm" else "1 1 1"
            layout, official_leaf = Layout(f"C {ones}", "C"), "gamma"
        return TorchName(
            f"{official}.{official_leaf}", f"{diffusers}.{official_leaf}", layout
        )

    return name


def _vae_module(modules, layers_per_level):
    if len(modules) == 1:
        return VAE_OUTER[modules[0]]
    half, kind, *rest = modules
    if kind in VAE_ENDS:
        official, diffusers = VAE_ENDS[kind]
        return f"{half}.{official}", f"{half}.{diffusers}"
    index, part = int(rest[0]), rest[1]
    if kind == "middle":
        official, diffusers = f"middle.{index}", VAE_MIDDLE[index]
    elif half == "encoder":
        official, diffusers = f"downsamples.{index}", f"down_blocks.{index}"
    else:
        level, place = divmod(index, layers_per_level)
        is_resnet = place < layers_per_level - 1
        inner = f"resnets.{place}" if is_resnet else "upsamplers.0"
        official, diffusers = f"upsamples.{index}", f"up_blocks.{level}.{inner}"
    part_official, part_diffusers = VAE_PARTS[part]
    return (
        f"{half}.{official}.{part_official}",
        f"{half}.{diffusers}.{part_diffusers}",
    )
