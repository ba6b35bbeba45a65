"""Where every stored array comes from, known and checked before any is read.

An array of a bundle is read from the source; or, in a branch that the source does not
have, copied from the base as `geo_branch.FROM_BASE` says, or drawn. Names, shapes and
types are checked by the files' headers.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from cityrag_jax import flops
from cityrag_jax.checkpoint import (
    Arrays,
    Description,
    abstract_model,
    build_model,
    describe,
    parameters,
    stacked_parameters,
)
from cityrag_jax.checkpoint.items import REST, on_host, plan_items
from cityrag_jax.checkpoint.quantise import (
    INT8,
    quantise,
    read_dtype,
    stored_types,
    with_scales,
)
from cityrag_jax.convert.files import CheckpointReader
from cityrag_jax.convert.lora import Lora, MergedReader
from cityrag_jax.convert.names import (
    Alias,
    NameTable,
    TorchName,
    clip_alias,
    clip_names,
    dit_alias,
    same_name,
    transformer_names,
    vae_names,
)
from cityrag_jax.convert.source import (
    WanFolder,
    read_clip_config,
    read_dit_config,
    read_vae_config,
)
from cityrag_jax.convert.weights import AliasedReader, find_naming
from cityrag_jax.model.clip_vision import CLIPVision
from cityrag_jax.model.dit import WanDiT
from cityrag_jax.model.geo_branch import FROM_BASE, GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import WanVAE

SEED = 0  # of what is drawn
THREADS = 4  # more would hold more tensors in two layouts at once
POSE, GEO = "branches.0.", "branches.1."
BRANCH_TENSORS = {POSE: "pose.", GEO: "geo."}
HIDDEN = 512  # of the trajectory encoder, unless the source has one
FLOATS = ("float32", "bfloat16", "float16", "float64")
SMALL = dict(num_frames=5, height=64, width=64)  # sizes without weight for counting


@dataclasses.dataclass(frozen=True)
class NetworkPlan:
    """One network of the bundle: what it is and how each of its arrays is made.

    `items` say the types in which parameters are stored, perhaps int8. `read` names
    those that the source holds; `copied` maps those that begin as another of the same
    network; `drawn` names the others. `rows` are the lines of the table: (title, prefix
    of the parameters, expected count).
    """

    name: str
    description: Description
    items: Mapping[str, Arrays]
    reader: AliasedReader | MergedReader
    naming: str
    read: Mapping[str, TorchName]
    copied: Mapping[str, str]
    drawn: tuple[str, ...]
    rows: tuple[tuple[str, str, int], ...]

    def quantised(self) -> "NetworkPlan":
        """Plan the same with int8 kernels, each made in float32 before."""
        items = {item: stored_types(arrays) for item, arrays in self.items.items()}
        return dataclasses.replace(self, items=items)

    def stored(self, item: str) -> Arrays:
        """Give the abstract arrays of an item, with the scales of int8 kernels."""
        return with_scales(self.items[item], self.items[item])

    def make(self, item: str) -> Iterator[tuple[str, jax.Array]]:
        """Make the stored arrays of an item one by one, in our axes and their type.

        They are JAX's, on the host, for that is how they are written in little memory.
        Those of the source are read some at a time: turning axes takes longest.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            read = {
                ours: pool.submit(self._read, item, ours)
                for ours in self.items[item]
                if ours in self.read
            }
            made: Arrays = {}
            # What is copied shares the memory of what it is copied from.
            for ours in sorted(self.items[item], key=lambda name: name in self.copied):
                wanted = self.items[item][ours]
                dtype = read_dtype(wanted.dtype)
                if ours in read:
                    x = on_host(read.pop(ours).result())
                elif ours in self.copied:
                    x = made[self.copied[ours]]
                    x = x if x.shape == wanted.shape else x[: wanted.shape[0]]
                else:
                    drawn = _draw(json.dumps(self.description), self.drawn)[ours]
                    x = on_host(np.asarray(drawn, dtype))
                assert (x.shape, x.dtype) == (wanted.shape, dtype), ours
                if ours in self.copied.values():
                    made[ours] = x
                if wanted.dtype == INT8:
                    yield from jax.block_until_ready(quantise({ours: x})).items()
                else:
                    yield ours, x

    def _read(self, item: str, ours: str) -> np.ndarray:
        layer = None if item == REST else int(item.rpartition("_")[2])
        x = self.read[ours].read(self.naming, self.reader.read, layer)
        return np.ascontiguousarray(x, read_dtype(self.items[item][ours].dtype))

    def sources(self, item: str, ours: str) -> tuple[str, ...]:
        """Name the tensors that an array is made of."""
        layer = None if item == REST else int(item.rpartition("_")[2])
        if ours in self.copied:
            return self.sources(item, self.copied[ours])
        if ours not in self.read:
            return ()
        return self.read[ours].pieces(self.naming, layer)

    def num_bytes(self, item: str) -> int:
        """Give the bytes that an item takes."""
        return sum(num_bytes(x) for x in self.stored(item).values())


def plan_transformer(
    folder: WanFolder, dtype: DTypeLike, loras: Sequence[Lora] = ()
) -> NetworkPlan:
    """Plan Wan's transformer with CityRAG's branches, read, copied or drawn.

    LoRA files are merged into what is read, and so into what is copied from it.
    """
    files = CheckpointReader(folder.weights["transformer"])
    config = read_dit_config(folder, files, dtype)
    hidden = HIDDEN
    if "pose.conv.weight" in files.names():
        hidden = files.shape("pose.conv.weight")[0]
    geo = {"latent_channels": config.out_channels, "same_place_bias": 0.0}
    if "geo.views.conv.weight" in files.names():
        geo["view_poses"] = files.shape("geo.views.conv.weight")[0]
    branches = ((TrajectoryEncoder, {"hidden": hidden}), (GeoBranch, geo))
    description = describe(WanDiT, config, branches)
    held = tuple(
        prefix
        for prefix, theirs in BRANCH_TENSORS.items()
        if any(name.startswith(theirs) for name in files.names())
    )
    rows = (
        ("transformer", "", _count(flops.dit(config, 4))),
        (
            "geo branch",
            GEO,
            _count(flops.geo_branch(config, 4, 4, latent_channels=config.out_channels)),
        ),
        ("pose branch", POSE, _count(flops.pose_branch(config, 5, 0, hidden=hidden))),
    )
    plan = _plan(
        "transformer",
        description,
        files,
        dit_alias,
        transformer_names([branch for branch, _ in branches]),
        rows,
        held=("", *held),
    )
    if not loras:
        return plan
    merged = MergedReader(plan.reader, loras, config.num_layers, plan.naming)
    return dataclasses.replace(plan, reader=merged)


def plan_vae(folder: WanFolder, dtype: DTypeLike) -> NetworkPlan:
    """Plan the autoencoder."""
    files = CheckpointReader(folder.weights["vae"])
    config = read_vae_config(files, dtype)
    table = vae_names(config.num_res_blocks)
    count = _count(flops.vae_encode(config, **SMALL))
    count += _count(flops.vae_decode(config, **SMALL))
    rows = (("vae", "", count),)
    return _plan("vae", describe(WanVAE, config), files, same_name, table, rows)


def plan_clip(folder: WanFolder, dtype: DTypeLike) -> NetworkPlan:
    """Plan CLIP's image tower without its last block."""
    files = CheckpointReader(folder.weights["clip"])
    config = read_clip_config(folder, files, dtype)
    alias, table = clip_alias(config.num_layers), clip_names(config.patch_size)
    description = describe(CLIPVision, config)
    shapes = parameters(abstract_model(description)).values()
    rows = (("clip", "", sum(math.prod(x.shape) for x in shapes)),)
    return _plan("clip", description, files, alias, table, rows)


PLANNERS: dict[str, Callable[..., NetworkPlan]] = {
    "transformer": plan_transformer,
    "vae": plan_vae,
    "clip": plan_clip,
}


def plan_network(
    part: str, folder: WanFolder, dtype: DTypeLike, loras: Sequence[Lora] = ()
) -> NetworkPlan:
    """Plan one of `PLANNERS`; what is stored as int8 describes itself as bfloat16.

    `loras` change the transformer and nothing else.
    """
    plan = PLANNERS[part]
    if part == "transformer":
        plan = functools.partial(plan, loras=loras)
    if np.dtype(dtype) == INT8:
        return plan(folder, np.dtype("bfloat16")).quantised()
    return plan(folder, np.dtype(dtype))


def _plan(
    name: str,
    description: Description,
    files: CheckpointReader,
    alias: Alias,
    table: NameTable,
    rows: tuple,
    held: tuple[str, ...] = ("",),
) -> NetworkPlan:
    """Check names, shapes and types; raise one ValueError about all that is wrong."""
    model = abstract_model(description)
    variables = {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    read = {ours: table(ours) for ours in variables if branch_of(ours) in held}
    reader = AliasedReader(files, alias)
    problems, naming = [], "official"
    try:
        wanted = {ours: variables[ours] for ours in read}
        naming = find_naming(reader, wanted, read)
    except ValueError as error:
        problems.append(str(error))
    problems += [
        f"wrong type: {theirs} is {kind}, weights are {', '.join(FLOATS)}"
        for theirs in sorted(reader.names())
        if (kind := reader.dtype(theirs)) not in FLOATS
    ]
    if problems:
        raise ValueError("\n".join(problems))
    copied = {
        GEO + ours: theirs for ours, theirs in FROM_BASE.items() if GEO not in held
    }
    copied = {ours: theirs for ours, theirs in copied.items() if ours in variables}
    missing = tuple(n for n in variables if n not in read and n not in copied)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        ours: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        for ours, x in parameters(model).items()
    }
    return NetworkPlan(
        name,
        description,
        plan_items(abstract, stacked_parameters(model)),
        reader,
        naming,
        read,
        copied,
        missing,
        rows,
    )


@functools.lru_cache(maxsize=1)
def _draw(description: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Draw one layer of some parameters of a new model, the others are never made.

    In float32, whatever they are stored in. All layers get the same: what is stacked
    here (the zero output projections, the norm of keys) starts as a constant.
    """
    small = json.loads(description)
    small["config"] |= {"num_layers": 1, "param_dtype": "float32"}

    def draw():
        model = build_model(small, nnx.Rngs(SEED))
        values, stacked = parameters(model), stacked_parameters(model)
        return {n: values[n][0] if n in stacked else values[n] for n in names}

    return {name: np.asarray(x) for name, x in jax.jit(draw)().items()}


def branch_of(ours: str) -> str:
    """Give the prefix of a branch's parameters, "" for the base's."""
    return next((prefix for prefix in BRANCH_TENSORS if ours.startswith(prefix)), "")


def _count(parts) -> int:
    return flops.total(parts).parameters


def num_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Give the bytes that an abstract array takes."""
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
