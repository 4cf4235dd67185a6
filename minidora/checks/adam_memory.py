"""Checks of exercises/01_adam_memory.ipynb: what training costs in bytes."""

import copy
import math
from bisect import bisect_left
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Lesson
from minidora.checks.expect import dice, expect_number, expect_words, random_size, require
from minidora.checks.oracle import BY_HEART, Wrong
from minidora.checks.spec import spec

lesson = Lesson(1, "01_adam_memory", closed=("minidora.memory",))
Shapes = list[tuple[int, int]]
Known = list[tuple[float, str]]


# ---- 1.1: four numbers for each parameter ----


@spec(
    lesson,
    "1.1",
    title="Four numbers for each parameter",
    difficulty="easy",
    minutes=5,
    teaches="what Adam keeps beside the weights, and that gradients are as large as they are",
    hint="Which tensors of the parameters' shape exist right after optimizer.step()?",
    shapes="parameters -> weights, gradients, moments",
    draw={"parameters": lambda: random_size(2, 400)},  # so few that a step counter shows
)
def adam_bytes(parameters: int) -> tuple[int, int, int]:
    float32 = torch.zeros(1, dtype=torch.float32).element_size()
    return float32 * parameters, float32 * parameters, 2 * float32 * parameters


def _wrong_bytes(n: int) -> Wrong:
    yield "this counts numbers: a float32 takes 4 bytes", (n, n, 2 * n)
    yield "2 bytes a number: that is half precision, a float32 takes 4", (2 * n, 2 * n, 4 * n)
    yield "8 bytes a number: that is float64, a float32 takes 4", (8 * n, 8 * n, 16 * n)
    yield "these are bits: a float32 takes 4 bytes", (32 * n, 32 * n, 64 * n)
    yield "this is in GB: return bytes", (4 * n / 1e9, 4 * n / 1e9, 8 * n / 1e9)
    yield "this is in GiB: return bytes", (4 * n / 2**30, 4 * n / 2**30, 8 * n / 2**30)
    yield "in another order: return weights, gradients, moments", (8 * n, 4 * n, 4 * n)
    yield "the moments come last: return weights, gradients, moments", (4 * n, 8 * n, 4 * n)


def _wrong_moments(n: int) -> Wrong:
    yield "one number a parameter: Adam keeps two, m and v", 4 * n
    yield "three numbers a parameter: the weights are not Adam's", 12 * n
    yield "none, but Adam keeps m and v", 0
    yield "a step counter is there too, but is left out here", 8 * n + 4


adam_bytes.example(7_000_000_000, gives=(28_000_000_000, 28_000_000_000, 56_000_000_000))
adam_bytes.example(8_030_261_249, gives=(32_121_044_996, 32_121_044_996, 64_242_089_992),
                   case="an odd number")  # fmt: skip
adam_bytes.example(1, gives=(4, 4, 8), case="one parameter")
adam_bytes.mistakes_of(_wrong_moments, part="moments")
adam_bytes.mistake(
    "none, but there is one number for each parameter", lambda n: 0, part="gradients"
)
adam_bytes.mistakes_of(_wrong_bytes)


# ---- 1.2: adapters ----


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _layers() -> Shapes:
    """One layer, or four, two of them alike."""
    first, twice, last = [(random_size(1, 60), random_size(1, 60)) for _ in range(3)]
    return [first] if random_size(0, 3) == 0 else [first, twice, twice, last]


@spec(
    lesson,
    "1.2",
    title="Count the adapters",
    difficulty="easy",
    minutes=10,
    teaches="how many numbers LoRA and DoRA train, and which axis the magnitude belongs to",
    hint="A is (rank, in), B is (out, rank), and DoRA has one magnitude for each what?",
    shapes="shapes, rank -> lora, dora",
    draw={"shapes": _layers, "rank": lambda: random_size(2, 13)},
)
def adapter_parameters(shapes: Shapes, rank: int) -> tuple[int, int]:
    with torch.device("meta"):  # shapes without data, to be counted
        factors = [torch.empty(rank, in_) for _, in_ in shapes]
        factors += [torch.empty(out, rank) for out, _ in shapes]
        magnitudes = [torch.empty(out) for out, _ in shapes]
    return _numbers(factors), _numbers(factors + magnitudes)


def _wrong_lora(shapes: Shapes, rank: int) -> Wrong:
    outs, ins = (sum(shape[axis] for shape in shapes) for axis in (0, 1))
    yield "the rank is missing: A is (rank, in), B is (out, rank)", outs + ins
    yield "in * out: A and B are side by side", rank * sum(out * in_ for out, in_ in shapes)
    yield "2 * rank * in: right for square layers only", 2 * rank * ins
    yield "2 * rank * out: right for square layers only", 2 * rank * outs
    yield "only A is counted", rank * ins
    yield "only B is counted", rank * outs
    yield "only the first layer is counted", rank * sum(shapes[0])
    yield "only the last layer is counted", rank * sum(shapes[-1])
    yield "two layers of one shape are two layers", rank * sum(map(sum, set(shapes)))
    yield "these are bytes: count numbers", 4 * rank * (outs + ins)
    yield "magnitudes are DoRA's: LoRA trains A and B alone", rank * (outs + ins) + outs
    yield "these are the layers themselves", sum(out * in_ for out, in_ in shapes)
    yield "one layer of all sums together: add up layer by layer", outs * ins
    cut = sum(min(rank, out, in_) * (out + in_) for out, in_ in shapes)
    yield "the rank is cut to a layer's smallest side: A and B have the rank that is asked for", cut


def _wrong_dora(shapes: Shapes, rank: int) -> Wrong:
    outs, ins = (sum(shape[axis] for shape in shapes) for axis in (0, 1))
    lora = rank * (outs + ins)
    yield "one magnitude per input: DoRA keeps one per output", lora + ins
    yield "magnitudes on both sides: DoRA keeps one per output", lora + outs + ins
    yield "the magnitudes are counted rank times: there is one per output", lora + rank * outs
    yield "only the magnitudes: DoRA trains A and B too", outs
    yield "only the last layer's magnitudes are counted", lora + shapes[-1][0]
    yield "only the first layer's magnitudes are counted", lora + shapes[0][0]
    yield "one magnitude a layer: DoRA keeps one per output", lora + len(shapes)
    yield "the frozen weights are not trained", lora + sum(out * in_ for out, in_ in shapes)
    yield "the magnitudes are missing: one per output", lora


def _paper_targets(hidden: int, key_value: int, inner: int, blocks: int) -> Shapes:
    """q, k, v, up, down of every block: what the DoRA paper adapts (Table 8)."""
    narrow = (key_value, hidden)
    return [(hidden, hidden), narrow, narrow, (inner, hidden), (hidden, inner)] * blocks


adapter_parameters.example([(4, 6)], 2, gives=(20, 24))
# The counts behind the percentages 0.83 / 0.84 and 0.70 / 0.71 of the paper's Table 1.
adapter_parameters.example(
    _paper_targets(4096, 4096, 11008, 32), 32, gives=(56_098_816, 56_975_360), case="LLaMA-7B"
)
adapter_parameters.example(
    _paper_targets(4096, 1024, 14336, 32), 32, gives=(56_623_104, 57_409_536), case="LLaMA3-8B"
)
adapter_parameters.example([(1, 1)], 1, gives=(2, 3), case="one neuron")
adapter_parameters.example([(4, 6)], 9, gives=(90, 94), case="a rank above both sides")
adapter_parameters.mistakes_of(_wrong_lora, part="lora")
adapter_parameters.mistakes_of(_wrong_dora, part="dora")
adapter_parameters.mistake(
    "the other way round: return lora, dora", lambda *args: adapter_parameters.oracle(*args)[::-1]
)


# ---- 1.3: what a real step of Adam leaves behind ----


def _held(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages, as they lie in memory."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _mixed_model() -> nn.Module:
    """Three dtypes, frozen and trained, a tied weight (trained or not), buffers saved and not."""
    width, words = random_size(5, 12), random_size(13, 30)
    model = nn.Module()
    with torch.random.fork_rng(devices=[]):
        model.embed = nn.Embedding(words, width, dtype=torch.bfloat16)
        model.norm = nn.BatchNorm1d(width)  # two float32 buffers and a counter of 8 bytes
        model.register_buffer("angles", torch.ones(3), persistent=False)  # not in the state_dict
        model.up = nn.Linear(width, 4, dtype=torch.bfloat16)
        model.down = nn.Linear(4, width, dtype=torch.float64)
        model.lora_A = nn.Parameter(torch.zeros(2, width))
        model.head = nn.Linear(width, words, dtype=torch.bfloat16)
    model.norms = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))  # of equal values
    model.head.weight = model.embed.weight
    model.embed.requires_grad_(random_size(0, 2) == 1)
    model.up.weight.requires_grad_(False)
    model.down.weight.requires_grad_(False)
    return model


@spec(
    lesson,
    "1.3",
    title="Gradients only of what is trained",
    difficulty="medium",
    minutes=15,
    teaches="to predict what a real training holds, to the byte",
    hint="Which parameters does a backward pass fill, and how many bytes has one of their numbers?",
    seconds=30.0,  # whoever measures it imports much of PyTorch in the first step
    shapes="model -> weights, gradients, state",
    draw={"model": _mixed_model},
)
def training_bytes(model: nn.Module) -> tuple[int, int, int]:
    model = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) for p in trained]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    state: list[Tensor] = []
    if trained:
        optimizer = torch.optim.Adam(trained)
        optimizer.step()
        state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    return _held([*model.parameters(), *model.buffers()]), _held(gradients), _held(state)


def _twice(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every module: a tied one stands there twice."""
    return [p for module in model.modules() for p in module.parameters(recurse=False)]


def _wrong_weights(model: nn.Module) -> Wrong:
    every, buffers = list(model.parameters()), list(model.buffers())
    trained = [p for p in every if p.requires_grad]
    saved = model.state_dict(keep_vars=True).values()
    by_value = {(p.dtype, str(p.tolist())): p for p in every}.values()
    yield "the buffers are missing", _bytes(every)
    yield "two parameters of equal values are two", _bytes([*by_value, *buffers])
    yield "a tied weight counts once, and every buffer does", _bytes(saved)
    yield "a tied weight counts once", _bytes([*_twice(model), *buffers])
    yield "a buffer that is not saved takes room too: see model.buffers()", _held(saved)
    yield "frozen weights take room too", _bytes(trained + buffers)
    yield "frozen weights and buffers take room too", _bytes(trained)
    yield "this counts numbers, not bytes", _numbers(every + buffers)
    yield "4 bytes a number, but not all are float32", 4 * _numbers(every + buffers)
    yield "4 bytes a number, and no buffers: count each tensor's nbytes", 4 * _numbers(every)


def _wrong_gradients(model: nn.Module) -> Wrong:
    trained = [p for p in model.parameters() if p.requires_grad]
    yield "none exist yet, but after a backward pass each trained parameter has one", 0
    yield "frozen parameters get none", _bytes(model.parameters())
    yield "a tied weight counts once", _bytes(p for p in _twice(model) if p.requires_grad)
    yield "each has the dtype of its parameter", 4 * _numbers(trained)
    yield "this counts numbers, not bytes", _numbers(trained)


def _wrong_state(model: nn.Module) -> Wrong:
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    twice = [p for p in _twice(model) if p.requires_grad]
    once, steps = _bytes(trained), 4 * len(trained)
    yield "the step counters are missing, 4 bytes for each trained tensor", 2 * once
    yield "one step counter in all, but each trained tensor has its own", 2 * once + 4
    yield "one moment, but Adam keeps two", once + steps
    yield "one moment, but Adam keeps two, and a step counter", once
    yield "three numbers a parameter, but Adam keeps two, m and v", 3 * once + steps
    yield "frozen parameters have none", 2 * _bytes(every) + 4 * len(every)
    yield "a frozen tensor has no step counter", 2 * once + 4 * len(every)
    numbers = 4 * _numbers(trained)
    yield "float32 moments, but they have the dtype of their parameter", 2 * numbers + steps
    yield "a step counter for each number, but there is one for each tensor", 2 * once + numbers
    yield "the step counter is a float32: 4 bytes", 2 * once + 2 * steps
    yield "a tied weight counts once", 2 * _bytes(twice) + 4 * len(twice)


with torch.random.fork_rng(devices=[]):
    training_bytes.example(nn.Linear(5, 3), gives=(72, 72, 152))
    training_bytes.example(
        nn.Linear(5, 3).requires_grad_(False), gives=(72, 0, 0), case="a frozen model"
    )
    training_bytes.example(
        nn.Linear(5, 3, dtype=torch.float64), gives=(144, 144, 296), case="a float64 model"
    )
training_bytes.mistakes_of(_wrong_weights, part="weights")
training_bytes.mistakes_of(_wrong_gradients, part="gradients")
training_bytes.mistakes_of(_wrong_state, part="state")


# ---- 1.4: four bits ----


@spec(
    lesson,
    "1.4",
    title="A weight in 4 bits",
    difficulty="medium",
    minutes=10,
    teaches="why 4 bits are 4.5, and where rounding hides",
    hint="How many bytes hold 15 numbers of 4 bits, and how many blocks of 64 do they start?",
    shapes="out_features, in_features -> bytes",
    # Odd, so that neither the last byte nor the last block is full, and most mistakes differ.
    draw={
        "out_features": lambda: dice.choice((3, 5, 7)),
        "in_features": lambda: dice.choice((77, 89, 95, 97, 133, 137)),
    },
)
def four_bit_bytes(out_features: int, in_features: int) -> int:
    places = range(out_features * in_features)
    return len(places[::2]) + 4 * len(places[::64])


def _wrong_four_bits(out: int, in_: int) -> Wrong:
    n = out * in_
    packed, scales = len(range(0, n, 2)), len(range(0, n, 64))
    right = packed + 4 * scales
    yield "the scales are missing: 4 bytes for each block of 64", packed
    yield "half a byte is left over: round up", n / 2 + 4 * scales
    yield "rounded down: round up, both the bytes and the blocks", n // 2 + 4 * (n // 64)
    yield "an odd number of weights leaves half a byte: round up", n // 2 + 4 * scales
    yield "the last, shorter block has a scale too: round up", packed + 4 * (n // 64)
    yield "the last, shorter block has a whole scale: round up", packed + n / 16
    mean = "4.5 bits is a mean: the last byte and block may not be full"
    yield f"{mean}, so round each of them up", n * 4.5 / 8
    yield f"{mean}, so round up both, and before you add", math.ceil(n * 4.5 / 8)
    yield "the last block may be shorter: it is not filled up to 64 numbers", 36 * scales
    yield "a row does not start a new byte", out * math.ceil(in_ / 2) + 4 * scales
    yield "the table of the 16 values is not counted here", right + 64
    yield "a scale is a float32: 4 bytes, not 1", packed + scales
    yield "a scale is a float32: 4 bytes, not 2", packed + 2 * scales
    yield "one byte a weight: two of 4 bits share a byte", n + 4 * scales
    yield "4 bytes a weight: it is 4 bits, two share a byte", 4 * n + 4 * scales
    yield "these are bits: return bytes", 8 * right
    yield "one scale a row: it is one for each block of 64", packed + 4 * out
    yield "one scale in all: it is one for each block of 64", packed + 4
    yield "blocks run on from one row into the next", packed + 4 * out * math.ceil(in_ / 64)
    yield "this is the size in float32", 4 * n
    yield "this is the size in half precision", 2 * n
    if n % 64 == 0:
        yield "64 numbers are one block, without an empty one after it", right + 4
        yield "two numbers are one byte, without an empty one after it", right + 1


@four_bit_bytes.also
def _random_sizes(answer: Answer) -> None:
    answer.case("random sizes")
    side = random_size(4200, 9000) | 1  # of an odd square a float32 has no half
    for sizes in ((random_size(1, 500), 2 * random_size(1, 250)), (side, side)):
        four_bit_bytes.compare(answer, sizes, named=False)


four_bit_bytes.example(5, 133, gives=377)
four_bit_bytes.example(8, 40, gives=180, case="whole bytes and blocks")
four_bit_bytes.example(10, 7, gives=43, case="a shorter block")
four_bit_bytes.example(1, 1, gives=5, case="one number")
four_bit_bytes.mistakes_of(_wrong_four_bits)


# ---- 1.5: what fits. A mistake is named by the bytes that the answer turns out to count ----

TRAINED = {
    20: "what exists only inside step() is not counted here",
    12: "one of the four is missing",
    8: "Adam's two moments are missing",
    4: "gradients and moments are missing",
}
"""What is wrong with so many bytes for a number that is trained."""

WAYS = {
    "full": (16, 0),
    "lora-float32": (4, 16),
    "lora-bfloat16": (2, 16),
    "lora-4bit": (4.5 / 8, 16),
}
"""Bytes for each parameter of the model, and for each number in the adapters."""


def _needs(parameters: int, adapters: int) -> dict[str, float]:
    return {name: each * parameters + own * adapters for name, (each, own) in WAYS.items()}


@spec(
    lesson,
    "1.5",
    title="What fits on this card",
    difficulty="medium",
    minutes=10,
    teaches="which ways to train a model a GPU has room for, before anything is rented",
    hint="Which numbers have a gradient and two moments: those of the base, or of the adapters?",
    shapes="gpu_gib, parameters, adapters -> names",
    draw={
        "parameters": lambda: 64 * random_size(10**6, 10**8),  # whole blocks, as 1.4 counts them
        "adapters": lambda: random_size(10**6, 10**7),
    },
)
def what_fits(gpu_gib: float, parameters: int, adapters: int) -> list[str]:
    return [name for name, need in _needs(parameters, adapters).items() if need <= gpu_gib * 2**30]


@what_fits.also
def _cards(answer: Answer) -> None:
    def check(gpu_gib: float, parameters: int, adapters: int, name: str = "") -> None:
        want = what_fits.oracle(gpu_gib, parameters, adapters)
        expect_words(answer(gpu_gib, parameters, adapters), want, (), name or f"{gpu_gib} GiB")

    answer.case("LLaMA-7B")  # with DoRA of rank 32
    for gpu_gib in (24, 12, 30, 80, 110):
        check(gpu_gib, 6_738_415_616, 56_975_360)
    answer.case("to the byte")
    sizes = 64 * random_size(10**6, 10**7), random_size(10**6, 10**7)
    for way, need in _needs(*sizes).items():
        check(need / 2**30, *sizes, f"exactly what {way} needs")
        check((need - 1) / 2**30, *sizes, f"one byte less than {way} needs")
    answer.case("adapters almost as large as the model")  # full needs less than lora-bfloat16
    got = answer(16, 2**30, 9 * 2**30 // 10)
    each = "one way fits and a later one does not: ask for each by itself"
    expect_words(got, ["full", "lora-4bit"], [(list(WAYS), each)], "16 GiB")


def _asked(answer: Answer, way: str, adapters: int) -> float:
    """GiB from which on the answer counts this way in, for 2**34 parameters; 2**22 for never."""

    def fits(step: int) -> bool:
        return way in _names(answer, step / 2**10, 2**34, adapters)

    return bisect_left(range(2**32), True, key=fits) / 2**10


def _names(answer: Answer, *args: float) -> list[str]:
    got = answer(*args)
    return [name for name in got if isinstance(name, str)] if isinstance(got, list | tuple) else []


@what_fits.explain
def _name_what_is_counted(answer: Answer) -> None:
    """Refuse by the bytes that the answer counts for a parameter and a number in the adapters."""
    by_heart = [(["lora-bfloat16", "lora-4bit"], BY_HEART)]
    expect_words(answer(2**22, 2**34, 2**30), list(WAYS), by_heart, "four million GiB")
    found = {way: (_asked(answer, way, 0), _asked(answer, way, 2**32)) for way in WAYS}
    counted = {way: (alone / 16, (both - alone) / 4) for way, (alone, both) in found.items()}
    scale = {round(counted[way][0] / WAYS[way][0], 2) for way in WAYS}
    require(scale != {1.07}, "a GiB is 2**30 bytes, not 1e9")
    require(scale != {1024}, "a GiB is 2**30 bytes, not 2**20")
    beside = [abs(own - 16) - each for way, (each, own) in counted.items() if way != "full"]
    on_top = "the base has `parameters` numbers, and the adapters come on top"
    require(max(map(abs, beside)) > 0.01, on_top)
    for way, (each, own) in counted.items():
        of_base, of_adapters = _wrong_counts(way)
        right, right_own = WAYS[way]
        expect_number(own, right_own, of_adapters, f"{way}, bytes a number in the adapters", 0.01)
        expect_number(each, right, of_base, f"{way}, bytes a parameter", 0.01)
    needs = _needs(2**34, 2**32)
    exact = [way in _names(answer, need / 2**30, 2**34, 2**32) for way, need in needs.items()]
    require(any(exact), "what needs exactly the memory that is there fits too")


def _wrong_counts(way: str) -> tuple[Known, Known]:
    """Usual mistakes in the bytes a parameter, and in the bytes a number in the adapters."""
    right = WAYS[way][0]
    trained: Known = [(n, f"{n}, not 16: {message}") for n, message in TRAINED.items()]
    if way == "full":
        return trained, [(16, "there are no adapters when everything is trained")]
    gradients = "the frozen base has no gradients: they belong to the adapters"
    of_base: Known = [(right + extra, gradients) for extra in (right, 2, 4)]
    of_base += [(16, "the frozen base has neither gradients nor moments")]
    of_base += [(0, "the base is missing: it takes room, though it is frozen")]
    own: Known = [(0, "the adapters are missing: they need memory too"), *trained]
    if way == "lora-4bit":
        of_base += [(4.5, "4.5 bits, not bytes"), (0.5, "with its scales a weight takes 4.5 bits")]
    if way != "lora-float32":
        own.insert(0, (4 * right, "the adapters are float32, whatever the base is: 16"))
    return of_base, own


# ---- 1.6: the largest rank, named in the same way ----


def _trained_bytes(shapes: Shapes, rank: int) -> int:
    numbers: int = adapter_parameters.oracle(shapes, rank)[1]
    return 16 * numbers


@spec(
    lesson,
    "1.6",
    title="The largest rank",
    difficulty="hard",
    minutes=15,
    teaches="to turn a memory budget into a hyperparameter",
    hint="Memory grows by the same number of bytes with each rank. What is there at rank 0?",
    shapes="gpu_bytes, base_bytes, shapes -> rank",
    draw={
        "gpu_bytes": lambda: random_size(10**5, 10**6),
        "base_bytes": lambda: random_size(0, 10**5),
        "shapes": lambda: [(random_size(30, 90), random_size(30, 90)) for _ in range(3)],
    },
)
def largest_rank(gpu_bytes: int, base_bytes: int, shapes: Shapes) -> int:
    ranks = range(1, min(map(min, shapes)) + 1)
    return sum(base_bytes + _trained_bytes(shapes, rank) <= gpu_bytes for rank in ranks)


WIDE, TALL = [(100, 1000), (60, 500)], [(900, 80), (700, 60)]


@largest_rank.also
def _budgets(answer: Answer) -> None:
    def check(gpu_bytes: int, base_bytes: int, shapes: Shapes) -> None:
        largest_rank.compare(answer, [gpu_bytes, base_bytes, shapes])

    answer.case("by hand")
    expect_number(answer(361_000, 150_000, WIDE), 7)
    answer.case("LLaMA-7B in bf16")
    targets, base = _paper_targets(4096, 4096, 11008, 32), 13_476_831_232
    needed = base + _trained_bytes(targets, 150)
    expect_number(answer(needed, base, targets), 150)
    expect_number(answer(needed - 1, base, targets), 149)
    small = [(random_size(20, 60), random_size(20, 60))]
    for name, shapes in {"wide layers": WIDE, "tall layers": TALL, "one layer": small}.items():
        answer.case(name)
        base, smallest = random_size(10**5, 10**6), min(map(min, shapes))
        for rank in (1, 2, random_size(3, 19), smallest):
            needed = base + _trained_bytes(shapes, rank)
            check(needed, base, shapes)
            check(needed - 1, base, shapes)
        check(base, base, shapes)
        check(base, 2 * base, shapes)
        check(base + 10**9, base, shapes)
        check(base + 10**9, base, shapes[::-1])


@largest_rank.explain
def _name_what_a_rank_costs(answer: Answer) -> None:
    """Refuse by the bytes that the answer counts for a rank of WIDE, and beside all ranks."""
    base, most = 10**6, 10**7
    outs, ins = (sum(sides) for sides in zip(*WIDE, strict=True))
    both = 16 * (outs + ins)

    def got(gpu_bytes: int, shapes: Shapes = WIDE) -> float:
        rank = answer(gpu_bytes, base, shapes)
        return rank if isinstance(rank, int | float) else 0

    require(not got(0) == got(most) == 7, BY_HEART)
    require(got(0) >= 0, "less than rank 1 is no rank: return 0")
    require(got(0) < 1, "nothing fits into 0 bytes: return 0 there")
    require(got(base + 300_000) % 1 == 0, "a rank is a whole number: round down")
    first = bisect_left(range(most), True, key=lambda size: got(size) >= 1)
    second = bisect_left(range(most), True, key=lambda size: got(size) >= 2)
    require(first > base // 2, "the base is missing: it takes memory too")
    late = first - (base + 16 * outs + both)
    require(late != 1, "what needs exactly the memory that is there fits too")
    require(late not in (1 - both, -both // 2, 1 - both // 2), "part of a rank: round down")
    if second < most:
        each, beside = second - first, 2 * first - second - base
        expect_number(each, both, _wrong_ranks(outs, ins), f"bytes for each rank of {WIDE}")
        expect_number(
            beside, 16 * outs, _wrong_rest(outs, ins), f"bytes beside the ranks of {WIDE}"
        )
    for shapes in (WIDE, TALL, WIDE[::-1], TALL[::-1]):
        top, smallest = got(most, shapes), min(map(min, shapes))
        bound = f"a rank above {smallest}, the smallest side of all layers, adds nothing there"
        require(top <= smallest, bound)
        require(top != smallest - 1, f"rank {smallest} itself fits, and is useful still")


def _wrong_ranks(outs: int, ins: int) -> Known:
    """Usual mistakes in the bytes of a rank of WIDE."""
    known = [(n * (outs + ins), f"{n} a number, not 16: {text}") for n, text in TRAINED.items()]
    return [
        *known,
        (16 * (2 * outs + ins), "the magnitudes are counted rank times: there is one per output"),
        (16 * sum(WIDE[0]), "only the first layer is counted"),
        (16 * sum(WIDE[-1]), "only the last layer is counted"),
        (16 * ins, "B is missing: a rank is a row of A and a column of B"),
        (16 * outs, "A is missing: a rank is a row of A and a column of B"),
    ]


def _wrong_rest(outs: int, ins: int) -> Known:
    """Usual mistakes in the bytes that are there without any rank."""
    return [
        (0, "the magnitudes are missing: this is LoRA's rank"),
        (4 * outs, "the magnitudes are trained too: 16 bytes each"),
        (16 * ins, "one magnitude per input: DoRA keeps one per output"),
        (16 * (outs + ins), "magnitudes on both sides: one per output"),
        (16 * len(WIDE), "one magnitude a layer: DoRA keeps one per output"),
    ]
