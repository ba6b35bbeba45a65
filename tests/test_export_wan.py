"""What is trained here opens in PyTorch: Wan by others' classes, the rest by ours."""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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
    latest_model,
    parameters,
    save_bundle,
    stacked_parameters,
)
from cityrag_jax.convert import export_checkpoint, load_dit, names, torch_cityrag
from cityrag_jax.convert.names import NAMINGS, transformer_names
from cityrag_jax.convert.torch_cityrag import open_export
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
VIEWS = 8
BRANCHES = ((GeoBranch, {"view_poses": VIEWS}), (TrajectoryEncoder, {"hidden": HIDDEN}))
GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parents[1]
TOOL = ROOT / "tools" / "export_wan.py"
TOY = ROOT / "configs" / "toy_city_weights"


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
    vectors += ["geo.patch_embedding.bias", "pose.out.{i}.bias", "geo.views.out.bias"]
    assert ours == square | dict.fromkeys(vectors, (48,)) | {
        "geo.patch_embedding.weight": (48, 16, 1, 2, 2),
        "geo.views.out.weight": (48, VIEWS),
        "pose.out.{i}.weight": (48, HIDDEN),
        **encoder_shapes("geo.views", VIEWS),
        **encoder_shapes("pose", HIDDEN),
    }


def encoder_shapes(part, width):
    """Name the tensors of an encoder of poses, with their shapes."""
    shapes = {f"{part}.conv.weight": (width, 16, 4), f"{part}.conv.bias": (width,)}
    for i in (0, 2):
        shapes[f"{part}.mlp.{i}.weight"] = (width, width)
        shapes[f"{part}.mlp.{i}.bias"] = (width,)
    return shapes


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
    geo = {"latent_channels": 16, "view_poses": VIEWS}
    sizes = {"geo": geo, "pose": {"hidden": HIDDEN}}
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
        geo_poses=draw(13, 4, 4),
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


KINDS = {
    "i2v": dict(image_dim=20, in_channels=36),
    "t2v": dict(image_dim=None, in_channels=16),
    "narrow_tokens": dict(image_dim=None, in_channels=16, patch=(2, 1)),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def exported(request, tmp_path_factory):
    """A model, and where it lies in diffusers' names: the base alone, and all of it."""
    folder = tmp_path_factory.mktemp("exported")
    config = dataclasses.replace(SMALL, **request.param)
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


def in_torch(folder, inputs, geo, dtype=torch.float32):
    """Open an export by the shipped PyTorch code; give its velocity, channels last."""
    conditions = {name: torch.from_numpy(x) for name, x in geo.items()}
    conditions["geo_frames"] = conditions.pop("geo_length")
    conditions["geo_latents"] = conditions["geo_latents"].movedim(-1, 1)
    with torch.no_grad():
        velocity = open_export(folder, dtype)(*to_torch(inputs).values(), **conditions)
    assert velocity.dtype == torch.float32
    return velocity.movedim(1, -1).numpy()


def test_an_export_opened_in_pytorch_computes_the_same(exported):
    """Conditions of other lengths, kept and dropped; all weights random."""
    model, folder = exported
    inputs, geo = draw_inputs(model.config)
    theirs = in_torch(folder / "all", inputs, geo)
    ours = compute(model, inputs, geo)
    # As without branches: diffusers takes timestep angles in float32.
    np.testing.assert_allclose(ours, theirs, atol=5e-5)
    none = np.zeros(3, np.float32)
    for name in "keep_geo", "keep_pose":
        without = compute(model, inputs, geo | {name: none})
        assert np.abs(without - ours).max() > 0.1, "the branch must matter here"


@pytest.mark.long
def test_the_shipped_toy_weights_open_in_pytorch(tmp_path):
    """The model that everyone has: trained numbers, int8 on disk, one row of text."""
    export_checkpoint(TOY, tmp_path / "toy", "diffusers")
    bundle = latest_model(TOY, dtype=jnp.float32)
    model = bundle.modules["transformer"]
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    text = np.load(tmp_path / "toy" / "text.npy")[None]
    inputs = dict(latents=draw(1, 3, 12, 20, 36), timesteps=np.float32([700.0]))
    inputs |= dict(text=text, image=None)
    geo = dict(geo_latents=draw(1, 4, 12, 20, 16), geo_length=np.int32([3]))
    geo |= dict(keep_geo=np.ones(1, np.float32), poses=draw(1, 9, 4, 4))
    geo |= dict(keep_pose=np.ones(1, np.float32))
    theirs = in_torch(tmp_path / "toy", inputs, geo)
    np.testing.assert_allclose(compute(model, inputs, geo), theirs, atol=5e-5)
    # Eight bits of mantissa through seven blocks; float32 where it matters.
    half = in_torch(tmp_path / "toy", inputs, geo, torch.bfloat16)
    assert np.linalg.norm(half - theirs) < 0.02 * np.linalg.norm(theirs)


def test_the_pytorch_code_can_be_copied_alone():
    tree = ast.parse(pathlib.Path(torch_cityrag.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    allowed = {"torch", "diffusers", "safetensors", "json", "pathlib"}
    assert {module.split(".")[0] for module in modules} == allowed


@pytest.mark.parametrize("kind", ["base", "official", "nothing"])
def test_only_a_whole_export_in_diffusers_names_opens_in_pytorch(
    kind, bundle, tmp_path
):
    out = tmp_path / "out"
    if kind != "nothing":
        naming = "official" if kind == "official" else "diffusers"
        export_checkpoint(bundle, out, naming, base_only=kind == "base")
    told = "cannot be read" if kind == "nothing" else "naming=diffusers, without"
    with pytest.raises(ValueError, match=told):
        open_export(out)


# Bad input ----------------------------------------------------------------------------


@pytest.fixture
def bundle(bundles):
    return bundles["float32"][1]


@pytest.fixture
def tool(capsys):
    """Run the tool; give its exit code and what it printed."""
    spec = importlib.util.spec_from_file_location("export_wan", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(checkpoint, out, *more):
        arguments = [f"--checkpoint={checkpoint}", f"--out={out}", *more]
        try:
            code = module.COMMAND.call(module.main, arguments)
        except SystemExit as ended:  # of a command line that cannot be read
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
