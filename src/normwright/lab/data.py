"""Image sets, whole and in memory: scikit-learn's digits, Fashion-MNIST, IDX files, CIFAR batches, folders and zips.

Every reader ends in uint8 arrays (N, C, H, W) with labels; `_dataset` checks the labels, hashes and scales them. What
comes from outside is never trusted: pickles are read without numpy's or anybody's code running, archives are refused as
a whole if one member's path leaves them, and nothing may unpack to more than `MAX_BYTES`.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import re
import stat
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from .errors import UserError
from .files import atomic_write

__all__ = ["MAX_BYTES", "Dataset", "cache_dir", "load"]

MAX_BYTES = 2 * 2**30  # of uint8 pixels or unpacked archive; in memory, as float32, four times as much

_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_URLS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
_FASHION_MD5 = {  # published in the README of github.com/zalandoresearch/fashion-mnist
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13][-.]ubyte(\.gz)?", re.IGNORECASE)
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_LITTER = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # besides hidden files: what file managers leave behind


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification set of images, all of it in memory, scaled once.

    `x_train`, `x_test`: (N, C, H, W) float32 in [0, 1]; `y_train`, `y_test`: (N,) int64 below `len(classes)`.
    `source` says in words where the images come from and how they were split or resized. `sha256` is the hash of the
    images as stored (before scaling), the labels and the class names: what the journal keeps.
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: tuple[str, ...]
    source: str
    sha256: str

    @property
    def channels(self) -> int:
        return self.x_train.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x_train.shape[2], self.x_train.shape[3]

    def to(self, device: torch.device | str) -> Dataset:
        """The same set with its tensors on `device`."""
        tensors = {key: getattr(self, key).to(device) for key in ("x_train", "y_train", "x_test", "y_test")}
        return replace(self, **tensors)

    def limited(self, limit: int | None) -> Dataset:
        """At most `limit` images of each half, its classes in turn; None leaves all."""
        if limit is None:
            return self
        kept = {}
        for half in ("train", "test"):
            labels = getattr(self, f"y_{half}").cpu().numpy()
            keep = torch.from_numpy(_first_of_classes(labels, limit))
            kept |= {f"{key}_{half}": getattr(self, f"{key}_{half}")[keep] for key in ("x", "y")}
        return replace(self, **kept)


@dataclass(frozen=True, eq=False)
class _Arrays:
    """What a reader returns: images uint8 (N, C, H, W), labels, and the classes if the source declares them."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...] | None
    source: str


def load(
    name_or_path: str | Path, data_dir: str | Path | None = None, *, limit: int | None = None, progress: bool = True
) -> Dataset:
    """Load a set by name (`digits`, `fashion-mnist`) or from a path; every fault of the input is a `UserError`.

    - `digits`: scikit-learn's 1797 digits, every fifth of each class for testing, resized bilinearly from 8×8
      to 28×28.
    - `fashion-mnist`: Zalando's four files from `data_dir` if given, else from the cache, else downloaded there.
    - a folder with four IDX files, gzipped or not; CIFAR's python batches (folder or tar.gz); a folder or a zip of
      class folders of images, with or without `train/` and `test/` above them (without: every fifth of each class is
      for testing).

    `data_dir`: folder with Fashion-MNIST's files. `limit`: at most so many training and so many test images, spread
    evenly over the classes. `progress`: draw a bar on the terminal for what takes long (download, decoding).
    """
    name = str(name_or_path)
    if name == "fashion-mnist":
        arrays = _fashion_mnist(None if data_dir is None else Path(data_dir), progress)
    elif data_dir is not None:
        raise UserError(f"A data folder goes with fashion-mnist, not with {name!r}; give the path itself as the data.")
    elif name == "digits":
        arrays = _digits()
    else:
        with _reading(Path(name)):
            arrays = _from_path(Path(name).expanduser(), progress)
    return _dataset(arrays, limit)


def cache_dir() -> Path:
    """The folder for downloads: `$NORMWRIGHT_CACHE`, else `$XDG_CACHE_HOME/normwright`, else `~/.cache/normwright`."""
    if own := os.environ.get("NORMWRIGHT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normwright"


def _dataset(arrays: _Arrays, limit: int | None) -> Dataset:
    classes = arrays.classes
    if classes is None:
        classes = tuple(str(label) for label in range(int(arrays.y_train.max()) + 1))
    if len(classes) < 2:
        raise UserError(f"{arrays.name} has only the classes {list(classes)}; classification needs two or more.")
    for part, labels in (("training", arrays.y_train), ("test", arrays.y_test)):
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < len(classes):
                raise UserError(
                    f"The {part} labels of {arrays.name} run from 0 to {len(classes) - 1}, but {label} stands among "
                    "them; mend the labels or use the set's own files."
                )
    counts = np.bincount(arrays.y_train, minlength=len(classes))
    if not counts.all():
        missing = int(np.flatnonzero(counts == 0)[0])
        raise UserError(
            f"Class {missing} of {len(classes)} in {arrays.name} has no training image; number the classes from 0 "
            "without gaps and give each some images."
        )
    x_train, y_train = arrays.x_train, arrays.y_train
    x_test, y_test = arrays.x_test, arrays.y_test
    if limit is not None:
        if limit < len(classes):
            raise UserError(f"A limit of {limit} images leaves some of the {len(classes)} classes empty; raise it.")
        (x_train, y_train), (x_test, y_test) = _spread(x_train, y_train, limit), _spread(x_test, y_test, limit)
    digest = hashlib.sha256(repr(classes).encode())
    for array in (x_train, y_train, x_test, y_test):
        digest.update(f"{array.shape} {array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return Dataset(
        arrays.name,
        _scale(x_train),
        torch.from_numpy(y_train.copy()),
        _scale(x_test),
        torch.from_numpy(y_test.copy()),
        classes,
        arrays.source + ("" if limit is None else f"; at most {limit} images each for training and testing"),
        digest.hexdigest(),
    )


def _scale(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32)).div_(255)


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """For each label, how many equal ones stand before it."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return rank


def _first_of_classes(labels: np.ndarray, limit: int) -> np.ndarray:
    return np.sort(np.argsort(_rank_in_class(labels), kind="stable")[:limit])


def _spread(images: np.ndarray, labels: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of every class in turn, `limit` in all, in their old order."""
    keep = _first_of_classes(labels, limit)
    return images[keep], labels[keep]


def _split(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every fifth image of each class for testing, from its second on: no random numbers, the same everywhere."""
    test = _rank_in_class(labels) % 5 == 1
    return images[~test], labels[~test], images[test], labels[test]


def _digits() -> _Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The digits come with scikit-learn; install it with: pip install 'normwright[lab]'") from error
    digits: Any = load_digits()
    # 28 by 28 is what LeNet needs; half-pixel centres, and rounded to 1/255 so that the set is the same everywhere.
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8).numpy()
    return _Arrays(
        "digits",
        *_split(images, digits.target.astype(np.int64)),
        tuple("0123456789"),
        "scikit-learn's digits (UCI optical recognition of handwritten digits, test part), resized bilinearly from 8×8 "
        "to 28×28; every fifth image of each class is for testing",
    )


def _fashion_mnist(data_dir: Path | None, progress: bool) -> _Arrays:
    if data_dir is not None:
        with _reading(data_dir):
            if not data_dir.is_dir():
                raise UserError(f"There is no folder {data_dir}; name one that holds Fashion-MNIST's four IDX files.")
            for folder in (data_dir, data_dir / "fashion-mnist", data_dir / "FashionMNIST" / "raw"):
                if folder.is_dir() and _idx_files(folder):
                    return replace(_read_idx(folder, _FASHION_CLASSES), name="fashion-mnist")
        raise UserError(
            f"{data_dir} has none of Fashion-MNIST's IDX files, such as train-images-idx3-ubyte.gz; put them there, or "
            "leave the data folder away to have them downloaded."
        )
    folder = cache_dir() / "fashion-mnist"
    for name, md5 in _FASHION_MD5.items():
        if not (folder / name).exists():
            _download(name, _FASHION_URLS, md5, folder / name, progress)
    with _reading(folder):
        return replace(_read_idx(folder, _FASHION_CLASSES), name="fashion-mnist")


def _download(name: str, bases: Iterable[str], md5: str, target: Path, progress: bool) -> None:
    """Fetch `name` from the first of `bases` that gives it with the right MD5; the file appears whole or not at all."""
    reasons = []
    for base in bases:
        with _bar(progress, f"downloading {name}", DownloadColumn(), TransferSpeedColumn()) as bar:
            try:
                atomic_write(target, _fetch(base + name, md5, bar))
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSError
                reasons.append(f"{base}: {error}")
            else:
                return
    raise UserError(
        f"{name} is not in {target.parent} and could not be downloaded ({'; '.join(reasons)}); connect to the network, "
        "or name a folder that has the four files with --data-dir, or use --data digits."
    )


def _fetch(url: str, md5: str, bar: Progress) -> Iterator[bytes]:
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=30) as response:
        bar.update(bar.task_ids[0], total=int(response.headers.get("Content-Length") or 0) or None)
        while chunk := response.read(1 << 16):
            digest.update(chunk)
            bar.advance(bar.task_ids[0], len(chunk))
            yield chunk
    if digest.hexdigest() != md5:
        raise OSError(f"MD5 {digest.hexdigest()} where {md5} is published")


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f}/s")


@contextmanager
def _bar(progress: bool, description: str, *columns: Any, total: int | None = None) -> Iterator[Progress]:
    console = Console(stderr=True)
    looks = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*looks, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        bar.add_task(description, total=total)
        yield bar


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        at = error.filename or path
        raise UserError(f"{at} cannot be read ({error.strerror or error}); check the path and its rights.") from error


def _from_path(path: Path, progress: bool) -> _Arrays:
    if not path.exists():
        raise UserError(f"There is no data set or path {str(path)!r}; use digits, fashion-mnist, or an existing path.")
    if path.is_dir():
        inside = {entry.name for entry in path.iterdir() if not _is_litter(entry.name)}
        if not inside:
            raise UserError(
                f"The folder {path} is empty; it needs IDX files, CIFAR batches, or class folders of images."
            )
        if _idx_files(path):
            names = {re.sub("[-_ ]", "", part.lower()) for part in path.resolve().parts[-2:]}
            return _read_idx(path, _FASHION_CLASSES if "fashionmnist" in names else None)
        for folder in (path, path / "cifar-10-batches-py", path / "cifar-100-python"):
            if folder.is_dir() and (batches := {entry.name: entry for entry in folder.iterdir() if entry.is_file()}):
                read = _bounded_file_reader(batches)
                if (arrays := _read_cifar(path.resolve().name, batches, read)) is not None:
                    return arrays
        return _read_image_folder(path, progress)
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder; name a folder, a .zip or a .tar.gz.")
    name = path.name.lower()
    if name.endswith(".zip"):
        return _read_zip(path, progress)
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return _read_tar(path)
    raise UserError(f"{path} is a file of unknown type; name a folder, a .zip of class folders, or CIFAR's .tar.gz.")


def _idx_files(folder: Path) -> dict[tuple[str, str], Path]:
    """The IDX files of a folder by part ("train", "test") and content ("images", "labels"), unpacked ones preferred."""
    found: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.iterdir(), reverse=True):  # "….gz" comes first and is overwritten
        if match := _IDX_NAME.fullmatch(file.name):
            found["train" if match[1].lower() == "train" else "test", match[2].lower()] = file
    return found


def _read_idx(folder: Path, classes: tuple[str, ...] | None) -> _Arrays:
    files = _idx_files(folder)
    x_train, y_train = _read_idx_part(folder, files, "train")
    x_test, y_test = _read_idx_part(folder, files, "test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(
            f"The training images of {folder} are {_size(x_train)} pixels and the test images {_size(x_test)}; they "
            "must have one size."
        )
    name = folder.resolve().name
    return _Arrays(name, x_train, y_train, x_test, y_test, classes, f"IDX files of the folder {name}")


def _read_idx_part(folder: Path, files: dict[tuple[str, str], Path], part: str) -> tuple[np.ndarray, np.ndarray]:
    for content, digit in (("images", 3), ("labels", 1)):
        if (part, content) not in files:
            prefix = "train" if part == "train" else "t10k"
            raise UserError(f"{folder} lacks {prefix}-{content}-idx{digit}-ubyte(.gz); add the missing file.")
    images = _read_idx_file(files[part, "images"], 3)
    labels = _read_idx_file(files[part, "labels"], 1)
    if len(images) != len(labels):
        raise UserError(
            f"{files[part, 'images']} has {len(images)} images but {files[part, 'labels'].name} {len(labels)} labels; "
            "they do not belong together, so fetch both again."
        )
    return images[:, None], labels.astype(np.int64)


def _size(images: np.ndarray) -> str:
    return f"{images.shape[3]}×{images.shape[2]}"


def _read_idx_file(path: Path, ndim: int) -> np.ndarray:
    """One IDX file: two zero bytes, the type (8 = uint8), the number of dimensions, their sizes, the bytes."""
    if path.suffix.lower() == ".gz":
        try:
            with gzip.open(path) as file:
                raw = file.read(MAX_BYTES + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged or cut off ({error}); delete it and fetch it again.") from error
    else:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        _too_large(path)
    head = 4 + 4 * ndim
    if len(raw) < head:
        raise UserError(
            f"{path} is cut off: {len(raw)} bytes, where the header alone has {head}; delete it and fetch it again."
        )
    if raw[:4] != bytes((0, 0, 8, ndim)):
        what = "images (uint8, three dimensions)" if ndim == 3 else "labels (uint8, one dimension)"
        raise UserError(
            f"{path} is no IDX file of {what}: it starts with {raw[:4].hex()}, not 000008{ndim:02x}; check which file "
            "it is, or delete it and fetch it again."
        )
    shape = struct.unpack(f">{ndim}I", raw[4:head])
    if 0 in shape:
        raise UserError(f"{path} holds no data: its header says {shape}; delete it and fetch it again.")
    if len(raw) - head != math.prod(shape):
        fault = "is cut off" if len(raw) - head < math.prod(shape) else "has bytes too many"
        raise UserError(
            f"{path} {fault}: {len(raw) - head} bytes of data for the shape {shape}; delete it and fetch it again."
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _too_large(path: Path | str) -> NoReturn:
    raise UserError(f"{path} unpacks to more than the limit of {MAX_BYTES / 2**30:.0f} GiB; use a smaller set.")


class _PickledDtype:
    """Stands in for numpy.dtype while unpickling: keeps the type's name."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like: of no account for the one-byte type, the only one accepted


class _PickledArray:
    """Stands in for numpy.ndarray while unpickling: keeps shape, type and bytes."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _PickledDtype) or dtype.code not in ("u1", b"u1") or fortran:
            raise ValueError("an array that is not uint8 in C order")
        return np.frombuffer(data, np.uint8).reshape(shape)


def _latin1(text: str, encoding: str) -> bytes:
    # how Python 3 writes bytes into a pickle of protocol 2
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and uint8 arrays; any other name is refused, so no outside code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: _PickledArray()
        if (module, name) == ("numpy", "ndarray"):
            return _PickledArray
        if (module, name) == ("numpy", "dtype"):
            return _PickledDtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: str, raw: bytes) -> dict[str, Any]:
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a wrong pickle can raise anything
        raise UserError(
            f"{path} is not one of CIFAR's batches, or is damaged ({error or type(error).__name__}); nothing in it was "
            "run, fetch it again."
        ) from error
    if not isinstance(batch, dict):
        raise UserError(f"{path} is not one of CIFAR's batches: it holds a {type(batch).__name__}, not a dict.")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in batch.items()}


def _read_cifar(name: str, files: Iterable[str], read: Callable[[str], bytes]) -> _Arrays | None:
    """CIFAR-10 or CIFAR-100 from its batches, or None if no file is named like one."""
    files = set(files)
    if any(re.fullmatch(r"data_batch_\d+|test_batch", file) for file in files):
        train, test, key, classes = _CIFAR10_TRAIN, ("test_batch",), "labels", _CIFAR10_CLASSES
        source = "CIFAR-10's python batches"
    elif {"train", "test", "meta"} <= files:
        train, test, key = ("train",), ("test",), "fine_labels"
        names = _unpickle("meta", read("meta")).get("fine_label_names")
        if not isinstance(names, list) or not all(isinstance(label, bytes | str) for label in names):
            raise UserError(f"The file meta of {name} lacks the list fine_label_names; fetch CIFAR-100 again.")
        classes = tuple(label.decode("utf-8", "replace") if isinstance(label, bytes) else label for label in names)
        source = "CIFAR-100's python batches, fine labels"
    else:
        return None
    for file in (*train, *test):
        if file not in files:
            raise UserError(f"{name} lacks CIFAR's file {file}; fetch the set again.")
    x_train, y_train = _read_batches(train, read, key, len(classes))
    x_test, y_test = _read_batches(test, read, key, len(classes))
    return _Arrays(name, x_train, y_train, x_test, y_test, classes, source)


def _read_batches(
    files: Iterable[str], read: Callable[[str], bytes], key: str, n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [_read_batch(file, read(file), key, n_classes) for file in files]
    return np.concatenate([images for images, _ in pairs]), np.concatenate([labels for _, labels in pairs])


def _read_batch(path: str, raw: bytes, key: str, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(path, raw)
    for needed in ("data", key):
        if needed not in batch:
            raise UserError(f"{path} is not one of CIFAR's batches: it has no {needed!r}; fetch it again.")
    data, labels = batch["data"], batch[key]
    if not isinstance(data, _PickledArray):
        raise UserError(f"{path} is not one of CIFAR's batches: its data is no array; fetch it again.")
    try:
        images = data.array()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not one of CIFAR's batches: its data are wrong ({error}); fetch it again."
        ) from error
    if images.ndim != 2 or images.shape[1] != 3072 or len(images) == 0:
        raise UserError(f"{path} holds data of shape {images.shape}, where CIFAR has (n, 3072); fetch it again.")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{path} is not one of CIFAR's batches: its {key} are not a list of integers; fetch it again.")
    if len(labels) != len(images):
        raise UserError(f"{path} has {len(images)} images but {len(labels)} labels; fetch it again.")
    for label in labels:
        if not 0 <= label < n_classes:
            raise UserError(f"{path} has the label {label}, where they run from 0 to {n_classes - 1}; fetch it again.")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _bounded_file_reader(files: Mapping[str, Path]) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        with _reading(files[name]):
            if files[name].stat().st_size > MAX_BYTES:
                _too_large(files[name])
            return files[name].read_bytes()

    return read


def _read_tar(path: Path) -> _Arrays:
    members: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:" if path.suffix.lower() == ".tar" else "r:gz") as archive:
            for member in archive:
                total += member.size
                if total > MAX_BYTES:
                    _too_large(path)
                if not (member.isfile() or member.isdir()):
                    _refuse(path, member.name, "is a link or a device")
                _check_member(path, member.name)
                if member.isfile() and (file := archive.extractfile(member)) is not None:
                    members[PurePosixPath(member.name).name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); fetch it again.") from error
    arrays = _read_cifar(path.name.split(".")[0], members, members.__getitem__)
    if arrays is None:
        raise UserError(f"{path} has none of CIFAR's python batches; unpack other archives and name the folder.")
    return arrays


def _check_member(path: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", name):
        _refuse(path, name, "leads out of it")


def _refuse(path: Path, name: str, fault: str) -> NoReturn:
    raise UserError(f"{path} is refused: its member {name!r} {fault}; use an archive from a source that you trust.")


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in _LITTER


def _read_image_folder(path: Path, progress: bool) -> _Arrays:
    def stop(error: OSError) -> NoReturn:
        raise error  # os.walk would pass over what it may not open

    files, folders = [], []
    for at, names, leaves in os.walk(path, onerror=stop, followlinks=False):
        here = PurePosixPath(Path(at).relative_to(path).as_posix())
        names[:] = [name for name in names if not _is_litter(name)]
        folders += [here / name for name in names]
        files += [here / name for name in leaves]

    def read(name: PurePosixPath) -> bytes:
        return (path / name).read_bytes()

    return _read_class_folders(path, path.resolve().name, files, folders, read, progress)


def _read_zip(path: Path, progress: bool) -> _Arrays:
    faults = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                _check_member(path, member.filename)
                if stat.S_ISLNK(member.external_attr >> 16):
                    _refuse(path, member.filename, "is a link")
                if member.flag_bits & 1:
                    _refuse(path, member.filename, "is encrypted")
            # zipfile reads no member beyond the size that it declares, so the sum bounds what can be unpacked
            if sum(member.file_size for member in members) > MAX_BYTES:
                _too_large(path)
            files = {PurePosixPath(member.filename): member for member in members if not member.is_dir()}
            folders = [PurePosixPath(member.filename) for member in members if member.is_dir()]

            def read(name: PurePosixPath) -> bytes:
                try:
                    return archive.read(files[name])
                except faults as error:
                    raise UserError(f"{name} in {path} is damaged ({error}); fetch the zip again.") from error

            return _read_class_folders(path, path.stem, list(files), folders, read, progress)
    except faults as error:
        raise UserError(f"{path} is no zip, or is damaged or cut off ({error}); fetch it again.") from error


def _read_class_folders(
    path: Path,
    name: str,
    files: list[PurePosixPath],
    folders: list[PurePosixPath],
    read: Callable[[PurePosixPath], bytes],
    progress: bool,
) -> _Arrays:
    """Class folders, or train/ and test/ above them, or one folder around all that; classes in alphabetical order."""
    files = [file for file in files if not any(_is_litter(part) for part in file.parts)]
    folders = [folder for folder in folders if not any(_is_litter(part) for part in folder.parts)]
    if not any(file.suffix.lower() in _IMAGE_SUFFIXES for file in files):
        raise UserError(f"{path} holds no images; it needs IDX files, CIFAR batches, or class folders of images.")
    top = PurePosixPath()
    splits: tuple[PurePosixPath, ...] = ()
    while not splits:
        below = [file.relative_to(top).parts for file in files if top in file.parents]
        inside = {parts[0] for parts in below if len(parts) > 1}
        inside |= {folder.relative_to(top).parts[0] for folder in folders if top in folder.parents}
        if "train" in inside or "test" in inside:
            if inside != {"train", "test"}:
                raise UserError(
                    f"Beside one another in {path} stand {', '.join(sorted(inside))}; a set that is split has exactly "
                    "the folders train and test."
                )
            splits = (top / "train", top / "test")
        elif len(inside) == 1 and any(len(parts) > 2 for parts in below):
            top = top / inside.pop()
        else:
            splits = (top,)
    found: dict[PurePosixPath, dict[str, list[PurePosixPath]]] = {split: {} for split in splits}
    for split in splits:
        for folder in folders:
            if folder.parent == split:
                found[split].setdefault(folder.name, [])
    for file in sorted(files):
        split = next((split for split in splits if split in file.parents), None)
        inner = file.relative_to(split).parts if split is not None else ()
        is_image = file.suffix.lower() in _IMAGE_SUFFIXES
        if len(inner) < 2 and not is_image:
            continue  # a readme or a licence beside the class folders
        if split is None or len(inner) != 2:
            raise UserError(f"{file} in {path} does not lie directly in a class folder; move or remove it.")
        if not is_image:
            raise UserError(f"{file} in {path} is not an image; remove it from its class folder.")
        found[split].setdefault(inner[0], []).append(file)
    classes = tuple(sorted({label for split in splits for label in found[split]}))
    for split in splits:
        for label in classes:
            if not found[split].get(label):
                raise UserError(f"The class folder {split / label} in {path} has no images; add some or remove it.")
    names = [file for split in splits for label in classes for file in found[split][label]]
    labels = np.array([i for split in splits for i, label in enumerate(classes) for _ in found[split][label]], np.int64)
    images = _decode(path, names, read, progress)
    kind = "zip" if path.is_file() else "folder"
    source = f"images of the {kind} {path.name}"
    if len(splits) == 2:
        n_train = sum(len(found[splits[0]][label]) for label in classes)
        parts = (images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])
    else:
        for label in classes:
            if len(found[top][label]) < 2:
                raise UserError(
                    f"The class folder {label} in {path} has one image, too few to train and test; add more."
                )
        parts = _split(images, labels)
        source += "; every fifth image of each class, by name, is for testing"
    return _Arrays(name, *parts, classes, source)


def _decode(
    path: Path, names: list[PurePosixPath], read: Callable[[PurePosixPath], bytes], progress: bool
) -> np.ndarray:
    """All images as uint8 (N, C, H, W): one channel if every one of them is grey, else three."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("Reading images needs Pillow; install it with: pip install 'normwright[lab]'") from error

    size: tuple[int, int] | None = None

    def decode(name: PurePosixPath) -> np.ndarray:
        raw = read(name)
        try:
            image = Image.open(io.BytesIO(raw))
        except Exception as error:  # a decoder meets anything in a broken file
            raise UserError(f"{name} in {path} is not an image that can be read; remove or replace it.") from error
        with image:
            if size is not None and image.size != size:
                raise UserError(
                    f"{name} in {path} is {image.size[0]}×{image.size[1]} pixels, where {names[0]} is "
                    f"{size[0]}×{size[1]}; bring all images to one size."
                )
            if image.size[0] * image.size[1] * 3 * len(names) > MAX_BYTES:
                _too_large(path)
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"{name} in {path} has more than 8 bits a channel ({image.mode}); convert it to 8 bits."
                )
            try:
                return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
            except Exception as error:
                raise UserError(f"{name} in {path} is a broken image ({error}); remove or replace it.") from error

    first = decode(names[0])
    size = (first.shape[1], first.shape[0])
    # Threads gain 1.3–1.8× from 96×96 pixels on and lose below (JPEG, two cores): Pillow frees the lock too briefly.
    workers = 1 if size[0] * size[1] < 96 * 96 else min(8, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool,
        _bar(progress, f"decoding {path.name}", MofNCompleteColumn(), _RateColumn(), total=len(names)) as bar,
    ):
        decoded = []
        try:
            for image in map(decode, names) if pool is None else pool.map(decode, names):
                decoded.append(image)
                if len(decoded) % 256 == 0:
                    bar.update(bar.task_ids[0], completed=len(decoded))
        except BaseException:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
            raise
    channels = 1 if all(image.ndim == 2 for image in decoded) else 3
    images = np.empty((len(names), channels, size[1], size[0]), np.uint8)
    for place, image in zip(images, decoded, strict=True):
        place[:] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return images
