"""The transformer against the official code's numbers and its own invariances."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from cityrag_jax.batch import token_grid
from cityrag_jax.checkpoint import parameters, with_parameters
from cityrag_jax.convert import load_dit
from cityrag_jax.model.dit import DiTConfig, WanDiT, patchify, unpatchify
from cityrag_jax.model.layers import (
    MLP,
    LayerNorm,
    RMSNorm,
    gelu_exact,
    gelu_tanh,
    normalise,
    rotary_angles,
    rotate,
    timestep_embedding,
)
from cityrag_jax.parallel import make_mesh

GOLDEN = "tests/golden/"


def golden(name: str):
    """Arrays, config and model of a golden checkpoint."""
    arrays = np.load(f"{GOLDEN}{name}.npz")
    sizes = json.loads(str(arrays["config_json"]))
    config = DiTConfig(
        dim=sizes["dim"],
        num_heads=sizes["num_heads"],
        num_layers=sizes["num_layers"],
        ffn_dim=sizes["ffn_dim"],
        in_channels=sizes["in_dim"],
        freq_dim=sizes["freq_dim"],
        text_dim=sizes["text_dim"],
        image_dim=sizes.get("clip_dim"),
    )
    return arrays, load_dit(f"{GOLDEN}{name}.safetensors", config)


@pytest.fixture(scope="module")
def i2v():
    return golden("dit_i2v_tiny")


@pytest.fixture(scope="module")
def t2v():
    return golden("dit_t2v_tiny")


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -4, -1)


def inputs_a(arrays) -> dict:
    """The two samples of case A; text padded here, as the model would."""
    rows = [arrays["A_context0"], arrays["A_context1"]]
    text = np.zeros((2, 512, rows[0].shape[1]), np.float32)
    for padded, row in zip(text, rows, strict=True):
        padded[: len(row)] = row
    latents = channels_last(arrays["A_x"])
    if "A_y" in arrays:
        latents = np.concatenate([latents, channels_last(arrays["A_y"])], -1)
    image = arrays["A_clip_fea"] if "A_clip_fea" in arrays else None
    return dict(latents=latents, text=text, image=image)


run = jax.jit(lambda model, *args: model(*args))


@pytest.mark.parametrize("name", ["i2v", "t2v"])
@pytest.mark.parametrize("time", ["A_t", "A_t_int"])
def test_velocity_equals_the_official_one(name, time, request):
    """5e-5 as the goldens state: ten times the difference of two implementations."""
    arrays, model = request.getfixturevalue(name)
    x = inputs_a(arrays)
    timesteps = arrays[time].astype(np.float32)
    out = run(model, x["latents"], timesteps, x["text"], x["image"])
    expected = arrays["A_out" if time == "A_t" else "A_out_t_int"]
    np.testing.assert_allclose(out, channels_last(expected), atol=5e-5)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("name", ["i2v", "t2v"])
@pytest.mark.parametrize("sample", [0, 1])
def test_each_size_of_case_b_alone_equals_the_padded_batch(name, sample, request):
    arrays, model = request.getfixturevalue(name)
    a = inputs_a(arrays)
    latents = channels_last(arrays[f"B_x{sample}"])[None]
    if name == "i2v":
        y = channels_last(arrays[f"B_y{sample}"])[None]
        latents = np.concatenate([latents, y], -1)
    image = None if a["image"] is None else a["image"][sample][None]
    out = run(
        model, latents, arrays["A_t"][sample][None], a["text"][sample][None], image
    )
    expected = channels_last(arrays[f"B_out{sample}"])[None]
    np.testing.assert_allclose(out, expected, atol=5e-5)


@pytest.mark.parametrize("name", ["i2v", "t2v"])
def test_intermediates_equal_the_official_ones(name, request):
    """Embeddings 1e-5, blocks 3e-5: a mistake that cancels in the output shows here."""
    arrays, model = request.getfixturevalue(name)
    x = inputs_a(arrays)
    time, six = model.embed_time(jnp.asarray(arrays["A_t"]))
    text, image = model.embed_context(jnp.asarray(x["text"]), as_array(x["image"]))

    def check(value, key, atol):
        np.testing.assert_allclose(value, arrays[f"A_mid_{key}"], atol=atol)

    check(time, "time_embedding_e", 1e-5)
    check(rearrange(six, "B n D -> B (n D)"), "time_projection_e0", 1e-5)
    check(text[:, :32], "text_embedding", 1e-5)
    if image is not None:
        check(image[:, :32], "img_emb", 1e-5)

    grid = token_grid(x["latents"].shape[1:4])
    angles = rotary_angles(grid, model.config.head_dim)
    stream = model.patch_embedding(patchify(jnp.asarray(x["latents"]), (2, 2)))
    for i in range(model.config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
        if i == 0:
            check(normalise(stream, block.eps), "block0_norm1", 3e-5)
        attention, feed_forward = block.modulations(six)
        m = attention.modulate(stream, block.eps)
        self_attention = block.self_attention(
            m, angles, block.self_attention.keys(m, angles)
        )
        stream = stream + attention.gate * self_attention
        cross_norm = block.cross_norm(stream)
        keys = block.cross_attention.keys(text, image)
        cross = block.cross_attention(cross_norm, keys)
        stream = stream + cross
        ffn = block.ffn(feed_forward.modulate(stream, block.eps))
        stream = stream + feed_forward.gate * ffn
        if i == 0:
            check(self_attention, "block0_self_attn", 3e-5)
            check(cross_norm, "block0_norm3", 3e-5)
            check(cross, "block0_cross_attn", 3e-5)
            check(ffn, "block0_ffn", 3e-5)
        check(stream, f"block{i}_out", 3e-5)
    check(model.head(stream, time), "head_out", 3e-5)


def as_array(x):
    return None if x is None else jnp.asarray(x)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_equal_the_official_ones(remat, i2v):
    """For every parameter 1e-4 of its largest entry, as the golden states."""
    arrays, model = i2v
    config = dataclasses.replace(model.config, remat=remat)
    model = load_dit(f"{GOLDEN}dit_i2v_tiny.safetensors", config)
    x = inputs_a(arrays)
    graph, params = nnx.split(model)
    noise, given = x["latents"][..., :16], x["latents"][..., 16:]
    args = [jnp.asarray(a) for a in (arrays["A_t"], x["text"], x["image"])]

    def loss(params, noise):
        model = nnx.merge(graph, params)
        latents = jnp.concatenate([noise, given], -1)
        out = model(latents, *args)
        return jnp.mean((out - channels_last(arrays["A_grad_target"])) ** 2)

    value, (by_params, by_noise) = jax.jit(jax.value_and_grad(loss, (0, 1)))(
        params, noise
    )
    np.testing.assert_allclose(value, arrays["A_grad_loss"], rtol=1e-5)
    expected = channels_last(arrays["A_grad_x"])
    np.testing.assert_allclose(by_noise, expected, atol=1e-4 * np.abs(expected).max())

    official = load_dit(f"{GOLDEN}dit_i2v_tiny_grads.safetensors", model.config)
    wanted = jax.tree.leaves(nnx.state(official))
    for actual, expected in zip(jax.tree.leaves(by_params), wanted, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, atol=1e-4 * scale)
    assert len(wanted) > 40


@pytest.mark.parametrize(
    "config, parameters",
    [
        (DiTConfig.i2v_14b(), 16_394_878_784),
        (DiTConfig.t2v_14b(), 14_288_491_584),
        (DiTConfig.t2v_1_3b(), 1_418_996_800),
    ],
)
def test_parameter_counts_equal_the_published_models(config, parameters):
    model = nnx.eval_shape(lambda: WanDiT(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == parameters


def test_every_weight_is_a_param_and_nothing_else_is(i2v):
    _, model = i2v
    tensors = load_file(f"{GOLDEN}dit_i2v_tiny.safetensors")
    states = nnx.state(model, nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(states))
    assert count == sum(tensor.size for tensor in tensors.values())
    assert len(jax.tree.leaves(nnx.state(model))) == len(jax.tree.leaves(states))


def test_sequence_padding_changes_nothing(i2v):
    """Tokens that do not divide are padded and masked, unlike the official code."""
    arrays, model = i2v
    x = inputs_a(arrays)
    args = arrays["A_t"][:1], x["text"][:1], x["image"][:1]
    latents = x["latents"][:1, :1, :2, :10]  # 5 tokens over 3 devices
    expected = run(model, latents, *args)
    with jax.set_mesh(make_mesh(1, 1, 3, devices=jax.devices()[:3])):
        np.testing.assert_allclose(run(model, latents, *args), expected, atol=2e-5)


def test_bfloat16_linears_stay_near_float32(i2v):
    """A bfloat16 product errs by about 1e-2 of its size; the output keeps float32."""
    arrays, model = i2v
    x = inputs_a(arrays)
    path = f"{GOLDEN}dit_i2v_tiny.safetensors"
    half = load_dit(path, model.config, dtype=jnp.bfloat16)
    out = run(half, x["latents"], arrays["A_t"], x["text"], x["image"])
    expected = channels_last(arrays["A_out"])
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert out.dtype == jnp.float32 and 1e-4 < error < 3e-2


def test_patches_go_in_channel_first_and_come_out_channel_last(rng):
    latents = rng.normal(size=(1, 2, 4, 6, 3)).astype(np.float32)
    tokens = patchify(jnp.asarray(latents), (2, 2))
    assert tokens.shape == (1, 12, 12)
    np.testing.assert_array_equal(tokens[0, 0, :4], latents[0, 0, :2, :2, 0].ravel())
    last = rearrange(tokens, "B L (C p q) -> B L (p q C)", p=2, q=2)
    np.testing.assert_array_equal(unpatchify(last, (2, 2, 3), (2, 2)), latents)


def test_wrong_text_and_image_are_refused(t2v, i2v):
    _, model = t2v
    with pytest.raises(ValueError, match="513 rows, the model takes 512"):
        model.embed_context(jnp.zeros((1, 513, 48)), None)
    with pytest.raises(ValueError, match="given but the model's image_dim is None"):
        model.embed_context(jnp.zeros((1, 5, 48)), jnp.zeros((1, 257, 40)))
    with pytest.raises(ValueError, match="absent but the model's image_dim is 40"):
        i2v[1].embed_context(jnp.zeros((1, 5, 48)), None)
    with pytest.raises(ValueError, match="dim = 30 over 4 heads"):
        DiTConfig(dim=30, num_heads=4, num_layers=1, ffn_dim=8, in_channels=16)


@pytest.mark.parametrize("width", [64, 256])
def test_timestep_embedding_equals_float64(width):
    """The float64 angles of the official code without 64-bit types: 5e-7."""
    arrays = np.load(f"{GOLDEN}embeddings.npz")
    embedded = timestep_embedding(jnp.asarray(arrays[f"sin{width}_pos"]), width)
    expected = arrays[f"sin{width}_emb_f64"]
    np.testing.assert_allclose(embedded, expected, atol=5e-7)


@pytest.mark.parametrize(
    "case",
    json.loads(str(np.load(f"{GOLDEN}embeddings.npz")["config_json"]))["cases"],
    ids=lambda c: str(c["head_dim"]),
)
def test_rotation_equals_the_official_one(case):
    """2e-6: float32 products of float64 tables."""
    arrays = np.load(f"{GOLDEN}embeddings.npz")
    prefix = f"rope_d{case['head_dim']}"
    q, expected = arrays[f"{prefix}_q"], arrays[f"{prefix}_out"]
    angles = rotary_angles(tuple(case["grid"]), case["head_dim"])
    count = len(angles)
    turned = rotate(jnp.asarray(q[:, :count]), angles)
    np.testing.assert_allclose(turned, expected[:, :count], atol=2e-6)


def test_norms_and_activations_equal_the_official_ones():
    """1e-5 and relative 1e-4 at input scales that reveal a wrong eps."""
    arrays = np.load(f"{GOLDEN}blocks.npz")
    x = jnp.asarray(arrays["x"])

    def close(actual, key):
        np.testing.assert_allclose(actual, arrays[key], atol=1e-5, rtol=1e-4)

    def filled(module):
        module.scale.set_value(jnp.asarray(arrays["weight"]))
        if hasattr(module, "bias"):
            module.bias.set_value(jnp.asarray(arrays["bias"]))
        return module

    close(filled(RMSNorm(20, 1e-6, param_dtype=jnp.float32))(x), "dit_rmsnorm")
    close(normalise(x, 1e-6), "dit_layernorm")
    close(
        filled(LayerNorm(20, 1e-6, param_dtype=jnp.float32))(x), "dit_layernorm_affine"
    )
    close(gelu_tanh(jnp.asarray(arrays["gelu_x"])), "gelu_tanh")
    close(gelu_exact(jnp.asarray(arrays["gelu_x"])), "gelu_exact")


def test_image_embedding_equals_the_official_one():
    """Its norms have eps 1e-5 and its GELU is exact; relative 1e-4."""
    arrays = np.load(f"{GOLDEN}blocks.npz")
    kinds = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    from cityrag_jax.model.dit import ImageEmbedding

    module = ImageEmbedding(20, 26, **kinds, rngs=nnx.Rngs(0))
    for norm, index in ((module.norm1, 0), (module.norm2, 4)):
        norm.scale.set_value(jnp.asarray(arrays[f"imgemb.proj.{index}.weight"]))
        norm.bias.set_value(jnp.asarray(arrays[f"imgemb.proj.{index}.bias"]))
    assert isinstance(module.mlp, MLP)
    for linear, index in ((module.mlp.fc1, 1), (module.mlp.fc2, 3)):
        linear.kernel.set_value(jnp.asarray(arrays[f"imgemb.proj.{index}.weight"].T))
        linear.bias.set_value(jnp.asarray(arrays[f"imgemb.proj.{index}.bias"]))
    out = module(jnp.asarray(arrays["x"]))
    np.testing.assert_allclose(out, arrays["imgemb_out"], atol=1e-5, rtol=1e-4)


def test_a_half_precision_stream_changes_a_velocity_by_a_percent(i2v):
    """bfloat16 rounds each of a block's sums to 1 part in 256; float32 is the default.

    Errors of eight sums add up at random: 0.4 % times the root of 8 is 1.1 %.
    """
    _, model = i2v
    config = model.config
    half = dataclasses.replace(config, stream_dtype=jnp.bfloat16)
    other = nnx.eval_shape(lambda: WanDiT(half, rngs=nnx.Rngs(0)))
    other = with_parameters(other, parameters(model))
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(1, 2, 4, 6, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(1, 3, config.text_dim)).astype(np.float32)
    image = rng.normal(size=(1, 257, config.image_dim)).astype(np.float32)
    given = tuple(map(jnp.asarray, (latents, np.float32([500.0]), text, image)))
    exact, rounded = model(*given), other(*given)
    assert rounded.dtype == jnp.float32
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < float(error) < 0.02
