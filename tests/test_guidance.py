"""Each guidance mode against its formula, and the passes that it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cityrag_jax.diffusion.guidance import MODES, Pass, guide, passes

FULL = Pass()
NO_POSE, NO_GEO = Pass(frozenset({"pose"})), Pass(frozenset({"geo"}))
NEITHER = Pass(frozenset({"pose", "geo"}))
NEGATIVE = Pass(negative_text=True)
SCALES = {
    "none": (),
    "joint": (2.5,),
    "trajectory": (2.5,),
    "geo": (2.5,),
    "nested": (1.75, 2.5),
    "text": (5.0,),
}


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def velocities(rng):
    """A random velocity for each of the passes."""
    seen = [FULL, NO_POSE, NO_GEO, NEITHER, NEGATIVE]
    draw = rng.standard_normal((5, 2, 3)).astype(np.float32)
    return dict(zip(seen, map(jnp.asarray, draw), strict=True))


def guided_by(velocity_of_pass, weighted):
    """Guide as the sampler does: the weights are an array."""
    weights = np.array([weight for weight, _ in weighted], np.float32)
    return guide((velocity_of_pass(seen) for _, seen in weighted), weights)


def formula(mode, v, scales):
    """The modes as DESIGN writes them, term by term."""
    full, neither = v[FULL], v[NEITHER]
    if mode == "none":
        return full
    if mode == "nested":
        no_geo, (w_p, w_g) = v[NO_GEO], scales
        return neither + w_p * (no_geo - neither) + w_g * (full - no_geo)
    (w,) = scales
    base = {
        "joint": neither,
        "trajectory": v[NO_POSE],
        "geo": v[NO_GEO],
        "text": v[NEGATIVE],
    }[mode]
    return base + w * (full - base)


@pytest.mark.parametrize("mode", MODES)
def test_mode_is_its_formula(mode, velocities):
    guided = guided_by(velocities.__getitem__, passes(mode, SCALES[mode]))
    expected = formula(mode, velocities, SCALES[mode])
    np.testing.assert_allclose(guided, expected, atol=5e-6)


@pytest.mark.parametrize("mode", MODES)
def test_weights_sum_to_1(mode):
    assert sum(w for w, _ in passes(mode, SCALES[mode])) == pytest.approx(1)


@pytest.mark.parametrize("mode", MODES)
def test_scales_of_1_cost_one_pass_and_change_nothing(mode, velocities):
    ones = (1.0,) * len(SCALES[mode])
    assert passes(mode, ones) == ((1.0, FULL),)
    guided = guided_by(velocities.__getitem__, passes(mode, ones))
    np.testing.assert_array_equal(guided, velocities[FULL])


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("joint", [FULL, NEITHER]),
        ("trajectory", [FULL, NO_POSE]),
        ("geo", [FULL, NO_GEO]),
        ("nested", [FULL, NO_GEO, NEITHER]),
        ("text", [FULL, NEGATIVE]),
    ],
)
def test_passes_are_those_of_the_formula(mode, expected):
    assert [seen for _, seen in passes(mode, SCALES[mode])] == expected


def test_scale_of_0_drops_the_full_pass():
    assert passes("joint", (0.0,)) == ((1.0, NEITHER),)


def test_nested_with_equal_scales_is_joint():
    assert passes("nested", (2, 2)) == passes("joint", (2.0,))


def test_passes_that_a_missing_condition_makes_equal_are_merged():
    only_geo = NO_POSE
    assert passes("trajectory", (3.0,), ("pose",)) == ((1.0, only_geo),)
    assert passes("joint", (3.0,), ("pose",)) == (
        (3.0, only_geo),
        (-2.0, NEITHER),
    )
    assert passes("nested", (3.0, 4.0), ("geo",)) == (
        (3.0, NO_GEO),
        (-2.0, NEITHER),
    )
    assert passes("nested", (3.0, 4.0), ("pose", "geo")) == ((1.0, NEITHER),)


@pytest.mark.parametrize("mode, geo_calls", [("joint", 1), ("geo", 1), ("nested", 1)])
def test_dropped_passes_never_call_the_geo_branch(mode, geo_calls, velocities):
    """Neither while tracing nor in the compiled program does a dropped pass attend."""
    calls = 0

    def geo_branch(x):
        nonlocal calls
        calls += 1
        return jnp.cumsum(x)

    def velocity_of_pass(seen):
        x = velocities[seen]
        return (
            x + geo_branch(x.reshape(-1))[:1, None] if "geo" not in seen.without else x
        )

    def run():
        return guided_by(velocity_of_pass, passes(mode, SCALES[mode]))

    program = str(jax.make_jaxpr(run)())
    assert calls == geo_calls == program.count("cumsum[")


def test_velocities_are_summed_in_float32():
    """In bfloat16, 8 bits long, a difference of large terms would lose the digits."""
    one = jnp.ones(3, jnp.bfloat16)
    guided = guided_by(
        lambda seen: one * (1.01 if "geo" not in seen.without else 1.0),
        passes("joint", (7.5,)),
    )
    exact = float(one[0] * 1.01) * 7.5 - 6.5
    assert guided.dtype == jnp.float32
    np.testing.assert_allclose(guided, exact, atol=1e-6)


def test_unknown_modes_and_wrong_numbers_of_scales_are_refused():
    with pytest.raises(ValueError, match="No guidance mode 'both'.*nested"):
        passes("both", (1.0,))
    with pytest.raises(ValueError, match="'nested' takes 2 scales, got"):
        passes("nested", (1.0,))
    with pytest.raises(ValueError, match="'none' takes 0 scales, got"):
        passes("none", (1.0,))
    with pytest.raises(ValueError, match="No passes"):
        guide((), np.zeros(0, np.float32))
