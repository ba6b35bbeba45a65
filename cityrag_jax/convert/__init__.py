"""PyTorch checkpoints of Wan 2.1 to our parameters and back, official or diffusers."""

from cityrag_jax.convert.export import export_checkpoint, export_dit
from cityrag_jax.convert.weights import (
    load_clip_vision,
    load_dit,
    load_umt5,
    load_vae,
)

__all__ = [
    "export_checkpoint",
    "export_dit",
    "load_clip_vision",
    "load_dit",
    "load_umt5",
    "load_vae",
]
