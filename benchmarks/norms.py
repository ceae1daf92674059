"""Norms in training steps: batch, instance, group, layer and RMS norm against torch's modules, checked against float64.

The rows are the shapes of LeNet, ResNet-18 and ResNet-50 at batch 32 and of transformers, forward and backward, in
float32 and bfloat16, images in both memory layouts; how they are timed is told in `normwright/bench.py`. The same as
`normwright bench --training`, and the JSON lines are kept.

    python benchmarks/norms.py [--out norms.jsonl] [--filter "BN relu"] [--seconds 1] [--compile]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normwright.bench import command


def main(
    out: Annotated[Path, typer.Option(help="File for the JSON lines.")] = Path("norms.jsonl"),
    filter_: Annotated[str, typer.Option("--filter", help="Rows with all of these words in the name.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for the turns of a row, beyond the first five.", min=0)] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile too, slowly.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A dozen small rows, few turns.")] = False,
) -> None:
    """Time the training rows; exit code 1 if a kernel is wrong."""
    command(filter_=filter_, quick=quick, training=True, seconds=seconds, compiled=compiled, out=out)


if __name__ == "__main__":
    typer.run(main)
