"""What every network has in common whose features sets of images are compared by.

It maps images to named features: `features` (Frechet distance, MMD, precision and recall), and where it has them
`spatial` (sFID) and `logits` (inception score).

Shapes: B images, D values of a feature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

FEATURES, SPATIAL, LOGITS = "features", "spatial", "logits"


class Extractor(ABC):
    """A frozen network with a name.

    Attributes:
        name: key of its figures in a report.
        identity: what its features depend on, for cache and report.
    """

    name: str
    identity: dict[str, Any]

    @abstractmethod
    def __call__(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Features float32 [B, D] by name, of images uint8 [B, 3, H, W] on any device."""
