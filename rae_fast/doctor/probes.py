"""Small trials of what this project stands on; each says what works, how fast, what it costs otherwise, how to mend it.

A group of probes runs in a process of its own (`python -m rae_fast.doctor.probes GROUP FOLDER`), one JSON line each: a
library that hangs or crashes takes only its group with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rae_fast.doctor import host_probes, image_probes, torch_probes
from rae_fast.doctor.trial import CACHE, DEMO, JOBS, KERNELS, MISSING, TRAIN, Trial

GROUPS: dict[str, tuple[Callable[..., Any], ...]] = {
    "host": (host_probes.probe_python, host_probes.probe_packages, host_probes.probe_memory, host_probes.probe_disk),
    # All that import torch, which takes seconds. Two processes are forked before anything has started threads.
    "torch": (
        torch_probes.probe_driver,
        torch_probes.probe_gloo,
        torch_probes.probe_torch,
        torch_probes.probe_cuda,
        torch_probes.probe_triton,
        torch_probes.probe_nccl,
        host_probes.probe_compiler,
        torch_probes.probe_weights,
        torch_probes.probe_deepspeed,
    ),
    "images": (image_probes.probe_dali, image_probes.probe_nvjpeg),
}
# What a probe stops if it does not even run.
STOPS = {
    "probe_packages": (DEMO, CACHE, TRAIN),
    "probe_torch": JOBS,
    "probe_cuda": (KERNELS,),
    "probe_triton": (KERNELS,),
    "probe_gloo": (DEMO, TRAIN),
    "probe_deepspeed": (DEMO,),
    "probe_dali": (DEMO, CACHE),
}


def title(probe: Callable[..., Any]) -> str:
    """A probe's name as people read it."""
    return probe.__name__.removeprefix("probe_")


def run_group(group: str, folder: Path) -> None:
    """Print a JSON line for each trial of a group, as soon as it is done."""
    for probe in GROUPS[group]:
        print(json.dumps({"begins": probe.__name__}), flush=True)
        try:
            found = probe(folder) if probe is host_probes.probe_disk else probe()
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
