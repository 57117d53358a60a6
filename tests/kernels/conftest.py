"""Tests marked `interpreter` run Triton kernels on the CPU, in one child process for all of them.

Triton decides when it is first imported whether kernels are interpreted, and a pytest process may have imported it
long before this folder is reached (torch.compile does); the same process also has to compile kernels for real. So the
child gets TRITON_INTERPRET=1 and runs the marked tests; here each of them reports what it did there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
REPORT_VARIABLE = "RAE_KERNELS_TEST_REPORT"
CHILD_TIMEOUT_S = 900


class Child:
    """The process that runs the marked tests, started when the first of them is due."""

    def __init__(self, root: Path, tests: list[str]) -> None:
        self.root, self.tests = root, tests
        self.reports: dict[str, list[str]] | None = None

    def report(self, test: str) -> tuple[str, str]:
        """(outcome, text) of one test."""
        if self.reports is None:
            self.reports = self._run()
        outcome, text = self.reports.get(test, ("failed", self.output))
        return outcome, text

    def _run(self) -> dict[str, list[str]]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            environment = os.environ | {"TRITON_INTERPRET": "1", REPORT_VARIABLE: str(report)}
            # Markers were evaluated where the tests were chosen: the child runs exactly the tests it is given.
            options = ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib -q"]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *self.tests],
                cwd=self.root, env=environment, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S,
            )  # fmt: skip
            self.output = f"no report from the child process:\n{done.stdout}\n{done.stderr}"
            return json.loads(report.read_text()) if report.exists() else {}


def patch_language_once() -> None:
    """Let a kernel's calls of other functions be plain calls.

    The interpreter exchanges the members of `triton.language` anew in every such call, which is nearly all of its time;
    the kernel's own start has already exchanged them.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(function: object, *args: object, **kwargs: object) -> object:
        if id(function.fn.__globals__) not in patched:
            patched.add(id(function.fn.__globals__))
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def accept_arrays_of_one_number() -> None:
    """Let Triton below 3.8 work with numpy from 2.4 on, which takes no [1] array for an int any more."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, *scope: object) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch


if INTERPRETING:
    patch_language_once()
    accept_arrays_of_one_number()

CHILD = pytest.StashKey[Child]()
REPORTS: dict[str, list[str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs Triton kernels in its interpreter, in a child process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # The first of them waits for all of them.
        if item.get_closest_marker("interpreter") and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(CHILD_TIMEOUT_S + 60))


def pytest_collection_finish(session: pytest.Session) -> None:
    tests = [item.nodeid for item in session.items if item.get_closest_marker("interpreter")]
    session.config.stash[CHILD] = Child(session.config.rootpath, tests)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETING or pyfuncitem.get_closest_marker("interpreter") is None:
        return None
    outcome, text = pyfuncitem.config.stash[CHILD].report(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        REPORTS[report.nodeid] = [report.outcome, report.longreprtext]


def pytest_sessionfinish() -> None:
    if REPORT_VARIABLE in os.environ:
        Path(os.environ[REPORT_VARIABLE]).write_text(json.dumps(REPORTS))
