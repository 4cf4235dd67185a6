"""data.py against numpy, scikit-learn's own arrays and IDX files written here."""

import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from minidora.data import SHIFTS, load_images, shift, split

PARTS = {"pretraining": 600, "adaptation": 300, "validation": 300, "test": 597}


def test_digits_are_the_1797_of_scikit_learn() -> None:
    images = load_images()
    oracle = load_digits()
    assert images.x.shape == (1797, 64)
    assert images.x.dtype == torch.float32
    assert images.y.dtype == torch.int64
    np.testing.assert_array_equal(images.x.numpy() * 16, oracle.data)
    np.testing.assert_array_equal(images.y.numpy(), oracle.target)
    np.testing.assert_array_equal(images.pictures.numpy() * 16, oracle.images)


def test_28x28_is_bilinear() -> None:
    small = load_images(size=8).pictures.double().numpy()
    # Pixel i of 28 has its middle at (i + 0.5) * 8 / 28 - 0.5 of the 8, and weighs its neighbours
    # by 1 - distance; beyond the border the border's pixel repeats.
    middle = ((np.arange(28) + 0.5) * 8 / 28 - 0.5).clip(0, 7)
    weights = (1 - np.abs(middle[:, None] - np.arange(8))).clip(0)
    expected = weights @ small @ weights.T
    np.testing.assert_allclose(load_images(size=28).pictures.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_parts_are_disjoint(seed: int) -> None:
    images = load_images()
    parts = split(images, PARTS, seed)
    assert {name: len(part) for name, part in parts.items()} == PARTS
    rows = [row for part in parts.values() for row in part.index.tolist()]
    assert len(set(rows)) == 1797  # no row twice
    pixels = {image.numpy().tobytes() for part in parts.values() for image in part.x}
    assert len(pixels) == 1797  # nor the same picture under two rows
    for part in parts.values():
        assert torch.equal(part.x, images.x[part.index])
        assert torch.equal(part.y, images.y[part.index])


def test_each_seed_splits_anew_and_again_the_same() -> None:
    images = load_images()
    first, again, other = (split(images, PARTS, seed)["test"].index for seed in (0, 0, 1))
    assert torch.equal(first, again)
    # Two independent draws of 597 of 1797 share about a third, 198 images.
    assert 140 < len(set(first.tolist()) & set(other.tolist())) < 260


def test_shift_keeps_image_class_and_every_pixel_value() -> None:
    images = load_images()[:50]
    for name in SHIFTS:
        new = shift(images, name)
        assert torch.equal(new.y, images.y)
        assert torch.equal(new.index, images.index)
        values = 1 - new.x if name == "invert" else new.x
        assert torch.allclose(values.sort(dim=1).values, images.x.sort(dim=1).values)
        assert not torch.equal(new.x, images.x)


def test_turns_are_numpy_s() -> None:
    images = load_images()[:5]
    for name, quarters in {"quarter turn": 1, "half turn": 2}.items():
        expected = np.rot90(images.pictures.numpy(), quarters, axes=(1, 2))
        np.testing.assert_array_equal(shift(images, name).pictures.numpy(), expected)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_files_that_are_there_are_read_without_network(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the files are there, but the network was asked")

    monkeypatch.setattr(socket, "create_connection", no_network)
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
    for prefix, rows in {"train": slice(0, 5), "t10k": slice(5, 7)}.items():
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pictures[rows])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(7)[rows])
    images = load_images(name, root=tmp_path)
    np.testing.assert_allclose(images.pictures.numpy(), pictures / 255, rtol=1e-6)
    assert images.y.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert load_images(name, size=8, root=tmp_path).x.shape == (7, 64)


def write_mnist(raw: Path, count: int = 7) -> None:
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", np.zeros((count, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_in_a_path_is_the_home(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "home" / "pictures" / "MNIST" / "raw")
    assert len(load_images("mnist", root=kind("~/pictures"))) == 14
    assert [path.name for path in tmp_path.iterdir()] == ["home"]  # no folder called ~
    with pytest.raises(ValueError, match="'~nobody-here/x' names an unknown home"):
        load_images("mnist", root="~nobody-here/x")


LOGIN = b"<!DOCTYPE html><html><head><title>Sign in to continue</title></head></html>"


@pytest.mark.parametrize(
    "break_file",
    [
        lambda path: path.write_bytes(LOGIN),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),  # half fetched
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(b"\0\0\x0d\x01" + path.read_bytes()[4:]),  # of floats
    ],
)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_that_is_not_mnist_is_named(
    name: str, break_file: Callable[[Path], object], tmp_path: Path
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    break_file(raw / name)
    with pytest.raises(RuntimeError, match=f"^{name} in .* cannot be read as mnist: delete"):
        load_images("mnist", root=tmp_path)


def test_images_and_labels_of_other_numbers_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_mnist(raw)
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(5))
    with pytest.raises(RuntimeError, match=r"do not fit together: \(7, 28, 28\) and \(5,\)"):
        load_images("fashion-mnist", root=tmp_path)


def test_without_torchvision_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match="mnist is read by torchvision, .* pip install"):
        load_images("mnist", root=tmp_path)


def test_a_root_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RuntimeError, match=r"could not be fetched .*load_images\(\"digits\"\)"):
        load_images("mnist", root=tmp_path / "file", timeout=1)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("Error downloading")])
def test_without_network_the_error_names_the_way_out(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    seen = []

    def fail(*_: object, **__: object) -> None:
        seen.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(datasets, "MNIST", fail)
    fail.__name__ = "MNIST"
    before = socket.getdefaulttimeout()
    with pytest.raises(RuntimeError, match=r'(?s)mnist is not under .* load_images\("digits"\)'):
        load_images("mnist", root=tmp_path, timeout=3.5)
    assert seen == [3.5]
    assert socket.getdefaulttimeout() == before


def test_bad_input() -> None:
    images = load_images()
    with pytest.raises(ValueError, match=r"name must be one of digits, mnist.* got 'cifar'"):
        load_images("cifar")
    with pytest.raises(ValueError, match=r"size must be 8 or 28 .* got 16"):
        load_images(size=16)
    with pytest.raises(ValueError, match="asks for 1900 images, there are 1797"):
        split(images, {"train": 1000, "test": 900}, seed=0)
    with pytest.raises(ValueError, match=r"at least 1 image, got {'test': 0}"):
        split(images, {"train": 10, "test": 0}, seed=0)
    with pytest.raises(ValueError, match="name must be one of half turn.* got 'rotate'"):
        shift(images, "rotate")
