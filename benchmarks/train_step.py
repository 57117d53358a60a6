"""How many images/s does a training step reach, what share of the chip is that, and where does the step's time go?

    python benchmarks/train_step.py --out benchmarks/results/train_step.json
    python benchmarks/train_step.py --model DiTDH-S --batch 512 --store stores/imagenet
    deepspeed benchmarks/train_step.py --engine deepspeed ddp --kernels triton
    python benchmarks/train_step.py --model tiny --batch 16             # seconds on a CPU

The baseline is the reference's way of stepping with the same model in plain PyTorch: its encoder runs in every step
(--no-encoder leaves it out), noise, times and label drops come from torch's generators, the EMA is a loop over
parameters, and the loss is read on the host. It runs in its recommended float32 with TF32 and in bfloat16, compiled as
a whole; the first one again at the end, to show what the device's clocks did meanwhile. Where a variant does not fit
it is tried with half the batch, which its row says. Latents are synthetic and lie on the device; --store adds real
ones. Times of phases are the device's on a GPU, except `data wait`, which is the host's; communication is measured
where several GPUs take part.

Runs with torch, numpy and transformers alone (PYTHONPATH=.:kernels): without DeepSpeed it takes DDP, without the
store's packages synthetic latents, without transformers no encoder, and says so.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import torch
from results_file import make_result, print_table, row, write_result
from stopwatch import ON_HOST, Stopwatch, milliseconds_between
from torch import Tensor, nn

from rae_fast import rng
from rae_fast.config import Config, Optimizer, Runtime, TransportParams, TransportSection
from rae_fast.dit.fused import use_kernels
from rae_fast.dit.registry import build_dit, size_presets
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.planner.roofline import from_params, from_preset, training_flops
from rae_fast.rng import Stream
from rae_fast.runtime import Ranks, init_distributed, pick_device, ranks_from_environment, set_precision
from rae_fast.training.engine import Engine, wrap_ddp
from rae_fast.training.monitor import peak_flops
from rae_fast.training.pairs import PairMaker

TINY = {"hidden_size": [64, 64], "depth": [2, 1], "num_heads": [4, 4]}
CLASSES = 1000
POOL = 4  # synthetic micro-batches that take turns
SEED, EMA_DECAY, CLIP = 0, 0.9995, 1.0
PATCH = 14  # of the reference's DINOv2 encoders
REFERENCE = "reference's way, TF32"
PHASES = (ON_HOST, "forward", "backward", "norm and guard", "optimizer", "EMA", "whole update")


@dataclass(frozen=True)
class Batch:
    """What the loader gives: latents [B, C, H, W], labels [B], indices [B]."""

    latents_BCHW: Tensor
    labels_B: Tensor
    index_B: Tensor
    epoch: int = 0


@dataclass(frozen=True)
class Job:
    """What is measured, and where."""

    args: argparse.Namespace
    ranks: Ranks
    device: torch.device
    config: Config
    latent_shape: tuple[int, int, int]

    @property
    def accumulation(self) -> int:
        """Micro-steps of a step."""
        return self.args.accumulation

    def build_model(self, kernels: str) -> nn.Module:
        """The model at its seeded initialization, on the device."""
        params = {"input_size": self.latent_shape[1], "in_channels": self.latent_shape[0], "num_classes": CLASSES}
        torch.manual_seed(SEED)
        target, sizes = ("DiTDH", TINY) if self.args.model == "tiny" else (self.args.model, {})
        with self.device:
            model = build_dit(target, {**sizes, **params})
        use_kernels(model, kernels)
        return model

    def flops(self) -> float:
        """Model FLOPs of training on one image."""
        channels, side, _ = self.latent_shape
        if self.args.model == "tiny":
            return training_flops(from_params("DiTDH", {**TINY, "input_size": side, "in_channels": channels}))
        return training_flops(from_preset(self.args.model, side * side, channels))


Step = Callable[[], None]


def our_step(job: Job, watch: Stopwatch, batches: Iterator[Batch], setting: Setting) -> tuple[Step, Engine]:
    """A step as `training.dit_trainer` makes it, but for logging."""
    runtime = Runtime(precision=job.args.precision, engine=setting.engine, compile=setting.compiled)
    pairs = PairMaker(replace(job.config, runtime=replace(runtime, kernels=setting.kernels)), job.latent_shape)
    engine = Engine(
        job.build_model(setting.kernels).train(),
        optimizer=Optimizer(),
        lr=lambda step: 2e-4,
        ranks=job.ranks,
        device=job.device,
        runtime=runtime,
        deepspeed={"zero_optimization": {"stage": job.args.zero}},
        accumulation=job.accumulation,
        micro_batch=setting.batch,
        clip_grad=CLIP,
        ema_decays=[EMA_DECAY],
    )
    watch.wrap(engine, "_guard_and_clip", "norm and guard")
    watch.wrap(engine.optimizer, "step", "optimizer")
    watch.wrap(engine.ema, "update", "EMA")

    def step() -> None:
        for _ in range(job.accumulation):
            with watch(ON_HOST):
                batch = next(batches)
            with watch("forward"):
                drop_B = rng.uniform(SEED, batch.epoch, batch.index_B, Stream.LABEL_DROP)
                loss_B, _ = pairs.loss(partial(predict, engine, batch.labels_B, drop_B), batch, SEED)
                loss = loss_B.mean()
            with watch("backward"):
                engine.backward(loss)
            with watch("whole update"):
                engine.step()

    return step, engine


def predict(model: Any, labels_B: Tensor, drop_B: Tensor | None, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The model as the objective calls it; without `drop_B` it draws label drops itself."""
    return model(x_BCHW, t_B, labels_B, labeldrop_u=drop_B)


def reference_step(job: Job, watch: Stopwatch, batches: Iterator[Batch], setting: Setting) -> Step:
    """A step as the reference's train.py makes it, with gradients that accumulate."""
    set_precision(setting.precision)
    model = job.build_model("torch").train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
    if setting.compiled:
        model.forward = torch.compile(model.forward)
    wrapped = wrap_ddp(model, job.device) if job.ranks.world > 1 else model
    transport = PairMaker(job.config, job.latent_shape).transport
    encode = build_encoder(job) if setting.encoder else None
    half = setting.precision == "bf16"

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(job.accumulation):
            batch = next(batches)
            z = batch.latents_BCHW if encode is None else encode(len(batch.labels_B))
            with watch("forward"), torch.autocast(job.device.type, torch.bfloat16) if half else nullcontext():
                t_B, noise = transport.sample_time(torch.rand(len(z), device=z.device)), torch.randn_like(z)
                loss = transport.loss(partial(predict, wrapped, batch.labels_B, None), z, t_B, noise).mean()
            with watch("backward"):
                (loss / job.accumulation).backward()
            loss.item()
        with watch("whole update"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            with watch("optimizer"):
                optimizer.step()
            with watch("EMA"), torch.no_grad():
                for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    ours.mul_(EMA_DECAY).add_(theirs, alpha=1 - EMA_DECAY)

    return step


def build_encoder(job: Job) -> Callable[[int], Tensor]:
    """The reference's encoding of a batch of images: DINOv2 with random weights in float32, outside of autocast."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    channels, side, _ = job.latent_shape
    large = job.args.model != "tiny"
    sizes = {
        "hidden_size": channels,
        "num_hidden_layers": 12 if large else 2,
        "num_attention_heads": channels // 64 or 1,
    }
    config = Dinov2WithRegistersConfig(**sizes, patch_size=PATCH, image_size=PATCH * side, num_register_tokens=4)
    model = Dinov2WithRegistersModel(config).to(job.device).eval().requires_grad_(False)
    images = torch.rand(job.args.batch, 3, PATCH * side, PATCH * side, device=job.device)

    @torch.no_grad()
    def encode(n: int) -> Tensor:
        tokens = model(images[:n]).last_hidden_state[:, -side * side :]
        return tokens.transpose(1, 2).reshape(n, channels, side, side).contiguous()

    return encode


@dataclass(frozen=True)
class Setting:
    """One variant."""

    name: str
    batch: int
    engine: str = ""
    kernels: str = "torch"
    compiled: bool = False
    real: bool = False
    ours: bool = True
    encoder: bool = False
    precision: str = "bf16"


def settings(args: argparse.Namespace) -> list[Setting]:
    """Everything that is measured, in order."""
    theirs = [
        Setting(REFERENCE, args.batch, ours=False, encoder=args.encoder, precision="tf32"),
        Setting(
            "reference's way, bf16, compiled",
            args.batch,
            ours=False,
            encoder=args.encoder,
            compiled="on" in args.compile,
        ),
    ]
    ours = []
    for engine, kernels, compiled in product(args.engine, args.kernels, args.compile):
        name = f"{engine}, {kernels} kernels{', compiled' if compiled == 'on' else ''}"
        ours.append(Setting(name, args.batch, engine, kernels, compiled == "on"))
    if args.store:
        ours.append(replace(ours[0], name=f"{ours[0].name}, latents from the store", real=True))
    return [*theirs, *ours, replace(theirs[0], name=f"{REFERENCE}, at the end")]


def measure(job: Job, setting: Setting) -> list[dict[str, Any]]:
    """Rows of one variant, with half the batch as often as it does not fit."""
    while True:
        try:
            return measure_once(job, setting)
        except torch.OutOfMemoryError:
            if setting.batch == 1 or job.ranks.world > 1:
                raise
        release()
        setting = replace(setting, batch=setting.batch // 2)
        print(f"{setting.name}: out of memory, now with batch {setting.batch}", flush=True)


def measure_once(job: Job, setting: Setting) -> list[dict[str, Any]]:
    """Images/s, and milliseconds of each phase."""
    watch, engine = Stopwatch(job.device), None
    batches, close = open_batches(job, setting)
    try:
        if setting.ours:
            step, engine = our_step(job, watch, batches, setting)
        else:
            step = reference_step(job, watch, batches, setting)
        for _ in range(job.args.warmup):
            step()
        watch.spans.clear()
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        points = [watch.now()]
        for watch.steps in range(job.args.steps):
            step()
            points.append(watch.now())
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        several_gpus = job.ranks.world > 1 and job.device.type == "cuda"
        communication = collective_ms(step) if several_gpus else None
        return rows_of(job, setting, watch, points, communication)
    finally:
        close()
        if engine is not None:
            engine.close()


def rows_of(
    job: Job, setting: Setting, watch: Stopwatch, points: list[Any], communication: float | None
) -> list[dict[str, Any]]:
    """The variant's throughput first."""
    step_ms = [milliseconds_between(begin, end) for begin, end in pairwise(points)]
    images = setting.batch * job.accumulation * job.ranks.world
    facts: dict[str, Any] = {"batch": setting.batch}
    peak = peak_flops(job.device)
    if peak is not None:
        median_s = sorted(step_ms)[len(step_ms) // 2] / 1e3
        facts["mfu"] = round(images * job.flops() / (median_s * peak * job.ranks.world), 4)
        facts["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    rows = [row(setting.name, [images * 1e3 / ms for ms in step_ms], "images/s", **facts)]
    for phase in PHASES:
        if watch.milliseconds(phase):
            rows.append(row(f"{setting.name}: {phase}", watch.milliseconds(phase), "ms"))
    if communication is not None:
        rows.append(row(f"{setting.name}: communication, overlapped or not", [communication], "ms"))
    return rows


def collective_ms(step: Step, steps: int = 3) -> float:
    """Milliseconds a step that NCCL's kernels run, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if "nccl" in event.key.lower()]
    return sum(event.self_device_time_total for event in events) / steps / 1e3


def open_batches(job: Job, setting: Setting) -> tuple[Iterator[Any], Callable[[], None]]:
    """Batches without end, and what closes them."""
    if not setting.real:
        torch.manual_seed(SEED + job.ranks.rank)
        pool = []
        for i in range(POOL):
            index = torch.arange(i * setting.batch, (i + 1) * setting.batch, device=job.device)
            latents = torch.randn(setting.batch, *job.latent_shape, device=job.device)
            pool.append(Batch(latents, index % CLASSES, index))
        return cycle(pool), lambda: None
    from rae_fast.config import Loader
    from rae_fast.latents.loader import build_loader
    from rae_fast.latents.store import open_store

    total = setting.batch * job.ranks.world * job.accumulation
    sizes = {"batch_size": setting.batch, "images_per_step": total}
    loader = build_loader(Loader(), open_store(job.args.store), **sizes, ranks=job.ranks, device=job.device)
    return loader, loader.close


def release() -> None:
    """Give a variant's memory and compiled code back."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fall_back(args: argparse.Namespace) -> None:
    """Leave out what this machine lacks, and say so."""
    missing = [name for name in ("deepspeed", "zarr", "transformers") if importlib.util.find_spec(name) is None]
    if "deepspeed" in missing and "deepspeed" in args.engine:
        args.engine = ["ddp"]
        print("no deepspeed here: measuring the ddp engine", flush=True)
    if "zarr" in missing and args.store:
        args.store = None
        print("no zarr here: measuring with synthetic latents", flush=True)
    if "transformers" in missing and args.encoder:
        args.encoder = False
        print("no transformers here: the reference's way without its encoder", flush=True)


def shape_of(args: argparse.Namespace) -> tuple[int, int, int]:
    """[C, H, W] of a latent: the store's, or as asked for.

    Raises:
        UserError: a number of tokens that makes no square, or no store there.
    """
    if args.store:
        from rae_fast.latents.store import open_store

        return open_store(args.store).latent_shape
    tokens = args.tokens or (16 if args.model == "tiny" else 256)
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UserError(f"--tokens {tokens}", "a square number")
    return args.channels or (32 if args.model == "tiny" else 768), side, side


def main() -> None:
    """Parse the command line, measure every variant in turn, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", *size_presets()], default="DiTDH-XL")
    parser.add_argument("--tokens", type=int, help="of a latent (256; 1024 at 512 px)")
    parser.add_argument("--channels", type=int, help="of a latent (768)")
    parser.add_argument("--batch", type=int, default=128, help="images of a micro-step on each rank")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps of a step")
    parser.add_argument("--engine", nargs="+", choices=("deepspeed", "ddp"), default=["deepspeed"])
    parser.add_argument("--zero", type=int, choices=range(4), default=1, help="DeepSpeed's stage")
    parser.add_argument("--kernels", nargs="+", choices=("triton", "torch"), default=["triton", "torch"])
    parser.add_argument("--compile", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--precision", choices=("bf16", "tf32", "fp32"), default="bf16", help="of our variants")
    parser.add_argument("--store", help="also measure with this store's latents")
    parser.add_argument("--no-encoder", dest="encoder", action="store_false", help="the reference without its encoder")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    fall_back(args)
    ranks = ranks_from_environment()
    device = pick_device("auto", ranks.local_rank)
    init_distributed(ranks, device)
    path = TransportSection(TransportParams(time_dist_type="logit-normal_0_1"))
    job = Job(args, ranks, device, replace(Config(), transport=path), shape_of(args))
    rows: list[dict[str, Any]] = []
    for setting in settings(args):
        found = measure(job, setting)
        rows += found
        release()
        if ranks.is_main:
            print(f"{setting.name}: {found[0]['median']:.4g} images/s", flush=True)
    if not ranks.is_main:
        return
    facts = {"model": args.model, "latent_shape": list(job.latent_shape), "ranks": ranks.world, "zero_stage": args.zero}
    facts |= {"tokens": job.latent_shape[1] * job.latent_shape[2]}
    facts |= {"accumulation": args.accumulation, "encoder_in_baseline": args.encoder, "precision": args.precision}
    question = "How many images/s does a training step reach, and where does its time go?"
    result = make_result("train_step", question, REFERENCE, rows, device, **facts)
    print_table(result)
    if args.out:
        write_result(args.out, result)


if __name__ == "__main__":
    exit_cleanly(main)
