"""Adapting whole models: which layers, what is frozen, merging, errors that change nothing."""

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import minidora
from minidora import DoRALinear, LoRALinear, adapt, count_parameters, disable_adapters
from minidora.adapt import adapter_layers
from minidora.targets import select_targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 4)
        self.up_proj = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.q_proj(x) * self.k_proj(x).mean() + self.up_proj(x)[..., :8]


class Model(nn.Module):
    """Two blocks, an embedding and an output head: one of each thing that must be treated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


INNER = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "k_proj", "up_proj")]
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 10]])


def trained(method: str = "dora") -> Model:
    """An adapted model whose adapters are away from their start."""
    model = Model()
    adapt(model, method, rank=2, alpha=3.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.1).add_(0.1 * torch.randn_like(parameter))
    return model


def state(model: nn.Module) -> dict[str, tuple[type, bool, Tensor]]:
    """Everything that an error must leave as it was."""
    types = {name: type(module) for name, module in model.named_modules()}
    return {
        name: (types[name.rpartition(".")[0]], p.requires_grad, p.detach().clone())
        for name, p in model.named_parameters()
    }


def assert_same_state(model: nn.Module, before: dict[str, tuple[type, bool, Tensor]]) -> None:
    after = state(model)
    assert list(after) == list(before)
    for name, (kind, requires_grad, value) in before.items():
        assert after[name][:2] == (kind, requires_grad), name
        torch.testing.assert_close(after[name][2], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("method", "kind"), [("lora", LoRALinear), ("dora", DoRALinear)])
def test_adapts_in_place_equals_the_base_and_trains_adapters_alone(method: str, kind: type) -> None:
    model = Model()
    expected = model(TOKENS)
    assert adapt(model, method, rank=2, alpha=3.0) is model
    torch.testing.assert_close(model(TOKENS), expected)
    adapted = [name for name, m in model.named_modules() if type(m) is kind]
    assert adapted == INNER  # the head is left out
    trainable = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"} | ({"magnitude"} if method == "dora" else set())


def test_a_class_of_adapters_is_a_method() -> None:
    class Negated(LoRALinear):
        def adapted_weight(self) -> Tensor:
            return self.base.weight - self.delta_weight()

        def adapted_forward(self, x: Tensor) -> Tensor:
            return self.apply_weight(x, self.adapted_weight())

    model, pretrained = adapt(Model(), Negated, rank=2, alpha=3.0), Model()
    for name, layer in adapter_layers(model):
        assert type(layer) is Negated
        layer.lora_B.data.normal_()
        plain = pretrained.get_submodule(name)
        plain.weight.data -= 1.5 * layer.lora_B.data @ layer.lora_A.data
    expected = pretrained(TOKENS)
    torch.testing.assert_close(model(TOKENS), expected)
    minidora.merge(model)
    torch.testing.assert_close(model(TOKENS), expected)
    torch.testing.assert_close(minidora.merge_and_unload(model)(TOKENS), expected)


def test_p19_a_step_changes_the_adapters_and_nothing_else() -> None:
    model = Model()
    adapt(model, rank=2, alpha=3.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        model(TOKENS).pow(2).sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


@pytest.mark.parametrize(
    ("target_modules", "exclude_modules", "expected"),
    [
        ("all-linear", (), INNER),
        ("all-linear", ["k_proj"], [n for n in INNER if "k_proj" not in n]),
        (["q_proj"], (), ["layers.0.q_proj", "layers.1.q_proj"]),
        (["layers.1.q_proj", "lm_head"], (), ["layers.1.q_proj", "lm_head"]),
        (r".*\.(q|k)_proj", r"layers\.0\..*", ["layers.1.q_proj", "layers.1.k_proj"]),
        ("all-linear", ["layers.0"], INNER[3:]),
        ("all-linear", r"layers\.0", INNER[3:]),
        ("all-linear", ["0"], INNER[3:]),
        (["q_proj", "k_proj"], ["layers.1", "k_proj"], ["layers.0.q_proj"]),
        (["q_proj"], None, ["layers.0.q_proj", "layers.1.q_proj"]),
        ("lm_head", (), ["lm_head"]),
    ],
)
def test_p28_targets_follow_peft(
    target_modules: str | list[str], exclude_modules: str | list[str], expected: list[str]
) -> None:
    assert select_targets(Model(), target_modules, exclude_modules) == expected


def test_all_linear_asks_the_model_for_its_head() -> None:
    class Wrapped(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[1].up_proj  # type: ignore[no-any-return, union-attr]

    assert select_targets(Wrapped(), "all-linear") == [
        name for name in [*INNER, "lm_head"] if name != "layers.1.up_proj"
    ]


@pytest.mark.parametrize("head", ["lm_head", "head", "fc", "classifier", "score", "out"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.Sequential,
        nn.DataParallel,
        lambda model: nn.ModuleDict({"model": model, "loss": nn.CrossEntropyLoss()}),
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
)
def test_all_linear_leaves_out_a_head_by_name(
    head: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    hidden = "hidden" if head in ("fc", "out") else "fc"  # which is not a head where it comes first
    layers = {hidden: nn.Linear(3, 3), "body": nn.Linear(3, 3), head: nn.Linear(3, 2)}
    names = select_targets(wrap(nn.ModuleDict(layers)), "all-linear")
    expected = [hidden, "body", "out"] if head == "out" else [hidden, "body"]
    assert [name.rpartition(".")[2] for name in names] == expected


def test_all_linear_leaves_out_the_last_layer_of_a_head_that_is_a_container() -> None:
    model = nn.Sequential(OrderedDict(features=nn.Linear(3, 3), classifier=nn.Sequential()))
    model.classifier.extend([nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)])
    assert select_targets(model, "all-linear") == ["features", "classifier.0"]
    assert select_targets(model, "all-linear", ["classifier"]) == ["features"]


def test_all_linear_asks_where_the_head_is_not_clear() -> None:
    layers = {"fc": nn.Linear(3, 3), "out": nn.Linear(3, 2)}
    with pytest.raises(ValueError, match="which layer is the output head\\? fc .* but out comes"):
        select_targets(nn.ModuleDict(layers), "all-linear")
    assert select_targets(nn.ModuleDict(layers), "all-linear", ["out"]) == ["fc"]
    assert select_targets(nn.ModuleDict(layers), "all-linear", ["fc"]) == ["out"]
    assert select_targets(nn.ModuleDict(layers), ".*") == ["fc", "out"]


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model, nn.Sequential, pytest.param(torch.compile, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("LlamaForCausalLM", "lm_head"),
        ("LlamaForSequenceClassification", "score"),
        ("BertForSequenceClassification", "classifier"),
        ("ViTForImageClassification", "classifier"),
        ("RobertaForSequenceClassification", "classifier.out_proj"),
    ],
)
def test_all_linear_leaves_out_the_head_of_a_hugging_face_model(
    kind: str, head: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    import transformers

    config = getattr(transformers, kind).config_class(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=12,
        pad_token_id=0,
        image_size=4,
        patch_size=2,
    )
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [
        name.removeprefix("0.").removeprefix("_orig_mod.")
        for name in select_targets(wrap(model), "all-linear")
    ]
    assert set(linear) - set(names) == {head}


def test_a_shared_layer_is_chosen_whole_or_not_at_all() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared})
    for arguments in (
        {"target_modules": ["a"]},
        {"exclude_modules": ["c"]},
        {"rank_pattern": {"a": 2}},
    ):
        with pytest.raises(
            ValueError, match=r"(a and c|c and a) are one layer under two names: target both"
        ):
            adapt(model, **{"rank": 1, **arguments})  # type: ignore[arg-type]
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(adapt(model, rank=1, target_modules=["a", "c"])["a"], DoRALinear)


def test_what_another_library_adapted_or_synchronizes_is_refused() -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"adapted already \(base_model.*q_proj, 2 layers"):
        adapt(peft.get_peft_model(Model(), config))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.ModuleDict({"inner": nn.parallel.DistributedDataParallel(Model())})
        with pytest.raises(
            ValueError, match="inner is a DistributedDataParallel.* adapt the model"
        ):
            adapt(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_failure_while_layers_are_made_changes_nothing() -> None:
    """A warning that the user made an error, say."""
    model = Model()
    before = state(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="rank 5 is above"):
        warnings.simplefilter("error")
        adapt(model, rank=5)
    assert_same_state(model, before)


def test_modules_to_save_are_trained_whole_and_saved() -> None:
    model, other = Model(), Model()
    for m in (model, other):
        adapt(m, rank=2, alpha=3.0, modules_to_save=["lm_head", "layers.1.norm", "layers.0"])
    assert [name for name, _ in adapter_layers(model)] == INNER[3:]
    plain = {"lm_head.weight", "lm_head.bias", "layers.1.norm.weight", "layers.1.norm.bias"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora" not in n and "magn" not in n} == plain | {
        name for name, _ in Model().named_parameters() if name.startswith("layers.0.")
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapters = minidora.adapter_state_dict(copy.deepcopy(model))
    assert trained <= adapters.keys()
    other.load_state_dict(adapters, strict=False)
    expected = model(TOKENS)
    torch.testing.assert_close(other(TOKENS), expected)
    torch.testing.assert_close(minidora.merge_and_unload(model)(TOKENS), expected)
    assert not any(hasattr(module, "trained_whole") for module in model.modules())
    with pytest.raises(ValueError, match="modules_to_save: 'lmhead' matches no module; nearest"):
        adapt(Model(), modules_to_save=["lmhead"])


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda adapters: {prefix + key: value for key, value in adapters.items()}


SAVED: dict[str, tuple[str, dict[str, object], Callable[..., object], str]] = {
    "module.": ("dora", {}, prefixed("module."), r"module.layers.0.q_proj.lora_A: no adapter has"),
    "PEFT's names": ("dora", {}, prefixed("base_model.model."), "base_model.model.*no adapter"),
    "LoRA": ("lora", {}, lambda a: a, r"layers.0.q_proj: magnitude is missing: .* another method"),
    "alpha": ("dora", {"alpha": 6.0}, lambda a: a, "layers.0.q_proj: .* scaling of 3, here .* 1.5"),
    "rsLoRA": ("dora", {"use_rslora": True}, lambda a: a, "scaling of 2.12132, here it is 1.5"),
    "rank": ("dora", {"rank": 1, "alpha": 1.5}, lambda a: a, r"lora_A is \(1, 8\), here \(2, 8\)"),
    "more layers": (
        "dora",
        {"target_modules": ["lm_head", "q_proj"]},
        lambda a: a,
        "lm_head.lora_A: no adapter has this name",
    ),
    "part": ("dora", {}, lambda a: dict(list(a.items())[1:]), "q_proj: lora_A is missing"),
    "safetensors": (
        "dora",
        {"alpha": 6.0},
        lambda a: load(save(a)),
        "scaling of 3, here it is 1.5",
    ),
}


@pytest.mark.parametrize("what", SAVED)
@pytest.mark.parametrize("place", ["root", "in a wrapper"])
def test_loading_adapters_of_another_kind_is_refused_by_name(what: str, place: str) -> None:
    method, arguments, change, message = SAVED[what]
    model = trained()
    before = state(model)
    other = adapt(Model(), method, **{"rank": 2, "alpha": 3.0, **arguments})  # type: ignore[arg-type]
    adapters = change(minidora.adapter_state_dict(other))
    target: nn.Module = model
    if place == "in a wrapper":
        target = nn.ModuleDict({"first": nn.Linear(2, 2), "inner": model})
        adapters = prefixed("inner.")(adapters)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=f"(?s)nothing was loaded.*{message}"):
        target.load_state_dict(adapters, strict=False)  # type: ignore[arg-type]
    assert_same_state(model, before)


def test_loading_values_of_the_plain_model_or_of_another_is_refused() -> None:
    model = trained()
    before = state(model)
    base = {key: value for key, value in model.state_dict().items() if ".base." in key}
    for values, message in (
        (Model().state_dict(), "layers.0.q_proj: .* weights of the plain layer: load them before"),
        (base, "layers.0.q_proj: a base weight without its magnitude: load it before the adapter"),
        ({"q.w": torch.ones(2)}, "q.w: nothing has this name"),
        (adapt(Model(), rank=2, alpha=6.0).state_dict(), "a scaling of 3, here it is 1.5"),
        (adapt(Model(), "lora", rank=2, alpha=3.0).state_dict(), "magnitude is missing"),
    ):
        with pytest.raises(RuntimeError, match=f"(?s)nothing was loaded.*{message}"):
            model.load_state_dict(values, strict=False)
        assert_same_state(model, before)
    plain = minidora.merge_and_unload(model)
    plain.load_state_dict(Model().state_dict())  # a plain model takes plain values again


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_loaded_before_any_training_starts_the_layer(assign: bool) -> None:
    torch.manual_seed(1)
    other = adapt(Model(), rank=2, alpha=3.0)
    for parameter in other.parameters():
        parameter.data.mul_(1.7)
    base = {key: value for key, value in other.state_dict().items() if ".base." in key}
    with torch.device("meta" if assign else "cpu"):
        model = adapt(Model(), rank=2, alpha=3.0)
    model.load_state_dict(base, strict=False, assign=assign)
    for name, layer in adapter_layers(model):
        assert torch.equal(layer.base.weight, base[f"{name}.base.weight"])
        if not assign:
            expected = layer.base.weight.double().pow(2).sum(1).sqrt()
            torch.testing.assert_close(layer.magnitude.double(), expected)


def test_parts_of_an_adapted_model_refuse_what_is_not_theirs() -> None:
    model, other = trained(), adapt(Model(), rank=2, alpha=6.0)
    for part in ("layers", "layers.1"):
        adapters = minidora.adapter_state_dict(other.get_submodule(part))
        with pytest.raises(RuntimeError, match="nothing was loaded"):
            model.get_submodule(part).load_state_dict(adapters, strict=False)
    compiled = adapt(torch.compile(Model(), backend="eager"), rank=2, alpha=3.0)
    adapters = minidora.adapter_state_dict(model)
    with pytest.raises(RuntimeError, match="layers.0.q_proj.lora_A: no adapter has this name"):
        compiled.load_state_dict(adapters, strict=False)
    compiled._orig_mod.load_state_dict(adapters, strict=False)
    torch.testing.assert_close(compiled._orig_mod(TOKENS), model(TOKENS))


def test_loading_part_of_a_model_that_concerns_no_adapter_is_allowed() -> None:
    model = trained()
    head = {"lm_head.bias": torch.ones(11)}
    model.load_state_dict(head, strict=False)
    assert torch.equal(model.lm_head.bias, torch.ones(11))
    only = {k: v for k, v in minidora.adapter_state_dict(trained()).items() if "layers.1" in k}
    assert only
    model.load_state_dict(only, strict=False)


def test_a_shared_layer_is_saved_once_so_that_safetensors_takes_it() -> None:
    def build() -> nn.Module:
        shared = nn.Linear(4, 4)
        nn.init.constant_(shared.weight, 0.3)
        return adapt(nn.Sequential(shared, nn.Tanh(), shared), rank=1, alpha=2.0)

    torch.manual_seed(0)
    model, fresh, x = build(), build(), torch.randn(2, 4)
    model[0].lora_B.data.normal_()
    model[0].base.bias.data.copy_(fresh[0].base.bias)
    fresh.load_state_dict(load(save(minidora.adapter_state_dict(model))), strict=False)
    torch.testing.assert_close(fresh(x), model(x))


def test_rank_and_alpha_patterns() -> None:
    model = Model()
    adapt(
        model,
        "lora",
        rank=2,
        alpha=8.0,
        rank_pattern={"q_proj": 4, r"layers\.1\.up_proj": 1},
        alpha_pattern={"k_proj": 1.0},
        use_rslora=True,
    )
    layer = model.get_submodule
    assert [layer(name).rank for name in INNER] == [4, 2, 2, 4, 2, 1]
    assert layer("layers.0.q_proj").scaling == pytest.approx(8 / math.sqrt(4))
    assert layer("layers.1.k_proj").scaling == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"method": "dorra"},
            ValueError,
            "method must be one of lora, dora or a class of adapters, got 'dorra'",
        ),
        (
            {"method": nn.Linear},
            ValueError,
            "method must be one of lora, dora or a class of adapters, got <class 'torch.*Linear'>",
        ),
        ({"rank": 0}, ValueError, r"layers.0.q_proj: rank must .* got 0"),
        ({"rank_pattern": {"up_proj": 2.5}}, ValueError, r"layers.0.up_proj: rank .* got 2.5"),
        ({"alpha_pattern": {"(": 2.0}}, ValueError, r"alpha_pattern: .* not a regular expression"),
        ({"target_modules": None}, TypeError, "target_modules must be names or a regular"),
        ({"alpha": math.nan}, ValueError, "alpha must be a finite number above 0, got nan"),
        ({"dropout": 1.5}, ValueError, "dropout must be at least 0 and below 1, got 1.5"),
        ({"target_modules": ["q_prj"]}, ValueError, r"'q_prj' matches no module; .*q_proj"),
        ({"target_modules": ["q_proj", "v"]}, ValueError, "target_modules: 'v' matches no module"),
        ({"target_modules": "layers.*.v"}, ValueError, "matches no module"),
        ({"target_modules": "("}, ValueError, r"target_modules='\(' is not a regular expression"),
        ({"target_modules": ["norm"]}, TypeError, "layers.0.norm, a LayerNorm: only nn.Linear"),
        ({"target_modules": ["layers"]}, TypeError, "a ModuleList.*layers.0.q_proj, layers.0.k"),
        ({"target_modules": ["lm_head"], "exclude_modules": ["lm_head"]}, ValueError, "no layer"),
        ({"exclude_modules": ["v_proj"]}, ValueError, "exclude_modules: 'v_proj' matches no"),
        ({"rank_pattern": {"v_proj": 2}}, ValueError, "rank_pattern: 'v_proj' matches no module"),
        ({"alpha_pattern": {"lm_head": 2.0}}, ValueError, "alpha_pattern: 'lm_head' matches no"),
    ],
)
def test_bad_arguments_name_themselves_and_change_nothing(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    model = Model()
    before = state(model)
    with pytest.raises(error, match=message):
        adapt(model, **{"rank": 2, **arguments})  # type: ignore[arg-type]
    assert_same_state(model, before)


def test_models_that_cannot_be_adapted() -> None:
    linear = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"itself an nn.Linear .* DoRALinear\(model, rank, alpha\)"):
        adapt(linear)
    assert linear.weight.requires_grad
    with pytest.raises(ValueError, match="Sequential holds no nn.Linear layer"):
        adapt(nn.Sequential(nn.ReLU()))
    model = trained()
    before = state(model)
    with pytest.raises(ValueError, match=r"adapted already \(layers.0.q_proj, 6 layers in all\)"):
        adapt(model)
    assert_same_state(model, before)
    with pytest.raises(ValueError, match=r"adapted already \(the model itself, 1 layers"):
        adapt(DoRALinear(linear, 1, 1.0))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_p11_merge_unmerge_and_unload(method: str) -> None:
    model = trained(method)
    expected = model(TOKENS)
    minidora.merge(model)
    torch.testing.assert_close(model(TOKENS), expected)
    minidora.unmerge(model)
    assert torch.equal(model(TOKENS), expected)
    plain = minidora.merge_and_unload(model)
    assert plain is model
    assert type(model.layers[0].q_proj) is nn.Linear
    assert set(model.state_dict()) == set(Model().state_dict())
    torch.testing.assert_close(model(TOKENS), expected)
    reloaded = Model()
    reloaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(reloaded(TOKENS), expected)


def test_unloading_takes_the_newest_adapter_not_an_old_merge() -> None:
    model = trained()
    minidora.merge(model)
    model.layers[0].q_proj.magnitude.data.mul_(1.5)
    minidora.unmerge(model)
    expected = model(TOKENS)
    minidora.merge(model)
    model.layers[0].q_proj.magnitude.data.mul_(1.0)
    torch.testing.assert_close(minidora.merge_and_unload(model)(TOKENS), expected)


def test_unloading_an_adapted_layer_that_is_the_model() -> None:
    layer = DoRALinear(nn.Linear(3, 2), 1, 1.0)
    layer.magnitude.data.mul_(2)
    x = torch.randn(4, 3)
    expected = layer(x)
    plain = minidora.merge_and_unload(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize("function", [minidora.merge, minidora.merge_and_unload])
def test_p13_a_merge_that_is_not_finite_changes_no_layer(function: object) -> None:
    model = trained()
    model.layers[1].k_proj.lora_B.data[0, 0] = torch.nan
    before = state(model)
    with pytest.raises(ValueError, match=r"layers.1.k_proj: merging would give 8 of 32 weights"):
        function(model)  # type: ignore[operator]
    assert_same_state(model, before)
    assert not any(layer.merged for _, layer in adapter_layers(model))


@pytest.mark.parametrize("merged", [False, True])
def test_p16_disable_adapters_nests_and_survives_exceptions(merged: bool) -> None:
    pretrained, model = Model()(TOKENS), trained()
    if merged:
        minidora.merge(model)
    adapted = model(TOKENS)
    model.layers[0].q_proj.enabled = False  # the state before must come back, whatever it was
    mixed = model(TOKENS)
    with pytest.raises(KeyError), disable_adapters(model):
        assert torch.equal(model(TOKENS), pretrained)
        with disable_adapters(model):
            assert torch.equal(model(TOKENS), pretrained)
        assert torch.equal(model(TOKENS), pretrained)
        raise KeyError
    assert torch.equal(model(TOKENS), mixed)
    model.layers[0].q_proj.enabled = True
    assert torch.equal(model(TOKENS), adapted)
    assert all(layer.merged is merged for layer in model.modules() if isinstance(layer, LoRALinear))


@pytest.mark.parametrize(
    "function",
    [
        minidora.merge,
        minidora.unmerge,
        minidora.merge_and_unload,
        minidora.adapter_state_dict,
        lambda model: disable_adapters(model).__enter__(),
    ],
)
def test_a_plain_model_is_told_to_adapt_first(function: object) -> None:
    with pytest.raises(ValueError, match="Model has no LoRALinear or DoRALinear layer: call adapt"):
        function(Model())  # type: ignore[operator]


def test_p17_adapter_state_dict_carries_an_adapter_over() -> None:
    model = trained()
    adapters = minidora.adapter_state_dict(model)
    assert set(adapters) == {
        f"{name}.{key}" for name in INNER for key in ("lora_A", "lora_B", "magnitude", "scaling")
    }
    assert not any(tensor.requires_grad for tensor in adapters.values())
    fresh = Model()
    adapt(fresh, rank=2, alpha=3.0)
    assert not fresh.load_state_dict(adapters, strict=False).unexpected_keys
    torch.testing.assert_close(fresh(TOKENS), model(TOKENS))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_p30_count_parameters(method: str) -> None:
    model = Model()
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total, 100.0)
    adapt(model, method, rank=2, alpha=3.0)
    shapes = [(8, 8), (8, 4), (8, 12)] * 2
    adapters = sum(2 * (i + o) + (o if method == "dora" else 0) for i, o in shapes)
    count = count_parameters(model)
    assert count == (adapters, total + adapters, 100 * adapters / (total + adapters))


def test_count_parameters_counts_a_shared_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == (9, 9, 100.0)
    assert count_parameters(nn.ReLU()) == (0, 0, 0.0)


def test_a_layer_under_two_names_is_wrapped_once() -> None:
    shared = nn.Linear(4, 4)
    model = adapt(nn.Sequential(shared, nn.ReLU(), shared), rank=1)
    assert model[0] is model[2]
    assert model[0].base is shared
    model[0].magnitude.data.mul_(1.3)
    x = torch.randn(2, 4)
    expected = model(x)
    minidora.merge_and_unload(model)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), expected)


def test_p32_a_tied_embedding_keeps_its_weight() -> None:
    model = Model()
    model.lm_head.weight = model.embedding.weight
    original = model.embedding.weight.detach().clone()
    adapt(model, rank=2, target_modules=["lm_head"])
    model.lm_head.magnitude.data.mul_(1.2)
    expected = model(TOKENS)
    minidora.merge_and_unload(model)
    assert torch.equal(model.embedding.weight, original)
    torch.testing.assert_close(model(TOKENS), expected)


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_read_a_weight_get_the_adapted_one(training: bool) -> None:
    """nn.TransformerEncoderLayer reads linear1.weight in its fast path, attention out_proj's."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = adapt(copy.deepcopy(plain), rank=2, alpha=3.0).train(training)
    for name in ("linear1", "linear2", "self_attn.out_proj"):
        layer = model.get_submodule(name)
        layer.magnitude.data.mul_(1.2)
        layer.lora_B.data.normal_()
        plain.get_submodule(name).weight = nn.Parameter(layer.effective_weight().detach())
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain.train(training)(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_p21_meta_device_and_training_mode_are_kept() -> None:
    with torch.device("meta"):
        model = Model().eval()
    adapt(model, rank=2)
    assert all(p.is_meta for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert count_parameters(model).trainable == sum(
        2 * (i + o) + o for i, o in [(8, 8), (8, 4), (8, 12)] * 2
    )
