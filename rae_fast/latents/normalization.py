"""Mean and variance of a store: given in a file, or computed and written down.

Shapes: C, H, W of a latent.
"""

from __future__ import annotations

from pickle import UnpicklingError

import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.latents.layout import single_chunk_key
from rae_fast.latents.storage import Storage

MEAN, VAR = (single_chunk_key(f"stats/{name}", 3) for name in ("mean", "var"))


def load_statistics(path: str, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance float32 [C, H, W] of a `stat.pt`; either may be missing in it (0 and 1 then).

    Raises:
        UserError: it is not such a file, or of another size.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: content.get(name) for name in ("mean", "var")}
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {error}", "a stat.pt with `mean` and `var`") from error
    filled = []
    for name, default in (("mean", 0.0), ("var", 1.0)):
        value = torch.tensor(default) if found[name] is None else found[name].float()
        try:
            filled.append(value.broadcast_to(latent_shape))
        except RuntimeError as error:
            raise UserError(f"{path}: {name} has shape {list(value.shape)}", f"{list(latent_shape)}") from error
    return filled[0], filled[1]


def write_statistics(storage: Storage, mean: Tensor, var: Tensor) -> None:
    """Put mean and variance in place; the mean comes last and says that both are there."""
    for key, value in ((VAR, var), (MEAN, mean)):
        storage.write(key, value.float().contiguous().numpy().astype("<f4").tobytes())
