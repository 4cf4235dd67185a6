"""What an import pulls in. Who may import whom is held by import-linter (pyproject.toml)."""

import pytest
from fresh import python

PROGRAM = """
import sys
{first}
before = set(sys.modules)
{then}
new = set(sys.modules) - before
print(*sorted({{name.partition(".")[0] for name in new}} - set(sys.stdlib_module_names)))
print(*sorted(name for name in new if name.startswith("torch")))
"""


def pulled_in(first: str, then: str) -> tuple[list[str], list[str]]:
    """Packages that `then` adds to those of `first`, and the modules of torch among them."""
    packages, modules = python(PROGRAM.format(first=first, then=then)).splitlines()
    return packages.split(), modules.split()


def test_the_test_sees_a_package():
    assert "matplotlib" in pulled_in("import torch", "import matplotlib")[0]
    assert (
        "torch.utils.flop_counter"
        in pulled_in("import torch", "import torch.utils.flop_counter")[1]
    )


def test_minidora_needs_torch_alone():
    packages, modules = pulled_in("import torch", "import minidora")
    # Parts of torch that come at their first use; torch 2.6's checkpoint brings its own sympy.
    assert set(packages) - {"mpmath", "sympy"} == {"minidora", "torch"}
    assert "torch._dynamo" not in modules  # seconds, and sympy with it


def test_torch_and_minidora_together_stay_light():
    heavy = "matplotlib torchvision sklearn ipywidgets IPython rich typer scipy"
    code = f"import minidora, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    assert python(code).strip() == "[]"


@pytest.mark.parametrize("statement", ["from minidora import checks", "import minidora.checks"])
def test_the_checks_add_no_package(statement):
    packages, modules = pulled_in("import minidora", statement)
    assert packages == ["minidora"]
    assert "torch.utils.flop_counter" not in modules  # 0.6 s, for one exercise of lesson 6
