"""What is called float32 is float32 on every platform, products included.

By default GPUs round float32 factors to TF32 and TPUs to bfloat16; a CPU rounds
nothing, so that only the traced programs show it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_remat import CONFIG, equations, gradient

from cityrag_jax.batch import Conditions
from cityrag_jax.model.clip_vision import CLIPVision, CLIPVisionConfig
from cityrag_jax.model.dit import WanDiT
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.umt5 import UMT5Config, UMT5Encoder
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.training.optimizer import orthogonalize


def float32_products(function, *arguments) -> list:
    """Give the products of two float32 factors, each checked to be exact."""
    found = [
        equation
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
        and all(x.aval.dtype == jnp.float32 for x in equation.invars)
    ]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    rounded = [e for e in found if e.params["precision"] != highest]
    assert not rounded, "\n".join(str(equation) for equation in rounded)
    return found


def test_no_switch_makes_all_products_exact():
    """Else this file would test nothing."""
    assert jax.config.jax_default_matmul_precision is None
    x = jnp.ones((2, 2))
    with pytest.raises(AssertionError, match="dot_general"):
        float32_products(lambda x: x @ x, x)


def test_time_pose_and_head_are_exact_beside_bfloat16_blocks():
    """Three products of the time, five of the pose branch, and the head."""
    branch = TrajectoryEncoder(CONFIG, hidden=8, rngs=nnx.Rngs(1))
    model = WanDiT(CONFIG, branches=(branch,), rngs=nnx.Rngs(0))

    def run(model, latents, conditions):
        time = jnp.array([500.0])
        given = conditions.text, conditions.image, model.prepare(conditions)
        return model(latents, time, *given)

    text, image = jnp.ones((1, 6, 8)), jnp.ones((1, 257, 12))
    conditions = Conditions(text=text, image=image, poses=jnp.ones((1, 9, 4, 4)))
    latents = jnp.ones((1, 3, 4, 10, 36))
    assert len(float32_products(run, model, latents, conditions)) == 3 + 5 + 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_as_exact_as_what_they_are_of(dtype):
    function, arguments = gradient(dataclasses.replace(CONFIG, dtype=dtype))
    assert len(float32_products(function, *arguments)) > 6


def test_float32_encoders_are_exact():
    vae = WanVAE(VAEConfig(base_dim=4), rngs=nnx.Rngs(0))
    video = jnp.ones((1, 5, 16, 16, 3))
    assert float32_products(WanVAE.encode, vae, video)
    latents = jnp.ones((1, 2, 2, 2, 16))
    assert float32_products(WanVAE.decode, vae, latents)
    clip = CLIPVision(CLIPVisionConfig(28, 14, 8, 2, 16, 3), rngs=nnx.Rngs(0))
    assert float32_products(CLIPVision.__call__, clip, jnp.ones((1, 28, 28, 3)))
    text = UMT5Encoder(UMT5Config(9, 8, 8, 2, 16, 2), rngs=nnx.Rngs(0))
    ids = jnp.ones((1, 4), jnp.int32)
    assert float32_products(UMT5Encoder.__call__, text, ids, ids > 0)


def test_float32_newton_schulz_is_exact():
    assert float32_products(orthogonalize, jnp.ones((2, 4, 6)))
