"""Tests that need bubblewrap: skipped with the reason where it is missing, but not under CI."""

import os

import pytest

from minidora.runner import sandbox

PROBLEM = sandbox.problem()
needs_sandbox = pytest.mark.skipif(
    bool(PROBLEM) and os.environ.get("CI") != "true", reason=PROBLEM or "there is a sandbox"
)
