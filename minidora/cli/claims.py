"""`minidora claims`: the ledger of claims."""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from minidora.evidence.ledger import Entry

app = typer.Typer()


@app.command()
def claims(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these, by name. Without: all.")
    ] = None,
    said_by: Annotated[
        str | None, typer.Option(help="Only these: source, paper, others or ours.")
    ] = None,
    verdict: Annotated[str | None, typer.Option(help='Only these: "does not hold", ...')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every setting, as JSON.")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="How a verdict is reached.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write docs/claims.md and quotes anew.")
    ] = False,
) -> None:
    """Every claim of the source notebook, the paper and the lessons, and what we measured."""
    from minidora.evidence import ledger
    from minidora.evidence.measures import Record

    if rules:
        for name, rule in ledger.RULES.items():
            typer.echo(f"{name}: {rule}\n")
        return
    for given, known in ((said_by, tuple(ledger.SAID_BY)), (verdict, ledger.VERDICTS)):
        if given is not None and given not in known:
            raise typer.BadParameter(f"{given!r} is none of {', '.join(known)}")
    try:
        entries = ledger.ledger(Record())
    except ValueError as error:
        typer.echo(f"minidora: {error}", err=True)
        raise typer.Exit(2) from None
    if write:
        pages = {ledger.DOCUMENT: ledger.markdown(entries)}
        for page in ledger.PAGES:
            pages[page] = ledger.quoted(page.read_text(encoding="utf-8"), entries)
        for page, text in pages.items():
            page.write_text(text, encoding="utf-8")
            typer.echo(f"written: {page}")
        return
    known_names = {entry.claim.id for entry in entries}
    for name in names or ():
        if name not in known_names:
            near = get_close_matches(name, known_names, n=3) or sorted(known_names)
            raise typer.BadParameter(f"there is no claim {name!r}; there is {', '.join(near)}")
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
