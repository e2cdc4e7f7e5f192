"""`/docs`: the API for people, made from the OpenAPI document; one page without scripts, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any, NamedTuple

# Stands in the commands for the address under which a reader has come.
ORIGIN = "http://127.0.0.1:8000"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
h2 { margin-top: 2.5rem; border-top: 1px solid; padding-top: 1rem; overflow-wrap: anywhere; }
"""


class DocsPage(NamedTuple):
    """The page and the policy that lets its own style through, and nothing else."""

    html: str
    content_security_policy: str

    def at(self, origin: str) -> str:
        """The page whose commands call the service at `origin`."""
        return self.html.replace(ORIGIN, escape(origin))


def docs_page(openapi: dict[str, Any]) -> DocsPage:
    """The page of an OpenAPI document."""
    parts = [
        f"<h1>{escape(openapi['info']['title'])} {escape(openapi['info']['version'])}</h1>",
        f"<p>{escape(openapi['info']['description'])}</p>",
        '<p><a href="/openapi.json">openapi.json</a> · <a href="/">the page</a></p>',
    ]
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(method.upper(), path, operation))
    parts.append("<h2>Schemas</h2>")
    for name, schema in openapi["components"]["schemas"].items():
        text = escape(json.dumps(schema, indent=2, ensure_ascii=False))
        parts.append(f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>')
        parts.append(f"<pre>{text}</pre></details>")
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>numpyesm API</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; frame-ancestors 'none'"
    return DocsPage(html, policy)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"]
    for parameter in operation.get("parameters", []):
        allowed = ", ".join(f"<code>{escape(value)}</code>" for value in parameter["schema"].get("enum", []))
        parts.append(f"<p><code>{escape(parameter['name'])}</code>: {allowed}</p>")
    if body := operation.get("requestBody"):
        content = body["content"]["application/json"]
        example = json.dumps(content["example"])
        slug = operation["parameters"][0]["schema"]["enum"][0]
        address = f"{ORIGIN}{path.replace('{slug}', slug)}"
        command = f"curl {address} -H 'Content-Type: application/json' \\\n  -d '{example}'"
        name = content["schema"]["$ref"].rpartition("/")[2]
        parts.append(f'<p>Body: <a href="#{escape(name)}">{escape(name)}</a></p><pre>{escape(command)}</pre>')
    rows = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    parts.append(f"<table><tr><th>Status</th><th></th></tr>{rows}</table>")
    return "\n".join(parts)
