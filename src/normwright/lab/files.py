"""Files written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

__all__ = ["atomic_write"]


def atomic_write(path: str | Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to `path`: a temporary file beside it, then `os.replace`, so that no reader sees half of it.

    Makes missing parent folders. A full disk, a missing permission and the like are a `UserError`, what `chunks` itself
    raises goes through; either way the temporary file is gone and an older file at `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
    try:
        try:
            for chunk in chunks:
                with _writing(path):
                    file.write(chunk)
            with _writing(path):
                file.flush()
                os.fsync(file.fileno())
        finally:
            with _writing(path):
                file.close()
        with _writing(path):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"The disk is full, so {path} was not written; free some space and run the command again."
            ) from error
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); choose a folder that you may write to."
        ) from error
