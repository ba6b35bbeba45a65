"""A training as one program: what it takes, as shapes on shards, and what it does.

`make_program` needs a config, a mesh and descriptions of the start model: no city, no
weights, no files, and no device that could hold them. The trainer fills the arguments
with values, a planner compiles for them as they are, a benchmark draws them:

    program = make_program(config, mesh, assumed_start(config))
    with jax.set_mesh(mesh):
        compiled = program.update.lower(*program.arguments).compile()
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import (
    COMPUTING,
    Arrays,
    Bundle,
    abstract_model,
    abstract_parameters,
    describe,
    held_in_int8,
    parameter_shardings,
    parameters,
    read_config,
    stacked_parameters,
    with_parameters,
    with_statistics,
)
from cityrag_jax.model.clip_vision import CLIPVision, CLIPVisionConfig
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import batch_axes
from cityrag_jax.training.examples import clip_config, draw_batch, pool_size
from cityrag_jax.training.optimizer import (
    Labels,
    OptimizerConfig,
    label_parameters,
    make_optimizer,
    split_frozen,
)
from cityrag_jax.training.step import (
    TrainState,
    Update,
    init_state,
    make_step,
    state_shardings,
)
from cityrag_jax.training.task import Encoders, Task
from cityrag_jax.training.tasks import describe_model, make_task


@dataclasses.dataclass(frozen=True)
class Program:
    """A training's functions, all jitted, and the arguments of `update`, all abstract.

        state = begin(params)                                      trained ones, donated
        state, metrics = update(state, frozen, encoders, batch)    state donated
        examples = encode(encoders, clips)
        losses = measure(params, encoders, examples, probe)        trained and frozen

    `batch` is a `Clip` where the update encodes what it is streamed, else a batch of
    examples that are read, or the pool of those that it draws from. Call and lower them
    with the mesh in context.
    """

    task: Task
    labels: Labels
    stacked: frozenset[str]
    state: TrainState
    frozen: Arrays
    encoders: Encoders
    batch: Clip | Arrays
    begin: Callable[..., TrainState]
    update: Update
    encode: Callable[..., Any]
    measure: Callable[..., Any]

    @property
    def arguments(self) -> tuple[TrainState, Arrays, Encoders, Clip | Arrays]:
        """Give what `update` takes, as shapes, types and shardings."""
        return self.state, self.frozen, self.encoders, self.batch

    @property
    def parameters(self) -> Arrays:
        """Give all parameters, trained and frozen."""
        return self.frozen | self.state.params


def make_program(
    config: ConfigDict,
    mesh: Mesh | None,
    start: Bundle | None,
    *,
    encoders_dtype: DTypeLike | None = None,
) -> Program:
    """Build the program of a config on a mesh, or without one on the first device.

    Of `start` only descriptions and the prompt's rows are looked at; `encoders_dtype`
    is the type that its encoders are read in, None their config's. Raises ValueError
    where it does not fit the config.
    """
    train, task = config.train, make_task(config, start)
    model = abstract_model(task.description)
    whole = abstract_parameters(model, parameter_shardings(model, mesh))
    options = OptimizerConfig(**config.optimizer)
    labels = label_parameters(whole, options.frozen)
    params, frozen = split_frozen(whole, labels)
    of_whole = {name: x.sharding for name, x in whole.items()}
    optimizer = make_optimizer(options, labels, train.steps, of_whole)
    init = functools.partial(init_state, optimizer=optimizer, ema_decay=train.ema_decay)
    state = jax.eval_shape(init, params)
    shardings = None
    if mesh is not None:
        of_params = {name: x.sharding for name, x in params.items()}
        shardings = state_shardings(state, optimizer, of_params, mesh)

    encoders = _abstract_encoders(task, mesh, encoders_dtype)
    batch, mix = _abstract_batch(config, task, encoders, mesh), task.mix
    if train.pool:

        def mix(pool, step):
            chosen = draw_batch(pool, config.seed, step, train.batch_size)
            return task.mix(chosen, step)

    def loss(params, encoders, batch, step):
        if isinstance(batch, Clip):
            batch = task.encode(encoders, batch)
        return task.loss(params, encoders, batch, step)

    return Program(
        task=task,
        labels=labels,
        stacked=stacked_parameters(model),
        state=_on_shards(state, shardings),
        frozen=_abstract_frozen(config, task, frozen, stacked_parameters(model)),
        encoders=encoders,
        batch=batch,
        begin=jax.jit(init, donate_argnums=0, out_shardings=shardings),
        update=make_step(
            loss,
            optimizer,
            mix=mix,
            ema_decay=train.ema_decay,
            micro_batches=train.micro_batches,
            updates=train.updates_per_call,
            shardings=shardings,
        ),
        encode=jax.jit(
            task.encode, out_shardings=None if mesh is None else _rows(mesh)
        ),
        measure=jax.jit(task.held_out_loss),
    )


def assumed_start(config: ConfigDict) -> Bundle | None:
    """Describe what a config's model would start from, where there is none at hand.

    Wan's own autoencoder with as many channels as the config's latents, its CLIP tower
    (ViT-H/14), and a prompt of the full length, all zeros.
    """
    if config.task != "CityRAG":
        return None
    model = read_config(describe_model(config))
    z, half = model.out_channels, dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    arithmetic = {"dtype": jnp.dtype(config.model.vae_dtype or half["dtype"])}
    plain = dict(latent_mean=(0.0,) * z, latent_std=(1.0,) * z)
    autoencoder = VAEConfig(z_dim=z, **plain, **(half | arithmetic))
    descriptions = {"vae": describe(WanVAE, autoencoder)}
    if model.image_dim is not None:
        sizes = dict(image_size=224, patch_size=14, num_heads=16, num_layers=32)
        width = dict(dim=model.image_dim, mlp_dim=4 * model.image_dim)
        tower = CLIPVisionConfig(**sizes, **width, **half)
        descriptions["clip"] = describe(CLIPVision, tower)
    text = np.zeros((model.text_len, model.text_dim), np.float32)
    return Bundle({}, descriptions, text, origin="what is assumed of a start")


def abstract_clips(data: ConfigDict, count: int, sharding: Sharding) -> Clip:
    """Give the shapes of a batch of clips as the loader makes them."""
    sizes = clip_config(data)
    view = (sizes.height, sizes.width, 3)
    shapes = {
        "frames": ((sizes.num_frames, *view), jnp.uint8),
        "first_from_camera": ((sizes.num_frames, 4, 4), jnp.float32),
        "condition": ((sizes.condition_frames[1], *view), jnp.uint8),
        "condition_length": ((), jnp.int32),
        "clip_id": ((), jnp.uint32),
        "first_from_view": ((sizes.condition_frames[1], 4, 4), jnp.float32),
    }
    arrays = [
        jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding)
        for shape, dtype in (shapes[field.name] for field in dataclasses.fields(Clip))
    ]
    return Clip.tree_unflatten(None, arrays)


def _abstract_frozen(
    config: ConfigDict, task: Task, frozen: Arrays, stacked: Collection[str]
) -> Arrays:
    """Give what is frozen the types that it computes in, or has its kernels as int8."""
    computing = parameters(abstract_model(task.description, COMPUTING))
    held = {n: _abstract(x, x.sharding, computing[n].dtype) for n, x in frozen.items()}
    return held_in_int8(held, stacked, frozen_as_int8(config))


def frozen_as_int8(config: ConfigDict) -> tuple[str, ...]:
    """Give the patterns of parameters whose kernels are held as int8, if any."""
    kept = config.train.frozen_dtype == "int8"
    return tuple(config.optimizer.frozen) if kept else ()


def _abstract_encoders(
    task: Task, mesh: Mesh | None, dtype: DTypeLike | None
) -> Encoders:
    encoders = {}
    for name, description in task.encoders.items():
        model = abstract_model(description, dtype)
        values = abstract_parameters(model, parameter_shardings(model, mesh))
        encoders[name] = with_statistics(
            with_parameters(model, values), mesh, abstract=True
        )
    if task.text is not None:
        encoders["text"] = _abstract(task.text, _sharding(mesh))
    return encoders


def _abstract_batch(
    config: ConfigDict, task: Task, encoders: Encoders, mesh: Mesh | None
) -> Clip | Arrays:
    """Give a batch of the stream, encoded or not, or the whole pool with its count."""
    train, rows = config.train, _rows(mesh)
    if not train.pool and not train.latents:
        return abstract_clips(config.data, train.batch_size, rows)
    clips = abstract_clips(config.data, train.encode_batch, rows)
    size = pool_size(config) if train.pool else train.batch_size
    examples = {
        name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=rows)
        for name, x in jax.eval_shape(task.encode, encoders, clips).items()
    }
    if train.latents:
        return examples
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=_sharding(mesh))
    return examples | {"count": count}


def _rows(mesh: Mesh | None) -> Sharding:
    return _sharding(mesh, batch_axes())


def _sharding(mesh: Mesh | None, *axes: Any) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, PartitionSpec(*axes))


def _abstract(x: Any, sharding: Sharding, dtype: DTypeLike | None = None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)


def _on_shards(state, shardings):
    if shardings is None:
        shardings = jax.tree.map(lambda _: _sharding(None), state)
    return jax.tree.map(_abstract, state, shardings)
