"""The ledger of claims: who says what, what we measured, and the verdict that follows.

    minidora claims                      # the table; --rules says how a verdict is reached
    minidora claims lee-peaks            # the claims of these names
    for entry in ledger(Record()): print(entry.claim.text, entry.measured, entry.verdict)

claims.toml is the one source. A claim names the cell or the test that shows it, a rule, and the
figure that the rule is applied to: what the cell printed, as it is committed, or a function of
claim_figures.py, which reads the committed evidence and benchmarks or computes from shapes. No
verdict is written down anywhere but "not tested here".
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minidora.evidence.measures import MEASURES, ROOT, Interval, Record, Values, printed

SOURCE = Path(__file__).with_name("claims.toml")
DOCUMENT = ROOT / "docs" / "claims.md"
PAGES = (ROOT / "notebooks" / "map.md", ROOT / "notebooks" / "recipe.md")
QUOTE = re.compile(r"<!--claim (?P<id>[\w-]+)(?:: (?P<setting>[^>]+?))?-->.*?<!--/-->")
"""A page's quote of the ledger; see quoted."""

SAID_BY = {
    "source": "The source notebook",
    "paper": "The DoRA paper, arXiv 2402.09353",
    "others": "Articles, critiques and other papers",
    "ours": "This course",
}
HOLDS, PARTLY, FAILS, UNTESTED = "holds", "holds partly", "does not hold", "not tested here"
VERDICTS = (HOLDS, PARTLY, FAILS, UNTESTED)
RULES = {
    "a number": "holds where the measured number rounds to the claimed one, or differs by no more "
    "than the tolerance that stands with the claim.",
    "at least, at most": "holds where the measured number is on that side of the bound, or on it.",
    "a difference or a sign": "is judged by the 95 % interval over seeds, the sign of a "
    "correlation also by that over seeds and layers. It holds where the whole interval lies on the "
    "claimed side of 0, holds partly where only the mean does, and does not hold otherwise.",
    "no loss": "(not above 0, not below 0) holds where the whole interval lies on the other side, "
    "does not hold where it lies on the denied side, and holds partly where it contains 0: beside "
    "it stands the difference that would have been detected.",
    "a text": "holds where the lesson's cell printed it, word for word, as it is committed.",
    "a property": "holds where the named test asserts it, and does not hold where the test asserts "
    "its contrary. CI runs the test.",
    "several settings": "A claim holds if it holds in all of them, does not hold if it does in "
    "none, and holds partly otherwise.",
    "not tested here": "is what we did not measure. The note says what its author reports, or why.",
}


@dataclass(frozen=True)
class Claim:
    """An entry of claims.toml.

    Attributes:
        text: the claim. said_by: a key of SAID_BY. where: the place there.
        shown: "notebooks/x.ipynb#cell id" or "tests/test_x.py::test_name".
        rule: see judge. figure: see measure.
    """

    id: str
    text: str
    said_by: str
    where: str
    shown: str
    rule: Mapping[str, Any]
    figure: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class Entry(NamedTuple):
    """A claim with its verdict; settings: {name: [what was measured, verdict]}."""

    claim: Claim
    measured: str
    verdict: str
    settings: dict[str, list[str]]
    place: str

    @property
    def finding(self) -> str:
        """What was measured, and the note."""
        return ". ".join(part for part in (self.measured, self.claim.note) if part)


# ---- The rules ----


def by_number(measured: float, claimed: str, tolerance: float | None = None) -> str:
    """claimed is a text, for the number of its decimals."""
    if tolerance is None:
        tolerance = 0.5 * 10.0 ** -len(claimed.partition(".")[2])
    return HOLDS if abs(measured - float(claimed)) <= tolerance * (1 + 1e-9) else FAILS


def by_bound(measured: float, at_least: float = -torch.inf, at_most: float = torch.inf) -> str:
    return HOLDS if at_least <= measured <= at_most else FAILS


def by_interval(measured: Interval, side: str) -> str:
    """side: "above" or "below" (of 0), or no loss: "not above" or "not below"."""
    sign = {"above": 1, "not below": 1, "below": -1, "not above": -1}[side]
    low, high = sorted((sign * measured.low, sign * measured.high))
    if low > 0 or high < 0:
        return HOLDS if low > 0 else FAILS
    return PARTLY if side.startswith("not") or sign * measured.mean > 0 else FAILS


def number(value: str | float) -> float:
    """A number, or what was printed of one: "107,204"."""
    return float(value.replace(",", "")) if isinstance(value, str) else value


def combine(verdicts: Iterable[str]) -> str:
    """The verdict over settings."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else PARTLY


def judge(claim: Claim, values: Values) -> dict[str, str]:
    """{setting: verdict} by the claim's rule, one of

        {number = "84"} or {number = {setting = "84"}}, with tolerance = 0.1 or without
        {at_least = 1}     {at_most = 1}     {side = "below"}     {reads = "True"}
        {asserts = "the claim"}     {asserts = "the contrary"}     {untested = true}

    Raises:
        ValueError: another rule, no figures, or not those that are claimed.
    """
    rule = dict(claim.rule)
    if rule == {"untested": True} and claim.note and not claim.figure:
        return {"": UNTESTED}
    if set(rule) == {"asserts"} and "::" in claim.shown and not claim.figure:
        return {"": {"the claim": HOLDS, "the contrary": FAILS}[rule["asserts"]]}
    if not values:
        raise ValueError(f"{claim.id}: nothing was measured")
    if "number" in rule:
        claimed = rule.pop("number")
        claimed = claimed if isinstance(claimed, dict) else dict.fromkeys(values, claimed)
        if set(claimed) != set(values):
            raise ValueError(f"{claim.id}: claimed {[*claimed]}, but measured {[*values]}")
        return {name: by_number(number(v), claimed[name], **rule) for name, v in values.items()}
    if set(rule) == {"reads"}:
        return {name: HOLDS if v == rule["reads"] else FAILS for name, v in values.items()}
    if set(rule) == {"side"}:
        return {name: by_interval(v, rule["side"]) for name, v in values.items()}
    if set(rule) in ({"at_least"}, {"at_most"}):
        return {name: by_bound(number(v), **rule) for name, v in values.items()}
    raise ValueError(f"{claim.id}: {rule} is no rule")


# ---- The ledger ----


def measure(claim: Claim, figures: Record) -> Values:
    """{setting: value} of a claim's figure, one of

    {printed = "pattern"}, read from the output of the cell that shows it; see printed
    {measure = "function", argument = ...}, one of MEASURES
    """
    given = dict(claim.figure)
    if "printed" in given:
        return printed(figures.cell(claim.shown)[1], given["printed"])
    return MEASURES[given.pop("measure")](figures, **given) if given else {}


def load(path: Path = SOURCE) -> list[Claim]:
    """The claims of a file, in its order.

    Raises:
        TypeError: a key that a claim does not have, or lacks.
    """
    return [Claim(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["claim"]]


def ledger(figures: Record, claims: Iterable[Claim] | None = None) -> list[Entry]:
    """Every claim with its verdict.

    Raises:
        ValueError: what a claim points at is not there, or does not fit its rule.
    """
    return [judged(claim, figures) for claim in (load() if claims is None else claims)]


def judged(claim: Claim, figures: Record) -> Entry:
    """One claim with its verdict."""
    place = figures.place(claim.shown)
    values = measure(claim, figures)
    verdicts = judge(claim, values)
    settings = {name: [text(value), verdicts[name]] for name, value in values.items()}
    asserted = f"the test asserts {claim.rule['asserts']}" if "asserts" in claim.rule else ""
    measured = summary(values, verdicts) or asserted
    return Entry(claim, measured, combine(verdicts.values()), settings, place)


def text(value: Any) -> str:
    """A value as it is printed."""
    if isinstance(value, Interval):
        mean, low, high = (f"{bound:+.2g}" for bound in value[:3])
        missed = value.low <= 0 <= value.high and value.detectable is not None
        detectable = f"; detectable: {value.detectable:.2g}" if missed else ""
        return f"{mean} ({low} to {high}{detectable})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summary(values: Values, verdicts: Mapping[str, str]) -> str:
    """Up to 3 settings one by one; of more, in how many it holds and the range."""
    if len(values) <= 3:
        return "; ".join(f"{name}: {text(v)}" if name else text(v) for name, v in values.items())
    held = f"holds in {sum(v == HOLDS for v in verdicts.values())} of {len(values)} settings"
    middle = [v.mean if isinstance(v, Interval) else v for v in values.values()]
    try:
        numbers = [number(value) for value in middle]
    except ValueError:  # they are texts
        return held
    return f"{held}, {min(numbers):.3g} to {max(numbers):.3g}"


def as_json(entries: list[Entry]) -> str:
    """The entries with all their settings."""
    rows = [
        {
            **{key: getattr(entry.claim, key) for key in ("id", "text", "said_by", "where")},
            "measured": entry.measured,
            "settings": entry.settings,
            "verdict": entry.verdict,
            **{key: getattr(entry.claim, key) for key in ("rule", "note", "shown")},
        }
        for entry in entries
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False)


def markdown(entries: list[Entry]) -> str:
    """docs/claims.md: made from the ledger by `minidora claims --write`, and never edited."""
    count = {verdict: sum(entry.verdict == verdict for entry in entries) for verdict in VERDICTS}
    lines = [
        "# Claims, and what we measured",
        "",
        "`minidora claims --write` makes this file from `minidora/evidence/claims.toml` and the "
        "committed figures. " + ", ".join(f"{n} {verdict}" for verdict, n in count.items()) + ".",
        "",
        "How a verdict is reached:",
        "",
        *(f"- **{name}** {rule}" for name, rule in RULES.items()),
    ]
    for key, title in SAID_BY.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| claim | measured | verdict | shown |",
            "|---|---|---|---|",
        ]
        for entry in (entry for entry in entries if entry.claim.said_by == key):
            claim, link = entry.claim, re.split("#|::", entry.claim.shown)[0]
            cells = (
                f"{claim.text} ({claim.where}) `{claim.id}`", entry.finding, entry.verdict,
                f"[{entry.place.replace('::', ', ')}](../{link})",
            )  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def quoted(page: str, entries: Iterable[Entry]) -> str:
    """A page of Markdown with its quotes of the ledger written anew; the comments do not show.

    <!--claim NAME: SETTING-->what was measured in it<!--/-->
    <!--claim NAME-->the verdict<!--/-->

    Raises:
        ValueError: there is no such claim, or it has no such setting.
    """
    by_id = {entry.claim.id: entry for entry in entries}

    def renew(match: re.Match[str]) -> str:
        name, setting = match["id"], match["setting"]
        if name not in by_id:
            raise ValueError(f"the ledger has no claim {name!r}: `minidora claims` lists them")
        entry = by_id[name]
        if setting is not None and setting not in entry.settings:
            raise ValueError(f"{name} has no setting {setting!r}, only {[*entry.settings]}")
        value = entry.verdict if setting is None else entry.settings[setting][0]
        return f"<!--claim {name}{f': {setting}' if setting else ''}-->{value}<!--/-->"

    return QUOTE.sub(renew, page)
