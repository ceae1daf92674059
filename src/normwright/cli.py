"""The command line: each command a thin call into the library, imported when it runs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .bench import command as bench
from .lab.errors import UserError
from .spec import PatternError

if TYPE_CHECKING:
    from rich.console import Console

    from .catalog import Row

__all__ = ["app", "main"]

LAB_PACKAGES = {"jinja2", "markupsafe", "optuna", "PIL", "plotly", "scipy", "sklearn"}

app = typer.Typer(
    name="normwright",
    help="Normalization in PyTorch networks: fast, correct and understood.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"normwright {version('normwright')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def study(
    name: Annotated[
        str | None,
        typer.Argument(help="The study's name, such as lenet, or a file of your own, study.py.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE,VALUE",
            help="Settings of the study: arm=bn,none chooses arms, norm=gn,ln the normalization, lr=0.1,1 trains every "
            "arm at each value.",
            show_default=False,
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the studies and exit.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits (scikit-learn's, no download), fashion-mnist, or a PATH: IDX files, CIFAR's python batches, "
            "a folder or zip of class folders.",
            show_default="the study's own, mostly digits",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with fashion-mnist's files; else the cache or a download.", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Runs of each arm, at least 1; seeds are 0, 1, …", show_default="the study's"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images.", show_default="the study's")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of every arm, per step.",
            show_default="the study's, or torch's default for the optimizer",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in a step, at least 2.", show_default="the study's")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="sgd, adagrad, rmsprop, adadelta or adam, as torch has them.", show_default="the study's"),
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(
            help="The same as norm=…: what is compared with the same network without a norm, of those the study knows.",
            show_default="the study's",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the journal and the report.", show_default="runs/STUDY-DATA"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (cuda if there is one), cpu, cuda, cuda:1, …")] = "auto",
    engine: Annotated[
        str,
        typer.Option(
            help="sequential (one network after another), packed (alike ones as one network), or auto: packed where "
            "it can be."
        ),
    ] = "auto",
    executor: Annotated[str, typer.Option(help="here (this process), or ray (a cluster).")] = "here",
    address: Annotated[
        str | None,
        typer.Option(help="Of the ray cluster.", show_default="a cluster of --workers on this machine"),
    ] = None,
    workers: Annotated[int, typer.Option(help="With --executor ray: groups trained at a time.", min=1)] = 2,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the study in --out, if there is one: same settings and data; more seeds or arms may join.",
        ),
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="One epoch, one seed, 200 images: does it run at all?")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end and nothing else.")] = False,
) -> None:
    """Train the arms of a study over several seeds, record every epoch, and draw report.html."""
    from rich.console import Console

    from .lab import run

    if list_:
        _list_studies(Console())
        return
    if name is None:
        raise UserError("Name a study, for example `normwright study lenet`; `normwright study --list` has them all.")
    request = run.Request(
        study=name,
        data=data,
        data_dir=data_dir,
        overrides={"seeds": seeds, "epochs": epochs, "lr": lr, "batch_size": batch_size, "optimizer": optimizer},
        settings=[*(settings or ()), *([] if norm is None else [f"norm={norm}"])],
        out=out,
        device=device,
        resume=resume,
        smoke=smoke,
        command=_command(),
        show="nothing" if quiet or json_ else "progress",
        engine=engine,
        executor=executor,
        address=address,
        workers=workers,
    )
    try:
        outcome = run.run_study(request)
    except run.Stopped as stopped:
        again = _command() if resume else f"{_command()} --resume"
        typer.echo(f"Stopped; every whole epoch is in {stopped.folder}. To go on: {again}", err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        typer.echo("Stopped before training; nothing was recorded.", err=True)
        raise typer.Exit(130) from None
    if json_:
        typer.echo(json.dumps(outcome.summary(), ensure_ascii=False))
    elif not quiet:
        run.print_outcome(outcome, Console())


def _command() -> str:
    return shlex.join(["normwright", *sys.argv[1:]])


def _list_studies(console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .lab.study import find, names

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("study", no_wrap=True, style="bold")
    table.add_column("question, and arms")
    for name in names():
        found, _ = find(name)
        arms = dict.fromkeys(arm.series or arm.name for arm in found.arms)
        table.add_row(name, Text(f"{found.question}\n").append(", ".join(arms), "dim"))
    console.print(table)


@app.command()
def norms(
    name: Annotated[
        str | None, typer.Argument(help="A normalization, at length; part of a name will do.", show_default=False)
    ] = None,
) -> None:
    """The table of normalizations; with a name, its axes drawn."""
    from rich.console import Console

    from .catalog import CATALOG, find

    console = Console()
    rows = list(CATALOG.values()) if name is None else find(name)
    if not rows:
        raise UserError(f"No normalization is called {name!r}; there are: {', '.join(CATALOG)}.")
    if name is not None and len(rows) == 1:
        _print_row(rows[0], console)
    else:
        _print_rows(rows, console)


def _print_rows(rows: list[Row], console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = console.width >= 160  # narrower, five columns fold into a word a line
    table = Table(box=box.SIMPLE_HEAD, show_lines=wide, pad_edge=False)
    for column in ("name", "pattern", "parameters", "formula", "source") if wide else ("name", "pattern and facts"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        pattern = row.spec.pattern if row.spec else "outside the notation"
        facts = (row.parameters, row.formula, row.source)
        name = Text(row.name, "bold")
        if wide:
            table.add_row(name, Text(pattern), *map(Text, facts))
        else:
            shown = Text(pattern, "bold" if row.spec else "italic")
            for fact, style in zip(facts, ("", "", "dim"), strict=True):
                shown.append("\n" + fact, style)
            table.add_row(name, shown)
            table.add_row()
    console.print(table)


def _print_row(row: Row, console: Console) -> None:
    from rich.text import Text

    def say(text: str = "", style: str = "") -> None:
        console.print(Text(text, style))

    say(row.name, "bold")
    if row.spec is not None:
        say()
        for line in picture(row):
            say("  " + line)
        say()
    facts = {
        "pattern": row.spec.pattern if row.spec else "outside the notation",
        "formula": row.formula,
        "parameters": row.parameters,
        "layers": ", ".join(row.layers),
        "source": row.source,
        "note": row.note,
    }
    for key, value in facts.items():
        if value:
            say(f"{key:<11} {value}")


def picture(row: Row) -> list[str]:
    """The axes of a row of the catalog on an example: what is reduced, and which values share one mean.

    The grid has the tensor's first dimension down and its second across; a cell stands for all further dimensions.
    """
    import numpy as np

    shape, sizes = next((e for e in row.examples if len(e[0]) == 4), row.examples[0])
    spec = row.make(**sizes)
    layout = spec.layout(shape)

    def marks(chosen: list[bool]) -> list[str]:
        return ["●" if mark else "·" for mark in chosen]

    table = {
        "axis": list(layout.names),
        "size": [str(size) for size in layout.split],
        "mean over": marks([i in layout.reduced for i in range(len(layout.split))]),
        "parameters": marks(_carried(layout.affine_view, layout.split)),
    }
    if spec.running:
        table["running"] = marks(_carried(layout.running_view, layout.split))
    lines = [f"a tensor of shape {shape}, split as {' × '.join(table['size'])}", ""]
    lines += [f"{head:<11}" + "".join(f"{cell:>4}" for cell in cells) for head, cells in table.items()]
    ids = np.arange(int(np.prod(layout.stat_shape))).reshape(layout.stat_shape)
    ids = np.broadcast_to(ids, layout.split).reshape(shape)
    share = (ids == ids.flat[0]).reshape(shape[0], shape[1], -1).mean(axis=-1)
    first, second = _dimension_names(layout)
    lines += ["", f"one mean (■ all of the cell, ◧ part of it), {first} down, {second} across:", ""]
    lines += ["  " + " ".join("■" if s == 1 else "◧" if s else "·" for s in cells) for cells in share]
    return lines


def _carried(view: tuple[int, ...], split: tuple[int, ...]) -> list[bool]:
    """Where a parameter that broadcasts as `view` has an entry of its own along the axis."""
    return [v == size and size != 1 for v, size in zip(view, split, strict=True)]


def _dimension_names(layout: Any) -> tuple[str, str]:
    """The axes of the first two dimensions, as the pattern writes them."""
    found, at = [], 0
    for parts in layout.parts[:2]:
        names = layout.names[at : at + parts]
        found.append(names[0] if parts == 1 else f"({' '.join(names)})")
        at += parts
    return found[0], found[1]


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="The folder that --out named, or one that holds several of those.", metavar="RUNDIR")
    ],
    json_: Annotated[
        bool, typer.Option("--json", help="Print what the report says as one JSON object instead, without paths.")
    ] = False,
) -> None:
    """Draw report.html again from the journal in a folder; over several studies also the page that leads to them."""
    from .lab import analysis, journal, run
    from .lab.report import draw, draw_index

    if json_:
        with journal.Journal(run.journal_of(folder), mode="read") as opened:
            typer.echo(json.dumps(analysis.summary(analysis.collect(opened)), ensure_ascii=False, indent=1))
        return
    drawn = draw(folder) if (folder / "journal.sqlite").is_file() else draw_index(folder)
    typer.echo(f"Report: {drawn}")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that --out named.", metavar="RUNDIR")],
    export: Annotated[
        int | None,
        typer.Option(help="Number of a run whose trained network is written to --out.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file for --export, .pt or .safetensors.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over --out.")] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Write every run and epoch to a .csv or .parquet file (the epochs beside it), or to a folder of "
            "TensorBoard event files.",
            show_default=False,
        ),
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(
            help="Name of a study: give back its runs that other machines, which you know to be dead, hold.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the runs in the journal of a folder, export a network or the tables of the journal, or release runs."""
    from rich.console import Console

    from .lab import run
    from .lab.export import export as export_tables

    if (export is None) != (out is None):
        raise UserError("--export RUN and --out FILE go together; `normwright runs RUNDIR` lists the runs.")
    if release is not None:
        typer.echo(f"Released {run.release(folder, release)} runs of {release}; --resume goes on with them.")
    if export is not None and out is not None:
        typer.echo(run.export_network(folder, export, out, force=force))
    if table is not None:
        for path in export_tables(run.journal_of(folder), table):
            typer.echo(f"Wrote {path}")
    if release is None and export is None and table is None:
        run.print_runs(folder, Console())


surgery = typer.Typer(
    no_args_is_help=True,
    help="Change the normalization of a network in a checkpoint, and say what changed. The result is a checkpoint.",
)
app.add_typer(surgery, name="surgery")

CheckpointFile = Annotated[
    Path, typer.Argument(help="A state dict by torch.save, also under an entry, or safetensors.", show_default=False)
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME",
        help="A function without arguments that returns the network; package.module:NAME will do. A network that "
        "`normwright runs --export` wrote needs none.",
        show_default=False,
    ),
]
OutOption = Annotated[Path, typer.Option(help="The file to write, .pt or .safetensors.", show_default=False)]
InputsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME",
        help="A batch, or a function that returns one: what output differences are measured on.",
        show_default="256 images of a data set",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="digits, fashion-mnist or a PATH of images, scaled to 0 … 1; or FILE.py:NAME of batches.",
        show_default=False,
    ),
]
DataDirOption = Annotated[Path | None, typer.Option(help="Folder with fashion-mnist's files.", show_default=False)]
EvaluateOption = Annotated[
    bool, typer.Option("--evaluate", help="Measure the test accuracy on --data before and after.")
]
KeyOption = Annotated[
    str | None, typer.Option(help="The entry of the file that is the state dict.", show_default="the only one")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write over --out, also if it is the checkpoint itself.")]
DeviceOption = Annotated[str, typer.Option(help="auto (cuda if there is one), cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _operate(operation: str, arguments: dict[str, Any], json_: bool, **request: Any) -> None:
    from .surgery.checkpoint import Request, operate

    given = {name: value for name, value in arguments.items() if value is not None}
    outcome = operate(Request(operation, arguments=given, **request))
    typer.echo(json.dumps(outcome.summary(), ensure_ascii=False) if json_ else str(outcome))


@surgery.command()
def recalibrate(
    checkpoint: CheckpointFile,
    out: OutOption,
    data: DataOption = None,
    model: ModelOption = None,
    method: Annotated[str, typer.Option(help="layerwise (exact, a pass for each layer) or one_pass.")] = "layerwise",
    stats: Annotated[str, typer.Option(help="population (exact) or ema, as training averages.")] = "population",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Stop at this standard error, in units of a channel's deviation.", show_default="read all"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Batches to use at most.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch of a data set.", min=2)] = 256,
    inputs: InputsOption = None,
    data_dir: DataDirOption = None,
    evaluate: EvaluateOption = False,
    key: KeyOption = None,
    force: ForceOption = False,
    device: DeviceOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Set the running statistics to the exact ones over --data."""
    arguments = {"method": method, "stats": stats, "tolerance": tolerance, "limit": limit}
    _operate(
        "recalibrate", arguments, json_, checkpoint=checkpoint, out=out, data=data, model=model, inputs=inputs,
        batch_size=batch_size, data_dir=data_dir, evaluate=evaluate, key=key, force=force, device=device,
    )  # fmt: skip


@surgery.command()
def fold(
    checkpoint: CheckpointFile,
    out: OutOption,
    model: ModelOption = None,
    inputs: InputsOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    evaluate: EvaluateOption = False,
    key: KeyOption = None,
    force: ForceOption = False,
    device: DeviceOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Fold batch norms into the convolutions and dense layers beside them, for inference."""
    _operate(
        "fold", {}, json_, checkpoint=checkpoint, out=out, data=data, model=model, inputs=inputs, data_dir=data_dir,
        evaluate=evaluate, key=key, force=force, device=device,
    )  # fmt: skip


@surgery.command()
def convert(
    checkpoint: CheckpointFile,
    out: OutOption,
    to: Annotated[
        str,
        typer.Option(
            help="batch, sync, renorm, ghost, group, layer, channel, instance, rms, twin, torch or none.",
            show_default=False,
        ),
    ],
    groups: Annotated[int | None, typer.Option(help="Groups of a group norm, at most.", show_default="32")] = None,
    chunks: Annotated[int | None, typer.Option(help="Chunks of a ghost batch norm.", show_default=False)] = None,
    model: ModelOption = None,
    inputs: InputsOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    evaluate: EvaluateOption = False,
    key: KeyOption = None,
    force: ForceOption = False,
    device: DeviceOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Turn normalization layers into others; with inputs, close to the same function."""
    _operate(
        "convert", {"to": to, "groups": groups, "chunks": chunks}, json_, checkpoint=checkpoint, out=out, data=data,
        model=model, inputs=inputs, data_dir=data_dir, evaluate=evaluate, key=key, force=force, device=device,
    )  # fmt: skip


@surgery.command("absorb-bias")
def absorb_bias(
    checkpoint: CheckpointFile,
    out: OutOption,
    model: ModelOption = None,
    inputs: InputsOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    evaluate: EvaluateOption = False,
    key: KeyOption = None,
    force: ForceOption = False,
    device: DeviceOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Take the biases that a batch norm makes idle into its running mean."""
    _operate(
        "absorb_bias", {}, json_, checkpoint=checkpoint, out=out, data=data, model=model, inputs=inputs,
        data_dir=data_dir, evaluate=evaluate, key=key, force=force, device=device,
    )  # fmt: skip


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:NAME",
            help="A function without arguments that returns the network; package.module:NAME will do.",
            show_default=False,
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:NAME", help="A batch, or a function that returns one.", show_default=False),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME", help="What the loss takes beside the output, likewise.", show_default=False
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:NAME", help="loss(output, targets), or a class of such.", show_default=False),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME", help="A function of the network that returns its optimizer.", show_default=False
        ),
    ] = None,
    loader: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME", help="The training batches, or a function that returns them.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The state dict that the network is used with.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="text, json, sarif or html.")] = "text",
    out: Annotated[Path | None, typer.Option(help="Write the report to a file.", show_default="print it")] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODES", help="Only these checks: codes or their beginnings, with commas.", show_default=False
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="CODES", help="Not these checks.", show_default=False)
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            help="Mend what can safely be mended, write the network's state dict to this .pt or .safetensors file, "
            "and report what is left.",
            show_default=False,
        ),
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="With --fix, mend also what is fixable on request only.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over the file of --fix.")] = False,
) -> None:
    """Examine a network's normalization. Exit code 1 if there is an error or a warning, 2 if it could not be run."""
    from .doctor.command import FORMATS, Examination, drawn, examine
    from .lab.files import atomic_write

    if format not in FORMATS:
        raise UserError(f"--format is one of {', '.join(FORMATS)}; got {format!r}.")
    asked = Examination(
        model, inputs, targets, loss, optimizer, loader, checkpoint, select=tuple(_separated(select)),
        ignore=tuple(_separated(ignore)), fix=fix, unsafe=unsafe, force=force,
    )  # fmt: skip
    report = examine(asked)
    text = drawn(report, format, asked.file)
    if out is None:
        typer.echo(text)
    else:
        atomic_write(out, [f"{text}\n".encode()])
        typer.echo(f"{report.summary()} Report: {out}")
    for note in asked.notes:
        typer.echo(note, err=True)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def check(
    name: Annotated[
        str | None, typer.Argument(metavar="CODE", help="A check's code or name, such as NW104.", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List every check and exit.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write every page as Markdown into a folder.", show_default=False)
    ] = None,
) -> None:
    """Print the page of a check of the doctor or a rule of the linter."""
    from rich.console import Console

    from .doctor.command import page_of, pages, write_markdown

    if markdown is not None:
        typer.echo(f"Wrote {len(write_markdown(markdown))} files to {markdown}.")
    elif list_:
        _print_checks(pages(), Console())
    elif name is None:
        raise UserError("Name a check, for example `normwright check NW101`; `normwright check --list` has them all.")
    else:
        _print_page(page_of(name), Console())


def _print_checks(found: dict[str, Any], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("code", "fault", "severity", "evidence", "needs"):
        table.add_column(column, overflow="fold", no_wrap=column != "needs")
    for code, each in found.items():
        # a rule of the linter reads the source alone
        evidence, needs = getattr(each, "evidence", "source"), ", ".join(getattr(each, "needs", ()))
        table.add_row(code, each.name, each.severity, evidence, needs)
    console.print(table)


def _print_page(found: Any, console: Console) -> None:
    from rich.padding import Padding
    from rich.syntax import Syntax
    from rich.text import Text

    from .doctor.page import Page

    page = Page.of(found)
    console.print(Text(f"{found.code}: {found.name}", "bold"), Text(f"({found.severity})", "dim"))
    console.print(Text(f"\n{page.summary}"))
    for title, text in page.sections.items():
        console.print(Text(f"\n{title}", "bold"))
        code = title in ("Example", "Use instead")
        shown = Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=True)
        shown = shown if code else Text(_flowing(text))
        console.print(Padding(shown, (0, 0, 0, 2)))


def _flowing(text: str) -> str:
    """Prose without the line breaks of the docstring; lists keep theirs."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.lstrip().startswith(("-", "*")) else " ".join(p.split()) for p in paragraphs)


@app.command()
def lint(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Python files, notebooks, and folders of them.", metavar="PATHS…", show_default="."),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="text, json, sarif or github.")] = "text",
    select: Annotated[
        list[str] | None,
        typer.Option(help="Codes, their beginnings, or names of the rules to use, with commas.", show_default="all"),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="The same, of rules to leave out.", show_default="none")
    ] = None,
) -> None:
    """Find mistakes that the source alone shows; `# noqa: NW905` silences a line. Exit code 1 if there are any."""
    from .doctor import lint as linter

    if format_ not in linter.FORMATS:
        raise UserError(f"--format is one of {', '.join(linter.FORMATS)}; got {format_!r}.")
    rules = linter.select(_separated(select), _separated(ignore))
    result = linter.lint(paths or [Path()], rules)
    if not result.files:
        typer.echo("normwright: no Python file or notebook there.", err=True)
    if shown := linter.show(result, format_):
        typer.echo(shown)
    if result.problems:
        raise typer.Exit(1)


def _separated(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


app.command("bench")(bench)


def _fail(message: str) -> NoReturn:
    typer.echo(f"normwright: {message}", err=True)
    sys.exit(2)


def main() -> None:
    """The `normwright` command: what the user can mend is one sentence on stderr and exit code 2."""
    try:
        app()
    except (UserError, PatternError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LAB_PACKAGES:
            raise
        _fail(f"This needs {error.name}, which is not installed: pip install 'normwright[lab]'.")
    except BrokenPipeError:
        # The reader has gone (`… | head`); the interpreter must not complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
