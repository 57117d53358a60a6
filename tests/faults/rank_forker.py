"""Starts ranks of the training tool by forking itself, so that a soak of many kills does not pay for imports each time.

Reads one JSON object a line: {"arguments": [...], "world": 2, "port": 29501, "output": "file"} starts ranks and
answers with their process ids; {"wait": [ids]} answers with their exit statuses, negative for a signal.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

TOOL = str(Path(__file__).parents[2] / "tools/train_dit.py")


def start_rank(order: dict, rank: int) -> int:
    """Fork one rank; the parent gets its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(order["world"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )
        sys.argv = [TOOL, *order["arguments"]]
        runpy.run_path(TOOL, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    # Everything that a rank imports, before the first fork; no operation of torch, which would start threads.
    import deepspeed  # noqa: F401

    import rae_fast.training.dit_trainer  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order["wait"]]
        else:
            answer = [start_rank(order, rank) for rank in range(order["world"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
