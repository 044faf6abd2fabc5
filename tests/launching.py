"""Scripts in processes of their own: killed ones, and two that train together.

They are forked from a server that has imported everything but hfkd once, because the imports take longer than most of
these tests. Two real commands are left: `accelerate launch` in test_recipes.py and the one in test_scaling.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PRELOADED = [  # not hfkd: what is saved must load where nobody has heard of it
    "accelerate",
    "datasets",
    "evaluate",
    "kornia.augmentation",
    "matplotlib.pyplot",
    "scipy.stats",
    "sklearn.metrics",
    "torch._dynamo",
    "torch.distributed.nn",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
    "transformers.models.vit.modeling_vit",
    "transformers.models.vit_mae.modeling_vit_mae",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
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
    sys.stdout.reconfigure(line_buffering=True)  # what is printed last stands last
    if processes > 1:  # as torchrun sets them
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in values.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    gc.freeze()  # what the server imported is not searched for garbage after every run
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    sys.stderr.flush()
