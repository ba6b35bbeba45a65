"""Attention by its definition, by lengths, and Wan's two attentions by goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cityrag_jax.model.attention import (
    ImageTextAttention,
    RotaryAttention,
    _plain,
    attend,
)
from cityrag_jax.model.layers import rotary_angles

FLOAT32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.fixture(scope="module")
def blocks():
    return np.load("tests/golden/blocks.npz")


def fill(module, golden, prefix):
    """Copy torch weights [out, in] into a module of equal attribute names."""
    for name in ("q", "k", "v", "o", "k_img", "v_img"):
        if hasattr(module, name):
            linear = getattr(module, name)
            linear.kernel.set_value(jnp.asarray(golden[f"{prefix}.{name}.weight"].T))
            linear.bias.set_value(jnp.asarray(golden[f"{prefix}.{name}.bias"]))
    for name in ("norm_q", "norm_k", "norm_k_img"):
        if hasattr(module, name):
            scale = jnp.asarray(golden[f"{prefix}.{name}.weight"])
            getattr(module, name).scale.set_value(scale)
    return module


def test_attention_equals_its_definition_in_float64(rng):
    """Tolerance: float32 products of 8 terms against float64."""
    q, k, v = (rng.normal(size=(2, n, 3, 8)) for n in (5, 7, 7))
    logits = np.einsum("blnk,bsnk->bnls", q, k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bnls,bsnk->blnk", weights, v)
    actual = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_keys_beyond_the_length_do_not_exist(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 3, 8)), jnp.float32) for _ in "qkv")
    cut = attend(q, k, v, jnp.array([4, 6]))
    np.testing.assert_allclose(cut[0], attend(q, k[:, :4], v[:, :4])[0], atol=1e-6)
    np.testing.assert_allclose(cut[1], attend(q, k, v)[1], atol=1e-6)


def test_self_attention_equals_the_official_one(blocks):
    """Both samples of the golden one by one: grids of 30 and of 24 tokens; 1e-5."""
    module = RotaryAttention(48, 2, 1e-6, **FLOAT32, rngs=nnx.Rngs(0))
    fill(module, blocks, "sa")
    for sample, grid in enumerate(blocks["sa_grid"]):
        count = int(np.prod(grid))
        x = jnp.asarray(blocks["sa_x"][sample : sample + 1, :count])
        angles = rotary_angles(tuple(int(n) for n in grid), 24)
        out = module(x, angles, module.keys(x, angles))
        expected = blocks["sa_out"][sample : sample + 1, :count]
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_padded_self_attention_equals_the_unpadded(blocks):
    module = RotaryAttention(48, 2, 1e-6, **FLOAT32, rngs=nnx.Rngs(0))
    fill(module, blocks, "sa")
    x = jnp.asarray(blocks["sa_x"][:1])
    angles = rotary_angles(tuple(int(n) for n in blocks["sa_grid"][0]), 24)
    padded = jnp.pad(x, ((0, 0), (0, 2), (0, 0)))
    turned = jnp.pad(angles, ((0, 2), (0, 0), (0, 0)))
    keys = module.keys(padded, turned)
    out = module(padded, turned, keys, jnp.array([30]))
    whole = module(x, angles, module.keys(x, angles))
    np.testing.assert_allclose(out[:, :30], whole, atol=1e-6)


def test_image_cross_attention_equals_the_official_one(blocks):
    """Two softmaxes with the normalised query, summed before `o`; 1e-5."""
    module = ImageTextAttention(48, 2, 1e-6, **FLOAT32, rngs=nnx.Rngs(0))
    fill(module, blocks, "ca")
    context = jnp.asarray(blocks["ca_ctx"])
    keys = module.keys(context[:, 9:], context[:, :9])
    out = module(jnp.asarray(blocks["sa_x"]), keys)
    np.testing.assert_allclose(out, blocks["ca_out"], atol=1e-5)


def test_kernel_of_each_platform_is_chosen_when_traced(monkeypatch):
    """On a GPU bfloat16 goes to cuDNN; float32 stays exact."""
    seen = []
    monkeypatch.setattr("cityrag_jax.parallel.platform", lambda: "gpu")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **k: seen.append(k) or a[0]
    )
    x = jnp.ones((1, 4, 2, 8))
    attend(x, x, x)
    assert not seen
    attend(*[x.astype(jnp.bfloat16)] * 3, jnp.array([3]))
    assert seen[0]["implementation"] == "cudnn"
    assert "mask" not in seen[0] and seen[0]["key_value_seq_lengths"].shape == (1,)


def test_odd_counts_are_padded_for_cudnn_and_masked(monkeypatch, rng):
    """cuDNN trains even counts only; Wan has 257 image rows, the toy one text row."""
    kernel = jax.nn.dot_product_attention

    def exact(q, k, v, *, scale, key_value_seq_lengths, implementation):
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0 and implementation == "cudnn"
        lengths = key_value_seq_lengths
        kinds = dict(scale=scale, implementation="xla")
        return kernel(q, k, v, key_value_seq_lengths=lengths, **kinds)

    monkeypatch.setattr("cityrag_jax.parallel.platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", exact)
    for queries, keys in ((5, 7), (4, 1), (3, 4)):
        q, k, v = (
            jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.bfloat16)
            for n in (queries, keys, keys)
        )
        expected = _plain(q, k, v, None, 8**-0.5)
        np.testing.assert_allclose(
            attend(q, k, v).astype(jnp.float32),
            expected.astype(jnp.float32),
            atol=0.02,  # bfloat16 has eight bits
        )


def test_a_scale_that_is_in_the_queries_is_not_applied_again(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 3, 8)), jnp.float32) for _ in "qkv")
    scaled = attend(q * 8**-0.5, k, v, scale=1.0)
    np.testing.assert_allclose(scaled, attend(q, k, v), atol=1e-6)
