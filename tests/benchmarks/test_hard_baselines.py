"""What the hard baselines refuse before they write or time anything."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from densegeo.benchmarks import hard_baselines
from densegeo.benchmarks.hard_baselines import Race
from densegeo.errors import ConfigError
from densegeo.export.machine import Machine
from densegeo.size import Size


@pytest.mark.parametrize(
    ("precision", "message"),
    [("bf16", "this processor has no bf16, and a figure of emulated"), ("fp8", "no row in fp8; there are fp32, bf16")],
)
def test_what_would_say_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, message: str
) -> None:
    monkeypatch.setattr(hard_baselines, "this_machine", lambda: Machine(cpu_bf16=False))
    with pytest.raises(ConfigError, match=message):
        hard_baselines.run(Race("fiffdepth", tmp_path / "made", Size(64, 64), 2, 1, 64), [precision], None)
    assert not (tmp_path / "made").exists()


def test_the_table_says_against_whom() -> None:
    row = {"median_ms": 2.0, "speedup": {"median": 1.5}, "of_ceiling": 0.5, "error": 1e-6, "output": "prediction"}
    actual = {
        "precision": "fp32",
        "ceiling_gflops": 80.0,
        "against": "diffusers channels last",
        "rows": {"densegeo torch": row},
    }
    table = hard_baselines.table_of(actual)
    assert [str(column.header) for column in table.columns][2] == "times as fast as diffusers channels last"
    assert [next(iter(column.cells)) for column in table.columns] == [
        "densegeo torch",
        "2 ms",
        "1.50",
        "50%",
        "1.0e-06 (prediction)",
    ]
