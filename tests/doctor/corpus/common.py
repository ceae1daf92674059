"""Data and training loops that the programs share: nothing here is at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def blobs(n: int = 512, features: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes as Gaussian clouds, shuffled, on the raw scale of a table: means about 5, deviations about 2."""
    g = torch.Generator().manual_seed(seed)
    centres = 5 + 2.5 * torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + 2 * torch.randn(n, features, generator=g), y


def images(n: int = 256, classes: int = 3, size: int = 8, channels: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy pictures of stripes in `classes` directions, in 0 … 1."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    axis = torch.arange(size, dtype=torch.float32)
    angle = y.float() * torch.pi / classes
    phase = 6.28 * torch.rand(n, 1, 1, generator=g)
    wave = angle.cos()[:, None, None] * axis[None, :, None] + angle.sin()[:, None, None] * axis[None, None, :]
    x = 0.5 + 0.3 * (1.5 * wave + phase).sin()
    x = x[:, None] + 0.08 * torch.randn(n, channels, size, size, generator=g)
    return x.clamp(0, 1), y


def batches(x: Tensor, y: Tensor, size: int = 32, steps: int | None = None, seed: int = 0) -> Iterable:
    """Shuffled batches, epoch after epoch until `steps` are made; one epoch by default."""
    g = torch.Generator().manual_seed(seed)
    made = 0
    while steps is None or made < steps:
        order = torch.randperm(len(x), generator=g)
        for at in range(0, len(x) - size + 1, size):
            if steps is not None and made == steps:
                return
            made += 1
            yield x[order[at : at + size]], y[order[at : at + size]]
        if steps is None:
            return


def loader(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """One shuffled epoch that can be read again."""
    return list(batches(x, y, size))


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 120,
    size: int = 32,
    lr: float = 0.05,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Module:
    """Train with plain SGD, the learning rate falling to a twentieth at the end; leaves the model in evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 20)
    model.train()
    for inputs, targets in batches(x, y, size, steps):
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def norm_free_decay(model: nn.Module, lr: float = 0.05, decay: float = 1e-4) -> torch.optim.Optimizer:
    """SGD whose weight decay leaves vectors (γ, β, biases) alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def cnn(classes: int = 3, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, channels: int = 1) -> nn.Sequential:
    """Conv → norm → ReLU twice, pooling, and a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


def mlp(
    features: int = 12, classes: int = 4, norm: Callable[[int], nn.Module] = nn.BatchNorm1d, width: int = 24
) -> nn.Sequential:
    """Linear → norm → ReLU twice, and a linear classifier."""
    return nn.Sequential(
        nn.Linear(features, width, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def examined(model: nn.Module, x: Tensor, y: Tensor, **more) -> dict:
    """The arguments of `diagnose` for a classifier: 64 samples, their labels and cross-entropy."""
    return {"model": model, "inputs": x[:64], "targets": y[:64], "loss": F.cross_entropy, **more}
