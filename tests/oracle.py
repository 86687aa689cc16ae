"""The paper's equations in float64 NumPy, written without the library: softmax regression trained on several tasks.

Everything here stores what the library avoids storing (parameters before each step), so that agreement means something.
"""

from dataclasses import dataclass

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
    alpha: float = 0.9
    delta_t: int = 10
    eps: float = 1e-3
    strength: float = 1.0
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    per_example: bool = False
    fisher: list = None
    total: list = None
    omega: list = None
    point: list = None
    velocity: list = None
    score: list = None
    path: list = None
    mark: list = None
    n: int = 0

    def task(self, batches, clip=None, see_clipped=False):
        """Train on one task; the optimiser uses clip(gradient), the walk sees the gradient or, if asked, what is used."""
        self.begin()
        for x, y in batches:
            grad = softmax_gradient(*self.theta, x, y)
            squares = softmax_squares(*self.theta, x, y) if self.per_example else [g**2 for g in grad]
            before = [t.copy() for t in self.theta]
            used = grad if clip is None else clip(grad)
            self.step(used)
            if see_clipped:
                grad, squares = used, [g**2 for g in used]
            self.observe(grad, squares, before)
        self.conclude()

    def replay(self, moves):
        """Observe the steps that something else made: gradients, parameters before, parameters after."""
        self.begin(moves[0][1])
        for grad, before, after in moves:
            self.theta = [t.copy() for t in after]
            self.observe(grad, [g**2 for g in grad], before)
        self.conclude()

    def begin(self, theta=None):
        self.theta = self.theta if theta is None else [t.copy() for t in theta]
        self.score, self.path = ([np.zeros_like(t) for t in self.theta] for _ in range(2))
        self.mark = [t.copy() for t in self.theta]
        self.n = 0

    def observe(self, grad, squares, before):
        self.n += 1
        old = self.fisher
        self.fisher = [q if old is None else self.alpha * q + (1 - self.alpha) * old[i] for i, q in enumerate(squares)]
        for i, t in enumerate(self.theta):
            self.path[i] -= grad[i] * (t - before[i])
        if self.n % self.delta_t == 0:
            self.settle()

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

    def settle(self):
        for i, t in enumerate(self.theta):
            fisher = 0 if self.fisher is None else self.fisher[i]
            self.score[i] += self.path[i] / (0.5 * fisher * (t - self.mark[i]) ** 2 + self.eps)
            self.path[i][...] = 0
            self.mark[i][...] = t

    def join(self, old, new):
        if old is None:
            return [n.copy() for n in new]
        return [0.5 * (o + n) for o, n in zip(old, new, strict=True)]

    def conclude(self):
        self.settle()
        self.total = self.join(self.total, [np.maximum(s, 0) for s in self.score])
        fisher = self.fisher or [np.zeros_like(t) for t in self.theta]
        f, s = self.scaled(fisher), self.scaled(self.total)
        self.omega = [a + b for a, b in zip(f, s, strict=True)]
        self.point = [t.copy() for t in self.theta]

    def scaled(self, raw):
        largest = max(r.max() for r in raw)
        return [r / largest if largest > 0 else np.zeros_like(r) for r in raw]

    def penalty(self):
        return self.strength * sum((o * (t - p) ** 2).sum() for o, t, p in zip(self.omega, self.theta, self.point, strict=True))
