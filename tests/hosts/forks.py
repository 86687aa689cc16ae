"""Calls functions of a module of tests in forked children of a process that has imported it, since hosts take long to import.

The command line names the module. Each line of input is a JSON object: `function`, its `arguments`, and the number of `ranks`;
each rank's environment is what `torch.distributed.run` would set. Each line of output has the `statuses` of the children,
negative for a signal, and what they wrote to `stderr`.
"""

import gc
import json
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from importlib import import_module

import torch
import torch._dynamo  # DistributedDataParallel would load it in each child

from rwalk import kernels

PATIENCE = 90
"""Seconds after which ranks that wait for one another are given up."""


def main(name):
    torch.set_num_threads(1)  # no threads before a fork
    kernels.use("blocked")  # as the tests do
    module = import_module(name)
    gc.freeze()  # hosts collect garbage at the end of each training
    for line in sys.stdin:
        print(json.dumps(answer(module, **json.loads(line))), flush=True)


def answer(module, function, arguments, ranks=1):
    with tempfile.TemporaryFile("w+") as said, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = [
            (os.fork() or child(getattr(module, function), arguments, said, rank, ranks, port)) for rank in range(ranks)
        ]
        statuses, late = {}, time.monotonic() + PATIENCE
        while len(statuses) < ranks:
            for one in set(children) - statuses.keys():
                ended, status = os.waitpid(one, os.WNOHANG)
                if ended:
                    statuses[one] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > late:
                    os.kill(one, 9)
            time.sleep(0.01)
        said.seek(0)
        return {"statuses": [statuses[one] for one in children], "stderr": said.read()}


def child(function, arguments, said, rank, ranks, port):
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    status = 1
    try:
        warnings.simplefilter("ignore")
        if ranks > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in places.items()}
        function(*arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
