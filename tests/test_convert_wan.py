"""The converter: everything published comes across exactly, bad input leaves nothing.

The published files are too large for tests: `synthetic_wan` writes checkpoints of their
exact layouts at small widths.
"""

import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from cityrag_jax.convert.files import CheckpointReader


def test_a_pickle_reads_like_the_same_safetensors(tmp_path, rng):
    tensors = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=(2, 5)).astype(ml_dtypes.bfloat16),
        "c": rng.normal(size=7).astype(np.float16),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    as_torch = {n: torch.from_numpy(x.astype(np.float32)) for n, x in tensors.items()}
    as_torch["b"] = as_torch["b"].bfloat16()
    as_torch["c"] = as_torch["c"].half()
    torch.save(as_torch, tmp_path / "m.pth")
    torch.save(as_torch, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "m.pth", "old.pth"):
        reader = CheckpointReader(tmp_path / name)
        assert reader.names() == tensors.keys()
        for tensor, x in tensors.items():
            assert reader.shape(tensor) == x.shape
            assert reader.dtype(tensor) == x.dtype.name
            assert reader.read(tensor).dtype == x.dtype
            np.testing.assert_array_equal(reader.read(tensor), x)
        rows = np.array([2, 0, 2])
        np.testing.assert_array_equal(reader.read_rows("a", rows), tensors["a"][rows])


class Code:
    """What an attacker would put into a pickle."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


def test_a_pickle_that_carries_code_is_refused_and_its_code_not_run(tmp_path):
    victim = tmp_path / "written_by_the_pickle"
    torch.save({"a": torch.zeros(2), "b": Code(victim)}, tmp_path / "new.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Code(victim)}))
    for name in ("new.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} is refused"):
            CheckpointReader(tmp_path / name)
    assert not victim.exists()


def test_a_pickle_that_is_cut_or_holds_other_things_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2), "steps": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other things than tensors .*steps"):
        CheckpointReader(tmp_path / "other.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.pth is"):
        CheckpointReader(tmp_path / "cut.pth")
