"""# In Lightning

`ConsolidationCallback` goes into the `Trainer`; your `LightningModule` stays as it is. One `fit` is one task: when it ends, the
memory is consolidated, and in the next one it holds the weights that earlier tasks need. Precision, clipping, accumulated
gradients, manual optimisation and `strategy="ddp"` work as usual.

Here a network learns the handwritten digits of scikit-learn three times, with the pixels shuffled anew for each task; first
without a memory, then with one. To run it: `pip install -e '.[lightning,sklearn]'`, then `python examples/with_lightning.py`.
"""

import logging

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from rwalk import RWalk
from rwalk.integrations.lightning import ConsolidationCallback

torch.set_num_threads(1)  # small networks are fastest with one

# A task is a way to shuffle the 64 pixels. 1500 images are for training, the other 297 for testing.

pixels, labels = (torch.as_tensor(column) for column in load_digits(return_X_y=True))
pixels = (pixels / 16).float()
orders = [torch.randperm(64, generator=torch.Generator().manual_seed(k)) for k in range(3)]
tasks = [TensorDataset(pixels[:1500, order], labels[:1500]) for order in orders]
tests = [(pixels[1500:, order], labels[1500:]) for order in orders]

# An ordinary module. A rule that measures on data, such as `EWC()`, needs a `forward` that takes the inputs of a batch.


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# The loop makes a new `Trainer` for each task, since a trainer never resets its count of epochs. All share the callback.


def learn(callbacks):
    seed_everything(0, verbose=False)
    model = Classifier()
    for task in tasks:
        trainer = Trainer(
            max_epochs=3,
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(task, batch_size=10, shuffle=True))
    with torch.no_grad():
        return [(model(x).argmax(1) == y).float().mean().item() for x, y in tests]


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
callback = ConsolidationCallback(RWalk(), strength=1.0)
without, held = learn([]), learn([callback])

# The accuracy on each task after the last one, and the contents of the memory:

for name, accuracies in (("without memory", without), ("with RWalk", held)):
    print(f"{name:<15}", " ".join(f"{a:7.1%}" for a in accuracies), f"  mean {sum(accuracies) / 3:.1%}")
print(callback.memory.summary())

# A logger receives the penalty as `memory/penalty` every `log_every_n_steps`, and the figures of the summary at the end of each
# task. Checkpoints contain the memory, too. So a script with this loop
#
#     keep = ModelCheckpoint(f"runs/task{k}", save_last=True)
#     Trainer(max_epochs=5, callbacks=[callback, keep]).fit(model, loader, ckpt_path="last")
#
# continues where it was when it is started again, however it was stopped. A `fit` that is interrupted leaves its task
# unfinished, and the next `fit` continues it. Lightning does not save the state of random generators, so dropout and shuffling
# are drawn anew.
#
# The rule sees the gradient that the optimiser uses, after clipping. Callbacks that average or restore weights when training
# ends run before ours, wherever they are in the list: their weights are the model and the anchor. Several optimisers, and
# strategies that shard (FSDP, DeepSpeed) or train in processes that end with `fit` (`ddp_spawn`, `ddp_fork`), are refused.
#
# Fabric needs no callback: build the consolidator with what `fabric.setup` returns, and call `memory.consolidate()` after
# each task.
#
#     model, optimizer = fabric.setup(model, optimizer)
#     memory = Consolidator(model, RWalk()).attach(optimizer)
#     fabric.save("run.ckpt", {"model": model, "optimizer": optimizer, "memory": memory})
