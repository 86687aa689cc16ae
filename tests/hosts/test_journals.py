"""The callback of each host keeps a journal: its scores are those of the models that the tasks have left."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hosts
from rwalk import L2, report
from rwalk.bench import Record
from rwalk.report import Journal

SETS = ("first", "second", "third")


def tasks(dtype=torch.float32):
    """Random data, in another place for each task."""
    draw = torch.Generator().manual_seed(3)
    places = [torch.randn(6, generator=draw) for _ in SETS]
    return [(torch.randn(40, 6, generator=draw).add(at).to(dtype), torch.randint(3, (40,), generator=draw)) for at in places]


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def check(folder, models, data, names, score=accuracy):
    """Compare the one record of a folder with scores by hand, of copies of the model after each task."""
    (path,) = folder.glob("*.json")
    record = Record.load(path)
    assert record.tasks == list(names)
    truth = [[score(model, x, y) for x, y in data] for model in models]
    for found, row in zip(record.scores, truth, strict=True):
        assert found == pytest.approx(row, abs=1e-6)
    assert (record.method, record.config["strength"], len(record.diagnostics)) == ("l2", 0.5, 3)
    assert record.diagnostics[-1]["figures"]["penalty"] > 0  # before the task was consolidated
    assert record.memory["state_bytes"] > 0
    assert report.write(folder).exists()


def test_trainer_scores_three_evaluation_sets_after_each_task(tmp_path):
    pytest.importorskip("transformers", reason="needs Transformers: make test-integrations")
    from transformers import Trainer, TrainingArguments

    from rwalk.integrations.transformers import ConsolidationCallback

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, labels=None):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def right(predicted):
        return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}

    model, seen = Classifier(), []
    rows = [[{"x": x, "labels": y} for x, y in zip(*data, strict=True)] for data in tasks()]
    sets = dict(zip(SETS, rows, strict=True))
    callback = ConsolidationCallback(L2(), 0.5, journal=Journal(tmp_path / "runs", seed=4))
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    options = quiet | {"dataloader_pin_memory": False, "learning_rate": 0.05, "eval_strategy": "epoch"}
    for name in SETS:
        arguments = TrainingArguments(str(tmp_path / "out"), **options)
        Trainer(
            model=model,
            args=arguments,
            train_dataset=sets[name],
            eval_dataset=sets,
            callbacks=[callback],
            compute_metrics=right,
        ).train()
        seen.append(copy.deepcopy(model.net))
    check(tmp_path / "runs", seen, tasks(), SETS)

    def refused(message, journal, **kwargs):
        other = ConsolidationCallback(L2(), 0.5, journal=journal)
        with pytest.raises(ValueError, match=message):
            Trainer(model=Classifier(), args=arguments, train_dataset=rows[0], callbacks=[other], **kwargs).train()

    journal = Journal(tmp_path / "other", seed=4)
    refused("needs the evaluation sets of all tasks by name", journal, eval_dataset=rows[0], compute_metrics=right)
    refused("The journal's metric is `accuracy`, and Trainer computes the loss alone", journal, eval_dataset=sets)
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_scores_the_validation_sets_after_each_task(tmp_path):
    pytest.importorskip("lightning", reason="needs Lightning: make test-integrations")
    from lightning.pytorch import LightningModule, Trainer

    from rwalk.integrations.lightning import ConsolidationCallback

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, index, dataloader_idx=0):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model, seen = Net(), []
    loaders = {name: DataLoader(TensorDataset(*data), batch_size=8) for name, data in zip(SETS, tasks(), strict=True)}
    callback = ConsolidationCallback(L2(), 0.5, journal=Journal(tmp_path, metric="loss", higher=False))

    def fit(callback, name, **kwargs):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(callbacks=[callback], accelerator="cpu", devices=1, max_epochs=2, **quiet)
        trainer.fit(model, loaders[name], **kwargs)

    for name in SETS:
        fit(callback, name, val_dataloaders=loaders)
        seen.append(copy.deepcopy(model.net))
    check(tmp_path, seen, tasks(), SETS, lambda net, x, y: float(F.cross_entropy(net(x), y).detach()))
    with pytest.raises(ValueError, match="needs the validation sets of all tasks by name"):
        fit(callback, "first", val_dataloaders=loaders["first"])
    other = ConsolidationCallback(L2(), 0.5, journal=Journal(tmp_path / "none", metric="F1", higher=True))
    model = Net()
    with pytest.warns(
        UserWarning, match="The evaluation of `first`, `second`, `third` has no `F1`, so the journal noted nothing"
    ):
        fit(other, "first", val_dataloaders=loaders)
    assert not (tmp_path / "none").exists()


def test_avalanche_scores_the_experiences_after_each_task(tmp_path):
    hosts.avalanche()
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    from rwalk.integrations.avalanche import ConsolidationPlugin

    data, model, seen = tasks(), mlp(), []
    benchmark = tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0, 0, 0])
    plugin = ConsolidationPlugin(L2(), 0.5, journal=Journal(tmp_path, "l2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no loggers
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), criterion=nn.CrossEntropyLoss(), train_mb_size=8,
            plugins=[plugin], evaluator=evaluator, eval_every=1,
        )  # fmt: skip
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[benchmark.test_stream])
            strategy.eval(benchmark.test_stream)
            seen.append(copy.deepcopy(model))
    check(tmp_path, seen, data, ("1", "2", "3"))
