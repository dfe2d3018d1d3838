"""The numbers that operators see, and the table that explains them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from fake_catalog import words
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core import errors
from dynamo_core.frontend.metrics import PREFIX, HttpMetrics
from dynamo_core.types import Delta

TABLE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


async def test_a_good_request_is_counted_once_everywhere(each):
    each.model.script = [Delta(text="a", token_ids=[1]), [Delta(text="bc", token_ids=[2, 3])], Delta(finish_reason="stop", token_ids=[4])]
    await each.chat(stream=True)
    await each.settled()
    labels = {"endpoint": "chat_completions", "model": "m", "request_type": "stream"}
    assert each.value("requests_started_total", **labels) == 1
    assert each.value("requests_total", **labels, status="success", error_type="") == 1
    assert each.value("inflight_requests", model="m") == 0
    for name in ("request_duration_seconds", "time_to_first_token_seconds", "input_sequence_tokens", "output_sequence_tokens", "cached_tokens"):
        assert each.value(f"{name}_count", model="m") == 1
    assert each.value("output_tokens_total", model="m") == 4
    assert each.value("input_sequence_tokens_sum", model="m") == 8
    assert each.value("cached_tokens_sum", model="m") == 2
    assert each.value("inter_token_latency_seconds_count", model="m") == 3


async def test_bad_requests_are_counted_by_kind_and_unknown_models_make_no_series(site):
    await site.chat(temperature=9)
    await site.chat(model="somebody's invention")
    site.model.start_error = errors.AllBusy("this request")
    await site.complete()
    await site.settled()
    chat = {"endpoint": "chat_completions", "request_type": "unary", "status": "error"}
    assert site.value("requests_total", model="unknown", error_type="validation", **chat) == 1
    assert site.value("requests_total", model="unknown", error_type="not_found", **chat) == 1
    assert site.value("requests_total", endpoint="completions", model="m", request_type="unary", status="error", error_type="overload") == 1
    assert site.value("model_rejection_total", endpoint="completions", model="m") == 1
    assert site.value("failures_total", code="overloaded") == 1
    assert "invention" not in (await site.client.get("/metrics")).text


async def test_the_metrics_page_parses(site):
    await site.chat(stream=True)
    response = await site.client.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families[PREFIX + "inter_token_latency_seconds"].type == "histogram"
    buckets = [s.value for s in families[PREFIX + "inter_token_latency_seconds"].samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert response.headers["content-type"].startswith("text/plain")


def test_every_series_is_in_the_table_and_every_row_is_a_series():
    registry = CollectorRegistry()
    HttpMetrics(registry)
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}
    section = TABLE.read_text().split("## Frontend: HTTP", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == exported


async def test_each_request_leaves_one_access_line_with_its_numbers_and_without_its_text(site, caplog):
    with caplog.at_level(logging.INFO, "dynamo.access"):
        site.model.script = words("secret-answer")
        response = await site.chat("secret-question", stream=True)
        await site.settled()
    (record,) = [r for r in caplog.records if r.name == "dynamo.access"]
    assert (record.request_id, record.model, record.status, record.completion_tokens) == (response.headers["x-request-id"], "m", 200, 1)
    assert (record.decisions, record.workers) == (["d1"], ["backend-000001"])
    assert "secret" not in str(record.__dict__)


async def test_observers_hear_of_every_end(site):
    await site.chat()
    await site.chat(model="none")
    await site.settled()
    good, bad = site.finished
    assert (good["model"], good["status"], good["usage"]) == ("m", 200, {"prompt_tokens": 8, "completion_tokens": 3, "cached_tokens": 2})
    assert good["seconds"] > 0
    assert (bad["model"], bad["status"]) == ("", 404)


async def test_an_observer_that_breaks_disturbs_nobody(start):
    def broken(**about):
        raise RuntimeError("mine")

    async with start() as site:
        site.app._service.observers = [broken]
        assert (await site.chat()).status_code == 200
        await site.settled()
        assert (await site.chat()).status_code == 200
