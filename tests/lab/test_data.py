"""Data: every reader against arrays that the test wrote itself, every fault one sentence, nothing run, nothing half."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from normwright.lab import data, files
from normwright.lab.data import load
from normwright.lab.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
RNG = np.random.default_rng(0)


def refused(path, says, **options):
    """Loading must fail with one sentence that has `says` in it; returns the sentence."""
    with pytest.raises(UserError) as error:
        load(path, **options)
    text = str(error.value)
    assert says in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


def check(dataset, x_train, y_train, x_test, y_test):
    """The set holds these uint8 images (N, C, H, W), divided by 255, and these labels."""
    for found, images in ((dataset.x_train, x_train), (dataset.x_test, x_test)):
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        np.testing.assert_array_equal(found.numpy(), (np.asarray(images) / np.float64(255)).astype(np.float32))
    for found, labels in ((dataset.y_train, y_train), (dataset.y_test, y_test)):
        assert found.dtype == torch.int64
        assert found.tolist() == list(labels)


# IDX


def idx(array):
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_idx(folder, *, gz=True, sep="-", test="t10k", n=30, classes=3):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", n), (test, n // 2)):
        arrays[part, "images"] = RNG.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        arrays[part, "labels"] = np.arange(count, dtype=np.uint8) % classes
        for content, ndim in (("images", 3), ("labels", 1)):
            raw = idx(arrays[part, content])
            name = f"{part}-{content}{sep}idx{ndim}-ubyte"
            (folder / (name + (".gz" if gz else ""))).write_bytes(gzip.compress(raw) if gz else raw)
    return arrays


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize(("sep", "test"), [("-", "t10k"), (".", "t10k"), ("-", "test")])
def test_idx_files(tmp_path, gz, sep, test):
    arrays = write_idx(tmp_path / "letters", gz=gz, sep=sep, test=test)
    found = load(tmp_path / "letters")
    check(
        found,
        arrays["train", "images"][:, None],
        arrays["train", "labels"],
        arrays[test, "images"][:, None],
        arrays[test, "labels"],
    )
    assert (found.name, found.classes, found.channels, found.size) == ("letters", ("0", "1", "2"), 1, (5, 4))


def test_a_folder_named_fashion_mnist_has_its_ten_classes(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    write_idx(folder, classes=10)
    assert load(folder).classes[9] == "Ankle boot"
    for found in (load("fashion-mnist", folder), load("fashion-mnist", tmp_path)):
        assert found.classes[0] == "T-shirt/top"
        assert found.name == "fashion-mnist"
    write_idx(folder, classes=11)
    refused(folder, "The training labels of raw run from 0 to 9, but 10 stands among them")
    assert load("fashion-mnist", write_and_return(tmp_path / "ok")).y_train.max() == 9


def write_and_return(folder):
    write_idx(folder, classes=10)
    return folder


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (TRAIN_IMAGES, lambda raw: raw[:-1], "is cut off: 599 bytes of data for the shape (30, 5, 4)"),
        (TRAIN_IMAGES, lambda raw: raw[:9], "is cut off: 9 bytes, where the header alone has 16"),
        (TRAIN_IMAGES, lambda raw: b"", "is cut off: 0 bytes"),
        (TRAIN_IMAGES, lambda raw: raw + b"x", "has bytes too many: 601 bytes"),
        (TRAIN_IMAGES, lambda raw: b"\x89PNG" + raw[4:], "is no IDX file of images (uint8, three dimensions)"),
        (TRAIN_IMAGES, lambda raw: b"\0\0\x0d\3" + raw[4:], "starts with 00000d03, not 00000803"),  # float32
        (TRAIN_IMAGES, lambda raw: b"\0\0\x08\4" + raw[4:], "starts with 00000804"),
        (TRAIN_IMAGES, lambda raw: idx(np.zeros((0, 5, 4))), "holds no data: its header says (0, 5, 4)"),
        (TRAIN_LABELS, lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "is cut off: 30 bytes of data"),
        (TRAIN_LABELS, lambda raw: idx(np.arange(29) % 3), "has 30 images but train-labels-idx1-ubyte 29 labels"),
        (TRAIN_LABELS, lambda raw: idx(np.arange(30) % 3 * 2), "Class 1 of 5 in letters has no training image"),
        (TRAIN_LABELS, lambda raw: idx(np.arange(30) % 3 + 1), "Class 0 of 4 in letters has no training image"),
        (TRAIN_LABELS, lambda raw: idx(np.zeros(30)), "letters has only the classes ['0']"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx(np.full(15, 3)), "test labels of letters run from 0 to 2, but 3"),
        ("t10k-images-idx3-ubyte", lambda raw: idx(np.zeros((15, 4, 4))), "are 4×5 pixels and the test images 4×4"),
    ],
)
def test_wrong_idx_files(tmp_path, name, change, says):
    write_idx(tmp_path / "letters", gz=False)
    file = tmp_path / "letters" / name
    file.write_bytes(change(file.read_bytes()))
    refused(tmp_path / "letters", says)


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("content", ["images-idx3", "labels-idx1"])
def test_a_missing_idx_file_is_named(tmp_path, part, content):
    write_idx(tmp_path)
    (tmp_path / f"{part}-{content}-ubyte.gz").unlink()
    refused(tmp_path, f"lacks {part}-{content}-ubyte(.gz); add the missing file")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:40] + bytes(20) + raw[60:],
        lambda raw: raw[:-8] + bytes(4) + raw[-4:],  # the checksum
        lambda raw: b"not gzip at all",
        lambda raw: raw[:4],
    ],
)
def test_damaged_gzip(tmp_path, change):
    write_idx(tmp_path)
    file = tmp_path / f"{TRAIN_IMAGES}.gz"
    file.write_bytes(change(file.read_bytes()))
    assert str(file) in refused(tmp_path, "is damaged or cut off")


def test_a_gzip_bomb_stops_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 1 << 20)
    write_idx(tmp_path)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(idx(np.zeros((1 << 12, 32, 32)))))
    refused(tmp_path, "unpacks to more than the limit")


# CIFAR


def python2_pickle(entries):
    """A pickle of protocol 2 as Python 2 wrote it: strings as bytes, the array through numpy's _reconstruct."""

    def text(value):
        value = value.encode("latin1") if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    def dump(value):
        if isinstance(value, np.ndarray):
            shape = b"(" + b"".join(map(number, value.shape)) + b"t"
            dtype = b"cnumpy\ndtype\n" + text(value.dtype.str[1:]) + number(0) + number(1) + b"\x87R"
            dtype += b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
            head = (
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text("b") + b"\x87R"
            )
            return head + b"(" + number(1) + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"
        if isinstance(value, list):
            return b"](" + b"".join(map(dump, value)) + b"e"
        return number(value) if isinstance(value, int) else text(value)

    return b"\x80\x02}(" + b"".join(text(key) + dump(value) for key, value in entries.items()) + b"u."


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batch(n=10, **changes):
    entries = {"batch_label": "a batch", "labels": [i % 10 for i in range(n)], "filenames": ["x.png"] * n}
    entries["data"] = RNG.integers(0, 256, (n, 3072), dtype=np.uint8)
    entries.update(changes)
    return entries


def write_cifar(folder, write=python2_pickle):
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: batch() for name in BATCHES}
    for name, entries in made.items():
        (folder / name).write_bytes(write(entries))
    return made


def python3_pickle(protocol):
    return lambda entries: pickle.dumps({key.encode(): value for key, value in entries.items()}, protocol=protocol)


def check_cifar(found, made):
    images = [made[name]["data"].reshape(-1, 3, 32, 32) for name in BATCHES]
    check(found, np.concatenate(images[:5]), list(range(10)) * 5, images[5], range(10))
    assert found.classes[:2] == ("airplane", "automobile")


def test_the_helper_writes_what_numpy_reads():
    entries = batch()
    read = pickle.loads(python2_pickle(entries), encoding="bytes")
    np.testing.assert_array_equal(read[b"data"], entries["data"])


@pytest.mark.parametrize("write", [python2_pickle, *map(python3_pickle, (2, 3, 4))])
def test_cifar10_batches(tmp_path, write):
    made = write_cifar(tmp_path / "cifar-10-batches-py", write)
    check_cifar(load(tmp_path / "cifar-10-batches-py"), made)
    check_cifar(load(tmp_path), made)
    for ending, mode in ((".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar", "w")):
        path = tmp_path / f"cifar-10-python{ending}"
        with tarfile.open(path, mode) as archive:
            archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
        check_cifar(load(path), made)


def test_cifar100_batches(tmp_path):
    fine = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    made = {name: batch(fine_labels=fine) for name in ("train", "test")}
    for name, entries in made.items():
        del entries["labels"]
        (tmp_path / name).write_bytes(python2_pickle(entries))
    (tmp_path / "meta").write_bytes(python2_pickle({"fine_label_names": ["apple", "bee", "cup"]}))
    found = load(tmp_path)
    images = [made[name]["data"].reshape(-1, 3, 32, 32) for name in ("train", "test")]
    check(found, images[0], fine, images[1], fine)
    assert found.classes == ("apple", "bee", "cup")
    (tmp_path / "meta").write_bytes(python2_pickle({}))
    refused(tmp_path, "lacks the list fine_label_names")


class Payload:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw[: len(raw) // 2], "is damaged"),
        (lambda raw: b"", "is damaged"),
        (lambda raw: b"\xff" * 50, "is damaged"),
        (lambda raw: pickle.dumps([1, 2]), "it holds a list, not a dict"),
        (lambda raw: python2_pickle({"labels": [0]}), "it has no 'data'"),
        (lambda raw: python2_pickle({"data": batch()["data"]}), "it has no 'labels'"),
        (lambda raw: python2_pickle(batch(data="abc")), "its data is no array"),
        (lambda raw: python2_pickle(batch(data=np.zeros((10, 3072), np.float32))), "an array that is not uint8"),
        (lambda raw: python2_pickle(batch(data=np.zeros((10, 3000), np.uint8))), "data of shape (10, 3000), where"),
        (lambda raw: python2_pickle(batch(data=np.zeros((0, 3072), np.uint8))), "data of shape (0, 3072)"),
        (lambda raw: raw.replace(b"J" + struct.pack("<i", 3072), b"J" + struct.pack("<i", 3073)), "its data are wrong"),
        (lambda raw: python2_pickle(batch(labels=[0] * 9)), "has 10 images but 9 labels"),
        (lambda raw: python2_pickle(batch(labels=[10] * 10)), "has the label 10, where they run from 0 to 9"),
        (lambda raw: python2_pickle(batch(labels=[-1] * 10)), "has the label -1"),
        (lambda raw: python2_pickle(batch(labels=["cat"] * 10)), "its labels are not a list of integers"),
        (lambda raw: python2_pickle(batch(labels="0123456789")), "its labels are not a list of integers"),
        (lambda raw: b"\x80\x02cnumpy\nndarray\n}X\x01\x00\x00\x00a\x4b\x01sb.", "is damaged"),  # state on a class
    ],
)
def test_wrong_cifar_batches(tmp_path, change, says):
    write_cifar(tmp_path)
    file = tmp_path / "data_batch_2"
    file.write_bytes(change(file.read_bytes()))
    assert "data_batch_2" in refused(tmp_path, says)


def test_a_label_gap_and_a_missing_batch(tmp_path):
    write_cifar(tmp_path / "set", lambda entries: python2_pickle(entries | {"labels": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]}))
    refused(tmp_path / "set", "Class 9 of 10 in set has no training image")
    (tmp_path / "set" / "data_batch_4").unlink()
    refused(tmp_path / "set", "set lacks CIFAR's file data_batch_4")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_malicious_pickle_is_not_run(tmp_path, protocol):
    touched = tmp_path / "touched"
    payloads = [
        Payload(os.mkdir, str(touched)),
        Payload(eval, f"open({str(touched)!r}, 'w')"),
        Payload(Path.touch, touched),
        Payload(getattr, Payload(__import__, "os"), "system"),
    ]
    for payload in payloads:
        write_cifar(tmp_path / "set")
        raw = pickle.dumps({"data": payload, "labels": [0]}, protocol=protocol)
        (tmp_path / "set" / "data_batch_1").write_bytes(raw)
        refused(tmp_path / "set", "nothing in it was run")
        assert not touched.exists()
    pickle.loads(pickle.dumps(payloads[0], protocol=protocol))
    assert touched.exists()  # the payload does work on one who runs it


def tar_with(path, *members):
    with tarfile.open(path, "w:gz") as archive:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, 3 if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd"
            archive.addfile(member, io.BytesIO(b"abc"))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("../evil", tarfile.REGTYPE, "its member '../evil' leads out of it"),
        ("a/../../evil", tarfile.REGTYPE, "leads out of it"),
        ("/etc/evil", tarfile.REGTYPE, "its member '/etc/evil' leads out of it"),
        ("link", tarfile.SYMTYPE, "its member 'link' is a link or a device"),
        ("hard", tarfile.LNKTYPE, "is a link or a device"),
        ("device", tarfile.CHRTYPE, "is a link or a device"),
    ],
)
def test_a_tar_that_leads_out_of_itself_is_refused(tmp_path, name, kind, says):
    refused(tar_with(tmp_path / "x.tar.gz", ("data_batch_1", tarfile.REGTYPE), (name, kind)), says)
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar.gz"]


def test_wrong_tars(tmp_path, monkeypatch):
    path = tar_with(tmp_path / "x.tar.gz", ("readme", tarfile.REGTYPE))
    refused(path, "has none of CIFAR's python batches")
    raw = path.read_bytes()
    for wrong in (raw[: len(raw) // 2], b"no tar", b"", raw[:30] + bytes(20) + raw[50:]):
        path.write_bytes(wrong)
        refused(path, "is damaged or cut off")
    path.write_bytes(raw)
    monkeypatch.setattr(data, "MAX_BYTES", 2)
    refused(path, "unpacks to more than the limit")


# folders and zips of images


def images_of(names, size=(4, 3), channels=3):
    shape = (size[1], size[0], channels) if channels == 3 else (size[1], size[0])
    return {name: RNG.integers(0, 256, shape, dtype=np.uint8) for name in names}


def encode(pixels, kind="PNG"):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind)
    return file.getvalue()


def write_folder(root, contents):
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else encode(content))
    return root


def write_zip(path, contents):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content if isinstance(content, bytes) else encode(content))
    return path


def write_both(tmp_path, contents):
    return write_folder(tmp_path / "set", contents), write_zip(tmp_path / "set.zip", contents)


SPLIT = [f"{part}/{label}/{i}.png" for part in ("train", "test") for label in ("cat", "dog") for i in range(2)]


@pytest.mark.parametrize("top", ["", "pets/", "a/b/"])
@pytest.mark.parametrize("channels", [1, 3])
def test_class_folders_with_a_split(tmp_path, top, channels):
    contents = images_of(SPLIT, channels=channels)
    stored = {top + name: pixels for name, pixels in contents.items()}
    stored |= {"README.md": b"about", ".hidden/x.txt": b"x", top + "train/cat/.DS_Store": b"x", "__MACOSX/y.png": b"y"}
    pixels = [contents[name].reshape(3, 4, channels).transpose(2, 0, 1) for name in SPLIT]
    for path in write_both(tmp_path, stored):
        found = load(path)
        check(found, pixels[:4], [0, 0, 1, 1], pixels[4:], [0, 0, 1, 1])
        assert (found.classes, found.channels, found.size, found.name) == (("cat", "dog"), channels, (3, 4), "set")


def test_class_folders_without_a_split_give_every_fifth_for_testing(tmp_path):
    contents = images_of([f"{label}/{i}.png" for label in "ab" for i in range(7)])
    for path in write_both(tmp_path, contents):
        found = load(path)
        assert "every fifth image of each class, by name, is for testing" in found.source
        test = [contents[f"{label}/{i}.png"].transpose(2, 0, 1) for label in "ab" for i in (1, 6)]
        train = [contents[f"{label}/{i}.png"].transpose(2, 0, 1) for label in "ab" for i in (0, 2, 3, 4, 5)]
        check(found, train, [0] * 5 + [1] * 5, test, [0, 0, 1, 1])


def test_grey_palette_and_transparent_images_become_one_set(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    colour = np.stack([grey] * 3, -1)
    stored = {
        "a/0.png": grey,
        "a/1.png": encode(Image.fromarray(colour).convert("RGBA")),
        "b/0.gif": encode(Image.fromarray(grey).convert("P"), "GIF"),
        "b/1.bmp": encode(colour, "BMP"),
    }
    found = load(write_folder(tmp_path / "set", stored))
    expected = np.stack([colour.transpose(2, 0, 1)] * 2)
    check(found, expected, [0, 1], expected, [0, 1])


def test_large_images_decoded_by_threads_keep_their_order(tmp_path):
    contents = images_of([f"{label}/{i:02}.png" for label in "ab" for i in range(20)], size=(100, 100))
    found = load(write_folder(tmp_path / "set", contents))
    names = [f"{label}/{i:02}.png" for label in "ab" for i in range(20) if i % 5 != 1]
    np.testing.assert_array_equal(
        (found.x_train * 255).round().to(torch.uint8).numpy(),
        [contents[name].transpose(2, 0, 1) for name in names],
    )
    (tmp_path / "set" / "b" / "11.png").write_bytes(encode(images_of(["x"], size=(99, 100))["x"]))
    refused(tmp_path / "set", "b/11.png in")


def valid(**changes):
    return images_of(SPLIT) | changes


def deep_png():
    return encode(Image.fromarray(np.zeros((3, 4), np.uint16)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train/dog/1.png": images_of(["x"], size=(5, 3))["x"]}, "train/dog/1.png in {} is 5×3 pixels, where"),
        ({"train/dog/1.png": b"not an image"}, "train/dog/1.png in {} is not an image that can be read"),
        ({"train/dog/1.png": encode(images_of(["x"])["x"])[:60]}, "train/dog/1.png in {} is"),
        ({"train/dog/1.png": b""}, "train/dog/1.png in {} is not an image that can be read"),
        ({"train/dog/1.png": deep_png()}, "train/dog/1.png in {} has more than 8 bits a channel"),
        ({"train/dog/labels.txt": b"x"}, "train/dog/labels.txt in {} is not an image; remove it from its class folder"),
        ({"train/dog/more/1.png": encode(images_of(["x"])["x"])}, "train/dog/more/1.png in {} does not lie directly"),
        ({"train/1.png": encode(images_of(["x"])["x"])}, "train/1.png in {} does not lie directly in a class folder"),
        ({"1.png": encode(images_of(["x"])["x"])}, "1.png in {} does not lie directly in a class folder"),
        ({"train/emu/1.png": encode(images_of(["x"])["x"])}, "The class folder test/emu in {} has no images"),
        ({"val/cat/1.png": encode(images_of(["x"])["x"])}, "stand test, train, val; a set that is split has exactly"),
    ],
)  # fmt: skip
def test_wrong_images(tmp_path, changes, says):
    for path in write_both(tmp_path, valid(**changes)):
        refused(path, says.format(path))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["cat/1.png", "cat/2.png"], "has only the classes ['cat']"),
        (["cat/1.png", "cat/2.png", "dog/1.png"], "The class folder dog in {} has one image"),
        (["train/cat/1.png", "train/dog/1.png"], "stand train; a set that is split has exactly"),
        (["train/cat/1.png", "test/dog/1.png"], "The class folder train/dog in {} has no images"),
        (["1.png", "2.png"], "1.png in {} does not lie directly in a class folder"),
    ],
)
def test_wrong_class_folders(tmp_path, names, says):
    for path in write_both(tmp_path, images_of(names)):
        refused(path, says.format(path))


def test_a_class_folder_without_images(tmp_path):
    folder = write_folder(tmp_path / "set", images_of(SPLIT))
    (folder / "train" / "eel").mkdir()
    refused(folder, f"The class folder train/eel in {folder} has no images")
    path = write_zip(tmp_path / "set.zip", images_of(SPLIT) | {"test/eel/": b""})
    refused(path, f"The class folder train/eel in {path} has no images")


def test_the_limit_on_pixels(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", images_of(SPLIT))
    monkeypatch.setattr(data, "MAX_BYTES", 8 * 36)
    load(folder)
    monkeypatch.setattr(data, "MAX_BYTES", 8 * 36 - 1)
    refused(folder, "unpacks to more than the limit")


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/evil.png", "C:/evil.png", "..\\evil.png", "\\evil.png", "cat/.."]
)
def test_a_zip_that_leads_out_of_itself_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "set.zip", valid(**{name: b"x"}))
    assert "is refused: its member" in refused(path, "leads out of it; use an archive from a source that you trust")
    assert [file.name for file in tmp_path.iterdir()] == ["set.zip"]


def test_a_zip_with_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("train/cat/9.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    path = write_zip(tmp_path / "set.zip", images_of(SPLIT))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(path, "its member 'train/cat/9.png' is a link")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "set.zip", valid(bomb=bytes(1 << 20)))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(data, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    refused(path, "unpacks to more than the limit")


def test_damaged_zips(tmp_path):
    path = write_zip(tmp_path / "set.zip", images_of(SPLIT))
    raw = path.read_bytes()
    for wrong in (raw[: len(raw) // 2], b"no zip", b""):
        path.write_bytes(wrong)
        refused(path, "is no zip, or is damaged or cut off")
    begin = raw.index(b"train/dog/1.png") + len("train/dog/1.png")
    for at, wrong in ((begin, b"\xff" * 10), (begin + 25, bytes(10))):  # no deflate stream; another content
        path.write_bytes(raw[:at] + wrong + raw[at + 10 :])
        assert "train/dog/1.png in" in refused(path, "is damaged")
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        offset = archive.start_dir
    path.write_bytes(raw[: offset + 8] + b"\1" + raw[offset + 9 :])
    refused(path, "is encrypted")
    path.write_bytes(write_zip(tmp_path / "other.zip", {"a.txt": b"x"}).read_bytes())
    refused(path, "holds no images")


# paths


def test_wrong_paths(tmp_path):
    refused("no-such-set", "There is no data set or path 'no-such-set'; use digits, fashion-mnist, or an existing path")
    refused(tmp_path, "is empty")
    (tmp_path / ".DS_Store").touch()
    refused(tmp_path, "is empty")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "holds no images")
    refused(tmp_path / "notes.txt", "is a file of unknown type")
    refused("fashion-mnist", "There is no folder", data_dir=tmp_path / "none")
    refused("fashion-mnist", "has none of Fashion-MNIST's IDX files", data_dir=tmp_path)
    refused("digits", "A data folder goes with fashion-mnist", data_dir=tmp_path)
    refused("x\0y", "There is no data set or path")
    refused("x" * 5000, "cannot be read")


def test_permission_denied(tmp_path, monkeypatch):
    idx_set, image_set = write_and_return(tmp_path / "idx"), write_folder(tmp_path / "set", images_of(SPLIT))
    write_cifar(tmp_path / "cifar")

    def deny(self, *_, **__):  # root may read everything, so rights alone cannot show it
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    refused(image_set, f"{image_set}/train/cat/0.png cannot be read (Permission denied); check the path and its rights")
    refused(tmp_path / "cifar", f"{tmp_path}/cifar/data_batch_1 cannot be read (Permission denied)")
    monkeypatch.setattr(gzip, "open", lambda path: deny(path))
    refused(idx_set, "cannot be read (Permission denied)")
    monkeypatch.setattr(Path, "iterdir", deny)
    refused(idx_set, f"{idx_set} cannot be read (Permission denied)")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_rights(tmp_path):
    folder = write_folder(tmp_path / "set", images_of(SPLIT))
    (folder / "train" / "cat").chmod(0)
    refused(folder, "cannot be read (Permission denied)")
    (folder / "train" / "cat").chmod(0o700)


# digits, limit, hash


def test_digits():
    found = load("digits")
    raw = load_digits()
    assert (found.x_train.shape, found.x_test.shape) == ((1435, 1, 28, 28), (362, 1, 28, 28))
    assert found.classes == tuple("0123456789")
    assert 0 <= found.x_train.min() < found.x_train.max() == 1
    seen, train, test = [0] * 10, [], []
    for i, label in enumerate(raw.target):
        (test if seen[label] % 5 == 1 else train).append(i)
        seen[label] += 1
    assert found.y_train.tolist() == raw.target[train].tolist()
    assert found.y_test.tolist() == raw.target[test].tolist()
    for where, images, index in ((0, found.x_train, train), (100, found.x_test, test)):
        pillow = Image.fromarray(raw.images[index[where]].astype(np.float32) / 16)
        pillow = np.asarray(pillow.resize((28, 28), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(images[where, 0], pillow, atol=0.5 / 255 + 1e-6)


def test_the_same_data_have_the_same_hash_and_other_data_another(tmp_path):
    contents = images_of(SPLIT)
    first = load(write_folder(tmp_path / "one", contents))
    assert first.sha256 == load(write_zip(tmp_path / "two.zip", contents)).sha256
    assert len(first.sha256) == 64
    hashes = {first.sha256}
    for name, change in (("pixel", "train/cat/0.png"), ("test", "test/dog/1.png")):
        pixels = contents[change].copy()
        pixels[0, 0, 0] ^= 1
        hashes.add(load(write_folder(tmp_path / name, contents | {change: pixels})).sha256)
    renamed = {name.replace("dog", "fox"): pixels for name, pixels in contents.items()}
    hashes.add(load(write_folder(tmp_path / "classes", renamed)).sha256)
    swapped = {name.replace("cat", "?").replace("dog", "cat").replace("?", "dog"): p for name, p in contents.items()}
    hashes.add(load(write_folder(tmp_path / "labels", swapped)).sha256)
    hashes.add(load("digits").sha256)
    hashes.add(load("digits", limit=10).sha256)
    assert len(hashes) == 7


def test_limit_keeps_the_order(tmp_path):
    folder = write_folder(tmp_path / "set", images_of([f"{label}/{i:02}.png" for label in "ab" for i in range(20)]))
    assert load(folder, limit=4).y_train.tolist() == [0, 0, 1, 1]


def test_limit_spreads_over_the_classes():
    whole, found = load("digits"), load("digits", limit=25)
    assert (len(found.x_train), len(found.x_test)) == (25, 25)
    assert set(found.y_train.bincount().tolist()) == {2, 3}
    at = [(whole.x_train == image).flatten(1).all(1).nonzero()[0].item() for image in found.x_train]
    assert torch.equal(whole.y_train[at], found.y_train)
    assert len(load("digits", limit=10**6).x_train) == 1435
    assert "at most 25 images" in found.source
    refused("digits", "A limit of 9 images leaves some of the 10 classes empty", limit=9)


def test_to_moves_all_four_tensors():
    found = load("digits", limit=10).to("meta")
    assert {
        found.x_train.device.type,
        found.y_train.device.type,
        found.x_test.device.type,
        found.y_test.device.type,
    } == {"meta"}


# the download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Fashion-MNIST in small on a server of this machine, and an empty cache."""
    folder = write_and_return(tmp_path / "served")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    base = f"http://127.0.0.1:{served.server_port}/"
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setenv("NORMWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_FASHION_URLS", (base + "missing/", base))
    monkeypatch.setattr(data, "_FASHION_MD5", {name: md5[name] for name in data._FASHION_MD5})
    yield folder, tmp_path / "cache" / "fashion-mnist", asked
    served.shutdown()
    thread.join()
    served.server_close()


def test_download_once_and_read_from_the_cache(server):
    folder, cache, asked = server
    found = load("fashion-mnist")
    assert found.sha256 == load("fashion-mnist", folder).sha256
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }
    assert len(asked) == 8  # each asked first where it is not
    assert load("fashion-mnist").sha256 == found.sha256
    (cache / f"{TRAIN_IMAGES}.gz").unlink()
    load("fashion-mnist")
    assert asked[8:] == [f"/missing/{TRAIN_IMAGES}.gz", f"/{TRAIN_IMAGES}.gz"]


def test_a_download_with_the_wrong_checksum_is_not_kept(server):
    folder, cache, _ = server
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(b"something else")
    text = refused("fashion-mnist", "could not be downloaded")
    assert "404" in text
    assert "MD5 6c7ba9c5a141421e1c03cb9807c97c74 where" in text
    assert list(cache.iterdir()) == []


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NORMWRIGHT_CACHE", raising=False)
    monkeypatch.setattr(data, "_FASHION_URLS", ("http://127.0.0.1:9/",))
    text = refused("fashion-mnist", f"is not in {tmp_path}/normwright/fashion-mnist and could not be downloaded")
    assert "name a folder that has the four files with --data-dir, or use --data digits" in text
    assert list((tmp_path / "normwright" / "fashion-mnist").iterdir()) == []


class FullDisk(io.FileIO):
    def write(self, chunk):
        super().write(bytes(chunk)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing_half_written(server, monkeypatch):
    _, cache, _ = server
    real_open = Path.open

    def full(self, mode="r", *rest, **options):
        return FullDisk(self, mode.replace("b", "")) if "x" in mode else real_open(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    refused("fashion-mnist", "The disk is full, so")
    assert list(cache.iterdir()) == []
    monkeypatch.undo()


def test_a_cache_that_cannot_be_made(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NORMWRIGHT_CACHE", str(tmp_path / "file"))
    refused("fashion-mnist", "cannot be")


def test_an_older_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "report.html"
    files.atomic_write(path, [b"old"])

    def chunks():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(path, chunks())
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    files.atomic_write(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new"


# the real sets


@pytest.mark.skipif(not (SHARED / "fashion-mnist").exists(), reason="Fashion-MNIST is not beside the repository")
def test_the_real_fashion_mnist(tmp_path):
    found = load(SHARED / "fashion-mnist")
    assert (found.x_train.shape, found.x_test.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert found.y_train.bincount().tolist() == [6000] * 10
    # the mean and deviation that everybody normalizes it with
    assert found.x_train.double().mean().item() == pytest.approx(0.2860, abs=5e-5)
    assert found.x_train.double().std().item() == pytest.approx(0.3530, abs=5e-5)
    assert found.classes[9] == "Ankle boot"
    shutil.copytree(SHARED / "fashion-mnist", tmp_path / "cut")
    file = tmp_path / "cut" / f"{TRAIN_IMAGES}.gz"
    file.chmod(0o600)
    os.truncate(file, 10_000_000)
    refused(tmp_path / "cut", "is damaged or cut off")


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10-jpeg").exists(), reason="CIFAR-10-JPEG is not beside the repository")
def test_the_real_cifar10_jpeg():
    found = load(SHARED / "cifar10-jpeg" / "cifar10-jpeg.zip")
    assert (found.x_train.shape, found.x_test.shape) == ((50000, 3, 32, 32), (10000, 3, 32, 32))
    assert found.y_train.bincount().tolist() == [5000] * 10
    assert found.y_test.bincount().tolist() == [1000] * 10
    assert found.classes == data._CIFAR10_CLASSES
    # CIFAR-10's published channel means; JPEG shifts them by less
    assert found.x_train.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
