"""# In Avalanche

[Avalanche](https://avalanche.continualai.org) has an `RWalkPlugin` of its own. Ours takes its place and its arguments:

```diff
- from avalanche.training.plugins import RWalkPlugin
+ from rwalk.integrations.avalanche import RWalkPlugin
```

It works in every strategy that has an optimiser, with replay and other plugins, with models of several heads and with
classifiers that grow. `ewc_lambda` is the strength of the same penalty, so a value that you have found remains right.

Here a small network learns five tasks, one after another: the handwritten digits of scikit-learn, with pixels shuffled anew for
each task. `python examples/with_avalanche.py` runs this page.
"""

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits

from rwalk import EWC
from rwalk.integrations.avalanche import ConsolidationPlugin, MemoryMetrics, RWalkPlugin

# The tasks, as a benchmark of Avalanche.

torch.set_num_threads(1)  # for steps as small as these
torch.manual_seed(0)
digits = load_digits()
tasks = []
for _ in range(5):
    x = torch.tensor(digits.data, dtype=torch.float32)[:, torch.randperm(64)] / 16
    tasks.append((x, torch.tensor(digits.target)))
benchmark = tensors_benchmark(
    train_tensors=[(x[:1200], y[:1200]) for x, y in tasks],
    test_tensors=[(x[1200:], y[1200:]) for x, y in tasks],
    task_labels=[0] * 5,
)


# A strategy, with a plugin or without. Only `MemoryMetrics` is ours here: after each epoch it passes the penalty, and the
# importance and drift of each layer, to Avalanche's loggers. The loss that Avalanche logs is that of the task alone.


def train(name, plugin=None):
    """Train a new network on all tasks, and print what is left of them."""
    torch.manual_seed(0)
    model = SimpleMLP(num_classes=10, input_size=64, hidden_size=200, drop_rate=0)
    metrics = [accuracy_metrics(stream=True), forgetting_metrics(stream=True)]
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=10,
        train_epochs=3,
        eval_mb_size=600,
        plugins=[plugin] if plugin else [],
        evaluator=EvaluationPlugin(*metrics, *([MemoryMetrics(plugin)] if plugin else [])),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
        figures = strategy.eval(benchmark.test_stream)
    accuracy = figures["Top1_Acc_Stream/eval_phase/test_stream/Task000"]
    forgetting = figures["StreamForgetting/eval_phase/test_stream"]
    print(f"{name:<12} accuracy {accuracy:.1%}, forgetting {forgetting:.1%}, penalty {figures.get('memory/penalty', 0):.3f}")
    return model


train("without")
plugin = RWalkPlugin(ewc_lambda=1.0, ewc_alpha=0.9, delta_t=10)
model = train("RWalk", plugin)

# `ConsolidationPlugin` takes every other rule, with its strength and the options of `Consolidator`. Rules that measure on data
# get it from the strategy when an experience ends. Without a rule it uses the recommended one, `Kronecker()`.

train("EWC", ConsolidationPlugin(EWC(samples=300), strength=10.0, pull="proximal"))
train("default", ConsolidationPlugin())

# `plugin.memory` is the consolidator.

print(plugin.memory.summary())

# To continue another day, save model and memory. A new plugin loads the state when training begins, with the saved model.

saved = {"model": model.state_dict(), "memory": plugin.state_dict()}
later = RWalkPlugin(ewc_lambda=1.0, ewc_alpha=0.9, delta_t=10)
later.load_state_dict(saved["memory"])
