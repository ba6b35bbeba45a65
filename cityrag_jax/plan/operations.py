"""What one update computes and moves, by formula: `cityrag_jax.flops` put together.

A compiler's own count does not help: of a loop over blocks it counts one turn.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from cityrag_jax import flops
from cityrag_jax.batch import latent_shape, token_grid
from cityrag_jax.checkpoint import abstract_model, parameters, read_config
from cityrag_jax.flops import Cost
from cityrag_jax.model.dit import DiTConfig
from cityrag_jax.training.program import Program
from cityrag_jax.training.speed import GREY_FRAMES
from cityrag_jax.training.tasks import describe_model

NEWTON_SCHULZ = 5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of a clip and of its condition, and the width that they have."""

    video: int
    condition: int
    dim: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Operations:
    """The parts of one update, of all devices together.

    `again` is what rematerialised blocks compute a second time; `backward` is twice
    the forward of what is trained, once that of what is frozen but lies behind it.
    """

    forward: Cost
    backward: Cost
    again: Cost
    encoders: Cost
    optimizer: Cost

    @property
    def all(self) -> Cost:
        """Add everything up that is run."""
        return flops.total(getattr(self, x.name) for x in dataclasses.fields(self))


def model_of(config: ConfigDict) -> DiTConfig:
    """Give the sizes of the transformer that a config trains."""
    return read_config(describe_model(config))


def sizes_of(config: ConfigDict) -> Sizes:
    """Give the tokens of a config's clips, conditions as long as they may be."""
    data, model = config.data, model_of(config)

    def tokens(frames: int) -> int:
        latents = latent_shape(frames, data.height, data.width)
        return math.prod(token_grid(latents, model.patch))

    video, condition = tokens(data.num_frames), tokens(data.condition_frames[1])
    return Sizes(video, condition, model.dim, model.num_layers)


def count_operations(config: ConfigDict, program: Program) -> Operations:
    """Count one update of a config's program."""
    model, sizes = model_of(config), sizes_of(config)
    batch, tokens = config.train.batch_size, (sizes.video, sizes.condition)
    pose = flops.pose_branch(
        model,
        config.data.num_frames,
        sizes.video,
        batch=batch,
        hidden=config.model.pose.hidden,
    )
    parts = flops.dit(model, sizes.video, batch=batch)
    parts |= {f"branches.pose.{n}": cost for n, cost in pose.items()}
    geo = flops.geo_branch(model, *tokens, batch=batch)
    parts |= {f"branches.geo.{n}": cost for n, cost in geo.items()}
    kernels = {
        name: sizes.layers * batch * flops.attention(sizes.video, keys, sizes.dim)
        for name, keys in zip(("self", "geo"), tokens, strict=True)
    }
    parts["blocks.self_attention"] = _without(
        parts["blocks.self_attention"], kernels["self"]
    )
    del parts["branches.geo.attention"]
    forward = flops.total(parts) + flops.total(kernels)
    backward = flops.total(
        _backward(name, program.labels) * cost for name, cost in parts.items()
    ) + 2 * flops.total(kernels)
    again = Cost()
    if model.remat:
        in_blocks = {n: x for n, x in parts.items() if _in_blocks(n)}
        kept = {name.removesuffix("_attention") for name in model.keep + model.offload}
        rerun = {name: x for name, x in kernels.items() if name not in kept}
        again = flops.total(in_blocks) + flops.total(rerun)
    return Operations(
        forward=forward,
        backward=backward,
        again=again,
        encoders=_encoders(config, program),
        optimizer=_optimizer(program),
    )


def _without(cost: Cost, part: Cost) -> Cost:
    return Cost(cost.flops - part.flops, cost.bytes - part.bytes, cost.parameters)


def _in_blocks(part: str) -> bool:
    return part.startswith(("blocks.", "branches.geo.")) and "patch" not in part


def _backward(part: str, labels: Mapping[str, str]) -> int:
    """Say how many forward passes a part's backward pass is worth."""
    if part.startswith("branches."):  # trained, or there is no training
        return 2
    trained = any(labels[n] != "frozen" for n in fnmatch.filter(labels, f"{part}*"))
    return 2 if trained else int(part.startswith(("blocks.", "head")))


def _encoders(config: ConfigDict, program: Program) -> Cost:
    """Count target, condition, first image and, if there is one, the CLIP tower."""
    data, batch = config.data, config.train.batch_size
    if config.train.pool or config.train.latents:
        return Cost()
    vae = read_config(program.task.encoders["vae"])
    frames = data.num_frames, data.condition_frames[1], GREY_FRAMES
    costs = [
        flops.total(flops.vae_encode(vae, n, data.height, data.width)) for n in frames
    ]
    if "clip" in program.task.encoders:
        tower = parameters(abstract_model(program.task.encoders["clip"]))
        count = sum(x.size for x in tower.values())
        costs.append(Cost(2 * flops.IMAGE_TOKENS * count, 2 * count, count))
    return batch * flops.total(costs)


def _optimizer(program: Program) -> Cost:
    """Count Newton-Schulz steps, and each number of the state read and written.

    A matrix of m x n, m the smaller: 4 m m n + 2 m m m a step.
    """
    operations = 0
    for name, x in program.state.params.items():
        if program.labels[name] == "muon":
            *layers, rows, columns = x.shape
            m, n = sorted((rows, columns))
            step = 4 * m * m * n + 2 * m**3
            operations += NEWTON_SCHULZ * step * math.prod(layers)
    leaves = jax.tree.leaves(program.state)
    stored = sum(x.dtype.itemsize * int(np.prod(x.shape)) for x in leaves)
    return Cost(operations, 3 * stored, 0)
