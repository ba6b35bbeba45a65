"""What is trained here opens in PyTorch, from the files and the README alone."""

import pytest
from flax import nnx

from cityrag_jax.checkpoint import parameters, stacked_parameters
from cityrag_jax.convert.names import transformer_names
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder

SMALL = DiTConfig(
    dim=48,
    num_heads=2,
    num_layers=2,
    ffn_dim=64,
    in_channels=36,
    freq_dim=32,
    text_dim=24,
    image_dim=20,
)
HIDDEN = 12


def build(config=SMALL, order=(GeoBranch, TrajectoryEncoder)):
    rngs = nnx.Rngs(0)
    arguments = {GeoBranch: {}, TrajectoryEncoder: {"hidden": HIDDEN}}
    branches = tuple(cls(config, **arguments[cls], rngs=rngs) for cls in order)
    return WanDiT(config, branches=branches, rngs=rngs)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_parameter_of_both_branches_has_a_name_and_layout(order):
    """The class decides, not the place; names and torch shapes as the README says."""
    classes = [(GeoBranch, TrajectoryEncoder)[i] for i in order]
    model = nnx.eval_shape(lambda: build(order=classes))
    table = transformer_names(model.branches)
    assert table("branches.0.conv.kernel") == transformer_names(classes)(
        "branches.0.conv.kernel"
    )
    stacked = stacked_parameters(model)
    shapes = {}
    for path, x in parameters(model).items():
        name = table(path)
        assert name.stacked == (path in stacked), path
        shape = x.shape[1:] if name.stacked else x.shape
        assert name.official not in shapes
        shapes[name.official] = name.layout.torch_shape(shape)
        if path.startswith("branches."):
            assert name.official == name.diffusers
    ours = {n: s for n, s in shapes.items() if n.startswith(("geo.", "pose."))}
    square = {f"geo.blocks.{{i}}.attn.{p}.weight": (48, 48) for p in "qkvo"}
    vectors = [f"geo.blocks.{{i}}.attn.{p}.bias" for p in "qkvo"]
    vectors += [f"geo.blocks.{{i}}.attn.norm_{p}.weight" for p in "qk"]
    vectors += ["geo.blocks.{i}.norm.weight", "geo.blocks.{i}.norm.bias"]
    vectors += ["geo.patch_embedding.bias", "pose.out.{i}.bias"]
    assert ours == square | dict.fromkeys(vectors, (48,)) | {
        "geo.patch_embedding.weight": (48, 16, 1, 2, 2),
        "pose.conv.weight": (HIDDEN, 16, 4),
        "pose.conv.bias": (HIDDEN,),
        "pose.mlp.0.weight": (HIDDEN, HIDDEN),
        "pose.mlp.0.bias": (HIDDEN,),
        "pose.mlp.2.weight": (HIDDEN, HIDDEN),
        "pose.mlp.2.bias": (HIDDEN,),
        "pose.out.{i}.weight": (48, HIDDEN),
    }
