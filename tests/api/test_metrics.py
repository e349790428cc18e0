"""`GET /metrics`: every figure has a name, a unit and help, and a scrape disturbs nobody."""

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from api.engine_metrics import ENGINE_METRICS, is_listed, samples
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
    return server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})


def test_names_and_help_follow_the_conventions(server: LiveServer) -> None:
    complete(server, "The boats come back.")
    told = families(server)
    assert len(told) > 25
    for name, family in told.items():
        assert name.startswith("longctx_"), name
        assert family.documentation, name
        assert (family.type == "counter") == any(
            sample.name.endswith("_total") for sample in family.samples
        ), name
    assert {"device"} == {s.labels["tier"] for s in told["longctx_kv_capacity_bytes"].samples}
    (info,) = told["longctx_info"].samples
    assert info.labels["device"] == "cpu" and info.labels["model"]


def test_tokens_and_requests_are_counted(server: LiveServer) -> None:
    names = ("longctx_prompt_tokens", "longctx_cached_tokens", "longctx_generated_tokens")
    prompt = [5 + i * 37 % 500 for i in range(200)]
    before = [value(server, name) for name in names]
    ended = value(server, "longctx_requests", reason="length")
    firsts = value(server, "longctx_time_to_first_token_seconds")
    for _ in range(2):
        assert complete(server, prompt).status_code == 200
    gained = [value(server, name) - was for name, was in zip(names, before, strict=True)]
    assert gained == [400, 192, 4]
    assert value(server, "longctx_requests", reason="length") == ended + 2
    assert value(server, "longctx_time_to_first_token_seconds") == firsts + 2


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
    states = ("queued", "processing", "ready", "error")
    assert {s.labels["state"] for s in families(server)["longctx_documents"].samples} == set(states)
    before = sum(value(server, "longctx_documents", state=state) for state in states)
    server.http.post("/v1/files", files={"file": ("a.txt", b"A story. " * 50)}).raise_for_status()
    assert sum(value(server, "longctx_documents", state=state) for state in states) == before + 1


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
        for sample in samples(server.engine_stats()):
            assert is_listed(sample.metric), sample.metric.name


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


@pytest.mark.parametrize(
    ("stat", "name", "labels"),
    [
        ("requests_running", "requests_running", {}),
        ("requests_stop_total", "requests_total", {"reason": "stop"}),
        ("group12_blocks_held", "kv_group_blocks_in_use", {"group": "12"}),
        ("host_hits_total", "kv_hits_total", {"tier": "host"}),
        ("disk_evictions_ttl_total", "kv_evictions_total", {"tier": "disk", "reason": "ttl"}),
        ("disk_io_errors_total", "kv_incidents_total", {"tier": "disk", "kind": "io_errors"}),
        ("new_thing", "new_thing", {}),
    ],
)
def test_a_statistic_is_exported_by_the_first_row_that_it_matches(
    stat: str, name: str, labels: dict[str, str]
) -> None:
    (sample,) = samples({stat: 3.0})
    assert (sample.metric.name, sample.labels, sample.value) == (name, labels, 3.0)


def test_each_metric_is_listed_once_with_help() -> None:
    names = [metric.name for metric in ENGINE_METRICS]
    assert len(set(names)) == len(names)
    for metric in ENGINE_METRICS:
        assert metric.help
        assert metric.kind == ("counter" if metric.name.endswith("_total") else "gauge")
