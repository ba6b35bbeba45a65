"""What the backward pass of rematerialised blocks runs again, and what it keeps.

Counted in the traced gradient: no accelerator is needed to see which fused kernels
stand in it. tests/test_splash_compile.py counts in the compiled program.
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.extend.core import jaxprs_in_params

from cityrag_jax.batch import Conditions
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch

CONFIG = DiTConfig(
    dim=256,
    num_heads=2,
    num_layers=3,
    ffn_dim=64,
    in_channels=36,
    text_dim=8,
    text_len=6,
    image_dim=12,
    dtype=jnp.bfloat16,
    remat=True,
)
VIDEO, GEO, TEXT, IMAGE = 30, 40, 6, 258  # tokens; cuDNN's image rows are made even
BLOCK = 1024  # splash pads everything to whole blocks


def gradient(config: DiTConfig):
    """Give the gradient by all parameters, and parameters and inputs to call it on."""
    branch = GeoBranch(config, rngs=nnx.Rngs(1))
    model = WanDiT(config, branches=(branch,), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def loss(params, latents, geo):
        model = nnx.merge(graph, params)
        conditions = Conditions(
            text=jnp.ones((1, 6, 8)),
            image=jnp.ones((1, 257, 12)),
            geo_latents=geo,
            geo_length=jnp.array([2]),
        )
        out = model(
            latents,
            jnp.array([500.0]),
            conditions.text,
            conditions.image,
            model.prepare(conditions),
        )
        return jnp.mean((out - latents[..., :16]) ** 2)

    latents = jax.random.normal(jax.random.key(0), (1, 3, 4, 10, 36))
    geo = jax.random.normal(jax.random.key(1), (1, 4, 4, 10, 16))
    return jax.grad(loss), (params, latents, geo)


def equations(jaxpr):
    """Walk through a program and all programs inside it, kernels' bodies left out.

    What has no results is left out too: JAX leaves calls that the compiler drops.
    """
    for equation in jaxpr.eqns:
        yield equation
        if equation.outvars and equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)


def count_kernels(config: DiTConfig) -> Counter:
    """Count the fused kernels of a gradient by pass and number of keys."""
    function, arguments = gradient(config)
    found = Counter()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        name = str(equation.params.get("name", equation.primitive.name))
        if name.startswith(("splash_mha", "dot_product_attention")):
            _, key, *_ = (x for x in equation.invars if is_activation(x.aval))
            keys = key.aval.shape[-2 if "splash" in name else 1]
            found["forward" if "fwd" in name else "backward", keys] += 1
    return found


def is_activation(x) -> bool:
    return x.ndim >= 3 and jnp.issubdtype(x.dtype, jnp.floating)


@pytest.fixture
def tpu(monkeypatch):
    monkeypatch.setattr("cityrag_jax.parallel.platform", lambda: "tpu")


@pytest.fixture
def gpu(monkeypatch):
    """Trace for a GPU that is not there: JAX asks cuDNN what it can do."""
    monkeypatch.setattr("cityrag_jax.parallel.platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)


def test_splash_runs_forward_once_for_self_and_geo_attention(tpu):
    """One forward and one backward for each; text and image are recomputed, as meant.

    All four have one block of keys here.
    """
    assert count_kernels(CONFIG) == {("forward", BLOCK): 2 + 4, ("backward", BLOCK): 4}


def test_cudnn_runs_forward_once_for_self_and_geo_attention(gpu):
    assert count_kernels(CONFIG) == {
        ("forward", VIDEO): 1,
        ("forward", GEO): 1,
        ("forward", TEXT): 2,
        ("forward", IMAGE): 2,
    } | {("backward", keys): 1 for keys in (VIDEO, GEO, TEXT, IMAGE)}


@pytest.mark.parametrize("place", ["keep", "offload"])
def test_configs_choose_each_attention_by_its_name(gpu, place):
    for name, spared in (("self_attention", VIDEO), ("geo_attention", GEO)):
        chosen = dict(keep=(), offload=()) | {place: (name,)}
        found = count_kernels(dataclasses.replace(CONFIG, **chosen))
        for keys in (VIDEO, GEO):
            assert found["forward", keys] == (1 if keys == spared else 2)


def test_without_remat_no_kernel_runs_twice(gpu):
    found = count_kernels(dataclasses.replace(CONFIG, remat=False))
    assert set(found.values()) == {1}


def saved(config: DiTConfig) -> Counter:
    """Give what the loop over blocks hands to the backward pass, by type and shape."""
    function, arguments = gradient(config)
    loops = [
        equation
        for equation in jax.make_jaxpr(function)(*arguments).eqns
        if equation.primitive.name == "scan"
    ]
    forward = loops[0]
    stacked = forward.outvars[forward.params["num_carry"] :]
    return Counter((x.aval.dtype.name, x.aval.shape[1:]) for x in stacked)


def test_a_block_hands_over_its_input_and_the_kernels_results_and_nothing_else(gpu):
    """The result of each kernel once, not a second time for the projection behind."""
    result, sums = ("bfloat16", (1, VIDEO, 2, 128)), ("float32", (1, 2, VIDEO))
    stream = ("float32", (1, VIDEO, 256))
    assert saved(CONFIG) == {result: 2, sums: 2, stream: 1}
    assert saved(dataclasses.replace(CONFIG, keep=())) == {stream: 1}


def test_what_is_offloaded_goes_to_the_host_and_comes_back(gpu):
    """The stream too. Five arrays: of each kernel its result and its sums."""
    names = ("self_attention", "geo_attention", "block_input")
    function, arguments = gradient(dataclasses.replace(CONFIG, keep=(), offload=names))
    moves = Counter()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "device_put":
            (place,) = equation.params["devices"]
            moves[place] += 1
    assert moves == {jax.memory.Space.Host: 5, jax.memory.Space.Device: 5}


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'attention'.*block_input"):
        dataclasses.replace(CONFIG, keep=("attention",))
    with pytest.raises(ValueError, match="different"):
        dataclasses.replace(CONFIG, offload=("geo_attention",))


@pytest.mark.parametrize("keep", [(), ("self_attention",), ("block_input",)])
def test_gradients_do_not_depend_on_what_is_kept(keep):
    """By plain float32 attention; what is recomputed is computed the same way."""
    float32 = dataclasses.replace(CONFIG, dtype=jnp.float32)
    function, arguments = gradient(dataclasses.replace(float32, remat=False))
    expected = jax.jit(function)(*arguments)
    function, _ = gradient(dataclasses.replace(float32, keep=keep))
    actual = jax.jit(function)(*arguments)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))
