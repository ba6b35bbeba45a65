"""One update: loss, gradients, optimiser, average; refused if anything is not finite.

The state is a pytree of arrays, its parameters a flat dict by name. It holds what is
trained; frozen parameters are an argument of their own, in the type that the module
computes in, and nothing is derived, averaged or kept for them. So are the encoders that
make examples of clips. Everything happens in one jitted call that takes the state over
(donation). With a mesh, gradients are constrained to the shards of their parameters, so
no device holds them whole.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int32, PyTree

from cityrag_jax.parallel import shard
from cityrag_jax.training.optimizer import Params, optimizer_shardings

Metrics = dict[str, Array]
Loss = Callable[[Params, PyTree, PyTree, Array], tuple[Array, Metrics]]
Update = Callable[..., tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes. `step` counts updates, refused ones included.

    `params` are the trained parameters; `ema` is their averaged copy, or empty without
    averaging.
    """

    step: Any
    params: Any
    ema: Any
    optimizer: Any


def init_state(
    params: Params, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """Start at step 0; the average starts at the parameters."""
    ema = jax.tree.map(jnp.array, params) if ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def state_shardings(
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    shardings: dict[str, Sharding],
    mesh: Mesh,
) -> TrainState:
    """Give the sharding of every array of the state."""
    return TrainState(
        NamedSharding(mesh, PartitionSpec()),
        shardings,
        shardings if abstract.ema else {},
        optimizer_shardings(optimizer, abstract.params, shardings, mesh),
    )


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mix: Callable[[PyTree, Array], PyTree] = lambda batch, step: batch,
    ema_decay: float = 0.0,
    micro_batches: int = 1,
    updates: int = 1,
    shardings: TrainState | None = None,
) -> Update:
    """Build the jitted call `(state, frozen, encoders, batch) -> (state, metrics)`.

    It makes `updates` updates. `mix(batch, step)` gives what one of them takes of
    `batch`, and `loss(params, encoders, batch, step)` the loss of all parameters and a
    dict of further numbers. With `micro_batches` the gradient is the mean over as many
    equal parts of the batch, one after the other: that of the whole batch where the
    loss is a mean over clips.

    Metrics are the loss's numbers, `loss`, `gradient_norm` (before clipping), `refused`
    (1 if the update was not finite: then parameters, average and optimiser are as
    before) and `clips` (their ids), each with an entry for every update.
    """

    def constrain(gradients):
        if shardings is None:
            return gradients
        return jax.lax.with_sharding_constraint(gradients, shardings.params)

    def differentiate(params, frozen, encoders, batch, step):
        def value(params):
            return loss(frozen | params, encoders, batch, step)

        result, gradients = jax.value_and_grad(value, has_aux=True)(params)
        return result, constrain(gradients)

    def accumulate(params, frozen, encoders, batch, step):
        """Average over parts; sums are float32 in the shards of the parameters."""
        if micro_batches == 1:  # XLA on CPUs is several times slower inside a scan
            return differentiate(params, frozen, encoders, batch, step)
        parts = jax.tree.map(lambda x: split_batch(x, micro_batches), batch)

        def add(total, part):
            result, gradients = differentiate(params, frozen, encoders, part, step)
            return constrain(jax.tree.map(jnp.add, total, gradients)), result

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        total, results = jax.lax.scan(add, constrain(zeros), parts)
        gradients = jax.tree.map(lambda x: x / micro_batches, total)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), results), gradients

    def update(state, frozen, encoders, batch):
        batch = mix(batch, state.step)
        given = frozen, encoders, batch, state.step
        (number, more), gradients = accumulate(state.params, *given)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(number) & jnp.isfinite(norm)
        changes, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        ema = average(state.ema, params, state.step, ema_decay)
        new = TrainState(state.step + 1, params, ema, moments)
        old = dataclasses.replace(state, step=new.step)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {"loss": number, "gradient_norm": norm, "refused": ~finite}
        return kept, metrics | more | name_clips(batch)

    def call(state, *given):
        if updates == 1:
            state, metrics = update(state, *given)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda s, _: update(s, *given), state, length=updates)

    out = None if shardings is None else (shardings, None)
    return jax.jit(call, donate_argnums=0, out_shardings=out)


def name_clips(batch: PyTree) -> Metrics:
    """Give the ids of a batch's clips, if it has any."""
    named = isinstance(batch, dict) and "clip_id" in batch
    ids = batch["clip_id"] if named else getattr(batch, "clip_id", None)
    return {} if ids is None else {"clips": jnp.asarray(ids)}


def split_batch(x: Array, count: int) -> Array:
    """Cut the leading axis into `count` parts: row i goes to part i modulo `count`.

    So every device gives rows of its own to every part, and none travels.
    """
    parts = rearrange(x, "(b m) ... -> m b ...", m=count)
    return shard(parts, None, "batch", *(None,) * (parts.ndim - 2))


def average(
    ema: Params, params: Params, step: Int32[Array, ""], decay: float
) -> Params:
    """Move the average toward the parameters by max(1 - decay, 2 / (n + 2)).

    n counts the updates before this one. A fixed slow average would show the start of
    the training for a long time.
    """
    if not ema:
        return ema
    weight = jnp.maximum(1 - decay, 2 / (step.astype(jnp.float32) + 2))
    return {name: x + weight * (params[name] - x) for name, x in ema.items()}


def check_finite(
    steps: list[int],
    refused: list[Any],
    patience: int,
    clips: Mapping[int, str] | None = None,
) -> None:
    """Raise FloatingPointError if `patience` updates in a row were refused.

    Both lists run together, over the updates since the last good one; `clips` names
    those of a step.
    """
    bad = []
    for step, was_refused in zip(steps, refused, strict=True):
        bad = [*bad, step] if was_refused else []
        if len(bad) >= patience:
            raise FloatingPointError(
                f"Loss or gradient was not finite in steps {bad[0]} to {bad[-1]}; the "
                "parameters are those before. Lower optimizer.learning_rate, or look "
                "at the clips of these steps, then start again from the last "
                f"checkpoint.{_list_clips(bad, clips or {})}"
            )


def _list_clips(steps: list[int], clips: Mapping[int, str]) -> str:
    lines = [f"\n  step {step}: clips {clips[step]}" for step in steps if step in clips]
    return "".join(lines)
