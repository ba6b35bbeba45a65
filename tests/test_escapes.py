"""No name that stands in a file leads out of that file's folder."""

import json
import re

import pytest

from cityrag_jax.checkpoint import read_config
from cityrag_jax.checkpoint.bundles import _check_config
from cityrag_jax.convert.files import CheckpointReader

ESCAPES = (
    *("", ".", "..", "../x", "../../x", "./x", "a/../../x", "a/x", "a//x", "/x"),
    *("//x", "/etc/passwd", "~", "~/x", "x/", "x/..", "..\\x", "\\x", "a\\..\\x"),
    *("C:\\x", "C:x", "file:///x", "x\0", "\\\\host\\x", "x:stream"),
)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_shard_of_an_index_lies_beside_it(tmp_path, name):
    (tmp_path / "x").write_bytes(b"not to be read")
    path = tmp_path / "in" / "a.safetensors.index.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=re.escape(f"{path} names {name!r}")):
        CheckpointReader(path)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_network_of_a_model_lies_inside_its_folder(tmp_path, name):
    told = {"modules": {name: {}}, "described": {}, "texts": {}, "source": {}}
    with pytest.raises(ValueError, match="no name of a folder"):
        _check_config(told, tmp_path / "config.json")


@pytest.mark.parametrize("name", ESCAPES)
def test_a_class_of_a_model_lies_inside_the_package(name):
    for place in (f"cityrag_jax.model.{name}", f"{name}.WanDiT", name):
        told = {"class": place, "config_class": place, "config": {}, "branches": []}
        with pytest.raises(ValueError):
            read_config(told)


def test_so_many_spellings_are_tried():
    assert len(set(ESCAPES)) == 25
