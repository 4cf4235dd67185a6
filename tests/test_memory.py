"""Predicted bytes against what a real model, optimizer or published layout holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora import adapt, count_parameters
from minidora.memory import (
    LLAMAS,
    LiveBytes,
    TrainingMemory,
    activation_bytes,
    adapter_parameters,
    gb,
    gib,
    llama,
    make_optimizer,
    measure_memory,
    quantized_bytes,
    step_history,
    train_and_measure,
    training_memory,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's Table 8


class Small(nn.Module):
    """Every kind that matters: an embedding, biases, a norm, a buffer, an output tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.up = nn.Linear(24, 70)
        self.norm = nn.BatchNorm1d(70)  # two float32 buffers and an int64 scalar
        self.down = nn.Linear(70, 24, bias=False)
        self.lm_head = nn.Linear(24, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.lm_head(x + self.down(self.norm(self.up(x)).relu()))


def small(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Small().to(dtype)
    if kind == "mixed":
        model.embed.requires_grad_(False)
        model.up.bias.requires_grad_(False)
    elif kind in ("lora", "dora"):
        adapt(model, kind, rank=3, alpha=5.0)
    return model


def optimizer_of(name: str, model: nn.Module, implementation: str) -> torch.optim.Optimizer:
    flags = {
        "single": {"foreach": False, "fused": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }[implementation]
    if name in ("adam", "adamw"):
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
            model.parameters(), lr=1e-3, **flags
        )
    momentum = 0.9 if name == "sgd-momentum" else 0.0
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum, **flags)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> TrainingMemory:
    """What is measured in the last of some real training steps."""
    tokens = torch.arange(40) % 50
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).float(), (tokens + 1) % 50).backward()
        measured = measure_memory(model, optimizer)
    return measured


# ---- to the byte, on real optimizers ----


@pytest.mark.parametrize("kind", ["full", "mixed", "lora", "dora"])
@pytest.mark.parametrize("implementation", ["single", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "sgd-momentum"])
def test_prediction_is_what_a_real_training_holds(optimizer, implementation, kind):
    model = small(kind)
    predicted = training_memory(model, optimizer, implementation=implementation)
    assert train(model, optimizer_of(optimizer, model, implementation), 3) == predicted
    # independently of measure_memory: bytes through nbytes alone
    assert predicted.weights == sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    assert predicted.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("implementation", ["single", "foreach", "fused"])
@pytest.mark.parametrize("kind", ["full", "dora"])  # dora: float32 adapters over a bf16 base
def test_half_precision_and_mixed_dtypes(kind, implementation):
    model = small(kind, torch.bfloat16)
    if kind == "dora":
        model.embed.requires_grad_(True)  # so that the optimizer has two dtypes to group
    predicted = training_memory(model, "adamw", implementation=implementation)
    measured = train(model, optimizer_of("adamw", model, implementation), 2)
    assert measured == predicted
    assert len({p.dtype for p in model.parameters() if p.requires_grad}) == 1 + (kind == "dora")


def test_first_step_peaks_as_later_ones_do():
    model = small("full")
    first = train(model, optimizer_of("adam", model, "single"), 1)
    assert first == training_memory(model, "adam", implementation="single")


def test_meta_device_predicts_what_the_cpu_holds():
    with torch.device("meta"):
        meta = small("dora")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert training_memory(meta, "adam") == training_memory(small("dora"), "adam")


def test_adams_steady_state_by_hand():
    model = nn.Linear(5, 3)  # 15 + 3 numbers in two tensors
    memory = training_memory(model, "adam", implementation="foreach")
    assert memory == TrainingMemory(18 * 4, 18 * 4, 2 * 18 * 4 + 2 * 4, 18 * 4)
    assert (memory.total, memory.peak) == (296, 368)
    single = training_memory(model, "adam", implementation="single")
    assert single.step_temporaries == 4 * max(2 * 15, 15 + 2 * 3)
    assert training_memory(model, "adam", implementation="fused").peak == memory.total


class MasterAdamW:
    """Mixed-precision AdamW as ZeRO describes it: float32 masters, gradients cast to float32."""

    def __init__(self, model: nn.Module, **flags: bool) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.params]
        self.inner = torch.optim.AdamW(self.masters, lr=1e-3, **flags)

    def step(self) -> None:
        for p, master in zip(self.params, self.masters, strict=True):
            master.grad = p.grad.float()
        self.inner.step()
        with torch.no_grad():
            for p, master in zip(self.params, self.masters, strict=True):
                p.copy_(master)
        self.inner.zero_grad()


@pytest.mark.parametrize(
    ("implementation", "flags"),
    [("single", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})],
)
def test_master_weights_against_a_real_master_optimizer(implementation, flags):
    model = small("full", torch.bfloat16)
    optimizer = MasterAdamW(model, **flags)
    tokens = torch.arange(40) % 50
    F.cross_entropy(model(tokens).float(), tokens).backward()
    optimizer.step()
    with LiveBytes() as watch:
        optimizer.step()
    predicted = training_memory(model, implementation=implementation, master_weights=True)
    assert watch.peak == predicted.step_temporaries
    state = [t for s in optimizer.inner.state.values() for t in s.values()]
    assert predicted.optimizer_state == sum(t.nbytes for t in [*optimizer.masters, *state])


def test_master_weights_are_16_bytes_a_parameter_and_none_over_float32():
    n, steps = 4096 * 11008, 4
    linear = nn.Linear(4096, 11008, bias=False, device="meta", dtype=torch.bfloat16)
    assert training_memory(linear, master_weights=True).total == 16 * n + steps
    linear = linear.float()
    assert training_memory(linear, master_weights=True) == training_memory(linear)


# ---- published layouts ----


def test_8bit_adam_holds_what_bitsandbytes_stores():
    # bitsandbytes 0.50.2, AdamW8bit, one step on a CPU: a (100, 100) and a (50,) parameter hold
    # 2 x 10000 uint8, 2 x 40 float32 absmax, two shared tables of 256 float32; 2 x 50 float32.
    model = nn.ParameterList([torch.zeros(100, 100), torch.zeros(50)])
    expected = 2 * 10000 + 2 * 40 * 4 + 2 * 256 * 4 + 2 * 50 * 4
    predicted = training_memory(model, "adamw8bit")
    assert (predicted.optimizer_state, predicted.step_temporaries) == (expected, 0)


def test_8bit_adam_switches_at_4096_numbers():
    def state(n: int) -> int:
        return training_memory(nn.ParameterList([torch.zeros(n)]), "adamw8bit").optimizer_state

    assert state(4095) == 8 * 4095
    assert state(4096) == 2 * 4096 + 2 * 16 * 4 + 2048
    assert state(4097) == 2 * 4097 + 2 * 17 * 4 + 2048


@pytest.mark.parametrize(
    ("layout", "shape", "stored"),
    [
        # storages of bitsandbytes 0.50.2: int8_vectorwise_quant and quantize_4bit(blocksize=64)
        ("int8", (300, 200), 60000 + 300 * 4),
        ("nf4", (300, 200), 30000 + 3752 + 64),
        ("nf4-double", (300, 200), 30000 + 938 + 4 * 4 + 4 + 64 + 1024),
        ("nf4", (3, 3), 5 + 4 + 64),
    ],
)
def test_quantized_bytes_are_those_of_bitsandbytes(layout, shape, stored):
    assert quantized_bytes(*shape, layout) == stored


def test_qloras_bits_a_parameter():
    bits = {kind: 8 * quantized_bytes(4096, 4096, kind) / 4096**2 for kind in ("nf4", "nf4-double")}
    assert bits["nf4"] - 4 == pytest.approx(0.5, abs=1e-3)  # QLoRA sec. 3, Double Quantization
    assert bits["nf4-double"] - 4 == pytest.approx(0.127, abs=1e-3)


def test_int8_by_hand_is_what_its_tensors_hold():
    weight = torch.randn(30, 20)
    scale = weight.abs().amax(dim=1) / 127
    stored = [(weight / scale[:, None]).round().to(torch.int8), scale]
    assert quantized_bytes(30, 20, "int8") == sum(t.untyped_storage().nbytes() for t in stored)


def test_quantize_touches_frozen_linear_weights_alone():
    model = small("dora")
    model.lm_head = nn.Linear(24, 50, bias=False).requires_grad_(False)  # untied: still not taken
    plain = training_memory(model)
    quantized = training_memory(model, quantize="nf4")
    taken = [(70, 24), (24, 70)]
    saved = sum(4 * a * b - quantized_bytes(a, b, "nf4") for a, b in taken)
    assert plain.weights - quantized.weights == saved
    assert quantized.gradients == plain.gradients
    model.get_submodule("up").base.weight.requires_grad_(True)
    one = training_memory(model, quantize="nf4").weights
    assert plain.weights - one == 4 * 70 * 24 - quantized_bytes(24, 70, "nf4")


def test_a_shared_frozen_weight_is_quantized_once():
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second).requires_grad_(False)
    assert training_memory(model, quantize="int8").weights == quantized_bytes(64, 64, "int8")


# ---- architectures and adapters ----


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("LLaMA-7B", 6_738_415_616),
        ("LLaMA2-7B", 6_738_415_616),
        ("LLaMA-13B", 13_015_864_320),
        ("LLaMA3-8B", 8_030_261_248),
        ("LLaMA2-70B", 68_976_648_192),
        ("LLaMA3-70B", 70_553_706_496),
    ],
)
def test_exact_parameters(name, parameters):
    model = llama(name)
    assert count_parameters(model).total == parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert training_memory(model, "sgd").weights == 2 * parameters


def test_exact_bytes_of_llama_7b_under_adam():
    memory = training_memory(llama("LLaMA-7B", torch.float32), "adam")
    assert memory == TrainingMemory(26_953_662_464, 26_953_662_464, 53_907_326_092, 26_953_662_464)
    assert round(gb(memory.total), 1) == 107.8
    assert round(gib(memory.total), 1) == 100.4
    assert round(gb(memory.weights + memory.optimizer_state), 1) == 80.9


@pytest.mark.parametrize("name", ["LLaMA-7B", "LLaMA3-8B"])
def test_names_and_shapes_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    size = LLAMAS[name]
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 128,
        num_key_value_heads=size.key_value // 128,
        vocab_size=size.vocabulary,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    shapes = {n: p.shape for n, p in theirs.named_parameters()}
    assert {n: p.shape for n, p in llama(name).named_parameters()} == shapes


@pytest.mark.parametrize(
    ("name", "rank", "method", "trained", "percent", "paper"),
    [
        ("LLaMA-7B", 32, "lora", 56_098_816, 0.8256, 0.83),
        ("LLaMA-7B", 32, "dora", 56_975_360, 0.8384, 0.84),
        ("LLaMA-7B", 16, "dora", 28_925_952, 0.4274, 0.43),
        ("LLaMA-13B", 32, "lora", 87_818_240, 0.6702, 0.67),
        ("LLaMA-13B", 32, "dora", 89_190_400, 0.6806, 0.68),
        ("LLaMA-13B", 16, "dora", 45_281_280, 0.3467, 0.35),
        ("LLaMA2-7B", 32, "dora", 56_975_360, 0.8384, 0.84),
        ("LLaMA3-8B", 32, "lora", 56_623_104, 0.7002, 0.70),
        ("LLaMA3-8B", 32, "dora", 57_409_536, 0.7098, 0.71),
        ("LLaMA3-8B", 16, "dora", 29_097_984, 0.3610, 0.36),  # the paper prints 0.35
    ],
)
def test_table_1_of_the_paper(name, rank, method, trained, percent, paper):
    model = llama(name)
    layers = [m for n, m in model.named_modules() if n.endswith(tuple(TARGETS))]
    assert adapter_parameters(layers, rank, method) == trained
    count = count_parameters(adapt(model, method, rank=rank, target_modules=TARGETS))
    assert count.trainable == trained
    assert count.percent == pytest.approx(percent, abs=5e-5)
    assert round(count.percent, 2) == paper


def test_adapters_over_a_frozen_base_cost_16_bytes_a_trained_number():
    model = adapt(llama("LLaMA-7B"), "dora", rank=32, target_modules=TARGETS)
    memory = training_memory(model, "adamw", implementation="fused")
    tensors = 32 * 5 * 3  # lora_A, lora_B, magnitude: each with a step counter of 4 bytes
    assert memory.total == 2 * 6_738_415_616 + 16 * 56_975_360 + 4 * tensors


# ---- activations ----


@pytest.mark.parametrize("batch", [1, 7])
def test_activations_of_an_mlp_by_hand(batch):
    model = nn.Sequential(
        nn.Linear(11, 20), nn.ReLU(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    x, y = torch.randn(batch, 11), torch.zeros(batch, dtype=torch.int64)
    counted = activation_bytes(model, lambda: F.cross_entropy(model(x), y))
    # each linear layer keeps its input (which is also the ReLU's output, once), the loss keeps the
    # log-probabilities, the targets, and nll_loss its total weight, a float32 scalar
    assert counted == 4 * batch * (11 + 20 + 6) + 4 * batch * 3 + 8 * batch + 4


def test_frozen_layers_keep_no_input_and_parameters_never_count():
    model = nn.Sequential(nn.Linear(11, 20), nn.Linear(20, 6)).requires_grad_(False)
    x = torch.randn(5, 11, requires_grad=True)
    assert activation_bytes(model, lambda: model(x).sum()) == 0
    model[1].weight.requires_grad_(True)
    assert activation_bytes(model, lambda: model(x).sum()) == 4 * 5 * 20


def test_live_bytes_follow_what_is_made_and_freed():
    existing = torch.ones(1000)
    with LiveBytes() as watch:
        a = existing + 1  # 4000
        b = a.view(10, 100)  # the same storage
        existing.add_(1)  # in place: nothing
        c = b * 2  # 8000
        del c
        d = existing[:10].clone()  # 40
        del a, b
    assert (watch.peak, watch.now) == (8000, 40)
    assert watch.history == [4000, 4000, 4000, 8000, 4000, 4040]  # slicing, too, is an operation
    assert d.numel() == 10


# ---- what lesson 1 trains ----


def classifier(method: str = "full") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return model if method == "full" else adapt(model, method, rank=4, alpha=8.0)


@pytest.mark.parametrize("implementation", ["single", "foreach", "fused"])
@pytest.mark.parametrize("method", ["full", "dora"])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "sgd-momentum"])
def test_lesson_1s_training_holds_what_was_predicted(name, method, implementation):
    model, x, y = classifier(method), torch.randn(300, 64), torch.arange(300) % 10
    predicted = training_memory(model, name, implementation=implementation)
    optimizer = make_optimizer(name, model, implementation)
    start = [p.detach().clone() for p in model.parameters()]
    assert train_and_measure(model, optimizer, x, y, steps=3) == predicted
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True)]
    assert moved == [p.requires_grad for p in model.parameters()]
    assert {type(optimizer).__name__.lower()} == {name.removesuffix("-momentum")}
    if name.startswith("adam"):
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_step_history_peaks_where_the_prediction_does():
    x, y = torch.randn(300, 64), torch.arange(300) % 10
    for way in ("single", "foreach", "fused"):
        model = classifier()
        history = step_history(model, make_optimizer("adam", model, way), x, y)
        predicted = training_memory(model, "adam", implementation=way).step_temporaries
        assert max(history, default=0) == predicted
        assert history == [] or history[-1] == 0


def test_a_table_of_the_parts_adds_up():
    rows = TrainingMemory(2 * 10**9, 10**9, 2**30, 5).table().splitlines()
    assert rows[0] == "weights            2,000,000,000 bytes =    2.0 GB =    1.9 GiB"
    assert rows[2] == "optimizer state    1,073,741,824 bytes =    1.1 GB =    1.0 GiB"
    assert rows[3] == "after a step       4,073,741,824 bytes =    4.1 GB =    3.8 GiB"


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, .* got 'lion'"),
        ({"implementation": "fast"}, "implementation must be one of single, .* got 'fast'"),
        ({"quantize": "fp4"}, "quantize must be one of int8, nf4, nf4-double, got 'fp4'"),
        ({"quantize": "nf4"}, "no frozen nn.Linear weight: freeze or adapt it first"),
    ],
)
def test_bad_arguments(arguments, message):
    model = nn.Linear(2, 2)
    if arguments.get("quantize") == "fp4":
        model.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        training_memory(model, **arguments)


def test_other_errors():
    with pytest.raises(ValueError, match=r"name must be one of LLaMA-7B, .* got 'LLaMA-65B'"):
        llama("LLaMA-65B")
    with pytest.raises(ValueError, match="method must be one of lora, dora, got 'vera'"):
        adapter_parameters([nn.Linear(2, 2)], 1, "vera")
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        measure_memory(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="name must be one of adam, .*got 'adamw8bit'"):
        make_optimizer("adamw8bit", model)
    with pytest.raises(ValueError, match="implementation must be one of single, .*got 'fast'"):
        make_optimizer("adam", model, "fast")
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        make_optimizer("adam", model.requires_grad_(False))


def test_units():
    assert (gb(3_000_000_000), gib(3 * 2**30)) == (3.0, 3.0)
    assert gib(24_000_000_000) == pytest.approx(22.35, abs=5e-3)  # a "24 GB" card in GiB
