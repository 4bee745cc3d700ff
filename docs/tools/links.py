"""A hook of MkDocs: pages of the site that lie outside docs/, and links to the repository's other files.

Pages link to files as they lie in the repository, so that they can be read there. On the site a link to another page
leads to that page, a link to any other file to the repository; a link to nothing is a warning, which
`mkdocs build --strict` does not let pass.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LOG = logging.getLogger("mkdocs.hooks.links")
# Files outside docs/ -> where they lie on the site.
CARRIED = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "models/weights/fe2e-tiny/demo.jpg": "images/demo.jpg",
}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    for source, target in CARRIED.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, **_: Any) -> str:
    here = page.file.src_uri
    source = {target: source for source, target in CARRIED.items()}.get(here, f"docs/{here}")

    def led(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return f"{match[1]}{address(path, here, source, config.repo_url)}{match[3] or ''}{match[4]}"

    parts, last = [], 0
    for code in CODE.finditer(markdown):  # left as it is
        parts += [LINK.sub(led, markdown[last : code.start()]), code[0]]
        last = code.end()
    return "".join([*parts, LINK.sub(led, markdown[last:])])


def address(path: str, here: str, source: str, repository: str) -> str:
    """Where a link to `path`, below the repository's root, leads from the site's page `here`."""
    if not (ROOT / path).exists():
        LOG.warning("%s links to %s, which does not exist", source, path)
    target = CARRIED.get(path)
    if target is None and path.startswith("docs/") and not path.startswith("docs/tools"):
        target = path.removeprefix("docs/")
    if target is None:
        return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    return posixpath.relpath(target, posixpath.dirname(here) or ".")
