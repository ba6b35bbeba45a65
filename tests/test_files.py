"""A full disk is said with the file's name and a cure, and leaves no half file."""

import errno
import pathlib
import re

import pytest

from cityrag_jax.commands.command import describe_error
from cityrag_jax.files import made_for_use, named, open_folder, write_whole


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


def test_a_folder_is_made_and_left_empty_or_refused(tmp_path):
    made = open_folder(tmp_path / "a" / "b")
    assert made.is_dir() and not list(made.iterdir())
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in {
        tmp_path / "file": f"{tmp_path}/file is a file",
        tmp_path / "file" / "below": f"{tmp_path}/file is a file",
        tmp_path / "loop" / "below": "Too many levels of symbolic links",
    }.items():
        told = re.escape(f"{path} cannot be written to ({reason}); choose another")
        with pytest.raises(ValueError, match=told):
            open_folder(path)


def test_folders_that_stay_empty_go_again_and_no_others(tmp_path):
    (tmp_path / "mine").mkdir()
    for path, kept in {"mine": ["mine"], "mine/a/b": ["mine"], "c/d": ["mine"]}.items():
        with pytest.raises(ValueError), made_for_use(tmp_path / path):
            open_folder(tmp_path / path)
            raise ValueError("bad input")
        assert [x.relative_to(tmp_path).as_posix() for x in tmp_path.rglob("*")] == kept
    with made_for_use(tmp_path / "c/d"):
        write_whole(open_folder(tmp_path / "c") / "kept", "")  # d is a file, say
    assert (tmp_path / "c/kept").exists()
