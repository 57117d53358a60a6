"""How fast do random batches of latents come out of the store, against numpy's memmap and other formats?

    python benchmarks/store.py --out benchmarks/results/store.json
    python benchmarks/store.py --folder /mnt/nvme --images 20000 --what cold

Latents [768, 16, 16] in float16 (384 KiB each), random batches of 256, every contender over the same samples in turn in
every round. Three questions: warm (in the page cache, one core; baseline numpy.take from a memmap into a reused buffer,
as one writes it; the row with mode="clip" is the fastest that numpy can do, since it alone copies once), cold (evicted
before each run, opened before its clock starts, all cores; baseline a bare loop of O_DIRECT reads in 16 Python threads,
which checks nothing), and beside a busy Python thread (each contender against itself when idle; all in a process whose
threads ask for the GIL after half a millisecond, as LatentLoader sets it). Our readers verify every sample's CRC-32C
where the name says so. CPU time is that of the whole process: on a machine that others use, it is the figure to
trust. The MDS row needs mosaicml-streaming, which wants older libraries than ours: give it a virtual environment of its
own.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from results_file import make_result, print_table, row, write_result
from safetensors import safe_open
from safetensors.torch import save_file

from rae_fast.config_file import load_config
from rae_fast.errors import exit_cleanly
from rae_fast.latents.imports import import_latents
from rae_fast.latents.loader import LatentLoader
from rae_fast.latents.native_reader import NativeReader, aligned_empty
from rae_fast.latents.reader import open_reader
from rae_fast.latents.store import LatentStore, open_store

SHAPE = (768, 16, 16)
ROW_BYTES = 768 * 16 * 16 * 2
BATCH, SHARD = 256, 512
WARM_BASELINE, COLD_BASELINE = "numpy memmap, reused buffer", "bare O_DIRECT loop, 16 threads"
# (question, row): at least this share of the baseline's rate, and at most these CPU seconds for 1000 samples.
TARGETS = {
    ("warm", "native buffered, verified"): (0.85, None),
    ("warm", "native mapped, verified"): (1.4, None),
    ("cold", "native direct, verified"): (0.9, 0.05),
}
BUSY_TARGET = 0.7  # of the same reader's rate when idle
LOADER = "LatentLoader to float32"
Gather = Callable[[np.ndarray, np.ndarray], object]  # (rows, out): copies rows into out


class Data(NamedTuple):
    """The same latents in every format."""

    folder: Path
    npy: Path
    store: Path
    safetensors: list[Path]
    mds: Path | None


class Measured(NamedTuple):
    """Samples a second, and CPU seconds for 1000 samples, round by round."""

    rate: list[float]
    cpu_s: list[float]


def main() -> None:
    """Parse the command line, make the data, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the data are made (and removed); None: a temporary folder")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=4, help="batches of one measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--what", default="warm,cold,busy", help="some of warm, cold, busy")
    parser.add_argument("--out", type=Path, help="write the result here as JSON; one file a question")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="store-benchmark-", dir=args.folder))
    try:
        data = make_data(folder, args.images)
        for what in args.what.split(","):
            result = QUESTIONS[what](data, args)
            print_table(result)
            for entry in result["rows"]:
                print(f"{entry['name']}: {entry['cpu_s_per_1000']} CPU s per 1000 samples{verdict(what, entry)}")
            if args.out:
                write_result(args.out.with_stem(f"{args.out.stem}-{what}"), result)
    finally:
        shutil.rmtree(folder)


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(folder: Path, images: int) -> Data:
    """Write the latents in every format; noise of unit variance, which no file system can compress."""
    random = np.random.default_rng(0)
    npy = folder / "npy" / "latents.npy"
    npy.parent.mkdir()
    array = np.lib.format.open_memmap(npy, "w+", np.float16, (images, *SHAPE))
    files = []
    for first in range(0, images, SHARD):
        part = random.standard_normal((min(SHARD, images - first), *SHAPE), np.float32).astype(np.float16)
        array[first : first + len(part)] = part
        files.append(folder / f"{first:08d}.safetensors")
        save_file({"latents": torch.from_numpy(part)}, files[-1])
    array.flush()
    del array
    settings = ("cache.statistics=none", f"cache.shard_size={SHARD}", f"cache.path={folder / 'store'}")
    import_latents(npy.parent, load_config(None, settings))
    return Data(folder, npy, folder / "store", files, _make_mds(folder / "mds", npy))


def _make_mds(folder: Path, npy: Path) -> Path | None:
    try:
        from streaming import MDSWriter
    except ImportError:
        print("MDS is left out: mosaicml-streaming is not installed")
        return None
    with MDSWriter(out=str(folder), columns={"latent": "bytes"}, size_limit=1 << 28) as writer:
        for latent in np.load(npy, mmap_mode="r"):
            writer.write({"latent": latent.tobytes()})
    return folder


# --- contenders -----------------------------------------------------------------------------------------------------


def gather_with(reader: Any, store: LatentStore) -> Gather:
    """One of our readers."""
    plane = store.planes["original"]
    return lambda rows, out: reader.gather(rows, [plane], np.zeros_like(rows), out, None)


def native(data: Data, mode: str, *, verify: bool = True, threads: int | None = None) -> Gather:
    """The native reader in one of its modes."""
    store = open_store(data.store)
    return gather_with(NativeReader(store, verify, mode, threads), store)


def portable(data: Data, kind: str) -> Gather:
    """One of the other readers, verified."""
    store = open_store(data.store)
    return gather_with(open_reader(store, kind), store)


def memmap(data: Data, mode: str = "raise") -> Gather:
    """numpy's own; but for mode "clip", it copies by way of a buffer of its own."""
    array = np.load(data.npy, mmap_mode="r")
    return lambda rows, out: np.take(array, rows, axis=0, out=out, mode=mode)


def safetensors(data: Data) -> Gather:
    """Slices of files that stay open."""
    slices = [safe_open(file, framework="numpy").get_slice("latents") for file in data.safetensors]

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        for i, at in enumerate(rows.tolist()):
            out[i] = slices[at // SHARD][at % SHARD]

    return gather


def mds(data: Data) -> Gather:
    """mosaicml-streaming's local data set."""
    from streaming import LocalDataset

    dataset = LocalDataset(str(data.mds))

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        for i, at in enumerate(rows.tolist()):
            out[i] = np.frombuffer(dataset[at]["latent"], np.float16).reshape(SHAPE)

    return gather


def bare_direct(data: Data) -> Gather:
    """The least that reading past the page cache can be: preadv in 16 threads, no index, no checksum."""
    shards = sorted((data.store / "latents/original/c").glob("*/0/0/0"), key=lambda file: int(file.parts[-4]))
    files = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in shards]
    pool = ThreadPoolExecutor(16)

    def read(at: int, into: memoryview) -> None:
        assert os.preadv(files[at // SHARD], [into], at % SHARD * ROW_BYTES) == ROW_BYTES

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        flat = out.view(np.uint8).reshape(len(rows), -1)
        list(pool.map(read, rows.tolist(), map(memoryview, flat)))

    return gather


class WholeLoader:
    """The training loader, decoding to float32 on the CPU: order, thread, hand-over and all.

    Its thread runs only while it is measured, and what it had ready before is taken out first.
    """

    def __init__(self, data: Data) -> None:
        self.loader = LatentLoader(open_store(data.store), batch_size=BATCH)

    def begin(self) -> WholeLoader:
        """Bring it into the state in which each batch has to be waited for."""
        for _ in range(self.loader.prefetch + 1):
            next(self.loader)
        return self

    def __call__(self, rows: np.ndarray, out: np.ndarray) -> None:
        next(self.loader)

    def stop(self) -> None:
        """End its thread."""
        self.loader.close()


# --- questions ------------------------------------------------------------------------------------------------------


def ask_warm(data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """One core, everything in the page cache."""
    makers: dict[str, Callable[[], Gather]] = {
        WARM_BASELINE: partial(memmap, data),
        'numpy memmap, reused buffer, mode="clip"': partial(memmap, data, "clip"),
        "native mapped, verified": partial(native, data, "mapped", threads=1),
        "native mapped": partial(native, data, "mapped", verify=False, threads=1),
        "native buffered, verified": partial(native, data, "buffered", threads=1),
        "buffered in Python, verified": partial(portable, data, "buffered"),
        "tensorstore, verified": partial(portable, data, "tensorstore"),
        "zarr-python, verified": partial(portable, data, "zarr"),
        "safetensors": partial(safetensors, data),
    }
    if data.mds:
        makers["MDS"] = partial(mds, data)
    with cores(1):
        measured = measure({**kept(makers), LOADER: WholeLoader(data).begin}, data, args)
    return report("store-warm", "How many samples a second from the page cache, on one core?", WARM_BASELINE, measured)


def ask_cold(data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """All cores, nothing in the page cache."""
    makers: dict[str, Callable[[], Gather]] = {
        COLD_BASELINE: partial(bare_direct, data),
        "native direct, verified": partial(native, data, "direct"),
        "native buffered, verified": partial(native, data, "buffered", threads=16),
        "native mapped, verified": partial(native, data, "mapped", threads=16),
        "tensorstore, verified": partial(portable, data, "tensorstore"),
        "zarr-python, verified": partial(portable, data, "zarr"),
        "safetensors": partial(safetensors, data),
        "numpy memmap": partial(memmap, data),
    }
    if data.mds:
        makers["MDS"] = partial(mds, data)
    measured = measure(makers, data, args, lambda: evict(data.folder), batches=1)
    return report("store-cold", "How many samples a second from the disk?", COLD_BASELINE, measured)


def ask_busy(data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Each contender idle and beside a thread that runs Python without pause."""
    makers: dict[str, Callable[[], Gather]] = {
        "native mapped, verified": partial(native, data, "mapped", threads=1),
        "native direct, verified": partial(native, data, "direct"),
        WARM_BASELINE: partial(memmap, data),
        "buffered in Python, verified": partial(portable, data, "buffered"),
        "tensorstore, verified": partial(portable, data, "tensorstore"),
    }
    made = {**kept(makers), LOADER: WholeLoader(data).begin}
    idle = measure(made, data, args)
    with busy_thread():
        busy = measure(made, data, args)
    measured = {f"{name}, {state}": found[name] for name in made for state, found in (("idle", idle), ("busy", busy))}
    for name in made:
        ratio = statistics.median(busy[name].rate) / statistics.median(idle[name].rate)
        judged = "native" in name or name == LOADER
        said = ("", " (missed)", " (met)")[judged * (1 + (ratio >= BUSY_TARGET))]
        print(f"{name}: {ratio:.2f} of idle beside a busy thread{said}")
    baseline = "native mapped, verified, idle"
    return report("store-busy", "What is left beside a busy Python thread?", baseline, measured)


QUESTIONS = {"warm": ask_warm, "cold": ask_cold, "busy": ask_busy}


def kept(makers: dict[str, Callable[[], Gather]]) -> dict[str, Callable[[], Gather]]:
    """The same contenders for all rounds, made now."""
    gathers = {name: make() for name, make in makers.items()}
    return {name: (lambda gather=gather: gather) for name, gather in gathers.items()}


def measure(
    makers: dict[str, Callable[[], Gather]],
    data: Data,
    args: argparse.Namespace,
    before: Callable[[], None] = lambda: None,
    batches: int | None = None,
) -> dict[str, Measured]:
    """Each contender once a round over the same random batches, after one round that is not counted.

    It is made before its clock starts and dropped behind its run: pages that somebody maps cannot be evicted.
    """
    measured = {name: Measured([], []) for name in makers}
    out = aligned_empty((BATCH, *SHAPE), np.float16)
    random = np.random.default_rng(1)
    for round_number in range(args.rounds + 1):
        rows = [random.permutation(args.images)[:BATCH] for _ in range(batches or args.batches)]
        for name, make in makers.items():
            gc.collect()
            before()
            gather = make()
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            for batch in rows:
                gather(batch, out)
            elapsed_s, used_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
            if isinstance(gather, WholeLoader):
                gather.stop()
            del gather
            if round_number:
                count = BATCH * len(rows)
                measured[name].rate.append(count / elapsed_s)
                measured[name].cpu_s.append(1000 * used_s / count)
    return measured


def verdict(what: str, entry: dict[str, Any]) -> str:
    """Whether a row meets its target, if it has one."""
    share, cpu_s = TARGETS.get((what, entry["name"]), (None, None))
    if share is None:
        return ""
    met = entry["ratio"] >= share and (cpu_s is None or entry["cpu_s_per_1000"] <= cpu_s)
    limit = "" if cpu_s is None else f" at no more than {cpu_s} CPU s"
    return f"; target {share} of the baseline{limit}: {'met' if met else 'missed'} ({entry['ratio']})"


def report(benchmark: str, question: str, baseline: str, measured: dict[str, Measured]) -> dict[str, Any]:
    """The common form; ratios are medians over the rounds of ratios within a round."""
    rows = []
    for name, found in measured.items():
        pairs = zip(found.rate, measured[baseline].rate, strict=True)
        cpu_pairs = zip(measured[baseline].cpu_s, found.cpu_s, strict=True)
        rows.append(
            row(
                name,
                found.rate,
                "samples/s",
                ratio=round(statistics.median(a / b for a, b in pairs), 3),
                cpu_s_per_1000=round(statistics.median(found.cpu_s), 4),
                ratio_by_cpu_time=round(statistics.median(a / max(b, 1e-9) for a, b in cpu_pairs), 3),
            )
        )
    return make_result(benchmark, question, baseline, rows, batch=BATCH, sample_bytes=ROW_BYTES)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """This process, and the threads that it starts meanwhile, on `count` cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def busy_thread() -> Iterator[None]:
    """A thread that holds the GIL whenever it can."""
    stop = threading.Event()

    def spin() -> None:
        number = 0
        while not stop.is_set():
            for _ in range(10_000):
                number = (number * 31 + 7) % 1_000_003

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def evict(folder: Path) -> None:
    """Drop all files below a folder from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


if __name__ == "__main__":
    exit_cleanly(main)
