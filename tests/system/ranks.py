"""Runs functions of `ranked` on several ranks: forked children of a process that has loaded everything, joined by gloo.

Reads one JSON object a line: `case`, the function's name; `world`, how many ranks; `arguments`; `out`, a folder in which each
rank saves what the function returns. Answers with an empty object, or with the `error` of the ranks that failed.
"""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import ranked
import torch
import torch._dynamo  # the engines load it when a model is put under them: more than a second in each child
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch import distributed

PATIENCE = 60
"""Seconds after which ranks that wait for one another are given up."""


def main():
    torch.set_num_threads(1)  # no threads before a fork
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


def answer(case, world, arguments, out):
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _child(case, rank, world, arguments, Path(out))
        children.append(child)
    late = time.monotonic() + PATIENCE
    while children and time.monotonic() < late:
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        time.sleep(0.01)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    errors = [path.read_text() for path in sorted(Path(out).glob("*.error"))]
    return {"error": "\n".join(errors) or "the ranks wait for one another"} if errors or children else {}


def _child(case, rank, world, arguments, out):
    status = 1
    os.dup2(2, 1)  # gloo reports its connections on the output of some releases of PyTorch, where answers belong
    try:
        store = distributed.FileStore(str(out / "store"), world)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE))
        torch.save(getattr(ranked, case)(**arguments), out / f"{rank}.pt")
        distributed.destroy_process_group()
        status = 0
    except BaseException:
        (out / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
