"""The notebooks as files: execute them the way they are committed."""

import os
from pathlib import Path

WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path, timeout: int = 300) -> None:
    """Run a notebook top to bottom in its folder and write it back, ready to commit.

    No timestamps, no Python patch version and no widget views are kept: they would change with
    every run, and a widget is dead without its kernel.

    Args:
        path: the .ipynb file, overwritten only when every cell ran.
        timeout: seconds a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ["TQDM_DISABLE"] = "1"  # a progress bar is for a person who waits
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    nbformat.write(notebook, path)


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        execute(Path(argument))
