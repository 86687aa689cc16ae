"""Two tasks of `test_transformers` in a process that may be killed, or in one of several; the same command goes on.

Takes a folder, rules with commas between, and the step of the second task at which the process kills itself.
"""

import os
import sys
from pathlib import Path

import torch
from test_transformers import two_tasks

from rwalk._parameters import bare

HALVES = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "ddp_backend": "gloo", "dropout": 0.0}


def main(folder, rules, *kill):
    for rule in rules.split(","):
        memory = two_tasks(Path(folder) / rule, rule, *map(int, kill), **(HALVES if "RANK" in os.environ else {}))
        if os.environ.get("RANK", "0") == "0":
            memory.save(Path(folder) / rule / "end.safetensors")
            torch.save(bare(memory.model).state_dict(), Path(folder) / rule / "end.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
