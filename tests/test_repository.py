"""What a clone brings along stays small, in all and by kind of file."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MIB = 2**20
MADE_HERE = {".git", ".venv", "out", "__pycache__"}
ANIMATIONS = {".gif", ".mp4", ".webp"}


def tracked_files(root: pathlib.Path) -> list[pathlib.Path]:
    """List what git tracks; in an unpacked archive, which has no git, every file."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "ls-files", "-z"]
        listed = subprocess.run(command, check=True, capture_output=True).stdout
        paths = [root / name for name in os.fsdecode(listed).split("\0") if name]
    else:
        paths = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in MADE_HERE]
            paths += [pathlib.Path(folder, name) for name in names]
    return [path for path in paths if path.is_file()]


def sizes_of(root: pathlib.Path) -> dict[str, int]:
    return {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in tracked_files(root)
    }


def check_total(sizes: dict[str, int], most_mib: float):
    total = sum(sizes.values())
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    listed = ", ".join(f"{name} {sizes[name] / MIB:.2f}" for name in largest)
    assert total <= most_mib * MIB, (
        f"{total / MIB:.2f} MiB, at most {most_mib} are allowed; the largest: {listed}"
    )


@pytest.fixture(scope="module")
def sizes():
    return sizes_of(ROOT)


def test_all_files_together_are_at_most_40_mib(sizes):
    assert len(sizes) > 100
    check_total(sizes, 40)


def test_no_file_is_over_15_mib(sizes):
    for name, size in sizes.items():
        check_total({name: size}, 15)


@pytest.mark.parametrize(
    "folder, most_mib", [("tests/golden", 18), ("configs/toy_city_weights", 20)]
)
def test_numbers_and_weights_keep_to_their_share(sizes, folder, most_mib):
    inside = {n: size for n, size in sizes.items() if n.startswith(f"{folder}/")}
    assert inside
    check_total(inside, most_mib)


def test_pictures_of_the_readme_keep_to_their_share(sizes):
    shown = {n: size for n, size in sizes.items() if n.startswith(".github/")}
    moving = {n for n in shown if pathlib.PurePath(n).suffix in ANIMATIONS}
    check_total({n: shown[n] for n in moving}, 2)
    pictures = {".jpg", ".jpeg", ".png", ".svg"}
    still = {n for n in shown if pathlib.PurePath(n).suffix in pictures}
    check_total({n: shown[n] for n in still}, 1.5)


def test_an_archive_without_git_is_walked(tmp_path):
    for name in ("README.md", ".venv/lib.so", "out/clip.mp4", "tests/golden/a.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(7))
    assert sizes_of(tmp_path) == {"README.md": 7, "tests/golden/a.npz": 7}


def test_too_much_is_refused_with_the_worst_by_name():
    with pytest.raises(AssertionError, match="4.00 MiB.*the largest: b 3.00, a 1.00"):
        check_total({"a": MIB, "b": 3 * MIB}, 3.5)
