"""One batch overflows; the step is skipped, but the norms have already averaged the infinity into their statistics.

Modelled on pytorch/pytorch issue 88474, "Mixed precision training fails due to NaN in batch norm running_mean",
https://github.com/pytorch/pytorch/issues/88474
"""

import torch
import torch.nn.functional as F

from .common import batches, cnn, examined, images

CODES = {"NW103", "NW804"}


def program(check_inputs):
    x, y = images()
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for step, (inputs, targets) in enumerate(batches(x, y, 32, 120)):
        if step == 70:
            inputs = inputs.clone()
            inputs[3, 0, 2, 2] = float("inf")
        if check_inputs and not inputs.isfinite().all():
            continue
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        if loss.isfinite():
            optimizer.step()
        schedule.step()
    return examined(model.eval(), x, y)


def buggy():
    return program(False)


def fixed():
    return program(True)
