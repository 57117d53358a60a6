"""Encoders whose models come from transformers; a family says how its model is built and called.

Shapes: B images, S pixels a side, N tokens, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from rae_fast.encoders.base import EncoderFacts, EncoderOptions, FrozenEncoder
from rae_fast.encoders.files import CONFIG, image_statistics, model_folder, processor_folder, weights_sha256
from rae_fast.errors import UserError
from rae_fast.provenance import read_json

SHOWN = 3


class TransformerEncoder(FrozenEncoder):
    """Base of the families that transformers implements.

    Attributes:
        final_norms: attribute of the final norm by `model_type`.
        overrides: entries of the model's configuration to set while loading.
    """

    final_norms: ClassVar[dict[str, str]]
    overrides: ClassVar[dict[str, Any]] = {}

    @classmethod
    @abstractmethod
    def model_class(cls) -> Any:
        """The class of transformers with `from_pretrained`."""

    @classmethod
    @abstractmethod
    def count_prefix_tokens(cls, config: Any) -> int:
        """Class and register tokens in front of the patch tokens."""

    def call_arguments(self, pixels_B3SS: Tensor) -> dict[str, Any]:
        """What the model's `forward` takes besides the pixels."""
        return {}

    @classmethod
    def load(cls, options: EncoderOptions, input_size: int, config_path: str | None) -> Self:
        """Load from a local folder or the hub.

        Args:
            options: `encoder_params`.
            input_size: side that images are resized to, S pixels.
            config_path: folder or hub id whose image processor gives mean and std; None: the encoder's own.

        Raises:
            UserError: files are missing, incomplete or of another family, or S is no multiple of the patch size.
        """
        folder, revision = model_folder(options.name, options.revision)
        check_family(folder, tuple(cls.final_norms))
        model = load_transformer(cls.model_class(), folder, options, **cls.overrides)
        final_norm = _take_out(model, cls.final_norms[model.config.model_type])
        extra = [] if config_path in (None, options.name) else [processor_folder(config_path)]
        patch = model.config.patch_size
        facts = EncoderFacts(
            model.config.hidden_size,
            patch if isinstance(patch, int) else patch[0],
            *image_statistics(options, [*extra, folder]),
        )
        return cls(
            model,
            facts,
            final_norm=final_norm,
            prefix_tokens=cls.count_prefix_tokens(model.config),
            num_layers=model.config.num_hidden_layers,
            input_size=input_size,
            options=options,
            revision=revision,
            weights_sha256=weights_sha256(folder),
        )

    def block_tokens(self, pixels_B3SS: Tensor) -> Sequence[Tensor]:
        """Outputs [B, prefix + N, C] of the wanted blocks."""
        only_last = self.layers == (self.num_layers - 1,)
        arguments = self.call_arguments(pixels_B3SS)
        output = self.model(pixel_values=pixels_B3SS, output_hidden_states=not only_last, **arguments)
        if only_last:
            return [output.last_hidden_state]
        # The first hidden state is what enters the first block.
        return [output.hidden_states[layer + 1] for layer in self.layers]


def _take_out(model: nn.Module, name: str) -> nn.Module:
    """Replace the submodule of this name by the identity and return it."""
    parent = next(module for module in model.modules() if isinstance(getattr(module, name, None), nn.LayerNorm))
    norm = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    return norm


def check_family(folder: Path, families: Sequence[str]) -> None:
    """Refuse a folder whose config.json is of none of `families`.

    Raises:
        UserError: as said.
    """
    family = read_json(folder / CONFIG).get("model_type")
    if family not in families:
        raise UserError(
            f"{folder / CONFIG}: model_type is {family!r}",
            f"one of {', '.join(families)}",
            "set stage_1.params.encoder_cls to the encoder's family",
        )


def load_transformer(model_class: Any, folder: Path, options: EncoderOptions, **overrides: Any) -> Any:
    """A transformers model with all its weights from `folder`.

    Raises:
        UserError: weights are missing, of another shape, or unreadable.
    """
    from safetensors import SafetensorError

    try:
        settings: dict[str, Any] = {}
        if overrides:
            # As keywords of `from_pretrained`, entries that this version's configuration lacks would be refused.
            settings["config"] = model_class.config_class.from_pretrained(folder)
            for name, value in overrides.items():
                setattr(settings["config"], name, value)
        with _quiet():
            model, report = model_class.from_pretrained(
                folder,
                dtype=options.dtype,
                attn_implementation=options.attention,
                local_files_only=True,
                output_loading_info=True,
                **settings,
            )
    except ImportError as error:
        raise UserError(
            f"stage_1.params.encoder_params.attention is {options.attention!r}: {str(error).strip().splitlines()[0]}",
            "an implementation that is installed",
            "set it to sdpa",
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the encoder in {folder} cannot be loaded: {reason}", "whole weights that match its config.json"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"the encoder's weights in {folder} lack {len(missing)} tensors: {', '.join(missing[:SHOWN])}",
            f"all weights of {type(model).__name__}",
            "the file is of another model, or incomplete",
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of tensors that this encoder does not use, and its progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
