"""Adapters and LoRA files: against diffusers with PEFT, and through the tools.

diffusers reads our files and those in every naming of the community; its output is the
oracle. The transformer has no geo branch in common with it, so these are Wan's alone.
"""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_wan
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from synthetic_wan import T2V

from cityrag_jax.checkpoint import (
    Bundle,
    abstract_model,
    describe,
    latest_model,
    load_bundle,
    new_model,
    parameters,
    save_bundle,
    stacked_parameters,
    with_adapters,
    with_parameters,
)
from cityrag_jax.convert import export_dit, load_dit
from cityrag_jax.model.adapters import adapter_scales, add_adapters
from cityrag_jax.model.dit import WanDiT
from cityrag_jax.training.optimizer import label_parameters

RANK, ALPHA = 3, 1.5
LINEARS = ("blocks.self_attention.*", "blocks.cross_attention.v", "blocks.ffn.fc2")
TOOLS = Path(__file__).parents[1] / "tools"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    made = tool(name)
    return made.COMMAND.call(made.main, arguments)


def convert(source, out, *options):
    arguments = [f"--source={source}", f"--out={out}", "--dtype=float32"]
    return run("convert_wan", *arguments, "--parts=transformer", *options)


def export(*arguments):
    return run("export_wan", *arguments)


@pytest.fixture(scope="module")
def base():
    """Wan's transformer with a head that gives something."""
    description = describe(WanDiT, T2V)
    values = parameters(new_model(description, 0))
    head = values["head.linear.kernel"]
    values["head.linear.kernel"] = jax.random.normal(jax.random.key(1), head.shape)
    return with_parameters(abstract_model(description), values)


@pytest.fixture(scope="module")
def official(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "official"
    export_dit(base, folder, "official")
    return folder


@pytest.fixture(scope="module")
def hub(base, tmp_path_factory):
    """The same weights in diffusers' layout."""
    folder = tmp_path_factory.mktemp("wan") / "hub"
    export_dit(base, folder, "diffusers")
    return folder


@pytest.fixture
def peer(hub):
    import diffusers

    return diffusers.WanTransformer3DModel.from_pretrained(hub)


def draw_factors(rng, naming="diffusers"):
    """Draw factors for every second linear of the blocks, by the linear's name."""
    shapes = synthetic_wan.dit_shapes(T2V, naming)
    names = [n for n, s in sorted(shapes.items()) if len(s) == 2 and "blocks." in n]
    names = [n.removesuffix(".weight") for n in names if n.endswith(".weight")]
    chosen = {n: shapes[f"{n}.weight"] for n in names[::2]}
    return {
        name: (
            0.2 * rng.normal(size=(RANK, width)).astype(np.float32),
            0.2 * rng.normal(size=(out, RANK)).astype(np.float32),
        )
        for name, (out, width) in chosen.items()
    }


def inputs(rng):
    latents = rng.normal(size=(1, 2, 4, 6, 16)).astype(np.float32)
    text = rng.normal(size=(1, 512, T2V.text_dim)).astype(np.float32)
    return latents, np.array([321.0], np.float32), text


def ours(model, latents, timesteps, text):
    return np.asarray(nnx.jit(type(model).__call__)(model, latents, timesteps, text))


def theirs(model, latents, timesteps, text):
    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()),
            timestep=torch.from_numpy(timesteps),
            encoder_hidden_states=torch.from_numpy(text),
            return_dict=False,
        )[0]
    return out.numpy().transpose(0, 2, 3, 4, 1)


def write_community_file(path, factors, style):
    """Write the same factors as kohya, diffusers or PEFT would: official or not."""
    tensors = {}
    for name, (down, up) in factors.items():
        if style == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = np.asarray(ALPHA, np.float32)
            continue
        key, middle = {
            "diffusers": (f"transformer.{name}", ""),
            "peft": (f"base_model.model.{name}", ".default"),
            "comfy": (f"diffusion_model.{name}", ""),
        }[style]
        tensors[f"{key}.lora_A{middle}.weight"] = down
        tensors[f"{key}.lora_B{middle}.weight"] = up * np.float32(ALPHA / RANK)
    save_file(tensors, path)


@pytest.mark.parametrize("style", ["kohya", "diffusers", "peft", "comfy"])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_files_of_the_community_merge_as_in_diffusers(
    official, hub, peer, tmp_path, rng, style, layout
):
    names = "official" if style in ("kohya", "comfy") else "diffusers"
    factors = draw_factors(rng, names)
    path = tmp_path / "style.safetensors"
    write_community_file(path, factors, style)
    source = official if layout == "official" else hub
    assert convert(source, tmp_path / "out", f"--lora={path}:0.7") == 0
    merged = load_dit_alone(tmp_path / "out")

    table = dict(zip(draw_order("official"), draw_order("diffusers"), strict=True))
    state = dict(peer.named_parameters())
    with torch.no_grad():
        for name, (down, up) in factors.items():
            name = name if names == "diffusers" else table[name]
            state[f"{name}.weight"] += torch.from_numpy(
                np.float32(0.7 * ALPHA / RANK) * (up @ down)
            )
    given = inputs(rng)
    expected = theirs(peer, *given)
    # Float32, another order of sums: as the base itself differs (test_dit).
    np.testing.assert_allclose(ours(merged, *given), expected, atol=5e-5)


def draw_order(naming):
    """List modules in an order that is the same in both namings."""
    from cityrag_jax.convert.names import DIT_MODULES, NAMINGS

    return [
        names[NAMINGS.index(naming)].replace("{i}", str(layer))
        for names in DIT_MODULES.values()
        for layer in range(T2V.num_layers)
    ]


def load_dit_alone(folder):
    """Take the base out of a converted model: its branches are drawn anew."""
    whole = parameters(latest_model(folder).modules["transformer"])
    base = abstract_model(describe(WanDiT, T2V))
    return with_parameters(base, {n: whole[n] for n in parameters(base)})


def test_our_file_gives_in_diffusers_what_our_adapters_give(base, peer, tmp_path, rng):
    model = adapted(base, rng)
    folder = tmp_path / "ours"
    save_bundle(folder, Bundle({"transformer": model}, {"transformer": DESCRIPTION}))
    given = inputs(rng)
    expected = ours(model, *given)
    assert np.abs(expected - theirs(peer, *given)).max() > 0.01  # it does something

    file = tmp_path / "lora.safetensors"
    arguments = f"--checkpoint={folder}", f"--out={file}"
    export(*arguments, "--naming=diffusers", "--lora")
    peer.load_lora_adapter(load_torch(file), prefix="transformer")
    np.testing.assert_allclose(theirs(peer, *given), expected, atol=5e-5)
    peer.unload_lora()

    # The official naming, through diffusers' own translation of such files.
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_wan_lora_to_diffusers as translate,
    )

    official = tmp_path / "official.safetensors"
    arguments = f"--checkpoint={folder}", f"--out={official}"
    export(*arguments, "--naming=official", "--lora")
    peer.load_lora_adapter(translate(load_torch(official)), prefix="transformer")
    np.testing.assert_allclose(theirs(peer, *given), expected, atol=5e-5)


def test_an_export_merges_adapters(base, tmp_path, rng):
    model = adapted(base, rng)
    folder, out = tmp_path / "ours", tmp_path / "out"
    save_bundle(folder, Bundle({"transformer": model}, {"transformer": DESCRIPTION}))
    export(f"--checkpoint={folder}", f"--out={out}", "--naming=official")
    merged = load_dit(out, T2V)
    given = inputs(rng)
    expected = ours(model, *given)
    np.testing.assert_allclose(ours(merged, *given), expected, atol=5e-5)


DESCRIPTION = with_adapters(
    describe(WanDiT, T2V),
    add_adapters,
    linears=list(LINEARS),
    rank=RANK,
    alpha=ALPHA,
)


def adapted(base, rng):
    """Give a model with adapters whose second factors are no longer zero."""
    values = parameters(new_model(DESCRIPTION, 0)) | parameters(base)
    for name, x in values.items():
        if name.endswith(".adapter.up"):
            values[name] = jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32)
    return with_parameters(abstract_model(DESCRIPTION), values)


def load_torch(path):
    return {name: torch.from_numpy(x) for name, x in load_file(path).items()}


def test_new_adapters_change_nothing_and_come_back_from_disk(base, tmp_path, rng):
    fresh = parameters(new_model(DESCRIPTION, 0)) | parameters(base)
    model = with_parameters(abstract_model(DESCRIPTION), fresh)
    given = inputs(rng)
    np.testing.assert_array_equal(ours(model, *given), ours(base, *given))
    model = adapted(base, rng)
    bundle = Bundle({"transformer": model}, {"transformer": DESCRIPTION})
    save_bundle(tmp_path / "m", bundle)
    again = load_bundle(tmp_path / "m").modules["transformer"]
    np.testing.assert_array_equal(ours(again, *given), ours(model, *given))
    assert set(adapter_scales(again).values()) == {ALPHA / RANK}


def test_whole_differences_of_weights_biases_and_norms_merge(official, tmp_path, rng):
    base = load_base(official)
    name = "diffusion_model.blocks.1.self_attn"
    tensors = {
        f"{name}.q.diff": rng.normal(size=(48, 48)).astype(np.float32),
        f"{name}.q.diff_b": rng.normal(size=48).astype(np.float32),
        f"{name}.norm_k.diff": rng.normal(size=48).astype(np.float32),
    }
    save_file(tensors, tmp_path / "whole.safetensors")
    assert (
        convert(official, tmp_path / "out", f"--lora={tmp_path}/whole.safetensors") == 0
    )
    changed = parameters(load_dit_alone(tmp_path / "out"))
    expected = {
        "kernel": ("q.kernel", tensors[f"{name}.q.diff"].T),
        "bias": ("q.bias", tensors[f"{name}.q.diff_b"]),
        "norm": ("norm_k.scale", tensors[f"{name}.norm_k.diff"]),
    }
    for ours_name, difference in expected.values():
        path = f"blocks.self_attention.{ours_name}"
        np.testing.assert_allclose(
            changed[path][1] - base[path][1], difference, atol=1e-6
        )
        np.testing.assert_array_equal(changed[path][0], base[path][0])
        base.pop(path)
    for path, x in base.items():
        np.testing.assert_array_equal(changed[path], x)


def load_base(folder):
    return parameters(load_dit(folder, T2V))


def test_the_geo_branch_begins_as_a_copy_of_the_merged_base(official, tmp_path, rng):
    write_community_file(
        tmp_path / "a.safetensors", draw_factors(rng, "official"), "comfy"
    )
    assert convert(official, tmp_path / "out", f"--lora={tmp_path}/a.safetensors") == 0
    values = parameters(latest_model(tmp_path / "out").modules["transformer"])
    for part in "qkv":
        copied = values[f"branches.1.layers.attention.{part}.kernel"]
        np.testing.assert_array_equal(
            copied, values[f"blocks.self_attention.{part}.kernel"]
        )


def test_two_files_add_up_and_strength_counts(official, tmp_path, rng):
    factors = draw_factors(rng, "official")
    path = tmp_path / "a.safetensors"
    write_community_file(path, factors, "comfy")
    assert convert(official, tmp_path / "once", f"--lora={path}:1.5") == 0
    twice = f"--lora={path}:2", f"--lora={path}:-0.5"
    assert convert(official, tmp_path / "twice", *twice) == 0
    once, twice = (
        parameters(latest_model(tmp_path / n).modules["transformer"])
        for n in ("once", "twice")
    )
    for name, x in once.items():
        np.testing.assert_allclose(twice[name], x, atol=2e-5)
    source = load_bundle(tmp_path / "once").source
    assert source["loras"] == {"a.safetensors": 1.5}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"diffusion_model.blocks.9.ffn.0.lora_A.weight": (2, 48)}, "does not have"),
        ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": (2, 48)}, "only one of"),
        (
            {
                "diffusion_model.blocks.0.ffn.0.lora_A.weight": (2, 32),
                "diffusion_model.blocks.0.ffn.0.lora_B.weight": (64, 2),
            },
            r"is \(64, 48\) in the base, the file changes \(64, 32\)",
        ),
        ({"blocks.0.ffn.0.hada_w1_a": (2, 2)}, "no LoRA of linear maps"),
        ({"diffusion_model.blocks.0.ffn.0.diff_b": (3,)}, r"is \(64,\) in the base"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    official, tmp_path, capsys, tensors, message
):
    path = tmp_path / "bad.safetensors"
    save_file({n: np.zeros(s, np.float32) for n, s in tensors.items()}, path)
    assert convert(official, tmp_path / "out", f"--lora={path}") == 2
    assert not list(tmp_path.glob("out")) and not list(tmp_path.glob(".out*"))
    error = capsys.readouterr().err
    assert "bad.safetensors" in error
    assert re.search(message, error), error


def test_adapters_are_trained_while_their_base_is_frozen():
    model = new_model(DESCRIPTION, 0)
    labels = label_parameters(parameters(model), ("blocks.*",))
    mark = ".adapter."
    assert {labels[n] for n in labels if mark in n} == {"adam"}
    assert {labels[n] for n in labels if n.startswith("blocks.") and mark not in n} == {
        "frozen"
    }
    stacked = stacked_parameters(model)
    assert all(n in stacked for n in labels if mark in n)


def test_adapters_name_linears_that_exist_once():
    with pytest.raises(ValueError, match="fits none; paths are like blocks.cross"):
        with_new_adapters(("blocks.attention.*",))
    with pytest.raises(ValueError, match="has an adapter already"):
        with_new_adapters(("blocks.ffn.fc1",), ("blocks.ffn.*",))
    with pytest.raises(ValueError, match="rank is 0"):
        with_new_adapters(("blocks.ffn.fc1",), rank=0)


def with_new_adapters(*groups, rank=2):
    def build():
        model = WanDiT(T2V, rngs=nnx.Rngs(0))
        for linears in groups:
            add_adapters(model, linears, rank, 1.0, rngs=nnx.Rngs(1))
        return model

    return jax.eval_shape(lambda: parameters(build()))
