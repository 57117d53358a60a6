"""tools/sample.py as people start it: under torchrun, killed, and with input that is wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_fast.sampling.job import image_path

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools/sample.py")
COUNT = 75


def command(folder: Path, settings: list[str], *flags: str) -> list[str]:
    return [sys.executable, TOOL, "--folder", str(folder), *flags, *settings]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, timeout=280)


def under_torchrun(arguments: list[str], ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "--master-port", str(port), *arguments[1:]]


def drawn(folder: Path) -> int:
    return sum(path.suffix == ".png" for path in (folder / "images").iterdir()) if (folder / "images").exists() else 0


def bytes_of(folder: Path, count: int) -> list[bytes]:
    assert len(list((folder / "images").iterdir())) == count
    return [image_path(folder, i).read_bytes() for i in range(count)]


def test_one_and_two_ranks_batch_7_and_64_make_the_same_bytes(settings: list[str], tmp_path: Path) -> None:
    flags = ("--count", str(COUNT), "--label-sampling", "equal", "--npz")
    one = run(command(tmp_path / "one", settings, *flags, "--batch", "7"))
    assert one.returncode == 0, one.stderr
    two = run(under_torchrun(command(tmp_path / "two", settings, *flags, "--batch", "64"), 2))
    assert two.returncode == 0, two.stderr
    assert bytes_of(tmp_path / "one", COUNT) == bytes_of(tmp_path / "two", COUNT)
    assert (tmp_path / "one/samples.npz").read_bytes() == (tmp_path / "two/samples.npz").read_bytes()
    assert np.bincount(np.load(tmp_path / "one/samples.npz")["labels"]).tolist() == [25, 25, 25]
    assert two.stdout.count("75 images:") == 1 and "waiting for the other ranks" in two.stderr


def test_grids_flags_and_wrong_input(settings: list[str], tmp_path: Path) -> None:
    """Several calls in one process: what costs time is importing."""
    calls = [
        ["--sweep", "--classes", "2,0", "--columns", "3"],
        ["--interpolate", "0,2", "--columns", "4", "--count", "2"],
        ["--per-class", "2", "--guidance", "1.5", "--interval", "0.1,0.9", "--mode", "SDE", "--steps", "3"],
        ["--classes", "cube"],
        ["--interval", "high"],
        ["--interpolate", "0"],
        ["--sweep", "--npz"],
        ["--fixed-noise"],
        ["--mode", "ODEE"],
        ["--count", "3", "stage_2.ckpt=nowhere.pt"],
        ["--count", "3", "--folder", str(tmp_path / "file/inside")],
        ["--count", "3", "--latents", "zarr", "--folder", str(tmp_path / "file/inside")],
    ]
    (tmp_path / "file").write_text("not a folder")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import sample
from rae_fast.errors import exit_cleanly
for number, flags in enumerate({calls!r}):
    sys.argv = ["sample.py", "--folder", {str(tmp_path)!r} + f"/{{number}}", *{settings!r}, *flags]
    try:
        exit_cleanly(sample.main)
    except SystemExit as end:
        print("status", number, end.code, flush=True)
        print("status", number, file=sys.stderr, flush=True)
"""
    done = run([sys.executable, "-c", script])
    statuses = [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == [0, 0, 0] + [2] * 9, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 9 and "Traceback" not in done.stderr
    for error, expected in zip(
        errors, ("cube", "--interval", "--interpolate 0", "--npz", "--fixed-noise"), strict=False
    ):
        assert expected in error
    with Image.open(tmp_path / "0/sweep.png") as sweep, Image.open(tmp_path / "1/interpolation.png") as way:
        assert sweep.size == (3 * 18 - 2, 2 * 18 - 2) and way.size == (4 * 18 - 2, 2 * 18 - 2)
    assert np.load(tmp_path / "2/labels.npy").tolist() == [0, 0, 1, 1, 2, 2]
    assert not any((tmp_path / str(number)).exists() for number in range(3, 12))


@pytest.mark.slow
def test_killed_in_the_middle_of_500_samples_and_run_again_it_makes_the_identical_set(
    settings: list[str], tmp_path: Path
) -> None:
    count = 500
    flags = ("--count", str(count), "--npz", "--latents", "npy", "sampler.params.num_steps=40")
    undisturbed = run(command(tmp_path / "whole", settings, *flags))
    assert undisturbed.returncode == 0, undisturbed.stderr
    folder, kills, kept = tmp_path / "killed", 0, {}
    for enough in (30, 130, 250):
        process = subprocess.Popen(
            command(folder, settings, *flags), stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None and drawn(folder) < enough:
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("images/*.png")}
    assert kills == 3 and len(kept) < count
    again = run(command(folder, settings, *flags))
    assert again.returncode == 0, again.stderr
    assert bytes_of(folder, count) == bytes_of(tmp_path / "whole", count)
    for name in ("samples.npz", "latents.npy", "labels.npy", "grid.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Pieces that were complete were not drawn again.
    whole = [start for start in range(0, count, 32) if all(f"{i:06d}.png" in kept for i in range(start, start + 32))]
    assert len(whole) > 5
    for start in whole:
        path = image_path(folder, start)
        assert path.stat().st_mtime_ns == kept[path.name]


@pytest.mark.parametrize("tool", ["sample", "reconstruct"])
def test_no_flag_is_taken_by_torchrun_for_its_own(tool: str) -> None:
    """torchrun reads beginnings of its options even behind the script's name."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"tools/{tool}.py"]
    flags = ["--run-folder", "/none", "--folder", "/none", *(["--input", "/none"] if tool == "reconstruct" else [])]
    done = subprocess.run([*launcher, *flags], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "error: /none" in done.stderr, done.stderr
