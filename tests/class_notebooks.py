"""Notebooks as students of lesson 3 hand them in."""

import json
from typing import Any

from minidora import checks
from minidora.classroom import folder as folders

NAME = "03_dora_decomposition"
LESSON = checks.LESSONS[3]
HONEST = "decompose"


def submission(row_norm: str, honest: bool = False, **changes: Any) -> str:
    """One with this cell for 3.1 and 3.2 solved, or with everything solved; changes are to the
    check cell of 3.1.
    """
    content = json.loads((folders.ROOT / "exercises" / f"{NAME}.ipynb").read_text("utf-8"))
    for cell in content["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        for exercise in LESSON.exercises:
            if name == exercise.name and (honest or name == HONEST):
                cell["source"] = folders.solution(LESSON, exercise)
        if name == "row_norm" and not honest:
            cell["source"] = row_norm
        if name == "row_norm_check":
            cell.update(changes)
    return json.dumps(content)
