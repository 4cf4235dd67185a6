"""The two pages beside the lessons, map.md and recipe.md: every method and every line has a source,
every quote is the ledger's, every sum is right, and the formulas marked † are PEFT's.

PEFT is read through what it computes: its merged weight, in float64, against the page's formula.
"""

import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from peft import (
    DeloraConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn

from minidora.classroom import folder as folders
from minidora.evidence import analysis, ledger, pretrain
from minidora.evidence.measures import ROOT, Record
from minidora.experiment import paired_difference, seeds_to_detect
from minidora.models import load_pretrained

PAGES = {page.stem: page.read_text(encoding="utf-8") for page in ledger.PAGES}
MAP, RECIPE = PAGES["map"], PAGES["recipe"]
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
CLAIMS = {claim.id for claim in ledger.load()}
GRADES = ("replicated", "contested", "single runs", "abstract only")

METHODS = {
    "LoRA": "2106.09685", "DoRA": "2402.09353", "rsLoRA": "2312.03732", "LoRA+": "2402.12354",
    "PiSSA": "2404.02948", "OLoRA": "2406.01775", "LoRA-GA": "2407.05000", "BiDoRA": "2410.09758",
    "BoRA": "2412.06441", "DeLoRA": "2503.18225", "MAP": "2505.23094", "DoRAN": "2510.04331",
    "Pre-Diag": "2511.00051", 'another "DoRA"': "2405.17357", "VeRA": "2310.11454",
    "MoRA": "2405.12130", "RandLoRA": "2502.00987", "MiSS": "2409.15371",
}  # fmt: skip
STUDIES = {
    "Lee": "2602.04998", "He": "2601.22708", "Yin": "2512.23165", "Biderman": "2405.09673",
    "Shuttleworth": "2410.21228", "Schulman": "https://thinkingmachines.ai/blog/lora/",
}  # fmt: skip


def tables(page: str) -> dict[str, list[list[str]]]:
    """{heading: rows of cells} of the tables of a page, their first two lines left out."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.splitlines():
        heading = line if line.startswith("## ") else heading
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(heading, []).append(cells)
    return {heading: rows[2:] for heading, rows in found.items()}


def plain(page: str) -> str:
    """The text as it is read: no comments, one line a paragraph."""
    return " ".join(re.sub(r"<!--.*?-->", "", page).split())


def graded() -> list[list[str]]:
    """The rows of the map that end in a grade: methods and studies."""
    return [row for rows in tables(MAP).values() for row in rows if row[-1].startswith("*")]


@pytest.fixture(scope="module")
def figures() -> Record:
    return Record()


# ---- Links, names, sources ----


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_whole(page: str) -> None:
    """A cell that holds a bar would fall apart on GitHub and in JupyterLab."""
    for heading, rows in tables(PAGES[page]).items():
        assert len({len(row) for row in rows}) == 1, heading
        assert all(cell for row in rows for cell in row[1:]), heading


def test_links_lead_somewhere_in_the_repository_and_in_a_learners_copy(tmp_path: Path) -> None:
    folders.start(tmp_path / "work")
    for page, text in PAGES.items():
        for words, link in LINK.findall(text):
            if "://" not in link:
                for root in (ROOT, tmp_path / "work"):
                    assert (root / "notebooks" / link).is_file(), (page, link)
            elif "arxiv" in link:
                number = re.fullmatch(r"https://arxiv\.org/abs/(\d{4}\.\d{5})", link)
                assert number, link
                assert words.removeprefix("arXiv ") == number[1]
            elif "github" in link:
                issue = re.fullmatch(
                    r"https://github\.com/[\w-]+/[\w-]+(?:/(?:issues|pull)/(\d+))?", link
                )
                assert issue, link
                assert words.split()[-1] == issue[1] or issue[1] is None
            else:
                assert link == STUDIES["Schulman"]


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_code_is_a_claim_or_a_file_or_known(page: str) -> None:
    known = {"use_rslora", "use_dora", "scale", "seeds_to_detect", "method_comparison"}
    known |= {"minidora.adapt", "minidora bench layers", "benchmarks/", "docs/claims.md"}
    for name in set(CODE.findall(PAGES[page])):
        claim = name.removeprefix("minidora claims ")
        assert claim in CLAIMS or name in known or any((ROOT / "tests").rglob(name)), name


@pytest.mark.parametrize("page", PAGES)
def test_what_is_quoted_is_named_beside_it_and_is_the_ledgers(page: str, figures: Record) -> None:
    text = PAGES[page]
    quotes = list(ledger.QUOTE.finditer(text))
    assert len(quotes) >= 8
    for line in text.splitlines():
        for quote in ledger.QUOTE.finditer(line):
            assert f"`{quote['id']}`" in line, quote[0]
    named = {quote["id"] for quote in quotes}
    entries = ledger.ledger(figures, [claim for claim in ledger.load() if claim.id in named])
    assert ledger.quoted(text, entries) == text, "stale: run `minidora claims --write`"


def test_every_method_has_its_number_and_a_grade() -> None:
    rows = {row[0].partition(",")[0]: row for row in graded()}
    wanted = METHODS | {next(n for n in rows if n.startswith(k)): v for k, v in STUDIES.items()}
    assert set(rows) == set(wanted)
    for name, number in wanted.items():
        link = number if "://" in number else f"https://arxiv.org/abs/{number}"
        assert f"]({link})" in rows[name][0], name
        grade = re.match(r"\*([a-z ]+)\*", rows[name][-1])
        assert grade, name
        assert grade[1] in GRADES, name
    for grade in GRADES:
        assert f"- *{grade}*:" in MAP


def test_every_line_of_the_recipe_has_a_source() -> None:
    kinds = (
        r"ledger `", r"\]\(https://arxiv\.org/abs/", r"\]\(https://github\.com/",
        r"\]\(0\d_\w+\.ipynb\)", r"paper, (Table|section) \d", r"`test_\w+\.py`",
    )  # fmt: skip
    rows = [row for rows in tables(RECIPE).values() for row in rows]
    assert len(rows) >= 25
    for row in rows:
        assert any(re.search(kind, row[-1]) for kind in kinds), row
        for names in re.findall(r"ledger ((?:`[\w-]+`(?:, )?)+)", row[-1]):
            assert set(CODE.findall(names)) <= CLAIMS, row


# ---- Sums ----


def test_the_result_that_turned_around() -> None:
    (_, *first), (_, *second) = next(v for k, v in tables(MAP).items() if "Why seeds" in k)
    runs = [[float(cell.replace("−", "-")) for cell in row] for row in (first, second)]
    for dora, lora, difference in runs:
        assert difference == pytest.approx(dora - lora, abs=1e-9)
    gain, loss = runs[0][2], runs[1][2]
    found = paired_difference([run[0] for run in runs], [run[1] for run in runs])
    spread = stdev([gain, loss])
    low, high = 0.63, 0.73
    times, pairs = (high - low) / gain, seeds_to_detect(gain, spread)
    for said in (
        f"moves by {gain:.3f} when one image moves by 4 × {gain:.3f} = {4 * gain:.3f}",
        f"between {low} and {high}. That range of {high - low:.2f} is {times:.1f} times",
        f"mean −{-found.mean:.3f} and standard deviation {gain - loss:.3f} / √2 = {spread:.3f}",
        f"{spread:.3f} / √2 = {found.error:.3f}",
        f"t is {stats.t.ppf(0.975, 1):.1f}: the 95 % interval is −{-found.mean:.3f} ± "
        f"{found.high - found.mean:.3f}",
        f"it takes {pairs} pairs of runs to see a true difference of {gain}",
    ):
        assert said in plain(MAP)


def test_right_answers_of_gsm8k() -> None:
    said = plain(MAP)
    dora, lora, questions = 619, 631, 1319
    assert f"{dora} and {lora} right answers out of 1,319" in said
    assert f"{100 * dora / questions:.1f} and {100 * lora / questions:.1f} % (July 2026)" in said
    right = lora / questions
    error = 100 * math.sqrt(right * (1 - right) / questions)
    assert f"√({right:.3f} · {1 - right:.3f} / {questions}), {error:.1f} points" in said
    assert lora - dora < error * questions / 100


def test_our_side_of_the_benchmark(figures: Record) -> None:
    rows = {row[0]: row[-1] for row in next(v for k, v in tables(MAP).items() if "beside" in k)}
    numbers = {4: "four", 10: "ten"}
    assert f"{pretrain.STEPS} steps" in rows["model and task"]
    (rank,) = {
        r["rank"] for r in figures.runs if r["purpose"] == "compare" and r["method"] != "full"
    }
    assert rows["adapters"].startswith(f"rank {rank}, alpha {2 * rank};")
    assert rows["seeds"] == numbers[len(pretrain.SEEDS)]
    assert {numbers[len(rates)] for rates in pretrain.RATES.values()} == {"four"}
    best = pretrain.best_rates(figures.runs)
    adapters = {rate for (method, _), rate in best.items() if method != "full"}
    said = f"{best['full', 'all']} for full fine-tuning and {adapters.pop()} for LoRA and DoRA"
    assert not adapters
    assert said in plain(RECIPE)


def test_how_far_magnitudes_moved(figures: Record) -> None:
    modules = load_pretrained().named_modules()
    norms = {
        n: float(m.weight.detach().norm(dim=1).mean())
        for n, m in modules
        if isinstance(m, nn.Linear)
    }
    runs = analysis.select(figures.runs, "compare", "dora", "five")
    last = analysis.dots(runs, pretrain.TARGETS["five"], steps=[pretrain.STEPS])
    moved = [dot.delta_magnitude / norms[dot.layer] for dot in last]
    said = f"{100 * fmean(moved):.0f} % on average, by {100 * max(moved):.0f} % in the layer"
    assert said in plain(RECIPE)


def test_bf16_rounds_a_small_step_away() -> None:
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    assert one + 1e-3 == one == one - 1e-3
    apart = [float(abs(torch.nextafter(one, one + way) - one)) for way in (-1, 1)]
    assert f"neighbours in bf16 are {min(apart):.3f} or more apart" in plain(RECIPE)
    between = torch.linspace(1, 2, 10_001, dtype=torch.float64)
    worst = float(((between.bfloat16().double() - between) / between).abs().max())
    assert f"a rounding of up to {100 * worst:.1f} %" in plain(RECIPE)


# ---- PEFT 0.21 ----

IN, OUT, R, ALPHA = 12, 20, 4, 6.0
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # PEFT computes in float32


def adapted(config: object, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(W before, PEFT's parameters and buffers by short names, its merged weight)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    before = model[0].weight.detach().clone()
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    if getattr(config, "init_lora_weights", True) is True:
        for parameter in trained:  # a start is a start, anything else is compared after a move
            parameter.data += 0.3 * torch.randn_like(parameter)
    layer = model.base_model.model[0]
    state = {
        key.replace(".default", "").replace(".weight", ""): value.detach().double()
        for key, value in layer.state_dict().items()
    }
    for name in ("vera_A", "vera_B", "randlora_A", "randlora_B"):  # shared, so not in the state
        if hasattr(layer, name):
            state[name] = getattr(layer, name)["default"].double()
    merged = model.merge_and_unload()[0].weight.detach().double()
    return before.double(), state, merged


def lora(**options: object) -> LoraConfig:
    return LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], **options)


def test_lora_rslora_and_dora() -> None:
    for options, s in (({}, ALPHA / R), ({"use_rslora": True}, ALPHA / math.sqrt(R))):
        w, at, merged = adapted(lora(**options))
        torch.testing.assert_close(merged, w + s * at["lora_B"] @ at["lora_A"], **CLOSE)
    w, at, merged = adapted(lora(use_dora=True))
    v = w + ALPHA / R * at["lora_B"] @ at["lora_A"]
    scale = at["lora_magnitude_vector"] / v.norm(dim=1)
    torch.testing.assert_close(merged, scale[:, None] * v, **CLOSE)


def test_pissa_and_olora_start() -> None:
    s = ALPHA / R
    w, at, merged = adapted(lora(init_lora_weights="pissa"))
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    part = u[:, :R] @ torch.diag(sigma[:R]) @ vh[:R]
    torch.testing.assert_close(s * at["lora_B"] @ at["lora_A"], part, **CLOSE)
    torch.testing.assert_close(at["base_layer"], w - part, **CLOSE)
    torch.testing.assert_close(merged, w, **CLOSE)
    w, at, merged = adapted(lora(init_lora_weights="olora"))
    q, r = torch.linalg.qr(w)
    torch.testing.assert_close(at["lora_B"] @ at["lora_A"], q[:, :R] @ r[:R], **CLOSE)
    torch.testing.assert_close(at["base_layer"], w - s * q[:, :R] @ r[:R], **CLOSE)
    torch.testing.assert_close(merged, w, **CLOSE)


def test_delora() -> None:
    w, at, merged = adapted(DeloraConfig(r=R, target_modules=["0"]))
    a, b, bound = at["delora_A"], at["delora_B"], at["delora_lambda"]
    terms = sum(torch.outer(b[:, i], a[i]) / (b[:, i].norm() * a[i].norm()) for i in range(R))
    update = bound / R * terms @ torch.diag(w.norm(dim=0))
    torch.testing.assert_close(merged, w + update, **CLOSE)


def test_vera_and_randlora() -> None:
    w, at, merged = adapted(VeraConfig(r=R, target_modules=["0"]))
    a, b = at["vera_A"][:, :IN], at["vera_B"][:OUT]
    update = torch.diag(at["vera_lambda_b"]) @ b @ torch.diag(at["vera_lambda_d"]) @ a
    torch.testing.assert_close(merged, w + update, **CLOSE)

    w, at, merged = adapted(RandLoraConfig(r=R, randlora_alpha=int(ALPHA), target_modules=["0"]))
    a, first, second = at["randlora_A"][:, 0, :IN], at["randlora_lambda"], at["randlora_gamma"]
    bases = len(second)
    # PEFT flattens A's and B's indices in different orders: its B_j takes every bases-th column.
    columns = at["randlora_B"][:OUT, :bases].flatten(start_dim=1)
    update = sum(
        columns[:, j::bases] @ torch.diag(first[:, j]) @ a @ torch.diag(second[j])
        for j in range(bases)
    )
    assert torch.linalg.matrix_rank(update) == IN  # the full rank
    torch.testing.assert_close(merged, w + ALPHA / R * update, **CLOSE)


def test_miss() -> None:
    w, at, merged = adapted(MissConfig(r=R, target_modules=["0"]))
    d = at["miss_block"]
    assert d.shape == (R, OUT)
    torch.testing.assert_close(merged, w + torch.cat([d.T] * (IN // R), dim=1), **CLOSE)


def test_lora_plus_raises_the_rate_of_b_and_of_the_magnitude() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), lora(use_dora=True))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = ("lora_A", "lora_B", "lora_magnitude")
    rates = {
        next(kind for kind in kinds if kind in names[id(parameter)]): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == {"lora_A": 1e-4, "lora_B": 16e-4, "lora_magnitude": 16e-4}


def test_peft_drops_magnitudes_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    base, other = (nn.Sequential(nn.Linear(IN, OUT)) for _ in range(2))
    other.load_state_dict(base.state_dict())
    model = get_peft_model(base, lora(use_dora=True))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += torch.rand_like(parameter)
    x = torch.randn(5, IN)
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert any("magnitude" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    recwarn.clear()
    loaded = PeftModel.from_pretrained(other, tmp_path)
    assert [str(w.message) for w in recwarn if "magnitude" in str(w.message)] == []
    assert float((loaded(x) - expected).abs().max()) > 0.1


def test_every_formula_with_a_mark_is_compared_here() -> None:
    marked = {row[0].partition(",")[0] for row in graded() if any("†" in cell for cell in row)}
    assert marked == {
        "LoRA", "DoRA", "rsLoRA", "LoRA+", "PiSSA", "OLoRA", "DeLoRA", "VeRA", "RandLoRA", "MiSS",
    }  # fmt: skip
