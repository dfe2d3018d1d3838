"""The event-plane kit rejects planes that break a guarantee: each fault here is planted into the in-process plane, which otherwise passes."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque

import attrs
import pytest

from dynamo_core.contracts.events import EventPlaneContract
from dynamo_core.events.contract import Event, Gap
from dynamo_core.events.inbox import Inbox
from dynamo_core.events.inprocess import InProcessEvents, InProcessPublisher, InProcessSubscription


class Kit(EventPlaneContract):
    backlog = 40


class HastyKit(Kit):
    patience = 0.6


def make():
    return InProcessEvents(receive_queue=Kit.backlog)


async def rejections(kit, number):
    """Which tests of this guarantee fail."""
    failed = []
    for name, test in inspect.getmembers(kit, inspect.iscoroutinefunction):
        if name.startswith(f"test_{number}_"):
            try:
                await asyncio.wait_for(test(make), 20)
            except (Exception, pytest.fail.Exception):
                failed.append(name)
    return failed


FAULTS = []


def breaks(number):
    def note(plant):
        FAULTS.append(pytest.param(number, plant, id=f"{number}: {plant.__name__.replace('_', ' ')}"))
        return plant

    return note


def wrap(monkeypatch, cls, name, around):
    original = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *a, **k: around(original, self, *a, **k))


def read_as_it_comes(patch):
    """An inbox that compares no numbers."""
    patch.setattr(Inbox, "_take", lambda self: entry if isinstance(entry := self._queue.popleft(), Event) or not hasattr(entry, "sequence") else None)


@breaks("e1")
def events_arrive_twice(patch):
    def twice(original, self, event):
        original(self, event)
        original(self, event)

    read_as_it_comes(patch)
    wrap(patch, Inbox, "push", twice)


@breaks("e1")
def events_arrive_in_pairs_the_wrong_way_round(patch):
    def swapped(original, self, event):
        if event.sequence % 2:
            original(self, event)
            original(self, attrs.evolve(event, sequence=event.sequence - 1))

    read_as_it_comes(patch)
    wrap(patch, Inbox, "push", swapped)


@breaks("e1")
def payloads_lose_their_trailing_zeros(patch):
    wrap(patch, Inbox, "push", lambda original, self, event: original(self, attrs.evolve(event, payload=event.payload.rstrip(b"\0"))))


@breaks("e1")
def numbers_start_anew_with_each_handle(patch):
    async def publisher(original, self, topic):
        self._sequences.pop(topic, None)
        return await original(self, topic)

    wrap(patch, InProcessEvents, "publisher", publisher)


@breaks("e2")
def losses_are_silent(patch):
    read_as_it_comes(patch)


@breaks("e2")
def a_late_subscriber_is_told_nothing(patch):
    def take(original, self):
        entry = self._queue[0] if self._queue else None
        if entry is not None and hasattr(entry, "sequence"):
            self._next.setdefault(entry.publisher, entry.sequence)
        return original(self)

    wrap(patch, Inbox, "_take", take)


@breaks("e2")
def gaps_are_one_short(patch):
    def take(original, self):
        notice = original(self)
        return Gap(notice.publisher, notice.topic, notice.missed - 1) if isinstance(notice, Gap) else notice

    wrap(patch, Inbox, "_take", take)


@breaks("e3")
def nobody_learns_that_a_publisher_left(patch):
    patch.setattr(Inbox, "left", lambda self, publisher, topic: None)


@breaks("e3")
def publishers_that_come_later_are_not_found(patch):
    def begin(original, self, topic, shared, limit):
        original(self, topic, shared, limit)
        present = {*shared.next}
        push = self._inbox.push
        self._inbox.push = lambda event: push(event) if event.publisher in present else None

    wrap(patch, InProcessSubscription, "__init__", begin)


@breaks("e3")
def closing_one_handle_closes_them_all(patch):
    def drop(original, self, publisher):
        for other in [p for p, topic in self._publishers.items() if topic == publisher._topic]:
            original(self, other)

    wrap(patch, InProcessEvents, "drop", drop)


@breaks("e4")
def everything_is_kept_for_the_slow(patch):
    wrap(patch, Inbox, "__init__", lambda original, self, limit: original(self, 10**9))


@breaks("e4")
def the_newest_events_go_first(patch):
    def push(original, self, event):
        if len(self._queue) < self._limit:
            original(self, event)

    wrap(patch, Inbox, "push", push)


@breaks("e4")
def publishing_waits_for_a_subscriber_by_an_error(patch):
    def publish(original, self, payload):
        if not self._plane._shared(self._topic).inboxes:
            raise BlockingIOError("nobody is there")
        return original(self, payload)

    wrap(patch, InProcessPublisher, "publish", publish)


@breaks("e4")
def events_without_a_subscriber_are_kept_for_the_first(patch):
    kept = deque()

    def send(original, self, topic, payload):
        if not self._shared(topic).inboxes:
            kept.append(Event(self._context.lease.id, self._sequences[topic], topic, payload))
        return original(self, topic, payload)

    def begin(original, self, topic, shared, limit):
        original(self, topic, shared, 10**9)
        for event in kept:
            self._inbox._queue.appendleft(event)
        self._inbox._queue.reverse()

    wrap(patch, InProcessEvents, "send", send)
    wrap(patch, InProcessSubscription, "__init__", begin)


@breaks("e5")
def a_full_subscriber_stops_the_others(patch):
    def send(original, self, topic, payload):
        if any(len(inbox._queue) >= inbox._limit for inbox in self._shared(topic).inboxes):
            self._sequences[topic] += 1
            return self._sequences[topic] - 1
        return original(self, topic, payload)

    wrap(patch, InProcessEvents, "send", send)


@breaks("e5")
def a_closed_subscription_waits_for_ever(patch):
    async def close(self):
        self._shared.inboxes.discard(self._inbox)

    patch.setattr(InProcessSubscription, "close", close)


@breaks("e6")
def topics_match_by_prefix(patch):
    def send(original, self, topic, payload):
        sequence = original(self, topic, payload)
        for end in range(1, len(topic)):
            for inbox in self._shared(topic[:end]).inboxes:
                inbox.push(Event(self._context.lease.id, sequence, topic, payload))
        return sequence

    wrap(patch, InProcessEvents, "send", send)


@breaks("e6")
def topics_ignore_case(patch):
    wrap(patch, InProcessEvents, "_shared", lambda original, self, topic: original(self, topic.lower()))


@breaks("e7")
def a_restarted_publisher_goes_on_with_the_old_numbers(patch):
    numbers = {}

    async def start(original, self, context):
        await original(self, context)
        self._sequences = numbers

    wrap(patch, InProcessEvents, "start", start)


@breaks("e7")
def all_publishers_have_one_identity(patch):
    wrap(patch, Inbox, "push", lambda original, self, event: original(self, attrs.evolve(event, publisher=42)))


@pytest.mark.parametrize(("number", "plant"), FAULTS)
async def test_the_kit_rejects_a_plane_where(number, plant, monkeypatch):
    plant(monkeypatch)
    assert await rejections(HastyKit(), number)


@pytest.mark.parametrize("number", [f"e{i}" for i in range(1, 8)])
async def test_the_kit_accepts_the_same_plane_without_the_fault(number):
    assert await rejections(Kit(), number) == []


async def test_the_kit_rejects_a_plane_that_leaves_a_task_behind():
    class Untidy(InProcessEvents):
        async def start(self, context):
            await super().start(context)
            self.left_behind = asyncio.create_task(asyncio.sleep(60))

    with pytest.raises(AssertionError):
        await Kit().test_stopping_leaves_no_task_behind(Untidy)


def test_every_guarantee_was_broken_at_least_once():
    assert {fault.values[0] for fault in FAULTS} == {f"e{i}" for i in range(1, 8)}
