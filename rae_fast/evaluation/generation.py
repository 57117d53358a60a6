"""How close generated images are to real ones: Frechet distances, MMD, inception score, precision and recall.

Every rank extracts its share of the features into the cache; rank 0 alone reduces them, in an order that does not
depend on the number of ranks, while the others have already gone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rae_fast.config import Config
from rae_fast.evaluation.extractor import FEATURES, LOGITS, SPATIAL, Extractor
from rae_fast.evaluation.feature_cache import FigureSet, collect
from rae_fast.evaluation.features import EncoderFeatures, build_extractor, image_features, stored_features
from rae_fast.evaluation.frechet import frechet_distance
from rae_fast.evaluation.image_sets import ImageSet, open_images, sampling_manifest
from rae_fast.evaluation.inception import Inception
from rae_fast.evaluation.mmd import squared_mmd
from rae_fast.evaluation.outcome import Picture, describe, picture_of, write_outcome
from rae_fast.evaluation.precision_recall import precision_recall
from rae_fast.evaluation.references import Reference, open_reference
from rae_fast.latents.plan import config_of
from rae_fast.runtime import Ranks, pick_device

PAIRWISE_LIMIT = 50_000  # images of each set whose distances are taken pair by pair
INCEPTION_SPLITS = 10
# What a report keeps of the sampler's manifest, beside its hashes.
MADE_BY = ("checkpoint", "seed", "samples")


@dataclass(frozen=True)
class GenerationJob:
    """What to compare with what.

    Attributes:
        samples: .npz, folder, or the folder of a sampling job.
        reference: ADM's .npz, .npz of images, folder, or store.
        features: `inception`, `encoder`, `module:attribute`.
        out: folder that gets report.json, report.html, samples.png and reference.png.
        cache: folder of extracted features.
        image_size: side that the images of a reference folder are cropped to.
        inception_weights: file; None: torch-fidelity's own place.
        pooling: the encoder's feature: mean of its patch tokens, or cls.
    """

    samples: str
    reference: str
    features: tuple[str, ...]
    out: Path
    cache: Path
    image_size: int | None = None
    inception_weights: str | None = None
    pooling: str = "mean"


def evaluate_generation(job: GenerationJob, config: Config | None, ranks: Ranks) -> dict[str, Any] | None:
    """Measure the samples and write the report; rank 0 returns it.

    Args:
        job: what to compare.
        config: names the encoder; None: the one that made the reference store, if it is one.
        ranks: this process among those that share the work.

    Raises:
        UserError: images, weights or encoder are missing or do not fit.
    """
    started_s = time.monotonic()
    device = pick_device(config.runtime.device if config else "auto", ranks.local_rank)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    reference = open_reference(job.reference, job.image_size)
    samples = open_images(job.samples)
    extractors = [_extractor(name, job, config, reference, device) for name in job.features]
    metrics: dict[str, Any] = {}
    content: dict[str, str] = {}
    for extractor in extractors:
        ours = collect(image_features(samples, extractor), job.cache, ranks)
        theirs = _reference_features(reference, extractor, job, ranks)
        if ours is None:
            continue
        metrics[extractor.name] = measure(ours, theirs, _statistics(reference, extractor), extractor, device)
        content["samples"] = ours.content_sha256
        if theirs is not None:
            content["latents" if _from_latents(reference, extractor, job) else "images"] = theirs.content_sha256
    if not ranks.is_main:
        return None
    report = _report(job, samples, reference, extractors, metrics, content)
    pictures = [picture_of(samples, "samples")]
    if reference.images is not None:
        pictures.append(picture_of(reference.images, "reference"))
    _write(job, report, pictures, ranks, device, started_s)
    return report


def measure(
    samples: FigureSet,
    reference: FigureSet | None,
    statistics: dict[str, tuple[np.ndarray, np.ndarray]],
    extractor: Extractor,
    device: torch.device,
) -> dict[str, float]:
    """All figures that these features allow; ready-made statistics win over those of the reference's images."""
    inception = isinstance(extractor, Inception)
    names, found = samples.names, {}
    for layer, name in ((FEATURES, "fid" if inception else "fd"), (SPATIAL, "sfid" if inception else "sfd")):
        real = statistics.get(layer) or (reference.moments(layer) if reference and layer in reference.names else None)
        if layer in names and real is not None:
            found[name] = frechet_distance(*samples.moments(layer), *real)
    if LOGITS in names:
        found["inception_score"], found["inception_score_std"] = inception_score(samples.array(LOGITS))
    if reference is not None:
        pair = [figures.array(FEATURES, PAIRWISE_LIMIT) for figures in (samples, reference)]
        found["mmd2"] = squared_mmd(*pair, device=device)
        found["precision"], found["recall"] = precision_recall(*pair, device=device)
    return found


def inception_score(logits_ND: np.ndarray) -> tuple[float, float]:
    """(mean, deviation) of exp(E KL(p(y|x) || p(y))) over 10 splits, shuffled by torch-fidelity's fixed seed.

    Args:
        logits_ND: of each image.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(torch.from_numpy(logits_ND), splits=min(INCEPTION_SPLITS, len(logits_ND)))
    return found["inception_score_mean"], found["inception_score_std"]


def _extractor(
    name: str, job: GenerationJob, config: Config | None, reference: Reference, device: torch.device
) -> Extractor:
    store = reference.store
    if config is None and store is not None:
        config = config_of(store.attrs)
    # Features of samples are to be made as those that the store holds were.
    precision = store.attrs["precision"] if store is not None else "fp32"
    return build_extractor(
        name,
        config,
        device,
        inception_weights=job.inception_weights,
        pooling=job.pooling,
        precision=precision,
    )


def _from_latents(reference: Reference, extractor: Extractor, job: GenerationJob) -> bool:
    return reference.store is not None and isinstance(extractor, EncoderFeatures) and job.pooling == "mean"


def _reference_features(
    reference: Reference, extractor: Extractor, job: GenerationJob, ranks: Ranks
) -> FigureSet | None:
    if _from_latents(reference, extractor, job):
        assert reference.store is not None and isinstance(extractor, EncoderFeatures)
        return collect(stored_features(reference.store, extractor), job.cache, ranks)
    if reference.images is None:
        return None
    return collect(image_features(reference.images, extractor), job.cache, ranks)


def _statistics(reference: Reference, extractor: Extractor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ready-made statistics are Inception's, unless there is nothing else to compare with."""
    if isinstance(extractor, Inception) or reference.images is None:
        return reference.statistics
    return {}


def _report(
    job: GenerationJob,
    samples: ImageSet,
    reference: Reference,
    extractors: list[Extractor],
    metrics: dict[str, Any],
    content: dict[str, str],
) -> dict[str, Any]:
    made_by = sampling_manifest(job.samples) or {}
    facts = reference.facts() | {f"{name}_sha256": content[name] for name in ("images", "latents") if name in content}
    return {
        "kind": "generation",
        "metrics": metrics,
        "samples": samples.facts() | {"sha256": content["samples"]},
        "made_by": {k: v for k, v in made_by.items() if k in MADE_BY or k.endswith("_sha256")},
        "reference": facts,
        "evaluators": {extractor.name: extractor.identity for extractor in extractors},
        "pairwise_limit": PAIRWISE_LIMIT,
        "notes": _notes(samples, reference, extractors, metrics),
    }


def _notes(samples: ImageSet, reference: Reference, extractors: list[Extractor], metrics: dict[str, Any]) -> list[str]:
    """What a reader must know before comparing the figures with others'."""
    notes = []
    if samples.count < 10_000:
        notes.append(
            f"{samples.count:,} samples: Frechet distances fall as their number grows; published ones use 50,000"
        )
    for extractor in extractors:
        if isinstance(extractor, Inception) and not extractor.identity["comparable_with_published"]:
            notes.append("these are not torch-fidelity's Inception weights: FID and IS compare with nothing published")
        if "fid" in metrics.get(extractor.name, {}) and reference.statistics:
            notes.append("FID and sFID are against the reference file's statistics, which another program made")
        if not any(name in metrics[extractor.name] for name in ("fid", "fd")):
            notes.append(f"{extractor.name}: the reference has neither images nor statistics for it")
    if reference.images is not None and reference.images.size != samples.size:
        notes.append(f"samples are {samples.size}, references {reference.images.size}: sizes differ")
    return notes


def _write(
    job: GenerationJob,
    report: dict[str, Any],
    pictures: list[Picture],
    ranks: Ranks,
    device: torch.device,
    started_s: float,
) -> None:
    report |= describe(ranks, device, started_s)
    write_outcome(job.out, report, f"Generation: {job.samples}", f"against {job.reference}", pictures)
