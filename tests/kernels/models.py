"""Small models and what they train on, for tests of kernels inside models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae_fast.dit import build_dit

CHANNELS, CLASSES = 6, 5


def small_model(std: float = 0.2, **changes: object) -> nn.Module:
    """A DiTDH of two trunk blocks and a head block with random weights everywhere, also where it would begin at zero.

    A kernel on a branch whose gate is zero would have no influence. `std` should fall with the width.
    """
    torch.manual_seed(0)
    params = {"input_size": 4, "in_channels": CHANNELS, "hidden_size": [16, 24], "depth": [2, 1], "num_heads": [2, 2]}
    model = build_dit("DiTDH", {**params, "num_classes": CLASSES, "class_dropout_prob": 0.0, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def small_batch(
    model: nn.Module, samples: int, step: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, t, y, velocity) of latents that cluster by class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (model.in_channels, model.input_size, model.input_size)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    z = torch.linspace(-1.5, 1.5, CLASSES)[y, None, None, None] + 0.3 * torch.randn(
        samples, *shape, generator=generator
    )
    noise, t = torch.randn(samples, *shape, generator=generator), torch.rand(samples, generator=generator)
    x = torch.lerp(z, noise, t[:, None, None, None])
    return tuple(tensor.to(device) for tensor in (x, t, y, noise - z))


def loss_curve(
    model: nn.Module, steps: int, samples: int, device: str = "cpu", dtype: torch.dtype | None = None
) -> Tensor:
    """Losses of training by AdamW from the model's weights; under autocast where `dtype` is given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        x, t, y, velocity = small_batch(model, samples, step, device)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = (model(x, t, y).float() - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()
