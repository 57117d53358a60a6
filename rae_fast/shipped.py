"""Where the recipes and the tools are: beside the package in a checkout, inside it when installed from a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
# In site-packages another distribution may have a folder of the same name; only a checkout has the project file, too.
ROOT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE


def shipped(path: str | Path) -> Path:
    """A path that the user gave, or if nothing lies there, ours of that name, as `configs/demo.yaml`."""
    ours = ROOT / path
    return ours if ours.exists() and not Path(path).exists() else Path(path)


def tools() -> dict[str, Path]:
    """Our tools by the name that `rae-fast` knows them by."""
    return {file.stem.replace("_", "-"): file for file in sorted((ROOT / "tools").glob("[a-z]*.py"))}
