"""Python, packages, compiler, memory and disk. Heavy or doubtful imports happen inside the probes."""

from __future__ import annotations

import mmap
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rae_fast.doctor.trial import CACHE, DEMO, JOBS, MISSING, OK, SLOW, TRAIN, Trial

OLDEST_PYTHON = (3, 11)
DEMO_BYTES, IMAGENET_BYTES = 2e9, 504e9  # one view of ImageNet at 256 px, 768 channels, fp16
DEMO_MEMORY, FEW_FILES = 6e9, 1024
SLOW_DISK = 200e6
WRITTEN_BYTES = 128 << 20
READ_BYTES, READ_THREADS, READ_S = 393_216, 8, 2.0  # a latent of 768 x 16 x 16 in fp16


def probe_python() -> Trial:
    """The interpreter."""
    version = platform.python_version()
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PYTHON:
        return Trial("Python", MISSING, version, "nothing runs", "install Python 3.11 or newer", JOBS)
    return Trial("Python", OK, f"{version} in {sys.prefix}")


def probe_packages() -> Trial:
    """Every dependency in the version that pyproject.toml asks for."""
    from importlib import metadata

    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("rae_fast") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} instead of {wanted.specifier}")
    if wrong:
        return Trial(
            "packages", MISSING, ", ".join(wrong), "whatever needs them fails", "pip install -e .", (DEMO, CACHE, TRAIN)
        )
    return Trial("packages", OK, "all that pyproject.toml asks for")


def probe_compiler() -> Trial:
    """The C compiler, on this project's own two libraries."""
    from rae_fast.images.resample import load_native
    from rae_fast.latents.gather import gather_library
    from rae_fast.native import NativeUnavailableError

    started_s = time.monotonic()
    try:
        load_native()
        gather_library()
    except NativeUnavailableError as error:
        cost = "crops take six times as long, the loader reads through Python"
        return Trial("compiler", SLOW, str(error), cost, "install gcc (apt-get install gcc), or set CC")
    name = os.environ.get("CC", "cc")
    return Trial("compiler", OK, f"{name}: crop and gather libraries loaded in {time.monotonic() - started_s:.1f} s")


def probe_memory() -> Trial:
    """Main memory, and how many files may be open."""
    import resource

    import psutil

    memory = psutil.virtual_memory()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    cores = len(os.sched_getaffinity(0))
    found = f"{memory.total / 1e9:.0f} GB, {memory.available / 1e9:.0f} GB free; {cores} cores; {files:,} open files"
    if memory.available < DEMO_MEMORY:
        return Trial("memory", MISSING, found, f"the demo needs {DEMO_MEMORY / 1e9:.0f} GB", "end something", (DEMO,))
    if files < FEW_FILES:
        return Trial("memory", SLOW, found, "large stores need many open files", "ulimit -n 65536")
    return Trial("memory", OK, found)


def probe_disk(folder: Path) -> Trial:
    """Room, and rates of writing and of random reading, in the folder where stores will be."""
    free = shutil.disk_usage(folder).free
    written, read = _write_rate(folder), _read_rate(folder)
    rates = f"writes {written / 1e6:,.0f} MB/s, random reads {read / 1e6:,.0f} MB/s"
    found = f"{folder.resolve()}: {free / 1e9:,.0f} GB free, {rates}"
    cost = f"an epoch over ImageNet's latents (504 GB) reads for {IMAGENET_BYTES / read / 3600:.1f} h"
    if free < DEMO_BYTES:
        mend = "make room, or --folder on another disk"
        return Trial("disk", MISSING, found, "the demo needs 2 GB", mend, (DEMO, CACHE))
    if min(read, written) < SLOW_DISK:
        return Trial("disk", SLOW, found, cost, "put the store on a local SSD; --folder tries another disk")
    return Trial("disk", OK, found, "" if free > IMAGENET_BYTES else "no room for ImageNet's latents (504 GB)")


def _write_rate(folder: Path) -> float:
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        started_s = time.monotonic()
        for _ in range(WRITTEN_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_BYTES / (time.monotonic() - started_s)


def _read_rate(folder: Path) -> float:
    """Bytes a second of random reads of one latent each, past the page cache where the file system can."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        for _ in range(WRITTEN_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            handle = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # tmpfs and some network file systems have no such reads
            handle = os.open(file.name, os.O_RDONLY)
        until_s = time.monotonic() + READ_S

        def read(seed: int) -> int:
            chance, buffer, done = random.Random(seed), mmap.mmap(-1, READ_BYTES), 0
            while time.monotonic() < until_s:
                done += os.preadv(handle, [buffer], chance.randrange(WRITTEN_BYTES // READ_BYTES) * READ_BYTES)
            return done

        started_s = time.monotonic()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            total = sum(pool.map(read, range(READ_THREADS)))
        os.close(handle)
        return total / (time.monotonic() - started_s)
