"""Checkpoints survive the way to us and back, and PyTorch's classes open them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cityrag_jax.convert import export_dit, load_dit, load_vae
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.vae import VAEConfig
from cityrag_jax.parallel import make_mesh

GOLDEN = Path(__file__).parent / "golden"
I2V_FILE = GOLDEN / "dit_i2v_tiny.safetensors"
T2V_FILE = GOLDEN / "dit_t2v_tiny.safetensors"
I2V = DiTConfig(
    dim=96,
    num_heads=3,
    num_layers=3,
    ffn_dim=160,
    in_channels=36,
    freq_dim=64,
    text_dim=48,
    image_dim=40,
)
T2V = DiTConfig(
    dim=80,
    num_heads=2,
    num_layers=2,
    ffn_dim=144,
    in_channels=16,
    freq_dim=64,
    text_dim=48,
)
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


def read_all(path):
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def parameters(model):
    return {
        ".".join(map(str, path)): np.asarray(param[...])
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


@pytest.mark.parametrize(
    ("file", "config"), [(I2V_FILE, I2V), (T2V_FILE, T2V)], ids=["i2v", "t2v"]
)
def test_official_to_ours_to_official_is_bit_exact(file, config, tmp_path):
    path = tmp_path / "out.safetensors"
    export_dit(load_dit(file, config), path, "official")
    assert_same_tensors(load_file(path), load_file(file))


def test_official_to_diffusers_and_back_through_ours_is_bit_exact(tmp_path):
    """The second load must tell diffusers' names apart by itself."""
    folder, path = tmp_path / "diffusers", tmp_path / "back.safetensors"
    export_dit(load_dit(I2V_FILE, I2V), folder, "diffusers")
    assert "condition_embedder.time_proj.weight" in read_all(folder)
    export_dit(load_dit(folder, I2V), path, "official")
    assert_same_tensors(load_file(path), load_file(I2V_FILE))


def test_shards_hold_the_same_tensors_as_one_file(tmp_path):
    """A folder and its index are both accepted, and the index lists every tensor."""
    folder = tmp_path / "sharded"
    export_dit(load_dit(I2V_FILE, I2V), folder, max_shard_bytes=300_000)
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    expected = load_file(I2V_FILE)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    count = len(list(folder.glob("*.safetensors")))
    assert count > 3
    first = folder / f"diffusion_pytorch_model-00001-of-{count:05d}.safetensors"
    assert first.exists()
    assert_same_tensors(read_all(folder), expected)
    for source in folder, index_file:
        loaded = parameters(load_dit(source, I2V))
        assert_same_tensors(loaded, parameters(load_dit(I2V_FILE, I2V)))


def test_bfloat16_stays_bfloat16_on_the_way_out_and_in(tmp_path):
    path = tmp_path / "half.safetensors"
    half = load_dit(T2V_FILE, T2V, dtype=jnp.bfloat16)
    assert {p.dtype for p in parameters(half).values()} == {np.dtype(jnp.bfloat16)}
    export_dit(half, path, "diffusers")
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("proj_out.weight").dtype == torch.bfloat16
    again = load_dit(path, T2V, dtype=jnp.bfloat16)
    assert_same_tensors(parameters(again), parameters(half))
    wide = parameters(load_dit(path, T2V))["head.linear.kernel"]
    expected = load_file(T2V_FILE)["head.head.weight"].T
    np.testing.assert_array_equal(wide, expected.astype(ml_dtypes.bfloat16))


def test_branches_are_left_out_of_an_export(tmp_path):
    class Extra(nnx.Module):
        condition = "pose"

        def __init__(self):
            self.weight = nnx.Param(jnp.ones(3), axes=(None,))

    model = load_dit(T2V_FILE, T2V)
    model.branches = nnx.data((Extra(),))
    export_dit(model, tmp_path / "out.safetensors")
    assert_same_tensors(load_file(tmp_path / "out.safetensors"), load_file(T2V_FILE))


def randomise(model, seed):
    """Give every parameter random values, so that a term left out or swapped shows."""
    rng = np.random.default_rng(seed)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = rng.normal(size=param.shape).astype(np.float32)
        scale = 0.3 if "kernel" not in path else param.shape[-2] ** -0.5
        offset = 1.0 if "scale" in path else 0.0
        param.set_value(jnp.asarray(offset + scale * noise))


@pytest.mark.parametrize("image_dim", [20, None], ids=["i2v", "t2v"])
def test_diffusers_opens_an_export_and_computes_the_same(image_dim, tmp_path, rng):
    """A strict load under the exported config.json, with the image cross-attention."""
    config = dataclasses.replace(
        SMALL, image_dim=image_dim, in_channels=16 if image_dim is None else 36
    )
    model = WanDiT(config, rngs=nnx.Rngs(0))
    randomise(model, seed=1)
    export_dit(model, tmp_path / "model", "diffusers")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    theirs = WanTransformer3DModel.from_config(settings)
    weights = read_all(tmp_path / "model")
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})

    latents = rng.normal(size=(2, 3, 6, 8, config.in_channels)).astype(np.float32)
    timesteps = np.array([37.0, 911.0], np.float32)
    text = rng.normal(size=(2, 512, 24)).astype(np.float32)
    image = None
    if image_dim is not None:
        image = rng.normal(size=(2, 257, image_dim)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(
            hidden_states=torch.from_numpy(
                rearrange(latents, "B t h w C -> B C t h w")
            ),
            timestep=torch.from_numpy(timesteps),
            encoder_hidden_states=torch.from_numpy(text),
            encoder_hidden_states_image=None
            if image is None
            else torch.from_numpy(image),
            return_dict=False,
        )[0]
    inputs = [None if x is None else jnp.asarray(x) for x in (latents, timesteps, text)]
    velocity = model(*inputs, None if image is None else jnp.asarray(image))
    expected = rearrange(expected.numpy(), "B C t h w -> B t h w C")
    # diffusers takes timestep angles in float32: 1e-5 at timestep 911, grown by
    # two blocks; wan.md reports 2e-5 for the goldens.
    np.testing.assert_allclose(velocity, expected, atol=5e-5)


def test_unused_norm_added_q_of_published_checkpoints_is_ignored(tmp_path):
    path = tmp_path / "model.safetensors"
    export_dit(load_dit(I2V_FILE, I2V), path, "diffusers")
    tensors = load_file(path)
    for layer in range(I2V.num_layers):
        name = f"blocks.{layer}.attn2.norm_added_q.weight"
        tensors[name] = np.ones(I2V.dim, np.float32)
    save_file(tensors, path)
    assert_same_tensors(
        parameters(load_dit(path, I2V)), parameters(load_dit(I2V_FILE, I2V))
    )


def test_all_mismatches_are_reported_in_one_error(tmp_path):
    tensors = load_file(I2V_FILE)
    del tensors["blocks.1.self_attn.q.weight"], tensors["head.modulation"]
    tensors["lora.down"] = np.zeros((4, 2), np.float32)
    tensors["blocks.2.ffn.0.bias"] = np.zeros(7, np.float32)
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        load_dit(path, I2V)
    message = str(caught.value)
    for part in (
        str(path),
        "4 tensors",
        "missing: blocks.1.self_attn.q.weight (96, 96)",
        "missing: head.modulation (1, 2, 96)",
        "unexpected: lora.down (4, 2)",
        "wrong shape: blocks.2.ffn.0.bias is (7,), the config wants (160,)",
    ):
        assert part in message


def test_another_config_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match="unexpected: blocks.2.norm3.weight"):
        load_dit(I2V_FILE, dataclasses.replace(I2V, num_layers=2))
    with pytest.raises(
        ValueError, match=r"is \(160, 96\), the config wants \(128, 96\)"
    ):
        load_dit(I2V_FILE, dataclasses.replace(I2V, ffn_dim=128))


def test_a_path_that_holds_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_dit(tmp_path / "nothing", I2V)
    with pytest.raises(ValueError, match="it has none"):
        load_dit(tmp_path, I2V)
    pickle = tmp_path / "Wan2.1_VAE.pth"
    pickle.write_bytes(b"\x80\x02not safetensors")
    with pytest.raises(ValueError, match="Wan2.1_VAE.pth is refused"):
        load_vae(pickle, VAEConfig())


def test_a_shard_that_is_missing_is_named(tmp_path):
    export_dit(load_dit(T2V_FILE, T2V), tmp_path, max_shard_bytes=300_000)
    lost = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(ValueError, match=lost.name):
        load_dit(tmp_path, T2V)


def test_an_export_does_not_mix_with_an_older_one(tmp_path):
    model = load_dit(T2V_FILE, T2V)
    export_dit(model, tmp_path)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        export_dit(model, tmp_path, max_shard_bytes=300_000)
    with pytest.raises(ValueError, match="official, diffusers"):
        export_dit(model, tmp_path / "new", naming="torch")


def test_a_mesh_gets_its_shards_with_the_same_values():
    mesh = make_mesh(fsdp=8)
    sharded = load_dit(I2V_FILE, I2V, mesh=mesh)
    kernel = sharded.blocks.self_attention.q.kernel[...]
    assert len(kernel.sharding.device_set) == len(jax.devices())
    assert not kernel.sharding.is_fully_replicated
    assert_same_tensors(parameters(sharded), parameters(load_dit(I2V_FILE, I2V)))


def test_official_autoencoder_and_its_diffusers_twin_load_alike(tmp_path):
    """The twin's keys are rewritten as text, independently of our table."""
    official = load_file(GOLDEN / "vae_tiny.safetensors")
    twin = {diffusers_vae_name(name): value for name, value in official.items()}
    path = tmp_path / "vae.safetensors"
    save_file(twin, path)
    config = VAEConfig(base_dim=8)
    assert_same_tensors(
        parameters(load_vae(path, config)),
        parameters(load_vae(GOLDEN / "vae_tiny.safetensors", config)),
    )


def diffusers_vae_name(name):
    """Rename an official key of the autoencoder as diffusers does."""
    if name.startswith("conv1.") or name.startswith("conv2."):
        return name.replace("conv1", "quant_conv").replace("conv2", "post_quant_conv")
    half, kind, *rest = name.split(".")
    ends = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
    if kind == "conv1":
        return ".".join([half, ends[kind], *rest])
    if kind == "head":
        return ".".join([half, ends[f"head.{rest[0]}"], *rest[1:]])
    index, *rest = rest
    if kind == "middle":
        group = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[index]
        place = f"mid_block.{group}"
    elif kind == "downsamples":
        place = f"down_blocks.{index}"
    else:
        block, inner = divmod(int(index), 4)
        inner = "upsamplers.0" if inner == 3 else f"resnets.{inner}"
        place = f"up_blocks.{block}.{inner}"
    rest = ".".join(rest).replace("shortcut", "conv_shortcut")
    for old, new in (
        ("residual.0", "norm1"),
        ("residual.2", "conv1"),
        ("residual.3", "norm2"),
        ("residual.6", "conv2"),
    ):
        rest = rest.replace(old, new)
    return f"{half}.{place}.{rest}"
