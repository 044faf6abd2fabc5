"""Scripts in processes of their own: killed ones, and two that train together.

They are forked from a server that has imported everything once, because the imports take longer than most of these tests.
The recipes' tests start real commands, `accelerate launch` and torchrun among them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PRELOADED = [
    "hfkd.testing",
    "hfkd.trainers.self_distillation",
    "hfkd.trainers.collaborative",
    "hfkd.models.two_view_mae",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


@dataclass
class Done:
    returncode: int  # of the first process that failed; minus the signal that ended it
    stderr: str  # all that was printed, also to stdout


def started(
    script: Path | str, *words: str, log: Path, processes: int = 1
) -> list[multiprocessing.process.BaseProcess]:
    """`python script words...`, or the same under a launcher; what they print goes to files in the folder `log`."""
    log.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = range(processes)
    found = [
        CONTEXT.Process(target=_run, args=(str(script), words, rank, processes, port, str(log / f"printed-{rank}.txt")))
        for rank in ranks
    ]
    for process in found:
        process.start()
    return found


def run(script: Path | str, *words: str, log: Path, processes: int = 1, timeout: float = 400) -> Done:
    found, deadline = started(script, *words, log=log, processes=processes), time.monotonic() + timeout
    try:
        while any(p.is_alive() for p in found) and not any(p.exitcode for p in found) and time.monotonic() < deadline:
            time.sleep(0.02)
        failed = [p for p in found if p.exitcode]
    finally:
        for process in found:
            if process.exitcode != 0:
                process.kill()  # the others wait for the one that failed
            process.join()
    code = failed[0].exitcode if failed else next((p.exitcode for p in found if p.exitcode), 0)
    return Done(int(code or 0), "\n".join((log / f"printed-{rank}.txt").read_text() for rank in range(processes)))


def _run(script: str, words: tuple[str, ...], rank: int, processes: int, port: int, printed: str) -> None:
    with open(printed, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if processes > 1:  # as torchrun sets them
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in values.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    sys.stderr.flush()
