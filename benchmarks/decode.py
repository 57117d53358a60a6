"""How fast do JPEGs become crops, against PIL in a torch DataLoader with as many workers on as many cores?

    python benchmarks/decode.py --threads 2 --out benchmarks/results/decode-cpu.json
    python benchmarks/decode.py --source /data/imagenet/val --device cuda --sweep

Without --source it draws JPEGs of ImageNet's sizes (median 0.19 megapixels and 86 kB). All contenders run in
turn in every round, on the same cores, over the same files, which are in the page cache. CPU time per image is taken
over the whole tree of processes: on a machine that others use too, it is the figure to trust.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from results_file import make_result, print_table, row, write_result
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from rae_fast.config import Data
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.images import decode
from rae_fast.images.crop import center_crop_pil, crop_pil
from rae_fast.images.decode import ImagePipeline
from rae_fast.images.drift import crop_drift
from rae_fast.images.entries import ImageIndex
from rae_fast.images.feeder import Feeder
from rae_fast.images.index import build_index

BATCH = 128
BASELINE = "PIL + DataLoader"
# Sizes of ImageNet's training images: most are 500 pixels wide or high, some much larger.
SIZES = (
    [(500, 375)] * 11 + [(375, 500)] * 4 + [(500, 333)] * 3 + [(333, 500)] * 2 + [(500, 500), (300, 225), (1024, 768)]
)
SWEEP_HW_LOADS = (0.0, 0.12, 0.35, 0.65, 0.9)
SWEEP_BATCHES = (64, 128, 256)


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="ImageFolder to use instead of drawn images")
    parser.add_argument("--images", type=int, default=512, help="how many images make one measurement")
    parser.add_argument("--size", type=int, default=256, help="side of the crop")
    parser.add_argument("--threads", type=int, default=decode.default_threads(), help="workers, and cores, of each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sweep", action="store_true", help="also try hw_decoder_load, threads and batch sizes")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if args.threads > len(cores):
        raise UserError(f"--threads {args.threads} with {len(cores)} cores", "a core for each worker")
    os.sched_setaffinity(0, cores[: args.threads])
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or draw_images(Path(folder), args.images)
        index = build_index(Data(source=str(source), kind="imagefolder", limit=args.images))
        measured = measure(contenders(index, str(source), args), args.rounds, len(index))
        drifts = {
            mode: crop_drift(mode, index=index, image_size=args.size, device=args.device) for mode in ("exact", "fast")
        }
        pixels = statistics.median(image_pixels(index))
    result = make_result(
        "decode",
        "How many JPEGs a second become crops?",
        BASELINE,
        [row(name, one.rate, "images/s", **ratio_facts(one, measured[BASELINE])) for name, one in measured.items()],
        args.device,
        threads=args.threads,
        image_size=args.size,
        images=len(index),
        source="drawn" if args.source is None else Path(args.source).name,
        median_megapixels=round(pixels / 1e6, 3),
        mean_kilobytes=round(float(index.sizes.mean()) / 1e3, 1),
        drift=drifts,
    )
    print_table(result)
    for entry in result["rows"]:
        print(
            f"{entry['name']}: {entry['cpu_ms_per_image']} CPU ms an image, {entry['ratio_by_cpu_time']}x by CPU time"
        )
    swept = [entry for entry in result["rows"] if entry["name"].startswith("data.crop=")]
    if swept:
        best = max(swept, key=lambda entry: entry["median"])
        print(f"fastest: {best['name']} ({best['median']:,.0f} images/s); compare with benchmarks/encode.py")
    if args.out:
        write_result(args.out, result)


def contenders(index: ImageIndex, source: str, args: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Name of each contender, and what runs it over all images; each returns how many it made."""
    loader = pil_loader(source, args.size, args.threads, len(index))
    ours = partial(run_pipeline, index, args.size, device=args.device, threads=args.threads, batch_size=BATCH)
    found: dict[str, Callable[[], int]] = {
        BASELINE: lambda: sum(len(images) for images, _ in loader),
        "DALI decode only": partial(run_decode_only, index, args.threads),
        "exact, cropped by PIL": partial(run_with_pil_crops, ours),
        "exact": partial(ours, crop_mode="exact"),
        "fast": partial(ours, crop_mode="fast"),
    }
    if args.sweep:
        for mode, load, threads, batch_size in sweep_settings(args.device, args.threads):
            settings = {"crop_mode": mode, "hw_decoder_load": load, "threads": threads, "batch_size": batch_size}
            found[sweep_name(mode, load, threads, batch_size)] = partial(ours, **settings)
    return found


def sweep_settings(device: str, threads: int) -> list[tuple[str, float, int, int]]:
    """(crop mode, hw_decoder_load, threads, batch) to try; the load means something on a GPU only."""
    loads = SWEEP_HW_LOADS if torch.device(device).type == "cuda" else SWEEP_HW_LOADS[:1]
    settings = [("fast", *rest) for rest in product(loads, sorted({max(1, threads // 2), threads}), SWEEP_BATCHES)]
    return settings + [("exact", loads[0], threads, batch_size) for batch_size in SWEEP_BATCHES]


def sweep_name(mode: str, load: float, threads: int, batch_size: int) -> str:
    """A sweep's row, as the overrides that a build takes."""
    return f"data.crop={mode} data.hw_decoder_load={load} data.threads={threads} data.batch_size={batch_size}"


class Measured(NamedTuple):
    """One contender's rounds: images a second, and CPU milliseconds an image over all its threads and processes."""

    rate: list[float]
    cpu_ms: list[float]


def measure(contenders: dict[str, Callable[[], int]], rounds: int, images: int) -> dict[str, Measured]:
    """Each contender once a round, after one round that is not counted."""
    measured = {name: Measured([], []) for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            start_s, start_cpu_s = time.perf_counter(), cpu_seconds()
            made = run()
            elapsed_s, used_s = time.perf_counter() - start_s, cpu_seconds() - start_cpu_s
            assert made == images, f"{name} made {made} of {images} images"
            if round_number:
                measured[name].rate.append(images / elapsed_s)
                measured[name].cpu_ms.append(1e3 * used_s / images)
    return measured


def cpu_seconds() -> float:
    """User and system time of this process and of its living children."""
    process = psutil.Process()
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def ratio_facts(found: Measured, baseline: Measured) -> dict[str, float]:
    """Medians over the rounds of the ratios to the baseline of the same round, and CPU time an image."""
    pairs = zip(found.rate, baseline.rate, strict=True), zip(baseline.cpu_ms, found.cpu_ms, strict=True)
    by_time, by_cpu = (statistics.median(a / b for a, b in pair) for pair in pairs)
    return {
        "ratio_to_baseline": round(by_time, 3),
        "ratio_by_cpu_time": round(by_cpu, 3),
        "cpu_ms_per_image": round(statistics.median(found.cpu_ms), 3),
    }


def pil_loader(source: str, size: int, workers: int, images: int) -> DataLoader:
    """What the reference does, with workers that persist, which it lacks: decode, crop, uint8 tensors."""

    def to_crop(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(center_crop_pil(image, size))).permute(2, 0, 1).contiguous()

    dataset = torch.utils.data.Subset(ImageFolder(source, transform=to_crop), range(images))
    return DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=True)


def run_pipeline(index: ImageIndex, size: int, **options: object) -> int:
    """Crops of all images."""
    return sum(int(batch.valid_B.sum()) for batch in ImagePipeline(index, None, size, **options))


def run_with_pil_crops(ours: Callable[..., int]) -> int:
    """As on a machine without a C compiler."""
    original = decode.crop_into
    decode.crop_into = crop_into_by_pil
    try:
        return ours(crop_mode="exact")
    finally:
        decode.crop_into = original


def crop_into_by_pil(image_HW3: np.ndarray, plan: decode.CropPlan, out_3SS: np.ndarray) -> None:
    """What `crop_into` does without a compiler."""
    out_3SS[...] = np.asarray(crop_pil(Image.fromarray(image_HW3), plan)).transpose(2, 0, 1)


def run_decode_only(index: ImageIndex, threads: int) -> int:
    """Read, pre-check and decode on the CPU, crop nothing: the floor of everything above."""
    from concurrent.futures import ThreadPoolExecutor

    decoder = decode.DaliDecoder(BATCH, threads)
    feeder = Feeder(index, np.arange(len(index)), BATCH, 1, pinned=False)
    made = 0
    with ThreadPoolExecutor(8) as io:
        for part in feeder.parts(io):
            decoder.submit([part.job.encoded[r] for r in part.rows])
            made += len(decoder.result())
    return made


def image_pixels(index: ImageIndex) -> Iterator[int]:
    """Pixels of each image."""
    from rae_fast.images.precheck import pixels_for_dali

    return (pixels_for_dali(index.read(i)) for i in range(len(index)))


def draw_images(folder: Path, count: int) -> Path:
    """JPEGs whose spectrum falls off as that of photographs does (amplitude ~ 1/f), in ImageNet's sizes."""
    random = np.random.default_rng(0)
    (folder / "drawn").mkdir()
    distinct = min(count, 2 * len(SIZES))
    for number in range(count):
        path = folder / "drawn" / f"{number:05d}.JPEG"
        if number < distinct:
            Image.fromarray(draw_photo(*SIZES[number % len(SIZES)], random)).save(path, quality=88)
        else:  # the bytes differ by a comment, so that nothing can be remembered
            original = (folder / "drawn" / f"{number % distinct:05d}.JPEG").read_bytes()
            comment = f"{number:08d}".encode()
            path.write_bytes(
                original[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + original[2:]
            )
    return folder


def draw_photo(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Noise filtered to amplitude 1/f^1.2, colour channels correlated: uint8 [H, W, 3]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(random.standard_normal((3, height, width))) / frequency**1.2
    planes = np.fft.irfft2(spectrum, s=(height, width))
    planes /= planes.std((1, 2), keepdims=True)
    mixed = np.stack([planes[0], planes[0] + 0.35 * planes[1], planes[0] + 0.35 * planes[2]], axis=-1)
    return np.clip(mixed * 55 + 118, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    exit_cleanly(main)
