"""One denoising step at several times: does the model know more of a latent than a straight line does?

Shapes: B latents, C, H, W of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from rae_fast import rng
from rae_fast.dit.registry import build_dit
from rae_fast.doctor.evidence import Evidence
from rae_fast.doctor.findings import OK, SUSPECT, UNKNOWN, WRONG, Finding
from rae_fast.errors import UserError
from rae_fast.geometry import dit_params
from rae_fast.interop.official import likely_cause
from rae_fast.latents.preview import spread_rows
from rae_fast.rng import Stream
from rae_fast.transport.objective import Transport
from rae_fast.weights import load_strictly

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
IMAGES = 8
SEED = 2
WORSE, GOOD = 1.05, 0.97


def check_denoising(evidence: Evidence) -> list[Finding]:
    """The error of the velocity, as a share of the best linear guess's, for the sampled and the online weights."""
    if evidence.store is None:
        return [Finding("denoising", UNKNOWN, "there are no latents to denoise")]
    rows = spread_rows(evidence.store, IMAGES)
    z_BCHW = evidence.store.read(rows, evidence.store.views[0]).to(evidence.device)
    labels_B = torch.from_numpy(evidence.store.labels[rows].astype("int64")).to(evidence.device)
    try:
        sampled = _shares(evidence, evidence.sampled, z_BCHW, labels_B)
    except UserError as error:
        return [Finding("denoising", WRONG, error.found, error.mend)]
    online = sampled
    if evidence.sampled is not evidence.online:
        online = _shares(evidence, evidence.online, z_BCHW, labels_B)
    return [judge(sampled, online)]


def judge(sampled: Mapping[float, float], online: Mapping[float, float]) -> Finding:
    """What errors by time, as shares of the linear guess's, say."""
    shown = ", ".join(f"{share:.2f} at t={t:g}" for t, share in sampled.items())
    ours, theirs = (median(shares.values()) for shares in (sampled, online))
    by = f"error against the best linear guess: {shown}"
    if ours > WORSE and theirs <= WORSE:
        best = ", ".join(f"{share:.2f}" for share in online.values())
        return Finding("denoising", WRONG, f"{by}; online weights: {best}", "sample the online weights: see EMA")
    if ours > WORSE:
        mend = "the model is untrained, or its latents, labels or path are not those it was trained with: see above"
        return Finding("denoising", WRONG, by, mend)
    if ours > GOOD:
        return Finding("denoising", SUSPECT, by, "the model has learned little more than the noise level: train longer")
    return Finding("denoising", OK, by)


@torch.no_grad()
def _shares(evidence: Evidence, weights: Mapping[str, Tensor], z_BCHW: Tensor, labels_B: Tensor) -> dict[float, float]:
    """Time -> mean square error of the velocity / that of the best linear guess.

    For data and noise of mean 0 and variance 1, x = alpha z + sigma n and v = alpha' z + sigma' n, the best linear
    guess of v from x errs by alpha'^2 + sigma'^2 - (alpha alpha' + sigma sigma')^2 / (alpha^2 + sigma^2).
    """
    model = build_dit(evidence.trained.stage_2.target, dit_params(evidence.trained, evidence.geometry))
    load_strictly(model, weights, evidence.folder, likely_cause(model.state_dict(), weights))
    model = model.to(evidence.device).eval()
    transport = Transport.from_config(evidence.sampling, evidence.geometry.latent_shape)
    index_B = torch.arange(len(z_BCHW), device=evidence.device)
    shares = {}
    for epoch, time in enumerate(TIMES):
        noise = rng.normal(SEED, epoch, index_B, Stream.NOISE, evidence.geometry.latent_shape)
        t_B = torch.full((len(z_BCHW),), time, device=evidence.device)
        x = transport.path.interpolate(z_BCHW, noise, t_B)
        velocity = transport.velocity(model(x, t_B, labels_B).float(), x, t_B)
        error = float((velocity - transport.path.target_velocity(z_BCHW, noise, t_B)).square().mean())
        c = transport.path.coefficients(torch.tensor(time))
        overlap = (c.alpha * c.d_alpha + c.sigma * c.d_sigma) ** 2 / (c.alpha**2 + c.sigma**2)
        shares[time] = error / float(c.d_alpha**2 + c.d_sigma**2 - overlap)
    return shares
