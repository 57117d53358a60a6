"""`rae-fast <tool> ...`: the tools of the folder `tools/`, wherever rae_fast is installed."""

from __future__ import annotations

import ast
import importlib.util
import sys

from rae_fast.errors import UserError, exit_cleanly, nearest
from rae_fast.shipped import tools


def main() -> None:
    """Run a tool as `python tools/<tool>.py` would; without a name, list them."""
    exit_cleanly(dispatch)


def dispatch() -> int | None:
    """What `main` does.

    Raises:
        UserError: there is no such tool.
    """
    known = tools()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: rae-fast <tool> ...   (rae-fast <tool> --help says more)\n")
        for tool, file in known.items():
            sentence = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
            print(f"  {tool:16} {sentence}")
        return 0
    if name not in known:
        raise UserError(f"rae-fast {name}{nearest(name, known)}", f"one of {', '.join(known)}")
    sys.argv = [f"rae-fast {name}", *sys.argv[2:]]
    specification = importlib.util.spec_from_file_location(known[name].stem, known[name])
    assert specification is not None and specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return tool.main()
