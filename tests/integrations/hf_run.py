"""Two tasks under Trainer, in a process that may be killed, or in one of several; the same command goes on where it can.

Takes a folder, rules with commas between, and the step of the second task at which the process kills itself.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

sys.path.append(str(Path(__file__).parent))

import test_transformers as here

from rwalk import EWC, RWalk
from rwalk.integrations.transformers import ConsolidationCallback
from rwalk.parameters import bare

RULES = {"rwalk": RWalk(delta_t=3), "recipe": None, "ewc": EWC()}


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def two_tasks(folder, rule, kill=None, **options):
    """Return the memory after two tasks, which go on from checkpoints that are there."""
    model = here.bert(options.pop("dropout", 0.1))
    callback = ConsolidationCallback(RULES[rule], strength=0.5)
    for task in (0, 1):
        out = folder / str(task)
        settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
        settings |= options
        callbacks = [callback, *([Kill(kill)] if kill and task else [])]
        trainer = here.trainer(out, model, here.sentences(task, 32), callbacks, here.mean_over_the_step, **settings)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.is_dir() else None)
    return callback.memory


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rules, *kill = sys.argv[1:]
    ranks = {}
    if "WORLD_SIZE" in os.environ:
        ranks = {
            "per_device_train_batch_size": 2,
            "train_sampling_strategy": "sequential",
            "ddp_backend": "gloo",
            "dropout": 0.0,
        }
    for rule in rules.split(","):
        memory = two_tasks(Path(folder) / rule, rule, *map(int, kill), **ranks)
        if os.environ.get("RANK", "0") == "0":
            memory.save(Path(folder) / rule / "end.safetensors")
            torch.save(bare(memory.model).state_dict(), Path(folder) / rule / "end.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
