"""Training on eight devices equals training on one, for every way to split the work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import (
    Bundle,
    abstract_model,
    describe,
    parameter_shardings,
    parameters,
)
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import layout, make_mesh
from cityrag_jax.training.optimizer import (
    OptimizerConfig,
    label_parameters,
    make_optimizer,
)
from cityrag_jax.training.step import init_state, make_step, state_shardings
from cityrag_jax.training.tasks import CityRAG

CONFIG = ConfigDict(
    dict(
        task="CityRAG",
        seed=3,
        model=dict(
            preset="",
            transformer=dict(
                dim=32,
                num_heads=8,
                num_layers=3,
                ffn_dim=48,
                in_channels=36,
                freq_dim=16,
                text_dim=8,
                text_len=2,
            ),
            pose=dict(hidden=16),
            geo=dict(same_place_bias=1.0),
            adapters=dict(linears=()),
            vae="",
            text="constant",
        ),
        train=dict(
            shift=3.0,
            drop_probability=0.3,
            mismatch_probability=0.3,
            unroll_blocks=1,
            stream_dtype="float32",
            init_fitting=False,
        ),
        eval=dict(draws=1, seed=0, noise_levels=()),
    )
)
BATCH = 8
# Adam's first step divides by |g| + eps: where |g| is rounding noise, so is the step.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, clip_norm=1.0, adam_eps=1e-3)


@pytest.fixture(scope="module")
def task():
    vae = describe(WanVAE, VAEConfig(base_dim=4))
    return CityRAG(CONFIG, Bundle({}, {"vae": vae}))


@pytest.fixture(scope="module")
def params(task):
    """Nothing is left at zero, so that every branch has an effect and a gradient."""
    shapes = parameters(abstract_model(task.description))
    rng = np.random.default_rng(0)
    return {
        n: (0.2 * rng.normal(size=x.shape) + n.endswith("scale")).astype(np.float32)
        for n, x in shapes.items()
    }


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "latents": normal(BATCH, 2, 4, 8, 16),
        "first_frame": normal(BATCH, 2, 4, 8, 20),
        "geo_latents": normal(BATCH, 3, 4, 8, 16),
        "geo_length": np.resize(np.array([2, 3], np.int32), BATCH),
        "poses": normal(BATCH, 5, 4, 4),
        "clip_id": np.arange(BATCH, dtype=np.uint32) * 77,
    }


def _recording(optimizer):
    """Keep the gradients that the optimiser sees in its state."""
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params=None: (gradients, gradients),
    )
    return optax.chain(record, optimizer)


def _update(task, params, examples, mesh, micro_batches=1):
    """Run one update; give loss, gradients, change of the parameters, new state."""
    labels = label_parameters(params, ())
    of_params = parameter_shardings(abstract_model(task.description), mesh)
    optimizer = _recording(make_optimizer(OPTIMIZER, labels, 10, of_params))
    make = lambda values: init_state(values, optimizer, 0.99)  # noqa: E731
    shardings = None
    if mesh is not None:
        shardings = state_shardings(
            jax.eval_shape(make, params), optimizer, of_params, mesh
        )
        batch = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(("data", "fsdp"))
        )
        examples = jax.device_put(examples, batch)
    state = jax.jit(make, out_shardings=shardings)(params)
    kinds = dict(ema_decay=0.99, micro_batches=micro_batches, shardings=shardings)
    step = make_step(task.loss, optimizer, mix=task.mix, **kinds)
    state, metrics = step(state, {}, {"text": task.text}, examples)
    change = {n: np.asarray(x) - params[n] for n, x in state.params.items()}
    return metrics["loss"][0], state.optimizer[0], change, state


@pytest.fixture(scope="module")
def expected(task, params, examples):
    loss, gradients, change, _ = _update(task, params, examples, None)
    return float(loss), jax.device_get(gradients), change


def _distance(a, b):
    difference = {n: np.asarray(a[n], np.float64) - b[n] for n in b}
    norm = lambda tree: np.sqrt(sum((x**2).sum() for x in tree.values()))  # noqa: E731
    return norm(difference) / norm({n: np.float64(x) for n, x in b.items()})


def test_every_parameter_has_a_gradient(expected):
    assert not [n for n, g in expected[1].items() if not np.any(g)]


OVER_FSDP = ("fsdp",)
OVER_BOTH = ("fsdp", "sequence")


@pytest.mark.parametrize(
    "sizes, embed, parts",
    [
        pytest.param((8, 1, 1), OVER_FSDP, 1, marks=pytest.mark.long),
        ((1, 8, 1), OVER_FSDP, 1),
        pytest.param((1, 1, 8), OVER_FSDP, 1, marks=pytest.mark.long),
        pytest.param((1, 1, 8), OVER_BOTH, 1, marks=pytest.mark.long),
        pytest.param((2, 2, 2), OVER_FSDP, 1, marks=pytest.mark.long),
        ((2, 2, 2), OVER_BOTH, 2),
    ],
)
def test_a_mesh_equals_one_device(
    task, params, examples, expected, sizes, embed, parts
):
    """Float32: 1e-6 leaves room for another order of sums (measured 2e-7)."""
    mesh = make_mesh(*sizes)
    with layout(mesh, {"embed": embed}):
        loss, gradients, change, state = _update(task, params, examples, mesh, parts)
    assert abs(float(loss) - expected[0]) <= 1e-6 * expected[0]
    assert _distance(gradients, expected[1]) <= 1e-6
    assert _distance(change, expected[2]) <= 1e-5
    kernel = "blocks.ffn.fc1.kernel"
    for tree in (gradients, state.params, state.ema):
        shard = tree[kernel].addressable_shards[0].data
        ways = np.prod([mesh.shape[name] for name in embed])
        assert shard.size == tree[kernel].size // ways
