"""The converter: everything published comes across exactly, bad input leaves nothing.

The published files are too large for tests: `synthetic_wan` writes checkpoints of their
exact layouts at small widths.
"""

import dataclasses
import importlib.util
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import synthetic_wan
import torch
from compilation import SAME_BITS
from safetensors.numpy import load_file, save_file
from synthetic_wan import CLIP, DIT, VAE
from test_tokenizer import train_tokenizer

from cityrag_jax import checkpoint
from cityrag_jax.batch import Conditions
from cityrag_jax.checkpoint import latest_model, load_bundle, new_model, parameters
from cityrag_jax.checkpoint.items import write_item
from cityrag_jax.convert import (
    bundle,
    export_checkpoint,
    load_clip_vision,
    load_dit,
    load_vae,
)
from cityrag_jax.convert.files import CheckpointReader
from cityrag_jax.convert.prompt import encode_prompts
from cityrag_jax.convert.source import read_vae_config
from cityrag_jax.model.dit import DiTConfig
from cityrag_jax.model.geo_branch import copy_from_base
from cityrag_jax.model.vae import VAEConfig
from cityrag_jax.parallel import make_mesh

NETWORKS = "transformer,vae,clip"
ONE = ("--parts=transformer",)
TOOL = Path(__file__).parents[1] / "tools" / "convert_wan.py"
UMT5 = Path(__file__).parent / "golden" / "umt5_tiny.safetensors"


def _import_tool():
    spec = importlib.util.spec_from_file_location("convert_wan", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _import_tool()


def test_a_pickle_reads_like_the_same_safetensors(tmp_path, rng):
    tensors = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=(2, 5)).astype(ml_dtypes.bfloat16),
        "c": rng.normal(size=7).astype(np.float16),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    as_torch = {n: torch.from_numpy(x.astype(np.float32)) for n, x in tensors.items()}
    as_torch["b"] = as_torch["b"].bfloat16()
    as_torch["c"] = as_torch["c"].half()
    torch.save(as_torch, tmp_path / "m.pth")
    torch.save(as_torch, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "m.pth", "old.pth"):
        reader = CheckpointReader(tmp_path / name)
        assert reader.names() == tensors.keys()
        for tensor, x in tensors.items():
            assert reader.shape(tensor) == x.shape
            assert reader.dtype(tensor) == x.dtype.name
            assert reader.read(tensor).dtype == x.dtype
            np.testing.assert_array_equal(reader.read(tensor), x)
        rows = np.array([2, 0, 2])
        np.testing.assert_array_equal(reader.read_rows("a", rows), tensors["a"][rows])


class Code:
    """What an attacker would put into a pickle."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


def test_a_pickle_that_carries_code_is_refused_and_its_code_not_run(tmp_path):
    victim = tmp_path / "written_by_the_pickle"
    torch.save({"a": torch.zeros(2), "b": Code(victim)}, tmp_path / "new.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Code(victim)}))
    for name in ("new.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} is refused"):
            CheckpointReader(tmp_path / name)
    assert not victim.exists()


def test_a_pickle_that_is_cut_or_holds_other_things_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2), "steps": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other things than tensors .*steps"):
        CheckpointReader(tmp_path / "other.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.pth is"):
        CheckpointReader(tmp_path / "cut.pth")


def convert(source, out, *options):
    """Run the tool in this process, without the text encoder unless asked."""
    parts = [] if any("--parts" in o for o in options) else ["--parts=" + NETWORKS]
    return run(f"--source={source}", f"--out={out}", *parts, *options)


def run(*arguments):
    return tool.COMMAND.call(tool.main, arguments)


def load(out, name, **kinds):
    return latest_model(out, **kinds).modules[name]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return synthetic_wan.write_official(tmp_path_factory.mktemp("wan") / "official")


@pytest.fixture(scope="module")
def converted(official):
    """The official folder in float32."""
    out = official.parent / "converted"
    assert convert(official, out, "--dtype=float32") == 0
    return out


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), name)


def test_every_network_is_what_the_plain_loaders_read(official, converted):
    """Bit for bit; the loaders are proved on numbers of the official code."""
    base = parameters(load_dit(official, DIT))
    whole = parameters(load(converted, "transformer"))
    assert_same(base, {n: x for n, x in whole.items() if not n.startswith("branches.")})
    vae = load_vae(official / synthetic_wan.VAE_FILE, VAE)
    assert_same(parameters(vae), parameters(load(converted, "vae")))
    clip = load_clip_vision(official / synthetic_wan.CLIP_FILE, CLIP)
    assert_same(parameters(clip), parameters(load(converted, "clip")))


def test_a_converted_transformer_computes_what_the_plain_one_does(official, converted):
    """New branches add exactly nothing, whatever their conditions are."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (1, 3, 4, 4)
    latents = jax.random.normal(keys[0], (*shape, 36))
    text = jax.random.normal(keys[1], (1, 7, 24))
    image = jax.random.normal(keys[2], (1, 257, 80))
    conditions = Conditions(
        text=text,
        first_frame=latents[..., 16:],
        geo_latents=jax.random.normal(keys[3], (*shape, 16)),
        geo_length=jnp.array([3]),
        keep_geo=jnp.ones(1),
        poses=jax.random.normal(keys[4], (1, 9, 4, 4)),
        keep_pose=jnp.ones(1),
    )

    @partial(jax.jit, compiler_options=SAME_BITS)
    def run(model):
        prepared = model.prepare(conditions)
        return model(latents, jnp.array([500.0]), text, image, prepared)

    model = load(converted, "transformer", dtype=jnp.float32)
    wanted = run(load_dit(official, DIT))
    # Two programs: sums may be taken in another order.
    np.testing.assert_allclose(run(model), wanted, atol=1e-5, rtol=1e-5)


def test_a_bundle_describes_itself(official, converted):
    bundle = load_bundle(converted)
    sizes = {n: checkpoint.read_config(d) for n, d in bundle.descriptions.items()}
    kinds = dict(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    for name, config in (("transformer", DIT), ("vae", VAE), ("clip", CLIP)):
        wanted = dataclasses.replace(config, **kinds)
        assert dataclasses.asdict(sizes[name]) == dataclasses.asdict(wanted)
    assert bundle.licence == "Apache-2.0"
    assert bundle.source["layout"] == "official"
    assert bundle.source["branches"] == {"geo": "initialised", "pose": "initialised"}
    assert synthetic_wan.VAE_FILE in bundle.source["files"]
    for path in converted.rglob("*"):
        if path.is_file():
            assert str(official.parent).encode() not in path.read_bytes(), path


@pytest.mark.long
def test_branches_start_as_training_would_start_them(converted):
    """Drawn from the seed, then the geo branch copied from the base."""
    bundle = load_bundle(converted)
    model = bundle.modules["transformer"]
    drawn = new_model(bundle.descriptions["transformer"], seed=0)
    base = {n: x for n, x in parameters(model).items() if "branches" not in n}
    start = checkpoint.with_parameters(drawn, parameters(drawn) | base)
    copy_from_base(start.branches[1], start)
    # Drawn under jit together or apart: the same numbers but for the last bit.
    for name, x in parameters(start).items():
        stored = np.asarray(parameters(model)[name])
        np.testing.assert_allclose(stored, np.asarray(x), rtol=1e-6, err_msg=name)
    assert not np.any(parameters(model)["branches.0.projection.kernel"])
    assert not np.any(parameters(model)["branches.1.layers.attention.o.kernel"])


@pytest.mark.long
def test_both_layouts_and_types_convert_to_the_same(official, converted, tmp_path):
    """Exported to diffusers' names and back; as bfloat16 everything is rounded once."""
    source = tmp_path / "w"
    synthetic_wan.write_dit(source, dtype="bfloat16")
    assert convert(source, tmp_path / "bf16", *ONE, "--dtype=bfloat16") == 0
    low = parameters(load(tmp_path / "bf16", "transformer"))
    full = parameters(load(converted, "transformer"))
    for name, x in low.items():
        assert x.dtype == jnp.bfloat16
        wanted = full[name].astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(wanted), name)
    exported = tmp_path / "diffusers"
    export_checkpoint(converted, exported / "transformer", "diffusers", base_only=True)
    options = (*ONE, "--dtype=float32")
    assert convert(exported, tmp_path / "d", *options) == 0
    assert_same(full, parameters(load(tmp_path / "d", "transformer")))
    # The transformer's folder alone will do.
    assert convert(exported / "transformer", tmp_path / "e", *ONE, "--dry-run") == 0


def test_the_diffusers_layout_is_what_the_plain_loaders_read(tmp_path):
    source = synthetic_wan.write_diffusers(tmp_path / "w")
    assert convert(source, tmp_path / "out", "--dtype=float32") == 0
    base = parameters(load_dit(source / "transformer", DIT))
    whole = parameters(load(tmp_path / "out", "transformer"))
    assert_same(base, {n: x for n, x in whole.items() if not n.startswith("branches.")})
    vae = parameters(load_vae(source / "vae", VAE))
    assert_same(vae, parameters(load(tmp_path / "out", "vae")))
    clip = parameters(load_clip_vision(source / "image_encoder", CLIP))
    assert_same(clip, parameters(load(tmp_path / "out", "clip")))


def test_text_to_video_converts_without_clip(tmp_path):
    config = synthetic_wan.T2V
    source = synthetic_wan.write_official(tmp_path / "w", config)
    assert convert(source, tmp_path / "out", "--parts=transformer,vae") == 0
    bundle = load_bundle(tmp_path / "out")
    assert sorted(bundle.modules) == ["transformer", "vae"]
    assert bundle.modules["transformer"].config.image_dim is None


def test_trained_branches_in_the_source_are_read(tmp_path):
    branches = synthetic_wan.BRANCHES
    synthetic_wan.write_dit(tmp_path / "w", branches=branches)
    options = ("--dtype=float32", "--parts=transformer")
    assert convert(tmp_path / "w", tmp_path / "out", *options) == 0
    values = parameters(load(tmp_path / "out", "transformer"))
    shape = values["branches.1.layers.attention.o.bias"].shape[1:]
    np.testing.assert_array_equal(
        values["branches.1.layers.attention.o.bias"][1],
        synthetic_wan.value("geo.blocks.1.attn.o.bias", shape),
    )
    assert values["branches.0.conv.kernel"].shape == (64, 12)
    assert np.any(values["branches.0.projection.kernel"])


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 4, 2), (2, 4, 1)])
def test_it_restores_onto_any_mesh(converted, sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    plain = parameters(load(converted, "transformer"))
    sharded = parameters(load(converted, "transformer", mesh=mesh))
    assert_same(plain, sharded)
    kernel = sharded["blocks.ffn.fc1.kernel"]
    assert len(kernel.sharding.device_set) == math.prod(sizes)
    assert kernel.sharding.shard_shape(kernel.shape)[1] == 48 // sizes[1]


def test_the_table_says_what_was_read_and_what_should_have_been(
    official, tmp_path, capsys
):
    assert convert(official, tmp_path / "out", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())
    assert convert(official, tmp_path / "out", "--check") == 0
    done = capsys.readouterr().out
    assert "Every digest fits" in done
    count = sum(
        math.prod(s) for s in synthetic_wan.dit_shapes(DIT, "official").values()
    )
    for said in (plan, done):
        rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
        assert rows["transformer"][2:4] == [f"{count:,}"] * 2
        assert rows["vae"][2] == rows["vae"][3]
        assert rows["clip"][2] == rows["clip"][3]
    assert "geo branch" in done and "pose branch" in done


def test_an_existing_folder_is_checked_only(converted, tmp_path, capsys):
    assert run("--check", f"--out={converted}") == 0
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    digests = json.loads((copy / "vae" / "digests.json").read_text())
    digests["rest"]["quant_conv.bias"] += 1
    (copy / "vae" / "digests.json").write_text(json.dumps(digests))
    assert run("--check", f"--out={copy}") == 2
    assert "quant_conv.bias" in capsys.readouterr().err


def test_what_is_converted_already_is_said_and_left_alone(official, converted, capsys):
    assert convert(official, converted, "--dtype=float32") == 0
    assert "nothing is to do" in capsys.readouterr().out
    assert convert(official, converted) == 2
    assert "exists; delete it or choose another name" in capsys.readouterr().err


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def test_it_goes_on_after_a_kill(official, converted, tmp_path, monkeypatch):
    """With what is finished; another option or source is refused by both values."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    written = []

    def write(path, arrays, **kinds):
        if len(written) == 2:
            path.mkdir()
            raise Killed
        written.append(path)
        return write_item(path, arrays, **kinds)

    monkeypatch.setattr(bundle, "write_item", write)
    with pytest.raises(Killed):
        convert(official, out, *ONE, "--dtype=float32")
    assert [p.name for p in tmp_path.iterdir()] == [partial.name]
    finished = {p: p.stat().st_mtime_ns for p in partial.rglob("*/block_000/state/d/*")}
    assert finished
    monkeypatch.undo()
    assert convert(official, out, *ONE, "--dtype=bfloat16") == 2
    assert convert(official, out, *ONE, "--dtype=float32") == 0
    for path, written_at in finished.items():
        assert (out / path.relative_to(partial)).stat().st_mtime_ns == written_at
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_same(
        parameters(load(out, "transformer", verify=True)),
        parameters(load(converted, "transformer")),
    )


def test_another_option_or_source_is_not_mixed_in(
    official, tmp_path, monkeypatch, capsys
):
    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(bundle, "write_item", killed)
    with pytest.raises(Killed):
        convert(official, tmp_path / "out", *ONE, "--dtype=float32")
    assert convert(official, tmp_path / "out", *ONE, "--dtype=bfloat16") == 2
    error = capsys.readouterr().err
    assert "dtype: float32 then, bfloat16 now" in error
    assert "Delete it" in error and ".out.partial" in error


# Bad input: what is done to a copy of the official folder, and what must be said.


def cut_shard(folder):
    path = folder / "diffusion_pytorch_model-00002-of-00010.safetensors"
    path = path if path.exists() else sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    return [f"{path} is not a whole safetensors file"]


def lose_shards(folder):
    lost = sorted(folder.glob("*.safetensors"))[1:3]
    for path in lost:
        path.unlink()
    return [f"{path} is missing" for path in lost]


def change_names(folder):
    rewrite(folder, {"head.head.bias": None}, {"blocks.7.norm3.bias": np.zeros(48)})
    return ["missing: head.head.bias (64,)", "unexpected: blocks.7.norm3.bias (48,)"]


def change_shapes(folder):
    rewrite(
        folder,
        {},
        {
            "blocks.1.ffn.0.bias": np.zeros(63),
            "blocks.0.norm3.weight": np.zeros((48, 1)),
        },
    )
    return [
        "wrong shape: blocks.1.ffn.0.bias is (63,), the config wants (64,)",
        "wrong shape: blocks.0.norm3.weight is (48, 1), the config wants (48,)",
    ]


def change_types(folder):
    rewrite(
        folder,
        {},
        {
            "blocks.1.ffn.0.bias": np.zeros(64, np.int32),
            "head.head.bias": np.zeros(64, np.int8),
        },
    )
    return ["blocks.1.ffn.0.bias is I32", "head.head.bias is I8"]


def make_infinite(folder):
    first, second = np.zeros(64), np.zeros(64)
    first[3], second[63] = np.nan, -np.inf
    rewrite(folder, {}, {"blocks.1.ffn.0.bias": first, "head.head.bias": second})
    return ["2 tensors hold NaN or Inf", "blocks.1.ffn.0.bias", "head.head.bias"]


def carry_code(folder):
    contents = {"a": torch.zeros(2), "b": Code(folder / "written_by_the_pickle")}
    torch.save(contents, folder / synthetic_wan.VAE_FILE)
    return [f"{folder / synthetic_wan.VAE_FILE} is refused"]


def be_something_else(folder):
    (folder / "config.json").write_text('{"_class_name": "Flux"}')
    return ["holds no Wan 2.1 transformer: its class is Flux"]


def lose_config(folder):
    (folder / "config.json").unlink()
    return ["it has no config.json"]


def lose_everything_else(folder):
    (folder / synthetic_wan.VAE_FILE).unlink()
    (folder / synthetic_wan.CLIP_FILE).unlink()
    return [synthetic_wan.VAE_FILE, synthetic_wan.CLIP_FILE]


def rewrite(folder, without, changes):
    """Write the transformer's shards again with some tensors changed."""
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    files = content["weight_map"]
    for name, x in changes.items():
        files.setdefault(name, next(iter(files.values())))
        changes[name] = x.astype(np.float32) if x.dtype == np.float64 else x
    for file in {files[name] for name in (*without, *changes)}:
        tensors = load_file(folder / file)
        tensors |= {n: x for n, x in changes.items() if files[n] == file}
        kept = {n: x for n, x in tensors.items() if n not in without}
        save_file(kept, folder / file)
    for name in without:
        del files[name]
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        cut_shard,
        lose_shards,
        change_names,
        change_shapes,
        change_types,
        make_infinite,
        carry_code,
        be_something_else,
        lose_config,
        lose_everything_else,
    ],
    ids=lambda damage: damage.__name__,
)
def test_bad_input_is_one_message_and_leaves_nothing(official, tmp_path, capfd, damage):
    source = tmp_path / "in" / "wan"
    shutil.copytree(official, source)
    wanted = damage(source)
    (tmp_path / "out").mkdir()
    assert convert(source, tmp_path / "out" / "made", "--dtype=float32") == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1
    for text in wanted:
        assert text in error
    assert list((tmp_path / "out").iterdir()) == []
    assert not (source / "written_by_the_pickle").exists()


def test_problems_of_all_parts_are_reported_together(official, tmp_path, capsys):
    source = tmp_path / "wan"
    shutil.copytree(official, source)
    wanted = change_names(source) + carry_code(source)
    assert convert(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert all(text in error for text in wanted)


def test_source_and_output_must_differ_also_through_links(official, tmp_path, capsys):
    (tmp_path / "link").symlink_to(official)
    for out in (official, tmp_path / "link"):
        for source in (official, tmp_path / "link"):
            assert convert(source, out, "--check") == 2
            assert "--source and --out are both" in capsys.readouterr().err
    assert convert(official, tmp_path) == 2
    assert "exists" in capsys.readouterr().err


def test_a_disk_too_small_is_refused_before_writing(
    official, tmp_path, monkeypatch, capsys
):
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    assert convert(official, tmp_path / "out") == 2
    assert re.search(
        r"needs [\d,]+ more bytes, the disk has 1,000", capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_output_and_can_go_on(
    official, tmp_path, monkeypatch, capsys
):
    """A real disk is not filled: the second item's write fails as it would then."""
    calls = []

    def write(path, arrays, **kinds):
        calls.append(path)
        if len(calls) == 2:
            path.mkdir()
            raise OSError(28, "No space left on device")
        return write_item(path, arrays, **kinds)

    monkeypatch.setattr(bundle, "write_item", write)
    assert convert(official, tmp_path / "out", *ONE) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "The disk is full" in error
    assert not (tmp_path / "out").exists() and not calls[-1].exists()
    monkeypatch.undo()
    assert convert(official, tmp_path / "out", *ONE, "--check") == 0


@pytest.fixture(scope="module")
def with_text(tmp_path_factory):
    """A text-to-video checkpoint with its text encoder and tokeniser."""
    folder = tmp_path_factory.mktemp("with_text") / "wan"
    config = dataclasses.replace(synthetic_wan.T2V, text_dim=48)
    synthetic_wan.write_official(folder, config)
    train_tokenizer(folder / "google" / "umt5-xxl", vocab_size=110)
    tensors = {name: torch.from_numpy(x) for name, x in load_file(UMT5).items()}
    torch.save(tensors, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


def test_a_whole_folder_comes_across_with_its_prompts(with_text, tmp_path, capsys):
    """The paper's prompt and the empty one, by the folder's own text encoder."""
    options = [f"--source={with_text}", f"--out={tmp_path / 'out'}"]
    assert run(*options) == 0
    printed = capsys.readouterr().out
    loaded = load_bundle(tmp_path / "out")
    expected = encode_prompts(with_text, [bundle.PROMPT, ""])
    assert set(loaded.modules) == {"transformer", "vae"}
    np.testing.assert_array_equal(loaded.text, expected[0])
    np.testing.assert_array_equal(loaded.negative_text, expected[1])
    assert len(loaded.negative_text) == 1
    assert f"prompt: {len(loaded.text)} rows of 48" in printed
    assert bundle.PROMPT.startswith(
        "A photorealistic, cinematic video of a city street"
    )


def test_a_prompt_of_ones_own_is_encoded_instead(with_text, tmp_path):
    prompt = "a street in the rain"
    assert (
        convert(with_text, tmp_path / "out", "--parts=text", f"--prompt={prompt}") == 0
    )
    loaded = load_bundle(tmp_path / "out")
    np.testing.assert_array_equal(loaded.text, encode_prompts(with_text, [prompt])[0])


def test_a_text_encoder_of_another_width_is_refused(
    with_text, official, tmp_path, capsys
):
    mixed = shutil.copytree(official, tmp_path / "mixed")
    shutil.copytree(with_text / "google", mixed / "google")
    file = "models_t5_umt5-xxl-enc-bf16.pth"
    shutil.copy(with_text / file, mixed / file)
    assert convert(mixed, tmp_path / "out", "--parts=transformer,text") == 2
    assert "features of 48, the transformer takes 24" in capsys.readouterr().err
    assert convert(mixed, tmp_path / "out", "--parts=vae,text,sound") == 2
    assert "--parts=sound is none of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_published_autoencoder_is_recognised_by_its_shapes(tmp_path):
    """In both namings; the small one of the other tests has other levels."""
    for naming in ("official", "diffusers"):
        found = synthetic_wan.vae_shapes(naming, VAEConfig(base_dim=4))
        synthetic_wan.write_safetensors(tmp_path / f"{naming}.safetensors", found)
        reader = CheckpointReader(tmp_path / f"{naming}.safetensors")
        config = read_vae_config(reader, jnp.float32)
        assert config == VAEConfig(base_dim=4, dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Two transformers of 65 MB a block in float32: 4 blocks and 12."""
    folder = tmp_path_factory.mktemp("deep")
    for layers in (4, 12):
        sizes = dict(dim=1024, num_heads=8, ffn_dim=2816, num_layers=layers)
        config = DiTConfig.i2v_14b(**sizes)
        path = folder / str(layers)
        synthetic_wan.write_dit(path, config, max_shard_bytes=2 * 10**8)
    yield folder
    shutil.rmtree(folder)


def start(source, out):
    options = [f"--source={source}", f"--out={out}", "--dtype=float32"]
    command = [sys.executable, str(TOOL), *options, "--parts=transformer"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def peak_anonymous_bytes(process):
    """Poll RssAnon, which leaves out mapped files, until the process ends."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, 1024 * int(found[1]) if found else 0)
        time.sleep(0.005)
    assert process.returncode == 0
    return peak


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_layers(deep):
    """Eight more blocks are 520 MB; allocators and tensorstore's cache (100 MB) keep
    some of what they had: 60 MB from 5 blocks to 10, 40 MB from 10 to 20."""
    few, many = (
        peak_anonymous_bytes(start(deep / layers, deep / f"out{layers}"))
        for layers in ("4", "12")
    )
    assert many < few + 200e6


@pytest.mark.long
def test_a_conversion_killed_at_any_moment_goes_on(deep):
    out, record = deep / "out", deep / ".out.partial" / "progress.json"
    for wanted in (1, 5):
        process = start(deep / "12", out)
        while (
            not record.exists() or len(json.loads(record.read_text())["done"]) < wanted
        ):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
    first = deep / ".out.partial" / "transformer" / "rest" / "state" / "manifest.ocdbt"
    written = first.stat().st_mtime_ns
    assert start(deep / "12", out).wait() == 0
    assert (
        out / first.relative_to(deep / ".out.partial")
    ).stat().st_mtime_ns == written
    checkpoint.verify_bundle(out)
