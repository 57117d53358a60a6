"""Writes docs/messages.md, every error of the program with its cure, from the code: `python docs/messages.py`.

A test holds the page to the code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 48  # characters of a variable part
PAGE = Path(__file__).with_name("messages.md")
INTRODUCTION = """# Every error and its cure

Bad input ends a tool with status 2 and one line: `error: what was found; expected what would have been right; how to
mend it`. Words in ⟨⟩ stand for names and numbers of the case. Symptoms that come without an error are in
[troubleshooting.md](troubleshooting.md).

This page is generated from the code by `python docs/messages.py`.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for folder, rows in _messages().items():
        parts.append(f"## {folder}\n\n| found | expected | mend |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _messages() -> dict[str, list[str]]:
    """Table rows by folder, in the order of the files."""
    found: dict[str, list[str]] = {}
    files = [*sorted((ROOT / "rae_fast").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and node.args:
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                parts = [*node.args, *[None] * 3][:3]
                parts = [
                    part or named.get(name) for part, name in zip(parts, ("found", "expected", "mend"), strict=True)
                ]
                rows = found.setdefault(str(file.parent.relative_to(ROOT)), [])
                row = "| " + " | ".join(_text(part) for part in parts) + " |"
                if row not in rows:
                    rows.append(row)
    return found


def _text(node: ast.expr | None) -> str:
    """What an expression that makes a text says, its variable parts in ⟨⟩."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return _escape(str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.BoolOp):
        return _text(node.values[-1])
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (_text(node.body), _text(node.orelse))))
    if isinstance(node, ast.FormattedValue):
        return _text(node.value)
    return f"⟨{_word(node)}⟩"


def _word(node: ast.expr) -> str:
    """A readable word for a variable part."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "join":
        node = node.args[0]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "nearest":
        return "did you mean ...?"
    text = ast.unparse(node)
    return _escape(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...")


def _escape(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
