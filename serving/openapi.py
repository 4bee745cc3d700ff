"""The description at /docs and /openapi.json, made from the table of routes and the types that it names."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from typing import Any

import msgspec

from densegeo import __version__
from densegeo.serving import plain
from densegeo.serving.answers import Error
from densegeo.serving.failures import FAILURES
from densegeo.serving.metric_options import Metres
from densegeo.serving.routes import HEADER_LENGTH, ROWS, Row

_REF = "#/components/schemas/{name}"


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    types = [kind for row in ROWS for kind in (row.takes, row.gives) if _is_json(kind)]
    schemas, components = msgspec.json.schema_components([*types, Error, plain.Fields, Metres], ref_template=_REF)
    by_type = dict(zip(map(repr, types), schemas, strict=False))
    paths: dict[str, Any] = {}
    for row in ROWS:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "densegeo", "version": __version__, "description": "Depth and normals of pictures."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {"Error": {"description": _failures(), "content": _json({"$ref": _REF.format(name="Error")})}},
        },
    }


def page() -> str:
    """The same for people: one HTML page that loads the page's style and nothing else."""
    described = document()
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>densegeo: what it answers</title>',
        '<link rel="stylesheet" href="/page/style.css"></head><body class="docs"><main>',
        f"<h1>densegeo {escape(__version__)}</h1>",
        '<p>As <a href="/openapi.json">OpenAPI</a>. <a href="/">The page.</a></p>',
    ]
    for row in ROWS:
        parts.append(f"<section><h2><code>{row.method} {escape(row.path)}</code></h2><p>{escape(row.summary)}</p>")
        operation = described["paths"][row.path][row.method.lower()]
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            parts.append(f"<h3>Takes <code>{escape(kind)}</code></h3>{_table(content['schema'], described)}")
        for kind, content in operation["responses"]["200"].get("content", {}).items():
            says = escape(content.get("x-says", ""))
            parts.append(f"<h3>Gives <code>{escape(kind)}</code> {says}</h3>{_table(content['schema'], described)}")
        parts.append("</section>")
    parts.append(f"<section><h2>Errors</h2><p>{escape(_failures())}</p></section></main></body></html>")
    return "".join(parts)


def _operation(row: Row, schemas: dict[str, Any]) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", row.path)
    operation: dict[str, Any] = {
        "summary": row.summary,
        "operationId": f"{row.name}{'_version' if 'version' in names else ''}",
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names],
        "responses": {"200": {"description": row.summary}, "default": {"$ref": "#/components/responses/Error"}},
    }
    if not row.open:
        operation["security"] = [{}, {"token": []}]
    if row.takes is plain.Fields:
        operation["requestBody"] = {"required": True, "content": {plain.FORM: {"schema": _form()}}}
        operation["responses"]["200"]["content"] = {
            answer.media_type: {"schema": {"type": "string", "format": "binary"}, "x-says": answer.text}
            for answer in plain.ANSWERS
        }
        return operation
    if row.takes is not None:
        operation["requestBody"] = {"content": _json(schemas[repr(row.takes)])}
    if row.gives is not None:
        operation["responses"]["200"]["content"] = _json(schemas[repr(row.gives)])
    if row.name == "infer":
        operation["parameters"].append(
            {
                "name": HEADER_LENGTH,
                "in": "header",
                "schema": {"type": "integer"},
                "description": "Of the JSON before bytes.",
            }
        )
        for content in (operation["requestBody"]["content"], operation["responses"]["200"]["content"]):
            content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return operation


def _form() -> dict[str, Any]:
    return {
        "allOf": [
            {
                "type": "object",
                "properties": {
                    plain.IMAGE: {"type": "string", "format": "binary", "description": "The encoded picture."}
                },
                "required": [plain.IMAGE],
            },
            {"$ref": _REF.format(name="Fields")},
            {"$ref": _REF.format(name="Metres")},
        ]
    }


def _is_json(kind: Any) -> bool:
    return kind is not None and kind is not plain.ANSWERS


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _failures() -> str:
    """Statuses and the names of the errors that are answered with them."""
    by_status: dict[int, list[str]] = {}
    for kind, failure in FAILURES:
        by_status.setdefault(failure.status, []).append(kind.__name__)
    return "; ".join(f"{status}: {', '.join(names)}" for status, names in sorted(by_status.items()))


def _table(schema: dict[str, Any], described: dict[str, Any]) -> str:
    """Fields of an object, resolved one level deep."""
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(field))}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in _fields(schema, described)
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _fields(schema: dict[str, Any], described: dict[str, Any]) -> list[tuple[str, Any]]:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _fields(described["components"]["schemas"][name], described)
    inner = [schema["items"]] if schema.get("type") == "array" else schema.get("allOf", [])
    return [*schema.get("properties", {}).items(), *(pair for part in inner for pair in _fields(part, described))]


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "anyOf" in field:
        return " or ".join(_kind(part) for part in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if isinstance(field.get("items"), dict) else "list"
    return str(field.get("type", "any"))
