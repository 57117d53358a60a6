"""Sources that are many files: folders, patterns with *, and ranges in braces."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rae_fast.errors import UserError


def expand(source: str, suffix: str, what: str) -> list[str]:
    """Files that a folder, a name, or a pattern with * and {000..012} stands for, in order.

    Raises:
        UserError: there are none, or one that the pattern names is missing.
    """
    if Path(source).is_dir():
        found = sorted(str(path) for path in Path(source).rglob(f"*{suffix}"))
    else:
        found = []
        for name in expand_braces(source):
            files = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (the pattern may be absolute)
            if not files:
                raise UserError(f"data.source: {name} does not exist", f"a folder, file or pattern of {what}")
            found += files
    if not found:
        raise UserError(f"data.source {source} holds no {what}", f"files ending in {suffix}")
    return found


def expand_braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` and `{train,val}-*.tar` written out, in order.

    Raises:
        UserError: a range runs backwards.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for number, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if number % 2 else None
        if span:
            first, last = span.groups()
            if int(last) < int(first):
                raise UserError(f"data.source: {{{part}}} runs backwards", f"{{{last}..{first}}}")
            choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if number % 2 else [part])
    return ["".join(choice) for choice in product(*choices)]


def shown_names(files: Sequence[str]) -> list[str]:
    """The files' names relative to the folder that they share: the same wherever the data set lies."""
    base = os.path.commonpath([Path(file).parent for file in files])
    return [os.path.relpath(file, base) for file in files]
