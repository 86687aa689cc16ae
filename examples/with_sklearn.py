"""# With scikit-learn: a classifier that keeps what it has learned.

`RWalkClassifier` is a scikit-learn classifier: it has `fit`, `predict` and `score`, works in pipelines and grid searches, and
can be stored with joblib. In addition `partial_fit` takes a label `task`, which marks where one task ends and the next begins.
`RWalkRegressor` is the same for numbers.

Here it learns handwritten digits five times, each time with the pixels in another order. To a network these are five different
scripts, and one that learns the fifth in the usual way can no longer read the first.
"""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, KFold, train_test_split

from rwalk.integrations.sklearn import RWalkClassifier

X, y = load_digits(return_X_y=True)
X, X_unseen, y, y_unseen = train_test_split(X / 16, y, random_state=0)
rng = np.random.default_rng(0)
tasks = [rng.permutation(64) for _ in range(5)]

# Settings are arguments, as always in scikit-learn. `rule` may be `RWalk()`, `EWC()` or any other rule; without one it is the
# recommended one, `Kronecker()`. At strength 0 nothing is protected: that is plain training.

make = partial(RWalkClassifier, hidden=(256, 256), optimizer=torch.optim.SGD, lr=0.1, batch_size=10, random_state=0)
plain, protected = make(strength=0), make()

# All calls with the same label are one task: passes over the same data, as here, or pieces of a stream. The first call with a
# new label ends the task before, and from then on the weights that it needs are protected. The very first call has to name the
# classes of all tasks.

for classifier in (plain, protected):
    for number, pixels in enumerate(tasks):
        for _ in range(5):
            classifier.partial_fit(X[:, pixels], y, classes=range(10), task=number)

# No label follows the last task; `consolidate` ends it. (`fit` does so by itself, and `partial_fit` continues with the next
# task.) Now, how well can they still read the first script?

for name, classifier in {"without rwalk": plain, "with rwalk": protected}.items():
    classifier.consolidate()
    scores = [100 * classifier.score(X_unseen[:, pixels], y_unseen) for pixels in tasks]
    print(f"{name}: {scores[0]:.1f}")
    print("  all five tasks: " + ", ".join(f"{score:.1f}" for score in scores))

# `memory_` is the `Consolidator`.

print(protected.memory_.summary())

# Where all data is there at once, `fit` takes the task of each example and learns the tasks in ascending order. So a search
# sees how much is kept of all of them, here to choose the strength; parameters of the rule, such as `rule__rank`, work
# likewise. Every fold needs examples of every task, so the folds are drawn at random.

stream = np.concatenate([X[:, pixels] for pixels in tasks[:2]])
task = np.repeat([0, 1], len(X))
folds = KFold(2, shuffle=True, random_state=0)
search = GridSearchCV(make(epochs=3), {"strength": [0, 0.1]}, cv=folds).fit(stream, np.tile(y, 2), task=task)
print(search.cv_results_["mean_test_score"], search.best_params_)
