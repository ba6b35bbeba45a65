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


FUSED = "{qkv}"  # in a name: q, k and v are three tensors there, one of ours


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
    diffusers_layout: Layout | None = None

    def layout_in(self, naming: str) -> Layout:
        """Give the layout in a naming; most are the same in both."""
        other = self.diffusers_layout if naming == "diffusers" else None
        return other or self.layout

    def pieces(self, naming: str, layer: int | None = None) -> tuple[str, ...]:
        """Name the tensors whose rows, one after another, make up the parameter.

        One tensor but for fused projections, which diffusers' naming keeps apart.
        """
        name = self.name(naming, layer)
        if FUSED not in name:
            return (name,)
        return tuple(name.replace(FUSED, part) for part in FUSED[1:-1])

    def shapes(
        self, naming: str, shape: tuple[int, ...], layer: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Map the tensors of a parameter, one layer of shape `shape`, to theirs."""
        names = self.pieces(naming, layer)
        rows, *rest = self.layout_in(naming).torch_shape(shape)
        return dict.fromkeys(names, (rows // len(names), *rest))

    def read(
        self,
        naming: str,
        tensor: Callable[[str], np.ndarray],
        layer: int | None = None,
    ) -> np.ndarray:
        """Read a parameter, or one layer of it, in our axes and its stored type."""
        pieces = [tensor(name) for name in self.pieces(naming, layer)]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return self.layout_in(naming).to_ours(whole)

    def name(self, naming: str, layer: int | None = None) -> str:
        """Give the name in a naming, for one layer of a stacked parameter."""
        name = {"official": self.official, "diffusers": self.diffusers}[naming]
        return name if layer is None else name.replace("{i}", str(layer))

    @property
    def stacked(self) -> bool:
        """Say whether our parameter has a leading layer axis."""
        return "{i}" in self.official


NameTable = Callable[[str], TorchName | None]
# A checkpoint's name of a tensor as the tables have it; None if nothing reads it.
Alias = Callable[[str], str | None]


def same_name(name: str) -> str:
    """Be the alias of checkpoints that hold what the table names and nothing else."""
    return name


VECTOR = Layout("D", "D")
LINEAR = Layout("o i", "i o")
MODULATION = Layout("1 S D", "S D")
CONV_3D = Layout("o i t y x", "t y x i o")
CONV_2D = Layout("o i y x", "1 y x i o")
WAN_PATCH = (PATCH, PATCH)
# A convolution over whole groups of frames: ours flattens a group frame by frame.
FRAME_GROUPS = Layout("o i k", "(k i) o", (("k", TIME_STRIDE),))


def _patches(patch: tuple[int, int]) -> Layout:
    """Lay out kernels of patches: time, of length 1, has nothing to flatten."""
    return Layout("D C 1 p q", "(C p q) D", tuple(zip("pq", patch, strict=True)))


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


def dit_alias(name: str) -> str | None:
    """Ignore what published checkpoints hold and nothing reads."""
    return None if name.endswith(DIT_IGNORED) else name


def dit_names(patch: tuple[int, int] = WAN_PATCH) -> NameTable:
    """Give the table of `WanDiT`; None for what Wan does not have (branches)."""

    def name(path: str) -> TorchName | None:
        if path in DIT_MODULATIONS:
            return TorchName(*DIT_MODULATIONS[path], MODULATION)
        module, _, leaf = path.rpartition(".")
        if module not in DIT_MODULES:
            return None
        layout = LINEAR if leaf == "kernel" else VECTOR
        layout = _patches(patch) if path == "patch_embedding.kernel" else layout
        leaf = "bias" if leaf == "bias" else "weight"
        official, diffusers = DIT_MODULES[module]
        return TorchName(f"{official}.{leaf}", f"{diffusers}.{leaf}", layout)

    return name


# Modules of an encoder of poses.
ENCODER = {"conv": "conv", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}


def _geo_modules():
    """List the geo branch's modules as (ours, theirs)."""
    yield "patch_embedding", "geo.patch_embedding"
    yield "layers.norm", "geo.blocks.{i}.norm"
    for part in ("q", "k", "v", "o", "norm_q", "norm_k"):
        yield f"layers.attention.{part}", f"geo.blocks.{{i}}.attn.{part}"
    for ours, theirs in (*ENCODER.items(), ("projection", "out")):
        yield f"view_poses.{ours}", f"geo.views.{theirs}"


# CityRAG has no PyTorch original: these names are ours, the same in both namings.
BRANCH_MODULES = {
    GeoBranch: dict(_geo_modules()),
    TrajectoryEncoder: {
        **{ours: f"pose.{theirs}" for ours, theirs in ENCODER.items()},
        "projection": "pose.out.{i}",
    },
}


def branch_names(
    branches: Sequence[Any], patch: tuple[int, int] = WAN_PATCH
) -> NameTable:
    """Give the table of a `WanDiT`'s `branches.*`, from its branches or their classes.

    None for all other parameters, and for those of branches that are not CityRAG's.
    """
    convolutions = {
        "geo.patch_embedding.weight": _patches(patch),
        "pose.conv.weight": FRAME_GROUPS,
        "geo.views.conv.weight": FRAME_GROUPS,
    }
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
        layout = convolutions.get(theirs, layout)
        return TorchName(theirs, theirs, layout)

    return name


def transformer_names(
    branches: Sequence[Any] = (), patch: tuple[int, int] = WAN_PATCH
) -> NameTable:
    """Give the table of a whole `WanDiT`: Wan's own parameters and its branches'."""
    of_wan, of_branches = dit_names(patch), branch_names(branches, patch)

    def name(path: str) -> TorchName | None:
        return of_wan(path) or of_branches(path)

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


UMT5_MODULES = {
    "token_embedding": ("token_embedding", "shared"),
    "norm": ("norm", "encoder.final_layer_norm"),
}
# Parts of a block, below `blocks.{i}` and `encoder.block.{i}.layer`.
UMT5_PARTS = {
    "norm1": ("norm1", "0.layer_norm"),
    "attention.q": ("attn.q", "0.SelfAttention.q"),
    "attention.k": ("attn.k", "0.SelfAttention.k"),
    "attention.v": ("attn.v", "0.SelfAttention.v"),
    "attention.o": ("attn.o", "0.SelfAttention.o"),
    "attention.position_bias": (
        "pos_embedding.embedding",
        "0.SelfAttention.relative_attention_bias",
    ),
    "norm2": ("norm2", "1.layer_norm"),
    "ffn.gate": ("ffn.gate.0", "1.DenseReluDense.wi_0"),
    "ffn.fc1": ("ffn.fc1", "1.DenseReluDense.wi_1"),
    "ffn.fc2": ("ffn.fc2", "1.DenseReluDense.wo"),
}
TABLE = Layout("n D", "n D")


def umt5_name(path: str) -> TorchName:
    """Name a parameter of `UMT5Encoder`; "diffusers" is transformers' naming."""
    module = path.removesuffix(".kernel").removesuffix(".scale")
    layout = {"kernel": LINEAR, "scale": VECTOR}.get(path.rpartition(".")[2], TABLE)
    if module in UMT5_MODULES:
        official, theirs = UMT5_MODULES[module]
    else:
        official, theirs = UMT5_PARTS[module.removeprefix("blocks.")]
        official, theirs = (
            f"blocks.{{i}}.{official}",
            f"encoder.block.{{i}}.layer.{theirs}",
        )
    return TorchName(f"{official}.weight", f"{theirs}.weight", layout)


def umt5_alias(name: str) -> str:
    """Give the one name of the embedding, which transformers stores under either."""
    return "shared.weight" if name == "encoder.embed_tokens.weight" else name


# Parts of the image tower and of its blocks; what stands there is below CLIP_PREFIXES.
CLIP_MODULES = {
    "pre_norm": ("pre_norm", "pre_layrnorm"),
    "blocks.norm1": ("transformer.{i}.norm1", "encoder.layers.{i}.layer_norm1"),
    "blocks.qkv": (
        "transformer.{i}.attn.to_qkv",
        f"encoder.layers.{{i}}.self_attn.{FUSED}_proj",
    ),
    "blocks.proj": (
        "transformer.{i}.attn.proj",
        "encoder.layers.{i}.self_attn.out_proj",
    ),
    "blocks.norm2": ("transformer.{i}.norm2", "encoder.layers.{i}.layer_norm2"),
    "blocks.mlp.fc1": ("transformer.{i}.mlp.0", "encoder.layers.{i}.mlp.fc1"),
    "blocks.mlp.fc2": ("transformer.{i}.mlp.2", "encoder.layers.{i}.mlp.fc2"),
}
CLIP_PREFIXES = ("visual.", "vision_model.")
# What Wan does not use: the text tower, the last norm and the heads.
CLIP_IGNORED = (
    "textual.",
    "log_scale",
    "visual.post_norm.",
    "visual.head",
    "text_model.",
    "text_projection.",
    "logit_scale",
    "visual_projection.",
    "vision_model.post_layernorm.",
    "vision_model.embeddings.position_ids",
)


def clip_names(patch_size: int) -> NameTable:
    """Give the table of `CLIPVision`; "diffusers" is transformers' naming."""
    patches = Layout("D C p q", "(C p q) D", (("p", patch_size), ("q", patch_size)))
    alone = {
        "patch_kernel": TorchName(
            "visual.patch_embedding.weight",
            "vision_model.embeddings.patch_embedding.weight",
            patches,
        ),
        "class_token": TorchName(
            "visual.cls_embedding",
            "vision_model.embeddings.class_embedding",
            Layout("1 1 D", "D"),
            VECTOR,
        ),
        "positions": TorchName(
            "visual.pos_embedding",
            "vision_model.embeddings.position_embedding.weight",
            Layout("1 n D", "n D"),
            TABLE,
        ),
    }

    def name(path: str) -> TorchName:
        if path in alone:
            return alone[path]
        module, _, leaf = path.rpartition(".")
        layout = LINEAR if leaf == "kernel" else VECTOR
        leaf = "bias" if leaf == "bias" else "weight"
        official, theirs = (
            f"{prefix}{module}.{leaf}"
            for prefix, module in zip(CLIP_PREFIXES, CLIP_MODULES[module], strict=True)
        )
        return TorchName(official, theirs, layout)

    return name


def clip_alias(num_layers: int) -> Alias:
    """Ignore what Wan does not use, the last block too; allow for a lost prefix."""
    last = num_layers - 1
    ignored = CLIP_IGNORED + (
        f"visual.transformer.{last}.",
        f"vision_model.encoder.layers.{last}.",
    )
    bare = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")

    def alias(name: str) -> str | None:
        name = f"vision_model.{name}" if name.startswith(bare) else name
        return None if name.startswith(ignored) else name

    return alias
