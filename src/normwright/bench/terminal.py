"""`normwright bench`: options, progress, JSON lines, the table and what stands below it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..allocator import tune_allocator
from ..lab.errors import UserError
from .devices import DEVICES, Device
from .measure import TURNS, Result, Summary, Timing, bench, summary
from .others import LIBRARIES
from .row import Row, dtype_name, quick_rows, rows

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def environment(allocator: str, device: Device) -> dict[str, Any]:
    """Machine, versions, commit, threads, date, load; what a figure needs to be worth anything."""
    from ..lab.journal import environment as machine

    return {
        "type": "environment",
        **machine(),
        "numba": version("numba"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        "cache_bytes": device.tile_bytes,
        "capability": torch.backends.cpu.get_cpu_capability(),
        **device.about(),
        "allocator": allocator,
        "load": load(),
    }


def load() -> float | None:
    """The load average over the last minute, in processes, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command(
    filter_: Annotated[
        str,
        typer.Option("--filter", help="Rows with all of these words in the name, as in --filter 'BN relu NHWC'."),
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, or cuda for the current GPU; each has its own rows.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A dozen small rows, few turns: does it run at all?")] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Only training steps, forward and backward: the project's target.")
    ] = False,
    repeat: Annotated[int, typer.Option(help="Turns of a row at most.", min=TURNS)] = 30,
    seconds: Annotated[float, typer.Option(help="Time for the turns of a row, beyond the first five.", min=0)] = 1.0,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Time torch.compile too; left out by default, for it compiles every row anew."),
    ] = False,
    kernel: Annotated[
        str | None,
        typer.Option(help="Demand a kernel: cpu, triton or native.", show_default="the best; triton on a GPU"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Torch's threads.", min=1, show_default="as they are")] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune-allocator/--no-tune-allocator", help="Keep freed memory, for both sides alike."),
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON lines and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON lines to a file too.", show_default=False)] = None,
) -> None:
    """Check every kernel against float64 and time it against torch; exit code 1 if one is wrong."""
    from rich.console import Console

    if device not in DEVICES:
        raise UserError(f"--device is one of {', '.join(DEVICES)}; got {device!r}.")
    timed_on = DEVICES[device]()
    words = filter_.lower().split()
    everything = (quick_rows if quick else rows)(device)
    chosen = [row for row in everything if all(w in row.name.lower() for w in words)]
    if training:
        chosen = [row for row in chosen if row.training and row.backward]
    if not chosen:
        raise UserError(f"No row has all of {filter_!r} in its name; a name is, for example, {everything[0].name!r}.")
    if quick:
        repeat, seconds = min(repeat, 7), min(seconds, 0.2)
    with _threads(threads):
        results = _run(chosen, timed_on, repeat, seconds, compiled, kernel, tune, json_, out, Console(stderr=True))
    if any(result.wrong for result in results):
        raise typer.Exit(1)


def _run(
    chosen: list[Row], device: Device, repeat: int, seconds: float, compiled: bool, kernel: str | None, tune: bool,
    json_: bool, out: Path | None, errors: Console,
) -> list[Result]:  # fmt: skip
    """The rows with a progress bar, JSON lines as they come, and the table at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    about = environment(tune_allocator().reason if tune else "As it is.", device)
    busy = about["load"]
    if busy is not None and busy > 0.5:
        errors.print(
            f"The machine is busy: {busy:.1f} processes ran on average in the last minute, before this one. "
            "Look at the quartiles, and run it again when the machine is quiet.",
            style="yellow",
            soft_wrap=True,
        )
    lines: list[dict[str, Any]] = []

    def say(record: dict[str, Any]) -> None:
        lines.append(record)
        if json_:
            typer.echo(json.dumps(record, ensure_ascii=False))
        if out is not None:
            out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    say(about)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(chosen[0].name, total=len(chosen))

        def done(result: Result) -> None:
            say(result.record())
            at = chosen.index(result.row) + 1
            progress.update(task, advance=1, description=chosen[min(at, len(chosen) - 1)].name)

        results = bench(
            chosen, repeat=repeat, seconds=seconds, compiled=compiled, kernel=kernel, device=device, done=done
        )
    total = summary(results, device.l2_bytes)
    say({"type": "summary", **asdict(total), "load": load(), "kernels": _compile_times()})
    if not json_:
        found = table(results)
        # a line that wraps can be read, a cell that is cut cannot
        console = Console(width=max(Console().width, Console(width=1000).measure(found).maximum))
        console.print(found)
        for line in remarks(about, results, total):
            console.print(line, highlight=False, soft_wrap=True)
    return results


def _compile_times() -> dict[str, dict[str, float]]:
    """How many CPU kernels were compiled and loaded in this process, and the seconds that took."""
    from ..kernels.cpu.build import compile_times

    found: dict[str, dict[str, float]] = {}
    for how, seconds in compile_times.values():
        entry = found.setdefault(how, {"kernels": 0, "seconds": 0.0})
        entry["kernels"] += 1
        entry["seconds"] += seconds
    return found


def _duration(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    return f"{timing.median * 1e3:.3g} ms" if timing.median >= 1e-3 else f"{timing.median * 1e6:.3g} µs"


def table(results: Sequence[Result]) -> RenderableType:
    """The rows as a table for the terminal."""
    from rich.table import Table

    others = list(dict.fromkeys(name for r in results for name in (*r.others, *r.left_out)))
    found = Table(box=None, pad_edge=False)
    for head in ("norm", "shape", "layout", "type", "passes", "kernel"):
        found.add_column(head, no_wrap=True)
    heads = ["torch", *others, "ours"]
    heads += ["torch/ours", "quartiles", "of bests", *(f"{name}/ours" for name in others), "sizes", "of copy"]
    for head in heads:
        found.add_column(head, justify="right", no_wrap=True)
    for r in results:
        shape = "×".join(map(str, r.row.shape))
        cells = [r.row.norm, shape, r.row.layout, dtype_name(r.row.dtype), r.row.passes, r.kernel]
        if r.ratio is None:
            found.add_row(*cells, "not timed", *[""] * (len(heads) - 1), style="red")
            continue
        cells.append(_duration(r.torch))
        cells += ["left out" if name in r.left_out else _duration(r.others.get(name)) for name in others]
        cells += [_duration(r.ours), f"{r.ratio.median:.2f}", f"{r.ratio.low:.2f}–{r.ratio.high:.2f}", f"{r.best:.2f}"]
        cells += [f"{r.against[name].median:.2f}" if name in r.against else "–" for name in others]
        found.add_row(*cells, str(r.traffic), f"{r.of_copy:.0%}", style="yellow" if r.ratio.median < 1 else "")
    return found


def remarks(about: dict[str, Any], results: Sequence[Result], total: Summary) -> list[str]:
    """What stands below the table: how to read it, the machine, the means, the worst row, what was wrong."""
    turns = [r.turns for r in results if r.turns]
    lines = [
        "",
        "torch/ours: median over turns, above 1 ours is faster; of bests: of the shortest times, which a busy machine "
        "spoils least. sizes: the least traffic in sizes of the tensor, where a tile stays in cache up to "
        f"{about['cache_bytes'] / 2**20:.3g} MiB; of copy: that traffic per second against y.copy_(x).",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['capability']}; "
        f"torch {about['torch']}, python {about['python']}, normwright {about['normwright']} at {about['commit']}; "
        f"{about['date']}; load {about['load']} at the start.",
        f"Allocator, one for both sides: {about['allocator']}",
    ]
    if about["device"] == "cuda":
        copies = [r.copies for r in results]
        numbers = about["libraries"]
        found = "".join(f", {name} {number}" for name, number in numbers.items() if number)
        lines.append(
            f"{about['gpu']}, compute capability {about['compute_capability']}, {about['multiprocessors']} "
            f"multiprocessors, second-level cache {about['l2_bytes'] / 2**20:.3g} MiB; driver {about['driver']}, CUDA "
            f"{about['cuda']}, cuDNN {about['cudnn']}, triton {about['triton']}{found}. Times by events; {min(copies)} "
            f"to {max(copies)} copies of the inputs take turns."
        )
        missing = [f"{name} (pip install {LIBRARIES[name][0]})" for name, number in numbers.items() if not number]
        if missing:
            lines.append(f"Not installed, and so not timed: {', '.join(missing)}.")
    if turns:
        lines.append(f"Turns a row: {min(turns)} to {max(turns)}. Seed 0.")
    times = _compile_times()
    if times:
        parts = [f"{int(entry['kernels'])} {how} in {entry['seconds']:.1f} s" for how, entry in times.items()]
        lines.append(f"Kernels: {', '.join(parts)}.")
    for r in results:
        lines += [f"{name} is left out of {r.row.name}: {why}." for name, why in r.left_out.items()]
    for name, wrong in total.wrong.items():
        lines.append(f"WRONG and not timed: {name}: {wrong}.")
    if total.mean is not None:
        families = ", ".join(f"{family} {mean:.2f}" for family, mean in total.families.items())
        lines.append("")
        for name, (count, median, least) in total.of_copy.items():
            lines.append(f"Of copy, beyond the cache, {name}: median {median:.0%}, least {least:.0%} of {count} rows.")
        for name, (count, mean, least) in total.others.items():
            lines.append(f"{name}/ours: geometric mean of {count} rows {mean:.2f}, the least {least:.2f}.")
        lines.append(f"Geometric mean of {total.rows - len(total.wrong)} rows: {total.mean:.2f} ({families}).")
        lines.append(f"Worst row: {total.worst}: {total.worst_ratio:.2f}; {total.slower} rows below 1.")
    return lines
