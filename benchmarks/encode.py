"""How many images a second does the frozen encoder take, and which stage of a cache build keeps the others waiting?

    python benchmarks/encode.py --what encoder --model base --batches 64,128,256,512 --compile --device cuda
    python benchmarks/encode.py --what encoder,build --out benchmarks/results/encode.json

encoder: a DINOv2 with registers at 224 pixels, random weights (speed does not depend on them), one view, from uint8
images on the device to latents. The baseline is the way of the public reference: float32, eager, in batches of 32 as a
training step has them. The builder's own way is `LatentEncoder` in each precision and batch; with --compile also behind
torch.compile, which the builder does not use.

build: a whole build of drawn JPEGs, both views, with an encoder of --layers layers. Its rows are the seconds that each
stage kept the others waiting, by 1000 images; the writer has to stay the smallest. On a CPU few layers make the encoder
fast, which is the hard case for the writer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results_file import make_result, print_table, row, write_result
from torch import Tensor

from rae_fast.config import Stage1Params
from rae_fast.errors import exit_cleanly
from rae_fast.latents.encode import LatentEncoder
from rae_fast.runtime import pick_device

MODELS = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, layers, heads
SIDE, INPUT, PATCH = 256, 224, 14
REFERENCE_BATCH = 32
BASELINE = f"reference's way: fp32, eager, batch {REFERENCE_BATCH}"
STAGES = ("decode", "encode", "write")


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="encoder", help="encoder, build or both, separated by a comma")
    parser.add_argument("--model", default="base", choices=MODELS)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--batches", default="32", help="batch sizes, separated by commas")
    parser.add_argument("--precisions", default="fp32,bf16", help="of fp32, tf32, bf16, fp16")
    parser.add_argument("--compile", action="store_true", help="also behind torch.compile")
    parser.add_argument("--images", type=int, default=256, help="of a build; of a measurement on a CPU at most these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result here as JSON; one file a question")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="encode-benchmark-") as folder:
        params = random_encoder(Path(folder) / "encoder", args.model, args.layers)
        for what in args.what.split(","):
            result = QUESTIONS[what](params, args, Path(folder))
            print_table(result)
            if args.out:
                write_result(args.out.with_stem(f"{args.out.stem}-{what}"), result)


def random_encoder(folder: Path, model: str, layers: int | None) -> Stage1Params:
    """A DINOv2 with registers of the named size, written where the builder looks for one."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    width, depth, heads = MODELS[model]
    config = Dinov2WithRegistersConfig(
        hidden_size=width,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        image_size=INPUT,
        patch_size=PATCH,
        num_register_tokens=4,
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return Stage1Params(encoder_input_size=INPUT, encoder_params={"dinov2_path": str(folder)})


# --- the encoder alone ----------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """One way to encode: images a call, and the call."""

    batch: int
    run: Callable[[Tensor], Tensor]


def ask_encoder(params: Stage1Params, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second, by batch, precision and compilation."""
    device = pick_device(args.device)
    contenders = {BASELINE: Contender(REFERENCE_BATCH, LatentEncoder(params, "fp32", device))}
    for precision in args.precisions.split(","):
        for batch in map(int, args.batches.split(",")):
            encoder = LatentEncoder(params, precision, device)
            contenders[f"{precision}, batch {batch}"] = Contender(batch, encoder)
            if args.compile:
                compiled = LatentEncoder(params, precision, device)
                compiled.encoder = torch.compile(compiled.encoder)
                contenders[f"{precision}, batch {batch}, compiled"] = Contender(batch, compiled)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        for name, contender in contenders.items():
            try:
                rate = images_per_second(contender, device, args.images)
            except torch.cuda.OutOfMemoryError:
                print(f"{name}: does not fit in this device's memory")
                rates.pop(name, None)
                continue
            if number and name in rates:
                rates[name].append(rate)
    rows = [row(name, found, "images/s") for name, found in rates.items()]
    question = "How many images a second does the frozen encoder take?"
    facts = {"model": args.model, "layers": args.layers or MODELS[args.model][1], "image_size": SIDE, "input": INPUT}
    return make_result("encode-encoder", question, BASELINE, rows, device, **facts)


def images_per_second(contender: Contender, device: torch.device, images: int) -> float:
    """One measurement: on a GPU four batches in a row and as many images at least, on a CPU one batch."""
    images_B3SS = torch.randint(256, (contender.batch, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    calls = 1
    if device.type == "cuda":
        calls = max(4, -(-images // contender.batch))
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    for _ in range(calls):
        contender.run(images_B3SS)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return calls * contender.batch / (time.perf_counter() - start_s)


# --- a whole build --------------------------------------------------------------------------------------------------


def ask_build(params: Stage1Params, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of waiting for each stage, and whole builds' rates."""
    from decode import draw_images

    images = folder / "images"
    images.mkdir()
    draw_images(images, args.images)
    waits: dict[str, list[float]] = {stage: [] for stage in STAGES}
    rates = []
    for number in range(args.rounds):
        rate, seconds = build(params, args, images, folder / f"store-{number}")
        rates.append(rate)
        for stage in STAGES:
            waits[stage].append(1000 * seconds[stage] / args.images)
    rows = [row(f"waiting for {stage}", waits[stage], "s per 1000 images") for stage in STAGES]
    rows.append(row("whole build", rates, "images/s"))
    share = sum(waits["write"]) / sum(map(sum, waits.values()))
    print(f"the writer kept the others waiting for {share:.1%} of the time that any stage did")
    facts = {"images": args.images, "model": args.model, "layers": args.layers or MODELS[args.model][1]}
    facts |= {"precision": args.precisions.split(",")[-1], "write_share": round(share, 5)}
    question = "Which stage of a cache build keeps the others waiting?"
    return make_result("encode-build", question, "waiting for encode", rows, args.device, **facts)


def build(params: Stage1Params, args: argparse.Namespace, images: Path, store: Path) -> tuple[float, dict[str, float]]:
    """One build with statistics given as none, so that it is a single pass: images a second, and seconds by stage."""
    from rae_fast.config_file import load_config
    from rae_fast.latents import writer

    overrides = [
        f"stage_1.params.encoder_params.dinov2_path={params.encoder_params['dinov2_path']}",
        f"data.source={images}",
        f"cache.path={store}",
        f"cache.precision={args.precisions.split(',')[-1]}",
        "cache.statistics=none",
        f"cache.shard_size={min(2048, max(1, args.images // 2))}",
        f"runtime.device={args.device}",
    ]
    report = writer.build_cache(load_config(None, overrides))
    return report.images / report.seconds, report.waits_s


QUESTIONS = {"encoder": ask_encoder, "build": ask_build}

if __name__ == "__main__":
    exit_cleanly(main)
