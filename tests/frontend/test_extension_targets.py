"""Latency targets reach the router, wherever a client puts them."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("extension", "targets"), [
    ({"ttft_target_ms": 200, "itl_target_ms": 20.5}, (200.0, 20.5)),
    ({"router": {"ttft_target": 200, "itl_target": 20.5}}, (200.0, 20.5)),
    ({"router": {"ttft_target": 200}, "itl_target_ms": 7}, (200.0, 7.0)),
    ({"router": {"ttft_target": 200}, "ttft_target_ms": 100}, (100.0, None)),
    ({}, (None, None)),
])
@pytest.mark.parametrize("name", ["dynamo", "nvext"])
async def test_targets_are_hints(site, name, extension, targets) -> None:
    assert (await site.chat(**{name: extension})).status_code == 200
    hints = site.model.starts[-1][0].hints
    assert (hints.ttft_target_ms, hints.itl_target_ms) == targets


@pytest.mark.parametrize("extension", [{"router": {"ttft_target": 0}}, {"router": {"ttft": 1}}, {"ttft_target_ms": -1}])
async def test_targets_that_mean_nothing_are_refused(site, extension) -> None:
    assert (await site.chat(dynamo=extension)).status_code == 400
