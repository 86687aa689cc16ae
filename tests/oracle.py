"""The paper's equations in float64 NumPy, written without the library: softmax regression trained on several tasks.

Everything here stores what the library avoids storing (parameters before each step), so that agreement means something.
"""

from dataclasses import dataclass, field

import numpy as np


def softmax_gradient(weight, bias, x, y):
    """Gradient of mean cross-entropy for logits x @ weight.T + bias."""
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    return [p.T @ x, p.sum(0)]


def softmax_squares(weight, bias, x, y):
    """Mean over examples of the squared gradient of each example's own cross-entropy."""
    each = [softmax_gradient(weight, bias, x[i : i + 1], y[i : i + 1]) for i in range(len(y))]
    return [np.mean([g[k] ** 2 for g in each], axis=0) for k in range(2)]


@dataclass
class Simulation:
    """Train with SGD (momentum, weight decay) and Riemannian Walk exactly as the equations say."""

    theta: list
    alpha: float | str = 0.9
    delta_t: int = 10
    eps: float = 1e-3
    normalize: str = "max"
    accumulate: str = "average"
    strength: float = 1.0
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    per_example: bool = False
    fisher: list = None
    total: list = None
    total_fisher: list = None
    omega: list = None
    point: list = None
    velocity: list = None
    first: list = field(default_factory=lambda: [None, None])

    def task(self, batches):
        theta = self.theta
        score = [np.zeros_like(t) for t in theta]
        path = [np.zeros_like(t) for t in theta]
        mark = [t.copy() for t in theta]
        if self.alpha == "mean":
            self.fisher = None
        for n, (x, y) in enumerate(batches, start=1):
            grad = softmax_gradient(*theta, x, y)
            alpha = 1 / n if self.alpha == "mean" else self.alpha
            old = self.fisher
            fresh = softmax_squares(*theta, x, y) if self.per_example else [g**2 for g in grad]
            self.fisher = [q if old is None else alpha * q + (1 - alpha) * old[i] for i, q in enumerate(fresh)]
            before = [t.copy() for t in theta]
            self.step(grad)
            for i, t in enumerate(theta):
                path[i] -= grad[i] * (t - before[i])
            if n % self.delta_t == 0:
                self.settle(score, path, mark)
        self.settle(score, path, mark)
        self.conclude(score)

    def step(self, grad):
        if self.velocity is None:
            self.velocity = [np.zeros_like(t) for t in self.theta]
        for i, t in enumerate(self.theta):
            g = grad[i].copy()
            if self.omega is not None:
                g += 2 * self.strength * self.omega[i] * (t - self.point[i])
            g += self.weight_decay * t
            self.velocity[i] = self.momentum * self.velocity[i] + g
            t -= self.lr * self.velocity[i]

    def settle(self, score, path, mark):
        for i, t in enumerate(self.theta):
            fisher = 0 if self.fisher is None else self.fisher[i]
            score[i] += path[i] / (0.5 * fisher * (t - mark[i]) ** 2 + self.eps)
            path[i][...] = 0
            mark[i][...] = t

    def join(self, old, new):
        if old is None:
            return [n.copy() for n in new]
        half = 0.5 if self.accumulate == "average" else 1
        return [half * (o + n) for o, n in zip(old, new, strict=True)]

    def conclude(self, score):
        self.total = self.join(self.total, [np.maximum(s, 0) for s in score])
        fisher = self.fisher or [np.zeros_like(t) for t in self.theta]
        if self.alpha == "mean":
            fisher = self.total_fisher = self.join(self.total_fisher, fisher)
        f, s = self.scaled(fisher, 0), self.scaled(self.total, 1)
        self.omega = [a + b for a, b in zip(f, s, strict=True)]
        self.point = [t.copy() for t in self.theta]

    def scaled(self, raw, which):
        everything = np.concatenate([r.ravel() for r in raw])
        if self.normalize == "tensor":
            scales = [r.max() for r in raw]
        elif self.normalize == "max":
            scales = [everything.max()] * len(raw)
        elif self.normalize == "mean":
            scales = [everything.mean()] * len(raw)
        else:
            if self.first[which] is None:
                self.first[which] = everything.mean()
            scales = [self.first[which]] * len(raw)
        return [r / c if c > 0 else np.zeros_like(r) for r, c in zip(raw, scales, strict=True)]

    def penalty(self):
        return self.strength * sum((o * (t - p) ** 2).sum() for o, t, p in zip(self.omega, self.theta, self.point, strict=True))
