"""Rules that measure on data, on what Hugging Face trains on: batches are dictionaries, and models compute their loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from rwalk import Consolidator
from rwalk._errors import explain
from rwalk.importance.base import Importance
from rwalk.parameters import bare, trainable


def protect(
    model: nn.Module,
    dataset: Any,
    rule: Importance[Any] | None = None,
    strength: float | None = None,
    *,
    data_collator: Callable[[Any], Any] = default_data_collator,
    batch_size: int = 8,
    loss: Callable[[Any, Any], Tensor] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> Consolidator:
    """Hold a pretrained model to what it can do, before any fine-tuning: pass the result to `ConsolidationCallback`.

    What requires gradients is protected: under PEFT the adapters alone. `summary()` says how much that is.

    Args:
        model: the pretrained model, with its adapters if there are to be any.
        dataset: examples of what it does well, as Trainer takes them, or a loader; None for rules that measure nothing.
        rule: one that measures on data, such as `EWC()`; for a language model `EWC(labels="sample")`.
        strength: as in `Consolidator`.
        data_collator: as in Trainer.
        batch_size: how many examples are read at a time, which changes nothing in the result.
        loss: as in `ConsolidationCallback`.
        logits: as in `ConsolidationCallback`.
        options: further arguments of `Consolidator`.

    Raises:
        RuntimeError: if the rule measures during training.
        ValueError: if everything is frozen, or there is no data that the rule can measure on.
    """
    memory = Consolidator(model, rule, strength, **options)
    if not trainable(model):
        remedy = "Thaw some with `requires_grad_(True)`, or add adapters first."
        raise ValueError(explain("a model whose parameters are all frozen", "some that fine-tuning can move", remedy))
    data = None if dataset is None else loader(model, dataset, data_collator, batch_size)
    memory.estimate(**read(data, memory.rule, loss, logits))
    return memory


class Batches:
    """A loader's batches, of which those whose labels have other names than "labels" stand for their labels too."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        """Go through the batches."""
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(0)  # in one order, also where training was resumed in the middle of an epoch
        for batch in self._data:
            yield (batch, batch) if isinstance(batch, Mapping) and "labels" not in batch else batch


def loader(model: nn.Module, dataset: Any, collator: Callable[[Any], Any], batch_size: int) -> Iterable[Any]:
    """Go through a data set in order, with the columns that the model takes, as Trainer has them."""
    if isinstance(dataset, DataLoader):
        return dataset
    root: Any = bare(model)
    names = signature((root.get_base_model() if hasattr(root, "get_base_model") else root).forward).parameters
    return DataLoader(dataset, batch_size, collate_fn=RemoveColumnsCollator(collator, [*names, "label", "label_ids"]))


def read(data: Iterable[Any] | None, rule: Importance[Any], loss: Any, logits: Any) -> dict[str, Any]:
    """Return the arguments of `consolidate`; a rule that takes the data's labels gets the loss that the model computes."""
    own = own_loss if getattr(rule, "labels", None) == "true" else None
    return {"data": None if data is None else Batches(data), "loss": loss or own, "logits": logits}


def own_loss(output: Any, _: Any) -> Tensor:
    """Return the loss in a model's output, where Trainer looks for it, too.

    Raises:
        ValueError: if there is none, as there are no labels.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    if not isinstance(loss, Tensor):
        came, expected = "an output without the model's own loss", 'labels in each batch, mostly under "labels"'
        raise ValueError(explain(came, expected, "Let the data collator make them, or pass `loss=`."))
    return loss
