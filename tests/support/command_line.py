"""The command line, in the test's own process."""

from __future__ import annotations

import pytest

from densegeo import cli


def run(*arguments: object) -> int:
    """`densegeo ARGUMENTS`; its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    code = stop.value.code
    assert code is None or isinstance(code, int)
    return code or 0
