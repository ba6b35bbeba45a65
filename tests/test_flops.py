"""Operations and parameters by formula against the networks themselves.

The oracle walks the traced program and adds up the products that stand in it; nothing
is allocated, so the full sizes are counted as well. Equality is exact.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from cityrag_jax import flops
from cityrag_jax.batch import Conditions
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import VAEConfig, WanVAE

FULL_TOKENS = 19 * 30 * 52
SMALL = dict(
    dim=24, num_heads=2, num_layers=3, ffn_dim=40, freq_dim=16, text_dim=12, text_len=7
)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def counted(function, *arguments):
    """Add up the products in the program of a function, loops by their length."""
    return count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_jaxpr(jaxpr):
    return sum(count_equation(equation) for equation in jaxpr.eqns)


def count_equation(equation):
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out = (v.aval.shape for v in (equation.invars[1], equation.outvars[0]))
        return 2 * math.prod(out) * math.prod(kernel[:-1])  # HWIO
    times = params["length"] if name == "scan" else 1
    inner = jax.tree.leaves(
        list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or is_closed(x)
    )
    found = [
        getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or is_closed(x)
    ]
    return times * sum(count_jaxpr(jaxpr) for jaxpr in found)


def is_closed(x):
    return hasattr(getattr(x, "jaxpr", None), "eqns")


def abstract(make):
    """Build a module without memory: its graph and the shapes of its parameters."""
    return nnx.split(nnx.eval_shape(make))


def parameters(module_state):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(module_state))


def forward_flops(config, grid, batch):
    graph, state = abstract(lambda: WanDiT(config, rngs=nnx.Rngs(0)))
    image = None
    if config.image_dim is not None:
        image = spec(batch, 257, config.image_dim)
    t, h, w = grid
    return counted(
        lambda state, *inputs: nnx.merge(graph, state)(*inputs),
        state,
        spec(batch, t, 2 * h, 2 * w, config.in_channels),
        spec(batch),
        spec(batch, config.text_len, config.text_dim),
        image,
    )


@pytest.mark.parametrize(
    "config, grid, batch",
    [
        (DiTConfig(in_channels=36, image_dim=20, **SMALL), (2, 3, 4), 1),
        (DiTConfig(in_channels=16, **SMALL), (2, 3, 4), 3),
        (DiTConfig.i2v_14b(), (19, 30, 52), 1),
        (DiTConfig.t2v_1_3b(), (21, 30, 52), 2),
    ],
)
def test_forward_operations_are_those_of_the_program(config, grid, batch):
    cost = flops.total(flops.dit(config, math.prod(grid), batch=batch))
    assert cost.flops == forward_flops(config, grid, batch)


@pytest.mark.parametrize(
    "config", [DiTConfig(in_channels=36, image_dim=20, **SMALL), DiTConfig.i2v_14b()]
)
def test_branch_operations_are_those_of_the_program(config):
    """Condition and target differ in length; poses of 73 frames make 19 vectors."""
    small = config.dim < 100
    t, h, w = grid = (19, 2, 3) if small else (19, 30, 52)

    def make():
        rngs = nnx.Rngs(0)
        branches = (GeoBranch(config, rngs=rngs), TrajectoryEncoder(config, rngs=rngs))
        return WanDiT(config, branches=branches, rngs=rngs)

    graph, state = abstract(make)

    def run(state, latents, times, text, image, geo, poses):
        model = nnx.merge(graph, state)
        length = jnp.full(1, 21, jnp.int32)
        conditions = Conditions(text, geo_latents=geo, geo_length=length, poses=poses)
        return model(latents, times, text, image, model.prepare(conditions))

    found = counted(
        run,
        state,
        spec(1, t, 2 * h, 2 * w, config.in_channels),
        spec(1),
        spec(1, config.text_len, config.text_dim),
        spec(1, 257, config.image_dim),
        spec(1, 21, 2 * h, 2 * w, 16),
        spec(1, 73, 4, 4),
    )
    parts = [
        flops.dit(config, math.prod(grid)),
        flops.geo_branch(config, math.prod(grid), 21 * h * w),
        flops.pose_branch(config, 73, math.prod(grid)),
    ]
    cost = sum(map(flops.total, parts), start=flops.Cost())
    assert cost.flops == found
    assert cost.parameters == parameters(state)


@pytest.mark.parametrize(
    "config, expected",
    [
        (DiTConfig.i2v_14b(), 16_394_878_784),
        (DiTConfig.t2v_14b(), 14_288_491_584),
        (DiTConfig.t2v_1_3b(), 1_418_996_800),
    ],
)
def test_transformer_parameters_are_the_published_ones(config, expected):
    parts = flops.dit(config, FULL_TOKENS)
    assert flops.total(parts).parameters == expected


def test_parts_of_i2v_14b_are_those_of_the_fact_sheet():
    parts = flops.dit(DiTConfig.i2v_14b(), FULL_TOKENS)
    found = {name: cost.parameters for name, cost in parts.items()}
    assert found == {
        "patch_embedding": 742_400,
        "text_embedding": 47_196_160,
        "time_embedding": 27_535_360,
        "time_projection": 157_317_120,
        "image_embedding": 8_211_200,
        "blocks.self_attention": 40 * 104_888_320,
        "blocks.cross_attention": 40 * 157_332_480,
        "blocks.ffn": 40 * 141_576_704,
        "blocks.cross_norm": 40 * 10_240,
        "blocks.modulation": 40 * 30_720,
        "head": 337_984,
    }


def test_cloned_attentions_take_4_195_532_800_parameters():
    parts = flops.geo_branch(DiTConfig.i2v_14b(), FULL_TOKENS, FULL_TOKENS)
    cloned = ("keys_and_values", "queries_and_output", "attention")
    assert sum(parts[name].parameters for name in cloned) == 4_195_532_800


def test_i2v_14b_at_480p_is_1_45_petaflop():
    """1.43 as the peer counts: without the softmaxes of the cross-attention."""
    config = DiTConfig.i2v_14b()
    cost = flops.total(flops.dit(config, FULL_TOKENS)).flops
    softmaxes = config.num_layers * flops.attention(FULL_TOKENS, 769, config.dim).flops
    assert round(cost / 1e15, 3) == 1.450
    assert round((cost - softmaxes) / 1e15, 2) == 1.43


@pytest.mark.parametrize(
    "config, size",
    [
        (VAEConfig(base_dim=4), (17, 32, 48)),
        (
            VAEConfig(
                base_dim=6,
                dim_mult=(1, 3, 2),
                num_res_blocks=1,
                temporal_downsample=(True, False),
            ),
            (5, 16, 24),
        ),
        (
            VAEConfig(
                base_dim=4, dim_mult=(1, 2), temporal_downsample=(True,), patch=4
            ),
            (5, 16, 24),
        ),
        (VAEConfig(), (73, 480, 832)),
        (VAEConfig(), (1, 480, 832)),
    ],
)
def test_autoencoder_operations_and_parameters_are_those_of_the_program(config, size):
    graph, state = abstract(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    frames, height, width = size
    video = spec(1, frames, height, width, 3)

    def encode(state, video):
        return nnx.merge(graph, state).encode(video)

    def decode(state, latents):
        return nnx.merge(graph, state).decode(latents)

    latents = jax.eval_shape(encode, state, video)
    costs = flops.vae_encode(config, *size), flops.vae_decode(config, *size)
    assert flops.total(costs[0]).flops == counted(encode, state, video)
    assert flops.total(costs[1]).flops == counted(decode, state, latents)
    both = flops.total(map(flops.total, costs))
    assert both.parameters == parameters(state)


def test_autoencoder_of_wan_has_126_892_531_parameters():
    config, size = VAEConfig(), (73, 480, 832)
    parts = flops.vae_encode(config, *size) | flops.vae_decode(config, *size)
    assert parts["encoder"].parameters == 53_595_872
    assert parts["decoder"].parameters == 73_295_331
    assert flops.total(parts).parameters == 126_892_531


def test_bytes_are_operands_weights_and_results():
    """A 4 x 3 by 3 x 5 product with bias in bfloat16, counted by hand."""
    assert flops.linear(4, 3, 5).bytes == 2 * (4 * 3 + 3 * 5 + 5 + 4 * 5)
    assert flops.attention(4, 6, 8).bytes == 2 * (4 * 8 + 6 * 8 + 6 * 8 + 4 * 8)
    assert flops.linear(4, 3, 5, itemsize=4).bytes == 2 * flops.linear(4, 3, 5).bytes


def test_one_linear_agrees_with_the_compiler():
    """XLA counts the bias additions too: 4 x 5 of them."""
    linear = jax.jit(lambda x, w, b: x @ w + b[None]).lower(
        spec(4, 3), spec(3, 5), spec(5)
    )
    found = linear.compile().cost_analysis()
    assert found["flops"] - 4 * 5 == flops.linear(4, 3, 5).flops
