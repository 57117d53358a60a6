"""Small trials of what this project stands on; each says what works, how fast, what it costs otherwise, how to mend it.

A group of probes runs in a process of its own (`python -m rae_fast.doctor.probes GROUP`), one JSON line each: a library
that hangs or crashes takes only its group with it. So nothing but the standard library is imported up here.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, MISSING, SLOW = "ok", "missing", "slow"
DEMO, CACHE, TRAIN, KERNELS = JOBS = ("demo", "cache", "train", "kernels")
ALL = JOBS[:3]

DEMO_BYTES, IMAGENET_BYTES = 2e9, 504e9  # one view of ImageNet at 256 px, 768 channels, fp16
DEMO_MEMORY, FEW_FILES = 6e9, 1024
SLOW_DISK = 200e6
MEETING_S = 30.0
WRITTEN_BYTES = 128 << 20
OLDEST_PYTHON = (3, 11)
READ_BYTES, READ_THREADS, READ_S = 393_216, 8, 2.0  # a latent of 768 x 16 x 16 in fp16
JPEGS, JPEG_SIZE = 48, (500, 375)
SLOW_DECODE = 60  # images/s a core


@dataclass(frozen=True)
class Trial:
    """What a probe found.

    Attributes:
        name: what was tried.
        state: ok, missing or slow.
        found: versions, rates, or what went wrong.
        cost: what it costs as it is.
        mend: how to change that.
        stops: jobs that cannot run without it.
    """

    name: str
    state: str
    found: str
    cost: str = ""
    mend: str = ""
    stops: tuple[str, ...] = ()


# --- plain ----------------------------------------------------------------------------------------------------------


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
        return Trial("packages", MISSING, ", ".join(wrong), "whatever needs them fails", "pip install -e .", ALL)
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


# --- torch ----------------------------------------------------------------------------------------------------------


def probe_torch() -> Trial:
    """torch, by a product."""
    import torch

    a = torch.randn(512, 512)
    a @ a
    started_s = time.monotonic()
    for _ in range(10):
        a @ a
    rate = 10 * 2 * 512**3 / (time.monotonic() - started_s)
    speed = f"{rate / 1e9:,.0f} GFLOP/s in float32 on {torch.get_num_threads()} threads"
    return Trial("torch", OK, f"{torch.__version__}, {speed}")


def probe_driver() -> Trial:
    """The NVIDIA driver, by its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        mend = "on a machine with an NVIDIA GPU, install its driver"
        return Trial("driver", MISSING, "no nvidia-smi", "CPU only", mend)
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode or not done.stdout.strip():
        reason = (done.stderr or done.stdout).strip().splitlines()[:1]
        return Trial("driver", MISSING, f"nvidia-smi: {' '.join(reason)}", "CPU only", "install or load the driver")
    cards = done.stdout.strip().splitlines()
    return Trial("driver", OK, f"{len(cards)} x {cards[0]}")


def probe_cuda() -> Trial:
    """The GPU as torch sees it, by a product."""
    import torch

    if torch.version.cuda is None:
        mend = "install a CUDA wheel of torch"
        return Trial("CUDA", MISSING, "this torch is built without CUDA", "CPU only", mend, (KERNELS,))
    if not torch.cuda.is_available():
        found = f"torch for CUDA {torch.version.cuda} sees no GPU"
        mend = "on a machine with an NVIDIA GPU: compare the driver's version with torch's"
        return Trial("CUDA", MISSING, found, "a CPU trains the demo, and nothing larger", mend, (KERNELS,))
    facts = torch.cuda.get_device_properties(0)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    a @ a
    torch.cuda.synchronize()
    started_s = time.monotonic()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    rate = 10 * 2 * 4096**3 / (time.monotonic() - started_s)
    name = (
        f"{torch.cuda.device_count()} x {facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}"
    )
    return Trial("CUDA", OK, f"{name}; CUDA {torch.version.cuda}, {rate / 1e12:,.0f} TFLOP/s in bfloat16")


def probe_triton() -> Trial:
    """Triton: the compiler is there; on a GPU, a kernel of ours against its reference."""
    import torch

    try:
        import triton
    except ImportError as error:
        cost = "runtime.kernels=triton cannot be used"
        return Trial("Triton", MISSING, str(error), cost, "pip install triton (Linux, x86_64)", (KERNELS,))
    if not torch.cuda.is_available():
        cost = "kernels run in the interpreter only (TRITON_INTERPRET=1), for tests"
        return Trial("Triton", OK, f"{triton.__version__}, but no GPU to run kernels on", cost)
    from rae_kernels.swiglu import reference, swiglu_linear

    x, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 256), (128, 128)))
    started_s = time.monotonic()
    wanted = torch.nn.functional.linear(reference(x), weight).float()
    off = ((swiglu_linear(x, None, weight).float() - wanted).abs().max() / wanted.abs().max()).item()
    seconds = time.monotonic() - started_s
    if off > 0.05:
        found = f"{triton.__version__}: swiglu is {off:.3g} off"
        return Trial("Triton", MISSING, found, "wrong results", "see make gpu", (KERNELS,))
    return Trial("Triton", OK, f"{triton.__version__}, first kernel compiled and run in {seconds:.1f} s")


def probe_gloo() -> Trial:
    """Two processes that add a number over gloo."""
    return _probe_group("gloo", 2, "CPU ranks and checkpoints of several ranks need it")


def probe_nccl() -> Trial:
    """All GPUs of this machine that add a number over NCCL."""
    import torch

    if not torch.distributed.is_nccl_available():
        return Trial("NCCL", MISSING, "this torch has none", "one GPU at most", "install a CUDA wheel of torch")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    if not torch.cuda.is_available():
        return Trial("NCCL", OK, f"{version}, but no GPU to use it with")
    return _probe_group("nccl", torch.cuda.device_count(), f"{version}; several GPUs need it")


def _probe_group(backend: str, world: int, cost: str) -> Trial:
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        # A fork need not import torch again; CUDA does not survive it.
        method = "spawn" if backend == "nccl" else "fork"
        context = processes.start_processes(
            _join_and_add, (backend, world, f"{folder}/meeting"), nprocs=world, join=False, start_method=method
        )
        try:
            while not context.join(timeout=1):
                if time.monotonic() - started_s > MEETING_S:
                    raise TimeoutError(f"no answer in {MEETING_S:.0f} s")
        except Exception as error:
            for process in context.processes:
                process.kill()
            reason = str(error).strip().splitlines()[-1]
            return Trial(backend, MISSING, reason, cost, "set GLOO_SOCKET_IFNAME=lo, check the firewall", (TRAIN, DEMO))
    return Trial(backend, OK, f"{world} processes agreed in {time.monotonic() - started_s:.1f} s")


def _join_and_add(rank: int, backend: str, world: int, meeting: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    total = torch.full((1,), float(rank + 1), device=device)
    dist.all_reduce(total)
    assert total.item() == world * (world + 1) / 2
    dist.destroy_process_group()


def probe_weights() -> Iterator[Trial]:
    """Weights that metrics and losses need, and that nothing downloads by itself."""
    from rae_fast.autoencoder.losses import VGG_FILE, VGG_URL, find_vgg_weights
    from rae_fast.evaluation.inception import INCEPTION_FILE, INCEPTION_URL, inception_place

    folder = inception_place().parent
    for name, there, file, url, cost in (
        ("VGG16", find_vgg_weights() is not None, VGG_FILE, VGG_URL, "no LPIPS: gan.loss.perceptual=encoder"),
        ("Inception", inception_place().is_file(), INCEPTION_FILE, INCEPTION_URL, "no FID and IS: --features encoder"),
    ):
        if there:
            yield Trial(f"{name} weights", OK, str(folder / file))
        else:
            mend = f"curl -L --create-dirs -o {folder / file} {url}"
            yield Trial(f"{name} weights", MISSING, f"{folder / file} is not there", cost, mend)


# --- images ---------------------------------------------------------------------------------------------------------


def probe_dali() -> Trial:
    """DALI on the CPU: JPEGs of 500 x 375."""
    return _decode("DALI", None)


def probe_nvjpeg() -> Trial:
    """nvJPEG through DALI on the GPU."""
    if not gpu_count():
        return Trial("nvJPEG", MISSING, "no GPU", "data.crop=fast decodes on the CPU, as exact does")
    return _decode("nvJPEG", 0)


def _decode(name: str, device: int | None) -> Trial:
    try:
        import nvidia.dali  # noqa: F401 - whether it can be loaded
    except ImportError as error:
        mend = "pip install nvidia-dali-cuda130 (or -cuda120 for an older driver)"
        return Trial(name, MISSING, str(error), "no store can be built", mend, (DEMO, CACHE))
    from rae_fast.images.dali import DaliDecoder

    jpegs, threads = _jpegs(), len(os.sched_getaffinity(0))
    try:
        decoder = DaliDecoder(len(jpegs), threads, device)
        seconds = [_decode_once(decoder, jpegs) for _ in range(3)]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        cost, stops = ("no store can be built", (DEMO, CACHE)) if device is None else ("data.crop=fast fails", ())
        return Trial(name, MISSING, reason, cost, "pip install a DALI that fits the driver", stops)
    rate = len(jpegs) / min(seconds)
    version = next((v for d in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if (v := _version(d))), "")
    found = f"{version} decodes {rate:,.0f} images/s on {'the GPU' if device is not None else f'{threads} cores'}"
    if rate < SLOW_DECODE * threads:
        return Trial(name, SLOW, found, f"ImageNet decodes in {1_281_167 / rate / 3600:.1f} h", "give it idle cores")
    return Trial(name, OK, found)


def _decode_once(decoder: Any, jpegs: list[bytes]) -> float:
    started_s = time.monotonic()
    decoder.submit(jpegs)
    assert len(decoder.result()) == len(jpegs)
    return time.monotonic() - started_s


def gpu_count() -> int:
    """NVIDIA GPUs that the driver offers, asked without any library that would have to be loaded."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return 0
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _jpegs() -> list[bytes]:
    """Blurred noise, which compresses about as photographs do."""
    import io

    import numpy as np
    from PIL import Image

    files = []
    for seed in range(JPEGS):
        coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def probe_deepspeed() -> Trial:
    """DeepSpeed can be loaded, and what its operators are compiled with is there."""
    started_s = time.monotonic()
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Trial("DeepSpeed", MISSING, reason, "train with runtime.engine=ddp", "pip install deepspeed", (DEMO,))
    found = f"{deepspeed.__version__} for {get_accelerator()._name}, loaded in {time.monotonic() - started_s:.1f} s"
    ninja = shutil.which("ninja") or (Path(sys.executable).parent / "ninja").is_file()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not (ninja and compiler):
        lacking = " and ".join(name for name, there in (("ninja", ninja), ("a C++ compiler", compiler)) if not there)
        cost = "CPU ranks talk over gloo instead of shared memory"
        return Trial("DeepSpeed ops", SLOW, f"{found}; no {lacking}", cost, "apt-get install g++; pip install ninja")
    return Trial("DeepSpeed ops", OK, f"{found}; ninja and {compiler} compile them at the first start")


GROUPS: dict[str, tuple[Callable[..., Any], ...]] = {
    "plain": (probe_python, probe_packages, probe_memory, probe_compiler, probe_disk),
    # Two processes are forked before anything has started threads.
    "torch": (probe_driver, probe_gloo, probe_torch, probe_cuda, probe_triton, probe_nccl, probe_weights),
    "images": (probe_dali, probe_nvjpeg),
    "deepspeed": (probe_deepspeed,),
}
# What a probe stops if it does not even run.
STOPS = {"probe_torch": JOBS, "probe_dali": (DEMO, CACHE), "probe_deepspeed": (DEMO,), "probe_packages": ALL}


def title(probe: Callable[..., Any]) -> str:
    """A probe's name as people read it."""
    return probe.__name__.removeprefix("probe_")


def run_group(group: str, folder: Path) -> None:
    """Print a JSON line for each trial of a group, as soon as it is done."""
    for probe in GROUPS[group]:
        print(json.dumps({"begins": probe.__name__}), flush=True)
        try:
            found = probe(folder) if probe is probe_disk else probe()
            trials = [found] if isinstance(found, Trial) else list(found)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            mend = "pip install -e . in this environment" if isinstance(error, ImportError) else ""
            stops = STOPS.get(probe.__name__, ())
            trials = [Trial(title(probe), MISSING, f"{type(error).__name__}: {reason}", "", mend, stops)]
        for trial in trials:
            print(json.dumps(asdict(trial)), flush=True)


if __name__ == "__main__":
    run_group(sys.argv[1], Path(sys.argv[2]))
