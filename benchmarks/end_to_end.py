"""Is a latent cache worth it? Whole epochs from JPEG files on, three ways in turn, the cache's build included.

    python benchmarks/end_to_end.py                                 # scaled models, this CPU
    python benchmarks/end_to_end.py --device cuda --images 16384    # the released models and a DINOv2-B, on a GPU

    reference   PIL in DataLoader workers, encoder in every step, DDP, EMA by parameter (benchmarks/reference_way.py)
    online      rae_fast with loader.source=online: DALI, encoder in every step
    cached      rae_fast: tools/build_cache.py's store of both views (statistics computed too), then training from it

Every way runs in a process of its own, in turn, round after round, over the same JPEG files with the same model. Its
blocks are compiled, as the reference's README advises and all our recipes have it (not on a CPU without a C++
compiler). Time counts from when the models are built and have made a first step, with no batch prepared, the cache's
build added; memory is the peak of the whole process tree; CPU time too. On a CPU each way has the OpenMP threads that
suit it. Beside decoding, threads wait for each other: with one for each core the reference's way lost a third with both
models, ours online a fifth with the S-like one. So these three have one, all else one for each core.

Images are of ImageNet's sizes and cropped to 256 px, so decoding costs what it costs. On a CPU the models are scaled,
by two rules that favour no way: encoder and DiT shrink together, so that encoding is the share of training in FLOPs
that it is of the released sizes (16 % of DiTDH-S, 5 % of DiTDH-XL); and how far they shrink was set by an uncompiled
step in batches of 128 on the cores of an EPYC, four times what it is to take of an H200 (2.1 and 7.3 ms of a core for
0.53 and 1.8 ms), since there four DataLoader workers, the reference's default, decode beside each GPU. The sizes have
stayed; compiled, in larger batches (so that the time of calling operations, which a GPU hides, weighs less) or on
another core the step takes less: `core_ms_cached` in the summary says what it came to, `core_ms_reference` what the
reference's way does. With a step of x ms in its place the ratio would be 1 + (core_ms_reference - core_ms_cached) / x.
Two cores at work in the same memory need more than the `train` of `split_ms_reference`, one alone. Two things stay
different from a GPU: here decoding, encoding and training share the cores and add up, where beside a GPU the slowest
sets the pace; and the encoder's resize from 256 px weighs more. As they add up, no cache can gain more than
`cached_at_most` of the summary, which follows from `split_ms_reference`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from decode import draw_images
from reference_way import ReferenceTrainer
from results_file import RESULTS, make_result, print_table, row, write_result

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.geometry import resolve_geometry
from rae_fast.images.decode import ImagePipeline, default_threads
from rae_fast.images.index import build_index
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.writer import build_cache
from rae_fast.planner.host import encoder_flops
from rae_fast.planner.roofline import from_config, training_flops
from rae_fast.runtime import Ranks, pick_device
from rae_fast.training.batching import plan_batches
from rae_fast.training.dit_setup import open_training_data
from rae_fast.training.dit_trainer import DiTRun
from rae_fast.training.stall import Heartbeat

WAYS = ("reference", "online", "cached")
CLASSES = 8
# Released DiTDH-S and -XL, and some sixteenth of their widths with half of the depths and 16 tokens for 256.
MODELS = {
    "cpu": {"S-like": ([24, 128], [6, 1], [2, 8]), "XL-like": ([84, 128], [14, 1], [7, 8])},
    "cuda": {"DiTDH-S": ([384, 2048], [12, 2], [6, 16]), "DiTDH-XL": ([1152, 2048], [28, 2], [16, 16])},
}
ENCODERS = {
    "cpu": {"hidden_size": 32, "num_hidden_layers": 10, "num_attention_heads": 4, "image_size": 56},
    "cuda": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224},
}
CPU_THREADS = {
    "S-like": {"reference": 1, "online": 1, "cached": default_threads()},
    "XL-like": {"reference": 1, "online": default_threads(), "cached": default_threads()},
}
SPLIT_BATCHES = 4
SAMPLE_S = 0.5  # between looks at the memory, each of which reads all of /proc


def main() -> None:
    """Parse the command line; as a worker run one way, else all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--images", type=int, default=1024, help="of an epoch")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3, help="trained by each way; all but the first are steady")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", help="some of the models, comma-separated")
    parser.add_argument("--workers", type=int, default=default_threads(), help="decoding processes, or threads")
    parser.add_argument("--out", type=Path, help="result JSON; a plot lies beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(run_way(json.loads(args.worker))))
        return
    if args.images < 2 * args.batch or args.epochs < 2:
        raise UserError(f"--images {args.images} --epochs {args.epochs}", "two batches and two epochs at least")
    names = args.models.split(",") if args.models else list(MODELS[args.device])
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
        prepare(Path(folder), args)
        found = {name: compare(name, Path(folder), args) for name in names}
        result = report(found, Path(folder), args)
    print_table(result)
    for name in names:
        print(f"{name}: {result['summary'][name]}")
    out = args.out or RESULTS / f"end_to_end-{args.device}.json"
    write_result(out, result)
    plot(found, args, out.with_suffix(".png"))


# --- setting up -----------------------------------------------------------------------------------------------------


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """JPEG files, an encoder with random weights, and statistics of its latents."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    (folder / "images").mkdir()
    draw_images(folder / "images", args.images)
    torch.manual_seed(0)
    numbers = {**ENCODERS[args.device], "patch_size": 14, "num_register_tokens": 4}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**numbers)).save_pretrained(folder / "encoder")
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "encoder/preprocessor_config.json").write_text(json.dumps(statistics))
    torch.save({"mean": torch.zeros(1), "var": torch.ones(1)}, folder / "stat.pt")
    config = make_config(folder, next(iter(MODELS[args.device])), args.device, vars_of(args))
    index, size = build_index(config.data), resolve_geometry(config).image_size
    images = next(iter(ImagePipeline(index, np.arange(args.batch), size, batch_size=args.batch))).images_B3SS
    z = LatentEncoder(config.stage_1.params, "fp32", torch.device("cpu"))(images[:32])
    torch.save({"mean": z.mean(0), "var": z.var(0)}, folder / "stat.pt")


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a worker has to know."""
    return {key: getattr(args, key) for key in ("device", "batch", "epochs", "workers", "images")}


def make_config(folder: Path, model: str, device: str, settings: dict[str, Any], *overrides: str) -> Config:
    """The configuration that all ways share."""
    width, depth, heads = MODELS[device][model]
    side = ENCODERS[device]["image_size"]
    return load_config(
        None,
        [
            f"stage_1.params.encoder_params.dinov2_path={folder / 'encoder'}",
            f"stage_1.params.encoder_input_size={side}",
            f"stage_1.params.decoder_patch_size={256 * 14 // side}",
            "stage_2.target=DiTDH",
            f"stage_2.params.hidden_size={width}",
            f"stage_2.params.depth={depth}",
            f"stage_2.params.num_heads={heads}",
            f"misc.num_classes={CLASSES}",
            "transport.params.time_dist_type=logit-normal_0_1",
            f"data.source={folder / 'images'}",
            "data.kind=imagefolder",
            f"data.threads={settings['workers']}",
            f"cache.statistics={folder / 'stat.pt'}",
            f"cache.precision={'bf16' if device == 'cuda' else 'fp32'}",
            f"training.global_batch_size={settings['batch']}",
            f"training.epochs={settings['epochs']}",
            "training.sample_every=null",
            "training.checkpoint_interval=null",
            "runtime.engine=ddp",
            f"runtime.device={device}",
            f"runtime.precision={'bf16' if device == 'cuda' else 'fp32'}",
            f"runtime.compile={str(can_compile(device)).lower()}",
            *overrides,
        ],
    )


def can_compile(device: str) -> bool:
    """Whether torch.compile finds what it needs."""
    return device == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


# --- one way, in a process of its own -------------------------------------------------------------------------------


def run_way(job: dict[str, Any]) -> dict[str, Any]:
    """Train one way; the time of each epoch's end, and what it took."""
    device = pick_device(job["device"])
    with tempfile.TemporaryDirectory(dir=job["folder"]) as scratch:
        meter = Meter()
        run = run_reference if job["way"] == "reference" else run_ours
        with meter:
            facts = run(job, device, Path(scratch), meter)
    return {
        **facts,
        "marks": meter.marks,
        "cpu_s": meter.cpu_s,
        "steady_cpu_s": meter.steady_cpu_s,
        "peak_bytes": meter.peak_bytes,
    }


class Meter:
    """Wall clock, CPU time and peak memory of this process tree from `start` to the last mark."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float]] = []
        self.cpu_s = self._first_cpu_s = self.peak_bytes = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def start(self) -> None:
        """Time counts from here."""
        self._started_s, self._started_cpu_s = time.perf_counter(), tree_cpu_s()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens in this block does not count."""
        started_s, started_cpu_s = time.perf_counter(), tree_cpu_s()
        yield
        self._started_s += time.perf_counter() - started_s
        self._started_cpu_s += tree_cpu_s() - started_cpu_s

    def mark(self, images: int, device: torch.device) -> None:
        """So many images have been trained on."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.marks.append((images, self.elapsed_s))
        self.cpu_s = tree_cpu_s() - self._started_cpu_s
        self._first_cpu_s = self.cpu_s if len(self.marks) == 1 else self._first_cpu_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since `start`, without what was left out."""
        return time.perf_counter() - self._started_s

    @property
    def steady_cpu_s(self) -> float:
        """CPU seconds of all epochs but the first."""
        return self.cpu_s - self._first_cpu_s

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stopping.wait(SAMPLE_S):
            total = 0
            for member in (process, *process.children(recursive=True)):
                try:
                    # Pages that forked workers share with their parent count once.
                    total += member.memory_info().rss - (member.memory_info().shared if member != process else 0)
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def tree_cpu_s() -> float:
    """CPU seconds of this process, its living children, and those that ended."""
    process = psutil.Process()
    own = process.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def run_reference(job: dict[str, Any], device: torch.device, scratch: Path, meter: Meter) -> dict[str, Any]:
    """The reference's way."""
    config = make_config(Path(job["folder"]), job["model"], job["device"], job)
    precision = "tf32" if device.type == "cuda" else "fp32"
    geometry, compiled = resolve_geometry(config), config.runtime.compile
    trainer = ReferenceTrainer(config, geometry, device, job["workers"], precision, compiled)
    trainer.train(1)
    trainer.restart_loader()
    meter.start()
    seen = 0
    for _ in range(job["epochs"]):
        seen += trainer.train(trainer.steps_per_epoch)
        meter.mark(seen, device)
    return {"build_s": 0.0, "split_ms": trainer.split_ms(SPLIT_BATCHES) if job["split"] else {}}


def run_ours(job: dict[str, Any], device: torch.device, scratch: Path, meter: Meter) -> dict[str, Any]:
    """rae_fast, online or from a store that it builds first."""
    overrides = [f"loader.source={job['way']}", f"logging.run_folder={scratch / 'run'}"]
    if job["way"] == "cached":
        overrides += [f"cache.path={scratch / 'store'}", "cache.statistics=compute"]
    config = make_config(Path(job["folder"]), job["model"], job["device"], job, *overrides)
    LatentEncoder(config.stage_1.params, "fp32", torch.device("cpu"))  # its libraries are loaded before time counts
    meter.start()
    build_s = 0.0
    if job["way"] == "cached":
        build_cache(config)
        build_s = meter.elapsed_s
    ranks = Ranks()
    batches = plan_batches(config.training, ranks)
    with Heartbeat(scratch, ranks, 1e6) as heartbeat, ExitStack() as stack:
        with meter.left_out():
            data = open_training_data(config, batches, ranks, device)
            run = DiTRun(config, data, batches, ranks, device, scratch)
            stack.callback(run.close)
            run.settle()
            run.one_step(heartbeat)
            run.stream.close()  # what was prepared meanwhile
        seen = 0
        for _ in range(job["epochs"]):
            for _ in range(run.steps_per_epoch):
                run.one_step(heartbeat)
                seen += batches.global_batch
            meter.mark(seen, device)
    return {"build_s": build_s, "split_ms": {}}


# --- all ways -------------------------------------------------------------------------------------------------------


def compare(model: str, folder: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every way in turn, round after round."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS:
            job = {**vars_of(args), "way": way, "model": model, "folder": str(folder), "split": number == 0}
            command = [sys.executable, __file__, "--worker", json.dumps(job)]
            threads = {"OMP_NUM_THREADS": str(CPU_THREADS[model][way])} if args.device == "cpu" else {}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
            if done.returncode:
                raise UserError(f"{model}, {way}: {done.stderr.strip().splitlines()[-1:]}", "a run without an error")
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{model}, round {number + 1}, {way}: {steady_rate(found[way][-1]):.1f} images/s", flush=True)
    return found


def steady_rate(run: dict[str, Any]) -> float:
    """Images a second over all epochs but the first."""
    (first, first_s), (last, last_s) = run["marks"][0], run["marks"][-1]
    return (last - first) / (last_s - first_s)


def break_even(reference: dict[str, Any], cached: dict[str, Any], images: int) -> float:
    """Epochs after which building and training took as long as the reference's way; infinite if never."""
    saved_s = images / steady_rate(reference) - images / steady_rate(cached)
    return cached["build_s"] / saved_s if saved_s > 0 else float("inf")


def bound(split_ms: dict[str, float], workers: int) -> float:
    """The largest ratio that a cache can give on a CPU, where all parts share the cores: all of them over training."""
    return round(1 + (workers * split_ms["decode"] + split_ms["encode"]) / split_ms["train"], 2)


def core_ms(runs: list[dict[str, Any]]) -> float:
    """Milliseconds of a core for an image, with all cores at work; median over rounds."""
    return round(float(np.median([1e3 * default_threads() / steady_rate(run) for run in runs])), 3)


def cpu_ratio(reference: list[dict[str, Any]], runs: list[dict[str, Any]]) -> float:
    """CPU seconds of the reference's way over those of another, the build left out; median over rounds."""
    pairs = zip(reference, runs, strict=True)
    return float(np.median([a["steady_cpu_s"] / max(b["steady_cpu_s"], 1e-9) for a, b in pairs]))


def report(found: dict[str, dict[str, list[dict[str, Any]]]], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The common form; ratios are medians over rounds of ratios within a round."""
    rows, summary, flops, split = [], {}, {}, {}
    for model, ways in found.items():
        for way, runs in ways.items():
            rates = [steady_rate(run) for run in runs]
            ratios = [rate / steady_rate(other) for rate, other in zip(rates, ways["reference"], strict=True)]
            images = runs[0]["marks"][-1][0]
            rows.append(
                row(
                    f"{model}, {way}",
                    rates,
                    "images/s",
                    ratio_to_reference=round(float(np.median(ratios)), 3),
                    first_epoch_s=round(float(np.median([run["marks"][0][1] for run in runs])), 2),
                    build_s=round(float(np.median([run["build_s"] for run in runs])), 2),
                    ratio_by_cpu_time=round(cpu_ratio(ways["reference"], runs), 3),
                    cpu_s_per_1000=round(float(np.median([1e3 * run["cpu_s"] / images for run in runs])), 3),
                    peak_mb=round(float(np.median([run["peak_bytes"] for run in runs])) / 1e6),
                )
            )
        pairs = list(zip(ways["reference"], ways["cached"], strict=True))
        epochs = float(np.median([break_even(a, b, args.images) for a, b in pairs]))
        summary[model] = {
            "cached_over_reference": rows[-1]["ratio_to_reference"],
            "cached_over_online": round(rows[-1]["median"] / rows[-2]["median"], 3),
            "break_even_epoch": round(epochs, 3) if np.isfinite(epochs) else None,
        }
        if args.device == "cpu":
            summary[model]["cached_at_most"] = bound(ways["reference"][0]["split_ms"], args.workers)
            summary[model]["core_ms_cached"] = core_ms(ways["cached"])
            summary[model]["core_ms_reference"] = core_ms(ways["reference"])
        config = make_config(folder, model, args.device, vars_of(args))
        split[model] = ways["reference"][0]["split_ms"]
        flops[model] = {
            "encode": encoder_flops(config, resolve_geometry(config), ENCODERS[args.device]["num_hidden_layers"]),
            "train": training_flops(from_config(config)),
        }
    return make_result(
        "end_to_end",
        "How many images/s does each way train on, and when has a cache paid for itself?",
        rows[0]["name"],
        rows,
        args.device,
        **{key: value for key, value in vars_of(args).items() if key != "device"},
        compiled=can_compile(args.device),
        summary=summary,
        split_ms_reference=split,
        flops=flops,
    )


def plot(found: dict[str, dict[str, list[dict[str, Any]]]], args: argparse.Namespace, path: Path) -> None:
    """Images trained on against time, the build included."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.6), squeeze=False)
    for axis, (model, ways) in zip(axes[0], found.items(), strict=True):
        for way, runs in ways.items():
            start = float(np.median([run["build_s"] for run in runs]))
            seconds = [start, *np.median([[s for _, s in run["marks"]] for run in runs], axis=0)]
            axis.plot(seconds, [0, *(n for n, _ in runs[0]["marks"])], marker=".", label=way)
        axis.set(title=model, xlabel="seconds, the cache's build included", ylabel="images trained on")
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    exit_cleanly(main)
