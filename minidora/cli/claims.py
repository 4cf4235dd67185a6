"""`minidora claims`: the ledger of claims."""

from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from minidora.evidence.ledger import Entry

app = typer.Typer()


class SaidBy(StrEnum):
    """ledger.SAID_BY, which cannot be read without torch."""

    SOURCE = "source"
    PAPER = "paper"
    OTHERS = "others"
    OURS = "ours"


class Verdict(StrEnum):
    """ledger.VERDICTS, which cannot be read without torch."""

    HOLDS = "holds"
    PARTLY = "holds partly"
    FAILS = "does not hold"
    UNTESTED = "not tested here"


@app.command()
def claims(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these, by name. Without: all.")
    ] = None,
    said_by: Annotated[SaidBy | None, typer.Option(help="Only what these say.")] = None,
    verdict: Annotated[Verdict | None, typer.Option(help="Only what comes to this.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every setting, as JSON.")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="How a verdict is reached.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write docs/claims.md and quotes anew.")
    ] = False,
) -> None:
    """List every claim and what we measured.

    The claims are those of the source notebook, the paper, other authors and the lessons.
    """
    from rich.console import Console
    from rich.progress import track

    from minidora.classroom.files import UserError, output_file, write_whole
    from minidora.evidence import ledger
    from minidora.evidence.measures import Record

    if rules:
        for name, rule in ledger.RULES.items():
            typer.echo(f"{name}: {rule}\n")
        return
    known_names = {claim.id for claim in ledger.load()}
    for name in names or ():
        if name not in known_names:
            near = get_close_matches(name, known_names, n=3) or sorted(known_names)
            raise typer.BadParameter(f"there is no claim {name[:40]!r}; there is {', '.join(near)}")
    if write:
        output_file(ledger.DOCUMENT)
    record = Record()
    shown = track(ledger.load(), "measuring", console=Console(stderr=True), transient=True)
    try:
        entries = [ledger.judged(claim, record) for claim in shown]
    except ValueError as error:  # what a claim points at is not there
        raise UserError(str(error)) from None
    if write:
        pages = {ledger.DOCUMENT: ledger.markdown(entries)}
        for page in ledger.PAGES:
            pages[page] = ledger.quoted(page.read_text(encoding="utf-8"), entries)
        for page, text in pages.items():
            write_whole(page, text)
            typer.echo(f"written: {page}")
        return
    chosen = [
        entry
        for entry in entries
        if said_by in (None, entry.claim.said_by)
        and verdict in (None, entry.verdict)
        and (not names or entry.claim.id in names)
    ]
    if as_json:
        typer.echo(ledger.as_json(chosen))
        return
    _print_claims(chosen)


def _print_claims(entries: "list[Entry]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from minidora.evidence.ledger import SAID_BY, VERDICTS

    colors = dict(zip(VERDICTS, ("green", "yellow", "red", "dim"), strict=True))
    for key, title in SAID_BY.items():
        table = Table(title=title, show_lines=True, title_justify="left", expand=True)
        table.add_column("claim", ratio=5)
        table.add_column("measured", ratio=4)
        table.add_column("verdict", width=8)
        table.add_column("shown", ratio=2, overflow="fold")
        for entry in (entry for entry in entries if entry.claim.said_by == key):
            claim = entry.claim
            table.add_row(
                f"{escape(claim.text)} [dim]({escape(claim.where)}) {claim.id}[/]",
                escape(entry.finding),
                f"[{colors[entry.verdict]}]{entry.verdict}[/]",
                escape(entry.place.split("::")[0]),
            )
        if table.row_count:
            Console().print(table)
