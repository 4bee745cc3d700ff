"""How densegeo's extras are installed, as errors and reports say it. densegeo is on no package index."""

from __future__ import annotations


def install_command(*extras: str, beside: str = "") -> str:
    """What to type in densegeo's checkout: beside: another distribution for the same call."""
    return f'pip install ".[{",".join(extras)}]"' + (f" {beside}" if beside else "")


def install_hint(*extras: str, beside: str = "") -> str:
    """The same, and where to type it, for the end of a sentence."""
    return f"{install_command(*extras, beside=beside)} in densegeo's checkout"
