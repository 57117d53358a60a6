"""Where the golden files lie, and one file at a time for tests marked `golden(pattern, ...)`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=DATA, help="a folder laid out as tests/golden/data")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(*patterns): once for every golden file that one of the patterns matches")


def folder(config: pytest.Config) -> Path:
    # pytest knows the option only where this folder is named on the command line.
    return Path(config.getoption("--golden-dir", default=DATA)).resolve()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is not None:
        root = folder(metafunc.config)
        files = sorted(file for pattern in marker.args for file in root.glob(pattern))
        metafunc.parametrize("golden", files, indirect=True, ids=[file.relative_to(root).as_posix() for file in files])


class Golden:
    """The arrays of one .npz as tensors, its `meta`, and its folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.arrays = path, np.load(path)
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays.files

    def names(self, prefix: str) -> Iterator[str]:
        return (name for name in self.arrays.files if name.startswith(prefix))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): self[name] for name in self.names(prefix)}


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return folder(request.config)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    found = Golden(request.param)
    yield found
    found.arrays.close()


@pytest.fixture(scope="session")
def golden_file(golden_dir: Path) -> Callable[[str], Path]:
    """Name within the folder -> path; the test is skipped where the folder has no such file."""

    def find(name: str) -> Path:
        if not (golden_dir / name).exists():
            pytest.skip(f"no {name} in {golden_dir}")
        return golden_dir / name

    return find


@pytest.fixture(scope="session")
def read_golden(golden_file: Callable[[str], Path]) -> Iterator[Callable[[str], Golden]]:
    """Name within the folder -> its arrays; the test is skipped where the folder has no such file."""
    opened: list[Golden] = []

    def read(name: str) -> Golden:
        opened.append(Golden(golden_file(name)))
        return opened[-1]

    yield read
    for found in opened:
        found.arrays.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrix products that are cut between threads sum in another order, and some models amplify rounding greatly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
