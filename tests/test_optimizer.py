"""The optimiser against torch's trajectories, and its labels, schedule and sharding."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import SAME_BITS
from jax.sharding import NamedSharding, PartitionSpec

import cityrag_jax.training.optimizer as optimizer_module
from cityrag_jax.parallel import make_mesh
from cityrag_jax.training.optimizer import (
    OptimizerConfig,
    label_parameters,
    learning_rate_schedule,
    make_optimizer,
    optimizer_shardings,
    orthogonalize,
    split_frozen,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "muon.npz")
SETTINGS = json.loads(str(GOLDEN["config_json"]))
NAMES = [f"blocks.p{i}.kernel" for i in range(3)]


def _golden_config(setting: str, **changes) -> OptimizerConfig:
    torch = SETTINGS["settings"][setting]
    matched = torch["adjust_lr_fn"] == "match_rms_adamw"
    return OptimizerConfig(
        learning_rate=torch["lr"],
        weight_decay=torch["weight_decay"],
        momentum=torch["momentum"],
        nesterov=torch["nesterov"],
        consistent_rms=0.2 if matched else None,
        clip_norm=0.0,
        **changes,
    )


def _run(config, label, steps=5):
    """Follow torch's explicit gradients; torch's matrices are [out, in]."""
    params = {n: jnp.asarray(GOLDEN[f"p{i}_init"].T) for i, n in enumerate(NAMES)}
    optimizer = make_optimizer(config, dict.fromkeys(NAMES, label), num_steps=steps)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(steps):
        gradients = {
            n: jnp.asarray(GOLDEN[_gradient_key(i, step)].T)
            for i, n in enumerate(NAMES)
        }
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return [np.asarray(params[n]).T for n in NAMES]


def _gradient_key(i: int, step: int) -> str:
    first = 0 if f"grad_p{i}_step0" in GOLDEN.files else 1
    return f"grad_p{i}_step{step + first}"


@pytest.mark.parametrize("setting", ["default", "match_rms_adamw", "plain"])
def test_muon_follows_torch_in_float32(setting):
    """2e-5: float32 noise through five steps of five Newton-Schulz iterations."""
    finals = _run(_golden_config(setting), "muon")
    for i, final in enumerate(finals):
        np.testing.assert_allclose(
            final, GOLDEN[f"ns32_{setting}_p{i}_final"], rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("setting", ["default", "match_rms_adamw", "plain"])
def test_bfloat16_newton_schulz_stays_near_torch(setting):
    """torch's own bfloat16 differs from float32 by 2e-2 of step size and scale."""
    config = _golden_config(setting, newton_schulz_dtype="bfloat16")
    finals = _run(config, "muon")
    for i, final in enumerate(finals):
        out, fan_in = final.shape
        scale = max(1, out / fan_in) ** 0.5
        if config.consistent_rms:
            scale = 0.2 * max(out, fan_in) ** 0.5
        torch = GOLDEN[f"{setting}_p{i}_step{_last_step(setting, i)}"]
        bound = 5 * 2e-2 * config.learning_rate * scale
        np.testing.assert_allclose(final, torch, rtol=0, atol=bound)


def _last_step(setting: str, i: int) -> int:
    return max(s for s in range(6) if f"{setting}_p{i}_step{s}" in GOLDEN.files)


def test_adamw_follows_torch():
    adam = SETTINGS["adamw"]
    config = OptimizerConfig(
        learning_rate=adam["lr"],
        weight_decay=adam["weight_decay"],
        adam_b1=adam["betas"][0],
        adam_b2=adam["betas"][1],
        adam_eps=adam["eps"],
        clip_norm=0.0,
    )
    for i, final in enumerate(_run(config, "adam")):
        np.testing.assert_allclose(
            final, GOLDEN[f"adamw_p{i}_final"], rtol=0, atol=1e-6
        )


def test_a_stack_is_orthogonalised_layer_by_layer(rng):
    x = jnp.asarray(rng.normal(size=(3, 8, 12)), jnp.float32)
    whole = orthogonalize(x)
    for i in range(3):
        # Five iterations stretch a rounding of 6e-8 by up to 3.4445**5 = 485, to 3e-5.
        np.testing.assert_allclose(whole[i], orthogonalize(x[i]), rtol=0, atol=1e-5)
    singular = np.linalg.svd(np.asarray(whole), compute_uv=False)
    assert 0.5 < singular.min() and singular.max() < 1.3


def _toy_params(rng) -> dict:
    shapes = {
        "patch_embedding.kernel": (12, 16),
        "blocks.self_attention.q.kernel": (3, 16, 16),
        "blocks.self_attention.q.bias": (3, 16),
        "blocks.cross_attention.k.kernel": (3, 16, 16),
        "blocks.modulation": (3, 6, 16),
        "blocks.ffn.fc1.kernel": (3, 16, 24),
        "branches.0.mlp.fc1.kernel": (8, 8),
        "branches.0.projection.kernel": (3, 8, 16),
        "branches.0.projection.bias": (3, 16),
        "branches.1.patch_embedding.kernel": (16, 16),
        "branches.1.layers.attention.q.kernel": (8, 16, 16),
        "head.linear.kernel": (16, 8),
    }
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


FROZEN = ("blocks.cross_attention.*",)


def test_labels_follow_names_and_dimensions(rng):
    labels = label_parameters(_toy_params(rng), FROZEN)
    assert {n for n, label in labels.items() if label == "muon"} == {
        "blocks.self_attention.q.kernel",
        "blocks.ffn.fc1.kernel",
        "branches.0.mlp.fc1.kernel",
        "branches.0.projection.kernel",
        "branches.1.layers.attention.q.kernel",
    }
    assert labels["blocks.cross_attention.k.kernel"] == "frozen"
    assert labels["blocks.modulation"] == labels["head.linear.kernel"] == "adam"


def test_a_frozen_pattern_that_fits_nothing_is_refused(rng):
    with pytest.raises(ValueError, match="cross_atention"):
        label_parameters(_toy_params(rng), ("blocks.cross_atention.*",))


def test_the_optimiser_takes_what_is_not_frozen(rng):
    params = _toy_params(rng)
    labels = label_parameters(params, FROZEN)
    trained, frozen = split_frozen(params, labels)
    assert set(frozen) == {"blocks.cross_attention.k.kernel"}
    assert trained.keys() | frozen.keys() == params.keys()
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), labels, 10)
    state = optimizer.init(trained)
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    assert not [path for path, _ in flat if "cross_attention" in str(path)]
    updates, _ = jax.jit(optimizer.update)(trained, state, trained)
    assert all(x.any() for x in updates.values())


def test_schedule_rises_stays_and_falls():
    config = OptimizerConfig(warmup_steps=4, decay_fraction=0.5)
    rate = learning_rate_schedule(config, 2.0, num_steps=20)
    values = [float(rate(i)) for i in range(21)]
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(values[10:12], [2.0, 1.8], rtol=1e-6)
    assert values[20] == 0
    constant = learning_rate_schedule(OptimizerConfig(), 2.0, 20)
    assert float(constant(0)) == float(constant(19)) == 2


def test_clipping_bounds_the_global_norm(rng):
    """Adam's first moment shows the clipped gradient."""
    params = _toy_params(rng)
    labels = dict.fromkeys(params, "adam")
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), labels, 10)
    _, state = optimizer.update(params, optimizer.init(params), params)
    moment = optax.tree.get(state, "mu")
    norm = float(optax.tree.norm({n: m / 0.1 for n, m in moment.items()}))
    assert norm == pytest.approx(1.0, rel=1e-5)


def test_matrices_one_at_a_time_and_momentum_in_half_make_the_same_update(
    rng, monkeypatch
):
    """What large matrices do at full size; a kept momentum is rounded once an update.

    Newton-Schulz forgets the size of what it is given: the second update differs by
    what a rounding of 2**-9 turns, stretched as singular values are, 3.4445 for each of
    five steps at most and a few times in the mean.
    """
    name = "blocks.self_attention.q.kernel"
    params = {name: _toy_params(rng)[name]}
    gradients = [
        {name: jnp.asarray(rng.normal(size=(3, 16, 16)), jnp.float32)} for _ in range(2)
    ]

    def run(**changes):
        config = OptimizerConfig(learning_rate=1.0, clip_norm=0.0, **changes)
        optimizer = make_optimizer(config, {name: "muon"}, 10)
        update = jax.jit(optimizer.update, compiler_options=SAME_BITS)
        state, found = optimizer.init(params), []
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            found.append(np.asarray(updates[name]))
        return found, optax.tree.get(state, "momentum")[name].dtype

    (first, second), kind = run()
    assert kind == jnp.float32
    monkeypatch.setattr(optimizer_module, "LARGE", 1)
    (alone, _), _ = run()
    np.testing.assert_allclose(alone, first, rtol=0, atol=1e-6)
    (half, after), kind = run(momentum_dtype="bfloat16")
    assert kind == jnp.bfloat16
    np.testing.assert_array_equal(half, alone)  # from zeros: nothing is rounded yet
    gap = np.linalg.norm(after - second) / np.linalg.norm(second)
    assert 0 < gap < 10 * 2**-9


def test_update_split_over_layers_equals_one_device(rng):
    """Stacks of 3 (padded to 8) and of 8 layers (momentum itself is split)."""
    jit = partial(jax.jit, compiler_options=SAME_BITS)
    params = _toy_params(rng)
    gradients = {
        n: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for n, x in params.items()
    }
    labels = label_parameters(params, FROZEN)
    params, gradients = (split_frozen(x, labels)[0] for x in (params, gradients))
    config = dataclasses.replace(OptimizerConfig(), learning_rate=0.1)
    plain = make_optimizer(config, labels, 10)
    expected, _ = jit(plain.update)(gradients, plain.init(params), params)

    mesh = make_mesh(2, 2, 2)
    shardings = {
        n: NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 1), "fsdp"))
        for n, x in params.items()
    }
    split = make_optimizer(config, labels, 10, shardings)
    state_shardings = optimizer_shardings(split, params, shardings, mesh)
    state = jax.jit(split.init, out_shardings=state_shardings)(params)
    update = jit(split.update, out_shardings=(shardings, state_shardings))
    actual, state = update(
        jax.device_put(gradients, shardings), state, jax.device_put(params, shardings)
    )
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-6)
    momentum = optax.tree.get(state, "momentum")
    by_layer = momentum["branches.1.layers.attention.q.kernel"].sharding.spec
    assert by_layer[0] == ("data", "sequence", "fsdp")
