"""Write the reference pages of `docs/reference/` from the code: `make reference`.

Each page comes from the table that the program itself uses: the options from the configuration's
dataclasses, the HTTP interface from the route table and the models of its bodies, the metrics from
the table that names them. `tests/docs/test_reference.py` holds the committed pages to this.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints
from unittest.mock import MagicMock

from prometheus_client.core import Metric
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from api.config import ServerConfig
from api.engine_metrics import ENGINE_METRICS, SHARED_LABELS, EngineMetric
from api.http.account import Asked
from api.http.openapi import Route
from api.metrics import HTTPMetrics, Snapshot
from api.routes import routes
from longctx.bench import BENCHES
from longctx.config import EngineConfig
from longctx.options import _options
from longctx.request import Usage

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
GENERATED = "<!-- Written by `make reference` from the code; do not edit. -->"
REFERENCE = "#/components/schemas/{model}"


def main() -> None:
    """Writes every page into the repository."""
    FOLDER.mkdir(exist_ok=True)
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write(), encoding="utf-8")


# Options


def options_page() -> str:
    """Every option of every command, by the configuration it belongs to."""
    lines = [
        "# Options",
        GENERATED,
        "An option `--max-context` is also the environment variable `LONGCTX_MAX_CONTEXT` and the "
        "key `max_context` of the TOML file that `--config` (or `LONGCTX_CONFIG`) names. The "
        "command line wins over the environment, that over the file, that over the default. "
        "Unknown names are errors.",
        "`longctx serve` takes the options of the engine and of the server; `longctx ask`, "
        "`longctx chat` and all benchmarks but `eviction` and `check` those of the engine. "
        "`longctx COMMAND --help` lists them too.",
        "## The engine",
    ]
    for title, config in _groups(EngineConfig):
        lines += [f"### {title}", _options_table(config)]
    lines += ["## The server", _options_table(ServerConfig)]
    lines.append("## Benchmarks")
    used_by: dict[type, list[str]] = {}
    for name, bench in BENCHES.items():
        for config in bench.configs:
            used_by.setdefault(config, []).append(f"`longctx bench {name}`")
    for config, benches in used_by.items():
        if config is not EngineConfig:
            title = "Every benchmark" if len(benches) == len(BENCHES) else ", ".join(benches)
            lines += [f"### {title}", _options_table(config)]
    return _page(lines)


def _groups(config_type: Any) -> Iterator[tuple[str, type]]:
    """The nested configurations, each with a title: `CacheConfig` is `Cache`."""
    hints = get_type_hints(config_type)
    for field in fields(config_type):
        assert is_dataclass(hints[field.name]), f"{field.name} belongs to no group"
        yield hints[field.name].__name__.removesuffix("Config"), hints[field.name]


def _options_table(config_type: type) -> str:
    rows = []
    for option in _options(config_type):
        flag = f"`--{option.name.replace('_', '-')}`"
        if option.kind is bool:
            kind, default = "yes or no", "yes" if option.default else "no"
        else:
            kind = {int: "whole number", float: "number", str: "text", Path: "path"}[option.kind]
            default = "" if option.default in (None, ()) else f"`{option.default}`"
        if option.choices is not None:
            kind = " ".join(f"`{choice}`" for choice in option.choices)
        if option.many:
            kind += ", repeatable"
        rows.append((flag, kind, default, option.help))
    return _table(("option", "value", "default", "what"), rows)


# HTTP


def http_page() -> str:
    """Every route with its body, then every object that bodies are made of."""
    # Endpoints are made of the services; none is called, so anything stands for them.
    found = routes(MagicMock(config=ServerConfig()))
    lines = [
        "# HTTP interface",
        GENERATED,
        "The server describes itself at `/openapi.json`, and shows that at `/docs`. Where API keys "
        "are configured, every route but `/health` and the page at `/` wants `Authorization: "
        "Bearer KEY`. Errors have "
        'OpenAI\'s shape: `{"error": {"message", "type", "param", "code"}}`. Unknown fields are '
        "refused with 400.",
    ]
    for title, own in _by_subject(found):
        lines.append(f"## {title}")
        for route in own:
            lines.append(f"### {route.method} {route.path.replace(':path', '')}")
            lines.append(_first_paragraph(route.endpoint))
            lines += _body(route)
    models = list(dict.fromkeys(_models(found)))
    lines.append("## Bodies")
    for model in models:
        lines.append(f"### {model.__name__}")
        lines += _model(model)
    return _page(lines)


SUBJECTS = {
    "/v1/chat": "Chat and completions",
    "/v1/completions": "Chat and completions",
    "/v1/responses": "Responses",
    "/v1/messages": "Anthropic's messages",
    "/v1/files": "Files",
    "/v1/prompt_cache": "Stored prompts and schemas",
    "/v1beta": "Gemini's API",
    "/upload/v1beta": "Gemini's API",
}


def _by_subject(found: Sequence[Route]) -> Iterator[tuple[str, list[Route]]]:
    subjects: dict[str, list[Route]] = {
        title: [] for title in (*SUBJECTS.values(), "The server and its model")
    }
    for route in found:
        titles = (title for start, title in SUBJECTS.items() if route.path.startswith(start))
        subjects[next(titles, "The server and its model")].append(route)
    yield from subjects.items()


def _body(route: Route) -> Iterator[str]:
    body = route.described_body
    if body is None:
        return
    whether = "" if body.required else ", which may be left out"
    for media_type, kind in body.content.items():
        if isinstance(kind, type):
            yield f"Body{whether}: `{media_type}`, {_link(kind.__name__)}."
        elif "properties" in kind:
            yield f"Body{whether}: `{media_type}`."
            required = kind.get("required", ())
            rows = [
                (f"`{name}`", _type(schema), _needed(name in required, schema), _help(schema))
                for name, schema in kind["properties"].items()
            ]
            yield _table(("field", "value", "default", "what"), rows)
        else:
            yield f"Body{whether}: `{media_type}`. {_help(kind)}".rstrip()


def _models(found: Sequence[Route]) -> Iterator[type[BaseModel]]:
    """The models of all bodies and, after each, those that its fields refer to."""
    for route in found:
        if (body := route.described_body) is not None:
            for model in body.models():
                yield from _with_parts(model)


def _with_parts(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in _models_in(field.annotation):
            yield from _with_parts(part)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def _model(model: type[BaseModel]) -> Iterator[str]:
    _, schemas = models_json_schema([(model, "validation")], ref_template=REFERENCE)
    schema = schemas["$defs"][model.__name__]
    if "description" in schema:
        yield _one_line(schema["description"].partition("\n\n")[0])
    rows, neutral = [], []
    for name, field in model.model_fields.items():
        shown = field.alias or name
        if _is_neutral(field):
            neutral.append(f"`{shown}`")
            continue
        own = schema["properties"][shown]
        needed = _needed(shown in schema.get("required", ()), own)
        rows.append((f"`{shown}`", _type(own), needed, _help(own)))
    if rows:
        yield _table(("field", "value", "default", "what"), rows)
    if neutral:
        yield (
            "Known and not served, so accepted only with a value that asks for "
            f"nothing, such as null: {', '.join(neutral)}."
        )


def _is_neutral(field: FieldInfo) -> bool:
    return field.annotation is Any and any(isinstance(m, AfterValidator) for m in field.metadata)


def _needed(required: bool, schema: Any) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default is None else f"`{str(default).lower()}`"


def _help(schema: Any) -> str:
    return _one_line(schema.get("description", ""))


def _type(schema: Any) -> str:
    """A JSON schema in words, with links to the objects it refers to."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " ".join(f"`{choice}`" for choice in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            parts = (_type(part) for part in schema[key] if part.get("type") != "null")
            return " or ".join(dict.fromkeys(parts))
    match schema.get("type"):
        case "array":
            return f"list of {_type(schema['items'])}"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"object of {_type(schema['additionalProperties'])}"
        case "integer":
            return f"whole number{_bounds(schema)}"
        case "number":
            return f"number{_bounds(schema)}"
        case "boolean":
            return "`true` or `false`"
        case "string":
            return "file" if schema.get("format") == "binary" else "text"
        case None:
            return "anything"
        case kind:
            return str(kind)


def _bounds(schema: Any) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is None and most is None:
        return ""
    if most is None:
        return f", at least {least:,}"
    return f", at most {most:,}" if least is None else f", {least:,} to {most:,}"


def _link(model: str) -> str:
    return f"[{model}](#{model.lower()})"


# Metrics


def metrics_page() -> str:
    """Every metric of `GET /metrics`, as a scrape has it."""
    http = HTTPMetrics()
    http.requests.labels("", "", "").inc()  # a metric has its labels once it was counted
    http.seconds.labels("", "").observe(0)
    http.tokens(0.0, True, count=1)
    http.tokens(0.0, False, count=1)
    http.answered(_question())
    group: Any = SimpleNamespace(blocks_in_use=0, capacity_blocks=1)
    stats: Any = SimpleNamespace(groups=[group], prompt_tokens=0)
    info = dict.fromkeys(
        ("version", "model", "kv_codec", "device", "dtype", "attention_backend"), ""
    )
    served = Snapshot(
        stats=None, engine_state="ready", engine_restarts=0, ranks=1, documents={}, info=info
    )
    families = [
        family for collector in (*http.collectors(), served) for family in collector.collect()
    ] + list(served.derived(stats))
    return _page(
        [
            "# Metrics",
            GENERATED,
            "`GET /metrics` is for Prometheus; where there are API keys it wants one. Figures are "
            "of all tenants together. The label `tier` is `device`, `host` or `disk`. What begins "
            "with `longctx:` has the name and the meaning that it has in vLLM, for dashboards that "
            "exist: with `--metrics-prefix vllm` it begins with `vllm:`. "
            "[docs/grafana.json](../grafana.json) is a dashboard for Grafana.",
            _table(
                ("metric", "kind", "labels", "what"),
                (*map(_metric, families), *map(_engine_metric, ENGINE_METRICS)),
            ),
        ]
    )


def _metric(family: Metric) -> tuple[str, str, str, str]:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
    return f"`{name}`", family.type, _names(labels), family.documentation


def _engine_metric(metric: EngineMetric) -> tuple[str, str, str, str]:
    begin, own = ("longctx:", SHARED_LABELS) if metric.shared else ("longctx_", ())
    return f"`{begin}{metric.name}`", metric.kind, _names((*own, *metric.labels)), metric.help


def _question() -> Asked:
    """Makes a question that has ended: a metric has its labels once it was counted."""
    usage = Usage(
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=1,
        computed_tokens=1,
        queue_seconds=0.0,
    )
    return Asked("", began=0.0, first_token=0.0, last_token=0.0, ended=0.0, usage=usage)


def _names(labels: Iterable[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels if label != "le")


# Pages


def _first_paragraph(endpoint: Callable[..., Any]) -> str:
    documented = inspect.getdoc(endpoint)
    assert documented, f"{endpoint.__qualname__} has no docstring"
    return _one_line(documented.partition("\n\n")[0])


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without columns that are empty; a vertical bar in a cell is escaped."""
    columns = [
        [heading, "---", *cells]
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True)
        if any(cells)
    ]
    lines = (
        " | ".join(cell.replace("|", r"\|") for cell in row) for row in zip(*columns, strict=True)
    )
    return "\n".join(f"| {line} |" for line in lines)


def _page(blocks: Iterable[str]) -> str:
    return "\n\n".join(blocks) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "options.md": options_page,
    "http.md": http_page,
    "metrics.md": metrics_page,
}

if __name__ == "__main__":
    main()
