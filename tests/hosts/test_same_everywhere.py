"""One training, in a loop of one's own and in every host: the same weights and the same importance come out."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

import hosts
from cases import batches, mlp, train
from rwalk import EWC, MAS, SI, Consolidator, RWalk

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:No loggers specified"),
]
SIZE, STRENGTH = 6, 0.5
TASKS = [batches(seed, steps=7, size=SIZE) for seed in range(2)]
RULES = [None, RWalk(delta_t=3), RWalk(delta_t=3, alpha=0.01, fisher="example"), SI(), EWC(), MAS()]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def together(task):
    """A task's examples as two tensors; hosts cut them into the same batches again, as they come in order."""
    return tuple(torch.cat([torch.as_tensor(part) for part in column]) for column in zip(*task, strict=True))


def loader(task):
    return DataLoader(TensorDataset(*together(task)), batch_size=SIZE)


def train_in_raw_loop(model, rule, tasks, strength=STRENGTH):
    optimizer = sgd(model)
    memory = Consolidator(model, rule, strength).attach(optimizer)
    for task in tasks:
        train(model, optimizer, task)
        memory.consolidate(loader(task))
    return memory


def train_in_avalanche(model, rule, tasks):
    hosts.avalanche()
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.training.supervised import Naive

    import rwalk.integrations.avalanche as ours

    data = [together(task) for task in tasks]
    stream = tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0] * len(data)).train_stream
    plugin = ours.ConsolidationPlugin(rule, STRENGTH)
    settings = {"criterion": torch.nn.CrossEntropyLoss(), "train_mb_size": SIZE, "plugins": [plugin], "evaluator": None}
    strategy = Naive(model=model, optimizer=sgd(model), **settings)
    for experience in stream:
        strategy.train(experience, shuffle=False)
    return plugin.memory


def train_in_lightning(model, rule, tasks):
    pytest.importorskip("lightning", reason="needs Lightning: make test-integrations")
    from lightning.pytorch import LightningModule, Trainer

    import rwalk.integrations.lightning as ours

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer = model, sgd(model)

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return self.optimizer

    module, callback = Module(), ours.ConsolidationCallback(rule, STRENGTH)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    for task in tasks:
        Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[callback], **quiet).fit(module, loader(task))
    return callback.memory


def train_in_fabric(model, rule, tasks):
    pytest.importorskip("lightning", reason="needs Lightning: make test-integrations")
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    return train_prepared(*fabric.setup(model, sgd(model)), fabric.backward, fabric.setup_dataloaders, rule, tasks)


def train_in_accelerate(model, rule, tasks):
    pytest.importorskip("accelerate", reason="needs Accelerate: make test-integrations")
    from accelerate import Accelerator

    host = Accelerator(cpu=True)
    return train_prepared(*host.prepare(model, sgd(model)), host.backward, host.prepare, rule, tasks)


def train_prepared(model, optimizer, backward, prepare, rule, tasks):
    """A loop of one's own around what a host has prepared."""
    memory = Consolidator(model, rule, STRENGTH).attach(optimizer)
    for task in tasks:
        for x, y in prepare(loader(task)):
            optimizer.zero_grad()
            backward(F.cross_entropy(model(x), y))
            optimizer.step()
        memory.consolidate(loader(task))
    return memory


class RowData(Dataset):
    """A task as Hugging Face has it: a dictionary for each example."""

    def __init__(self, task):
        self.columns = together(task)

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, index):
        return dict(zip(("x", "labels"), (column[index] for column in self.columns), strict=True))


class WithLoss(torch.nn.Module):
    """A model as Hugging Face has it: it computes its loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels=None):
        logits = self.model(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train_in_transformers(model, rule, tasks):
    pytest.importorskip("accelerate", reason="needs Accelerate: make test-integrations")
    pytest.importorskip("transformers", reason="needs Transformers: make test-integrations")
    from transformers import Trainer, TrainingArguments

    import rwalk.integrations.transformers as ours

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset)

    wrapped, optimizer, callback = WithLoss(model), sgd(model), ours.ConsolidationCallback(rule, STRENGTH)
    silent = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    plain = {"num_train_epochs": 1, "max_grad_norm": 0, "use_cpu": True, "per_device_train_batch_size": SIZE}
    arguments = TrainingArguments("unused", **silent, **plain)
    for task in tasks:
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        settings = {"args": arguments, "train_dataset": RowData(task), "callbacks": [callback]}
        InOrder(wrapped, optimizers=(optimizer, constant), **settings).train()
    return callback.memory


def train_in_sklearn(model, rule, tasks):
    pytest.importorskip("sklearn", reason="needs scikit-learn: make test-integrations")
    from rwalk.integrations.sklearn import RWalkClassifier

    settings = {"module": lambda features, classes: model, "batch_size": SIZE, "dtype": "float64"}
    classifier = RWalkClassifier(rule, STRENGTH, optimizer=lambda parameters, lr: sgd(model), **settings)
    for number, task in enumerate(tasks):
        for x, y in task:
            classifier.partial_fit(x, y, classes=[0, 1, 2], task=number)
        classifier.consolidate(*together(task))
    return classifier.memory_


HOSTS = [
    train_in_avalanche,
    train_in_lightning,
    train_in_fabric,
    train_in_accelerate,
    train_in_transformers,
    train_in_sklearn,
]


def test_the_training_compared_is_one_in_which_protection_matters():
    for rule in RULES:
        protected = train_in_raw_loop(mlp(), rule, TASKS).model
        plain = train_in_raw_loop(mlp(), rule, TASKS, strength=0).model
        assert not torch.allclose(protected[0].weight, plain[0].weight, rtol=0, atol=1e-4), rule


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__.removeprefix("train_in_"))
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_host_trains_as_a_raw_loop_does(host, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth, model = train_in_raw_loop(mlp(), rule, TASKS), mlp()
    memory = host(model, rule, TASKS)
    assert memory.tasks == truth.tasks == len(TASKS)
    for name, value in truth.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)
    for left, right in ((memory.anchor.point, truth.anchor.point), (memory.anchor.importance(), truth.anchor.importance())):
        for ours, theirs in zip(left.values(), right.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
