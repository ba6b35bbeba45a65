"""Muon on the matrices of blocks and branches, AdamW on the rest but the frozen.

Parameters are a flat dict from dotted names to arrays. A label for each (`muon`, `adam`
or `frozen`) decides by name and dimensions; the optimiser never sees frozen ones.

Muon: momentum, then five Newton-Schulz steps that bring all singular values near 1
(optax's, on explicit dimension numbers since layers are stacked), scaled so that an
update has the size of Adam's: 0.2 sqrt(max(in, out)) (Liu et al., arXiv:2502.16982,
which the paper cites). Our momentum is not bias-corrected, as torch.optim.Muon's:
optax's correction weighs gradient and buffer differently in the first steps.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from cityrag_jax.int8 import parameter_of
from cityrag_jax.model.adapters import MARK

Params = dict[str, Array]
Labels = dict[str, str]

# A stacked matrix is [layers, in, out]; the other axes are a batch to optax.
MATRIX = optax.contrib.MuonDimensionNumbers((0,), (1,))
STACKED_MATRIX = optax.contrib.MuonDimensionNumbers((1,), (2,))
LARGE = 2**21  # numbers of a matrix: from about 1500 x 1500 on


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates, schedule and what is frozen.

    `adam_learning_rate` None means the same as Muon's. The rate rises linearly over
    `warmup_steps`, stays, and falls linearly to zero over the last `decay_fraction` of
    the training (0: it stays). `clip_norm` 0 does not clip. `frozen` are name patterns
    such as "blocks.cross_attention.*". `newton_schulz_dtype` may be "bfloat16"; so may
    `momentum_dtype`, what Muon's average is kept in between updates that compute it in
    float32.
    """

    learning_rate: float = 1e-5
    adam_learning_rate: float | None = None
    warmup_steps: int = 0
    decay_fraction: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    frozen: tuple[str, ...] = ()
    momentum: float = 0.95
    nesterov: bool = True
    consistent_rms: float | None = 0.2
    newton_schulz_dtype: str = "float32"
    momentum_dtype: str = "float32"
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8


def label_parameters(params: Mapping[str, Any], frozen: tuple[str, ...]) -> Labels:
    """Label every parameter `muon`, `adam` or `frozen`.

    Muon takes the 2-D matrices (3-D where stacked) called kernel inside blocks and
    branches; embeddings of tokens, norms, biases and modulation tables go to
    Adam, as do all parameters outside. Adapters are never frozen, whatever the patterns
    of their base, and go to Adam. A pattern that fits nothing is a ValueError.
    """
    for pattern in frozen:
        if not fnmatch.filter(params, pattern):
            raise ValueError(
                f"optimizer.frozen has {pattern!r}, which fits no parameter; names are "
                f"like {', '.join(list(params)[:3])}."
            )
    return {name: _label(name, x.ndim, frozen) for name, x in params.items()}


def split_frozen(
    values: Mapping[str, Any], labels: Labels
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part what stands under the parameters' names into trained and frozen."""
    frozen = {n: x for n, x in values.items() if labels[parameter_of(n)] == "frozen"}
    return {name: x for name, x in values.items() if name not in frozen}, frozen


def _label(name: str, ndim: int, frozen: tuple[str, ...]) -> str:
    if MARK in name:
        return "adam"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen):
        return "frozen"
    root, *middle, last = name.split(".")
    inside = root in ("blocks", "branches") and "patch_embedding" not in middle
    matrix = last == "kernel" and ndim in (2, 3)
    return "muon" if inside and matrix else "adam"


def make_optimizer(
    config: OptimizerConfig,
    labels: Labels,
    num_steps: int,
    shardings: Mapping[str, Sharding] | None = None,
) -> optax.GradientTransformation:
    """Build the optimiser of a training of `num_steps` updates.

    It takes the parameters that are not labelled frozen. The norm that is clipped is
    the global one over all of them. `shardings` are those of the parameters, where a
    mesh holds them.
    """
    trained = {name: label for name, label in labels.items() if label != "frozen"}
    adam_rate = config.adam_learning_rate
    if adam_rate is None:
        adam_rate = config.learning_rate
    decay = optax.add_decayed_weights(config.weight_decay, _is_matrix)
    muon = optax.chain(
        scale_by_muon(config, shardings),
        decay,
        optax.scale_by_learning_rate(
            learning_rate_schedule(config, config.learning_rate, num_steps)
        ),
    )
    adam = optax.chain(
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        decay,
        optax.scale_by_learning_rate(
            learning_rate_schedule(config, adam_rate, num_steps)
        ),
    )
    groups = {"muon": muon, "adam": adam}
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else None
    parts = [] if clip is None else [clip]
    return optax.chain(*parts, optax.multi_transform(groups, trained))


def learning_rate_schedule(
    config: OptimizerConfig, peak: float, num_steps: int
) -> optax.Schedule:
    """Give the rate for each update, counted from 0: warm-up, constant, decay."""
    decay_steps = int(round(config.decay_fraction * num_steps))

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        rise = (count + 1) / max(config.warmup_steps, 1)
        fall = (num_steps - count) / max(decay_steps, 1) if decay_steps else 1.0
        return peak * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

    return rate


class MuonState(NamedTuple):
    """Averaged gradients of the matrices, in `momentum_dtype`."""

    momentum: Params


def scale_by_muon(
    config: OptimizerConfig, shardings: Mapping[str, Sharding] | None = None
) -> optax.GradientTransformation:
    """Turn gradients [in, out] or [layers, in, out] into Muon's updates.

    On a mesh, momentum and Newton-Schulz are split over the layers: gradients come in
    and updates go out by one exchange, and every device orthogonalises whole matrices
    of its own. Where the layers do not divide, they are padded with zeros in between,
    and momentum stays with the parameters.
    """
    on_mesh = {
        name: sharding
        for name, sharding in (shardings or {}).items()
        if isinstance(sharding, NamedSharding)
    }

    def arrive(name, gradient):
        place = on_mesh[name]
        return _to_layers(gradient, place) if _divides(gradient, place) else gradient

    def leave(name, ahead):
        return _direction_on_mesh(ahead, config, on_mesh[name])

    def init(params):
        zeros = functools.partial(jnp.zeros_like, dtype=config.momentum_dtype)
        return MuonState(jax.tree.map(zeros, params))

    def keep(momentum):
        kept = jax.tree.map(lambda m: m.astype(config.momentum_dtype), momentum)
        return MuonState(kept)

    def update(updates, state, params=None):
        del params
        beta = config.momentum
        average = functools.partial(
            jax.tree.map, lambda m, g: beta * m + (1 - beta) * g
        )
        if not on_mesh:
            momentum = average(state.momentum, updates)
            ahead = average(momentum, updates) if config.nesterov else momentum
            return _directions(ahead, config), keep(momentum)
        gradients = _map_named(arrive, updates)
        momentum = average(state.momentum, gradients)
        ahead = average(momentum, gradients) if config.nesterov else momentum
        directions = _map_named(leave, ahead)
        return directions, keep(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(
    x: Float[Array, "*layers in out"], dtype: str = "float32"
) -> Float[Array, "*layers in out"]:
    """Bring singular values near 1 by five Newton-Schulz steps on each matrix.

    float32 runs optax's. For "bfloat16" the iteration is written out here: products of
    matrices are bfloat16, but optax would round the coefficients too (2.0315 to 2.03),
    which alone moves the result by 3 %.
    """
    numbers = STACKED_MATRIX if x.ndim == 3 else MATRIX
    if dtype != "float32":
        return _newton_schulz(x, jnp.dtype(dtype))
    # With beta 0 optax's momentum is the input itself, and its state is not kept.
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=numbers
    )
    with jax.default_matmul_precision("highest"):
        return muon.update(x, muon.init(x))[0]


def _newton_schulz(x, dtype):
    """X <- a X + (b A + c A A) X with A = X X^T, on the flatter of X and X^T."""
    a, b, c = 3.4445, -4.7750, 2.0315  # KellerJordan/Muon
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    x = (x / (norm + 1e-8)).astype(dtype)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def step(_, x):
        gram = product(x, jnp.swapaxes(x, -1, -2)).astype(dtype)
        polynomial = b * gram.astype(jnp.float32) + c * product(gram, gram)
        step = product(polynomial.astype(dtype), x)
        return (a * x.astype(jnp.float32) + step).astype(dtype)

    x = jax.lax.fori_loop(0, 5, step, x).astype(jnp.float32)
    return jnp.swapaxes(x, -1, -2) if tall else x


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    params: Mapping[str, Any],
    shardings: Mapping[str, Sharding],
    mesh: Mesh,
) -> optax.OptState:
    """Give every leaf's sharding: momentum by layers, where they divide.

    Other leaves are sharded like their parameter; counters are replicated.
    """
    state = jax.eval_shape(optimizer.init, dict(params))

    def sharding(path, leaf):
        name = getattr(path[-1], "key", None) if path else None
        if name not in shardings:
            return NamedSharding(mesh, PartitionSpec())
        of_muon = any(getattr(key, "name", None) == "momentum" for key in path)
        if of_muon and _divides(leaf, shardings[name]):
            return _way_to_layers(shardings[name])[-1]
        return shardings[name]

    return jax.tree_util.tree_map_with_path(sharding, state)


def _directions(matrices, config):
    """Orthogonalise and scale all matrices of one size together, in fewer kernels.

    Large ones fill a device each by itself, and one at a time needs little memory.
    """
    leaves, tree = jax.tree.flatten(matrices)
    direct = functools.partial(_direction, config=config)
    sizes = {}
    for place, x in enumerate(leaves):
        if x.ndim == 3 and math.prod(x.shape[-2:]) >= LARGE:
            leaves[place] = jax.lax.map(direct, x)
        else:
            sizes.setdefault(x.shape[-2:], []).append(place)
    for size, places in sizes.items():
        stacks = [leaves[place].reshape(-1, *size) for place in places]
        joined = direct(jnp.concatenate(stacks))
        stops = np.cumsum([len(stack) for stack in stacks])[:-1]
        for place, part in zip(places, jnp.split(joined, stops), strict=True):
            leaves[place] = part.reshape(leaves[place].shape)
    return jax.tree.unflatten(tree, leaves)


def _direction(x, config):
    """Orthogonalise a matrix or a stack of them, and scale."""
    x = orthogonalize(x, config.newton_schulz_dtype)
    fan_in, fan_out = x.shape[-2:]
    if config.consistent_rms is None:
        return x * max(1.0, fan_out / fan_in) ** 0.5
    return x * config.consistent_rms * max(fan_in, fan_out) ** 0.5


def _direction_on_mesh(x, config, sharding):
    """Do so with the layers split, and bring the result to its parameter's shards."""
    if x.ndim != 3:
        return _direction(x, config)
    count = x.shape[0]
    if not _divides(x, sharding):
        padding = -count % sharding.mesh.size
        x = _to_layers(jnp.pad(x, ((0, padding), (0, 0), (0, 0))), sharding)
    return _to_parameter(_direction(x, config), sharding)[:count]


def _divides(x, sharding):
    """Say whether every device gets the same number of layers of a stack."""
    return x.ndim == 3 and x.shape[0] % sharding.mesh.size == 0


def _to_layers(x, sharding):
    """Bring a stack from its parameter's shards to whole layers, some on each device.

    Devices that hold the same shard each take a part of its layers; then those that
    hold the parts of a layer exchange them.
    """
    for place in _way_to_layers(sharding):
        x = jax.lax.with_sharding_constraint(x, place)
    return x


def _to_parameter(x, sharding):
    """Go back: an exchange, then layers are gathered in one parameter's shard."""
    for place in reversed(_way_to_layers(sharding)):
        x = jax.lax.with_sharding_constraint(x, place)
    return x


def _way_to_layers(sharding: NamedSharding) -> tuple[NamedSharding, ...]:
    """Give the places on the way, the parameter's own first and whole layers last.

    Said in one step, the compiler finds no other way than the whole stack on every
    device. The axes that split the matrices come last among those that split the
    layers: only so is each step a single collective.
    """
    mesh = sharding.mesh
    _, *matrix = (*sharding.spec, *(None,) * 3)[:3]
    inner = [
        n for axes in matrix for n in ((axes,) if isinstance(axes, str) else axes or ())
    ]
    outer = [name for name in mesh.axis_names if name not in inner]
    return (
        sharding,
        NamedSharding(mesh, PartitionSpec(tuple(outer), *matrix)),
        NamedSharding(mesh, PartitionSpec((*outer, *inner), None, None)),
    )


def _map_named(function, tree):
    """Map over arrays and the parameters' names that they stand under."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(path[-1].key, x), tree
    )


def _is_matrix(params: Mapping[str, Any]) -> dict[str, bool]:
    """Weight decay leaves biases, norms and modulation alone."""
    return {name: name.endswith(".kernel") for name in params}
