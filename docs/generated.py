"""Reference pages that are generated from the code, each time the documentation is built.

A hook of MkDocs; `mkdocs.yml` names it.  The command line describes itself (Typer), and so do the
routes (OpenAPI), the settings (pydantic) and the metrics (Prometheus' text format).
"""

from __future__ import annotations

import html
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those that are written."""
    pages = {
        "cli": command_line, "rest": rest, "export": export, "settings": settings,
        "metrics": metrics,
    }  # fmt: skip
    for name, page in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def command_line() -> str:
    """Every command and its options."""
    done = subprocess.run(
        [sys.executable, "-m", "typer", "nas.cli.main", "utils", "docs", "--name", "einsum-nas"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = html.unescape(done.stdout)
    # angle brackets are names of types here, which Markdown would take for tags
    text = text.replace("<str>", "TEXT").replace("<float>", "NUMBER")
    return text.replace("# `einsum-nas`", "# Command line\n\n`einsum-nas`:", 1)


def _table(*rows: tuple[str, ...]) -> Iterator[str]:
    """A table whose first row is its head."""
    for i, row in enumerate(rows):
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
        if i == 0:
            yield f"|{'---|' * len(row)}"
    yield ""


def export() -> str:
    """Every column of exported files."""
    from nas.service.export import ROWS, columns_of

    lines = [
        "# Exported files", "",
        "What `einsum-nas export` writes as CSV, Parquet or JSON. Missing values are missing: "
        "null, and in CSV an empty field without quotes.", "",
    ]  # fmt: skip
    for rows in ROWS:
        table = [("column", "unit", "meaning")]
        table += [(f"`{c.name}`", c.unit or "", c.meaning) for c in columns_of(rows, "the task's")]
        lines += [f"## Rows of `--rows {rows}`", "", *_table(*table)]
    return "\n".join(lines)


def settings() -> str:
    """Every environment variable with its type, default and meaning."""
    from nas.settings import Settings

    rows = [("variable", "default", "meaning")]
    for name, field in Settings.model_fields.items():
        default = "none" if field.default in (None, (), {}) else f"`{field.default}`"
        rows.append((f"`EINSUM_NAS_{name.upper()}`", default, field.description or ""))
    return "\n".join(
        [
            "# Settings", "",
            "Environment variables. The defaults run everything on one machine.", "",
            *_table(*rows),
            "`EINSUM_NAS_SECRETS_DIR` names a folder whose files, named as these variables, stand "
            "for them. `RAY_ADDRESS` names an existing Ray cluster; without it a worker starts a "
            "Ray of its own.", "",
        ]
    )  # fmt: skip


def metrics() -> str:
    """Every metric of the service and of workers with its labels and meaning."""
    from fastapi.testclient import TestClient
    from prometheus_client import generate_latest

    from api.app import create_app
    from nas.settings import Settings
    from workers.metrics import REGISTRY

    with tempfile.TemporaryDirectory() as home:
        with TestClient(create_app(Settings(home=Path(home))), "http://127.0.0.1") as client:
            # a series of requests is there once there was one, and a tenant's once it has a search
            client.post("/v1/searches", json={"train_flops": 1e12}).raise_for_status()
            service = client.get("/metrics").text
    worker = generate_latest(REGISTRY).decode()
    return "\n".join(
        [
            "# Metrics", "", "In Prometheus' text format.", "",
            "## The service", "", "`/metrics` of the REST service:", "", *_families(service),
            "## A worker", "",
            "`/metrics` of each worker whose `EINSUM_NAS_METRICS_PORT` is set, on "
            "`EINSUM_NAS_HOST`:", "", *_families(worker),
        ]
    )  # fmt: skip


def _families(text: str) -> Iterator[str]:
    from prometheus_client.parser import text_string_to_metric_families

    rows = [("metric", "type", "labels", "meaning")]
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("einsum_nas") or family.name.endswith("_created"):
            continue
        labels = {name: None for sample in family.samples for name in sample.labels if name != "le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(
            (f"`{name}`", family.type, ", ".join(f"`{n}`" for n in labels), family.documentation)
        )
    return _table(*rows)


def rest() -> str:
    """Every operation of the OpenAPI document, and the schemas of what it takes and gives."""
    from api.app import create_app
    from nas.settings import Settings

    document = create_app(Settings()).openapi()
    lines = [
        "# REST", "",
        "A running service describes the same as OpenAPI at `/openapi.json`. Errors are "
        "`application/problem+json`; those about input have `field`, `value` and `accepted`. Lists "
        "are paginated: pass `next` as `cursor`. Unknown fields and parameters, repeated ones, "
        "numbers that are not finite and bodies that are not JSON are refused.", "",
    ]  # fmt: skip
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += [f"## `{method.upper()} {path}`", "", f"{operation['summary']}.", ""]
            lines += _operation(operation)
    lines += ["# Schemas", ""]
    for name, schema in document["components"]["schemas"].items():
        lines += [f"## {name}", "", *filter(None, [schema.get("description")]), ""]
        lines += _fields(schema)
    return "\n".join(lines)


def _operation(operation: dict[str, Any]) -> Iterator[str]:
    parameters = [
        (f"`{p['name']}`", p["in"], _type(p["schema"]), p.get("description", ""))
        for p in operation.get("parameters", ())
    ]
    if parameters:
        yield from _table(("parameter", "in", "type", "meaning"), *parameters)
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        yield "Body:"
        yield ""
        yield from _fields(body["schema"])
    answers = []
    for status, answer in sorted(operation["responses"].items()):
        schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
        answers.append((status, answer["description"], _type(schema)))
    yield from _table(("status", "meaning", "body"), *answers)


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    rows = [("field", "type", "default", "meaning")]
    for name, field in schema.get("properties", {}).items():
        needed = name in schema.get("required", ())
        default = "required" if needed else f"`{field['default']}`" if "default" in field else ""
        rows.append((f"`{name}`", _type(field), default, field.get("description", "")))
    return _table(*rows)


def _type(schema: dict[str, Any]) -> str:
    """In a few words, with links to schemas."""
    if reference := schema.get("$ref"):
        name = str(reference).rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if choices := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{choice}`" for choice in choices)
    if several := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_type(one) for one in several))
    kind = str(schema.get("type", ""))
    if kind == "array":
        return f"list of {_type(schema.get('items', {})) or 'values'}"
    bounds = [
        f"{sign} {schema[name]:g}"
        for name, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")
        )
        if name in schema
    ]  # fmt: skip
    return ", ".join([kind, *bounds]) if kind else ""
