"""`kernels/` must never shadow, nor be taken for, the hub package named `kernels`."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib.util, sys
import transformers
from transformers.utils import is_kernels_available
import rae_fast, rae_fast.config_file, rae_kernels
spec = importlib.util.find_spec("kernels")
print("available", is_kernels_available())
print("kernels", getattr(spec, "origin", None))
print("rae_kernels", rae_kernels.__file__)
"""


def _probe(folder: Path, python_path: list[Path]) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path))}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@pytest.mark.parametrize("root_on_path", [False, True])
def test_without_the_hub_package_nothing_named_kernels_is_found(tmp_path: Path, root_on_path: bool) -> None:
    found = _probe(tmp_path, [ROOT] if root_on_path else [])
    assert found["available"] == "False"
    # With the root on the path, Python sees the bare folder as a namespace without a file: never a module of ours.
    assert found["kernels"] == "None"
    assert Path(found["rae_kernels"]).parent == ROOT / "kernels" / "rae_kernels"


@pytest.mark.parametrize("root_on_path", [False, True])
def test_the_hub_package_stays_reachable_beside_ours(tmp_path: Path, root_on_path: bool) -> None:
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("__version__ = '0.99.0'\n")
    info = site / "kernels-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n")
    # Behind the root, so that a regular package named `kernels` of ours would win over it.
    found = _probe(tmp_path, [ROOT, site] if root_on_path else [site])
    assert found["kernels"] == str(site / "kernels" / "__init__.py")
    assert Path(found["rae_kernels"]).parent == ROOT / "kernels" / "rae_kernels"


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_on_disk_is_listed_for_installation() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {"rae_kernels", "rae_fast.configs", "rae_fast.tools"}
    for init in (ROOT / "rae_fast").rglob("__init__.py"):
        on_disk.add(".".join(init.parent.relative_to(ROOT).parts))
    assert listed == on_disk


def test_transformers_lower_bound_excludes_the_versions_that_crash_on_a_kernels_folder() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "transformers>=5.11" in dependencies
