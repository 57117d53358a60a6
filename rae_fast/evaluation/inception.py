"""The network of FID, sFID and inception score, by torch-fidelity's code and weights.

Shapes: B images, H and W their sides or those of a feature map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.errors import UserError
from rae_fast.evaluation.extractor import FEATURES, LOGITS, SPATIAL, Extractor
from rae_fast.provenance import sha256_file
from rae_fast.weights import read_weights_file

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
SPATIAL_CHANNELS = 7


class Inception(Extractor):
    """The Inception network of torch-fidelity, which is that of the TensorFlow evaluators.

    `features`: pool_3, 2048 values. `spatial`: the first 7 channels of mixed_6/conv on its 17 x 17 grid, channels last,
    as ADM's evaluator takes them. `logits`: 1008 values without the bias.

    Args:
        weights: file of the weights; None: torch-fidelity's place in torch's hub folder.
        device: where it runs.

    Raises:
        UserError: the file is missing or holds something else.
    """

    name = "inception"

    def __init__(self, weights: str | Path | None, device: torch.device) -> None:
        place = Path(weights) if weights else inception_place()
        if not place.is_file():
            raise UserError(
                f"FID needs the Inception weights, and {place} does not exist",
                f"torch-fidelity's {INCEPTION_FILE}",
                f"curl -L --create-dirs -o {place} {INCEPTION_URL}, or tools/evaluate.py --inception-weights FILE",
            )
        read_weights_file(place)  # the library would run code that a pickle may hold
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(place)
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{place} does not fit Inception", f"torch-fidelity's {INCEPTION_FILE}") from error
        self._network, self._device = network.to(device).eval(), device
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        digest = sha256_file(place)
        known = INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[1]
        self.identity = {
            "network": "Inception v3 (2015-12-05) of torch-fidelity",
            "weights_sha256": digest,
            "comparable_with_published": digest.startswith(known),
        }

    def _keep(self, _: nn.Module, __: Any, output_B192HW: Tensor) -> None:
        self._spatial = output_B192HW[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        features, logits = self._network(images_B3HW.to(self._device))
        assert self._spatial is not None
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        return {FEATURES: features, SPATIAL: spatial, LOGITS: logits}


def inception_place() -> Path:
    """Where torch-fidelity keeps the Inception weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
