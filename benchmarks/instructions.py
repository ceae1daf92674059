"""What the Triton kernels ask of a GPU, read from their machine code: no GPU is needed, and no time is taken.

Kernels for the shapes of ResNet-50 and of long rows are compiled for a compute capability and disassembled. For each:
the tile, the programs, registers of a thread, spills, the widest load in bytes, and instructions a value (what a warp
issues for every 32 values of the input, prologues and overhang included). `issue` sets the time that a GPU takes to
issue these beside the time that its memory takes for the bytes: well below 1, the memory is what the kernel waits for;
above 1, no kernel of this form can reach the memory's speed. The GPU's numbers are options; those of an H200 are given.

    python benchmarks/instructions.py [--filter "BN 128×64"] [--capability 90] [--json]
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Annotated

os.environ.pop("TRITON_INTERPRET", None)

import torch
import typer
from rich.console import Console
from rich.table import Table

from normwright.bench import Row, rows
from normwright.bench.cases import layer_of
from normwright.kernels.triton import ahead
from normwright.layers import twins


def launches(row: Row, processors: int) -> list[ahead.Launch]:
    """The launches of a row of `normwright bench --device cuda`."""
    memory = torch.channels_last if row.layout == "NHWC" else torch.contiguous_format
    x, residual = (
        torch.empty(row.shape, device="meta", dtype=row.dtype, memory_format=memory, requires_grad=row.backward)
        for _ in range(2)
    )
    layer = layer_of(row, twins, act=row.act).to("meta")
    with torch.set_grad_enabled(row.backward):
        found = ahead.launches(
            lambda: (lambda y: y.backward(torch.empty_like(y)) if row.backward else y)(
                layer(x, residual=residual if row.residual else None)
            ),
            processors,
        )
    return [launch for launch in found if row.forward or launch.kernel.startswith("backward")]


def main(
    filter: Annotated[str, typer.Option(help="Only rows whose name contains this.")] = "",
    capability: Annotated[int, typer.Option(help="Compute capability, times ten.")] = 90,
    processors: Annotated[int, typer.Option(help="Multiprocessors.")] = 132,
    clock: Annotated[float, typer.Option(help="Their clock, in GHz.")] = 1.98,
    bandwidth: Annotated[float, typer.Option(help="Of the device's memory, in TB/s.")] = 4.8,
    json_: Annotated[bool, typer.Option("--json", help="A line of JSON for every kernel.")] = False,
) -> None:
    """Compile, disassemble, count."""
    table = Table("row", "kernel", "tile", "warps", "programs", "registers", "spills", "load", "instructions", "issue")
    codes: dict[tuple, ahead.Code] = {}
    shares = []
    for row in rows("cuda"):
        if filter not in row.name:
            continue
        needed = moved = 0.0
        for launch in launches(row, processors):
            if launch.key not in codes:
                codes[launch.key] = launch.code(capability)
            code = codes[launch.key]
            each = launch.per_value(code)
            # four schedulers of a processor issue an instruction for 32 values a cycle each
            issue, memory = each / (processors * 4 * 32 * clock * 1e9), launch.bytes_a_value / (bandwidth * 1e12)
            needed, moved = needed + issue, moved + memory
            widest = max((loop.widest for loop in code.loops), default=0) or code.widest
            line = {
                "row": row.name, "kernel": launch.kernel, "tile": list(launch.tile), "warps": launch.warps,
                "programs": math.prod(launch.grid), "registers": code.registers, "spills": code.spilled,
                "load": widest, "instructions": round(each, 1), "issue": round(issue / memory, 2),
            }  # fmt: skip
            if json_:
                print(json.dumps(line, ensure_ascii=False), flush=True)
            tile = f"{launch.tile[0]}×{launch.tile[1]}"
            table.add_row(*(str(value) for value in (line | {"tile": tile}).values()))
        shares.append((needed / moved, row.name))
    if not shares:
        sys.exit(
            f"No row's name contains {filter!r}; they read like 'BN+relu 128×64×56×56 NHWC bfloat16 train fwd+bwd'."
        )
    if json_:
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    mean = math.exp(sum(math.log(share) for share, _ in shares) / len(shares))
    console.print(
        f"Issue beside memory, {len(shares)} rows, both passes of a row together: geometric mean {mean:.2f}, largest "
        f"{max(shares)[0]:.2f} ({max(shares)[1]}). Compute capability {capability / 10:.1f}, {processors} processors "
        f"at {clock} GHz, {bandwidth} TB/s; torch {torch.__version__}."
    )


if __name__ == "__main__":
    typer.run(main)
