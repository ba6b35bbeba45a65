"""What devices send each other in a compiled update, by kind, type and size."""

from collections import Counter
from math import inf, prod

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from cityrag_jax.checkpoint import (
    abstract_model,
    describe,
    parameters,
    with_parameters,
)
from cityrag_jax.checkpoint.descriptions import parameter_shardings
from cityrag_jax.model.branch import Prepared, TokenGrid
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.parallel import make_mesh
from cityrag_jax.plan import collectives as plan
from cityrag_jax.training.optimizer import (
    OptimizerConfig,
    label_parameters,
    make_optimizer,
    optimizer_shardings,
)


def collectives(program: str) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """Give kind and results (type, number of axes, size) of each collective."""
    return [
        (one.kind, [(dtype, len(shape), prod(shape)) for dtype, shape in one.results])
        for one in plan.collectives(program)
    ]


def after_partitioning(lowered, folder) -> str:
    """Compile and give the program as it was split over devices.

    Behind that, XLA for CPUs turns all bfloat16 to float32. The program is not kept:
    read again, it would dump nothing.
    """
    options = {
        "xla_dump_to": str(folder),
        "xla_dump_hlo_pass_re": "spmd-partitioning",
    }
    shortest_s = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", inf)
    try:
        lowered.compile(compiler_options=options)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest_s)
    (dump,) = folder.glob("*after_spmd-partitioning*.txt")
    return dump.read_text()


@pytest.mark.parametrize("remat", [False, True])
def test_devices_add_gradients_of_weights_up_in_float32(remat, tmp_path):
    """The blocks compute in bfloat16; of that type only activations are added up."""
    config = DiTConfig(
        dim=64,
        num_heads=2,
        num_layers=3,
        ffn_dim=96,
        in_channels=36,
        text_dim=8,
        text_len=6,
        dtype=jnp.bfloat16,
        remat=remat,
    )
    mesh = make_mesh(2, 2, 2)
    abstract = abstract_model(describe(WanDiT, config))
    shardings = parameter_shardings(abstract, mesh)
    params = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in parameters(abstract).items()
    }
    clips = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def array(*shape):
        return jax.ShapeDtypeStruct((8, *shape), jnp.float32, sharding=clips)

    def loss(params, latents, timesteps, text):
        out = with_parameters(abstract, params)(latents, timesteps, text)
        return jnp.mean(out**2)

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss), out_shardings=shardings)
        given = params, array(2, 8, 8, 36), array(), array(6, 8)
        program = after_partitioning(gradient.lower(*given), tmp_path)
    sums = Counter()
    for kind, results in collectives(program):
        if kind in ("all-reduce", "reduce-scatter"):
            sums.update((dtype, axes) for dtype, axes, _ in results)
    assert {axes for dtype, axes in sums if dtype == "bf16"} <= {3, 4}
    kernels = sum(name.endswith("kernel") for name in params)
    biases = sum(name.endswith(("bias", "scale")) for name in params)
    assert sums["f32", 2] >= kernels and sums["f32", 1] >= biases


@pytest.mark.parametrize("layers", [16, 3])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_muon_exchanges_shards_and_never_holds_a_whole_stack(sizes, layers):
    """One all-to-all in and one out for each stack.

    Where axes repeat a parameter's shards, these are gathered behind it, and nothing
    larger is: without being told, the compiler put the whole stack on every device.
    """
    mesh = make_mesh(*sizes)
    shapes = {
        "blocks.self_attention.q.kernel": (layers, 16, 32),
        "blocks.ffn.fc1.kernel": (layers, 16, 24),
    }
    shardings = dict.fromkeys(
        shapes, NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    )
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in shapes.items()
    }
    config = OptimizerConfig(clip_norm=0.0, newton_schulz_dtype="bfloat16")
    labels = label_parameters(params, ())
    optimizer = make_optimizer(config, labels, 10, shardings)
    places = optimizer_shardings(optimizer, params, shardings, mesh)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        places,
    )
    update = jax.jit(optimizer.update, out_shardings=(shardings, places))
    found = collectives(update.lower(params, state, params).compile().as_text())

    repeated = mesh.size // mesh.shape["fsdp"]
    count = Counter(kind for kind, _ in found)
    assert count == {"all-to-all": 4} | ({"all-gather": 2} if repeated > 1 else {})
    padded = layers + -layers % mesh.size
    shard = padded * 16 * 32 // mesh.shape["fsdp"]
    for kind, results in found:
        size = sum(size for _, _, size in results)
        assert size <= (shard if kind == "all-gather" else shard // repeated)


def test_the_pose_branchs_gradient_is_summed_where_the_tokens_are():
    """Frames of 12 tokens lie across shards of 15: no device is sent all of them."""
    config = DiTConfig(dim=8, num_heads=2, num_layers=2, ffn_dim=8, in_channels=36)
    branch = TrajectoryEncoder(config, hidden=4, rngs=nnx.Rngs(0))
    mesh = make_mesh(2, 1, 4)
    places = NamedSharding(mesh, PartitionSpec("data", "sequence"))

    def loss(vectors, x):
        ready = Prepared(None, vectors)
        grid = TokenGrid((5, 3, 4), jnp.zeros((60, 1, 2)), None)
        return (branch.after_block(None, x, grid, ready) ** 2).sum()

    vectors = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
    x = jax.ShapeDtypeStruct((2, 60, 8), jnp.float32, sharding=places)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(None, places))
        program = gradient.lower(vectors, x).compile().as_text()
    found = collectives(program)
    assert found and all(size <= 2 * 5 * 8 for _, rs in found for *_, size in rs)
