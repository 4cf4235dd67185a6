"""Checks of exercises/01_adam_memory.ipynb: what training costs in bytes."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Lesson, kind_of
from minidora.checks.expect import (
    expect_number,
    expect_parts,
    random_size,
    require,
)

lesson = Lesson(1, "01_adam_memory", closed=("minidora.memory",))
EXAMPLE = "this is the answer to the example: compute it from the arguments"


def expect_words(
    got: Any, want: list[str], known: Iterable[tuple[list[str], str]] = (), name: str = ""
) -> None:
    """Refuse unless got is this list of words, in this order."""
    name = f"{name}: " if name else ""
    require(got is not None, f"{name}got None: end with `return ...` (print gives nothing back)")
    require(isinstance(got, list | tuple), f"{name}expected a list of names, got {kind_of(got)}")
    if list(got) == want:
        return
    for value, message in known:
        require(list(got) != value, name + message)
    expected, found = (", ".join(map(str, words)) or "nothing" for words in (want, got))
    require(False, f"{name}expected {expected}; got {found}")


# ---- Exercises ----


@lesson.exercise(
    "1.1",
    title="Four numbers for each parameter",
    difficulty="easy",
    minutes=5,
    teaches="what Adam keeps beside the weights, and that gradients are as large as they are",
    hint="Which tensors of the parameters' shape exist right after optimizer.step()?",
)
def adam_bytes(answer: Answer) -> None:
    copies = {"weights": 1, "gradients": 1, "moments": 2}
    example = 7_000_000_000

    def check(parameters: int) -> None:
        parts = expect_parts(answer(parameters), tuple(copies))
        one, two = 4 * parameters, 8 * parameters
        moved = parts in ((one, two, one), (two, one, one))
        require(not moved, "in another order: return weights, gradients, moments")
        for (name, count), part in zip(copies.items(), parts, strict=True):
            right = 4 * count * parameters
            known = [
                (0, "none, but there is one number for each parameter"),
                (count * parameters, "this counts numbers: a float32 takes 4 bytes"),
                (32 * count * parameters, "these are bits: a float32 takes 4 bytes"),
                (right / 2, "2 bytes a number: that is half precision, a float32 takes 4"),
                (right / 1e9, "this is in GB: return bytes"),
                (right / 2**30, "this is in GiB: return bytes"),
            ]
            if name == "moments":
                known = [
                    (4 * parameters, "one number a parameter: Adam keeps two, m and v"),
                    (12 * parameters, "three numbers a parameter: the weights are not Adam's"),
                    (0, "none, but Adam keeps m and v"),
                    (8 * parameters + 4, "a step counter is there too, but is left out here"),
                    *known,
                ]
            if parameters != example:
                known.insert(0, (4 * count * example, EXAMPLE))
            expect_number(part, right, known, name)

    answer.case("7 billion parameters")
    check(example)
    answer.case("other sizes")
    check(1)
    check(random_size(10**6, 10**9))


Shapes = list[tuple[int, int]]


def _adapter_tensors(shapes: Shapes, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """lora_A and lora_B of every layer, and its magnitude: shapes without data, to be counted."""
    with torch.device("meta"):
        factors = [torch.empty(rank, in_) for _, in_ in shapes]
        factors += [torch.empty(out, rank) for out, _ in shapes]
        return factors, [torch.empty(out) for out, _ in shapes]


def _count(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _paper_targets(hidden: int, key_value: int, inner: int, blocks: int) -> Shapes:
    """q, k, v, up, down of every block: what the DoRA paper adapts (Table 8)."""
    block = [
        (hidden, hidden),
        (key_value, hidden),
        (key_value, hidden),
        (inner, hidden),
        (hidden, inner),
    ]
    return block * blocks


@lesson.exercise(
    "1.2",
    title="Count the adapters",
    difficulty="easy",
    minutes=10,
    teaches="how many numbers LoRA and DoRA train, and which axis the magnitude belongs to",
    hint="A is (rank, in), B is (out, rank), and DoRA has one magnitude for each what?",
)
def adapter_parameters(answer: Answer) -> None:
    def check(shapes: Shapes, rank: int, lora: int = 0, dora: int = 0) -> None:
        factors, magnitudes = _adapter_tensors(shapes, rank)
        lora = lora or _count(factors)
        dora = dora or lora + _count(magnitudes)
        outs, ins = (sum(shape[axis] for shape in shapes) for axis in (0, 1))
        got = expect_parts(answer(shapes, rank), ("lora", "dora"))
        numbers = [part for part in got if not isinstance(part, Tensor)]
        require(numbers != [dora, lora], "the other way round: return lora, dora")
        known = [
            (20, EXAMPLE),
            (outs + ins, "the rank is missing: A is (rank, in), B is (out, rank)"),
            (rank * sum(out * in_ for out, in_ in shapes), "in * out: A and B are side by side"),
            (2 * rank * ins, "2 * rank * in: right for square layers only"),
            (2 * rank * outs, "2 * rank * out: right for square layers only"),
            (rank * ins, "only A is counted"),
            (rank * outs, "only B is counted"),
            (rank * sum(shapes[0]), "only the first layer is counted"),
            (rank * sum(shapes[-1]), "only the last layer is counted"),
            (rank * sum(map(sum, set(shapes))), "two layers of one shape are two layers"),
            (4 * lora, "these are bytes: count numbers"),
            (outs * ins, "these are the layers themselves"),
        ]
        expect_number(got[0], lora, known if shapes != EXAMPLE_SHAPES else known[1:], "lora")
        known = [
            (lora + ins, "one magnitude per input: DoRA keeps one per output"),
            (lora + outs + ins, "magnitudes on both sides: DoRA keeps one per output"),
            (lora + rank * outs, "the magnitudes are counted rank times: there is one per output"),
            (outs, "only the magnitudes: DoRA trains A and B too"),
            (lora + shapes[-1][0], "only the last layer's magnitudes are counted"),
            (lora + shapes[0][0], "only the first layer's magnitudes are counted"),
            (lora + len(shapes), "one magnitude a layer: DoRA keeps one per output"),
            (lora + sum(out * in_ for out, in_ in shapes), "the frozen weights are not trained"),
            (lora, "the magnitudes are missing: one per output"),
        ]
        expect_number(got[1], dora, known, "dora")

    answer.case("by hand")
    check(EXAMPLE_SHAPES, 2)
    answer.case("two layers")
    check([(70, 24), (30, 90)], 3)
    # The counts behind the percentages 0.83 / 0.84 and 0.70 / 0.71 of the paper's Table 1.
    answer.case("LLaMA-7B")
    check(_paper_targets(4096, 4096, 11008, 32), 32, 56_098_816, 56_975_360)
    answer.case("LLaMA3-8B")
    check(_paper_targets(4096, 1024, 14336, 32), 32, 56_623_104, 57_409_536)
    answer.case("random layers")
    check([(random_size(8, 99), random_size(8, 99)) for _ in range(3)], random_size(4, 8))


EXAMPLE_SHAPES = [(4, 6)]


def _held(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages, as they lie in memory."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _counted(model: nn.Module) -> tuple[int, int, int]:
    """What a real step of Adam leaves behind: weights, gradients, optimizer state, in bytes."""
    model = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    state: list[Tensor] = []
    if trained:
        optimizer = torch.optim.Adam(trained)
        optimizer.step()
        state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    gradients = [p.grad for p in trained if p.grad is not None]
    return _held([*model.parameters(), *model.buffers()]), _held(gradients), _held(state)


def _mixed_model() -> nn.Module:
    """Half precision and float32, frozen and trained, a tied weight, buffers saved and not."""
    model = nn.Module()
    model.embed = nn.Embedding(9, 6, dtype=torch.bfloat16)
    model.norm = nn.BatchNorm1d(6)  # two float32 buffers and a counter of 8 bytes
    model.register_buffer("angles", torch.ones(5), persistent=False)  # not in the state_dict
    model.up = nn.Linear(6, 4, dtype=torch.bfloat16)
    model.lora_A = nn.Parameter(torch.randn(2, 6))
    model.lora_B = nn.Parameter(torch.zeros(4, 2))
    model.head = nn.Linear(6, 9, dtype=torch.bfloat16)
    model.head.weight = model.embed.weight
    model.embed.requires_grad_(False)
    model.up.weight.requires_grad_(False)
    return model


@lesson.exercise(
    "1.3",
    title="Gradients only of what is trained",
    difficulty="medium",
    minutes=15,
    teaches="to predict what a real training holds, to the byte",
    hint="Which parameters does a backward pass fill, and how many bytes has one of their numbers?",
    seconds=30.0,  # whoever measures it imports much of PyTorch in the first step
)
def training_bytes(answer: Answer) -> None:
    names = ("weights", "gradients", "optimizer state")

    def check(model: nn.Module, example: Sequence[int] = (-1, -1, -1)) -> None:
        every = list(model.parameters())
        trained = [p for p in every if p.requires_grad]
        buffers = sum(b.nbytes for b in model.buffers())
        counted, saved = _counted(model), model.state_dict(keep_vars=True).values()
        right = dict(zip(names, counted, strict=True))
        by_module = [p for m in model.modules() for p in m.parameters(recurse=False)]
        twice = sum(p.nbytes for p in by_module)
        twice_trained = sum(p.nbytes for p in by_module if p.requires_grad)
        bytes_all, bytes_trained = (sum(p.nbytes for p in part) for part in (every, trained))
        known: dict[str, list[tuple[float, str]]] = {
            "weights": [
                (bytes_all, "the buffers are missing"),
                (sum(t.nbytes for t in saved), "a tied weight counts once, and every buffer does"),
                (twice + buffers, "a tied weight counts once"),
                (_held(saved), "a buffer that is not saved takes room too: see model.buffers()"),
                (bytes_trained + buffers, "frozen weights take room too"),
                (bytes_trained, "frozen weights and buffers take room too"),
                (
                    sum(t.numel() for t in [*every, *model.buffers()]),
                    "this counts numbers, not bytes",
                ),
                (
                    sum(4 * t.numel() for t in [*every, *model.buffers()]),
                    "4 bytes a number, but not all are float32",
                ),
                (sum(4 * p.numel() for p in every), "4 bytes a number, but not all are float32"),
            ],
            "gradients": [
                (0, "none exist yet, but after a backward pass each trained parameter has one"),
                (bytes_all, "frozen parameters get none"),
                (twice_trained, "a tied weight counts once"),
                (sum(4 * p.numel() for p in trained), "each has the dtype of its parameter"),
                (sum(p.numel() for p in trained), "this counts numbers, not bytes"),
            ],
            "optimizer state": [
                (
                    sum(2 * p.nbytes for p in trained),
                    "the step counters are missing, 4 bytes for each trained tensor",
                ),
                (
                    sum(2 * p.nbytes for p in trained) + 4,
                    "one step counter in all, but each trained tensor has its own",
                ),
                (sum(p.nbytes + 4 for p in trained), "one moment, but Adam keeps two"),
                (bytes_trained, "one moment, but Adam keeps two, and a step counter"),
                (
                    sum(3 * p.nbytes + 4 for p in trained),
                    "three numbers a parameter, but Adam keeps two, m and v",
                ),
                (sum(2 * p.nbytes + 4 for p in every), "frozen parameters have none"),
                (
                    sum(8 * p.numel() + 4 for p in trained),
                    "float32 moments, but they have the dtype of their parameter",
                ),
                (
                    sum(2 * p.nbytes + 4 * p.numel() for p in trained),
                    "a step counter for each number, but there is one for each tensor",
                ),
                (sum(2 * p.nbytes + 8 for p in trained), "the step counter is a float32: 4 bytes"),
            ],
        }
        for part, name, by_heart in zip(
            expect_parts(answer(model), names), names, example, strict=True
        ):
            expect_number(part, right[name], [(by_heart, EXAMPLE), *known[name]], name)

    answer.case("by hand")
    check(nn.Linear(5, 3))
    answer.case("an adapted model")
    check(_mixed_model(), example=(72, 72, 152))
    answer.case("a frozen model")
    check(_mixed_model().requires_grad_(False))
    answer.case("a tied weight that is trained")
    check(_mixed_model().requires_grad_(True))
    answer.case("other sizes")
    check(nn.Linear(random_size(5, 50), random_size(5, 50), dtype=torch.float64))


@lesson.exercise(
    "1.4",
    title="A weight in 4 bits",
    difficulty="medium",
    minutes=10,
    teaches="why 4 bits are 4.5, and where rounding hides",
    hint="How many bytes hold 15 numbers of 4 bits, and how many blocks of 64 do they start?",
)
def four_bit_bytes(answer: Answer) -> None:
    def check(out: int, in_: int, want: int = 0) -> None:
        n = out * in_
        packed, scales = len(range(0, n, 2)), len(range(0, n, 64))
        known = [
            (377, EXAMPLE),
            (packed, "the scales are missing: 4 bytes for each block of 64"),
            (n / 2 + 4 * scales, "half a byte is left over: round up"),
            (n // 2 + 4 * (n // 64), "rounded down: round up, both the bytes and the blocks"),
            (n // 2 + 4 * scales, "an odd number of weights leaves half a byte: round up"),
            (packed + 4 * (n // 64), "the last, shorter block has a scale too: round up"),
            (packed + n / 16, "the last, shorter block has a whole scale: round up"),
            (n * 4.5 / 8, "4.5 bits is a mean: the last byte and block may not be full, round up"),
            (
                math.ceil(n * 4.5 / 8),
                "4.5 bits is a mean: the last byte and block may not be full, round both up",
            ),
            (packed + 4 * (n // 64 + 1), "64 numbers are one block, without an empty one after it"),
            (n // 2 + 1 + 4 * scales, "two numbers are one byte, without an empty one after it"),
            (36 * scales, "the last block may be shorter: it is not filled up to 64 numbers"),
            (out * math.ceil(in_ / 2) + 4 * scales, "a row does not start a new byte"),
            (packed + 4 * scales + 64, "the table of the 16 values is not counted here"),
            (packed + scales, "a scale is a float32: 4 bytes, not 1"),
            (packed + 2 * scales, "a scale is a float32: 4 bytes, not 2"),
            (n + 4 * scales, "one byte a weight: two of 4 bits share a byte"),
            (4 * n + 4 * scales, "4 bytes a weight: it is 4 bits, two share a byte"),
            (8 * (packed + 4 * scales), "these are bits: return bytes"),
            (packed + 4 * out, "one scale a row: it is one for each block of 64"),
            (packed + 4, "one scale in all: it is one for each block of 64"),
            (packed + 4 * out * math.ceil(in_ / 64), "blocks run on from one row into the next"),
            (4 * n, "this is the size in float32"),
            (2 * n, "this is the size in half precision"),
        ]
        expect_number(answer(out, in_), want or packed + 4 * scales, known)

    answer.case("by hand")
    check(5, 133)
    answer.case("blocks of 64")
    check(8, 40)
    answer.case("a shorter block")
    check(9, 30)
    check(10, 7)
    answer.case("LLaMA")
    check(4096, 4096, 9_437_184)  # 4.5 bits a weight: QLoRA, sec. 3, before double quantization
    answer.case("random sizes")
    check(random_size(50, 500), random_size(50, 500))


def _needs(
    parameters: int,
    adapters: int,
    *,
    trained: float = 16,
    full: float = 16,
    full_with_adapters: int = 0,
    frozen: float = 1,
    four_bit: float = 4.5 / 8,
) -> dict[str, float]:
    """Bytes of each way; a keyword makes it what a usual mistake would count."""
    base = {"lora-float32": 4.0, "lora-bfloat16": 2.0, "lora-4bit": four_bit}
    return {"full": full * parameters + full_with_adapters * adapters} | {
        name: frozen * bytes_each * parameters + trained * adapters
        for name, bytes_each in base.items()
    }


def _fitting(
    gpu_gib: float,
    parameters: int,
    adapters: int,
    *,
    gib: float = 2**30,
    fits: Callable[[float, float], bool] = float.__le__,
    **mistake: Any,
) -> list[str]:
    """What fits, or what a usual mistake would find."""
    needs = _needs(parameters, adapters, **mistake)
    return [name for name, need in needs.items() if fits(float(need), float(gpu_gib * gib))]


# Where two mistakes find the same, the first is named: check() below has a case before it that
# tells the second one apart.
_MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"fits": float.__lt__}, "what needs exactly the memory that is there fits too"),
    ({"full_with_adapters": 16}, "full: there are no adapters when everything is trained"),
    ({"trained": 20}, "what exists only inside step() is not counted here"),
    ({"full": 20}, "what exists only inside step() is not counted here"),
    ({"gib": 1e9}, "a GiB is 2**30 bytes, not 1e9"),
    ({"gib": 2**20}, "a GiB is 2**30 bytes, not 2**20"),
    ({"frozen": 2}, "the frozen base has no gradients: they belong to the adapters"),
    ({"four_bit": 4.5}, "lora-4bit: a weight takes 4.5 bits, not bytes"),
    ({"four_bit": 0.5}, "lora-4bit: with its scales a weight takes 4.5 bits"),
    ({"trained": 12}, "the adapters need 16 bytes a number: 12 leave out one of the four"),
    ({"trained": 8}, "the adapters need 16 bytes a number: Adam's two moments are missing"),
    ({"trained": 4}, "the adapters need 16 bytes a number: gradients and moments are missing"),
    ({"trained": 0}, "the adapters are missing: they need memory too"),
    ({"full": 12}, "full needs 16 bytes a parameter: 12 leave out one of the four"),
    ({"full": 8}, "full needs 16 bytes a parameter: Adam's two moments are missing"),
    ({"full": 4}, "full needs 16 bytes a parameter: gradients and moments are missing"),
]


@lesson.exercise(
    "1.5",
    title="What fits on this card",
    difficulty="medium",
    minutes=10,
    teaches="which ways to train a model a GPU has room for, before anything is rented",
    hint="Which numbers have a gradient and two moments: those of the base, or of the adapters?",
)
def what_fits(answer: Answer) -> None:
    def check(gpu_gib: float, parameters: int, adapters: int) -> None:
        case = (gpu_gib, parameters, adapters)
        known = [(_fitting(*case, **mistake), message) for mistake, message in _MISFITS]
        if gpu_gib == 12:
            known.append((["lora-bfloat16", "lora-4bit"], EXAMPLE))
        expect_words(answer(*case), _fitting(*case), known, f"{gpu_gib:g} GiB")

    answer.case("LLaMA-7B")
    llama = (6_738_415_616, 56_975_360)  # LLaMA-7B, DoRA of rank 32
    # Each card lies between what is needed and what one mistake makes of it.
    for gpu_gib in (24, 12, 30, 27, 26, 25.2, 25.4, 25.6, 25.85, 4.2, 60, 80, 110, 101):
        check(gpu_gib, *llama)
    answer.case("an exact fit")
    check(5, 2**30, 2**26)
    answer.case("to the byte")
    parameters, adapters = 16 * random_size(10**7, 10**8), random_size(10**6, 10**7)
    for name, need in _needs(parameters, adapters).items():
        for spare, place in ((0, "exactly what"), (-1, "one byte less than")):
            case = ((need + spare) / 2**30, parameters, adapters)
            expect_words(answer(*case), _fitting(*case), (), f"{place} {name} needs")
    answer.case("adapters almost as large as the model")  # full needs less than lora-bfloat16
    case = (16, 2**30, 9 * 2**30 // 10)
    every = list(_needs(*case[1:]))
    known = [(every, "one way fits and a later one does not: ask for each by itself")]
    expect_words(answer(*case), _fitting(*case), known, "16 GiB")


@lesson.exercise(
    "1.6",
    title="The largest rank",
    difficulty="hard",
    minutes=15,
    teaches="to turn a memory budget into a hyperparameter",
    hint="Memory grows by the same number of bytes with each rank. What is there at rank 0?",
)
def largest_rank(answer: Answer) -> None:
    def check(gpu_bytes: int, base_bytes: int, shapes: Shapes) -> None:
        smallest = min(map(min, shapes))
        outs, ins = (sum(shape[axis] for shape in shapes) for axis in (0, 1))

        def ranks(each: int = 16, magnitudes: int = outs, base: int = base_bytes) -> float:
            """How many ranks the memory pays for, as a fraction."""
            return (gpu_bytes - base - each * magnitudes) / (each * (outs + ins))

        def mistaken(**mistake: int) -> int:
            return max(0, min(math.floor(ranks(**mistake)), smallest))

        too_high = f"a rank above {smallest}, the smallest side of all layers, adds nothing there"
        beyond = math.floor(ranks())
        sides = [max(map(max, shapes)), max(map(min, shapes)), *map(min, zip(*shapes, strict=True))]
        sides += [min(shapes[0]), min(shapes[-1])]
        free, (out, in_) = gpu_bytes - base_bytes, shapes[0]
        first_layer = max(0, min((free - 16 * out) // (16 * (out + in_)), smallest))
        rank_times = max(0, min(free // (16 * (2 * outs + ins)), smallest))
        known = [
            (ranks(), "a rank is a whole number: round down"),
            (beyond, too_high),
            *[(min(beyond, side), too_high) for side in sides],
            (smallest - 1, f"rank {smallest} itself fits, and is useful still"),
            (math.ceil(ranks()) - 1, f"rank {beyond} fits too, if only just"),
            (first_layer, "only the first layer is counted"),
            (rank_times, "the magnitudes are counted rank times: there is one per output"),
            (mistaken(magnitudes=0), "the magnitudes are missing: this is LoRA's rank"),
            (mistaken(magnitudes=ins), "one magnitude per input: DoRA keeps one per output"),
            (mistaken(magnitudes=outs + ins), "magnitudes on both sides: one per output"),
            (mistaken(each=4), "a trained number takes 16 bytes: gradient and moments too"),
            (mistaken(each=8), "a trained number takes 16 bytes: two moments too"),
            (mistaken(each=12), "a trained number takes 16 bytes: 12 leave out one of the four"),
            (mistaken(base=0), "the base is missing: it takes memory too"),
            (beyond + 1, f"rank {beyond + 1} does not fit any more: round down"),
            (7, EXAMPLE),
        ]
        got = answer(gpu_bytes, base_bytes, shapes)
        negative = isinstance(got, int | float) and got < 0
        require(not negative, "less than rank 1 is no rank: return 0")
        expect_number(got, _largest_that_fits(gpu_bytes, base_bytes, shapes), known)

    # Wide layers tell magnitudes per input apart, tall ones those that are missing; what is left
    # over, in parts of one rank, tells apart how it is rounded.
    wide, tall = [(100, 1000), (60, 500)], [(900, 80), (700, 60)]
    answer.case("by hand")
    check(361_000, 150_000, wide)
    answer.case("wide layers")
    check(*_budget(wide, 20, 0.4), wide)
    answer.case("tall layers")
    check(*_budget(tall, 10, 0.3), tall)
    answer.case("almost one rank more")
    check(*_budget(wide, 9, 0.9), wide)
    answer.case("an exact fit")
    check(*_budget(tall, 4, 0.0), tall)
    answer.case("one byte too few")
    gpu_bytes, base_bytes = _budget(tall, 4, 0.0)
    expect_number(answer(gpu_bytes - 1, base_bytes, tall), 3)
    answer.case("nothing fits")
    check(10**6, 2 * 10**6, wide)
    check(10**6 + 100, 10**6, wide)
    answer.case("more than enough")
    for layers in (wide, tall, wide[::-1], tall[::-1]):
        check(10**9, 10**6, layers)
    answer.case("random layers")
    shapes = [(random_size(200, 300), random_size(200, 300)) for _ in range(3)]
    check(*_budget(shapes, random_size(10, 90), 0.5), shapes)


def _trained_bytes(shapes: Shapes, rank: int) -> int:
    factors, magnitudes = _adapter_tensors(shapes, rank)
    return 16 * _count(factors + magnitudes)


def _largest_that_fits(gpu_bytes: int, base_bytes: int, shapes: Shapes) -> int:
    """By trying one rank after the other."""
    ranks = range(1, min(map(min, shapes)) + 1)
    tried = takewhile(lambda r: base_bytes + _trained_bytes(shapes, r) <= gpu_bytes, ranks)
    return len(list(tried))


def _budget(shapes: Shapes, rank: int, part: float) -> tuple[int, int]:
    """(gpu_bytes, base_bytes): DoRA of this rank fits, and so would a part of the next rank."""
    needed, base = _trained_bytes(shapes, rank), 100_000
    return base + needed + int(part * (_trained_bytes(shapes, rank + 1) - needed)), base
