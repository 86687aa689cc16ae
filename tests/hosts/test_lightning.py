"""A memory inside Lightning's Trainer gives, to the bit, what it gives in the loop written out here."""

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

pytest.importorskip("lightning", reason="needs Lightning: make test-integrations")

from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy

from rwalk import EWC, MAS, SI, Consolidator, RWalk
from rwalk.integrations.lightning import ConsolidationCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
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


class LightningNet(LightningModule):
    def __init__(self, optimizer="sgd", dtype=torch.float64):
        super().__init__()
        self.net, self.optimizer = network(dtype), optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](p for p in self.parameters() if p.requires_grad)


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
    model = model or LightningNet()
    for loader in loaders(tasks, size=size):
        trainer(callback, **options).fit(model, loader)
    return model


def by_hand(rule, strength=None, optimizer="sgd", epochs=1, accumulate=1, clip=lambda parameters: None, tasks=2, **options):
    """The same training, written out."""
    model = network()
    memory = Consolidator(model, rule, strength, **options)
    for loader in loaders(tasks):
        memory.attach(step := OPTIMIZERS[optimizer](model.parameters()))
        for _ in range(epochs):
            for i, (x, y) in enumerate(loader):
                (F.cross_entropy(model(x), y) / accumulate).backward()
                if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                    clip(model.parameters())
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
    for name, value in theirs["anchor"]["point"].items():
        torch.testing.assert_close(ours["anchor"]["point"][f"net.{name}"], value, rtol=tolerance, atol=tolerance)
    held, importance = memory.anchor.importance(), truth.anchor.importance()
    for name, value in importance.items():
        torch.testing.assert_close(held[f"net.{name}"], value, rtol=tolerance, atol=tolerance)
    assert any(value.abs().sum() > 0 for value in importance.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "rule", [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), SI(), EWC(), MAS(), None], ids=lambda r: type(r).__name__
)
def test_every_kind_of_rule_gives_what_the_loop_gives(rule, optimizer):
    callback = ConsolidationCallback(rule, strength=0.5)
    fits(callback, LightningNet(optimizer))
    same(callback.memory, by_hand(rule, 0.5, optimizer))


class Validated(LightningNet):
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


@pytest.mark.parametrize(("options", "clip"), [
    (NORM, lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.1)),
    (VALUE, lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.02)),
], ids=["norm", "value"])  # fmt: skip
def test_the_rule_sees_clipped_gradients(options, clip):
    callback = ConsolidationCallback(RWalk(delta_t=3), strength=0.5)
    fits(callback, **options)
    same(callback.memory, by_hand(RWalk(delta_t=3), 0.5, clip=clip))


class Manual(LightningNet):
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
    callback, model = ConsolidationCallback(RWalk(delta_t=3), strength=0.5), LightningNet()
    one = trainer(callback)
    for k, loader in enumerate(loaders()):
        one.fit_loop.max_epochs = k + 1
        one.fit(model, loader)
    same(callback.memory, by_hand(RWalk(delta_t=3), 0.5))


def test_a_fit_without_a_step_says_why():
    callback, model = ConsolidationCallback(RWalk()), LightningNet()
    one, (first, second) = trainer(callback), loaders()
    one.fit(model, first)
    with pytest.warns(UserWarning, match=r"a `fit` without a training step.*Make a new `Trainer`"):
        one.fit(model, second)
    assert callback.memory.tasks == 1


def test_a_part_of_the_loader_is_what_rules_measure_on():
    callback, model = ConsolidationCallback(EWC(), strength=0.5), LightningNet()
    (loader,) = loaders(1)
    trainer(callback, limit_train_batches=2).fit(model, loader)
    truth = Consolidator(model, EWC(), strength=0.5)
    truth.estimate(list(loader)[:2])
    torch.testing.assert_close(dict(callback.memory.anchor.importance()), dict(truth.anchor.importance()))


def test_logits_are_read_as_the_user_says():
    masked = ConsolidationCallback(EWC(), logits=lambda output: output[:, :2])
    model = LightningNet()
    loader = DataLoader(TensorDataset(torch.randn(8, 6, dtype=torch.float64), torch.randint(2, (8,))), batch_size=4)
    trainer(masked).fit(model, loader)
    omega = masked.memory.anchor.importance()["net.2.bias"]
    assert omega[2] == 0
    assert (omega[:2] > 0).all()


def test_a_loss_for_models_that_are_no_classifiers():
    def loss(output, target):
        return (output - target).square().sum()

    class Regression(LightningNet):
        def training_step(self, batch, index):
            return loss(self(batch[0]), batch[1])

    callback, model = ConsolidationCallback(EWC(labels="true"), loss=loss), Regression()
    loader = DataLoader(TensorDataset(torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3).double()), batch_size=4)
    trainer(callback).fit(model, loader)
    truth = Consolidator(model, EWC(labels="true"))
    truth.estimate(loader, loss=loss)
    torch.testing.assert_close(dict(callback.memory.anchor.importance()), dict(truth.anchor.importance()))


class Converted(LightningNet):
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


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
@pytest.mark.parametrize("rule", [RWalk(delta_t=3), EWC()], ids=lambda r: type(r).__name__)
def test_precisions(precision, dtype, rule):
    """Lightning makes modules and batches what a precision asks for; the truth is a loop that does the same."""
    callback, model = ConsolidationCallback(rule, strength=0.5), LightningNet(dtype=torch.float32)
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


@pytest.mark.parametrize(("optimizer", "clip"), [("sgd", None), ("sgd", 0.1), ("fused", None)])
def test_loss_scaling(optimizer, clip):
    """A loss scale that overflows at first and then leaves no trace."""

    def scaling():
        return torch.amp.GradScaler("cpu", init_scale=2.0**20)

    callback, model = ConsolidationCallback(RWalk(delta_t=3), strength=0.5), LightningNet(optimizer, torch.float32)
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
                torch.nn.utils.clip_grad_norm_(truth.parameters(), clip)
            scaler.step(step)
            scaler.update()
        memory.consolidate()
    assert scaler.get_scale() < 2.0**20
    same(callback.memory, memory, 1e-7)


class StopFit(Callback):
    """Does something after a batch; only once."""

    def __init__(self, batch, what):
        self.batch, self.what = batch, what

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == self.batch:
            self.what()


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def _sigint():
    """Lightning ignores Ctrl-C once there has been one."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("_sigint")
def test_an_interrupted_task_is_not_consolidated_and_goes_on():
    callback, model = ConsolidationCallback(RWalk(delta_t=2), strength=0.5), LightningNet()
    first, second = loaders()
    with pytest.raises(SystemExit):
        trainer(callback, StopFit(3, interrupt)).fit(model, first)
    assert (callback.memory.tasks, callback.memory.steps) == (0, 3)
    for loader in (first, second):
        trainer(callback).fit(model, loader)
    truth = network()
    memory = Consolidator(truth, RWalk(delta_t=2), 0.5)
    for batches in ([*first][:3] + [*first], [*second]):
        memory.attach(step := OPTIMIZERS["sgd"](truth.parameters()))
        for x, y in batches:
            step.zero_grad()
            F.cross_entropy(truth(x), y).backward()
            step.step()
        memory.consolidate()
    same(callback.memory, memory)


class Later(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.05, initial_denom_lr=1)


def test_layers_that_thaw():
    callback, model = ConsolidationCallback(RWalk(delta_t=2), strength=0.5), LightningNet()
    truth = network()
    memory = Consolidator(truth, RWalk(delta_t=2), 0.5)
    for loader in loaders():
        trainer(callback, Later(), max_epochs=2).fit(model, loader)
        truth[0].requires_grad_(False)
        memory.attach(step := OPTIMIZERS["sgd"](truth[2].parameters()))
        for epoch in range(2):
            if epoch == 1:
                truth[0].requires_grad_(True)
                step.add_param_group({"params": truth[0].parameters(), "lr": 0.05})
            for x, y in loader:
                step.zero_grad()
                F.cross_entropy(truth(x), y).backward()
                step.step()
        memory.consolidate()
    assert callback.memory.anchor.importance()["net.0.weight"].abs().sum() > 0
    same(callback.memory, memory)


RULES = {"walk": lambda: RWalk(delta_t=3), "data": EWC, "recipe": lambda: None}


def lifetime(folder, rule="walk", when=lambda task: [], tasks=3):
    """A script that a user would start again after whatever happened to it."""
    callback, model = ConsolidationCallback(RULES[rule](), strength=0.5), LightningNet("adam")
    for k, loader in enumerate(loaders(tasks)):
        keep = ModelCheckpoint(Path(folder) / str(k), save_last=True)
        one = trainer(callback, keep, *when(k), max_epochs=3, enable_checkpointing=True)
        one.fit(model, loader, ckpt_path="last", weights_only=True)
    return callback.memory


def equal(ours, theirs):
    """Compare two states, every tensor of them."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        [equal(ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list | tuple):
        [equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    else:
        assert ours == theirs


class PowerCut(Exception):
    pass


def cut():
    raise PowerCut


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", ["in an epoch", "before the end"])
def test_a_task_resumed_from_a_checkpoint_is_as_if_nothing_had_happened(tmp_path, rule, place):
    class Cut(Callback):
        def on_train_end(self, trainer, module):
            cut()

    calm = lifetime(tmp_path / "calm", rule)
    trouble = {"in an epoch": StopFit(9, cut), "before the end": Cut()}[place]
    with pytest.raises(PowerCut):
        lifetime(tmp_path / "cut", rule, lambda k: [trouble] * (k == 1))
    resumed = lifetime(tmp_path / "cut", rule)
    equal(resumed.state_dict(), calm.state_dict())
    equal(dict(resumed.model.state_dict()), dict(calm.model.state_dict()))


def test_killed_in_a_task_and_started_again(tmp_path):
    here = Path(__file__).resolve().parent
    code = f"""
        import os, signal, sys, warnings
        warnings.simplefilter("ignore")
        sys.path.insert(0, {str(here)!r})
        from rwalk import kernels
        from test_lightning import StopFit, lifetime
        kernels.use("blocked")  # as the tests do
        kill = StopFit(9, lambda: os.kill(os.getpid(), signal.SIGKILL))
        lifetime(sys.argv[1], "walk", lambda k: [kill] * (k == 1))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    equal(lifetime(tmp_path / "killed").state_dict(), lifetime(tmp_path / "calm").state_dict())


def test_a_checkpoint_of_a_finished_task_is_not_finished_twice(tmp_path):
    callback, model = ConsolidationCallback(RWalk(delta_t=3), strength=0.5), LightningNet()
    first, second = loaders()
    one = trainer(callback)
    one.fit(model, first)
    one.save_checkpoint(tmp_path / "done.ckpt")
    again, twin = ConsolidationCallback(RWalk(delta_t=3), strength=0.5), LightningNet()
    with pytest.warns(UserWarning, match="without a training step"):
        trainer(again).fit(twin, first, ckpt_path=tmp_path / "done.ckpt", weights_only=True)
    assert again.memory.tasks == 1
    for memory, net in ((callback, model), (again, twin)):
        trainer(memory).fit(net, second)
    equal(again.memory.state_dict(), callback.memory.state_dict())


def test_a_checkpoint_of_another_rule_is_refused_before_training(tmp_path):
    callback, model = ConsolidationCallback(SI()), LightningNet()
    (loader,) = loaders(1)
    one = trainer(callback)
    one.fit(model, loader)
    one.save_checkpoint(tmp_path / "si.ckpt")
    with pytest.raises(ValueError, match=r"The state was saved with rule .*SI"):
        trainer(ConsolidationCallback(RWalk()), max_epochs=2).fit(
            LightningNet(), loader, ckpt_path=tmp_path / "si.ckpt", weights_only=True
        )


class Penalties(Callback):
    """Works out penalties by hand: before each step, and at each task's end."""

    def __init__(self, callback):
        self.callback, self.steps, self.ends = callback, [], []

    def penalty(self, module):
        memory, theta = self.callback.memory, dict(module.named_parameters())
        pairs = ((memory.anchor.importance()[name], theta[name] - point) for name, point in memory.anchor.point.items())
        return sum((0.5 * (omega * move**2).sum()).item() for omega, move in pairs)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append(self.penalty(module))

    def on_train_end(self, trainer, module):
        self.ends.append(self.penalty(module))


def test_figures_go_to_the_loggers(tmp_path):
    import csv

    callback, model = ConsolidationCallback(RWalk(delta_t=3), strength=0.5), LightningNet()
    truth, rows = Penalties(callback), []
    for k, loader in enumerate(loaders()):
        logger = CSVLogger(tmp_path, version=k)
        trainer(truth, callback, logger=logger, log_every_n_steps=2, accumulate_grad_batches=2, max_epochs=2).fit(model, loader)
        with (tmp_path / "lightning_logs" / f"version_{k}" / "metrics.csv").open() as file:
            rows.append([row for row in csv.DictReader(file) if row["memory/penalty"]])
    logged = [[float(row["memory/penalty"]) for row in task] for task in rows]
    assert logged[0] == [0.0] * 4
    assert logged[1] == pytest.approx([*truth.steps[7::2], truth.ends[1]])
    assert min(logged[1]) > 0
    assert set(callback.memory.summary().scalars()) <= set(rows[1][-1])
    assert float(rows[1][-1]["memory/drift/net.2"]) > 0


class Two(LightningNet):
    def configure_optimizers(self):
        return [OPTIMIZERS["sgd"](layer.parameters()) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch, index):
        pass

    automatic_optimization = False


class Formless(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    configure_optimizers = LightningNet.configure_optimizers
    optimizer = "sgd"


@pytest.mark.parametrize(("make", "rule", "message"), [
    (Two, RWalk(), r"returned 2 optimisers.*into one optimiser"),
    (Formless, EWC(), r"`Formless` has no `forward`, which EWC.*Define `forward`"),
    (lambda: LightningNet("lbfgs"), RWalk(), "LBFGS moves several times"),
])  # fmt: skip
def test_what_is_refused_before_training(make, rule, message, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lbfgs", torch.optim.LBFGS)
    model, (loader,) = make(), loaders(1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(ConsolidationCallback(rule)).fit(model, loader)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_module_without_forward_trains_under_rules_that_need_no_data():
    callback = ConsolidationCallback(RWalk(delta_t=3), strength=0.5)
    fits(callback, Formless())
    same(callback.memory, by_hand(RWalk(delta_t=3), 0.5))


def test_batch_norm_without_forward_gets_the_warning_of_a_loop_without_data():
    class Normed(Formless):
        def __init__(self):
            super().__init__()
            self.net.insert(1, torch.nn.BatchNorm1d(12).double())

    with pytest.warns(UserWarning, match="BatchNorm.*averaged weights"):
        fits(ConsolidationCallback(), Normed(), tasks=1)


def test_another_model_is_refused():
    callback = ConsolidationCallback(RWalk())
    fits(callback, tasks=1)
    with pytest.raises(ValueError, match="another model than that of the tasks before"):
        fits(callback, tasks=1)


def test_strategies_that_lose_the_memory_are_refused():
    (loader,) = loaders(1)
    with pytest.raises(Exception, match=r"The strategy `DDPStrategy` .*Pass `Trainer"):
        trainer(ConsolidationCallback(RWalk()), strategy="ddp_fork").fit(LightningNet(), loader)


def test_sharding_strategies_are_refused():
    """Lightning itself refuses them without a GPU, so the hook is called that it would call."""
    one = SimpleNamespace(strategy=FSDPStrategy())
    callback = ConsolidationCallback(RWalk())
    with pytest.raises(ValueError, match=r"The strategy `FSDPStrategy` .*`fully_shard` in a loop of your own"):
        callback.on_fit_start(one, LightningNet())


def test_fast_dev_run_tries_the_end_of_a_task_too():
    callback = ConsolidationCallback(EWC())
    fits(callback, tasks=1, fast_dev_run=True)
    assert callback.memory.tasks == 1


RANKED = [RWalk(delta_t=3), RWalk(delta_t=3, fisher="example"), EWC(), None]


def ranked(out, devices, size=8):
    """Train on several ranks, each with its part of a batch, in the Trainer and in Fabric; the first one saves."""
    found = []
    for rule in RANKED:
        callback, model = ConsolidationCallback(rule, strength=0.5), LightningNet()
        for loader in loaders(size=40):
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            part = DistributedSampler(loader.dataset, devices, rank, shuffle=False)  # Lightning's own shuffles
            small = DataLoader(loader.dataset, batch_size=size // devices, sampler=part)
            options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "use_distributed_sampler": False}
            trainer(callback, **options).fit(model, small)
            assert callback.memory.model is model  # and not a wrapper that has served
        found.append((callback.memory.state_dict(), model.state_dict()))
    found.append(woven(devices, size))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        torch.save(found, out)


def woven(devices, size=8):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    net = network()
    model, optimizer = fabric.setup(net, OPTIMIZERS["sgd"](net.parameters()))
    memory = Consolidator(model, EWC(), strength=0.5).attach(optimizer)
    for loader in loaders(size=40):
        small = fabric.setup_dataloaders(DataLoader(loader.dataset, batch_size=size // devices))
        for x, y in small:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
        memory.consolidate(small)
    return memory.state_dict(), model.state_dict()


def close(ours, theirs):
    for part in ("point", "omega"):
        torch.testing.assert_close(ours[0]["anchor"][part], theirs[0]["anchor"][part], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(dict(ours[1]), dict(theirs[1]), rtol=1e-10, atol=1e-14)


def test_two_ranks_give_what_one_gives_on_the_whole_batch(tmp_path):
    script = tmp_path / "script.py"
    here = str(Path(__file__).resolve().parent)
    script.write_text(
        "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        f"sys.path.insert(0, {here!r})\nimport torch\ntorch.set_num_threads(1)\n"
        f"from test_lightning import ranked\nranked({str(tmp_path / 'two.pt')!r}, 2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    ranked(tmp_path / "one.pt", 1)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    for theirs, ours in zip(one, two, strict=True):
        close(ours, theirs)


def test_fabric_needs_no_integration(tmp_path):
    """Names are those of the plain model; clipping, and Fabric's own checkpoints."""

    def start():
        net = network()
        model, optimizer = fabric.setup(net, OPTIMIZERS["adam"](net.parameters()))
        return model, optimizer, Consolidator(model, RWalk(delta_t=3), strength=0.5).attach(optimizer)

    def learn(model, optimizer, batches):
        for x, y in batches:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()

    fabric = Fabric(accelerator="cpu", devices=1)
    first, second = (list(loader) for loader in loaders())
    model, optimizer, memory = start()
    learn(model, optimizer, first)
    memory.consolidate()
    learn(model, optimizer, second[:2])
    fabric.save(tmp_path / "memory.ckpt", {"model": model, "optimizer": optimizer, "memory": memory})
    learn(model, optimizer, second[2:])
    memory.consolidate()
    again, optimizer, resumed = start()
    fabric.load(tmp_path / "memory.ckpt", {"model": again, "optimizer": optimizer, "memory": resumed}, weights_only=True)
    learn(again, optimizer, second[2:])
    resumed.consolidate()
    equal(resumed.state_dict(), memory.state_dict())

    truth = network()
    step = OPTIMIZERS["adam"](truth.parameters())
    expected = Consolidator(truth, RWalk(delta_t=3), strength=0.5).attach(step)
    for batches in (first, second):
        for x, y in batches:
            step.zero_grad()
            F.cross_entropy(truth(x), y).backward()
            torch.nn.utils.clip_grad_norm_(truth.parameters(), 0.1)
            step.step()
        expected.consolidate()
    equal(memory.state_dict(), expected.state_dict())


class Restoring(Callback):
    """Puts other weights into the model when training ends, past autograd."""

    def on_train_end(self, trainer, module):
        for p in module.parameters():
            p.data.copy_(p.data * 0.5)


class OwnEnd(LightningNet):
    def on_train_end(self):
        Restoring().on_train_end(None, self)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [
    lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.7)), lambda: StochasticWeightAveraging(0.1, annealing_epochs=1), Restoring
], ids=["WeightAveraging", "StochasticWeightAveraging", "own"])  # fmt: skip
@pytest.mark.parametrize("rule", [None, RWalk(delta_t=3)], ids=repr)
def test_callbacks_that_change_the_weights_at_the_end_come_first_wherever_they_stand(rule, other, first, tmp_path):
    model, callback, saved = LightningNet(), ConsolidationCallback(rule), ModelCheckpoint(tmp_path)
    for loader in loaders():
        placed = [callback, other(), saved] if first else [other(), callback, saved]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The weights .* changed after the last step")
            trainer(*placed, max_epochs=3, enable_checkpointing=True).fit(model, loader)
        for name, p in model.named_parameters():
            torch.testing.assert_close(callback.memory.anchor.point[name], p.detach(), rtol=0, atol=0)


def test_weights_that_a_module_changes_after_the_callbacks_are_refused_with_the_right_order():
    with pytest.raises(
        RuntimeError, match=r"changed weights .* after the task was consolidated.*put `ConsolidationCallback` after it"
    ):
        fits(ConsolidationCallback(RWalk(delta_t=3)), OwnEnd(), tasks=1)
