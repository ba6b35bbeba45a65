"""The autoencoder equals the official one, whole and streamed, in constant memory."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from flax import nnx
from safetensors.numpy import save_file

from cityrag_jax.checkpoint import (
    Bundle,
    computing_in,
    describe,
    load_bundle,
    new_model,
    parameters,
    save_bundle,
)
from cityrag_jax.convert import load_vae
from cityrag_jax.model.vae import VAEConfig, WanVAE, _run_until_still
from cityrag_jax.model.vae_layers import ChannelNorm

GOLDEN = Path(__file__).parent / "golden"
TINY = VAEConfig(base_dim=8)
# The goldens' own tolerances: 3 to 10 times what two exact implementations differ by.
LATENT_TOLERANCE = 1e-5
VIDEO_TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def vae():
    return load_vae(GOLDEN / "vae_tiny.safetensors", TINY)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "vae_tiny.npz") as arrays:
        return dict(arrays)


def from_torch(x):
    return jnp.asarray(rearrange(np.asarray(x), "B C T H W -> B T H W C"))


def run(vae, method, x):
    graph, params = nnx.split(vae)
    return jax.jit(lambda p, x: getattr(nnx.merge(graph, p), method)(x))(params, x)


def largest_difference(a, b):
    assert a.shape == b.shape
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


def test_full_size_has_126_892_531_parameters():
    vae = nnx.eval_shape(lambda: WanVAE(VAEConfig(), rngs=nnx.Rngs(0)))
    sizes = [int(np.prod(p.shape)) for p in jax.tree.leaves(nnx.state(vae))]
    assert (sum(sizes), len(sizes)) == (126_892_531, 194)


@pytest.mark.parametrize("suffix", ["", "_whole"])
@pytest.mark.parametrize("frames", [1, 17])
def test_encoding_and_decoding_equal_the_official_ones(vae, golden, frames, suffix):
    latents = run(vae, f"encode{suffix}", from_torch(golden[f"video_f{frames}"]))
    expected = from_torch(golden[f"mu_f{frames}"])
    assert largest_difference(latents, expected) < LATENT_TOLERANCE
    video = run(vae, f"decode{suffix}", expected)
    expected = from_torch(golden[f"recon_f{frames}"])
    assert largest_difference(video, expected) < VIDEO_TOLERANCE


def test_decoding_of_random_latents_equals_the_official_one(vae, golden):
    """At the second latent the upsampling in time starts, its cache still zero."""
    for frames in 2, 4:
        video = run(vae, "decode", from_torch(golden[f"z_t{frames}"]))
        expected = from_torch(golden[f"dec_t{frames}"])
        assert largest_difference(video, expected) < VIDEO_TOLERANCE


@pytest.mark.parametrize("frames", [1, 3, 5, 73, 133])
def test_an_image_before_grey_equals_the_whole_video_encoded(vae, frames):
    """Float32: two programs, 2e-7 apart; nothing is left out."""
    images = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3), minval=-1)
    padding = ((0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0))
    expected = run(vae, "encode", jnp.pad(images[:, None], padding))
    encode = jax.jit(WanVAE.encode_before_grey, static_argnums=2)
    assert largest_difference(encode(vae, images, frames), expected) < 1e-6


def test_an_image_is_seen_28_latents_later_and_no_longer(vae):
    """What the repetition rests on; of 73 or 81 frames all latents differ."""
    images = jax.random.uniform(jax.random.key(0), (1, 16, 24, 3), minval=-1)
    video = jnp.pad(images[:, None], ((0, 0), (0, 132), (0, 0), (0, 0), (0, 0)))
    latents = run(vae, "encode", video)[0]
    still = [bool((x == latents[-1]).all()) for x in latents]
    assert still == [False] * 29 + [True] * 5


def test_layers_at_the_full_rate_run_over_25_of_73_frames(vae):
    """Groups of 4, 2 and 1 frames behind the first, of 18, at the three rates."""
    first, grey = jnp.zeros((1, 1, 16, 24, 3)), jnp.zeros((1, 1, 4, 16, 24, 3))
    counts = []
    for layers in vae.encoder.rates():
        first, grey = _run_until_still(layers, first, grey, 18)
        counts.append(len(grey))
    assert counts == [6, 11, 18]


def test_posterior_is_not_normalised(vae, golden):
    mean, log_variance = run(vae, "posterior", from_torch(golden["video_f5"]))
    assert largest_difference(mean, from_torch(golden["mu_raw_f5"])) < LATENT_TOLERANCE
    assert log_variance.shape == mean.shape
    decoded = run(vae, "decode_raw", mean)
    expected = from_torch(golden["recon_f5"])
    assert largest_difference(decoded, expected) < VIDEO_TOLERANCE


def test_trailing_frames_that_fill_no_group_are_ignored(vae, golden):
    video = from_torch(golden["odd_video_f7"])
    latents = run(vae, "encode", video)
    assert largest_difference(latents, from_torch(golden["odd_mu_f7"])) < (
        LATENT_TOLERANCE
    )
    np.testing.assert_array_equal(latents, run(vae, "encode", video[:, :5]))
    assert jax.eval_shape(vae.encode_whole, video).shape == latents.shape


def test_image_followed_by_grey_encodes_as_the_official_condition(vae, golden):
    image = from_torch(golden["cond_image"])
    video = jnp.concatenate([image, jnp.zeros_like(image).repeat(16, axis=1)], axis=1)
    latents = run(vae, "encode", video)
    expected = from_torch(golden["cond_mu"])
    assert largest_difference(latents, expected) < LATENT_TOLERANCE


def stages(half, layers):
    yield "conv1", half.conv_in
    middle = [(f"mid{n}", layer) for n, layer in enumerate(half.middle)]
    flat = [(f"{layers}{n}", layer) for n, layer in enumerate(half.layers)]
    yield from flat + middle if layers == "down" else middle + flat
    yield "out", half._head


@pytest.mark.parametrize("half", ["enc", "dec"])
def test_every_stage_equals_the_official_one_chunk_by_chunk(vae, half):
    """Each chunk's output of each layer, so that a wrong cache is found where it is."""
    with np.load(GOLDEN / "vae_tiny_stages.npz") as arrays:
        golden = dict(arrays)
    layers, results = run_stages(vae, half, golden)
    for index, name in enumerate(layers):
        chunks, whole = results[index]
        for number, chunk in enumerate(chunks):
            expected = from_torch(golden[f"{half}_{name}_chunk{number}"])
            assert largest_difference(chunk, expected) < VIDEO_TOLERANCE, name
        joined = jnp.concatenate(chunks, axis=1)
        assert largest_difference(whole, joined) < VIDEO_TOLERANCE, name


def run_stages(vae, half, golden):
    """Give the layers' names and for each its outputs, by chunks and whole."""
    graph, params = nnx.split(vae)
    names = []

    def run(params, x):
        vae = nnx.merge(graph, params)
        if half == "enc":
            chunks, layers = jnp.split(x, [1, 5], axis=1), stages(vae.encoder, "down")
        else:
            x = vae.post_quant_conv(vae.denormalise(x))
            chunks, layers = jnp.split(x, 3, axis=1), stages(vae.decoder, "up")
        outputs = []
        for name, layer in layers:
            cache, results = None, []
            for chunk in chunks:
                result, cache = layer(chunk, cache)
                results.append(result)
            chunks, x = results, layer(x, None)[0]
            outputs.append((chunks, x))
            names.append(name)
        return outputs

    source = golden["enc_video" if half == "enc" else "dec_z"]
    return names, jax.jit(run)(params, from_torch(source))


def test_norm_equals_the_official_one_down_to_zero():
    with np.load(GOLDEN / "blocks.npz") as arrays:
        x, expected = from_torch(arrays["vae_x"]), from_torch(arrays["vae_norm"])
        scale = jnp.asarray(arrays["weight"])
    norm = ChannelNorm(x.shape[-1], TINY)
    norm.scale.set_value(scale)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)


def test_gradient_is_finite_where_all_channels_are_zero():
    """Grey pixels through fresh biases are exactly zero, where a root has no slope."""
    norm = ChannelNorm(4, TINY)
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 1, 1, 1, 4)))
    assert np.isfinite(gradient).all()


def test_streamed_memory_does_not_grow_with_the_video():
    """At 17 and 81 frames; few layers compile fast. In- and outputs do not count."""
    small = VAEConfig(
        base_dim=8,
        dim_mult=(1, 2),
        num_res_blocks=1,
        temporal_downsample=(True,),
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: WanVAE(small, rngs=nnx.Rngs(0))))

    def temporary_bytes(method, x):
        def apply(params, x):
            return getattr(nnx.merge(graph, params), method)(x)

        compiled = jax.jit(apply).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for method, shape in ("encode", (64, 96, 3)), ("decode", (32, 48, 16)):
        lengths = (17, 81) if method == "encode" else (9, 41)
        short, long = (
            temporary_bytes(method, jnp.zeros((1, length, *shape)))
            for length in lengths
        )
        assert abs(long - short) < 0.05 * short


@pytest.mark.parametrize("patch", [1, 2])
def test_other_sizes_equal_diffusers(tmp_path, rng, patch):
    """Random weights of another depth, width and time stride; nothing left at zero."""
    sizes = dict(base_dim=4, z_dim=6, num_res_blocks=1)
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(
        **sizes,
        dim_mult=[1, 3, 2],
        temperal_downsample=[False, True],
        patch_size=patch if patch > 1 else None,
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        latents_mean=[0.0] * 6,
        latents_std=[1.0] * 6,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "vae.safetensors"
    save_file({k: v.numpy().copy() for k, v in theirs.state_dict().items()}, path)
    mean = tuple(rng.normal(size=6).tolist())
    std = tuple(rng.uniform(0.5, 2, size=6).tolist())
    config = VAEConfig(
        **sizes,
        dim_mult=(1, 3, 2),
        temporal_downsample=(False, True),
        patch=patch,
        latent_mean=mean,
        latent_std=std,
    )
    ours = load_vae(path, config)

    video = rng.uniform(-1, 1, (1, 3, 5, 16, 24)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(torch.from_numpy(video)).latent_dist.mode()
        decoded = theirs.decode(expected).sample
    expected, decoded = from_torch(expected), from_torch(decoded)
    latents = ours.denormalise(run(ours, "encode", from_torch(video)))
    # Sums of up to 27 x 12 float32 products, in another order; values of order one.
    assert largest_difference(latents, expected) < LATENT_TOLERANCE
    result = run(ours, "decode", ours.normalise(expected))
    # diffusers clamps inside its decoder.
    assert largest_difference(jnp.clip(result, -1, 1), decoded) < VIDEO_TOLERANCE


def test_sides_that_do_not_divide_are_refused(vae):
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(jnp.zeros((1, 1, 20, 16, 3)))


def test_config_with_wrong_statistics_is_refused():
    with pytest.raises(ValueError, match="z_dim 4"):
        VAEConfig(z_dim=4)


def test_autoencoders_that_were_read_share_programs_whatever_their_latents(tmp_path):
    """What was measured is an argument: a constant is compiled anew for each."""

    small = dict(base_dim=2, z_dim=16, dim_mult=(1,), temporal_downsample=())
    small = VAEConfig(**small, num_res_blocks=1)
    drawn = new_model(describe(WanVAE, small), 0)

    def read(scale):
        measured = dict(latent_mean=(0.3 * scale,) * 16, latent_std=(scale,) * 16)
        told = {"vae": describe(WanVAE, dataclasses.replace(small, **measured))}
        save_bundle(tmp_path / f"{scale}", Bundle({"vae": drawn}, told))
        opened = load_bundle(tmp_path / f"{scale}")
        return computing_in(opened, "vae", "float32").modules["vae"]

    x = jnp.linspace(-2, 2, 32).reshape(1, 1, 1, 2, 16)
    there = jax.jit(lambda vae, x: vae.normalise(x))
    back = jax.jit(lambda vae, x: vae.denormalise(x))
    one, two = map(read, (1.0, 3.0))
    np.testing.assert_allclose(there(two, x), (x - 0.9) / 3, rtol=1e-6, atol=1e-7)
    for program in (there, back):
        texts = [program.lower(vae, x).as_text() for vae in (one, two)]
        assert texts[0] == texts[1]
    assert parameters(one).keys() == parameters(drawn).keys()
