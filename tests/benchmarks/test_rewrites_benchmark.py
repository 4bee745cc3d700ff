"""The rewrites benchmark on a toy size: all of it runs, the last line is JSON, and wrong numbers get no speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from densegeo.benchmarks import comparisons, pricing, rewrites
from densegeo.models import fiffdepth
from densegeo.models.fe2e import NAMES

pytestmark = pytest.mark.integration


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(rewrites.main)
    result = CliRunner().invoke(app, ["--smoke", "--runs", "1", *arguments])
    return result.exit_code, result.output


@pytest.mark.slow
def test_toy_run(tmp_path: Path) -> None:
    file = tmp_path / "results" / "rewrites.json"
    status, output = invoke("--json", str(file))
    assert status == 0, output
    result = json.loads(output.splitlines()[-1])
    assert json.loads(file.read_text()) == result
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert [row["name"] for row in result["rewrites"]["rows"]] == list(NAMES)
    names = [row["name"] for row in result["comparisons"]]
    assert names == ["transformer fp32", "transformer bf16", "compiled transformer", "whole pipeline"]
    for row in result["comparisons"]:
        assert row["flops"]["ours"] < row["flops"]["baseline"]
    for key in ("machine", "versions", "commit", "command", "ceiling_gflops"):
        assert key in result


@pytest.mark.thorough
def test_fiffdepths_rewrites_have_prices_too() -> None:
    status, output = invoke("--model", "fiffdepth")
    assert status == 0, output
    result = json.loads(output.splitlines()[-1])
    rows = {row["name"]: row for row in result["rewrites"]["rows"]}
    assert list(rows) == list(fiffdepth.NAMES)
    assert {row["stage"] for row in rows.values()} == {"encoder", "denoiser", "decoder"}
    assert all(row["alone_off"]["error"] <= 1e-5 for row in rows.values())
    for name in ("time", "prompt", "gates", "channel-mean", "latent-mean", "upsample"):
        everything = result["rewrites"]["all"][rows[name]["stage"]]
        assert rows[name]["alone_off"]["flops"] >= everything["flops"]
        assert rows[name]["alone_off"]["parameters"] != everything["parameters"] or name == "upsample"
    assert result["comparisons"] == []


@pytest.mark.parametrize("arguments", [("--model", "other"), ("--model", "fiffdepth", "--whole-only")])
def test_what_there_is_not_is_refused(arguments: tuple[str, ...]) -> None:
    status, output = invoke(*arguments)
    assert status == 2
    assert "there is no model" in output or "is compared with diffusers by" in output


def test_wrong_numbers_get_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing.chain, "relative_error", lambda ours, wanted: 2e-5)
    status, output = invoke()
    assert status == 1
    assert "the numbers are wrong" in output
    assert "times faster" not in output


def test_low_precision_may_err_twice_as_much_as_plain_low_precision() -> None:
    comparisons._check_low({"depth": 0.02}, {"depth": 0.01}, "it")
    for error in (0.021, float("nan")):
        with pytest.raises(comparisons.Wrong, match="it: depth"):
            comparisons._check_low({"depth": error}, {"depth": 0.01}, "it")
