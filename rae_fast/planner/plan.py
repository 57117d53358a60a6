"""What a training run will take, before anything is paid for: bytes, hours, memory, rates, and whether a cache pays.

Shapes: C, H, W of a latent, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, resolve_geometry
from rae_fast.latents.codecs import CODECS
from rae_fast.planner.devices import find_gpu
from rae_fast.planner.host import NODE, WRITE_BYTES_S, DataFacts, Machine, data_facts, table_machine, this_machine
from rae_fast.planner.roofline import from_config, training_flops
from rae_fast.planner.store_size import store_size
from rae_fast.runtime import Ranks
from rae_fast.training.batching import count_steps, ema_decays, plan_batches
from rae_fast.training.deepspeed_setup import read_deepspeed_config, zero_stage
from rae_fast.training.dit_setup import build_model
from rae_fast.training.memory import HEADROOM, MemoryPlan, gib, plan_memory

VIEWS = {"one view": ("original",), "both views": ("original", "hflip")}


def make_plan(
    config: Config,
    *,
    gpu: str | None = None,
    count: int | None = None,
    images: int | None = None,
    cores: int | None = None,
    disk_gbs: float | None = None,
    images_s: float | None = None,
) -> dict[str, Any]:
    """The plan as plain values, ready for JSON; `rae_fast.planner.page` prints it.

    Args:
        config: the whole configuration.
        gpu: name in the table of devices; None: this machine, measured.
        count: how many of them; None: all GPUs of this machine, or one of the table's.
        images: N; None: those of `data.source`, else ImageNet's.
        cores: of one node; None: this machine's, or 16 for each GPU.
        disk_gbs: GB/s of random reads, where they are known better.
        images_s: measured rate of one device in training, where it is known better.

    Raises:
        UserError: an unknown GPU, or sections that contradict each other.
    """
    count = (1 if gpu else max(1, torch.cuda.device_count())) if count is None else count
    if count < 1 or (images is not None and images < 1):
        raise UserError(f"--count {count}, --images {images}", "at least 1")
    geometry = resolve_geometry(config)
    if geometry.num_classes is None:
        geometry = replace(geometry, num_classes=1000, null_label=1000)
    data = data_facts(config, images)
    batches = plan_batches(config.training, Ranks(world=count))
    if gpu is None:
        host = this_machine(config, geometry, count, batches.micro_batch * batches.accumulation)
    else:
        host = table_machine(find_gpu(gpu), count, config, geometry, batches.micro_batch * batches.accumulation, cores)
    if disk_gbs is not None:
        host = replace(host, disk_bytes_s=disk_gbs * 1e9, origins={**host.origins, "disk": "as given"})
    if images_s is not None:
        host = replace(host, expected_images_s=images_s, origins={**host.origins, "training": "as given"})
    store = store_section(config, geometry, data, host)
    memory = memory_section(config, geometry, host, batches.micro_batch)
    speed = speed_section(config, geometry, data, host, memory["parameters"], batches.global_batch, store)
    plan = {
        "machine": {**asdict(host), "origins": dict(host.origins)},
        "data": asdict(data),
        "model": {"target": config.stage_2.target, "parameters": memory["parameters"]},
        "store": store,
        "memory": memory,
        "speed": speed,
    }
    return {**plan, "recommendation": recommend(plan)}


# --- sections -------------------------------------------------------------------------------------------------------


def store_section(config: Config, geometry: Geometry, data: DataFacts, host: Machine) -> dict[str, Any]:
    """Bytes by codec and views, and the hours of a build."""
    sizes = {
        codec: {
            name: store_size(
                geometry.latent_shape,
                data.images,
                codec=codec,
                views=views,
                shard_size=config.cache.shard_size,
                path_bytes=data.path_bytes,
            )
            for name, views in VIEWS.items()
        }
        for codec in CODECS
    }
    nodes = -(-host.count // NODE)
    views = len(config.cache.views)
    decode_s = data.images / (host.decode_images_s * nodes)
    encode_s = data.images * views / (host.encode_images_s * host.count)
    view = "both views" if views > 1 else "one view"
    write_s = sizes[config.cache.codec][view].total / (nodes * (host.disk_bytes_s or WRITE_BYTES_S))
    stages = {"decode": decode_s, "encode": encode_s, "write": write_s}
    # On a GPU the three run side by side; on a CPU decoding and encoding share the cores.
    build_s = max(stages.values()) if host.is_gpu else max(decode_s + encode_s, write_s)
    return {
        "bytes": {codec: {name: size.total for name, size in by.items()} for codec, by in sizes.items()},
        "row_bytes": {codec: by["one view"].row for codec, by in sizes.items()},
        "configured": {"codec": config.cache.codec, "views": list(config.cache.views)},
        "free_bytes": host.free_bytes,
        "decode_hours": decode_s / 3600,
        "encode_hours": encode_s / 3600,
        "write_hours": write_s / 3600,
        "build_hours": build_s / 3600,
        "limited_by": max(stages, key=lambda stage: stages[stage]),
    }


def memory_section(config: Config, geometry: Geometry, host: Machine, micro_batch: int) -> dict[str, Any]:
    """Bytes of one device by ZeRO stage, and the largest micro-batch, as the out-of-memory message has them."""
    with torch.device("meta"):
        model = build_model(config, geometry)
    deepspeed = config.runtime.engine == "deepspeed"
    configured = zero_stage(read_deepspeed_config(config.deepspeed)) if deepspeed else 0
    plan = plan_memory(
        model,
        micro_batch=micro_batch,
        world=host.count,
        zero_stage=configured,
        averages=len(ema_decays(config.training)),
        value_bytes=2 if config.runtime.precision == "bf16" else 4,
        checkpointing=config.runtime.activation_checkpointing,
    )
    stages = {str(stage): _stage(replace(plan, zero_stage=stage), host.memory_bytes) for stage in range(4)}
    return {
        "parameters": plan.parameters,
        "device_bytes": host.memory_bytes,
        "micro_batch": micro_batch,
        "configured_stage": configured,
        "stages": stages,
        "blocks": "compiled" if config.runtime.compile else "eager",
    }


def _stage(plan: MemoryPlan, device_bytes: float) -> dict[str, Any]:
    room = device_bytes * HEADROOM
    largest = {}
    for name, checkpointing in (("kept", False), ("recomputed", True)):
        one = replace(plan, micro_batch=1, checkpointing=checkpointing)
        largest[name] = max(0, int((room - one.fixed_bytes) // one.activation_bytes))
    return {
        "fixed_bytes": plan.fixed_bytes,
        "activation_bytes": plan.activation_bytes,
        "total_bytes": plan.total_bytes,
        "fits": plan.total_bytes <= room,
        "largest_micro_batch": largest["kept"],
        "largest_recomputed": largest["recomputed"],
    }


def speed_section(
    config: Config,
    geometry: Geometry,
    data: DataFacts,
    host: Machine,
    parameters: int,
    global_batch: int,
    store: Mapping[str, Any],
) -> dict[str, Any]:
    """Images a second, hours, bytes a second, and after how many epochs a cache has paid for itself."""
    nodes, here = -(-host.count // NODE), min(host.count, NODE)
    share = exchange_share(host, parameters, global_batch)
    compute = host.expected_images_s * host.count * share
    row = store["row_bytes"][config.cache.codec]
    disk = None if host.disk_bytes_s is None else host.disk_bytes_s * nodes / row
    cached = min(compute, disk) if disk else compute
    encode_s = 1 / (host.encode_images_s * host.count)
    # On a GPU decoding runs beside the step, on a CPU on the same cores.
    decode = host.decode_images_s * nodes
    online_s = 1 / compute + encode_s
    online = 1 / (online_s + 1 / decode) if not host.is_gpu else min(1 / online_s, decode)
    steps_per_epoch = max(data.images // global_batch, 1)
    total_images = count_steps(config.training, steps_per_epoch) * global_batch
    saved_h = (1 / online - 1 / cached) * data.images / 3600
    flops = training_flops(from_config(config))
    return {
        "flops_per_image": flops,
        "bound_images_s": (host.floor_images_s or 0) * host.count,
        "expected_images_s": cached,
        "exchange_share": 1 - share,
        "online_images_s": online,
        "online_limited_by": "decode" if decode < 1 / online_s else "training and encoder",
        "needed_bytes_s": compute / host.count * here * row,
        "had_bytes_s": host.disk_bytes_s,
        "hours_per_epoch": data.images / cached / 3600,
        "online_hours_per_epoch": data.images / online / 3600,
        "epochs": total_images / data.images,
        "hours_to_end": total_images / cached / 3600,
        "online_hours_to_end": total_images / online / 3600,
        "break_even_epoch": store["build_hours"] / saved_h if saved_h > 0 else None,
    }


def exchange_share(host: Machine, parameters: int, global_batch: int) -> float:
    """Share of a step that is left for computing beside the exchange that nothing hides.

    Gradients are reduced while the backward pass runs; what ZeRO gathers at the end of a step is in nobody's shadow:
    4 P (n - 1) / n bytes over the link of each device.
    """
    if host.count == 1 or host.link_bytes_s is None:
        return 1.0
    gathered_s = 4 * parameters * (host.count - 1) / host.count / host.link_bytes_s
    step_s = global_batch / host.count / host.expected_images_s
    return step_s / (step_s + gathered_s)


def recommend(plan: Mapping[str, Any]) -> str:
    """One sentence: cache or stay online, and how."""
    speed, store = plan["speed"], plan["store"]
    views = "both views" if len(store["configured"]["views"]) > 1 else "one view"
    free, sizes = store["free_bytes"], {codec: by[views] for codec, by in store["bytes"].items()}
    wanted = store["configured"]["codec"]
    order = [wanted, *(codec for codec in sizes if codec != wanted)]
    fitting = [codec for codec in order if free is None or sizes[codec] < 0.95 * free]
    break_even, epochs = speed["break_even_epoch"], speed["epochs"]
    if not fitting:
        smallest = min(sizes, key=sizes.__getitem__)
        return (
            f"Stay online, or find room: the smallest store ({smallest}) takes {gib(sizes[smallest])} "
            f"and {gib(free)} are free."
        )
    if break_even is None or break_even >= epochs:
        return (
            f"Stay online (loader.source=online): a cache would pay for itself only after "
            f"{'no number of' if break_even is None else f'{break_even:.1f}'} epochs, and the recipe has {epochs:.1f}."
        )
    saved = speed["online_hours_to_end"] - speed["hours_to_end"] - store["build_hours"]
    memory = plan["memory"]
    fits = memory["stages"][str(memory["configured_stage"])]["fits"]
    warning = "" if fits else f"; micro-batch {memory['micro_batch']} does not fit by our estimate"
    size = f"{fitting[0]}, {views}, {gib(sizes[fitting[0]])}"
    return (
        f"Cache ({size}): it pays for itself after {break_even:.2f} epochs and saves {saved:,.1f} "
        f"of {speed['online_hours_to_end']:,.1f} hours to the recipe's end{warning}."
    )
