"""The `minidora` command starts here, beside the package and not in it.

Importing minidora imports torch, which takes seconds and may be broken. So what does without
torch is loaded by its path: the command line itself (minidora/cli/), with all its help and its
errors of usage, and `minidora doctor`, which runs where nothing else does.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).with_name("minidora")


def load(name: str) -> ModuleType:
    """minidora.NAME without minidora/__init__.py, once: load("cli"), load("checks.catalog").

    What is loaded so may import neither minidora nor torch when it is imported.
    """
    known = f"minidora_command.{name}"
    if known not in sys.modules:
        path = PACKAGE.joinpath(*name.split("."))
        folder = path.is_dir()
        spec = importlib.util.spec_from_file_location(
            known,
            path / "__init__.py" if folder else path.with_suffix(".py"),
            submodule_search_locations=[str(path)] if folder else None,
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[known]


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # no console or locale may be in the way of a result
        if hasattr(stream, "reconfigure"):
            to_file = {} if stream.isatty() else {"encoding": "utf-8"}
            stream.reconfigure(errors="backslashreplace", **to_file)
    try:
        if sys.argv[1:] == ["doctor"]:
            sys.exit(load("doctor").main())
        load("cli").app(prog_name="minidora")
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
