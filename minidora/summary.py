"""What the runs of a sweep say: means, paired differences, losses at an equal budget.

    found = report("runs/first")
    print(found.markdown())
    found.differences["DoRA, rank 4", "LoRA, rank 4"].verdict

Of each method and seed the run with the best validation result is taken, and its result on the test
data, which chose nothing, is what counts.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from minidora.data import expanded
from minidora.experiment import Method
from minidora.grid import METHODS, Grid, name_of
from minidora.intervals import Difference, at_as_many, mean_and_error, paired_difference
from minidora.results import Row, read, read_settings


@dataclass(frozen=True)
class Arm:
    """A method at its best rate, chosen on each seed's validation data.

    Attributes:
        trained: numbers trained.
        rates: the chosen ones, a seed each. at_edge: how many are the grid's first or last.
        scores: of the test data: accuracy in percent, or for a text the loss.
        losses: of the test data, in nats.
    """

    method: Method
    trained: int
    rates: tuple[float, ...]
    at_edge: int
    scores: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """The arms of a sweep by their names, over the seeds that all of them have finished.

    Attributes:
        done: how many of the grid's runs there are.
        score: what scores are.
    """

    grid: Grid
    done: int
    seeds: tuple[int, ...]
    score: str
    arms: dict[str, Arm]

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """Paired differences in score: method against method at one rank, and a multiple of a
        rate against 1."""
        found = {}
        for first, a in self.arms.items():
            for second, b in self.arms.items():
                same = a.method.rank == b.method.rank or b.method.kind == "full"
                order = METHODS.index(a.method.kind) - METHODS.index(b.method.kind)
                plain = not b.method.rate_factors
                if plain and (
                    (order > 0 and same and not a.method.rate_factors)
                    or (order == 0 and same and a.method.rate_factors)
                ):
                    found[first, second] = paired_difference(a.scores, b.scores)
        return found

    @cached_property
    def at_equal_budget(self) -> dict[str, Difference]:
        """DoRA's loss minus LoRA's at as many trained numbers, where LoRA's ranks reach so far.

        LoRA's loss is interpolated: see intervals.at_as_many.
        """
        plain = {name: arm for name, arm in self.arms.items() if not arm.method.rate_factors}
        lora = {arm.trained: arm.losses for arm in plain.values() if arm.method.kind == "lora"}
        found = {}
        for name, arm in plain.items():
            line = at_as_many(arm.trained, lora)
            if arm.method.kind == "dora" and line is not None:
                found[name] = paired_difference(arm.losses, line)
        return found

    def markdown(self) -> str:
        """Tables of means, of differences and of losses at an equal budget."""
        unit = "%" if "accuracy" in self.score else "nats"
        lines = [
            f"{self.done} of {self.grid.size} runs of {self.grid.task}; {len(self.seeds)} seeds "
            "that every method has finished. Rates are chosen on validation data; means ± "
            "standard errors are those of the chosen runs.",
            "",
            f"| method | trained numbers | {self.score} ({unit}) | loss (nats) | rates chosen | at "
            "the grid's edge |",
            "|---|---:|---:|---:|---|---:|",
        ]
        for name, arm in self.arms.items():
            (score, error), (loss, loss_error) = map(mean_and_error, (arm.scores, arm.losses))
            rates = ", ".join(f"{rate:g}" for rate in sorted(set(arm.rates)))
            lines.append(
                f"| {name} | {arm.trained:,} | {score:.{_digits(self)}f} ± "
                f"{error:.{_digits(self)}f} | {loss:.4f} ± {loss_error:.4f} | {rates} | "
                f"{arm.at_edge} of {len(arm.rates)} |"
            )
        lines += _difference_table(
            f"{self.score}, paired by seed ({unit})",
            {f"{a} minus {b}": d for (a, b), d in self.differences.items()},
            _digits(self),
        )
        lines += _difference_table(
            "loss minus LoRA's at as many trained numbers (nats)", self.at_equal_budget, 4
        )
        return "\n".join(lines) + "\n"


def _digits(report: Report) -> int:
    return 2 if "accuracy" in report.score else 4


def _difference_table(title: str, rows: dict[str, Difference], digits: int) -> list[str]:
    if not rows:
        return []
    found = [
        "",
        f"| {title} | mean | 95 % interval | verdict | detectable |",
        "|---|---:|---|---|---:|",
    ]
    for name, d in rows.items():
        low, high = (f"{value:+.{digits}f}" for value in (d.low, d.high))
        found.append(
            f"| {name} | {d.mean:+.{digits}f} | {low} to {high} | {d.verdict} | "
            f"{d.detectable:.{digits}f} |"
        )
    note = (
        "" if len(rows) == 1 else f" The {len(rows)} intervals are not corrected for their number."
    )
    found += ["", "Detectable: what would have been found four times in five." + note]
    return found


def report(folder: str | Path) -> Report:
    """What the runs of a folder say; while it still runs, those that are there.

    Raises:
        ValueError: there is no sweep, or not two seeds that every method has finished.
    """
    folder = expanded(folder)
    settings = read_settings(folder)
    grid = Grid(**{field.name: settings[field.name] for field in fields(Grid)})
    groups = read(folder, grid.runs)
    rows = [row for group in groups.values() for row in group]
    found: dict[str, dict[int, list[Row]]] = {name_of(method): {} for method in grid.arms}
    for group, members in groups.items():
        for row in members:
            found[name_of(grid.groups[group][0])].setdefault(row["seed"], []).append(row)
    seeds = [seed for seed in grid.every_seed if all(seed in arm for arm in found.values())]
    if len(seeds) < 2:
        raise ValueError(
            f"{folder}: {len(rows)} of {grid.size} runs are done, and a report takes at least 2 "
            "seeds of every method: run it on"
        )
    arms = {}
    for (name, by_seed), method in zip(found.items(), grid.arms, strict=True):
        best = [max(by_seed[seed], key=_rank) for seed in seeds]
        score = "test_loss" if grid.task == "chargpt" else "test_accuracy"
        edges = (grid.rates[0], grid.rates[-1])
        arms[name] = Arm(
            method,
            trained=best[0]["trained"],
            rates=tuple(row["rate"] for row in best),
            at_edge=sum(row["rate"] in edges for row in best),
            scores=tuple(row[score] for row in best),
            losses=tuple(row["test_loss"] for row in best),
        )
    kind = "test loss" if grid.task == "chargpt" else "test accuracy"
    return Report(grid, len(rows), tuple(seeds), kind, arms)


def _rank(row: Row) -> tuple[float, float]:
    """The better run has the higher accuracy on validation data; of equal ones, the lower loss."""
    loss = row["validation_loss"]
    return row.get("validation_accuracy", 0.0), -math.inf if math.isnan(loss) else -loss
