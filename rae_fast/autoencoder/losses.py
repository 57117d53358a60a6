"""Losses of decoder training: pixels, perception, and the two sides of the adversarial game.

Shapes: B images, 3 x H x W pixels in [0, 1] unless said otherwise; logits have any shape.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rae_fast.errors import UserError
from rae_fast.patches import embed_patches
from rae_fast.weights import read_weights_file

if TYPE_CHECKING:
    from rae_fast.encoders import FrozenEncoder

FEATURE_LAYERS = 4
VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
VGG_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # indices in torchvision's `features`


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is: no loss is taken in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- adversarial ----------------------------------------------------------------------------------------------------


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(mean softplus(-real) + mean softplus(fake)) / 2."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """-mean(fake): the generator's side of the hinge game, and what the reference calls vanilla."""
    return -fake.mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_discriminator_loss,
    "vanilla": vanilla_discriminator_loss,
}


def adaptive_weight(reconstruction_grad: Tensor, adversarial_grad: Tensor, largest: float = 1e4) -> Tensor:
    """|grad rec| / (|grad gan| + 1e-6), at most `largest`: balances the two at the decoder's last layer (VQGAN, eq. 7).

    Args:
        reconstruction_grad: gradient of L1 + perceptual with respect to the last layer's weight, of all ranks.
        adversarial_grad: likewise of the adversarial loss.
    """
    ratio = at_least_float32(reconstruction_grad).norm() / (at_least_float32(adversarial_grad).norm() + 1e-6)
    return ratio.clamp(0.0, largest)


# --- perceptual -----------------------------------------------------------------------------------------------------


class Lpips(nn.Module):
    """LPIPS with VGG16 (Zhang et al., CVPR 2018), by the lpips package and its linear heads.

    Args:
        vgg: state dict of torchvision's VGG16 (`features.<i>.weight`, `features.<i>.bias`); the classifier is unused.
    """

    def __init__(self, vgg: Mapping[str, Tensor]) -> None:
        super().__init__()
        import lpips  # imports torchvision

        with torch.device("meta"), warnings.catch_warnings():
            # meta: skips the random start values of 138 M weights that are replaced anyway
            warnings.simplefilter("ignore")  # lpips speaks to torchvision in its old spelling
            self.network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        weights = dict(torch.load(heads_file, map_location="cpu", weights_only=True))
        for name in self.network.state_dict():
            if name.startswith("net.slice"):
                _, _, layer, kind = name.split(".")
                weights[name] = vgg[f"features.{layer}.{kind}"].float()
        self.network.load_state_dict(weights, strict=False, assign=True)
        assert not any(tensor.is_meta for tensor in self.network.state_dict().values())
        self.requires_grad_(False)
        self.eval()

    def forward(self, recon_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Mean distance between images in [0, 1], a scalar."""
        return self.distances(recon_B3HW, target_B3HW).mean()

    def distances(self, recon_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Distance of each pair of images in [0, 1], [B]."""
        return self.network(target_B3HW, recon_B3HW, normalize=True).flatten()


class EncoderPerceptual(nn.Module):
    """Distance in the frozen encoder's own features, for machines without VGG weights.

    The mean over layers of sum_c (f_c(x) - f_c(y))^2 with features of unit length in each token, as in LPIPS without
    learned heads.

    Args:
        features: images [B, 3, H, W] in [0, 1] -> a list of token features [B, N, C], differentiable.
    """

    def __init__(self, features: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.features = features

    def forward(self, recon_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Mean distance between images in [0, 1], a scalar."""
        with torch.no_grad():
            target = self.features(target_B3HW)
        recon = self.features(recon_B3HW)
        distances = [_token_distance(ours, theirs) for ours, theirs in zip(recon, target, strict=True)]
        return torch.stack(distances).mean()


def _token_distance(x_BNC: Tensor, y_BNC: Tensor) -> Tensor:
    x_BNC, y_BNC = (F.normalize(at_least_float32(part), dim=-1) for part in (x_BNC, y_BNC))
    return (x_BNC - y_BNC).square().sum(dim=-1).mean()


def encoder_features(encoder: FrozenEncoder) -> Callable[[Tensor], list[Tensor]]:
    """What `EncoderPerceptual` compares: patch tokens [B, N, C] after four evenly spaced blocks at most.

    Gradients flow back to the images. Blocks come before the encoder's final norm.
    """
    last = encoder.num_layers - 1
    probe = copy.copy(encoder)  # shares the weights; only `layers` is its own
    probe.layers = tuple(sorted({round(last * (i + 1) / FEATURE_LAYERS) for i in range(FEATURE_LAYERS)}))

    def features(images_B3HW: Tensor) -> list[Tensor]:
        pixels = probe.prepare(images_B3HW).to(probe.options.dtype)
        with PatchConvolutionsAsProducts() if pixels.device.type == "cpu" else nullcontext():
            return [tokens[:, probe.prefix_tokens :] for tokens in probe.block_tokens(pixels)]

    return features


class PatchConvolutionsAsProducts(TorchFunctionMode):
    """Runs convolutions whose patches tile the image as matrix products.

    On a CPU, oneDNN's backward pass of a 16 x 16 convolution with stride 16 takes 14 times as long.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a tiling `conv2d`; run everything else as it is."""
        kwargs = kwargs or {}
        if func is torch.conv2d and len(args) == 7 and not kwargs:
            x, weight, bias, stride, padding, dilation, groups = args
            if stride == tuple(weight.shape[2:]) and padding == (0, 0) and dilation == (1, 1) and groups == 1:
                grid = x.shape[-2] // stride[0], x.shape[-1] // stride[1]
                return embed_patches(x, weight, bias).transpose(1, 2).unflatten(2, grid)
        return func(*args, **kwargs)


def find_vgg_weights(path: str | None = None) -> Path | None:
    """The VGG16 weights file: the given one, else torchvision's cache, else None."""
    place = Path(path) if path else _cached_vgg()
    return place if place.is_file() else None


def load_lpips(path: str | None = None) -> Lpips:
    """LPIPS with the pretrained VGG16 from `path` or torchvision's cache.

    Raises:
        UserError: the file is absent, unreadable or not VGG16.
    """
    place = find_vgg_weights(path)
    if place is None:
        raise UserError(
            f"LPIPS needs VGG16 weights, and {path or _cached_vgg()} does not exist",
            f"torchvision's {VGG_FILE}",
            f"curl --create-dirs -o {path or _cached_vgg()} {VGG_URL}, or name the file in gan.loss.lpips_weights, "
            "or set gan.loss.perceptual=encoder",
        )
    try:
        return Lpips(read_weights_file(place))
    except (KeyError, TypeError) as error:
        raise UserError(f"{place} lacks {error}", f"torchvision's {VGG_FILE}") from error


def _cached_vgg() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
