"""`GET /metrics`: every figure has a name, a unit and help, and a scrape disturbs nobody."""

import dataclasses
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from api.config import ServerConfig
from api.engine_metrics import ENGINE_METRICS
from longctx.engine_stats import ClassStats, EngineStats, GroupStats, RingStats, SchedulerStats
from longctx.ipc.protocol import Done, decode_event, encode
from longctx.request import SOURCES, FinishReason
from offload.stats import Cleared, StoreStats, TierStats
from tests.api.live_server import MODEL, LiveServer
from tests.api.test_restart import engine_process
from tests.support.waiting import patient, wait_for


def families(server: LiveServer) -> dict[str, Metric]:
    answer = server.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(server: LiveServer, family: str, **labels: str) -> float:
    """Of the samples that carry these labels, together."""
    found = families(server).get(family)
    return sum(
        sample.value
        for sample in (found.samples if found else ())
        if labels.items() <= sample.labels.items()
        and sample.name in (family, f"{family}_total", f"{family}_count")
    )


def complete(server: LiveServer, prompt: str | list[int]) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True}  # always two tokens
    return server.http.post("/v1/completions", json=body)


def test_names_and_help_follow_the_conventions(server: LiveServer) -> None:
    complete(server, "The boats come back.")
    told = families(server)
    assert len(told) > 25
    for name, family in told.items():
        assert name.startswith(("longctx_", "longctx:")), name
        assert family.documentation, name
        assert (family.type == "counter") == any(
            sample.name.endswith("_total") for sample in family.samples
        ), name
    assert {"device"} == {s.labels["tier"] for s in told["longctx_kv_capacity_bytes"].samples}
    (info,) = told["longctx_info"].samples
    assert info.labels["device"] == "cpu" and info.labels["model"]


def test_tokens_and_requests_are_counted(server: LiveServer) -> None:
    names = (
        "longctx:prompt_tokens",
        "longctx:prefix_cache_hits",
        "longctx:generation_tokens",
        "longctx:prefix_cache_queries",
        "longctx:time_to_first_token_seconds",
        "longctx:inter_token_latency_seconds",
        "longctx:e2e_request_latency_seconds",
        "longctx:request_queue_time_seconds",
        "longctx:request_prefill_time_seconds",
        "longctx:request_decode_time_seconds",
        "longctx:request_prompt_tokens",
        "longctx:request_generation_tokens",
    )
    prompt = [5 + i * 37 % 500 for i in range(200)]
    before = [value(server, name) for name in names]
    ended = value(server, "longctx_requests", reason="length")
    successes = value(server, "longctx:request_success", finished_reason="length", model_name=MODEL)
    for _ in range(2):
        assert complete(server, prompt).status_code == 200
    gained = [value(server, name) - was for name, was in zip(names, before, strict=True)]
    assert gained == [400, 192, 4, 400, *[2] * 8]
    assert value(server, "longctx_requests", reason="length") == ended + 2
    now = value(server, "longctx:request_success", finished_reason="length", model_name=MODEL)
    assert now == successes + 2
    usage = value(server, "longctx:kv_cache_usage_perc", model_name=MODEL)
    assert 0 <= usage <= 1


def test_http_requests_are_counted_by_route_and_status(server: LiveServer) -> None:
    seen = ("/v1/completions", "200"), ("/v1/files/{file_id}", "404"), ("none", "404")
    before = [value(server, "longctx_http_requests", route=r, status=s) for r, s in seen]
    complete(server, "a")
    server.http.get("/v1/files/file-0")
    server.http.get("/v1/secret/path")
    after = [value(server, "longctx_http_requests", route=r, status=s) for r, s in seen]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
    assert "secret" not in server.http.get("/metrics").text
    assert value(server, "longctx_http_request_seconds", route="/v1/completions") >= 1


def test_documents_are_counted_by_state(server: LiveServer) -> None:
    before = families(server)["longctx_documents"].samples
    assert {s.labels["state"] for s in before} == {"queued", "processing", "ready", "error"}
    server.http.post("/v1/files", files={"file": ("a.txt", b"A story. " * 50)}).raise_for_status()
    # Of one answer: a document changes its state from one to the next
    after = families(server)["longctx_documents"].samples
    assert sum(s.value for s in after) == sum(s.value for s in before) + 1


def test_every_tier_has_its_label(model_folder: Path, tmp_path: Path) -> None:
    cache = {"host_pool_gib": 0.02, "kv_dir": tmp_path / "kv", "disk_cap_gib": 0.5}
    with LiveServer(model_folder, tmp_path / "store", cache=cache) as server:
        told = families(server)
        for name in ("bytes", "capacity_bytes", "blocks", "hits", "misses", "evictions"):
            tiers = {sample.labels["tier"] for sample in told[f"longctx_kv_{name}"].samples}
            assert tiers == {"device", "host", "disk"}, name
        reasons = {s.labels["reason"] for s in told["longctx_kv_evictions"].samples}
        assert reasons == {"cap", "space", "ttl"}
        assert told["longctx_kv_checksum_failures"].samples[0].labels == {"tier": "disk"}
        incidents = {s.labels["kind"] for s in told["longctx_kv_incidents"].samples}
        assert "read_errors" in incidents and "corrupt_files" not in incidents


def test_openmetrics_is_spoken_to_who_asks_for_it(server: LiveServer) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = server.http.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_scrapes_do_not_change_an_answer(server: LiveServer) -> None:
    body = {"prompt": "The name of the ship is", "max_tokens": 40, "temperature": 0.0}
    alone = server.http.post("/v1/completions", json=body).json()["choices"]
    over = threading.Event()

    def scrape() -> None:
        while not over.is_set():
            httpx.get(f"{server.url}/metrics").raise_for_status()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        assert server.http.post("/v1/completions", json=body).json()["choices"] == alone
    finally:
        over.set()
        thread.join(patient())


def test_a_scrape_while_the_engine_restarts_tells_the_rest(
    model_folder: Path, tmp_path: Path
) -> None:
    with LiveServer(model_folder, tmp_path, served_name=MODEL) as server:
        assert value(server, "longctx_engine_state", state="ready") == 1
        os.kill(engine_process(server), signal.SIGKILL)
        wait_for(lambda: value(server, "longctx_engine_state", state="restarting"))
        told = families(server)
        assert "longctx_http_requests" in told and "longctx_steps" not in told
        wait_for(lambda: value(server, "longctx_engine_state", state="ready"))
        assert "longctx_steps" in families(server)


TIER = TierStats(
    held_bytes=0,
    capacity_bytes=0,
    blocks=0,
    blocks_in_use=0,
    hits=0,
    misses=0,
    evictions={"cap": 0, "space": 0, "ttl": 0},
    read_bytes=0,
    read_seconds=0.0,
    write_bytes=0,
    write_seconds=0.0,
    extents=0,
    extents_written=0,
    corrupt_files=0,
    quarantine_files=0,
    quarantine_bytes=0,
    writes_off=False,
    incidents={"read_errors": 0},
)
STATS = EngineStats(
    requests_running=0,
    requests_waiting=0,
    requests_ended=dict.fromkeys(FinishReason, 0),
    prompt_tokens=0,
    cached_tokens=0,
    prompt_tokens_by_source=dict.fromkeys(SOURCES, 0),
    generated_tokens=0,
    steps=0,
    step_seconds={"attention": 0.0},
    computed_tokens=0,
    preemptions=0,
    scheduler=SchedulerStats(
        target_step_seconds=0.0,
        step_seconds=0.0,
        predicted_seconds=0.0,
        prediction_error=0.0,
        seconds_per={"step": 0.0},
        classes={
            "batch": ClassStats(running=0, waiting=0, prompt_tokens_left=0, share_seconds_left=0.0)
        },
        tenants=0,
    ),
    documents_open=0,
    modules_open=0,
    document_tiers={},
    prefixes_held=0,
    raw_blocks_in_use=0,
    groups=(GroupStats(capacity_blocks=0, blocks_in_use=0),) * 2,
    device=TIER,
    store=StoreStats(
        tiers={"host": TIER, "disk": TIER},
        queued_bytes=0,
        loads_running=0,
        loads_late=0,
        failures=0,
        read_bytes_per_second=0.0,
    ),
    ring=RingStats(
        sent_bytes=0, wait_seconds=0.0, link_latency_seconds=0.0, link_bytes_per_second=0.0
    ),
)


def with_one_number_changed(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, copy) for each number in dataclasses, mappings and tuples that are nested: in the copy
    that one is 1, and no mapping or field is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            for name, changed in with_one_number_changed(inner, f"{path}.{field.name}"):
                yield name, dataclasses.replace(value, **{field.name: changed})
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            for name, changed in with_one_number_changed(inner, f"{path}[{key}]"):
                yield name, {**value, key: changed}
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            for name, changed in with_one_number_changed(inner, f"{path}[{i}]"):
                yield name, (*value[:i], changed, *value[i + 1 :])
    else:
        assert value is not None and value == 0, f"{path} is not in the example"
        yield path, 1


def test_a_dashboard_made_for_vllm_finds_its_names(model_folder: Path, tmp_path: Path) -> None:
    with LiveServer(model_folder, tmp_path, metrics_prefix="vllm") as server:
        complete(server, "The boats come back.")
        told = families(server)
    assert not [name for name in told if name.startswith("longctx:")]
    names = {name for name in told if name.startswith("vllm:")}
    assert {name for name in names if not name.endswith("_created")} == {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:num_preemptions",
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "vllm:request_success",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
    }
    assert all(
        sample.labels["model_name"] == MODEL
        for name, family in told.items()
        if name.startswith("vllm:")
        for sample in family.samples
    )
    with pytest.raises(ValueError, match="metrics_prefix"):
        ServerConfig(metrics_prefix="a-b")


def test_who_leaves_is_counted_as_aborted(server: LiveServer) -> None:
    def aborted() -> float:
        return value(server, "longctx:request_success", finished_reason="abort")

    before = aborted()
    body = {"prompt": "a", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
    wait_for(lambda: aborted() == before + 1)


DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
IN_EXPRESSION = re.compile(r"(?:\$\{prefix\}:|longctx_)[a-z0-9_]+")
LABELS = re.compile(r"\{\{(\w+)\}\}|by \((\w+)\)|(\w+)=")


def test_the_dashboard_asks_for_metrics_that_there_are(model_folder: Path, tmp_path: Path) -> None:
    cache = {"host_pool_gib": 0.02, "kv_dir": tmp_path / "kv"}
    with LiveServer(model_folder, tmp_path / "store", cache=cache) as server:
        complete(server, "The boats come back.")
        told = families(server)
    samples: dict[str, set[str]] = {}
    for family in told.values():
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) > 20 and len({panel["id"] for panel in dashboard["panels"]}) > 10
    for target in targets:
        names = IN_EXPRESSION.findall(target["expr"])
        assert names, target
        for found in names:
            name = found.replace("${prefix}", "longctx")
            assert name in samples, name
            both = target["expr"] + target["legendFormat"]
            wanted = {label for match in LABELS.findall(both) for label in match if label}
            assert wanted <= samples[name], (name, wanted)


def exported(stats: EngineStats) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (metric.name, labels): value
        for metric in ENGINE_METRICS
        for labels, value in metric.samples(stats)
    }


def test_every_number_of_the_engine_is_one_sample_of_its_own() -> None:
    assert set(exported(STATS).values()) == {0}
    moved: dict[tuple[str, tuple[str, ...]], str] = {}
    for path, stats in with_one_number_changed(STATS):
        found = [name for name, value in exported(stats).items() if value == 1]
        assert len(found) == 1, f"{path} is exported as {found}"
        assert found[0] not in moved, f"{found[0]} is {path} and {moved[found[0]]}"
        moved[found[0]] = path
    assert moved.keys() == exported(STATS).keys()


def test_samples_carry_the_labels_of_their_metric() -> None:
    samples = exported(STATS)
    assert ("num_requests_running", ()) in samples
    assert ("requests_total", ("stop",)) in samples
    assert ("kv_group_blocks_in_use", ("1",)) in samples
    assert ("kv_hits_total", ("host",)) in samples
    assert ("kv_evictions_total", ("disk", "ttl")) in samples
    assert ("kv_incidents_total", ("disk", "read_errors")) in samples
    labels = {metric.name: metric.labels for metric in ENGINE_METRICS}
    assert all(len(values) == len(labels[name]) for name, values in samples)


def test_what_an_engine_does_not_have_gives_no_sample() -> None:
    bare = TierStats(held_bytes=0, capacity_bytes=0, blocks=0, hits=0, misses=0, evictions={})
    alone = dataclasses.replace(STATS, device=bare, store=None, ring=None)
    names = {name for name, _ in exported(alone)}
    assert "kv_bytes" in names
    assert not any(name.startswith(("ring_", "kv_write", "kv_extents")) for name in names)
    assert {labels for name, labels in exported(alone) if name == "kv_bytes"} == {("device",)}


def test_stats_travel_between_processes() -> None:
    done = Done(1, stats=STATS, cleared={"device": Cleared(2, 300)})
    assert decode_event(encode(done)) == done


def test_each_metric_is_listed_once_with_help() -> None:
    names = [metric.name for metric in ENGINE_METRICS]
    assert len(set(names)) == len(names)
    for metric in ENGINE_METRICS:
        assert metric.help
        assert metric.kind == ("counter" if metric.name.endswith("_total") else "gauge")
