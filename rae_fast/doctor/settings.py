"""Whether samples are drawn with the settings that the model was trained with."""

from __future__ import annotations

from math import isclose, prod

from rae_fast.doctor.evidence import Evidence
from rae_fast.doctor.findings import OK, SUSPECT, WRONG, Finding
from rae_fast.training.dit_setup import LABEL_TABLE

FEW_STEPS = 10
STRONG_GUIDANCE = 15.0


def check_settings(evidence: Evidence) -> list[Finding]:
    """Path and prediction, time shift, null label, classes, sampler."""
    return [
        _transport(evidence),
        _shift(evidence),
        _null_label(evidence),
        *_classes(evidence),
        _sampler(evidence),
    ]


def _transport(evidence: Evidence) -> Finding:
    trained, sampling = (c.transport.params for c in (evidence.trained, evidence.sampling))
    for name in ("path_type", "prediction"):
        before, now = getattr(trained, name), getattr(sampling, name)
        if before != now:
            found = f"trained with {name} {before}, sampled with {now}"
            return Finding("transport", WRONG, found, f"set transport.params.{name}={before}")
    return Finding("transport", OK, f"{trained.path_type} path, {trained.prediction} prediction in both")


def _shift(evidence: Evidence) -> Finding:
    """The shift is the same in both, and that of the latents' size."""
    trained, sampling = evidence.geometry.shift, evidence.sampling_geometry.shift
    if not isclose(trained, sampling, rel_tol=1e-6):
        misc = evidence.trained.misc
        return Finding(
            "time shift",
            WRONG,
            f"trained with {trained:.4g}, sampled with {sampling:.4g}",
            f"set misc.time_dist_shift_dim={misc.time_dist_shift_dim or prod(evidence.geometry.latent_shape)} "
            f"misc.time_dist_shift_base={misc.time_dist_shift_base}",
        )
    given, size = evidence.trained.misc.time_dist_shift_dim, prod(evidence.geometry.latent_shape)
    if given is not None and given != size:
        found = f"misc.time_dist_shift_dim is {given}, while these latents hold {size} values"
        return Finding("time shift", SUSPECT, found, "leave it out, unless it is meant")
    return Finding("time shift", OK, f"{trained:.4g} in both")


def _null_label(evidence: Evidence) -> Finding:
    """The null label is the last row of the table, which guidance needs."""
    geometry, guidance = evidence.sampling_geometry, evidence.sampling.guidance
    rows, classes = len(evidence.sampled[LABEL_TABLE]), evidence.geometry.num_classes
    guided = guidance.scale > 1 and guidance.method == "cfg"
    if classes is None or rows == classes:
        state = WRONG if guided else OK
        found = f"the label table has {rows} rows and no null row"
        return Finding("null label", state, found, "guidance.scale=1, or train with class_dropout_prob" * guided)
    if geometry.null_label != classes:
        found = f"sampled with null label {geometry.null_label}, which is a class; the trained one is {classes}"
        return Finding("null label", WRONG, found, f"set misc.null_label={classes}, or leave it out")
    dropout = float(evidence.trained.stage_2.params.get("class_dropout_prob", 0.1))
    if guided and dropout <= 0:
        return Finding("null label", WRONG, "guided, but labels were never dropped in training", "guidance.scale=1")
    return Finding("null label", OK, f"{classes}, dropped to with probability {dropout:g} in training")


def _classes(evidence: Evidence) -> list[Finding]:
    trained, sampling = evidence.geometry.num_classes, evidence.sampling_geometry.num_classes
    if trained != sampling:
        found = f"trained with {trained} classes, sampled with {sampling}"
        return [Finding("classes", WRONG, found, f"set misc.num_classes={trained}")]
    store = evidence.store
    if store is None:
        return []
    seen = len(set(store.labels[store.valid].tolist()))
    if trained is not None and seen < trained:
        found = f"the store has images of {seen} of {trained} classes"
        return [Finding("classes", SUSPECT, found, "the others were never seen: do not sample them")]
    return [Finding("classes", OK, f"{trained}, all in the store")]


def _sampler(evidence: Evidence) -> Finding:
    sampler, guidance = evidence.sampling.sampler, evidence.sampling.guidance
    steps = sampler.params.num_steps
    shown = f"{sampler.mode} {sampler.params.sampling_method}, {steps} steps, guidance scale {guidance.scale:g}"
    if steps < FEW_STEPS:
        return Finding("sampler", SUSPECT, shown, "very few steps: try sampler.params.num_steps=50")
    if guidance.scale > STRONG_GUIDANCE:
        return Finding("sampler", SUSPECT, shown, "very strong guidance burns images: try guidance.scale=1.5")
    return Finding("sampler", OK, shown)
