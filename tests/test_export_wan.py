"""What is trained here opens in PyTorch, from the files and the README alone."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from flax import nnx
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from cityrag_jax.batch import Conditions
from cityrag_jax.checkpoint import (
    Bundle,
    TrainingCheckpoints,
    describe,
    items,
    parameters,
    save_bundle,
    stacked_parameters,
)
from cityrag_jax.convert import export_checkpoint, load_dit, names
from cityrag_jax.convert.names import NAMINGS, transformer_names
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
# The goldens' sizes, as their READMEs give them.
I2V = dataclasses.replace(
    SMALL,
    dim=96,
    num_heads=3,
    num_layers=3,
    ffn_dim=160,
    freq_dim=64,
    text_dim=48,
    image_dim=40,
)
T2V = dataclasses.replace(
    I2V,
    dim=80,
    num_heads=2,
    num_layers=2,
    ffn_dim=144,
    in_channels=16,
    image_dim=None,
)
HIDDEN = 12
BRANCHES = ((GeoBranch, {}), (TrajectoryEncoder, {"hidden": HIDDEN}))
GOLDEN = pathlib.Path(__file__).parent / "golden"
TOOL = pathlib.Path(__file__).parents[1] / "tools" / "export_wan.py"


def build(config=SMALL, branches=BRANCHES):
    rngs = nnx.Rngs(0)
    built = tuple(cls(config, **arguments, rngs=rngs) for cls, arguments in branches)
    return WanDiT(config, branches=built, rngs=rngs)


def random_model(config=SMALL, dtype=np.float32):
    """Every parameter random, the branches' zeros too: what is left out shows."""
    config = dataclasses.replace(config, param_dtype=dtype)
    model = nnx.eval_shape(lambda: build(config))
    rng = np.random.default_rng(1)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = rng.normal(size=param.shape).astype(np.float32)
        scale = 0.3 if "kernel" not in path else param.shape[-2] ** -0.5
        offset = 1.0 if "scale" in path else 0.0
        param.set_value(jnp.asarray(offset + scale * noise, dtype))
    return model


def save(model, path, **changes):
    branches = BRANCHES if len(model.branches) else ()
    described = {"transformer": describe(WanDiT, model.config, branches)}
    texts = dict(text=np.ones((3, 24), np.float32), negative_text=np.ones((1, 24)))
    bundle = Bundle({"transformer": model}, described, **texts | changes)
    return save_bundle(path, bundle)


def read_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def read_back(tensors, model, naming):
    """Turn a file's tensors into our parameters by the tables alone."""
    table = transformer_names(model.branches)
    values = {}
    for path, x in parameters(model).items():
        name = table(path)
        layers = range(len(x)) if name.stacked else [None]
        ours = [name.layout.to_ours(tensors[name.name(naming, i)]) for i in layers]
        values[path] = np.stack(ours) if name.stacked else ours[0]
    return values


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        assert x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_parameter_of_both_branches_has_a_name_and_layout(order):
    """The class decides, not the place; names and torch shapes as the README says."""
    branches = [BRANCHES[i] for i in order]
    classes = [cls for cls, _ in branches]
    model = nnx.eval_shape(lambda: build(branches=branches))
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


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A model and its folder in either type."""
    folder = tmp_path_factory.mktemp("bundles")
    models = {name: random_model(dtype=name) for name in ("float32", "bfloat16")}
    return {name: (model, save(model, folder / name)) for name, model in models.items()}


# Round trips --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_what_is_exported_reads_back_bit_for_bit(naming, dtype, bundles, tmp_path):
    model, bundle = bundles[dtype]
    out = tmp_path / "out"
    parts = export_checkpoint(bundle, out, naming)
    tensors = read_tensors(out)
    assert_same_bits(read_back(tensors, model, naming), parameters(model))
    values = parameters(model).values()
    assert sum(part.tensors for part in parts) == len(tensors)
    assert sum(part.parameters for part in parts) == sum(x.size for x in values)
    assert sum(part.num_bytes for part in parts) == sum(x.nbytes for x in values)
    shown = ["Wan transformer", "geo branch", "pose branch"]
    assert [part.name for part in parts] == shown
    config = json.loads((out / "config.json").read_text())
    sizes = {"geo": {"latent_channels": 16}, "pose": {"hidden": HIDDEN}}
    assert config["_cityrag"] == sizes
    np.testing.assert_array_equal(np.load(out / "text.npy"), np.ones((3, 24)))
    assert np.load(out / "negative_text.npy").shape == (1, 24)


@pytest.mark.parametrize(
    ("name", "dtype"), [("dit_i2v_tiny", "float32"), ("dit_t2v_tiny", "bfloat16")]
)
def test_a_torch_file_comes_back_bit_for_bit(name, dtype, tmp_path):
    """A golden in official names, through a bundle, diffusers' names and a bundle."""
    golden = load_file(GOLDEN / f"{name}.safetensors")
    golden = {key: x.astype(dtype) for key, x in golden.items()}
    config = {"dit_i2v_tiny": I2V, "dit_t2v_tiny": T2V}[name]
    source = tmp_path / "in.safetensors"
    save_file(golden, source)
    for naming in ("diffusers", "official"):
        model = load_dit(source, config, dtype=dtype)
        source = tmp_path / naming
        export_checkpoint(save(model, tmp_path / f"to {naming}"), source, naming)
    assert_same_bits(read_tensors(source), golden)


def test_shards_change_nothing_and_everything_is_read_once(
    bundles, tmp_path, monkeypatch
):
    model, bundle = bundles["float32"]
    """In small parts, which is what keeps an export of any size in little memory."""
    asked, sizes = [], []
    load = ocp.load

    def counted(path, wanted):
        asked.extend((path.name, name) for name in wanted)
        sizes.append(sum(x.size * x.dtype.itemsize for x in wanted.values()))
        return load(path, wanted)

    monkeypatch.setattr(ocp, "load", counted)
    monkeypatch.setattr(items, "READ_BYTES", 20_000)
    export_checkpoint(bundle, tmp_path / "out", max_shard_bytes=100_000)
    assert len(asked) == len(set(asked))
    assert {item for item, _ in asked} == {"rest", "block_000", "block_001"}
    assert max(sizes) < 60_000 < sum(sizes) / 5  # the largest array: time_projection
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index.read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 3
    tensors = read_tensors(tmp_path / "out")
    assert_same_bits(read_back(tensors, model, "official"), parameters(model))


def test_a_cast_rounds_as_torch_does(bundles, tmp_path):
    model, bundle = bundles["float32"]
    export_checkpoint(bundle, tmp_path / "out", dtype="bfloat16")
    half = load_torch(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in half.values()} == {torch.bfloat16}
    name = transformer_names(model.branches)("blocks.ffn.fc1.kernel")
    for layer, x in enumerate(parameters(model)["blocks.ffn.fc1.kernel"]):
        rounded = torch.from_numpy(np.array(x)).T.to(torch.bfloat16)
        assert torch.equal(half[name.name("official", layer)], rounded)


def test_a_training_that_still_runs_is_exported_with_its_averages(bundles, tmp_path):
    model, _ = bundles["float32"]
    described = {"transformer": describe(WanDiT, SMALL, BRANCHES)}
    save_bundle(tmp_path / "run" / "base", Bundle({}, described))
    values = parameters(model)
    groups = {"params": {n: jnp.zeros_like(x) for n, x in values.items()}}
    groups["ema"] = values
    with TrainingCheckpoints(tmp_path / "run/checkpoints", writable=True) as writer:
        writer.save(7, groups, {"part": "transformer"}, stacked_parameters(model))
    export_checkpoint(tmp_path / "run", tmp_path / "out", "diffusers")
    tensors = read_tensors(tmp_path / "out")
    assert_same_bits(read_back(tensors, model, "diffusers"), values)


# What PyTorch makes of it -------------------------------------------------------------


INPUTS = ("latents", "timesteps", "text", "image")


def draw_inputs(config, batch=3):
    rng = np.random.default_rng(5)

    def draw(*shape):
        return rng.normal(size=(batch, *shape)).astype(np.float32)

    inputs = dict(
        latents=draw(3, 4, 6, config.in_channels),
        timesteps=np.array([37.0, 911.0, 500.0], np.float32)[:batch],
        text=draw(512, config.text_dim),
        image=None if config.image_dim is None else draw(257, config.image_dim),
    )
    geo = dict(
        geo_latents=draw(4, 4, 6, 16),
        geo_length=np.array([2, 4, 3], np.int32)[:batch],
        keep_geo=np.array([1, 0, 1], np.float32)[:batch],
        poses=draw(9, 4, 4),
        keep_pose=np.array([1, 1, 0], np.float32)[:batch],
    )
    return inputs, geo


def open_in_diffusers(folder, *, strict=True):
    settings = json.loads((folder / "config.json").read_text())
    wan = WanTransformer3DModel.from_config(settings).eval()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_torch(file)
    extra = wan.load_state_dict(tensors, strict=strict).unexpected_keys
    assert all(name.startswith(("geo.", "pose.")) for name in extra)
    return wan, {name: tensors[name] for name in extra}


def test_our_own_loader_opens_the_base_in_official_names(bundles, tmp_path):
    model, bundle = bundles["float32"]
    export_checkpoint(bundle, tmp_path / "out", base_only=True)
    base = {
        name: x
        for name, x in parameters(model).items()
        if not name.startswith("branches.")
    }
    assert_same_bits(parameters(load_dit(tmp_path / "out", SMALL)), base)


class TorchCityRAG:
    """Both branches around diffusers' blocks, written from the README's description.

    Nothing here comes from cityrag_jax: `weights` are the file's tensors.
    """

    def __init__(self, wan, weights):
        self.wan, self.weights = wan, weights
        self.heads = wan.config.num_attention_heads
        self.eps = wan.config.eps

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def pose_addends(self, poses):
        """[B, T, 4, 4] -> one [B, t, D] a block."""
        flat = poses.flatten(2)
        flat = torch.cat([flat[:, :1]] * 3 + [flat], dim=1).transpose(1, 2)
        weight, bias = self.weights["pose.conv.weight"], self.weights["pose.conv.bias"]
        hidden = F.silu(F.conv1d(flat, weight, bias, stride=4).transpose(1, 2))
        hidden = self.linear("pose.mlp.2", F.silu(self.linear("pose.mlp.0", hidden)))
        count = len(self.wan.blocks)
        return [self.linear(f"pose.out.{i}", hidden) for i in range(count)]

    def rotation(self, grid):
        """Unit complex numbers [tokens, head_dim / 2], t then h then w."""
        half = self.wan.config.attention_head_dim // 2
        third = self.wan.config.attention_head_dim // 6
        place = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        angles = []
        for axis, pairs in enumerate((half - 2 * third, third, third)):
            ladder = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
            angles.append(place[axis].reshape(-1, 1) * ladder)
        angles = torch.cat(angles, dim=1)
        return torch.polar(torch.ones_like(angles), angles)

    def split(self, x, rotation=None):
        """[tokens, D] -> [heads, tokens, head_dim], pairs of neighbours turned."""
        x = x.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        if rotation is None:
            return x
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

    def geo_attention(self, i, query, condition, query_grid, condition_grid):
        """Attend from one clip's tokens [L, D] to its condition's [S, D]."""
        name = f"geo.blocks.{i}"

        def norm(part, x):
            rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return x * rms * self.weights[f"{name}.attn.norm_{part}.weight"]

        affine = self.weights[f"{name}.norm.weight"], self.weights[f"{name}.norm.bias"]
        source = F.layer_norm(condition, condition.shape[-1:], *affine, self.eps)
        q = norm("q", self.linear(f"{name}.attn.q", query))
        k = norm("k", self.linear(f"{name}.attn.k", source))
        q = self.split(q, self.rotation(query_grid))
        k = self.split(k, self.rotation(condition_grid))
        v = self.split(self.linear(f"{name}.attn.v", source))
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        out = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return self.linear(f"{name}.attn.o", out)

    def block(self, i, x, context, time6, rotary, geo, grid):
        block = self.wan.blocks[i]
        parts = (block.scale_shift_table + time6).chunk(6, dim=1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts

        def modulated(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift

        x = x + gate * block.attn1(modulated(x, shift, scale), None, None, rotary)
        m = modulated(x, shift, scale)
        read = [
            keep * self.geo_attention(i, m[b], tokens, grid, tokens_grid)
            for b, (tokens, tokens_grid, keep) in enumerate(geo)
        ]
        x = x + gate * torch.stack(read)
        x = x + block.attn2(block.norm2(x), context, None, None)
        return x + ffn_gate * block.ffn(modulated(x, ffn_shift, ffn_scale))

    def __call__(self, latents, timesteps, text, image, conditions):
        wan = self.wan
        x = wan.patch_embedding(latents)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        time, time6, text, image = wan.condition_embedder(timesteps, text, image)
        context = text if image is None else torch.cat([image, text], dim=1)
        rotary, geo = wan.rope(latents), self.geo_tokens(conditions)
        addends = self.pose_addends(conditions["poses"])
        keep = conditions["keep_pose"][:, None, None]
        for i in range(len(wan.blocks)):
            time_i = time6.unflatten(1, (6, -1))
            x = self.block(i, x, context, time_i, rotary, geo, grid)
            frames = grid[1] * grid[2]
            x = x + (keep * addends[i]).repeat_interleave(frames, dim=1)
        shift, scale = (wan.scale_shift_table + time[:, None]).chunk(2, dim=1)
        x = wan.proj_out(wan.norm_out(x) * (1 + scale) + shift)
        x = x.unflatten(1, grid).unflatten(-1, (2, 2, -1))
        return x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)

    def geo_tokens(self, conditions):
        """Tokens, grid and keep of each clip, cut to its condition's length."""
        name = "geo.patch_embedding"
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        video = conditions["geo_latents"].movedim(-1, 1)
        tokens = F.conv3d(video, weight, bias, stride=(1, 2, 2))
        lengths = conditions["geo_length"].tolist()
        cut = [clip[:, :n] for clip, n in zip(tokens, lengths, strict=True)]
        return [
            (clip.flatten(1).T, clip.shape[1:], keep)
            for clip, keep in zip(cut, conditions["keep_geo"], strict=True)
        ]


@pytest.fixture(scope="module", params=[20, None], ids=["i2v", "t2v"])
def exported(request, tmp_path_factory):
    """A model with an image branch or without, and where it lies in diffusers' names:
    the base alone, and all of it."""
    folder = tmp_path_factory.mktemp("exported")
    channels = 16 if request.param is None else 36
    config = dataclasses.replace(SMALL, image_dim=request.param, in_channels=channels)
    model = random_model(config)
    bundle = save(model, folder / "in")
    export_checkpoint(bundle, folder / "base", "diffusers", base_only=True)
    export_checkpoint(bundle, folder / "all", "diffusers", max_shard_bytes=100_000)
    return model, folder


@jax.jit
def compute(model, inputs, geo=None):
    prepared = ()
    if geo is not None:
        prepared = model.prepare(Conditions(text=inputs["text"], **geo))
    latents, timesteps, text, image = (inputs[name] for name in INPUTS)
    return model(latents, timesteps, text, image, prepared)


def to_torch(inputs):
    """Give torch tensors with channels first."""
    tensors = {n: None if x is None else torch.from_numpy(x) for n, x in inputs.items()}
    return tensors | {"latents": tensors["latents"].movedim(-1, 1)}


def test_diffusers_opens_the_base_strictly_and_computes_the_same(exported):
    model, folder = exported
    wan, _ = open_in_diffusers(folder / "base")
    assert "_cityrag" not in json.loads((folder / "base/config.json").read_text())
    inputs, _ = draw_inputs(model.config)
    with torch.no_grad():
        theirs = wan(*to_torch(inputs).values(), return_dict=False)[0]
    ours = compute(model, inputs)
    # As in test_convert.py: diffusers takes timestep angles in float32.
    np.testing.assert_allclose(ours, theirs.movedim(1, -1), atol=5e-5)


def test_branches_ported_from_the_description_compute_the_same(exported):
    """Conditions of other lengths, kept and dropped; all weights random."""
    model, folder = exported
    wan, weights = open_in_diffusers(folder / "all", strict=False)
    inputs, geo = draw_inputs(model.config)
    conditions = {name: torch.from_numpy(x) for name, x in geo.items()}
    with torch.no_grad():
        theirs = TorchCityRAG(wan, weights)(*to_torch(inputs).values(), conditions)
    ours = compute(model, inputs, geo)
    # As without branches: diffusers takes timestep angles in float32.
    np.testing.assert_allclose(ours, theirs, atol=5e-5)
    none = np.zeros(3, np.float32)
    for name in "keep_geo", "keep_pose":
        without = compute(model, inputs, geo | {name: none})
        assert np.abs(without - ours).max() > 0.1, "the branch must matter here"


# Bad input ----------------------------------------------------------------------------


@pytest.fixture
def bundle(bundles):
    return bundles["float32"][1]


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool; give its exit code and what it printed."""
    spec = importlib.util.spec_from_file_location("export_wan", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(checkpoint, out, *more):
        arguments = [f"--checkpoint={checkpoint}", f"--out={out}", *more]
        monkeypatch.setattr(sys, "argv", ["export_wan.py", *arguments])
        try:
            code = module.main()
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def assert_refused(result, folder, *parts):
    code, message = result
    assert code == 2
    for part in parts:
        assert part in message
    assert message.count("error: ") == 1
    assert not list(folder.iterdir()), "nothing may be left behind"


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(bundle, tool, tmp_path):
    used, empty = tmp_path / "used", tmp_path / "empty"
    used.mkdir()
    empty.mkdir()
    (used / "note").write_text("mine")
    for out in used, used / "note", bundle:
        code, message = tool(bundle, out, "--naming=official")
        assert code == 2
        assert f"{out} exists and is not empty" in message
    assert (used / "note").read_text() == "mine"
    export_checkpoint(bundle, empty)
    assert (empty / "config.json").exists()


def test_a_folder_without_a_transformer_is_refused(tool, tmp_path):
    out = tmp_path / "out"
    result = tool(tmp_path / "nothing", out, "--naming=official")
    assert_refused(result, tmp_path, "holds no model")


def test_a_bundle_of_other_networks_is_refused(tool, tmp_path):
    checkpoint = save_bundle(tmp_path / "in", Bundle({}, {}))
    code, message = tool(checkpoint, tmp_path / "out", "--naming=official")
    assert code == 2
    assert "holds nothing, no transformer" in message


def test_a_damaged_bundle_is_refused(bundle, tool, tmp_path):
    """A missing block before anything is written, a flipped bit when it is met."""
    copy, to = tmp_path / "copy", tmp_path / "to"
    to.mkdir()
    shutil.copytree(bundle, copy)
    digests = copy / "transformer" / "digests.json"
    text = digests.read_text()
    broken = json.loads(text)
    broken["block_001"]["blocks.modulation"] ^= 1
    digests.write_text(json.dumps(broken))
    result = tool(copy, to / "out", "--naming=official")
    assert_refused(result, to, "block_001 is damaged", "blocks.modulation")
    digests.write_text(text)
    shutil.rmtree(copy / "transformer" / "block_001")
    result = tool(copy, to / "out", "--naming=official")
    assert_refused(result, to, "block_001 is damaged")


def test_a_short_disk_is_refused_before_writing(bundle, tool, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=4_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = tool(bundle, tmp_path / "out", "--naming=diffusers")
    assert_refused(result, tmp_path, "bytes, the disk has 4,500,000")


def test_values_that_are_not_finite_are_all_listed(tool, tmp_path):
    model = random_model()
    bias = model.head.linear.bias
    bias.set_value(bias[...].at[3].set(np.nan))
    scale = model.branches[0].layers.norm.scale
    scale.set_value(scale[...].at[1, 2].set(np.inf))
    checkpoint = save(model, tmp_path / "in")
    (tmp_path / "to").mkdir()
    result = tool(checkpoint, tmp_path / "to/out", "--naming=official")
    assert_refused(result, tmp_path / "to", "2 tensors", "head.head.bias")
    assert "geo.blocks.1.norm.weight" in result[1]


def test_a_branch_without_torch_names_needs_base_only(tmp_path, monkeypatch):
    monkeypatch.delitem(names.BRANCH_MODULES, TrajectoryEncoder)
    checkpoint = save(random_model(), tmp_path / "in")
    with pytest.raises(ValueError, match="8 parameters have no name") as caught:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert "--base-only" in str(caught.value)
    assert "branches.1.conv.kernel" in str(caught.value)
    export_checkpoint(checkpoint, tmp_path / "out", base_only=True)


def test_the_tool_prints_what_it_wrote(bundle, tool, tmp_path):
    out = tmp_path / "out"
    code, printed = tool(bundle, out, "--naming=diffusers", "--dtype=bfloat16")
    assert not code
    tensors = read_tensors(out)
    total = sum(x.size for x in tensors.values())
    *_, last, opened, _ = printed.splitlines()
    assert last.split() == ["all", f"{len(tensors)}", f"{total:,}", f"{2 * total:,}"]
    assert f'WanTransformer3DModel.from_pretrained("{out}")' in opened
