"""Writes docs/configuration.md from the schema in rae_fast/config.py: `python docs/configuration.py`.

A test holds the page to the schema.
"""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from rae_fast import config as schema

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

One YAML describes a whole job; every tool takes `--config file.yaml` and any number of `key=value` with dotted keys
(`training.optimizer.lr=1e-4`, `cache.views=[original]`). The sections `stage_1 stage_2 transport sampler guidance misc
training eval gan` are the reference's, with its meanings; official files run unchanged, spellings such as `t-min`
included. A key that is not in these tables is an error that names the nearest one.

What can be derived is derived: sizes left out follow from the encoder, and sections that contradict each other are
refused with both keys named.

This page is generated from `rae_fast/config.py` by `python docs/configuration.py`.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for field in fields(schema.Config):
        section = get_type_hints(schema.Config)[field.name]
        if is_dataclass(section):
            parts.append(_section(field.name, section))
        else:
            comment = _comments(schema.Config)[field.name]
            parts.append(f"## `{field.name}`\n\n{_sentence(comment)}\n")
    parts.append(_dit_params())
    return "\n".join(parts)


def _section(name: str, section: type) -> str:
    rows = "\n".join(_rows(name, section))
    return f"## `{name}`\n\n{section.__doc__}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _rows(prefix: str, section: type) -> list[str]:
    hints, comments, rows = get_type_hints(section), _comments(section), []
    for field in fields(section):
        key, hint = f"{prefix}.{field.name}", hints[field.name]
        inner = next((t for t in (hint, *getattr(hint, "__args__", ())) if is_dataclass(t)), None)
        if inner is not None:
            rows += _rows(key, inner)
            continue
        meaning = comments.get(field.name, "")
        choices = schema.CHOICES.get(key)
        if choices and not all(choice in meaning for choice in choices):
            meaning = "; ".join(filter(None, [", ".join(choices), meaning]))
        rows.append(f"| `{key}` | {_type(hint)} | {_default(field)} | {meaning.replace('|', chr(92) + '|')} |")
    return rows


def _comments(section: type) -> dict[str, str]:
    """Each field's comment: behind it, or on the lines before it."""
    source = inspect.getsource(section)
    found: dict[str, str] = {}
    above: list[str] = []
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for number, line in enumerate(source.splitlines(), 1):
        name = re.match(r"    (\w+): ", line)
        if name is None:
            above = [*above, comments[number]] if number in comments else []
            continue
        found[name.group(1)] = comments.get(number) or " ".join(above)
        above = []
    return found


def _type(hint: object) -> str:
    name = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    return name.replace("typing.", "").replace("Any", "any").replace("NoneType", "None").replace("|", "or")


def _default(field: Field) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return "" if value is None else f"`{value}`"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _dit_params() -> str:
    from rae_fast.dit.ditdh import DiTDH
    from rae_fast.dit.lightning_dit import LightningDiT

    arguments = {}
    for model in (DiTDH, LightningDiT):
        described = dict(re.findall(r"^    +(\w+): (.+(?:\n {12,}.+)*)", model.__doc__ or "", re.M))
        for name, parameter in inspect.signature(model).parameters.items():
            arguments.setdefault(name, (described.get(name, ""), []))[1].append((model.__name__, parameter.default))
    rows = []
    for name, (meaning, defaults) in arguments.items():
        values = {repr(value) for _, value in defaults}
        shown = " / ".join(f"`{v}`" for v in dict.fromkeys(repr(v) for _, v in defaults))
        where = "" if len(defaults) == 2 or len(values) > 1 else f" ({defaults[0][0]} only)"
        rows.append(f"| `{name}` | {shown} | {' '.join(meaning.split())}{where} |")
    return (
        "## `stage_2.params`\n\nThe constructor's arguments of DiTDH (`stage2.models.DDT.DiTwDDTHead`) and "
        "LightningDiT (`stage2.models.lightningDiT.LightningDiT`); two defaults: the first is DiTDH's.\n\n"
        "| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
