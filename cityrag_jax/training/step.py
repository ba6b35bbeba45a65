"""One update: loss, gradients, optimiser, average; refused if anything is not finite.

The state is a pytree of arrays, its parameters a flat dict by name. Everything happens
in one jitted call that takes the state over (donation). With a mesh, gradients are
constrained to the shards of their parameters, so no device holds them whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int32, PyTree

from cityrag_jax.training.optimizer import Labels, Params, optimizer_shardings

Loss = Callable[[Params, PyTree, Array], tuple[Array, dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes. `step` counts updates, refused ones included.

    `ema` is the averaged copy of the parameters, or empty without averaging.
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
    labels: Labels,
    ema_decay: float = 0.0,
    shardings: TrainState | None = None,
    updates: int = 1,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Array]]]:
    """Build the jitted call `(state, batch) -> (state, metrics)` of `updates` updates.

    `loss(params, batch, step)` gives the loss and a dict of further numbers; it draws
    what it needs of `batch` by `step`. Metrics are those, `loss`, `gradient_norm`
    (before clipping) and `refused` (1 if the update was not finite: then parameters,
    average and optimiser are as before), each with an entry for every update.
    """

    def value(params, batch, step):
        return loss(stop_frozen(params, labels), batch, step)

    def update(state, batch):
        gradient = jax.value_and_grad(value, has_aux=True)
        (number, more), gradients = gradient(state.params, batch, state.step)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings.params)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(number) & jnp.isfinite(norm)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = average(state.ema, params, state.step, ema_decay)
        new = TrainState(state.step + 1, params, ema, moments)
        old = dataclasses.replace(state, step=new.step)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {"loss": number, "gradient_norm": norm, "refused": ~finite}
        return kept, metrics | more

    def call(state, batch):
        if updates == 1:  # XLA on CPUs is several times slower inside a scan
            state, metrics = update(state, batch)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda s, _: update(s, batch), state, length=updates)

    out = None if shardings is None else (shardings, None)
    return jax.jit(call, donate_argnums=0, out_shardings=out)


def stop_frozen(params: Params, labels: Labels) -> Params:
    """Cut the gradient of frozen parameters, so that it is never computed."""
    return {
        name: jax.lax.stop_gradient(x) if labels[name] == "frozen" else x
        for name, x in params.items()
    }


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


def check_finite(steps: list[int], refused: list[Any], patience: int) -> None:
    """Raise FloatingPointError if `patience` updates in a row were refused.

    Both lists run together, over the updates since the last good one.
    """
    bad = []
    for step, was_refused in zip(steps, refused, strict=True):
        bad = [*bad, step] if was_refused else []
        if len(bad) >= patience:
            raise FloatingPointError(
                f"Loss or gradient was not finite in steps {bad[0]} to {bad[-1]}; the "
                "parameters are those before. Lower optimizer.learning_rate, or look "
                "at the clips of these steps, then start again from the last "
                "checkpoint."
            )
