"""A memory inside Lightning's Trainer gives, to the bit, what it gives in the loop written out here."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs Lightning: make test-integrations")

from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from rwalk import EWC, MAS, SI, Consolidator, RWalk
from rwalk.integrations.lightning import ConsolidationCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).to(dtype)


class Net(LightningModule):
    def __init__(self, optimizer="sgd", dtype=torch.float64):
        super().__init__()
        self.net, self.optimizer = network(dtype), optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer]((p for p in self.parameters() if p.requires_grad))


def loaders(tasks=2, dtype=torch.float64, size=42):
    generator = torch.Generator().manual_seed(1)
    for _ in range(tasks):
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(3, (size,), generator=generator)
        yield DataLoader(TensorDataset(x, y), batch_size=8)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=[*callbacks], **({"accelerator": "cpu", "devices": 1, "max_epochs": 1} | quiet | options))


def fits(callback, model=None, tasks=2, size=42, **options):
    model = model or Net()
    for loader in loaders(tasks, size=size):
        trainer(callback, **options).fit(model, loader)
    return model


def by_hand(rule, strength=None, optimizer="sgd", epochs=1, accumulate=1, clip=lambda parameters, memory: None, tasks=2, **options):
    """The same training, written out."""
    model = network()
    memory = Consolidator(model, rule, strength, **options)
    for loader in loaders(tasks):
        memory.attach(step := OPTIMIZERS[optimizer](model.parameters()))
        for _ in range(epochs):
            for i, (x, y) in enumerate(loader):
                (F.cross_entropy(model(x), y) / accumulate).backward()
                if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                    clip(model.parameters(), memory)
                    step.step()
                    step.zero_grad()
        memory.consolidate(loader)
        memory.detach()
    return memory


def same(memory, truth, tolerance=0.0):
    assert memory.tasks == truth.tasks
    ours, theirs = memory.state_dict(), truth.state_dict()
    for name, p in truth.model.state_dict().items():
        torch.testing.assert_close(memory.model.state_dict()[f"net.{name}"], p, rtol=tolerance, atol=tolerance)
    for part in ("point", "omega"):
        for name, value in theirs["anchor"][part].items():
            torch.testing.assert_close(ours["anchor"][part][f"net.{name}"], value, rtol=tolerance, atol=tolerance)
    assert any(value.abs().sum() > 0 for value in theirs["anchor"]["omega"].values())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "rule", [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), SI(), EWC(), MAS(), None], ids=lambda r: type(r).__name__
)
def test_every_kind_of_rule_gives_what_the_loop_gives(rule, optimizer):
    callback = ConsolidationCallback(rule, strength=0.5)
    fits(callback, Net(optimizer))
    same(callback.memory, by_hand(rule, 0.5, optimizer))


class Validated(Net):
    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))


def test_epochs_validation_and_a_consolidator_of_ones_own():
    model = Validated()
    callback = ConsolidationCallback(Consolidator(model, RWalk(delta_t=3), 0.5))
    for loader in loaders():
        trainer(callback, max_epochs=3, val_check_interval=2).fit(model, loader, loader)
        trainer(callback).validate(model, loader, verbose=False)
    same(callback.memory, by_hand(RWalk(delta_t=3), 0.5, epochs=3))


def test_accumulated_gradients_are_one_step_and_so_is_what_an_epoch_leaves():
    callback = ConsolidationCallback(RWalk(delta_t=2), strength=0.5)
    fits(callback, accumulate_grad_batches=4, max_epochs=2)
    same(callback.memory, by_hand(RWalk(delta_t=2), 0.5, accumulate=4, epochs=2))


NORM, VALUE = {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("options", "clip"), [
    (NORM, lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.1)),
    (VALUE, lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.02)),
], ids=["norm", "value"])  # fmt: skip
def test_the_rule_sees_clipped_gradients_unless_asked(options, clip, before):
    def clipping(parameters, memory):
        if before:
            memory.before_clip()
        clip(parameters)

    callback = ConsolidationCallback(RWalk(delta_t=3), strength=0.5, before_clip=before)
    fits(callback, **options)
    same(callback.memory, by_hand(RWalk(delta_t=3), 0.5, clip=clipping))


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def test_manual_optimisation():
    callback = ConsolidationCallback(RWalk(delta_t=3), strength=0.5)
    fits(callback, Manual())
    same(callback.memory, by_hand(RWalk(delta_t=3), 0.5))


def test_one_trainer_for_all_tasks():
    callback, model = ConsolidationCallback(RWalk(delta_t=3), strength=0.5), Net()
    one = trainer(callback)
    for k, loader in enumerate(loaders()):
        one.fit_loop.max_epochs = k + 1
        one.fit(model, loader)
    same(callback.memory, by_hand(RWalk(delta_t=3), 0.5))


def test_a_fit_without_a_step_says_why():
    callback, model = ConsolidationCallback(RWalk()), Net()
    one, (first, second) = trainer(callback), loaders()
    one.fit(model, first)
    with pytest.warns(UserWarning, match=r"Got a `fit` without a training step.*make a new one for each task"):
        one.fit(model, second)
    assert callback.memory.tasks == 1


def test_a_part_of_the_loader_is_what_rules_measure_on():
    callback, model = ConsolidationCallback(EWC(), strength=0.5), Net()
    (loader,) = loaders(1)
    trainer(callback, limit_train_batches=2).fit(model, loader)
    truth = Consolidator(model, EWC(), strength=0.5)
    truth.estimate(list(loader)[:2])
    torch.testing.assert_close(dict(callback.memory.anchor.omega), dict(truth.anchor.omega))


def test_logits_are_read_as_the_user_says():
    masked = ConsolidationCallback(EWC(), logits=lambda output: output[:, :2])
    model = Net()
    loader = DataLoader(TensorDataset(torch.randn(8, 6, dtype=torch.float64), torch.randint(2, (8,))), batch_size=4)
    trainer(masked).fit(model, loader)
    omega = masked.memory.anchor.omega["net.2.bias"]
    assert omega[2] == 0
    assert (omega[:2] > 0).all()


class Converted(Net):
    """Batches arrive as other types, and become what the model takes on their way."""

    def on_before_batch_transfer(self, batch, index):
        return batch["input"].view(-1, 6), batch["target"]


def test_batches_go_the_way_of_training_batches():
    class Dicts(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return {"input": x.view(2, 3), "target": y}

    callback, model = ConsolidationCallback(EWC(), strength=0.5), Converted()
    for loader in loaders():
        trainer(callback).fit(model, DataLoader(Dicts(*loader.dataset.tensors), batch_size=8))
    same(callback.memory, by_hand(EWC(), 0.5))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
@pytest.mark.parametrize("rule", [RWalk(delta_t=3), EWC()], ids=lambda r: type(r).__name__)
def test_precisions(precision, dtype, rule):
    """Lightning makes modules and batches what a precision asks for; the truth is a loop that does the same."""
    callback, model = ConsolidationCallback(rule, strength=0.5), Net(dtype=torch.float32)
    truth = network(torch.float32).to(dtype)
    memory = Consolidator(truth, rule, 0.5)
    for loader in loaders(dtype=torch.float32):
        trainer(callback, precision=precision).fit(model, loader)
        memory.attach(step := OPTIMIZERS["sgd"](truth.parameters()))
        batches = [(x.to(dtype), y) for x, y in loader]
        for x, y in batches:
            step.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = F.cross_entropy(truth(x), y)
            loss.backward()
            step.step()
        memory.consolidate(batches)
    assert next(model.parameters()).dtype == dtype
    same(callback.memory, memory, 1e-6)


@pytest.mark.parametrize(("optimizer", "clip", "before"), [("sgd", None, False), ("sgd", 0.1, True), ("fused", None, False)])
def test_loss_scaling(optimizer, clip, before):
    """A loss scale that overflows at first and then leaves no trace."""

    def scaling():
        return torch.amp.GradScaler("cpu", init_scale=2.0**20)

    callback, model = ConsolidationCallback(RWalk(delta_t=3), strength=0.5, before_clip=before), Net(optimizer, torch.float32)
    truth = network(torch.float32)
    memory = Consolidator(truth, RWalk(delta_t=3), 0.5)
    for loader in loaders(dtype=torch.float32):
        plugin = MixedPrecision("16-mixed", "cpu", scaling())
        trainer(callback, plugins=[plugin], gradient_clip_val=clip, max_epochs=2).fit(model, loader)
        memory.attach(step := OPTIMIZERS[optimizer](truth.parameters()))
        scaler = scaling()
        for x, y in [*loader, *loader]:
            step.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(truth(x), y)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(step)
                memory.before_clip(scaler)
                torch.nn.utils.clip_grad_norm_(truth.parameters(), clip)
            scaler.step(step)
            scaler.update()
        memory.consolidate()
    assert memory.skipped + callback.memory.skipped == 0 or optimizer == "fused"
    same(callback.memory, memory, 1e-7)
