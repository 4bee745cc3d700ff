"""Logs as one JSON object a line on standard error, and the ids that tell requests apart in them."""

from __future__ import annotations

import logging
import re
import secrets
import sys
from datetime import datetime, timezone

import msgspec

from densegeo.notices import Heard

log = logging.getLogger("densegeo.serving")

FIELDS = "densegeo_fields"  # the attribute of a log record that holds further fields
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, message; the record's fields; and the traceback, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class RequestWarnings(Heard):
    """What is warned of while a request is answered belongs to it; anything else becomes a line of its own."""

    def _warned(self, text: str) -> None:
        if self._subject.get(None) is None:
            log.warning(text)
        else:
            self._take(text)


WARNINGS = RequestWarnings()


def start_logging() -> None:
    """Everything of densegeo, and warnings of the libraries, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("densegeo").setLevel(logging.INFO)


def request_id(sent: str | None) -> str:
    """The client's own X-Request-ID where it is printable and short, else a new one."""
    return sent if sent and _ID.fullmatch(sent) else secrets.token_hex(8)
