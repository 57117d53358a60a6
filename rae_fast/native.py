"""Small C libraries, compiled on the machine that uses them, once, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

from rae_fast.provenance import atomic_write

FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-pthread")
COMPILE_TIMEOUT_S = 120


class NativeUnavailableError(RuntimeError):
    """A native library cannot be had; the reason."""


def load_library(source: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """Compile a C file, unless this machine has done so before, and load it.

    Raises:
        NativeUnavailableError: there is no compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    key = hashlib.sha256(source.read_bytes() + repr((compiler, flags, _cpu())).encode()).hexdigest()[:16]
    path = _cache_folder() / f"{source.stem}-{key}.so"
    if not path.exists():
        _compile([*compiler, *flags, str(source)], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from error


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / path.name
        try:
            subprocess.run(
                [*command, "-o", str(built)], check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
            )
        except FileNotFoundError as error:
            raise NativeUnavailableError(f"no C compiler ({command[0]}); install gcc or set CC") from error
        except subprocess.CalledProcessError as error:
            complaint = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[-200:])
            raise NativeUnavailableError(f"{command[0]} failed: {complaint.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailableError(f"{command[0]} took more than {COMPILE_TIMEOUT_S} s") from error
        with atomic_write(path) as file:
            file.write(built.read_bytes())


def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    facts = {platform.machine()}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join(sorted(facts))


def _cache_folder() -> Path:
    """A folder of this user's own for compiled code, in the cache or, where that cannot be written, a temporary one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rae_fast"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="rae_fast-"))
