"""A full disk is said with the file's name and a cure, and leaves no half file."""

import errno
import pathlib

import pytest

from cityrag_jax.commands.command import describe_error
from cityrag_jax.files import named, write_whole


def test_a_file_appears_whole_over_the_one_before(tmp_path):
    write_whole(tmp_path / "a.json", "old")
    write_whole(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_with_file_and_cure_and_the_old_file_stays(
    tmp_path, monkeypatch, number
):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def write_bytes(self, data):
        self.touch()
        raise OSError(number, "no room")  # as write(2): it knows no name

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
    with pytest.raises(OSError) as raised:
        write_whole(path, "new")
    said, code = describe_error(raised.value)
    assert said.startswith(f"error: {path}: ") and code == 2
    assert said.endswith("Make room, then repeat the command.")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_error_that_knows_its_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, named(tmp_path / "other"):
        (tmp_path / "missing").read_text()
    assert raised.value.filename == str(tmp_path / "missing")
