"""The pages: links, files and sections that they name, a place for each, and parts that are made from records."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.documentation import PAGES, commands, prose
from tests.support.project import ROOT

LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")
TOOLS = ROOT / "docs" / "tools"
# Files that a page tells its reader to write.
TO_WRITE = {"runtime/backends/onnx_reference.py"}


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as MkDocs and GitHub make them of these plain ones."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "", head).lower()).strip().replace(" ", "-") for head in heads
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|json|md|toml|Dockerfile))`", prose(page)):
        assert path in TO_WRITE or (ROOT / path).is_file(), f"{page.name} names {path}"


def test_tests_that_are_named_exist() -> None:
    """By their functions' names; of the page of what an image costs, cases over the stand-in driver too."""
    there = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (\w+)\(", path.read_text())}
    for page in PAGES:
        named = re.findall(r"`(test_\w+)`", prose(page))
        if page.name == "performance.md":
            named += re.findall(r"`([a-z]+(?:_[a-z]+){3,})`", prose(page))
            assert len(named) > 15
        assert set(named) <= there, page.name


def test_every_page_has_one_place() -> None:
    """So does the strict build, of which this is the quick half."""
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    there = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted({*there, "contributing.md", "security.md", "changelog.md"})
    index = (ROOT / "docs" / "index.md").read_text()
    assert {page for page in there if f"]({page})" not in index} == {"index.md"}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """docs/tools/pages.py as it is run."""
    monkeypatch.syspath_prepend(TOOLS)
    return runpy.run_path(str(TOOLS / "pages.py"))


def test_the_site_leads_links_elsewhere_and_warns_of_those_to_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mkdocs")
    address = runpy.run_path(str(TOOLS / "links.py"))["address"]
    home = "https://github.com/densegeo/densegeo"
    assert address("docs/metres.md", "python.md", "docs/python.md", home) == "metres.md"
    assert address("CONTRIBUTING.md", "extending.md", "docs/extending.md", home) == "contributing.md"
    assert address("tests/docs", "a.md", "docs/a.md", home) == f"{home}/tree/main/tests/docs"
    assert address("docs/tools/pages.py", "a.md", "docs/a.md", home) == f"{home}/blob/main/docs/tools/pages.py"
    assert not caplog.records
    address("docs/nothing.md", "a.md", "docs/a.md", home)
    (record,) = caplog.records  # of a logger below mkdocs, whose warnings `--strict` counts
    assert (record.name, record.levelname) == ("mkdocs.hooks.links", "WARNING")
    assert record.getMessage() == "docs/a.md links to docs/nothing.md, which does not exist"


def test_the_site_is_built_strictly() -> None:
    """Quietly, MkDocs drops warnings before `--strict` counts them."""
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "mkdocs build" in line)
    assert "--strict" in line
    assert not {"--quiet", "-q"} & set(line.split())
    assert "\nmake docs\n" in (ROOT / ".ci" / "run").read_text()


def test_made_parts_are_what_their_makers_give(tools: dict[str, Any]) -> None:
    pytest.importorskip("torch")  # some commands' options are read off the builders
    for page in tools["PARTS"]:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert tools["renewed"](page, text) == text, f"docs/{page} is stale: `python docs/tools/pages.py`"


def test_a_stale_part_is_noticed(tools: dict[str, Any]) -> None:
    renewed, claims = tools["renewed"], tools["claims"]
    text = (ROOT / "docs" / "precisions.md").read_text(encoding="utf-8")
    assert "| `bf16` | 16 |" in text
    wrong = text.replace("| `bf16` | 16 |", "| `bf16` | 15 |")
    assert renewed("precisions.md", wrong) == text
    with pytest.raises(SystemExit, match=r"no place for <!-- precisions -->"):
        renewed("precisions.md", text.replace("<!-- precisions -->", ""))
    for field, value in (("tests", ["test_nothing.py"]), ("cpu", "`make nothing`"), ("claim", "{nothing.seconds}")):
        with pytest.raises(SystemExit, match="there is no"):
            claims.require({"claim": "x", "cpu": "not shown", field: value})
    with pytest.raises(SystemExit, match="`make test` runs no test"):
        claims.require({"claim": "x", "cpu": "`make test`", "tests": ["export/test_normals_alone.py"]})
    with pytest.raises(SystemExit, match="nothing holds"):
        claims.require({"claim": "x", "cpu": "surely"})
    assert claims.filled("{quantization_cpu_zen4.shares.fp8:.1%}") == "99.1 %"


def test_sections_that_the_code_cites_exist() -> None:
    """ "DESIGN section 10" is a heading of docs/design.md, "DESIGN 4.2" the second item of its section 4."""
    text = (ROOT / "docs" / "design.md").read_text()
    parts = {part.partition(".")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}
    cited = 0
    for path in ROOT.rglob("*.py"):
        if {".venv", "build", "out"} & set(path.relative_to(ROOT).parts) or path == Path(__file__):
            continue
        for words in re.findall(r"DESIGN(?: sections?)? ((?:\d+(?:\.\d+)?(?:, | and )?)+)", path.read_text()):
            for number in re.findall(r"\d+(?:\.\d+)?", words):
                section, _, item = number.partition(".")
                cited += 1
                assert section in parts, f"{path} cites DESIGN section {section}"
                assert not item or f"\n{item}. " in parts[section], f"{path} cites DESIGN {number}"
    assert cited > 20


def test_the_readme_is_short_and_begins_with_what_can_be_tried() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 130
    assert [" ".join(command.words) for command in commands(readme)[:2]] == ["make demo", "make test"]


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "gpu_check_h100.json").read_text())["runs"]
    (sizes,) = (run["steps"]["models"]["sizes"] for run in runs if "sizes" in run["steps"].get("models", {}))
    actual = next(size["contenders"] for size in sizes if size["size"] == [864, 576])
    ways = ("folded, kernels, graph", "folded, kernels, graph, fp8", "authors, eager")
    bf16, fp8, authors = (round(actual[way]["ms"]) for way in ways)
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"at 864x576 takes {bf16} ms in bf16 and {fp8} ms in fp8, where the authors' way takes {authors} ms" in said


def test_files_for_the_hosting_site_are_read() -> None:
    yaml = pytest.importorskip("yaml")
    read = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")}
    assert {"run": ".ci/run"} in read["ci.yml"]["jobs"]["run"]["steps"]
    for form in (read["bug.yml"], read["idea.yml"]):
        assert form["name"]
        assert all(field["attributes"]["label"] for field in form["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert [len(paper["authors"]) for paper in citation["references"]] == [9, 2]


def test_the_citation_has_both_papers() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "densegeo" / "__init__.py").read_text())
    assert version is not None
    assert f"\nversion: {version[1]}\n" in text
    for paper in ("2509.04338", "2412.00671"):
        assert f"arxiv.org/abs/{paper}" in text


def test_the_changelog_names_the_bundle_schema() -> None:
    from densegeo.runtime.bundle import SCHEMA_VERSION

    first = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert f"### Bundle schema\n\nVersion {SCHEMA_VERSION}." in first
    groups = re.findall(r"^### (.+)$", first, re.MULTILINE)
    assert set(groups) <= {"Bundle schema", "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert f"**Schema version {SCHEMA_VERSION}.**" in (ROOT / "docs" / "bundle.md").read_text()
