"""The whole job on one machine: images -> latent store -> decoder -> DiTDH -> samples -> evaluation -> report.

Each stage calls the function behind the tool of that name; the two trainings run under the deepspeed launcher.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rae_fast.autoencoder.losses import find_vgg_weights
from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Config
from rae_fast.config_file import load_config, to_yaml
from rae_fast.demo.encoder import RANDOM_CONFIG, prepare_encoder
from rae_fast.demo.evaluate import evaluate_demo
from rae_fast.demo.launch import launch_training
from rae_fast.demo.page import write_page
from rae_fast.demo.photos import split_photos
from rae_fast.demo.shapes import draw_dataset
from rae_fast.demo.stages import Stages
from rae_fast.evaluation.images import save_grid, save_npz
from rae_fast.geometry import resolve_geometry
from rae_fast.latents.stats import save_statistics
from rae_fast.latents.store import open_store
from rae_fast.latents.writer import build_cache
from rae_fast.provenance import write_json
from rae_fast.runtime import Ranks, device_name, pick_device
from rae_fast.sampling import draw_images, load_sampler
from rae_fast.training.run_folder import sole_run

CONFIG = Path("configs/demo.yaml")
DECODER_CONFIG = Path("configs/demo_decoder.yaml")
IMAGES, HELD_OUT = 2400, 320
STATISTICS = "stat.pt"
DISCRIMINATOR_FROM, ADVERSARIAL_FROM = 0.5, 0.6  # of the decoder's training
SAMPLES_A_CLASS = 40
SAMPLE_SEED = 0


@dataclass(frozen=True)
class Demo:
    """What the command line asked for."""

    folder: Path
    data: Path | None = None
    overrides: tuple[str, ...] = ()


def run_demo(demo: Demo) -> dict[str, Any]:
    """Run every stage that has not been run, write metrics.json and report.html, and return the metrics.

    Raises:
        UserError: unusable DATA, a misspelt override, an unwritable folder, or another demo at work in it.
    """
    start_s, folder = time.monotonic(), demo.folder
    # Before any work: a misspelt key must not cost the user the drawing of the images.
    load_config(CONFIG, demo.overrides)
    with sole_run(folder, Ranks()):
        stages = Stages(demo.folder)
        data = stages.run("data", "images", _data_inputs(demo), lambda: _data(demo), [folder / "data"])
        encoder = stages.run(
            "encoder",
            "frozen encoder",
            RANDOM_CONFIG,
            lambda: prepare_encoder(folder / "encoder"),
            [folder / "encoder"],
        )
        shared = [*_overrides(demo, data, encoder), *demo.overrides]
        config = load_config(CONFIG, shared)
        for_decoder = [*_decoder_settings(load_config(DECODER_CONFIG, shared), data["train_images"]), *shared]
        decoder_config = load_config(DECODER_CONFIG, for_decoder)
        stages.run("cache", "latent store", _stored(config), lambda: _cache(demo, config), [folder / "store"])
        stages.run(
            "decoder",
            "decoder: L1 + perceptual + GAN",
            to_yaml(decoder_config),
            lambda: _train(demo, "decoder", DECODER_CONFIG, for_decoder, decoder_config),
            [folder / "decoder"],
        )
        stages.run(
            "dit",
            "DiTDH on cached latents",
            to_yaml(config),
            lambda: _train(demo, "dit", CONFIG, shared, config),
            [folder / "dit"],
        )
        drawn = load_config(CONFIG, [*shared, *_trained(demo)])
        stages.run("samples", "samples with guidance", {}, lambda: _sample(demo, drawn))
        stages.run("evaluation", "evaluation", {}, lambda: evaluate_demo(drawn, folder, data["val"]))
        metrics = _metrics(stages, time.monotonic() - start_s)
        write_json(folder / "metrics.json", metrics)
        write_page(folder, drawn, stages, metrics)
    return metrics


def _data_inputs(demo: Demo) -> dict[str, Any]:
    if demo.data is None:
        return {"images": IMAGES, "held_out": HELD_OUT}
    files = sorted(str(path) for path in demo.data.rglob("*")) if demo.data.is_dir() else []
    return {"data": str(demo.data.resolve()), "files": files}


def _data(demo: Demo) -> dict[str, Any]:
    if demo.data is not None:
        classes, _ = split_photos(demo.data, demo.folder / "data")
        train_images = sum(1 for path in (demo.folder / "data/train").glob("*/*"))
        train, val, origin = demo.folder / "data/train", demo.folder / "data/val", f"{demo.data} (yours)"
    else:
        drawn = draw_dataset(demo.folder / "data", images=IMAGES, held_out=HELD_OUT)
        train, val, origin = drawn.train, drawn.val, "drawn here"
        classes, train_images = len([path for path in train.iterdir() if path.is_dir()]), IMAGES
    return {"train": str(train), "val": str(val), "classes": classes, "train_images": train_images, "origin": origin}


def _overrides(demo: Demo, data: dict[str, Any], encoder: dict[str, Any]) -> list[str]:
    """What the config files leave open: this run's folders, the encoder found, the number of classes."""
    return [
        f"data.source={data['train']}",
        f"data.val_source={data['val']}",
        f"cache.path={demo.folder / 'store'}",
        f"misc.num_classes={data['classes']}",
        f"stage_1.params.encoder_params.dinov2_path={encoder['path']}",
        f"stage_1.params.encoder_input_size={encoder['input_size']}",
        f"stage_1.params.normalization_stat_path={demo.folder / STATISTICS}",
    ]


def _decoder_settings(config: Config, images: int) -> list[str]:
    """What follows from the number of images and from the machine.

    The game starts at fixed shares of the training, while the config counts in epochs, whose length is the data's.
    LPIPS takes VGG16's weights, and a GPU: on a CPU a step would take seconds.
    """
    training = config.training
    assert training.max_steps is not None and training.global_batch_size is not None
    epochs = training.max_steps * training.global_batch_size / images
    on_gpu = pick_device(config.runtime.device).type == "cuda"
    return [
        f"gan.loss.disc_upd_start={DISCRIMINATOR_FROM * epochs:.2f}",
        f"gan.loss.disc_start={ADVERSARIAL_FROM * epochs:.2f}",
        f"gan.loss.perceptual={'lpips' if on_gpu and find_vgg_weights() else 'encoder'}",
    ]


def _trained(demo: Demo) -> list[str]:
    return [
        f"stage_1.params.pretrained_decoder_path={demo.folder / 'decoder/export/model.pt'}",
        f"stage_2.ckpt={demo.folder / 'dit/export/stage2_model.pt'}",
    ]


def _stored(config: Config) -> str:
    """The sections that the store depends on; a change of the others keeps it."""
    return repr(
        (config.stage_1.params.encoder_params, config.stage_1.params.encoder_input_size, config.data, config.cache)
    )


def _cache(demo: Demo, config: Config) -> dict[str, Any]:
    report = build_cache(config, Ranks())
    store = open_store(report.url)
    save_statistics(demo.folder / STATISTICS, store.mean, store.var)
    size_bytes = sum(path.stat().st_size for path in Path(report.url).rglob("*") if path.is_file())
    return {
        "images": report.images,
        "failures": report.failures,
        "encoded": report.encoded,
        "limits": report.limits,
        "store_bytes": size_bytes,
    }


def _train(demo: Demo, name: str, config_file: Path, shared: list[str], config: Config) -> dict[str, Any]:
    folder = demo.folder / name
    launch_training(f"tools/train_{name}.py", config_file, [*shared, f"logging.run_folder={folder}"], config)
    return {"run_folder": str(folder), "perceptual": config.gan.loss.perceptual}


def _sample(demo: Demo, config: Config) -> dict[str, Any]:
    """Equally many images of every class to samples.npz, and a grid with one row for each class."""
    device = pick_device(config.runtime.device)
    geometry = resolve_geometry(config)
    assert geometry.num_classes is not None
    sampler = load_sampler(config, geometry, device)
    rae = build_rae(config.stage_1, need_encoder=False).to(device).eval()
    labels = np.repeat(np.arange(geometry.num_classes), SAMPLES_A_CLASS)
    images = draw_images(sampler, rae, labels, np.arange(len(labels)), SAMPLE_SEED)
    save_npz(demo.folder / "samples.npz", images, labels)
    columns = min(12, SAMPLES_A_CLASS)
    by_class = images.reshape(geometry.num_classes, SAMPLES_A_CLASS, *images.shape[1:])[:, :columns]
    save_grid(demo.folder / "samples.png", by_class.reshape(-1, *images.shape[1:]), columns)
    return {"samples": len(images), "guidance_scale": config.guidance.scale, "steps": config.sampler.params.num_steps}


def _metrics(stages: Stages, wall_s: float) -> dict[str, Any]:
    cache, evaluation = stages.results["cache"], stages.results["evaluation"]
    return {
        **evaluation,
        "images": cache["images"],
        "failures": cache["failures"],
        "store_bytes": cache["store_bytes"],
        "samples": stages.results["samples"]["samples"],
        "seconds": {**stages.seconds, "total": round(sum(stages.seconds.values()), 1)},
        "seconds_of_this_call": round(wall_s, 1),
        "peak_memory_bytes": stages.peak_memory_bytes,
        "device": device_name(pick_device()),
    }
