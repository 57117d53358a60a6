"""The demo's report: what was made, how well, from what, in how long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rae_fast.config import Config
from rae_fast.demo.evaluate import LEAST_REAL_AGREEMENT
from rae_fast.demo.stages import Stages
from rae_fast.evaluation.report import Page, read_log, readable_bytes
from rae_fast.evaluation.run_report import add_curves
from rae_fast.latents.store import open_store
from rae_fast.progress import clock
from rae_fast.provenance import versions

PERCEPTUAL = {
    "lpips": "LPIPS with pretrained VGG16",
    "encoder": "distance in the frozen encoder's own features (LPIPS takes VGG16's weights and a GPU)",
}


def write_page(folder: Path, config: Config, stages: Stages, metrics: Mapping[str, Any]) -> None:
    """Write `folder`/report.html."""
    data, encoder = stages.results["data"], stages.results["encoder"]
    page = Page(
        "rae_fast demo",
        f"{metrics['images']:,} JPEG files ({data['origin']}) became {metrics['samples']:,} generated images "
        f"in {clock(metrics['seconds']['total'])} on {metrics['device']}.",
    )
    page.tiles(_figures(metrics))
    perceptual = PERCEPTUAL[stages.results["decoder"]["perceptual"]]
    page.text(f"Encoder: {encoder['description']}. Perceptual loss of the decoder: {perceptual}.")
    page.heading("Generated images")
    page.text("One row for each class, drawn from EMA weights with classifier-free guidance.")
    page.image(folder / "samples.png", f"guidance scale {config.guidance.scale}, one class a row", pixels=True)
    page.heading("Reconstructions of held-out images")
    page.image(folder / "reconstructions.png", "original above, decoded latent below", pixels=True)
    page.heading("Training")
    _curves(page, folder)
    page.heading("Latent store")
    page.facts(_store_facts(config, metrics))
    page.heading(f"Images that could not be used ({metrics['failures']})")
    _failures(page, config)
    page.heading("Time and memory")
    rows = [(stage, clock(seconds)) for stage, seconds in metrics["seconds"].items()]
    page.table(("stage", "minutes:seconds"), rows)
    page.heading("Made with")
    page.facts(versions())
    page.save(folder / "report.html")


def _figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    agreement = metrics["class_agreement"]
    return {
        "reconstruction PSNR, held out": f"{metrics['psnr_db']:.1f} dB",
        "reconstruction SSIM": f"{metrics['ssim']:.3f}",
        "generated images of the class asked for": "void" if agreement is None else f"{agreement:.0%}",
        f"the same measure on real images (void below {LEAST_REAL_AGREEMENT:.0%})": (
            f"{metrics['class_agreement_real']:.0%}"
        ),
        "Frechet distance, encoder features": f"{metrics['frechet']:.2f}",
        "peak memory, all processes": readable_bytes(metrics["peak_memory_bytes"]),
    }


def _curves(page: Page, folder: Path) -> None:
    for name, title in (("dit", "DiTDH"), ("decoder", "Decoder")):
        page.text(f"{title}:")
        add_curves(page, read_log(folder / name / "log.jsonl"))


def _store_facts(config: Config, metrics: Mapping[str, Any]) -> dict[str, Any]:
    assert config.cache.path is not None
    store = open_store(config.cache.path)
    return {
        "folder": config.cache.path,
        "images": f"{store.n:,} ({int(store.valid.sum()):,} valid)",
        "latent": " x ".join(map(str, store.latent_shape)),
        "views": ", ".join(store.views),
        "codec": store.attrs["codec"],
        "size": readable_bytes(metrics["store_bytes"]),
        "encoder weights": store.attrs["encoder"]["weights_sha256"],
        "dataset digest": store.attrs["dataset"]["segments"][-1],
        "classes": ", ".join(store.class_names),
    }


def _failures(page: Page, config: Config) -> None:
    assert config.cache.path is not None
    failures = open_store(config.cache.path).failures
    page.table(("file", "reason"), [(failure["path"], failure["reason"]) for failure in failures])
