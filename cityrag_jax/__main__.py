"""List the doors: `python -m cityrag_jax`."""

import ast
import difflib
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
DOORS = ("demo", "doctor", "survey", "train", "generate", "evaluate", "ui")


def first_line(file: Path) -> str:
    """Give what a file says of itself in its first line, without importing it."""
    doc = ast.get_docstring(ast.parse(file.read_text())) or ""
    return doc.partition("\n")[0].rstrip(":,.")


def describe() -> str:
    """List doors, and in a checkout its tools, with a line each."""
    doors = [PACKAGE / f"{name}.py" for name in DOORS]
    rows = {f"python -m cityrag_jax.{f.stem}": f for f in doors if f.exists()}
    tools = PACKAGE.parent / "tools"
    if (PACKAGE.parent / "pyproject.toml").exists():
        rows |= {f"python tools/{f.name}": f for f in sorted(tools.glob("*.py"))}
    wide = max(map(len, rows))
    lines = [f"  {name:<{wide}}  {first_line(file)}" for name, file in rows.items()]
    return "\n".join([*lines, "", "Each has --help."])


def main(words: list[str]) -> int:
    """Print the list; a word that is no option is answered by the nearest door."""
    asked = [word for word in words if word not in ("--help", "-h")]
    if asked:
        near = difflib.get_close_matches(asked[0], DOORS, 1) or [DOORS[0]]
        print(
            f"error: {asked[0]} is no option; a door is started as "
            f"python -m cityrag_jax.{near[0]}.",
            file=sys.stderr,
        )
        return 2
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
