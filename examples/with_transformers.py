"""# In Hugging Face's Trainer

`ConsolidationCallback` goes into the `Trainer`; model, data and arguments stay as they are. One `train()` is one task: when it
ends, the memory is consolidated, and in the next one it holds the weights that earlier tasks need. Accumulated gradients,
clipping, bf16, fp16 and DistributedDataParallel work as usual; TRL's `SFTTrainer` takes the same callback.

Here a small language model learns to talk about a kitchen, then about a harbour; first without a memory, then with one. To run
it: `pip install -e '.[transformers]'`, then `python examples/with_transformers.py`. Nothing is downloaded.
"""

import itertools
import random
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, logging

from rwalk import EWC, RWalk
from rwalk.integrations.transformers import ConsolidationCallback, protect

torch.set_num_threads(1)  # small networks are fastest with one
logging.set_verbosity_error()

# All 256 sentences of a place follow one pattern; 192 are for training and 64 for testing. Four of the eight words after the
# first are one of four at random, so the best possible loss is ln(4) / 2 = 0.69.

places = {
    "kitchen": ("cook baker guest waiter", "cuts fries tastes serves", "onion bread fish soup", "salt butter pepper oil"),
    "harbour": ("captain sailor pilot diver", "steers paints leaves moors", "ship boat ferry raft", "rope wind steam care"),
}
texts = {}
for place, parts in places.items():
    texts[place] = [[place, ":", "the", a, b, "the", c, "with", d] for a, b, c, d in itertools.product(*map(str.split, parts))]
    random.Random(0).shuffle(texts[place])
words = sorted({word for place in texts for text in texts[place] for word in text})


def examples(texts):
    rows = [[words.index(word) for word in text] for text in texts]
    return [{"input_ids": row, "labels": row} for row in rows]


train = {place: examples(texts[place][:192]) for place in places}
test = {place: examples(texts[place][192:]) for place in places}


def untrained():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **size, bos_token_id=None, eos_token_id=None))


# A new `Trainer` for each task, with the same callback for all. The callback adds the penalty to the Trainer's log, and sends
# each layer's share of the importance and its drift to the Trainer's trackers.

folder = tempfile.TemporaryDirectory()
quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
arguments = TrainingArguments(folder.name, num_train_epochs=4, learning_rate=3e-3, per_device_train_batch_size=16, **quiet)


def losses(trainer):
    return {place: trainer.evaluate(test[place])["eval_loss"] for place in places}


def learn(model, tasks, callbacks=None):
    for place in tasks:
        trainer = Trainer(model=model, args=arguments, train_dataset=train[place], callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)  # less to read
        trainer.train()
    return losses(trainer)


# Rules that measure on data, such as `EWC`, go through the task's data when it ends. For a language model `labels="true"` uses
# the loss that the model computes itself, for each example the mean over its tokens.

ewc = {"rule": EWC(labels="true"), "strength": 1e5, "pull": "proximal"}
results = {
    "no memory": learn(untrained(), places),
    "RWalk": learn(untrained(), places, [ConsolidationCallback(RWalk(), strength=30)]),
    "EWC": learn(untrained(), places, [ConsolidationCallback(**ewc)]),
}

# A pretrained model can be protected before it is fine-tuned for the first time, on examples of what it does well. Only
# parameters that require gradients are held: under PEFT the adapters alone, so add these first. `memory.summary()` shows how
# much of the model that is.

pretrained = untrained()
results["kitchen alone"] = learn(pretrained, ["kitchen"])
memory = protect(pretrained, train["kitchen"], **ewc)
results["protected before the harbour"] = learn(pretrained, ["harbour"], [ConsolidationCallback(memory)])

print("Loss on each place (lower is better)")
for name, result in results.items():
    print(f"{name:<29}", *(f"{place} {result[place]:.2f}  " for place in places))
print(memory.summary())

# With `save_steps`, each checkpoint's folder also contains the memory, as `memory.safetensors`, and
# `train(resume_from_checkpoint=True)` continues in the middle of a task with the same results, with a new callback in a new
# process, too. With `load_best_model_at_end` the task is the training that led to the best checkpoint.
#
# DeepSpeed, XLA and the first version of FSDP hide gradients from hooks, so training under them is refused.

folder.cleanup()
