"""PyTorch checkpoints of Wan 2.1 to our parameters and back, official or diffusers."""

from cityrag_jax.convert.weights import export_dit, load_dit, load_vae

__all__ = ["export_dit", "load_dit", "load_vae"]
