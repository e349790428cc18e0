"""`/v1/scheduler` tells who is in line and what steps take."""

from tests.api.live_server import LiveServer


def test_the_scheduler_tells_what_it_has_learned(server: LiveServer) -> None:
    for index in range(3):
        text = f"A lighthouse stands on island number {index}. " * 40
        answered = server.http.post(
            "/v1/completions", json={"prompt": text, "max_tokens": 8, "temperature": 0}
        )
        assert answered.status_code == 200, answered.text
    told = server.http.get("/v1/scheduler").json()
    assert told["object"] == "scheduler" and told["target_step_ms"] == 250
    assert told["last_step"]["measured_ms"] > 0
    assert set(told["ms_per"]) == {"step", "token", "pair", "answer", "context"}
    assert all(value >= 0 for value in told["ms_per"].values())
    assert told["ms_per"]["token"] + told["ms_per"]["pair"] + told["ms_per"]["step"] > 0
    assert set(told["classes"]) == {"interactive", "batch", "ingest"}
    assert told["classes"]["interactive"]["prompt_tokens_left"] == 0
