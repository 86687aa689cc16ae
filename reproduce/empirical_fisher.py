"""Why EWC seems to fail on language models: with the data's labels, what a model has learned well has hardly any importance.

`python -m reproduce.empirical_fisher` trains a small character model on one domain of text until it knows it by heart, measures
its Fisher information with the data's labels (the empirical one, as most code does) and with labels drawn from the model, and
lets both hold it while it learns another domain. Three minutes on one core. Texts are `lm_domains`, below `RWALK_DATA`.
"""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk import EWC, Consolidator, Kronecker
from rwalk.rules import Rule

LENGTH, TEXTS, WIDTH = 64, 64, 96
"""Characters of a text, texts of a domain, and width of the model."""
METHODS: dict[str, tuple[Rule[Any] | None, tuple[float, ...]]] = {
    "not held": (None, (0.0,)),
    "EWC, data's labels": (EWC(labels="true"), (1.0, 10.0, 100.0)),
    "EWC, drawn labels": (EWC(labels="sample"), (1.0, 10.0, 100.0)),
    "default": (Kronecker(), (0.1, 1.0)),
}
"""Rules and strengths."""


class Characters(nn.Module):
    """A causal transformer over bytes: logits (texts, places, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the character after each place."""
        hidden = self.words(x) + self.places.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


def domain(number: int) -> Tensor:
    """Return texts of a domain as bytes, (texts, places + 1)."""
    table = pq.read_table(Path(os.environ["RWALK_DATA"]) / "lm_domains" / "train.parquet").to_pydict()
    every = "".join(t for t, d in zip(table["text"], table["domain"], strict=True) if d == number).encode("ascii", "ignore")
    return torch.tensor(list(every[: TEXTS * (LENGTH + 1)])).view(TEXTS, LENGTH + 1)


def loss_of(model: nn.Module, texts: Tensor) -> Tensor:
    """Return the mean loss in nats per character."""
    return F.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())


def train(model: nn.Module, texts: Tensor, steps: int, memory: Consolidator | None = None) -> None:
    """Train a model with Adam, under a memory if there is one."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if memory is not None:
        memory.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, texts[torch.randint(TEXTS, (16,))]).backward()
        optimizer.step()


def squares(model: nn.Module, texts: Tensor, drawn: bool) -> Tensor:
    """Return the squared norm of the gradient of each place's log-likelihood, for the data's labels or drawn ones."""
    found = []
    for text in texts:
        score = model(text[None, :-1])[0].log_softmax(1)
        labels = torch.multinomial(score.exp(), 1) if drawn else text[1:, None]
        for row in score.gather(1, labels)[:, 0]:
            gradient = torch.autograd.grad(row, list(model.parameters()), retain_graph=True, allow_unused=True)
            found.append(sum((g.square().sum() for g in gradient if g is not None), torch.zeros(())))
    return torch.stack(found)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, first, second = Characters(), domain(0), domain(2)
    train(model, first, 1500)
    print(f"Loss on the first domain: {float(loss_of(model, first)):.3f} nats per character")
    for name, drawn in (("data's labels", False), ("drawn labels", True)):
        each = squares(model, first[:16], drawn)
        top = each.sort(descending=True).values[: len(each) // 100].sum() / each.sum()
        print(f"{name}: mean squared gradient of a place {float(each.mean()):.1f}, the largest 1 % hold {float(top):.0%}")
    data = [(first[i : i + 16, :-1], first[i : i + 16, 1:]) for i in range(0, TEXTS, 16)]
    for name, (rule, strengths) in METHODS.items():
        for strength in strengths:
            torch.manual_seed(1)
            held = copy.deepcopy(model)
            memory = None if rule is None else Consolidator(held, rule, strength, pull="proximal")
            if memory is not None:
                memory.estimate(data)
            train(held, second, 300, memory)
            if memory is not None and memory.average == "tail":
                memory.consolidate()
            after = float(loss_of(held, first)), float(loss_of(held, second))
            print(f"{name}, strength {strength:g}: first domain {after[0]:.2f}, second {after[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
