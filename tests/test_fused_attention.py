"""The fused kernels against plain attention: results and gradients, lengths included.

Splash runs here in Pallas' interpreter. cuDNN needs an NVIDIA GPU with its JAX:
`python -m pytest -m gpu`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from cityrag_jax.model import attention
from cityrag_jax.model.attention import _cudnn, _plain, _splash

HEADS, WIDTH = 2, 128
# Queries, keys and lengths of two clips: even and odd counts, more and fewer keys than
# queries, the 257 image rows, a clip whose keys end early, and one with a single key.
CASES = {
    "self": (390, 390, None),
    "geo": (390, 520, (520, 130)),
    "one key": (130, 390, (1, 389)),
    "image": (390, 257, None),
    "few": (31, 6, None),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Run splash without a TPU, in blocks of 256 so that all cases have several."""
    make = partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", make)
    monkeypatch.setattr(attention, "SPLASH_BLOCK", 256)


def draw(case: str, dtype):
    """Give q, k, v, a cotangent and the lengths; logits have a deviation of 1.5."""
    queries, keys, lengths = CASES[case]
    rng = np.random.default_rng(0)
    sizes = queries, keys, keys, queries
    arrays = [rng.normal(size=(2, n, HEADS, WIDTH)) for n in sizes]
    arrays[0] *= 1.5
    return *(jnp.asarray(x, dtype) for x in arrays), lengths and jnp.array(lengths)


def result_and_gradients(kernel, q, k, v, cotangent, lengths):
    """Give out and the gradients by q, k and v, float32."""

    @jax.jit
    def run(q, k, v):
        scale = WIDTH**-0.5
        out, pull_back = jax.vjp(lambda *qkv: kernel(*qkv, lengths, scale), q, k, v)
        return out, *pull_back(cotangent)

    return [np.asarray(x, np.float32) for x in run(q, k, v)]


def assert_near_plain(kernel, case, dtype, tolerance):
    """Compare with plain float32 attention, relative to the norm of each array."""
    *arrays, lengths = draw(case, dtype)
    exact = [x.astype(jnp.float32) for x in arrays]
    expected = result_and_gradients(_plain, *exact, lengths)
    actual = result_and_gradients(kernel, *arrays, lengths)
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_plain_attention(interpreted, case):
    """Float32, another order of sums: 5e-6 of the norm (measured to 2e-6)."""
    assert_near_plain(_splash, case, jnp.float32, 5e-6)


@pytest.mark.parametrize("case", CASES)
def test_splash_in_bfloat16_is_as_near_as_its_eight_bits(interpreted, case):
    """Plain attention in bfloat16 errs by 3e-3 to 6e-3 in each."""
    assert_near_plain(_splash, case, jnp.bfloat16, 1e-2)


def test_keys_beyond_the_length_have_no_gradient(interpreted):
    *arrays, lengths = draw("geo", jnp.float32)
    for kernel in (_plain, _splash):
        _, _, dk, dv = result_and_gradients(kernel, *arrays, lengths)
        assert not dk[1, 130:].any() and not dv[1, 130:].any()
        assert dk[1, :130].all() and dv[1, :130].all()


@pytest.mark.gpu
@pytest.mark.parametrize("named", [None, "self_attention"])
@pytest.mark.parametrize("case", CASES)
def test_cudnn_equals_plain_attention(case, named):
    """With and without our own derivative rule, which names its residuals."""
    assert_near_plain(partial(_cudnn, name=named), case, jnp.bfloat16, 1e-2)


@pytest.mark.gpu
def test_cudnn_gives_keys_beyond_the_length_no_gradient():
    *arrays, lengths = draw("geo", jnp.bfloat16)
    _, _, dk, dv = result_and_gradients(_cudnn, *arrays, lengths)
    assert not dk[1, 130:].any() and not dv[1, 130:].any()
