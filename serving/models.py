"""A served model: a bundle's directory under a name, the estimator over it, and how a newer one takes its place."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from densegeo.errors import BundleError, ConfigError, NotReadyError
from densegeo.files import writable_by_others
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import MANIFEST

log = logging.getLogger("densegeo.serving")

Open = Callable[[Path], Estimator]


def version_of(estimator: Estimator) -> str:
    """A bundle's version in an address: its build key's first digits."""
    return estimator.manifest.build_key[:12]


def given_name(name: str) -> str:
    """A model's name as it is. Raises ConfigError where no address can hold it."""
    if not _is_name(name):
        raise ConfigError(
            f"{name!r} is no name of a model: use letters, digits, dots, dashes and underscores, and begin with a "
            "letter or a digit."
        )
    return name


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None


def model_name(directory: Path) -> str:
    """The name under which a bundle is served: its folder's. Raises ConfigError where no address can hold it."""
    name = directory.absolute().name
    if not _is_name(name):
        raise ConfigError(
            f"A model is named after its bundle's folder, and {name!r} is no name for an address: rename the "
            "folder to letters, digits, dots, dashes and underscores."
        )
    return name


class _Loaded:
    """An estimator, and how many requests are being handed to it."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator, self.users, self.retired = estimator, 0, False


class Model:
    """name: the directory's. opens: makes the estimator of a bundle's directory."""

    def __init__(self, directory: Path, opens: Open) -> None:
        # not resolved: a link `current` that is pointed elsewhere keeps its name
        self.name, self.directory, self._open = model_name(directory), directory, opens
        self._loading = threading.Lock()  # one load at a time
        self._lock = threading.Lock()  # guards what follows
        self._loaded: _Loaded | None = None
        self.reason = "not loaded yet"
        self.enabled = True  # until it is unloaded on request

    @property
    def current(self) -> Estimator | None:
        """The estimator of new requests; None while there is none."""
        with self._lock:
            return None if self._loaded is None else self._loaded.estimator

    @property
    def version(self) -> str:
        """Of the bundle that answers now; empty while there is none."""
        current = self.current
        return "" if current is None else version_of(current)

    @contextmanager
    def lease(self) -> Iterator[Estimator]:
        """The estimator for one request, from its reading to its result: it is not closed meanwhile.

        Raises NotReadyError.
        """
        with self._lock:
            loaded = self._loaded
            if loaded is None:
                raise NotReadyError(f"The model {self.name} is not loaded: {self.reason}.")
            loaded.users += 1
        try:
            yield loaded.estimator
        finally:
            with self._lock:
                loaded.users -= 1
                unused = loaded.retired and loaded.users == 0
            if unused:
                _close_later(loaded)

    def load(self) -> None:
        """Open the directory's bundle and put it in the old one's place, which ends what it has accepted.

        When that fails the old one stays. For a moment both are in memory. Raises BundleError and its kinds, for one
        that others could have written too, BackendError.
        """
        with self._loading:
            self.enabled = True
            require_own(self.directory)
            self._exchange(_Loaded(self._open(self.directory)), "")

    def unload(self) -> None:
        """Take no more requests; what was accepted is finished."""
        with self._loading:
            self.enabled = False
            self._exchange(None, "it was unloaded")

    def close(self) -> None:
        """Finish what was accepted and release the bundle. Waits."""
        with self._lock:
            loaded, self._loaded, self.reason = self._loaded, None, "the server is ending"
        if loaded is not None:
            loaded.estimator.close()

    def _exchange(self, new: _Loaded | None, reason: str) -> None:
        with self._lock:
            old, self._loaded, self.reason = self._loaded, new, reason
            if old is not None:
                old.retired = True
            unused = old is not None and old.users == 0
        if unused and old is not None:
            _close_later(old)


def open_models(directories: Sequence[Path], opens: Open) -> dict[str, Model]:
    """One model a directory, by name, not loaded yet. Raises ConfigError for two of one name."""
    models: dict[str, Model] = {}
    for directory in directories:
        model = Model(directory, opens)
        if model.name in models:
            raise ConfigError(
                f"Two bundles are called {model.name}: {models[model.name].directory} and {directory}. Rename one's "
                "folder."
            )
        models[model.name] = model
    return models


def require_own(directory: Path) -> None:
    """Raises BundleError for a bundle that others than this user and root could have written."""
    for path in (directory, directory / MANIFEST):
        try:
            reason = writable_by_others(path)
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read: {error.strerror or error}. Name a bundle's directory."
            ) from error
        if reason is not None:
            raise BundleError(f"{path} {reason}. A server runs what its bundle says, so it opens no such bundle.")


def _close_later(loaded: _Loaded) -> None:
    """Finish and release an estimator that takes no more requests, in a thread of its own."""

    def close() -> None:
        try:
            loaded.estimator.close()
        except Exception:
            log.exception("closing a replaced bundle failed")

    threading.Thread(target=close, name="densegeo-retire", daemon=True).start()
