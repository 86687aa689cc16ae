"""What a consolidator holds and does, in figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rwalk import _html
from rwalk._errors import printable
from rwalk._parameters import named_parameters
from rwalk.anchors.base import Anchor
from rwalk.consolidation import proximal
from rwalk.consolidation.memory import Memory
from rwalk.distributed.shards import ALONE, ShardGroup


class Scalars(Protocol):
    """Figures about something."""

    def scalars(self, prefix: str) -> dict[str, float]:
        """Return the figures by name."""


class KeptFigures(Protocol):
    """What can tell how much of what a model knew is left, as `rwalk.Snapshot`."""

    def kept(self, model: nn.Module) -> Scalars:
        """Compare a model with what it was like."""


@dataclass(frozen=True)
class LayerSummary:
    """One module's share in what is held.

    Args:
        name: the module's name.
        share: its share of all importance, a fraction.
        drift: how far its weights are from the anchor, over the norm of the anchor; 0 right after a task.
    """

    name: str
    share: float
    drift: float


@dataclass(frozen=True)
class Summary:
    """Configuration, figures and layers of a consolidator; prints as text, and as a table under rich.

    Args:
        settings: rule, strength, pull with its metric, averaging, tasks, and how much of the model is protected.
        figures: penalty and what the rule reports, by name.
        layers: share of importance and drift of each module.
    """

    settings: dict[str, Any]
    figures: dict[str, float]
    layers: list[LayerSummary]

    def __str__(self) -> str:
        """Lay the summary out as plain text."""
        lines = [f"{key}: {value}" for key, value in self.settings.items()]
        lines += [f"{key}: {value:.4g}" for key, value in self.figures.items()]
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines += [
            f"{printable(layer.name, keep=''):<{width}}  holds {layer.share:6.1%}  drift {layer.drift:.3g}"
            for layer in self.layers
        ]
        return "\n".join(lines)

    def scalars(self, prefix: str = "memory/") -> dict[str, float]:
        """Return all figures as one flat dictionary, as loggers take them: `memory/penalty`, `memory/drift/fc1`."""
        scalars = {name.replace(" / ", " over "): value for name, value in self.figures.items()}
        scalars |= {f"share/{layer.name}": layer.share for layer in self.layers}
        scalars |= {f"drift/{layer.name}": layer.drift for layer in self.layers}
        return {prefix + name.replace(" ", "_"): value for name, value in scalars.items()}

    def _repr_html_(self) -> str:
        rows = [[layer.name, f"{layer.share:.1%}", f"{layer.drift:.3g}"] for layer in self.layers]
        about = {**self.settings, **{name: f"{value:.4g}" for name, value in self.figures.items()}}
        return _html.table(["layer", "importance", "drift"], rows, ", ".join(f"{k}: {v}" for k, v in about.items()))

    def __rich__(self) -> Any:
        """Lay the summary out as a table for rich."""
        from rich.table import Table
        from rich.text import Text

        caption = Text(", ".join(f"{k} {v:.4g}" for k, v in self.figures.items()), "table.caption")
        table = Table(title=Text(str(self.settings["rule"]), "table.title"), caption=caption)
        for heading in ("layer", "importance", "drift"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for layer in self.layers:
            table.add_row(Text(printable(layer.name, keep="")), f"{layer.share:.1%}", f"{layer.drift:.3g}")
        return table


def summarise(
    memory: Memory,
    pull: str,
    skipped: int,
    penalty: float,
    loss: float | Tensor | None = None,
    snapshot: KeptFigures | None = None,
) -> Summary:
    """Return a summary of what a memory holds; see `Consolidator.summary`."""
    parameters, theta = memory.protected.parameters, memory.protected.theta
    settings = {name: getattr(memory, name) for name in ("rule", "strength")}
    settings |= {"pull": pull, "average": memory.average, "tasks": memory.tasks}
    settings["protects"] = f"{_count(parameters):,} of {_count(named_parameters(memory.model)):,} parameters"
    if pull == "proximal" and memory.optimizer is not None:
        settings["metric of the pull"] = proximal.metric(memory.optimizer, not memory.rule.anchor_kind.by_element)
    figures = {"penalty": penalty} | ({"steps left out": float(skipped)} if skipped else {})
    if loss is not None and float(loss):
        figures["penalty / loss"] = penalty / float(loss)
    if snapshot is not None:
        figures |= snapshot.kept(memory.model).scalars("kept ")
    held = memory.anchor, theta, memory.protected.shard_group
    return Summary(settings, figures | memory.rule.report(memory.state, *held), layer_summaries(*held))


def _count(parameters: Mapping[str, Tensor]) -> int:
    return sum(p.numel() for p in parameters.values() if not is_lazy(p))


def layer_summaries(anchor: Anchor, theta: Mapping[str, Tensor], shard_group: ShardGroup = ALONE) -> list[LayerSummary]:
    """Measure each module's share of the importance and its drift from the anchor."""
    held: dict[str, list[str]] = {}
    for name in anchor.point:
        held.setdefault(name.rpartition(".")[0] or name, []).append(name)
    totals = anchor.totals(shard_group)
    omega = [sum(totals[n] for n in names) for names in held.values()]
    moved = shard_group.sums([_square([theta[n] - anchor.point[n].to(theta[n].device) for n in ns]) for ns in held.values()])
    point = shard_group.sums([_square([anchor.point[n] for n in names]) for names in held.values()])
    whole = sum(omega) or 1.0
    return [
        LayerSummary(module, share / whole, (far / (norm or 1.0)) ** 0.5)
        for module, share, far, norm in zip(held, omega, moved, point, strict=True)
    ]


def _square(tensors: list[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors)
