"""Why samples are noise: every link from the store to the sampled weights, in the order in which data flows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rae_fast.doctor.denoising import check_denoising
from rae_fast.doctor.evidence import gather
from rae_fast.doctor.findings import Finding
from rae_fast.doctor.latents import check_latents
from rae_fast.doctor.settings import check_settings
from rae_fast.doctor.weights import check_weights


def examine_run(folder: Path, config_file: str | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
    """All findings about a run of tools/train_dit.py or tools/train_decoder.py.

    Args:
        folder: the run folder.
        config_file: the YAML that samples are drawn with; None: the run's own.
        overrides: dotted key=value of the sampling, as stage_1.params.pretrained_decoder_path=<file>.

    Raises:
        UserError: there is no run, no checkpoint in it, or a config that cannot be read.
    """
    evidence, findings = gather(folder, config_file, overrides)
    findings += check_latents(evidence)
    if not evidence.is_decoder:
        findings += check_settings(evidence)
    findings += check_weights(evidence)
    if not evidence.is_decoder:
        findings += check_denoising(evidence)
    return findings
