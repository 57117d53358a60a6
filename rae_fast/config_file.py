"""Reads the YAML and the command line into a `Config`.

Official files of bytetriper/RAE load as they are, dashed and legacy spellings included; an unknown key is an error
that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import rae_fast.config
from rae_fast.config import CHOICES, DIT_PARAMS, Config, GuidanceModel, Stage2
from rae_fast.errors import UserError, nearest
from rae_fast.shipped import shipped

# Spellings of older official files, by section: old key -> where its value goes now.
LEGACY_TRAINING = {
    "base_lr": ("scheduler", "base_lr"),
    "final_lr": ("scheduler", "final_lr"),
    "schedule_type": ("scheduler", "type"),
    "warmup_steps": ("scheduler", "warmup_steps"),
    "warmup_epochs": ("scheduler", "warmup_epochs"),
    "decay_start_epoch": ("scheduler", "warmup_epochs"),
    "decay_end_epoch": ("scheduler", "decay_end_epoch"),
    "beta": ("optimizer", "betas"),
    "wd": ("optimizer", "weight_decay"),
    "log_every": ("log_interval",),
    "ckpt_every": ("checkpoint_every",),
}


def load_config(path: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or its content as a mapping, and dotted `key=value` overrides into a `Config`.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a value has the wrong type or is not one of
            the choices.
    """
    raw = _modernize(dict(path) if isinstance(path, Mapping) else _read_yaml(path) if path else {})
    for override in overrides:
        raw = _plain(OmegaConf.merge(raw, _modernize(_parse_override(override))))
    origin = "a stored config" if isinstance(path, Mapping) else str(path) if path else "command line"
    _check_keys(raw, Config, "", origin)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), raw))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise UserError(f"{origin}: {key}: {str(error).splitlines()[0]}", _expected_type(str(key))) from error
    assert isinstance(config, Config)
    _check_choices(config, origin)
    return config


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(shipped(path))
    except FileNotFoundError as error:
        raise UserError(f"config file {path} does not exist", "a YAML file", "see configs/ for examples") from error
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}", "a YAML file") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"config file {path} holds a list", "a mapping of sections")
    return _plain(loaded)


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, _ = override.partition("=")
    if not separator or not key or key.startswith("-"):
        raise UserError(f"argument {override!r}", "key=value with dotted keys, as training.max_steps=100")
    try:
        return _plain(OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"argument {override!r}: {' '.join(str(error).split())}", "key=value") from error


def _plain(node: Any) -> dict[str, Any]:
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return content


def _modernize(raw: dict[str, Any]) -> dict[str, Any]:
    """Bring official spellings, old ones included, to the names of the schema."""
    raw = _spelt_out(raw)
    training = raw.get("training")
    if isinstance(training, dict):
        if training.get("schedule_type") is not None or "base_lr" in training:
            lr = training.get("base_lr")
            if lr is not None:
                training.setdefault("optimizer", {}).setdefault("lr", lr)
        for old, place in LEGACY_TRAINING.items():
            if old in training:
                _put(training, place, training.pop(old))
        for section in (training, raw.get("gan", {}).get("disc", {}) if isinstance(raw.get("gan"), dict) else {}):
            _modernize_optimizer(section)
    guidance = raw.get("guidance")
    if isinstance(guidance, dict) and guidance.get("guidance_model") == {}:
        guidance["guidance_model"] = None
    return raw


def _modernize_optimizer(section: dict[str, Any]) -> None:
    optimizer = section.get("optimizer")
    if not isinstance(optimizer, dict):
        return
    for old, new in (("beta", "betas"), ("wd", "weight_decay")):
        if old in optimizer:
            optimizer.setdefault(new, optimizer.pop(old))
    if isinstance(optimizer.get("type"), str):
        optimizer["type"] = optimizer["type"].lower()


def _put(mapping: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for key in place[:-1]:
        mapping = mapping.setdefault(key, {})
    mapping.setdefault(place[-1], value)


def _spelt_out(node: Any) -> Any:
    """Keys with underscores (official sampling files write `t-min`, training files `t_min`), `~/` as the home folder.

    The shell leaves the `~` of cache.path=~/store as it is.
    """
    if isinstance(node, Mapping):
        return {str(key).replace("-", "_"): _spelt_out(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_spelt_out(value) for value in node]
    return str(Path(node).expanduser()) if isinstance(node, str) and node.startswith("~/") else node


def _check_keys(raw: Mapping[str, Any], schema: type, prefix: str, origin: str) -> None:
    known = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in raw.items():
        if key not in known:
            raise _unknown_key(origin, prefix + key, key, known)
        section = SECTIONS.get((schema, key))
        if section is not None and isinstance(value, Mapping):
            _check_keys(value, section, f"{prefix}{key}.", origin)
        elif section is not None and value is not None:
            raise UserError(f"{origin}: {prefix}{key} is {value!r}", "a mapping of keys")
        if schema in (Stage2, GuidanceModel) and key == "params" and isinstance(value, Mapping):
            for name in value:
                if name not in DIT_PARAMS:
                    raise _unknown_key(origin, f"{prefix}params.{name}", name, DIT_PARAMS)


def _unknown_key(origin: str, path: str, name: str, known: Iterable[str]) -> UserError:
    hint = nearest(name, known)
    return UserError(f"{origin}: unknown key {path}{hint}", "" if hint else f"one of {', '.join(known)}")


def _sections(schema: type) -> dict[tuple[type, str], type]:
    """(dataclass, field) -> dataclass of that field, over the whole tree."""
    found: dict[tuple[type, str], type] = {}
    for f in dataclasses.fields(schema):
        names = [name.strip() for name in str(f.type).split("|")]
        for name in names:
            inner = getattr(rae_fast.config, name, None)
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                found[(schema, f.name)] = inner
                found.update(_sections(inner))
    return found


SECTIONS = _sections(Config)


def _expected_type(key: str) -> str:
    schema: Any = Config
    parts = key.split(".")
    for part in parts[:-1]:
        schema = SECTIONS.get((schema, part))
        if schema is None:
            return ""
    kinds = {f.name: str(f.type) for f in dataclasses.fields(schema)}
    return kinds.get(parts[-1].split("[")[0], "")


def _check_choices(config: Config, origin: str) -> None:
    for key, choices in CHOICES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value not in choices:
            hint = nearest(str(value), choices)
            raise UserError(f"{origin}: {key} is {value!r}{hint}", f"one of {', '.join(choices)}")
    for view in config.cache.views:
        if view not in ("original", "hflip"):
            raise UserError(f"{origin}: cache.views holds {view!r}", "original, hflip")
    guidance = config.guidance
    if guidance.method == "autoguidance" and guidance.scale > 1 and guidance.guidance_model is None:
        raise UserError(
            f"{origin}: guidance.method is autoguidance without guidance.guidance_model", "target, params and ckpt"
        )
