"""Data of the lessons: digits and two texts offline, MNIST and FashionMNIST when asked for.

    images = load_images("digits")                          # 1797 scans, 8x8, no network
    parts = split(images, {"train": 1000, "test": 797}, seed=0)   # no image in two parts
    turned = shift(parts["test"], "quarter turn")           # the same images, a new task
    train, held_out = split_text(load_text("documentation"))      # tokens, one a character

References:
    digits: E. Alpaydin, C. Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine
        Learning Repository; the copy inside scikit-learn
    LeCun et al. 1998 (MNIST); Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747 (FashionMNIST)
"""

import lzma
import math
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DATASETS = {"digits": 8, "mnist": 28, "fashion-mnist": 28}
"""Names that load_images knows, with the side of their images in pixels."""


@dataclass(frozen=True)
class Images:
    """Square gray images with their classes.

    Attributes:
        x: (n, side * side), float32 in [0, 1]: one image a row.
        y: (n,), int64: the class.
        index: (n,), int64: the image's row in the whole dataset. It follows an image through
            split and shift, so whoever doubts that two sets are disjoint can look.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor | slice) -> "Images":
        return Images(self.x[rows], self.y[rows], self.index[rows])

    def to(self, device: torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device), self.index.to(device))

    @property
    def pictures(self) -> Tensor:
        """(n, side, side): the same pixels as x, as pictures."""
        side = math.isqrt(self.x.shape[1])
        return self.x.view(-1, side, side)


def load_images(
    name: str = "digits", size: int | None = None, root: str | Path = "data", timeout: float = 10.0
) -> Images:
    """All images of a dataset, those of its training and its test file together.

    Args:
        name: "digits" (1797 handwritten digits, inside scikit-learn, no network), "mnist" or
            "fashion-mnist" (70000 each, fetched once by torchvision).
        size: side in pixels, 8 or 28; None takes the dataset's own. Another size than its own is
            made by bilinear interpolation (antialiased downwards), which adds no information.
        root: folder for what torchvision fetches, where it looks first; ~ is your home.
        timeout: seconds that one answer of the network may take.

    Raises:
        ValueError: an unknown name or size.
        RuntimeError: the dataset is neither under root nor to be had, or a file there is broken;
            the text names the way out.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    if size not in (None, 8, 28):
        raise ValueError(f"size must be 8 or 28 (or None for the dataset's own), got {size!r}")
    if name == "digits":
        pictures, y = _digits()
    else:
        pictures, y = _torchvision(name, expanded(root), timeout)
    side = size or DATASETS[name]
    if pictures.shape[1:] != (side, side):
        pictures = F.interpolate(
            pictures[:, None], size=(side, side), mode="bilinear", antialias=True
        )[:, 0]
    return Images(pictures.flatten(1), y, torch.arange(len(y)))


def expanded(path: str | Path) -> Path:
    """The path with ~ and ~name as that home. Raises ValueError for a home that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} names an unknown home: write the folder out") from error


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Each pixel counts the black points of a 4x4 block of the scan: 0 to 16.
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)


def _torchvision(name: str, root: Path, timeout: float) -> tuple[Tensor, Tensor]:
    """(n, 28, 28) in [0, 1] and (n,), from the files under root, which are fetched if need be."""
    instead = 'use load_images("digits"), which needs no network'
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError(
            f"{name} is read by torchvision, which does not import ({error}): "
            f"pip install torchvision, or {instead}"
        ) from error
    dataset = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    raw = root / dataset.__name__ / "raw"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # a network that swallows packets would wait for ever
    try:
        parts = [dataset(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        if broken := _broken_files(raw):  # a login page in place of the file, or half of it
            raise RuntimeError(
                f"{', '.join(broken)} in {raw.resolve()} cannot be read as {name}: "
                f"delete the file so that it is fetched again, or {instead}"
            ) from error
        if not isinstance(error, RuntimeError | OSError | EOFError):
            raise
        raise RuntimeError(
            f"{name} is not under {root.resolve()} and could not be fetched ({error}): "
            f"{instead}, or put the files of {name} into {raw}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    for part in parts:
        if len(part.data) != len(part.targets) or part.data.shape[1:] != (28, 28):
            raise RuntimeError(
                f"the images and labels in {raw.resolve()} do not fit together: "
                f"{tuple(part.data.shape)} and {tuple(part.targets.shape)}; delete the folder so "
                f"that {name} is fetched again, or {instead}"
            )
    return torch.cat([part.data for part in parts]) / 255, torch.cat([p.targets for p in parts])


def _broken_files(raw: Path) -> list[str]:
    """Files that are not whole IDX files: 0, 0, type 8 (bytes), dimensions, their sizes, bytes."""
    broken = []
    for path in sorted(raw.glob("*-ubyte")):
        content = path.read_bytes()
        dimensions = 3 if "images" in path.name else 1
        head = 4 + 4 * dimensions
        sizes = struct.unpack(f">{dimensions}I", content[4:head].ljust(head - 4, b"\0"))
        right = bytes([0, 0, 8, dimensions])
        if content[:4] != right or len(content) != head + math.prod(sizes):
            broken.append(path.name)
    return broken


def split(images: Images, sizes: Mapping[str, int], seed: int) -> dict[str, Images]:
    """Disjoint random parts of the given sizes; another seed draws all of them anew.

    Raises:
        ValueError: a size below 1, or more images asked for than there are.
    """
    if bad := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"each part needs at least 1 image, got {bad}")
    if sum(sizes.values()) > len(images):
        raise ValueError(
            f"{dict(sizes)} asks for {sum(sizes.values())} images, there are {len(images)}: "
            "make a part smaller"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    ends = accumulate(sizes.values())
    return {
        name: images[order[end - size : end]]
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


def _permute(pictures: Tensor) -> Tensor:
    """The pixels in another order, the same for every image of that size."""
    flat = pictures.flatten(1)
    order = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
    return flat[:, order.to(flat.device)].view_as(pictures)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "half turn": lambda pictures: pictures.rot90(2, (1, 2)),
    "quarter turn": lambda pictures: pictures.rot90(1, (1, 2)),
    "permute": _permute,
    "invert": lambda pictures: 1 - pictures,
}
"""New tasks from old images, (n, side, side) -> (n, side, side). Each can be undone, so nothing
that tells the classes apart is lost; the classes stay what they are."""


def shift(images: Images, name: str) -> Images:
    """The same images and classes, seen in another way: see SHIFTS.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SHIFTS:
        raise ValueError(f"name must be one of {', '.join(SHIFTS)}, got {name!r}")
    return Images(SHIFTS[name](images.pictures).flatten(1), images.y, images.index)


# ---- Text ----

TEXTS = ("documentation", "source")
"""Python's documentation topics and a part of its standard library (texts/README.md)."""
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The 96 characters of the texts: line feed and printable ASCII. A token is a place in it."""


def load_text(name: str) -> Tensor:
    """A text that travels with the package, as tokens: (n,), int64.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TEXTS:
        raise ValueError(f"name must be one of {', '.join(TEXTS)}, got {name!r}")
    path = Path(__file__).with_name("texts") / f"{name}.txt.xz"
    return encode(lzma.decompress(path.read_bytes()).decode("ascii"))


def encode(text: str) -> Tensor:
    """Characters to tokens, (n,), int64. Raises ValueError for a character that is not ASCII."""
    places = {character: place for place, character in enumerate(CHARACTERS)}
    if unknown := sorted(set(text) - set(places)):
        raise ValueError(f"no token for {unknown[0]!r}: printable ASCII and line feeds alone")
    return torch.tensor([places[character] for character in text])


def decode(tokens: Tensor) -> str:
    """Tokens, (n,), to characters."""
    return "".join(CHARACTERS[token] for token in tokens.tolist())


def split_text(tokens: Tensor, held_out: float = 0.1, blocks: int = 20) -> tuple[Tensor, Tensor]:
    """(train, held out): the last part of each of some blocks, so that both meet every topic."""
    parts = [
        (block[: (cut := round(len(block) * (1 - held_out)))], block[cut:])
        for block in tokens.chunk(blocks)
    ]
    train, held = zip(*parts, strict=True)
    return torch.cat(train), torch.cat(held)


def random_windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) windows that start at random places, drawn on the CPU."""
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)]
