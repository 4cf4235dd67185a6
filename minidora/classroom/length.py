"""How long a lesson is: the words that its reader reads, and what is folded away."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

DETAILS = re.compile(r"<details>.*?</details>", re.DOTALL)
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL)
WORD = re.compile(r"[^\W_]")  # a token without a letter or digit, "|" or "-->", is no word
SECTION = re.compile(r"^##? ", re.MULTILINE)
PREDICTION = re.compile(r"\*\*Predict\b")


@dataclass(frozen=True)
class Length:
    """Words of Markdown outside and inside <details>, headings, "**Predict" prompts, and folds.

    A formula counts as one word. The title is not counted as a section.
    """

    words: int
    folded: int
    sections: int
    predictions: int
    folds: int

    @property
    def all_words(self) -> int:
        return self.words + self.folded


def length(path: Path) -> Length:
    """Count the Markdown cells of a notebook. Raises ValueError where a fold is not closed."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    folds = DETAILS.findall(text)
    if not len(folds) == text.count("<details>") == text.count("</details>"):
        raise ValueError(f"{path.name}: a <details> is not closed, or stands inside another")
    return Length(
        words=_words(DETAILS.sub("", text)),
        folded=_words("\n".join(folds)),
        sections=len(SECTION.findall(text)) - 1,
        predictions=len(PREDICTION.findall(text)),
        folds=len(folds),
    )


def _words(text: str) -> int:
    text = re.sub(r"</?\w+[^>]*>", " ", FORMULA.sub(" formula ", text))
    return sum(bool(WORD.search(token)) for token in text.split())
