"""In which form graphs are written: the backend's own, or the one that was the fastest on this CPU.

`densegeo build --tune` races them (`export.form_race`). The result is kept among the records of this machine, and later
builds take it.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from densegeo.backends import FORMS, BackendRow, Form, backend_row, installed_version
from densegeo.export.build_options import BuildOptions
from densegeo.export.display import Display
from densegeo.export.form_race import Work, race
from densegeo.files import atomic_write, read_record
from densegeo.models.config import VAEConfig
from densegeo.models.rewrites import UPSAMPLE
from densegeo.processor import whole_cpu
from densegeo.runtime import state

FOLDER = "forms"  # among what is remembered of this machine
log = logging.getLogger("densegeo")


class TunedForm(msgspec.Struct, frozen=True, kw_only=True):
    """What a race found, and of what it was. form: in words; milliseconds: medians, by form."""

    form: str
    milliseconds: dict[str, float]
    backend: str
    base: str
    work: Work


def choose(options: BuildOptions, config: VAEConfig, display: Display) -> Form | None:
    """The form that was the fastest on this CPU, raced now where it was not yet and the options say so.

    None: the backend's own, where nothing is known, nothing can be raced, or the options say so. Raises ExportError and
    ResourceError, see `race`.
    """
    if options.tune is False or options.not_tunable() or len(config.ch_mult) == 1:
        return None
    row, work = backend_row(options.backend), Work.of(config, options.sizes[0])
    tuned = remembered(row, options.base, work)
    if tuned is not None and options.tune:
        display.say(f"tuning: done before; to do it again, remove {_file(row, options.base, work)}")
    elif options.tune:
        form, milliseconds = race(row, options.base, work, display)
        for words, median in milliseconds.items():
            display.say(f"tuning: {median:.3g} ms, {words}")
        tuned = TunedForm(form=str(form), milliseconds=milliseconds, backend=row.name, base=options.base, work=work)
        remember(tuned)
    return None if tuned is None else next(form for form in FORMS if str(form) == tuned.form)


def in_words(options: BuildOptions) -> str:
    """How graphs are written and why so, for people; empty where nothing was chosen."""
    if options.form is not None:
        return f"{options.form}: the fastest on this CPU (--no-tune takes the backend's own)"
    row = backend_row(options.backend)
    if row.form == Form():
        return ""
    hint = "" if options.not_tunable() else "; --tune measures on this one"
    form = f"norms by {row.form.norms}" if UPSAMPLE.name in options.without else str(row.form)
    return f"{form}: {row.title}'s own form, measured on other machines{hint}"


def remembered(row: BackendRow, base: str, work: Work) -> TunedForm | None:
    """What the last race on this machine found. Another version of the library is another race."""
    tuned = read_record(_file(row, base, work), TunedForm)
    return tuned if tuned is not None and tuned.form in map(str, FORMS) else None


def remember(tuned: TunedForm) -> None:
    """A state that cannot be written is no error, and is said."""
    path = _file(backend_row(tuned.backend), tuned.base, tuned.work)
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_bytes(msgspec.json.encode(tuned))
    except OSError as error:
        log.warning("later builds will not know which form was the fastest: %s cannot be written: %s", path, error)


def _file(row: BackendRow, base: str, work: Work) -> Path:
    packages = (package for group in row.distributions for package in group)
    versions = [f"{package} {version}" for package in packages if (version := installed_version(package))]
    key = [row.name, *versions, base, work, state.machine(), whole_cpu()]
    return state.folder(FOLDER) / f"{hashlib.sha256(msgspec.json.encode(key)).hexdigest()}.json"
