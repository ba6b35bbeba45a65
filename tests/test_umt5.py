"""The text encoder against the official code's numbers and its own invariances."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from cityrag_jax.convert import load_umt5
from cityrag_jax.model.umt5 import UMT5Config, UMT5Encoder, relative_buckets
from cityrag_jax.parallel import make_mesh

GOLDEN = Path(__file__).parent / "golden"
FILE = GOLDEN / "umt5_tiny.safetensors"
# The golden's own: 3 to 10 times what two exact implementations differ by.
TOLERANCE = 3e-5
TINY = UMT5Config(
    vocab_size=120, dim=48, attention_dim=64, num_heads=4, ffn_dim=80, num_layers=3
)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "umt5_tiny.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def encoder():
    return load_umt5(FILE, TINY)


encode = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))


def real_rows(array, golden):
    return np.asarray(array)[golden["mask"] == 1]


def transformers_name(name):
    """Rename an official key as transformers does, independently of our table."""
    if not name.startswith("blocks."):
        return {
            "token_embedding.weight": "shared.weight",
            "norm.weight": "encoder.final_layer_norm.weight",
        }[name]
    _, layer, rest = name.split(".", 2)
    rest = {
        "norm1.weight": "0.layer_norm.weight",
        "norm2.weight": "1.layer_norm.weight",
        "pos_embedding.embedding.weight": (
            "0.SelfAttention.relative_attention_bias.weight"
        ),
        "ffn.gate.0.weight": "1.DenseReluDense.wi_0.weight",
        "ffn.fc1.weight": "1.DenseReluDense.wi_1.weight",
        "ffn.fc2.weight": "1.DenseReluDense.wo.weight",
    }.get(rest, rest.replace("attn.", "0.SelfAttention."))
    return f"encoder.block.{layer}.layer.{rest}"


def parameters(model):
    return {
        ".".join(map(str, path)): np.asarray(param[...])
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def assert_same_parameters(a, b):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_full_size_has_5_680_910_336_parameters():
    encoder = nnx.eval_shape(lambda: UMT5Encoder(UMT5Config.xxl(), rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.state(encoder, nnx.Param))
    assert sum(int(np.prod(p.shape)) for p in params) == 5_680_910_336
    # 242 tensors in the published file: ten a block, the embedding, the last norm.
    assert len(params) == 12


def test_buckets_equal_the_official_ones_exactly(golden):
    """Distances such as 16, 32 and 64 lie on the truncation's edge."""
    np.testing.assert_array_equal(
        relative_buckets(golden["bucket_offsets"]), golden["bucket_of_offset"]
    )
    places = np.arange(150)
    np.testing.assert_array_equal(
        relative_buckets(places[None] - places[:, None]), golden["bucket_table"]
    )


def test_bias_of_the_first_block_is_looked_up_exactly(encoder, golden):
    block = jax.tree.map(lambda x: x[0], encoder.blocks)
    np.testing.assert_array_equal(
        block.attention.bias(150), golden["block0_pos_bias"][0]
    )


def test_features_equal_the_official_ones(encoder, golden):
    out = encode(encoder, golden["ids"], golden["mask"])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        real_rows(out, golden), real_rows(golden["out"], golden), atol=TOLERANCE
    )


def test_blocks_run_one_at_a_time_equal_the_official_ones(encoder, golden):
    """One block's parameters are enough, so that a tool can stream them."""
    x = encoder.token_embedding[...][golden["ids"]]
    np.testing.assert_array_equal(x, golden["token_embedding"])
    mask = jnp.asarray(golden["mask"] != 0)
    step = jax.jit(lambda block, x: block(x, mask))
    for layer in range(TINY.num_layers):
        x = step(jax.tree.map(lambda p, i=layer: p[i], encoder.blocks), x)
        expected = real_rows(golden[f"block{layer}_out"], golden)
        np.testing.assert_allclose(real_rows(x, golden), expected, atol=TOLERANCE)


def test_padding_and_what_stands_in_it_do_not_matter(encoder, golden):
    """A prompt alone, without padding, gives the same rows; 1e-5 for another order."""
    lengths = golden["mask"].sum(axis=1)
    shortest, length = int(lengths.argmin()), int(lengths.min())
    assert length < golden["ids"].shape[1]
    ids = golden["ids"].copy()
    ids[shortest, length:] = 7
    padded = encode(encoder, ids, golden["mask"])[shortest, :length]
    alone = ids[shortest][None, :length]
    alone = encode(encoder, alone, np.ones_like(alone))[0]
    np.testing.assert_allclose(padded, alone, atol=1e-5)


@pytest.mark.parametrize("duplicate", ["none", "both", "encoder"])
def test_transformers_naming_loads_alike(duplicate, encoder, tmp_path):
    """Its embedding is stored as `shared`, as the encoder's own, or as both."""
    tensors = {transformers_name(n): x for n, x in load_file(FILE).items()}
    if duplicate != "none":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    if duplicate == "encoder":
        del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_parameters(load_umt5(tmp_path, TINY), encoder)


def test_bfloat16_parameters_keep_a_float32_stream(encoder, golden):
    """Three blocks of bfloat16 linears differ by a few of their roundings, 2^-8."""
    half = load_umt5(FILE, TINY, dtype=jnp.bfloat16)
    assert {p.dtype for p in parameters(half).values()} == {np.dtype(jnp.bfloat16)}
    out = encode(half, golden["ids"], golden["mask"])
    assert out.dtype == jnp.float32
    error = real_rows(out - golden["out"], golden)
    ratio = np.std(error) / np.std(real_rows(golden["out"], golden))
    assert 0 < ratio < 2**-5


def test_a_mesh_gets_its_shards_and_the_same_features(encoder, golden):
    mesh = make_mesh(fsdp=8)
    sharded = load_umt5(FILE, TINY, mesh=mesh)
    kernel = sharded.blocks.ffn.fc1.kernel[...]
    assert not kernel.sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        out = encode(sharded, golden["ids"], golden["mask"])
    np.testing.assert_allclose(
        real_rows(out, golden), real_rows(golden["out"], golden), atol=TOLERANCE
    )


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    tensors = load_file(FILE)
    del tensors["blocks.1.attn.q.weight"]
    tensors["blocks.2.ffn.fc2.weight"] = np.zeros((48, 7), np.float32)
    tensors["decoder.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError) as caught:
        load_umt5(tmp_path, TINY)
    for part in (
        "3 tensors",
        "missing: blocks.1.attn.q.weight (64, 48)",
        "unexpected: decoder.weight (3,)",
        "wrong shape: blocks.2.ffn.fc2.weight is (48, 7), the config wants (48, 80)",
    ):
        assert part in str(caught.value)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="attention_dim = 64 does not divide over 5"):
        dataclasses.replace(TINY, num_heads=5)


def test_the_golden_was_made_with_this_config(golden):
    sizes = json.loads(str(golden["config_json"]))
    assert sizes["num_buckets"] == TINY.num_buckets
    assert sizes["dim_attn"] == TINY.attention_dim
