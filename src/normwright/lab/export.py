"""A journal for other tools: CSV, Parquet and TensorBoard event files, every number as it was recorded."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import UserError
from .files import atomic_write
from .journal import Journal, Run

__all__ = ["Format", "export"]

Format = Literal["csv", "parquet", "tensorboard"]
_EVENTS = "events.out.tfevents.normwright"  # TensorBoard reads any file with "tfevents" in its name


def export(journal: str | Path, out: str | Path, format: Format | None = None, study: str | None = None) -> list[Path]:
    """Write the runs and epochs of a journal for other tools and return the paths written.

    `csv` and `parquet` write two tables: the runs at `out` (one row a run, settings in the columns `config.…`, results
    by their names) and the epochs beside it (`runs.csv` → `runs-epochs.csv`; metrics by their names). A metric called
    like one of our own columns becomes `metric.…`. CSV writes numbers so that they read back exactly, non-finite ones
    as nan, inf, -inf, and lists as JSON. Parquet keeps numbers as int64 or float64 and lists as lists; a column whose
    values have no one type is text in JSON. `tensorboard` writes a folder `out/STUDY/ARM-seed0-run1` a run: metrics by
    epoch and results (as `result/…`, at the number of epochs) as 64-bit scalars, settings as hyperparameters; lists,
    which have no scalar, are left out.

    `format`: None goes by the ending of `out`, .csv or .parquet, and no ending is a folder for TensorBoard. `study`:
    the name of one study, None for all. Errors: UserError for another ending, a folder that is not empty, a missing
    package, or what `Journal` and the disk say.
    """
    out = Path(out)
    chosen = _format(out) if format is None else format
    if chosen not in get_args(Format):
        raise UserError(
            f"A journal is exported as {', '.join(get_args(Format))}, not as {chosen!r}; choose one of them."
        )
    with Journal(journal, mode="read") as opened:
        if chosen == "tensorboard":
            return _tensorboard(opened, out, study)
        write = _csv if chosen == "csv" else _parquet()
        tables = _tables(opened, study)
    paths = [out, out.with_name(f"{out.stem}-epochs{out.suffix}")]
    for path, table in zip(paths, tables, strict=True):
        atomic_write(path, [write(table)])
    return paths


def _format(out: Path) -> Format:
    ending = out.suffix.lower()
    if ending in (".csv", ".parquet"):
        return "csv" if ending == ".csv" else "parquet"
    if not ending or out.is_dir():
        return "tensorboard"
    raise UserError(
        f"{out} ends in {out.suffix}, which is no format of ours: end it in .csv or .parquet, or name a folder for "
        "TensorBoard."
    )


def _missing(what: str, error: ModuleNotFoundError) -> UserError:
    return UserError(f"{what} needs {error.name}, which is not installed: pip install 'normwright[export]'.")


def _selected(journal: Journal, study: str | None) -> tuple[dict[int, str], list[Run]]:
    names = {item.id: item.name for item in journal.studies()}
    return names, journal.runs(None if study is None else journal.open_study(study).id)


@dataclass(frozen=True)
class _Table:
    columns: list[str]
    rows: list[dict[str, Any]]


def _table(fixed: Sequence[str], records: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]) -> _Table:
    named = [{f"metric.{key}" if key in fixed else key: value for key, value in rest.items()} for _, rest in records]
    columns = dict.fromkeys([*fixed, *(column for rest in named for column in rest)])
    rows = [dict(zip(fixed, first, strict=True)) | rest for (first, _), rest in zip(records, named, strict=True)]
    return _Table(list(columns), rows)


def _tables(journal: Journal, study: str | None) -> tuple[_Table, _Table]:
    names, selected = _selected(journal, study)
    runs, epochs = [], []
    for run in selected:
        first = [names[run.study], run.id, run.arm, run.seed]
        config = {f"config.{key}": value for key, value in run.config.items()}
        runs.append(([*first, run.status, run.epochs, run.started, run.finished, run.error], config | run.results))
        epochs += [([*first, epoch], metrics) for epoch, metrics in journal.epochs(run.id).items()]
    fixed = ["study", "run", "arm", "seed"]
    return (
        _table([*fixed, "status", "epochs", "started", "finished", "error"], runs),
        _table([*fixed, "epoch"], epochs),
    )


def _json(value: Any) -> str:
    """JSON in which nan and inf are the names that Python's and NumPy's `float` read back."""

    def plain(item: Any) -> Any:
        if isinstance(item, list):
            return [plain(part) for part in item]
        return repr(item) if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), ensure_ascii=False)


def _csv(table: _Table) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(table.columns)
    for row in table.rows:
        cells = (row.get(column) for column in table.columns)
        writer.writerow([_json(cell) if isinstance(cell, list | dict) else cell for cell in cells])
    return text.getvalue().encode()


def _parquet() -> Callable[[_Table], bytes]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise _missing("Parquet", error) from error

    def column(values: list[Any]) -> Any:
        text = [None if value is None else _json(value) for value in values]
        if any(isinstance(value, dict) for value in values):
            return pyarrow.array(text)
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):  # no one type, or integers of more than 64 bits
            return pyarrow.array(text)

    def write(table: _Table) -> bytes:
        columns = [column([row.get(name) for row in table.rows]) for name in table.columns]
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table(columns, names=table.columns), buffer)
        return buffer.getvalue()

    return write


def _tensorboard(journal: Journal, out: Path, study: str | None) -> list[Path]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} is there already and not empty, and TensorBoard would show what lies there too; choose another "
            "folder."
        )
    events = _events()
    names, selected = _selected(journal, study)
    folders = {
        run.id: Path(_safe(names[run.study])) / f"{_safe(run.arm)}-seed{run.seed}-run{run.id}" for run in selected
    }
    # Built beside its place and moved there whole.
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.mkdir(parents=True)
        for run in selected:
            folder = temporary / folders[run.id]
            folder.mkdir(parents=True)
            (folder / _EVENTS).write_bytes(events(journal, run))
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}); choose a folder that you may write to, on a disk "
            "with space."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out / folders[run.id] for run in selected]


def _safe(name: str) -> str:
    """A name from a study as part of a path: no separators, no leading dots, not too long for a file system."""
    return re.sub(r"[^\w.+=,-]+", "_", name).lstrip(".")[:80] or "_"


def _events() -> Callable[[Journal, Run], bytes]:
    try:
        # The names in these modules are made at run time, where pyright does not see them.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ModuleNotFoundError as error:
        raise _missing("TensorBoard", error) from error

    scalar = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"), data_class="DATA_CLASS_SCALAR"
    )

    def scalars(metrics: Mapping[str, Any], prefix: str = "") -> Summary:
        # As tensors, since the older `simple_value` has 32 bits.
        return Summary(
            value=[
                Summary.Value(
                    tag=prefix + name, metadata=scalar, tensor=TensorProto(dtype="DT_DOUBLE", double_val=[float(value)])
                )
                for name, value in metrics.items()
                if not isinstance(value, list)
            ]
        )

    def write(journal: Journal, run: Run) -> bytes:
        epochs, recorded = journal.epochs(run.id), journal.recorded(run.id)
        started = _seconds(run.started) if run.started else 0.0
        # Without the seed, so that TensorBoard takes the seeds of one arm as one group.
        settings = {
            key: value if isinstance(value, bool | int | float | str) else _json(value)
            for key, value in run.config.items()
        } | {"arm": run.arm}
        buffer = io.BytesIO()
        writer = RecordWriter(buffer)
        for event in (
            Event(wall_time=started, file_version="brain.Event:2"),
            Event(wall_time=started, summary=hparams_pb(settings, start_time_secs=started)),
            *(
                Event(wall_time=_seconds(recorded[epoch]), step=epoch, summary=scalars(metrics))
                for epoch, metrics in epochs.items()
            ),
            Event(
                wall_time=_seconds(run.finished) if run.finished else started,
                step=run.epochs,
                summary=scalars(run.results, "result/"),
            ),
        ):
            writer.write(event.SerializeToString())
        return buffer.getvalue()

    return write


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
