"""The mesh and the exchange: whatever is sharded equals what is not."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from cityrag_jax import parallel
from cityrag_jax.model.attention import attend
from cityrag_jax.model.layers import Linear
from cityrag_jax.parallel import (
    PROCESS_VARIABLES,
    batch_share,
    exchange_heads,
    fill_mesh,
    initialise,
    launcher,
    layout,
    make_mesh,
    on_writer,
    param_shardings,
    partition,
    place_batch,
    shard,
    share_keys,
)

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def random_qkv(batch=8, queries=16, keys=24, heads=8, width=4):
    shapes = (batch, queries), (batch, keys), (batch, keys)
    split = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (*shape, heads, width))
        for key, shape in zip(split, shapes, strict=True)
    ]


def test_mesh_of_another_size_than_the_devices_is_refused():
    with pytest.raises(ValueError, match="2 x 2 x 1 needs 4 devices, there are 8"):
        make_mesh(2, 2, 1)


def test_one_size_of_a_mesh_may_be_what_remains():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "sequence": 2}
    assert fill_mesh({"data": 1, "fsdp": -1}, 1) == {"data": 1, "fsdp": 1}
    for sizes in ({"data": -1, "fsdp": -1}, {"data": 3, "fsdp": -1}):
        with pytest.raises(ValueError, match="cannot be filled from 8 devices"):
            fill_mesh(sizes, 8)


def test_without_a_mesh_nothing_is_sharded():
    x = jnp.ones((4, 4))
    assert shard(x, "batch", "tokens") is x


def test_axes_that_do_not_divide_are_left_whole():
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert partition((8, 6), ("batch", "tokens")) == P(
            ("data", "fsdp"), ("sequence",)
        )
        assert partition((6, 5), ("batch", "tokens")) == P(None, None)


def test_parameters_split_over_fsdp_and_never_over_layers():
    make = lambda key: Linear(  # noqa: E731
        16,
        32,
        axes=("embed", "mlp"),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(key),
    )
    stacked = jax.vmap(make)(jax.random.split(jax.random.key(0), 8))
    mesh = make_mesh(1, 8, 1)
    params = nnx.state(stacked)
    placed = jax.device_put(params, param_shardings(params, mesh))
    assert placed["kernel"].get_value().sharding.spec == P(None, ("fsdp",), None)
    assert placed["bias"].get_value().sharding.is_fully_replicated


def test_rules_are_a_value_that_compiled_programs_depend_on():
    """A program traced under other rules is not taken for this one."""
    traced = []

    @jax.jit
    def place(x):
        traced.append(partition(x.shape, ("embed", "mlp")))
        return x

    x, wide = jnp.ones((8, 8)), {"embed": ("fsdp", "sequence")}
    mesh = make_mesh(2, 2, 2)
    for rules in (None, wide, {"embed": (), "mlp": ("sequence",)}, None, wide):
        with layout(mesh, rules):
            place(x)
    assert traced == [
        P(("fsdp",), None),
        P(("fsdp", "sequence"), None),
        P(None, ("sequence",)),
    ]
    with layout(None, wide):
        assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"embd": ("fsdp",)}, "Rules name embd; they lead from batch"),
        ({"embed": ("model",)}, "Rules name model"),
        ({"tokens": ()}, "tokens need"),
        ({"batch": ("data", "sequence")}, "batches the other axes"),
        ({"mlp": ("fsdp",)}, "both sides of a kernel over fsdp"),
    ],
)
def test_rules_that_no_program_can_follow_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        with layout(None, rules):
            pass


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("lengths", [None, "some"])
def test_exchanged_attention_equals_attention(sizes, lengths):
    """And so do its gradients. Tolerance: float32 sums in another order."""
    q, k, v = random_qkv()
    lengths = None if lengths is None else jnp.arange(8) * 3 + 1

    def loss(attention):
        return lambda q, k, v: jnp.sum(attention(q, k, v) ** 2)

    plain = loss(lambda q, k, v: attend(q, k, v, lengths))
    exchanged = loss(lambda q, k, v: exchange_heads(attend, q, k, v, lengths))
    expected = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(q, k, v)
    with jax.set_mesh(make_mesh(*sizes)):
        actual = jax.jit(jax.value_and_grad(exchanged, (0, 1, 2)))(q, k, v)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )


@pytest.mark.parametrize("sizes", MESHES)
def test_attention_to_shared_keys_equals_attention(sizes):
    q, k, v = random_qkv(keys=7)
    expected = attend(q, k, v)
    with jax.set_mesh(make_mesh(*sizes)):
        actual = jax.jit(lambda *x: share_keys(attend, *x))(q, k, v)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_heads_that_do_not_divide_are_refused():
    q, k, v = random_qkv(heads=6)
    with jax.set_mesh(make_mesh(1, 1, 8)):
        with pytest.raises(ValueError, match="6 heads do not divide over .* = 8"):
            exchange_heads(attend, q, k, v, None)


def test_a_process_holds_the_rows_that_its_devices_stand_at(monkeypatch):
    """By where they stand on the batch axes, which need not be in a row."""
    mesh = make_mesh(2, 2, 2)
    assert batch_share(mesh, 8).tolist() == list(range(8))
    assert batch_share(None, 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="partitioned 4 times"):
        batch_share(mesh, 6)

    class Elsewhere:
        """Devices 0, 1, 6 and 7 are this process's: both ends of the batch."""

        def __init__(self, mesh, spec):
            self.whole = sharding(mesh, spec)

        def addressable_devices_indices_map(self, shape):
            places = self.whole.devices_indices_map(shape)
            return {d: places[d] for d in places if d.id in (0, 1, 6, 7)}

    sharding = parallel.NamedSharding
    monkeypatch.setattr(parallel, "NamedSharding", Elsewhere)
    assert batch_share(mesh, 8).tolist() == [0, 1, 6, 7]
    assert batch_share(make_mesh(1, 2, 4), 8).tolist() == list(range(8))


def test_a_placed_batch_is_the_batch():
    x = {"frames": np.arange(48).reshape(8, 3, 2), "clip_id": np.arange(8)}
    placed = place_batch(x, make_mesh(2, 2, 2), 8)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, x[name])
        assert array.sharding.spec == P(("data", "fsdp"))


def test_what_goes_wrong_in_the_writer_is_raised():
    def refuse():
        raise ValueError("this is refused")

    with pytest.raises(ValueError, match="this is refused"):
        on_writer(refuse)


@pytest.fixture
def started(monkeypatch):
    """What JAX is asked to start, with an environment that no launcher made."""
    for name in os.environ:
        if name in PROCESS_VARIABLES or name.startswith(("SLURM", "OMPI", "KUBE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *x: calls.append(x))
    return calls


def test_processes_are_joined_by_the_three_variables(monkeypatch, started):
    """JAX itself would read the first alone."""
    initialise()
    assert launcher() is None and not started
    for name, value in zip(PROCESS_VARIABLES, ("host:1", "4", "3"), strict=True):
        with pytest.raises(ValueError, match=f"--distributed needs .*{name}"):
            initialise(True)
        monkeypatch.setenv(name, value)
    initialise(True)
    assert started == [("host:1", 4, 3)]
    monkeypatch.setenv("JAX_PROCESS_ID", "4")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is 4 of .* 4; count from 0"):
        initialise(True)
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ValueError, match="two whole numbers"):
        initialise(True)


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_launcher_of_several_processes_is_detected(monkeypatch, started, count):
    """One process under SLURM keeps all of its GPUs: JAX would leave it one."""
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    for name, value in zip(names, ("7", "node[1-2]", count, "0", "0"), strict=True):
        monkeypatch.setenv(f"SLURM_{name}", value)
    initialise(alone=True)
    assert not started  # a job of its own, whoever started it
    initialise()
    assert launcher() == (None if count == "1" else "slurm")
    assert started == ([] if count == "1" else [()])


PROGRAM = """
import jax
from cityrag_jax.parallel import keep_compilations
print(keep_compilations())
jax.jit(lambda x: 2 * x + 1)(1.0)
"""


def run_program(**environment: str) -> str:
    """Compile in another process; give what it printed, the kept folder's name."""
    kept = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "XLA_FLAGS")
    inherited = {k: v for k, v in os.environ.items() if k not in kept}
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=True
    )
    return ended.stdout.strip()


def test_compiled_programs_are_kept_in_the_users_folder_or_the_named_one(tmp_path):
    """And a second process adds none: it finds the first one's."""
    kept = tmp_path / "home" / "cityrag_jax" / "xla"
    assert run_program(XDG_CACHE_HOME=str(tmp_path / "home")) == str(kept)
    programs = sorted(path.name for path in kept.iterdir())
    assert any(name.startswith("jit__lambda") for name in programs)
    run_program(XDG_CACHE_HOME=str(tmp_path / "home"))
    assert sorted(path.name for path in kept.iterdir()) == programs
    named = str(tmp_path / "named")
    assert run_program(JAX_COMPILATION_CACHE_DIR=named) == named
    (tmp_path / "file").write_text("")
    assert run_program(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"
