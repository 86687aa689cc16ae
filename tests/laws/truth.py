"""What must be held after any schedule of calls: the equations in float64 NumPy, written without the library.

It stores what the library avoids storing, the parameters before and after each step, and says for each number how far rounding
may take the library from it (`slack`).
"""

from dataclasses import dataclass, field

import numpy as np

ETA = 3
ROUNDING = 64
"""How many units in the last place a sum of a few dozen terms may be off."""


def padded(old, shape, fill):
    """The old block, with what is new taken from `fill`."""
    whole = np.broadcast_to(fill, shape).copy()
    whole[tuple(slice(n) for n in old.shape)] = old
    return whole


@dataclass
class Held:
    """One parameter: its steps since the last mark, what was measured of it, and what it is held to."""

    theta: np.ndarray
    mark: np.ndarray = None
    start: np.ndarray = None
    steps: list = field(default_factory=list)
    arrays: dict = field(default_factory=dict)
    average: np.ndarray = None
    count: int = 0
    seen: int = 0
    ever: bool = False
    ended: bool = False

    def __post_init__(self):
        self.mark, self.start, self.average = (self.theta.copy() for _ in range(3))
        for key in ("fisher", "fisher_slack", "score", "score_slack"):
            self.arrays[key] = np.zeros_like(self.theta)

    def __getitem__(self, key):
        return self.arrays.get(key)

    def __setitem__(self, key, value):
        self.arrays[key] = value

    def grow(self, now):
        shape = now.shape
        self.mark, self.start, self.average = (padded(a, shape, now) for a in (self.mark, self.start, self.average))
        self.steps = [(padded(g, shape, 0.0), padded(a, shape, now), padded(b, shape, now)) for g, a, b in self.steps]
        self.arrays = {k: v if v is None else padded(v, shape, now if k == "point" else 0.0) for k, v in self.arrays.items()}
        self.theta = now.copy()

    def path(self):
        """The path integral since the mark (equation 7), and the size of what cancels in it."""
        path = sum((-g * (after - before) for g, before, after in self.steps), np.zeros_like(self.theta))
        size = sum((abs(g) * (abs(b - self.mark) + abs(a - self.mark)) for g, b, a in self.steps), np.zeros_like(path))
        return path, size


class Truth:
    """A consolidator's memory.

    Args:
        rule: the rule's name and fields.
        strength, pull, average: as for the consolidator.
        unit: half a unit in the last place of state, relative; coarse: the same of the Fisher information and importance.
    """

    def __init__(self, rule, strength, pull, average, unit, coarse=0.0):
        self.kind, self.rule = rule["name"], rule
        self.strength, self.pull, self.average = strength, pull, average
        self.unit, self.coarse = ROUNDING * unit, coarse
        self.held: dict[str, Held] = {}
        self.steps = self.tasks = self.windows = 0
        self.lengths = []
        self.beyond_eps = np.zeros(2)
        self.written, self.disturbed, self.due = set(), False, False

    def look(self, theta, newcomers):
        """Take up parameters that grew, were moved by hand or are new."""
        for name, now in theta.items():
            held = self.held.get(name)
            if held is None:
                if name in newcomers:
                    self.held[name] = Held(now.copy())
            elif held.theta.shape != now.shape:
                held.grow(now)
            else:
                held.theta = now.copy()

    def foreign(self, theta, seen):
        """Take note that somebody else has moved the parameters, which counts for nothing; `seen` if that can be told."""
        self.disturbed = True
        for name, now in theta.items():
            held = self.held.get(name)
            if held is None or held.theta.shape != now.shape or np.array_equal(held.theta, now):
                continue
            if seen or (self.kind in ("RWalk", "SI") and self.steps):
                self.written.add(name)
            if self.kind == "RWalk" and self.steps and not held.ended:
                self.settle([held])
            held.start, held.mark, held.theta, held.ended = held.start + now - held.theta, now.copy(), now.copy(), True

    # A step

    def before(self, grads):
        """Take the gradients of a step into account; `after` says where it led."""
        for held in self.held.values():
            if self.steps == 0:
                held.mark, held.start, held.steps = held.theta.copy(), held.theta.copy(), []
        for name, g in grads.items():
            held = self.held[name]
            if self.kind in ("RWalk", "EWCpp", "TaskFisher"):
                a = 1 / (held.seen + 1) if self.kind == "TaskFisher" else self.rule["alpha"] if held.ever else 1.0
                held["fisher"] = a * g**2 + (1 - a) * held["fisher"]
                held["fisher_slack"] = (1 - a) * held["fisher_slack"] + (self.unit + self.coarse) * held["fisher"]
            held.ever, held.seen = True, held.seen + 1
        self.steps += 1
        self.due = self.kind == "RWalk" and self.steps % self.rule["delta_t"] == 0

    def after(self, grads, theta):
        self.written -= grads.keys()
        for held in self.held.values():
            held.ended = False
        for name, g in grads.items():
            held = self.held[name]
            held.steps.append((g, held.theta, theta[name].copy()))
            held.theta = theta[name].copy()
            held.count += 1
            held.average = held.average + (ETA + 1) / (held.count + ETA) * (held.theta - held.average)
        if self.kind == "RWalk" and self.due:
            self.settle()
        self.due = False

    def settle(self, which=None):
        eps = self.rule["eps"]
        for held in self.held.values() if which is None else which:
            path, size = held.path()
            distance = 0.5 * held["fisher"] * (held.theta - held.mark) ** 2
            held["score"] += path / (distance + eps)
            doubt = 0.5 * held["fisher_slack"] * (held.theta - held.mark) ** 2
            held["score_slack"] += (self.unit * size + abs(path) * (self.unit + doubt / (distance + eps))) / (distance + eps)
            self.windows += held.theta.size
            self.beyond_eps += [(distance - doubt > eps * 1.0001).sum(), (distance + doubt > eps * 0.9999).sum()]
            held.mark, held.steps = held.theta.copy(), []

    # Pulls

    def pulled(self, name, grad):
        """The gradient after the pull, and how far it may be off."""
        held = self.held[name]
        if self.pull != "gradient" or held["omega"] is None:
            return grad, 0.0
        moved = 2 * self.strength * (held.theta - held["point"])
        return grad + held["omega"] * moved, held["slack"] * abs(moved) + self.unit * abs(held["omega"] * moved)

    def drawn(self, name, theta, metric):
        """The parameter after the proximal pull, and how far it may be off."""
        held = self.held[name]
        if self.pull != "proximal" or held["omega"] is None:
            return theta, 0.0
        w, way = 2 * metric * self.strength * held["omega"], held["point"] - theta
        return theta + way * w / (1 + w), abs(way) * np.minimum(1, 2 * metric * self.strength * held["slack"])

    @property
    def dropped(self):
        """Whether the average is, as weights that went into it were changed later."""
        return any(self.held[name].count for name in self.written if name in self.held)

    def penalty(self):
        """The penalty, and how far it may be off."""
        squares = [(h, (h.theta - h["point"]) ** 2) for h in self.held.values() if h["omega"] is not None]
        value = self.strength * sum((h["omega"] * s).sum() for h, s in squares)
        return value, self.strength * sum((h["slack"] * s).sum() for h, s in squares) + self.unit * value

    # A task's end

    def conclude(self, frozen=()):
        """Return False where a scale is no more than what rounding left, and nothing can be said; what is frozen stays."""
        self.tasks += bool(self.steps or not self.tasks)
        sure, dropped = getattr(self, "_" + self.kind.lower())(), self.dropped
        for name, held in self.held.items():
            if held["omega"] is not None:
                held["slack"] = held["slack"] + self.coarse * held["omega"]
            if self.average == "tail" and held.count and not dropped and name not in frozen:
                held.theta = held.average.copy()
            held["point"] = held.theta.copy()
            held.seen, held.count, held.ended = 0, 0, False
        self.steps, self.written = 0, set()
        return sure

    def _rwalk(self):
        if self.steps % self.rule["delta_t"]:
            self.settle([held for held in self.held.values() if not held.ended])
        for held in self.held.values():
            held["score_slack"] = np.where(held["score"] < -held["score_slack"], 0.0, held["score_slack"])
            held["score"] = np.maximum(held["score"], 0)
            for key in ("score", "score_slack"):
                if held.seen:
                    old = held["total_" + key]
                    held["total_" + key] = held[key].copy() if old is None else 0.5 * (old + held[key])
                held[key] = np.zeros_like(held.theta)
        f, sure_f = self.scaled("fisher", np.max)
        s, sure_s = self.scaled("total_score", np.max)
        for held, (a, da), (b, db) in zip(self.held.values(), f, s, strict=True):
            held["omega"], held["slack"] = a + b, da + db
        return sure_f and sure_s

    def _ewcpp(self):
        for held in self.held.values():
            held["omega"], held["slack"] = held["fisher"].copy(), held["fisher_slack"].copy()
        return True

    def _taskfisher(self):
        scaled, sure = self.scaled("fisher", np.mean)
        before = np.mean(self.lengths or [1])
        self.lengths += [self.steps] if self.steps else []
        length, began = np.mean(self.lengths or [1]), len(self.lengths) > (self.steps > 0)
        fade = np.sqrt(before / length) if began else 1.0
        for held, (new, slack) in zip(self.held.values(), scaled, strict=True):
            new, slack = new / np.sqrt(length), slack / np.sqrt(length)
            if held["omega"] is None:
                held["omega"], held["slack"] = new, slack
            else:
                held["omega"] = held["omega"] * fade + (new if held.seen else 0)
                held["slack"] = held["slack"] * fade + (slack if held.seen else 0)
            held["fisher"], held["fisher_slack"] = np.zeros_like(held.theta), np.zeros_like(held.theta)
        return sure

    def _si(self):
        for held in self.held.values():
            path, size = held.path()
            below = (held.theta - held.start) ** 2 + self.rule["xi"]
            new, slack = np.maximum(path / below, 0), self.unit * (size + abs(path)) / below
            old = held["omega"] is not None
            held["omega"] = held["omega"] + new if old else new
            held["slack"] = held["slack"] + slack + self.unit * held["omega"] if old else slack
            held.steps, held.mark = [], held.theta.copy()
        return True

    def _l2(self):
        for held in self.held.values():
            held["omega"], held["slack"] = np.ones_like(held.theta), np.zeros_like(held.theta)
        return True

    def scaled(self, key, figure):
        """Divide by a figure over all elements; return pairs of value and slack, and whether that figure is sure."""
        zero = [np.zeros_like(h.theta) for h in self.held.values()]
        raw = [z if h[key] is None else h[key] for h, z in zip(self.held.values(), zero, strict=True)]
        slack = [z if h[key] is None else h[key + "_slack"] for h, z in zip(self.held.values(), zero, strict=True)]
        flat, loose = (np.concatenate([r.ravel() for r in some]) if some else np.zeros(0) for some in (raw, slack))
        c, dc = (figure(flat), figure(loose)) if flat.size else (0.0, 0.0)
        pairs = []
        for r, s in zip(raw, slack, strict=True):
            pairs.append((r / c, s / c + r / c * (2 * dc / c + self.unit)) if c > 0 else (np.zeros_like(r), np.zeros_like(r)))
        return pairs, dc < c / 4 or (c == 0 and dc == 0)
