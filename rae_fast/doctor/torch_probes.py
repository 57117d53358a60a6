"""torch, GPU, Triton, process groups, DeepSpeed, weights. Imports of all of them happen inside the probes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rae_fast.doctor.trial import DEMO, KERNELS, MISSING, OK, SLOW, TRAIN, Trial

MEETING_S = 30.0


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
