"""The parts of the pages that are made: tables of measurements, claims and the code's rows, and commands' options.

    python docs/tools/pages.py            # renew them
    python docs/tools/pages.py --check    # exit with 1 and name the pages that are not what this gives

A part lies between `<!-- name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping

import autoencoder
import claims
import measurements
import rows
from tables import ROOT

from densegeo.files import atomic_write

DOCS = ROOT / "docs"
# Page -> part -> what makes its lines.
PARTS: Mapping[str, Mapping[str, Callable[[], list[str]]]] = {
    "benchmarks.md": {
        "h100": measurements.h100,
        "fiffdepth-builds": measurements.fiffdepth_builds,
        "fiffdepth-speed": measurements.fiffdepth_speed,
        "autoencoder-kinds": autoencoder.kinds,
        "autoencoder-convolutions": autoencoder.convolutions,
        "accuracy": measurements.accuracy,
        "runs": measurements.runs,
    },
    "bundle.md": {"inspected": rows.inspected, "records": rows.records},
    "checkpoints.md": {"licences": rows.licences},
    "commands.md": {"commands": rows.commands},
    "precisions.md": {
        "precisions": rows.precisions,
        "quantization": measurements.quantization,
        "fullsize": measurements.fullsize,
    },
    "rewrites.md": {
        "rewrites": measurements.rewrites,
        "forms": autoencoder.forms,
        "count": autoencoder.count,
        "comparisons": measurements.comparisons,
    },
    "tensorrt.md": {"engines": measurements.engines},
    "verification.md": {"claims": claims.every},
}


def renewed(page: str, text: str) -> str:
    """The page's text with its parts made anew; exits where it has no place for one."""
    for name, make in PARTS[page].items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            sys.exit(f"docs/{page} has no place for <!-- {name} -->")
        part = "\n" + "\n".join(make()).strip("\n") + "\n\n"
        text = marked.sub(lambda match, part=part: match[1] + part + match[2], text)
    return text


def main(check: bool) -> int:
    stale = []
    for page in PARTS:
        path = DOCS / page
        old = path.read_text(encoding="utf-8")
        new = renewed(page, old)
        if new == old:
            continue
        stale.append(page)
        if not check:
            with atomic_write(path) as partial:
                partial.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'stale' if check else 'renewed'}: {', '.join(stale)}")
    if stale and check:
        print("`python docs/tools/pages.py` renews them")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
