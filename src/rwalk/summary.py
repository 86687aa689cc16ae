"""What a consolidator holds and does, in figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rwalk.anchor import Anchor


@dataclass(frozen=True)
class Layer:
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
        settings: rule, strength, pull with its metric, averaging, tasks.
        figures: penalty and what the rule reports, by name.
        layers: share of importance and drift of each module.
    """

    settings: dict[str, Any]
    figures: dict[str, float]
    layers: list[Layer]

    def __str__(self) -> str:
        """Lay the summary out as plain text."""
        lines = [f"{key}: {value}" for key, value in self.settings.items()]
        lines += [f"{key}: {value:.4g}" for key, value in self.figures.items()]
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines += [f"{layer.name:<{width}}  holds {layer.share:6.1%}  drift {layer.drift:.3g}" for layer in self.layers]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        """Lay the summary out as a table for rich."""
        from rich.table import Table

        table = Table(title=str(self.settings["rule"]), caption=", ".join(f"{k} {v:.4g}" for k, v in self.figures.items()))
        for heading in ("layer", "importance", "drift"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for layer in self.layers:
            table.add_row(layer.name, f"{layer.share:.1%}", f"{layer.drift:.3g}")
        return table


def layers(anchor: Anchor, theta: Mapping[str, Tensor]) -> list[Layer]:
    """Measure each module's share of the importance and its drift from the anchor."""
    held: dict[str, list[str]] = {}
    for name in anchor.point:
        held.setdefault(name.rpartition(".")[0] or name, []).append(name)
    whole = sum(float(omega.sum()) for omega in anchor.omega.values()) or 1.0
    return [
        Layer(
            module,
            sum(float(anchor.omega[n].sum()) for n in names) / whole,
            _norm([theta[n] - anchor.point[n].to(theta[n].device) for n in names])
            / (_norm([anchor.point[n] for n in names]) or 1.0),
        )
        for module, names in held.items()
    ]


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(float(t.square().sum()) for t in tensors) ** 0.5)
