"""The machine that a run is planned for: from the table of devices, or this one, measured.

Every figure says whether it was measured on this machine or follows from data sheets.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, encoder_facts
from rae_fast.images.index import build_index
from rae_fast.planner import machine as measured
from rae_fast.planner.devices import LINK_SHARE, Gpu
from rae_fast.planner.roofline import floor_s, from_config, training_flops
from rae_fast.planner.store_size import PATH_BYTES, store_size
from rae_fast.runtime import device_name, pick_device

IMAGENET_IMAGES = 1_281_167
NODE = 8  # GPUs that share a machine and its disk
# Share of the floor that a step is expected to reach where none was measured: the targets for an H200 (550 images/s of
# DiTDH-XL, 1,870 of -S, 117 at 512 px) are 0.88, 0.86 and 0.84 of the floors reckoned here (625, 2,178, 139).
EXPECTED_SHARE = 0.86
CORES_A_GPU = 16  # of hosts rented with such GPUs
# Milliseconds of one core for a 500 x 375 JPEG to a 256 px crop (research/image-input.md: DALI decode, own resampling).
DECODE_CORE_MS = 1.55
WRITE_BYTES_S = 2e9  # of a node, where its disk is unknown
ENCODER_SHARE = 0.5  # of the products' rate that the encoder is expected to reach
ENCODER_DEPTHS = {384: 12, 768: 12, 1024: 24, 1152: 27, 1280: 32, 1536: 40}
MEASURED, COMPUTED = "measured here", "computed"


@dataclass(frozen=True)
class Machine:
    """What training will run on.

    Attributes:
        name: of the device.
        is_gpu: the step runs beside decoding, not on the same cores.
        count: devices, all alike.
        memory_bytes: of one device.
        cores: of one node.
        decode_images_s: JPEGs to crops, of one node.
        encode_images_s: of one device, one view.
        step: measured seconds of a training step; None: from the floor.
        floor_images_s: most that one device can do; None where its rates are unknown.
        expected_images_s: of one device, without communication and data.
        disk_bytes_s: random reads of one node; None where unknown.
        free_bytes: room for the store; None where unknown.
        link_bytes_s: to the other devices.
        origins: where each figure comes from.
    """

    name: str
    is_gpu: bool
    count: int
    memory_bytes: float
    cores: int
    decode_images_s: float
    encode_images_s: float
    step: measured.StepTime | None
    floor_images_s: float | None
    expected_images_s: float
    disk_bytes_s: float | None
    free_bytes: int | None
    link_bytes_s: float | None
    origins: Mapping[str, str]


@dataclass(frozen=True)
class DataFacts:
    """How many images there are, and how long their paths; `origin` says how that is known."""

    images: int
    path_bytes: float
    origin: str


def data_facts(config: Config, images: int | None) -> DataFacts:
    """Images of the config's source, if it is on this machine."""
    if images is not None:
        return DataFacts(images, PATH_BYTES, "as given")
    try:
        index = build_index(config.data)
    except UserError:
        return DataFacts(IMAGENET_IMAGES, PATH_BYTES, "ImageNet's, since data.source is not on this machine")
    return DataFacts(len(index), len(index.paths.blob) / len(index), str(config.data.source))


def table_machine(
    gpu: Gpu, count: int, config: Config, geometry: Geometry, images_a_step: int, cores: int | None
) -> Machine:
    """A machine from the table of devices."""
    cores = cores or CORES_A_GPU * min(count, NODE)
    model = from_config(config)
    floor = 1 / sum(floor_s(model, images_a_step, gpu.tflops, gpu.tbs).values())
    encoder = encoder_flops(config, geometry)
    return Machine(
        name=gpu.name,
        is_gpu=True,
        count=count,
        memory_bytes=gpu.memory_bytes,
        cores=cores,
        decode_images_s=1e3 * cores / DECODE_CORE_MS,
        encode_images_s=ENCODER_SHARE * gpu.tflops * 1e12 / encoder,
        step=None,
        floor_images_s=floor,
        expected_images_s=EXPECTED_SHARE * floor,
        disk_bytes_s=None,
        free_bytes=None,
        link_bytes_s=gpu.link_gbs * 1e9 * LINK_SHARE,
        origins={
            "device": gpu.source,
            "training": f"{COMPUTED}: {EXPECTED_SHARE:.0%} of the floor, which no run has shown yet",
            "decode": f"{COMPUTED}: {DECODE_CORE_MS} ms of a core for an image of 0.16 megapixels, {cores} cores",
            "encode": f"{COMPUTED}: {ENCODER_SHARE:.0%} of the products' rate",
            "disk": f"unknown: give --disk-gbs (writing the store is taken to run at {WRITE_BYTES_S / 1e9:g} GB/s)",
        },
    )


def this_machine(config: Config, geometry: Geometry, count: int, images_a_step: int) -> Machine:
    """This machine, measured."""
    device = pick_device(config.runtime.device)
    config, precision_note = _fast_precision(config, device)
    cores = measured.cores()
    products = measured.measure_products(device)
    step = measured.measure_step(config, geometry, device, products)
    decode, decode_origin = 1e3 * cores / DECODE_CORE_MS, f"{COMPUTED}: data.source is not on this machine"
    try:
        index = build_index(replace(config.data, limit=4096 if config.data.limit is None else config.data.limit))
        decode, decode_origin = measured.measure_decode(index, config, geometry.image_size), MEASURED
    except UserError:
        pass
    encode = measured.measure_encoder(config, geometry, device)
    local = "://" not in (config.cache.path or "")
    folder = Path(config.cache.path or ".").absolute()
    row = store_size(geometry.latent_shape, 1, codec="lossless").row
    floor = products / training_flops(from_config(config))
    if device.type == "cuda":
        floor = 1 / sum(floor_s(from_config(config), images_a_step, products / 1e12, _bandwidth(device)).values())
    return Machine(
        name=device_name(device),
        is_gpu=device.type == "cuda",
        count=count,
        memory_bytes=measured.device_memory(device),
        cores=cores,
        decode_images_s=decode,
        encode_images_s=encode or ENCODER_SHARE * products / encoder_flops(config, geometry),
        step=step,
        # Products may have been measured in a moment when others used the machine; what was measured is possible.
        floor_images_s=max(floor, step.images_s(images_a_step)),
        expected_images_s=step.images_s(images_a_step),
        disk_bytes_s=measured.measure_disk(folder, int(row)) if local else None,
        free_bytes=shutil.disk_usage(_existing(folder)).free if local else None,
        link_bytes_s=None,
        origins={
            "device": MEASURED,
            "training": MEASURED + ", block by block" + precision_note,
            "decode": decode_origin,
            "encode": MEASURED if encode else f"{COMPUTED}: {ENCODER_SHARE:.0%} of the products' rate",
            "disk": MEASURED if local else "unknown: give --disk-gbs",
        },
    )


def _fast_precision(config: Config, device: torch.device) -> tuple[Config, str]:
    """The config as it is measured here, and a note: a CPU that only emulates bf16 takes minutes for each figure."""
    low = {config.runtime.precision, config.cache.precision} & {"bf16", "fp16"}
    if device.type != "cpu" or not low or torch.cpu._is_avx512_bf16_supported():
        return config, ""
    runtime, cache = replace(config.runtime, precision="fp32"), replace(config.cache, precision="fp32")
    return replace(config, runtime=runtime, cache=cache), ", in fp32: this CPU has no bf16"


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _bandwidth(device: torch.device) -> float:
    """TB/s of a copy, read and written."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / measured.median_s(lambda: target.copy_(source), device) / 1e12


def encoder_flops(config: Config, geometry: Geometry, depth: int | None = None) -> float:
    """FLOPs of one image through the encoder, a ViT with a fourfold feed-forward; its published depth unless given."""
    patch, width = encoder_facts(config.stage_1.params)
    width = width or geometry.latent_shape[0]
    tokens, depth = geometry.grid**2 + 5, depth or ENCODER_DEPTHS.get(width, 12)
    blocks = depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
    return 2.0 * (blocks + geometry.grid**2 * 3 * (patch or 16) ** 2 * width)
