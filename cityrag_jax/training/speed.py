"""How fast a training is: the operations of its updates, and the time that they take.

MFU is what an update has to compute, over the wall time of whole updates (encoding,
optimiser and waiting for clips in; held-out losses and saves out), over the dense
bfloat16 peak of all devices.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cityrag_jax import flops
from cityrag_jax.batch import latent_frames, latent_shape, token_grid
from cityrag_jax.checkpoint import read_config
from cityrag_jax.chips import peak_flops
from cityrag_jax.model.adapters import MARK
from cityrag_jax.training.optimizer import Labels
from cityrag_jax.training.program import Program

# Behind so many frames the autoencoder's fastest layers see grey alone and repeat what
# they made (model/vae.py, encode_before_grey): so many count of a first image.
GREY_FRAMES = 25
TRAJECTORY, GEO = "branches.0.", "branches.1."


class Stage(NamedTuple):
    """What a clip meets at once: products with parameters of a prefix, and without."""

    prefix: str
    products: float
    softmax: float = 0.0


def count_operations(
    config: ConfigDict, program: Program, condition_frames: int | None = None
) -> float:
    """Count the operations that one update needs, encoding in, by formula.

    Conditions have `condition_frames`, None being the mean of what is drawn. What is
    recomputed counts once. Adapters and CLIP's tower, under 1 %, are left out.
    """
    if config.task == "VAEReconstruction":
        return _count_reconstruction(config, program)
    shortest, longest = config.data.condition_frames
    drawn = [condition_frames or n for n in range(shortest, longest + 1)]
    length = float(np.mean([latent_frames(n) for n in drawn]))
    stages = _list_stages(config, program, length)
    return count_passes(stages, program.labels) + _count_encoding(config, program)


def count_passes(stages: Iterable[Stage], labels: Labels) -> float:
    """Add up stages, forward and backward, in the order in which a clip meets them.

    A product with trained parameters is three: forward, its input's gradient, theirs.
    With frozen ones it is two behind something trained, else one; a softmax is three
    or one.
    """
    total, behind = 0.0, False
    for stage in stages:
        trained = [
            name
            for name, label in labels.items()
            if name.startswith(stage.prefix) and label != "frozen"
        ]
        kernels = any(n.endswith(".kernel") and MARK not in n for n in trained)
        behind |= bool(trained)
        total += (1 + behind + kernels) * stage.products
        total += (3 if behind else 1) * stage.softmax
    return total


def _list_stages(config: ConfigDict, program: Program, length: float) -> list[Stage]:
    """List a transformer's stages; conditions have `length` latent frames."""
    sizes, data = read_config(program.task.description), config.data
    batch, layers = config.train.batch_size, sizes.num_layers
    latents = latent_shape(data.num_frames, data.height, data.width)
    grid = token_grid(latents, sizes.patch)
    tokens, keys = int(np.prod(grid)), round(length * np.prod(grid[1:]))
    base = _operations(flops.dit(sizes, tokens, batch=batch))
    geo = _operations(flops.geo_branch(sizes, tokens, keys, batch=batch))
    hidden = config.model.pose.hidden
    pose = _operations(
        flops.pose_branch(sizes, data.num_frames, tokens, batch=batch, hidden=hidden)
    )
    softmax = layers * batch * flops.attention(tokens, tokens, sizes.dim).flops
    base["blocks.self_attention"] -= softmax
    attend = Stage("blocks.self_attention.", base["blocks.self_attention"], softmax)
    rest = [
        Stage("blocks.modulation", 0),
        Stage(
            f"{GEO}layers.",
            geo["keys_and_values"] + geo["queries_and_output"],
            geo["attention"],
        ),
        Stage("blocks.cross_attention.", base["blocks.cross_attention"]),
        Stage("blocks.ffn.", base["blocks.ffn"]),
        Stage(TRAJECTORY, pose["projections"]),
    ]
    block = [
        Stage(stage.prefix, stage.products / layers, stage.softmax / layers)
        for stage in (attend, *rest)
    ]
    embedders = [n for n in base if n != "head" and not n.startswith("blocks.")]
    before = [Stage(f"{name}.", base[name]) for name in embedders]
    prepared = [  # of the first block, its self-attention stands before the branches
        Stage(f"{GEO}patch_embedding.", geo["patch_embedding"]),
        Stage(TRAJECTORY, pose["convolution"] + pose["mlp"]),
    ]
    first = [block[0], *prepared, *block[1:]]
    embedded = _frozen_first(before, program.labels)
    return [*embedded, *first, *(layers - 1) * block, Stage("head.", base["head"])]


def _frozen_first(stages: list[Stage], labels: Labels) -> list[Stage]:
    """Order what is embedded side by side: no frozen embedder is behind another."""
    frozen = {n for n, label in labels.items() if label == "frozen"}

    def is_trained(stage):
        return any(n.startswith(stage.prefix) for n in labels.keys() - frozen)

    return sorted(stages, key=is_trained)


def _count_encoding(config: ConfigDict, program: Program) -> float:
    """Count what the autoencoder makes for one update: target, condition, image."""
    train, data = config.train, config.data
    if train.latents:
        return 0.0
    sizes = read_config(program.task.encoders["vae"])
    clips = train.fresh / train.updates_per_call if train.pool else train.batch_size
    lengths = (data.num_frames, data.condition_frames[1])
    lengths += (min(data.num_frames, GREY_FRAMES),)
    view = data.height, data.width
    return float(clips) * sum(
        flops.total(flops.vae_encode(sizes, n, *view)).flops for n in lengths
    )


def _count_reconstruction(config: ConfigDict, program: Program) -> float:
    sizes, data = read_config(program.task.description), config.data
    view = config.train.window_frames, data.height, data.width
    made = _operations(flops.vae_encode(sizes, *view))
    made |= _operations(flops.vae_decode(sizes, *view))
    order = ("encoder", "quant_conv", "post_quant_conv", "decoder")
    stages = [Stage(f"{n}.", config.train.batch_size * made[n]) for n in order]
    return count_passes(stages, program.labels)


def _operations(parts: dict[str, flops.Cost]) -> dict[str, float]:
    return {name: float(cost.flops) for name, cost in parts.items()}


class Stopwatch:
    """Seconds spent on updates since the last look, pauses out."""

    def __init__(self):
        self._began = time.monotonic()

    def take(self) -> float:
        """Give the seconds and start anew."""
        seconds = time.monotonic() - self._began
        self._began += seconds
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context: what happens here belongs to no update."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began


def describe_speed(operations: float, updates: int, seconds: float) -> dict[str, float]:
    """Give seconds a step, and where devices tell: `mfu` and peak `memory_gib`.

    `mfu` is a share of 1, of all processes' devices; memory is the most that one of
    this process's devices ever held.
    """
    each = seconds / max(updates, 1)
    speed = {"seconds_per_step": each}
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None and each > 0:
        speed["mfu"] = operations / each / (peak * _devices_in_use())
    held = peak_bytes()
    return speed | ({"memory_gib": held / 2**30} if held else {})


def peak_bytes() -> int:
    """Give the most that one of this process's devices ever held; 0 if untold."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(x.get("peak_bytes_in_use", 0) for x in stats)


def _devices_in_use() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size
