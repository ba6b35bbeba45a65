"""CityRAG in PyTorch: an export opened around diffusers' WanTransformer3DModel.

    python tools/export_wan.py --checkpoint=DIR --out=OUT --naming=diffusers

    model = open_export("OUT", dtype=torch.bfloat16).to("cuda")
    velocity = model(latents, timesteps, text, image, geo_latents, geo_frames, poses)

This file needs torch, diffusers and safetensors alone, nothing of this package: copy it
where you want it. Equations and shapes stand in README.md beside it. Inference: clip by
clip attention to the condition, no kernels of our own.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

# In float32 whatever the model's type: what diffusers keeps so, and the pose branch.
FLOAT32 = (
    "pose.",
    "geo.views.",
    "time_embedder",
    "scale_shift_table",
    ".norm.",
    ".norm2.",
)


class GeoAttention(nn.Module):
    """One block's attention to the condition: a copy of Wan's self-attention."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps)
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in "qkvo"})
        for name in ("norm_q", "norm_k"):
            self.attn[name] = nn.RMSNorm(dim, eps)

    def forward(self, x: Tensor, c: Tensor, x_angles: Tensor, c_angles: Tensor):
        """Read from a clip's condition c [S, D] for its tokens x [L, D]."""
        attn, dtype = self.attn, self.attn["q"].weight.dtype
        source = layer_norm(c, self.norm.eps) * self.norm.weight + self.norm.bias
        x, source = x.to(dtype), source.to(dtype)
        q = rotate(self.split(attn["norm_q"](attn["q"](x))), x_angles)
        k = rotate(self.split(attn["norm_k"](attn["k"](source))), c_angles)
        read = F.scaled_dot_product_attention(q, k, self.split(attn["v"](source)))
        return attn["o"](read.transpose(0, 1).flatten(1))

    def split(self, x: Tensor) -> Tensor:
        """[tokens, D] -> [heads, tokens, D / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)


class PoseEncoder(nn.Module):
    """Relative camera poses to a vector for each latent frame."""

    def __init__(self, hidden: int):
        super().__init__()
        self.conv = nn.Conv1d(16, hidden, 4, stride=4)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )

    def embed(self, poses: Tensor) -> Tensor:
        """[B, T, 4, 4] -> [B, t, hidden]."""
        flat = poses.float().flatten(2)
        flat = torch.cat([flat[:, :1]] * 3 + [flat], dim=1).transpose(1, 2)
        return self.mlp(F.silu(self.conv(flat).transpose(1, 2)))


class ViewPoses(PoseEncoder):
    """The poses of the condition's cameras to a vector for its tokens."""

    def __init__(self, wan: WanTransformer3DModel, hidden: int):
        super().__init__(hidden)
        self.out = nn.Linear(hidden, width(wan))

    def forward(self, poses: Tensor) -> Tensor:
        """[B, F, 4, 4] -> [B, u, D]."""
        return self.out(self.embed(poses))


class GeoBranch(nn.Module):
    """Condition latents to tokens, and an attention to them for each block."""

    def __init__(
        self, wan: WanTransformer3DModel, latent_channels: int, view_poses: int = 0
    ):
        super().__init__()
        told = wan.config
        dim, size = width(wan), tuple(told.patch_size)
        self.patch_embedding = nn.Conv3d(latent_channels, dim, size, size)
        self.blocks = nn.ModuleList(
            GeoAttention(dim, told.num_attention_heads, told.eps) for _ in wan.blocks
        )
        self.views = ViewPoses(wan, view_poses) if view_poses else None

    def tokens(
        self, latents: Tensor, frames: int, views: Tensor | None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Give the tokens [S, D] of a clip's first real frames, and their grid.

        `views` [u, D] are what its cameras' poses add.
        """
        c = self.patch_embedding(latents[:, :frames].to(self.patch_embedding.weight))
        c = (
            c.float()
            if views is None
            else c.float() + views[:frames].T[..., None, None]
        )
        return c.flatten(1).T, tuple(c.shape[1:])


class PoseBranch(PoseEncoder):
    """Relative camera poses to a vector for each latent frame and block."""

    def __init__(self, wan: WanTransformer3DModel, hidden: int):
        super().__init__(hidden)
        self.out = nn.ModuleList(nn.Linear(hidden, width(wan)) for _ in wan.blocks)

    def forward(self, poses: Tensor) -> list[Tensor]:
        """[B, T, 4, 4] -> one [B, t, D] a block."""
        hidden = self.embed(poses)
        return [out(hidden) for out in self.out]


class CityRAG(nn.Module):
    """Wan with both branches; velocities as ours, channels first."""

    def __init__(
        self, wan: WanTransformer3DModel, geo: dict[str, int], pose: dict[str, int]
    ):
        super().__init__()
        self.wan = wan
        self.geo = GeoBranch(wan, **geo)
        self.pose = PoseBranch(wan, **pose)

    def forward(
        self,
        latents: Tensor,  # [B, C, t, h, w]: noise, and for image-to-video mask, image
        timesteps: Tensor,  # [B], 0 to 1000
        text: Tensor,  # [B, S, E], padded with zeros to what Wan was trained on, 512
        image: Tensor | None,  # [B, 257, E'] of CLIP
        geo_latents: Tensor,  # [B, 16, u, h, w]
        geo_frames: Tensor,  # [B]: how many of the u are real
        poses: Tensor,  # [B, T, 4, 4]
        keep_geo: Tensor | None = None,  # [B]: 0 where the condition is dropped
        keep_pose: Tensor | None = None,
        geo_poses: Tensor | None = None,  # [B, F, 4, 4], of a model that sees them
    ) -> Tensor:
        """Give the velocity [B, 16, t, h, w], float32."""
        wan, dtype = self.wan, self.wan.patch_embedding.weight.dtype
        x = wan.patch_embedding(latents.to(dtype))
        grid, rotary = x.shape[2:], wan.rope(latents)
        x = x.flatten(2).transpose(1, 2).float()
        image = None if image is None else image.to(dtype)
        embedded = wan.condition_embedder(timesteps, text.to(dtype), image)
        time, time6, text, image = embedded
        context = text if image is None else torch.cat([image, text], dim=1)
        time6 = time6.unflatten(1, (6, -1)).float()
        views = [None] * len(x) if self.geo.views is None else self.geo.views(geo_poses)
        pairs = zip(geo_latents, geo_frames.tolist(), views, strict=True)
        clips = [self.geo.tokens(*of) for of in pairs]
        turns = [self.angles(of, x.device) for of in (grid, *(g for _, g in clips))]
        addends = self.pose(poses)
        ones = x.new_ones(len(x))
        keep_geo = (ones if keep_geo is None else keep_geo.float())[:, None, None]
        keep_pose = (ones if keep_pose is None else keep_pose.float())[:, None, None]

        def read(i: int, m: Tensor) -> Tensor:
            """Attend from every clip's tokens to its own condition."""
            of = zip(m, clips, turns[1:], strict=True)
            rows = [
                self.geo.blocks[i](row, c, turns[0], turn) for row, (c, _), turn in of
            ]
            return keep_geo * torch.stack(rows)

        for i, addend in enumerate(addends):
            x = self.block(i, x, time6, context, rotary, read)
            x = x + keep_pose * addend.repeat_interleave(grid[1] * grid[2], dim=1)
        table = wan.scale_shift_table.float() + time[:, None].float()
        x = wan.proj_out(self.modulated(x, *table.chunk(2, dim=1)).to(dtype)).float()
        x = x.unflatten(1, grid).unflatten(-1, (*wan.config.patch_size[1:], -1))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def block(self, i, x, time6, context, rotary, read) -> Tensor:
        """Run Wan's block i with the attention to the condition behind its own."""
        block, dtype = self.wan.blocks[i], context.dtype
        parts = (block.scale_shift_table.float() + time6).chunk(6, dim=1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        m = self.modulated(x, shift, scale).to(dtype)
        x = x + gate * block.attn1(m, None, None, rotary)
        x = x + gate * read(i, self.modulated(x, shift, scale))  # of the new x
        x = x + block.attn2(block.norm2(x).to(dtype), context, None, None)
        m = self.modulated(x, ffn_shift, ffn_scale).to(dtype)
        return x + ffn_gate * block.ffn(m)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalise without an affine, then scale and shift as the time says."""
        return layer_norm(x, self.wan.config.eps) * (1 + scale) + shift

    def angles(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """Give the rotation of every token of a grid, [tokens, head_dim / 2]."""
        size = self.wan.config.attention_head_dim
        third = size // 6  # of the pairs, to rows and to columns; frames get the rest
        place = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        angles = []
        for axis, pairs in enumerate((size // 2 - 2 * third, third, third)):
            ladder = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
            angles.append(place[axis].reshape(-1, 1) * ladder)
        angles = torch.cat(angles, dim=1).to(device)
        return torch.polar(torch.ones_like(angles), angles)


def open_export(folder: str | Path, dtype: torch.dtype = torch.float32) -> CityRAG:
    """Build the model of an export in diffusers' names, every tensor in its place.

    `dtype` is that of the linears; norms, modulation and poses are float32. Raises
    ValueError where the folder is no such export.
    """
    folder = Path(folder)
    try:
        told = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    kind, ours = told.get("_class_name"), told.get("_cityrag", {})
    if kind != "WanTransformer3DModel" or set(ours) != {"geo", "pose"}:
        raise ValueError(
            f"{folder} holds a {kind} with the branches {sorted(ours)}; export it "
            "again by tools/export_wan.py --naming=diffusers, without --base-only."
        )
    with torch.device("meta"):
        wan = WanTransformer3DModel.from_config(told)
        model = CityRAG(wan, **ours)
    wan.rope = type(wan.rope)(  # a table, which no file holds
        wan.config.attention_head_dim, wan.config.patch_size, 1024
    )
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in load_file(file).items():
            full = name if name.startswith(("geo.", "pose.")) else f"wan.{name}"
            kept = any(part in full for part in FLOAT32)
            tensors[full] = x.to(torch.float32 if kept else dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def width(wan: WanTransformer3DModel) -> int:
    """Give the width of the transformer."""
    return wan.config.num_attention_heads * wan.config.attention_head_dim


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise the last axis without an affine, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of [..., tokens, 2 k] by complex numbers, in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
