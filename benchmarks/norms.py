"""Norms in training steps: batch, instance, group, layer and RMS norm against torch's modules, checked against float64.

On the CPU the rows are the shapes of LeNet, ResNet-18 and ResNet-50 at batch 32 and of transformers, forward and
backward. On a GPU they are those of ResNet-50 at batch 128, and layer and RMS norm of rows of 1024 to 16384 values,
forward alone and backward alone, beside quack and Liger where these are installed. All are in float32 and bfloat16,
images in both memory layouts; how they are timed is told in `normwright/bench`. The same as `normwright bench
--training` or `normwright bench --device cuda`, and the JSON lines are kept.

    python benchmarks/norms.py [--device cuda] [--out norms.jsonl] [--filter "BN relu"] [--seconds 1] [--compile]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normwright.bench import command
from normwright.lab.errors import UserError


def main(
    out: Annotated[Path, typer.Option(help="File for the JSON lines.")] = Path("norms.jsonl"),
    device: Annotated[str, typer.Option(help="cpu, or cuda for the current GPU.")] = "cpu",
    filter_: Annotated[str, typer.Option("--filter", help="Rows with all of these words in the name.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for the turns of a row, beyond the first five.", min=0)] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile too, slowly.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A dozen small rows, few turns.")] = False,
) -> None:
    """Time the rows; exit code 1 if a kernel is wrong."""
    training = device == "cpu"  # a GPU's rows are all of the target, forward alone too
    try:
        command(filter_, device, quick, training, seconds=seconds, compiled=compiled, out=out)
    except UserError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
