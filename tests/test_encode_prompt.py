"""Prompts encoded block by block equal those of the whole model."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_tokenizer import PROMPTS, train_tokenizer
from test_umt5 import FILE, TINY, encode, transformers_name

from cityrag_jax.convert import load_umt5
from cityrag_jax.convert.files import CheckpointReader
from cityrag_jax.convert.prompt import encode_prompts, find_text_encoder
from cityrag_jax.model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
# One block after another is compiled apart from the scan and at a shorter length:
# float32 sums in another order, on features of size 4.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official layout, its pickle as safetensors."""
    folder = tmp_path_factory.mktemp("official")
    train_tokenizer(folder / "google/umt5-xxl", vocab_size=110)
    shutil.copy(FILE, folder / "models_t5_umt5-xxl-enc-bf16.safetensors")
    return folder


@pytest.fixture(scope="module")
def diffusers(official, tmp_path_factory):
    """Diffusers' layout: shards, an index and the tokeniser elsewhere."""
    folder = tmp_path_factory.mktemp("diffusers")
    shutil.copytree(official / "google/umt5-xxl", folder / "tokenizer")
    (folder / "text_encoder").mkdir()
    tensors = {transformers_name(n): x for n, x in load_file(FILE).items()}
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        shard = {name: tensors[name] for name in names[number::3]}
        save_file(shard, folder / "text_encoder" / file)
        weight_map |= dict.fromkeys(shard, file)
    index = folder / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def whole(official):
    """The prompts through the whole model at 512 rows, cut at their lengths."""
    tokenizer = Tokenizer(official / "google/umt5-xxl")
    ids, mask = tokenizer(list(PROMPTS.values()))
    features = encode(load_umt5(FILE, TINY), ids, mask)
    return [np.asarray(x)[: n.sum()] for x, n in zip(features, mask, strict=True)]


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_streamed_rows_equal_those_of_the_whole_model(layout, whole, request):
    source = request.getfixturevalue(layout)
    rows = encode_prompts(source, list(PROMPTS.values()))
    assert len(rows) == len(PROMPTS)
    lengths = [len(x) for x in rows]
    assert min(lengths) == 1 and max(lengths) > 64  # the empty prompt, the long one
    for ours, expected in zip(rows, whole, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_a_prompt_gets_the_same_rows_alone_and_among_others(official):
    together = encode_prompts(official, ["a street", "", "rain " * 90])
    for prompt, rows in zip(("a street", ""), together, strict=False):
        (alone,) = encode_prompts(official, [prompt])
        np.testing.assert_array_equal(alone, rows)


def test_bfloat16_weights_are_widened_not_rounded_again(official, tmp_path):
    """As published: bfloat16 on disk, float32 arithmetic; the same as the whole."""
    shutil.copytree(official / "google", tmp_path / "google")
    half = {n: x.astype(ml_dtypes.bfloat16) for n, x in load_file(FILE).items()}
    file = tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors"
    save_file(half, file)
    (rows,) = encode_prompts(tmp_path, ["a street in the rain"])
    ids, mask = Tokenizer(tmp_path / "google/umt5-xxl")(["a street in the rain"])
    expected = encode(load_umt5(file, TINY), ids, mask)[0, : len(rows)]
    np.testing.assert_allclose(rows, expected, atol=TOLERANCE)
    (narrow,) = encode_prompts(tmp_path, ["a street in the rain"], dtype=jnp.bfloat16)
    assert 1e-4 < np.abs(narrow - rows).max() < 0.5


def test_the_published_pickle_is_read_and_both_layouts_agree(diffusers, tmp_path):
    """Bit for bit: the same numbers reach the same program."""
    shutil.copytree(diffusers / "tokenizer", tmp_path / "google/umt5-xxl")
    tensors = {name: torch.from_numpy(x) for name, x in load_file(FILE).items()}
    torch.save(tensors, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    ours, theirs = (encode_prompts(s, ["a car", ""]) for s in (tmp_path, diffusers))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_one_block_and_a_few_rows_are_read_at_a_time(official, monkeypatch):
    """The embedding is never read whole; every other tensor is read once."""
    read = []
    whole = CheckpointReader.read

    def spy(self, name):
        read.append(name)
        return whole(self, name)

    monkeypatch.setattr(CheckpointReader, "read", spy)
    encode_prompts(official, ["a street", "in the rain"])
    assert "token_embedding.weight" not in read
    assert sorted(read) == sorted(set(load_file(FILE)) - {"token_embedding.weight"})
    layers = [int(name.split(".")[1]) for name in read if name.startswith("blocks")]
    assert layers == sorted(layers)


def test_every_missing_file_is_named(diffusers, tmp_path):
    with pytest.raises(ValueError) as caught:
        encode_prompts(tmp_path, ["x"])
    assert "models_t5_umt5-xxl-enc-bf16.pth" in str(caught.value)
    assert "google/umt5-xxl holds no tokeniser" in str(caught.value)
    broken = tmp_path / "broken"
    shutil.copytree(diffusers, broken)
    shutil.rmtree(broken / "tokenizer")
    for number in 1, 3:
        (broken / f"text_encoder/model-{number:05d}-of-00003.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        encode_prompts(broken, ["x"])
    for part in "model-00001-of", "model-00003-of", "tokenizer holds no tokeniser":
        assert part in str(caught.value)
    assert "model-00002-of" not in str(caught.value)


def test_tensors_that_do_not_fit_are_all_named(official, tmp_path):
    shutil.copytree(official / "google", tmp_path / "google")
    tensors = load_file(FILE)
    del tensors["blocks.2.norm2.weight"]
    tensors["blocks.1.ffn.fc1.weight"] = np.zeros((8, 48), np.float32)
    save_file(tensors, tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors")
    with pytest.raises(ValueError) as caught:
        encode_prompts(tmp_path, ["x"])
    assert "missing: blocks.2.norm2.weight" in str(caught.value)
    assert "wrong shape: blocks.1.ffn.fc1.weight" in str(caught.value)
    (tmp_path / "google/umt5-xxl/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError) as caught:
        find_text_encoder(tmp_path)
    assert "missing: blocks.2.norm2.weight" in str(caught.value)
    assert "not a readable tokeniser" in str(caught.value)
    other = {"weight": np.zeros(3, np.float32)}
    save_file(other, tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors")
    with pytest.raises(ValueError, match="is no UMT5 text encoder"):
        encode_prompts(tmp_path, ["x"])


def test_values_types_and_ids_that_will_not_do_are_refused(official, tmp_path):
    """Integers as weights, a NaN in a block, a tokeniser of another checkpoint."""
    shutil.copytree(official / "google", tmp_path / "google")
    file = tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors"
    tensors = load_file(FILE)
    save_file(tensors | {"norm.weight": np.ones(48, np.int32)}, file)
    with pytest.raises(ValueError, match="norm.weight is I32"):
        encode_prompts(tmp_path, ["x"])
    broken = tensors["blocks.1.ffn.fc2.weight"].copy()
    broken[3, 5] = np.nan
    save_file(tensors | {"blocks.1.ffn.fc2.weight": broken}, file)
    with pytest.raises(ValueError, match="not finite, in its block 1"):
        encode_prompts(tmp_path, ["x"])
    short = tensors["token_embedding.weight"][:4].copy()
    save_file(tensors | {"token_embedding.weight": short}, file)
    with pytest.raises(ValueError, match="not of the same checkpoint"):
        encode_prompts(tmp_path, ["a street"])


def test_the_tool_writes_rows_and_refuses_with_code_2(
    official, whole, tmp_path, monkeypatch, capsys
):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["encode_prompt.py", *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/encode_prompt.py"), run_name="__main__")
        return ended.value.code, capsys.readouterr()

    out, prompt = tmp_path / "text.npy", PROMPTS["entities"]
    code, said = run(f"--source={official}", f"--prompt={prompt}", f"--out={out}")
    expected = whole[list(PROMPTS).index("entities")]
    np.testing.assert_allclose(np.load(out), expected, atol=TOLERANCE)
    assert code == 0 and f"{len(expected)} rows of width 48" in said.out
    assert not said.err  # no bar where there is no terminal
    for place, problem in (
        (tmp_path / "b.npy", "umt5-xxl holds no tokeniser, neither tokenizer.json"),
        (tmp_path / "nowhere" / "b.npy", "make it first"),
    ):
        code, said = run(f"--source={tmp_path}", "--prompt=x", f"--out={place}")
        assert code == 2 and said.err.startswith("error: ")
        assert problem in said.err and not place.exists()
