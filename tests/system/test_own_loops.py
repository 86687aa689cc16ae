"""Loops of one's own, for regression, segmentation and rewards, end in one report that reads right."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rwalk import Consolidator, bench, report
from rwalk.report import Journal
from rwalk.report.remarks import sentence

NOAA = Path(os.environ.get("RWALK_DATA") or "absent", "noaa_weather", "stream.parquet")


def temperatures():
    """Days as weather other than temperature, and the temperature, of three stretches of fifty years."""
    if not NOAA.exists():
        pytest.skip("needs the NOAA weather data in RWALK_DATA")
    table = pq.read_table(NOAA)
    x = torch.stack([torch.tensor(table.column(f"feat_{k}").to_numpy()) for k in range(1, 9)], 1)
    x = (x - x.mean(0)) / x.std(0)
    thirds = x.tensor_split(3)
    return {name: (third[:, 1:], third[:, :1]) for name, third in zip(("1950s", "1970s", "1990s"), thirds, strict=True)}


def masks():
    """Digits in noise and the pixels that belong to them; in the second task they are pale, on a bright ground."""
    task = bench.split("digits", tasks=1)[0]
    x = task.train.read()[0]
    noisy = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return {"ink": (noisy, (x > 0.5).float()), "pale": (1 + 0.5 * noisy, (x > 0.5).float())}


def arms():
    """Contexts, and which of ten arms pays; each task has its pixels in another order."""
    return {str(k): e.train.read() for k, e in enumerate(bench.permuted("digits", tasks=2))}


def squares(model, x, y):
    return F.mse_loss(model(x), y)


def overlap(model, x, y):
    """Intersection over union."""
    found = model(x) > 0
    return (found & (y > 0)).sum() / (found | (y > 0)).sum()


def policy_loss(model, x, y):
    """REINFORCE with rewards of 1 and -1."""
    choice = torch.distributions.Categorical(logits=model(x))
    arm = choice.sample()
    return -((2.0 * (arm == y) - 1) * choice.log_prob(arm)).mean()


def reward(model, x, y):
    return (2.0 * (model(x).argmax(1) == y) - 1).mean()


def perceptron(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


def segmenter():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))


LOOPS = {
    "temperatures": (temperatures, lambda: perceptron(7, 1), squares, lambda *a: squares(*a).sqrt(), "RMSE", False, 1),
    "masks": (masks, segmenter, lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), y), overlap, "IoU", True, 3),
    "arms": (arms, lambda: perceptron(64, 10), policy_loss, reward, "reward", True, 6),
}


def learn(folder, name, method, seed):
    made, build, loss_of, score_of, metric, higher, epochs = LOOPS[name]
    torch.manual_seed(seed)
    tasks, model = made(), build()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    memory = Consolidator(model).attach(optimizer) if method == "default" else None
    journal = Journal(folder, method, name, metric=metric, higher=higher, seed=seed, settings={"epochs": epochs}, memory=memory)

    @torch.no_grad()
    def score(task):
        return score_of(model, *task)

    journal.log(None, {task: score(data) for task, data in tasks.items()})
    for task, (x, y) in tasks.items():
        for rows in torch.cat([torch.randperm(len(x)) for _ in range(epochs)]).split(64):
            optimizer.zero_grad()
            loss = loss_of(model, x[rows], y[rows])
            loss.backward()
            optimizer.step()
        summary = memory.summary(loss) if memory else None
        if memory:
            memory.consolidate()
        row = {other: float(score(data)) for other, data in tasks.items()}
        record = journal.evaluate(task, tasks, score, summary=summary)
        assert record.scores[-1] == pytest.approx(list(row.values()))
    return record


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_any_metric_ends_in_a_report(tmp_path, name):
    runs = {method: [learn(tmp_path, name, method, seed) for seed in range(2)] for method in ("finetune", "default")}
    metric, higher = LOOPS[name][4:6]
    gain = 1 if higher else -1
    means = {method: sum(r.average for r in records) / 2 for method, records in runs.items()}
    first = max(means, key=lambda method: gain * means[method])
    for records in runs.values():
        for record in records:  # forgetting of the first of the tasks, by its definition
            before = max(gain * row[0] for row in record.scores[:-1])
            assert record.forgotten[0] == pytest.approx(before - gain * record.scores[-1][0])
    (comparison,) = report.summarise(report.read(tmp_path)[0])
    digits = comparison.metric.digits
    best = f"ended at the {'highest' if higher else 'lowest'} average {metric}, {means[first]:.{digits}f}"
    assert best in sentence(comparison)
    page = report.write(tmp_path).read_text()
    for words in (f"Average {metric}", "distance from the anchor", best):
        assert words in page
