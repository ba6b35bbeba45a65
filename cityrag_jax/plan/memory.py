"""Memory of one device in an update, by formula, where no compiler can be asked.

What is held all the time is exact: shards of what the program takes. What comes and
goes is counted tensor by tensor where it is large. `plan.report` prints the formula
beside the compiler's own count, wherever there is one.
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from cityrag_jax.batch import TIME_STRIDE
from cityrag_jax.checkpoint import read_config
from cityrag_jax.model.attention import SPLASH_BLOCK
from cityrag_jax.model.dit import BLOCK_INPUT
from cityrag_jax.parallel import RULES
from cityrag_jax.plan.chips import Chip
from cityrag_jax.plan.operations import model_of, sizes_of
from cityrag_jax.training.program import Program

FLOAT, HALF = 4, 2

# Widths of a token that a block's backward pass holds at once, in bfloat16: normed and
# modulated inputs, q, k, v of an attention before and behind the exchange with their
# gradients, the stream and its gradient in float32.
BLOCK_WIDTHS = 24
# Copies of the widest activation that the autoencoder's first level holds: input,
# result, the three time taps side by side, caches, and what is being read.
ENCODER_COPIES = 10


def shard_bytes(tree: Any) -> int:
    """Sum up what one device holds of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def clips_at_once(config: ConfigDict, mesh: dict[str, int]) -> float:
    """Count the clips whose tokens one device has a part of, at a time."""
    axes = {**RULES, **dict(config.train.rules)}["batch"]
    ways = math.prod(mesh[name] for name in axes)
    return config.train.batch_size / config.train.micro_batches / ways


def memory_by_formula(
    config: ConfigDict, program: Program, mesh: dict[str, int], chip: Chip
) -> dict[str, float]:
    """Give bytes of a device by what they are for; the last one is the peak.

    Held: parameters, optimiser, average, frozen, encoders, batch. The peak adds the
    most that one of three times needs: encoding, the backward pass, the optimiser.
    """
    state = program.state
    held = {
        "trained parameters": shard_bytes(state.params),
        "optimiser": shard_bytes(state.optimizer),
        "average": shard_bytes(state.ema),
        "frozen parameters": shard_bytes(program.frozen),
        "encoders": shard_bytes(program.encoders),
        "clips": shard_bytes(program.batch),
    }
    gradients = held["trained parameters"]
    if config.train.micro_batches > 1:
        gradients *= 2  # the sum so far, and what is added to it
    saved = saved_by_blocks(config, mesh)
    times = {
        "gradients": gradients,
        "saved for the backward pass": saved,
        "work of a block": block_work(config, program, mesh),
        "work of its kernels": kernel_work(config, mesh) if chip.is_tpu else 0.0,
    }
    backward = sum(times.values())
    optimiser = optimiser_work(program)
    encoding = encoder_work(config, program, mesh)
    peak = sum(held.values()) + max(backward, optimiser, encoding)
    others = {"encoding": encoding, "optimising": optimiser, "peak": peak}
    return {name: float(size) for name, size in (held | times | others).items()}


def optimiser_work(program: Program) -> float:
    """Count gradients, and what becomes of them: directions and new momentum.

    On one device large matrices go one parameter after the other; there is one more of
    a parameter's size for what goes into its Newton-Schulz steps.
    """
    params = program.state.params.values()
    largest = max(params, key=lambda x: x.size, default=None)
    if largest is None:
        return 0.0
    if isinstance(largest.sharding, NamedSharding) and largest.sharding.mesh.size > 1:
        return 3.0 * shard_bytes(program.state.params)
    return float(shard_bytes(program.state.params) + 3 * shard_bytes(largest))


def saved_by_blocks(config: ConfigDict, mesh: dict[str, int]) -> float:
    """Count what all blocks keep on the device: their inputs, their kernels' results.

    A kernel keeps its result in bfloat16 and a float32 number a head and token.
    """
    model = model_of(config)
    if model.remat:
        input_ = () if BLOCK_INPUT in model.offload else (BLOCK_INPUT,)
        each = _kept(config, {*input_, *model.keep})
    else:
        widths = BLOCK_WIDTHS + 4 * model.ffn_dim / model.dim
        each = HALF * model.dim * widths
    return each * _tokens_of_blocks(config, mesh)


def offloaded(config: ConfigDict, mesh: dict[str, int]) -> float:
    """Count what a device brings to the host's memory in an update, and fetches."""
    each = _kept(config, set(model_of(config).offload))
    return each * _tokens_of_blocks(config, mesh) * config.train.micro_batches


def _kept(config: ConfigDict, names: set[str]) -> float:
    """Give the bytes that one token leaves in one block under these names."""
    model = model_of(config)
    stream = jax.numpy.dtype(config.train.stream_dtype).itemsize * model.dim
    kernel = HALF * model.dim + FLOAT * model.num_heads
    return float(sum(stream if name == BLOCK_INPUT else kernel for name in names))


def _tokens_of_blocks(config: ConfigDict, mesh: dict[str, int]) -> float:
    sizes = sizes_of(config)
    tokens = sizes.video * clips_at_once(config, mesh) / mesh["sequence"]
    return float(sizes.layers * tokens)


def block_work(config: ConfigDict, program: Program, mesh: dict[str, int]) -> float:
    """Count what the backward pass of one block needs for itself.

    Beside the activations: the tokens of the condition, normed and their gradient, in
    float32; two blocks' weights gathered in bfloat16; one's gradients in float32.
    """
    model, sizes = model_of(config), sizes_of(config)
    clips = clips_at_once(config, mesh) / mesh["sequence"]
    video, condition = sizes.video * clips, sizes.condition * clips
    widths = BLOCK_WIDTHS * model.dim + 4 * model.ffn_dim
    activations = HALF * widths * (video + condition) / 2
    tokens = 2 * FLOAT * model.dim * condition
    block, trained = (
        sum(x.size for n, x in group.items() if n in program.stacked) / model.num_layers
        for group in (program.parameters, program.state.params)
    )
    weights = 2 * HALF * block + FLOAT * trained
    return float(activations + tokens + weights)


def kernel_work(config: ConfigDict, mesh: dict[str, int]) -> float:
    """Count what the backward pass of splash attention keeps: dq for each key block.

    cuDNN's needs nothing of that size.
    """
    sizes = sizes_of(config)
    blocks = math.ceil(max(sizes.video, sizes.condition) / SPLASH_BLOCK)
    tokens = sizes.video * clips_at_once(config, mesh) / mesh["sequence"]
    return float(HALF * blocks * tokens * sizes.dim)


def encoder_work(config: ConfigDict, program: Program, mesh: dict[str, int]) -> float:
    """Count what the autoencoder's widest level needs for a group of four frames.

    Target and condition of the clips at a time are shared among `sequence`.
    """
    encoded = config.train.pool or config.train.latents
    if encoded or "vae" not in program.task.encoders:
        return 0.0
    vae, data = read_config(program.task.encoders["vae"]), config.data
    videos = math.ceil(2 * clips_at_once(config, mesh) / mesh["sequence"])
    itemsize = jax.numpy.dtype(vae.dtype).itemsize
    frame = data.height * data.width * vae.base_dim * itemsize
    return float(videos * TIME_STRIDE * frame * ENCODER_COPIES)
