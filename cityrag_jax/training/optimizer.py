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
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

Params = dict[str, Array]
Labels = dict[str, str]

# A stacked matrix is [layers, in, out]; the other axes are a batch to optax.
MATRIX = optax.contrib.MuonDimensionNumbers((0,), (1,))
STACKED_MATRIX = optax.contrib.MuonDimensionNumbers((1,), (2,))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates, schedule and what is frozen.

    `adam_learning_rate` None means the same as Muon's. The rate rises linearly over
    `warmup_steps`, stays, and falls linearly to zero over the last `decay_fraction` of
    the training (0: it stays). `clip_norm` 0 does not clip. `frozen` are name patterns
    such as "blocks.cross_attention.*". `newton_schulz_dtype` may be "bfloat16".
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
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8


def label_parameters(params: Mapping[str, Any], frozen: tuple[str, ...]) -> Labels:
    """Label every parameter `muon`, `adam` or `frozen`.

    Muon takes the 2-D matrices (3-D where stacked) called kernel inside blocks and
    branches; embeddings of tokens, norms, biases and modulation tables go to
    Adam, as do all parameters outside. A pattern that fits nothing is a ValueError.
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
    frozen = {name: x for name, x in values.items() if labels[name] == "frozen"}
    return {name: x for name, x in values.items() if name not in frozen}, frozen


def _label(name: str, ndim: int, frozen: tuple[str, ...]) -> str:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen):
        return "frozen"
    root, *middle, last = name.split(".")
    inside = root in ("blocks", "branches") and "patch_embedding" not in middle
    matrix = last == "kernel" and ndim in (2, 3)
    return "muon" if inside and matrix else "adam"


def make_optimizer(
    config: OptimizerConfig, labels: Labels, num_steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Build the optimiser of a training of `num_steps` updates.

    It takes the parameters that are not labelled frozen. The norm that is clipped is
    the global one over all of them.
    """
    trained = {name: label for name, label in labels.items() if label != "frozen"}
    adam_rate = config.adam_learning_rate
    if adam_rate is None:
        adam_rate = config.learning_rate
    decay = optax.add_decayed_weights(config.weight_decay, _is_matrix)
    muon = optax.chain(
        scale_by_muon(config, mesh),
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
    """Averaged gradients of the matrices."""

    momentum: Params


def scale_by_muon(
    config: OptimizerConfig, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Turn gradients [in, out] or [layers, in, out] into Muon's updates.

    With a mesh, momentum and Newton-Schulz are split over the layers: gradients come in
    and updates go out by one exchange, and every device orthogonalises whole matrices
    of its own. Where the layers do not divide, they are padded with zeros in between.
    """

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        beta = config.momentum
        average = functools.partial(
            jax.tree.map, lambda m, g: beta * m + (1 - beta) * g
        )
        gradients = jax.tree.map(lambda g: _split_layers(g, mesh), updates)
        momentum = average(state.momentum, gradients)
        ahead = average(momentum, gradients) if config.nesterov else momentum
        if mesh is None:
            return _directions(ahead, config), MuonState(momentum)
        directions = jax.tree.map(lambda x: _direction(x, config, mesh), ahead)
        return directions, MuonState(momentum)

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
        if of_muon and leaf.ndim == 3 and leaf.shape[0] % mesh.size == 0:
            return _by_layers(mesh)
        return shardings[name]

    return jax.tree_util.tree_map_with_path(sharding, state)


def _directions(matrices, config):
    """Orthogonalise and scale all matrices of one size together, in fewer kernels."""
    leaves, tree = jax.tree.flatten(matrices)
    sizes = {}
    for place, x in enumerate(leaves):
        sizes.setdefault(x.shape[-2:], []).append(place)
    for size, places in sizes.items():
        stacks = [leaves[place].reshape(-1, *size) for place in places]
        joined = _direction(jnp.concatenate(stacks), config, None)
        stops = np.cumsum([len(stack) for stack in stacks])[:-1]
        for place, part in zip(places, jnp.split(joined, stops), strict=True):
            leaves[place] = part.reshape(leaves[place].shape)
    return jax.tree.unflatten(tree, leaves)


def _direction(x, config, mesh):
    """Orthogonalise and scale; a stack is padded so that its layers divide."""
    split = mesh is not None and mesh.size > 1 and x.ndim == 3
    count = x.shape[0]
    if split:
        x = jnp.pad(x, ((0, -count % mesh.size), (0, 0), (0, 0)))
        x = jax.lax.with_sharding_constraint(x, _by_layers(mesh))
    x = orthogonalize(x, config.newton_schulz_dtype)
    if split:
        x = jax.lax.with_sharding_constraint(x, _by_layers(mesh))[:count]
    fan_in, fan_out = x.shape[-2:]
    if config.consistent_rms is None:
        return x * max(1.0, fan_out / fan_in) ** 0.5
    return x * config.consistent_rms * max(fan_in, fan_out) ** 0.5


def _split_layers(x, mesh):
    if mesh is None or x.ndim != 3 or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, _by_layers(mesh))


def _by_layers(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names, None, None))


def _is_matrix(params: Mapping[str, Any]) -> dict[str, bool]:
    """Weight decay leaves biases, norms and modulation alone."""
    return {name: name.endswith(".kernel") for name in params}
