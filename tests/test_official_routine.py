"""The whole official image-to-video routine, from picture and token ids to the video.

Our networks, solver and guidance against the official code's records of every stage,
then the same weights through diffusers' and transformers' classes. Tolerances are the
golden's: 3 to 10 times what two exact implementations differ by, grown by four steps
under a guidance of 5.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from safetensors.numpy import load_file, save_file
from test_clip_vision import transformers_tensors
from test_convert import diffusers_vae_name
from test_umt5 import transformers_name
from transformers import CLIPVisionConfig as TheirCLIPConfig
from transformers import CLIPVisionModel, UMT5EncoderModel
from transformers import UMT5Config as TheirUMT5Config

from cityrag_jax.convert import (
    export_dit,
    load_clip_vision,
    load_dit,
    load_umt5,
    load_vae,
)
from cityrag_jax.diffusion import unipc
from cityrag_jax.diffusion.guidance import guide, passes
from cityrag_jax.encode import (
    encode_text,
    fit_pixel_budget,
    image_to_video_conditions,
    to_unit,
)
from cityrag_jax.model.clip_vision import CLIPVisionConfig
from cityrag_jax.model.dit import DiTConfig
from cityrag_jax.model.umt5 import UMT5Config
from cityrag_jax.model.vae import VAEConfig

GOLDEN = Path(__file__).parent / "golden"
PARTS = ("dit.", "vae.", "t5.", "clip.")
FEATURES = 5e-5  # of text and picture, as the encoders' own goldens
LATENTS = 1e-4
VELOCITIES = 2e-4
VIDEO = 3e-4


@pytest.fixture
def one_torch_thread():
    """Networks this small spend their time waiting for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "e2e_i2v_tiny.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def settings(golden):
    return json.loads(str(golden["config_json"]))


@pytest.fixture(scope="module")
def weights():
    """The four networks' tensors, under their own names."""
    tensors = load_file(GOLDEN / "e2e_i2v_tiny.safetensors")
    return {
        part: {
            n.removeprefix(part): x for n, x in tensors.items() if n.startswith(part)
        }
        for part in PARTS
    }


@pytest.fixture(scope="module")
def networks(settings, weights, tmp_path_factory):
    """DiT, VAE, text encoder and image tower, loaded as published files are."""
    folder = tmp_path_factory.mktemp("weights")
    for part, tensors in weights.items():
        save_file(tensors, folder / f"{part}safetensors")
    dit, t5, clip = settings["dit"], settings["t5"], settings["clip"]
    dit_config = DiTConfig(
        **{k: dit[k] for k in ("dim", "num_heads", "num_layers", "ffn_dim")},
        in_channels=dit["in_dim"],
        freq_dim=dit["freq_dim"],
        text_dim=dit["text_dim"],
        image_dim=dit["clip_dim"],
    )
    t5_config = UMT5Config(
        vocab_size=t5["vocab_size"],
        dim=t5["dim"],
        attention_dim=t5["dim_attn"],
        num_heads=t5["num_heads"],
        ffn_dim=t5["dim_ffn"],
        num_layers=t5["encoder_layers"],
    )
    clip_config = CLIPVisionConfig(
        image_size=224,
        patch_size=14,
        dim=clip["vision_dim"],
        num_heads=clip["vision_heads"],
        mlp_dim=clip["vision_dim"] * clip["vision_mlp_ratio"],
        num_layers=clip["vision_layers"],
    )
    return (
        load_dit(folder / "dit.safetensors", dit_config),
        load_vae(
            folder / "vae.safetensors", VAEConfig(base_dim=settings["vae"]["dim"])
        ),
        load_umt5(folder / "t5.safetensors", t5_config),
        load_clip_vision(folder / "clip.safetensors", clip_config),
    )


def channels_last(x):
    return np.moveaxis(np.asarray(x), -4, -1)


def assert_close(ours, expected, tolerance):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


def solve(dit, conditions, negative_text, noise, settings):
    """Run solver and guidance, keeping every step's state and both velocities."""
    count = settings["steps"]
    weights, seen = zip(*passes("text", (settings["guide"],)), strict=True)

    @jax.jit
    def run(dit, conditions, negative_text, noise):
        def velocity(x, timestep, step, seen_so_far):
            latents = jnp.concatenate([x, conditions.first_frame], axis=-1)
            made = {}

            def velocity_of(each):
                text = negative_text if each.negative_text else conditions.text
                made[each.negative_text] = dit(
                    latents, timestep[None], text, conditions.image
                )
                return made[each.negative_text]

            guided = guide(map(velocity_of, seen), np.float32(weights))
            now = dict(x=x, conditional=made[False], unconditional=made[True])
            kept = jax.tree.map(
                lambda all, one: all.at[step].set(one), seen_so_far, now
            )
            return guided, kept

        empty = jnp.zeros((count, *noise.shape))
        state = dict(x=empty, conditional=empty, unconditional=empty)
        steps = unipc.make_steps(count, settings["shift"])
        return unipc.solve_with(velocity, noise, steps, jnp.arange(count), state)

    return run(dit, conditions, negative_text, noise)


@pytest.fixture(scope="module")
def ours(golden, settings, networks):
    """Every stage by our own stack; only ids, picture and noise are read."""
    dit, vae, t5, clip = networks
    stages = {}
    for kind in "positive", "negative":
        features = jax.jit(encode_text)(
            t5, golden[f"ids_{kind}"], golden[f"mask_{kind}"]
        )
        stages[f"text_{kind}"] = features
    image = golden["image_uint8"]
    size = fit_pixel_budget(*image.shape[:2], settings["max_area"])
    conditions = jax.jit(image_to_video_conditions, static_argnums=(4, 5))(
        vae, clip, to_unit(image), stages["text_positive"][0], size, settings["frames"]
    )
    noise = jnp.asarray(channels_last(golden["noise"]))[None]
    latents, steps = solve(dit, conditions, stages["text_negative"], noise, settings)
    video = jax.jit(lambda vae, x: jnp.clip(vae.decode(x), -1, 1))(vae, latents)
    return stages | steps | dict(size=size, conditions=conditions, video=video[0])


def test_text_features_are_cut_and_padded_with_zeros(golden, ours):
    for kind, rows in ("positive", "context_pos"), ("negative", "context_neg"):
        length = int(golden[f"mask_{kind}"].sum())
        features = ours[f"text_{kind}"]
        assert features.shape[:2] == (1, 512)
        assert_close(features[0, :length], golden[rows], FEATURES)
        np.testing.assert_array_equal(features[0, length:], 0)


def test_conditioning_of_the_picture_equals_the_official_one(golden, ours):
    """The mask exactly; latents through resampling and encoder; CLIP's features."""
    expected = channels_last(golden["y"])
    assert ours["size"] == (8 * expected.shape[1], 8 * expected.shape[2])
    made = ours["conditions"].first_frame[0]
    np.testing.assert_array_equal(made[..., :4], expected[..., :4])
    assert_close(made[..., 4:], expected[..., 4:], LATENTS)
    assert_close(ours["conditions"].image, golden["clip_fea"], FEATURES)


def test_every_step_equals_the_official_one(golden, settings, ours):
    sigmas, timesteps = unipc.schedule(settings["steps"], settings["shift"])
    np.testing.assert_array_equal(timesteps, golden["timesteps"][:, 0])
    assert len(sigmas) == settings["steps"] + 1
    for kind, name, tolerance in (
        ("x", "latents_before_step", LATENTS),
        ("conditional", "v_cond", VELOCITIES),
        ("unconditional", "v_uncond", VELOCITIES),
    ):
        assert_close(ours[kind][:, 0], channels_last(golden[name]), tolerance)


def test_the_video_equals_the_official_one(golden, ours):
    expected = channels_last(golden["video"])
    assert np.abs(expected).max() == 1  # clamped
    assert_close(ours["video"], expected, VIDEO)


def numpy_state(tensors):
    return {name: torch.from_numpy(x) for name, x in tensors.items()}


def their_text(weights, settings, ids, mask):
    t5 = settings["t5"]
    config = TheirUMT5Config(
        vocab_size=t5["vocab_size"],
        d_model=t5["dim"],
        d_kv=t5["dim_attn"] // t5["num_heads"],
        d_ff=t5["dim_ffn"],
        num_layers=t5["encoder_layers"],
        num_heads=t5["num_heads"],
        feed_forward_proj="gated-gelu",
    )
    model = UMT5EncoderModel(config).eval()
    tensors = {transformers_name(name): x for name, x in weights.items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    model.load_state_dict(numpy_state(tensors))
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
    return model(ids, attention_mask=mask).last_hidden_state * mask[..., None]


def their_image_features(weights, settings, pixels):
    clip = settings["clip"]
    config = TheirCLIPConfig(
        hidden_size=clip["vision_dim"],
        intermediate_size=clip["vision_dim"] * clip["vision_mlp_ratio"],
        num_hidden_layers=clip["vision_layers"],
        num_attention_heads=clip["vision_heads"],
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    model = CLIPVisionModel(config).eval()
    tensors = transformers_tensors(weights)
    del tensors["visual_projection.weight"]
    if not any(name.startswith("vision_model.") for name in model.state_dict()):
        tensors = {n.removeprefix("vision_model."): x for n, x in tensors.items()}
    model.load_state_dict(numpy_state(tensors))
    return model(pixels, output_hidden_states=True).hidden_states[-2]


def their_pipeline(golden, settings, weights, dit_folder, conditions):
    """Run PyTorch's classes on the official schedule; give latents and video."""
    vae_config = VAEConfig()
    vae = AutoencoderKLWan(
        base_dim=settings["vae"]["dim"],
        z_dim=16,
        latents_mean=list(vae_config.latent_mean),
        latents_std=list(vae_config.latent_std),
    ).eval()
    vae.load_state_dict(
        numpy_state({diffusers_vae_name(n): x for n, x in weights["vae."].items()})
    )
    dit = WanTransformer3DModel.from_config(
        json.loads((dit_folder / "config.json").read_text())
    ).eval()
    (file,) = dit_folder.glob("*.safetensors")
    dit.load_state_dict(numpy_state(load_file(file)))

    mean, std = (
        torch.tensor(x).view(1, 16, 1, 1, 1)
        for x in (vae_config.latent_mean, vae_config.latent_std)
    )
    first = torch.from_numpy(conditions["frame"])[None, :, None]
    frames = torch.zeros(1, 3, settings["frames"] - 1, *first.shape[-2:])
    clip = torch.cat([first, frames], dim=2)
    latents = (vae.encode(clip).latent_dist.mode() - mean) / std
    mask = torch.zeros(1, 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    y = torch.cat([mask, latents], dim=1)

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=settings["shift"],
    )
    # The official unshifted levels: diffusers 0.42.1 would space from 1 to 0.001.
    levels = np.linspace(unipc.FIRST_LEVEL, 0, settings["steps"] + 1)[:-1]
    scheduler.set_timesteps(settings["steps"], sigmas=levels)
    x = torch.from_numpy(golden["noise"])[None]
    for step in scheduler.timesteps:
        v, v_negative = (
            dit(
                hidden_states=torch.cat([x, y], dim=1),
                timestep=step[None],
                encoder_hidden_states=text,
                encoder_hidden_states_image=conditions["image"],
                return_dict=False,
            )[0]
            for text in conditions["texts"]
        )
        guided = v_negative + settings["guide"] * (v - v_negative)
        x = scheduler.step(guided, step, x, return_dict=False)[0]
    return y[0], scheduler.timesteps, vae.decode(x * std + mean).sample[0]


def test_pytorch_classes_with_the_same_weights_agree(
    golden, settings, weights, networks, ours, one_torch_thread, tmp_path
):
    """diffusers' own first-frame resize and CLIP crop differ (wan.md): ours go in."""
    export_dit(networks[0], tmp_path, "diffusers")
    with torch.no_grad():
        texts = [
            their_text(
                weights["t5."], settings, golden[f"ids_{k}"], golden[f"mask_{k}"]
            )
            for k in ("positive", "negative")
        ]
        image = torch.from_numpy(golden["image_uint8"]).permute(2, 0, 1)[None]
        image = image.float() / 127.5 - 1
        resized, square = (
            torch.nn.functional.interpolate(image, size=size, mode="bicubic")
            for size in (ours["size"], (224, 224))
        )
        channel = dict(dtype=torch.float32)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], **channel)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711], **channel)
        pixels = (square * 0.5 + 0.5 - mean[:, None, None]) / std[:, None, None]
        features = their_image_features(weights["clip."], settings, pixels)
        conditions = dict(frame=resized[0].numpy(), image=features, texts=texts)
        y, timesteps, video = their_pipeline(
            golden, settings, weights, tmp_path, conditions
        )
    np.testing.assert_array_equal(timesteps.numpy(), golden["timesteps"][:, 0])
    for kind, text in zip(("positive", "negative"), texts, strict=True):
        assert_close(ours[f"text_{kind}"], text, FEATURES)
    assert_close(ours["conditions"].image, features, FEATURES)
    assert_close(ours["conditions"].first_frame[0], channels_last(y), LATENTS)
    assert_close(ours["video"], channels_last(video), VIDEO)
