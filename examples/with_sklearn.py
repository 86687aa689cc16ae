"""# With scikit-learn: a classifier that keeps what it has learned.

`RWalkClassifier` is a scikit-learn classifier: it has `fit`, `predict` and `score`, stands in pipelines and grids, and is
stored with joblib. Beside them it has a word for where one task ends and the next begins: the label `task` of `partial_fit`.

Here it reads handwritten digits five times over, each time with the pixels in another order. To a network these are five
different scripts, and one that learns the fifth in the usual way can no longer read the first.
"""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from rwalk.integrations.sklearn import RWalkClassifier

X, y = load_digits(return_X_y=True)
X, X_unseen, y, y_unseen = train_test_split(X / 16, y, random_state=0)
rng = np.random.default_rng(0)
tasks = [rng.permutation(64) for _ in range(5)]

# Settings are arguments, as always in scikit-learn. Without a `rule` it is the recommended recipe; `RWalk()`, `EWC()` or any
# other rule goes there. At strength 0 nothing is protected, and it is plain training.

make = partial(RWalkClassifier, hidden=(256, 256), optimizer=torch.optim.SGD, lr=0.1, batch_size=10, random_state=0)
plain, protected = make(strength=0), make()

# Calls with the same label are one task, however many there are: passes over the same data, as here, or pieces of a stream. The
# first call with a new label ends the task before, and from then on what it needs is protected. The first call of all has to
# name the classes of all tasks.

for classifier in (plain, protected):
    for number, pixels in enumerate(tasks):
        for _ in range(5):
            classifier.partial_fit(X[:, pixels], y, classes=range(10), task=number)

# After the last task no label follows; `consolidate` ends it. (`fit` does so by itself: it is one whole task, and
# `partial_fit` goes on from there with the second.) Now, how well can they still read the first script?

for name, classifier in {"without rwalk": plain, "with rwalk": protected}.items():
    classifier.consolidate()
    scores = [100 * classifier.score(X_unseen[:, pixels], y_unseen) for pixels in tasks]
    print(f"{name}: {scores[0]:.1f}")
    print("  all five tasks: " + ", ".join(f"{score:.1f}" for score in scores))

# What is held is in `memory_`, the `Consolidator`.

print(protected.memory_.summary())
