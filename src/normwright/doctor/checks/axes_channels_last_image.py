from __future__ import annotations

from .axes_sequence_as_channels import SequenceAsChannels

__all__ = ["ChannelsLastImage"]


class ChannelsLastImage(SequenceAsChannels):
    """A batch norm gets an image with its features on the last axis, and normalizes rows of the image.

    What it does
        As NW301, for inputs of four and five axes: (N, H, W, C) where the norm takes axis 1 as channels. Found is only
        where what comes before and after shows that axis 1 is a place and the last axis the features, with the same
        proof; and a norm that raises, and would run with its features on axis 1.

    Why is this bad
        Each row of the image gets its own mean, variance, weight and bias, and the features keep their scales. It runs
        without a word where the height is the number of channels that the norm was given.

    Example
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
                self.norm = torch.nn.BatchNorm2d(8)
                self.mix = torch.nn.Linear(8, 4)

            def forward(self, x):
                y = self.conv(x).permute(0, 2, 3, 1)
                return self.mix(torch.relu(self.norm(y))).mean((1, 2))

        model = Model()
        inputs = torch.randn(16, 3, 8, 8)

    Use instead
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
                self.norm = torch.nn.BatchNorm2d(8)
                self.mix = torch.nn.Linear(8, 4)

            def forward(self, x):
                y = torch.relu(self.norm(self.conv(x))).permute(0, 2, 3, 1)
                return self.mix(y).mean((1, 2))

        model = Model()
        inputs = torch.randn(16, 3, 8, 8)

    Fix safety
        By hand: move the features to axis 1 for the norm. `channels_last` as a memory format is another thing, and
        right.

    References
        torch.nn.BatchNorm2d: input (N, C, H, W).
    """

    code = "NW304"
    name = "channels-last-image"
    dims = (4, 5)
