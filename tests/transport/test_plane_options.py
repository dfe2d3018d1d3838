"""The page of the request plane shows every option of the `tcp` plane with its default."""

import re
import textwrap
import tomllib
from pathlib import Path

import attrs

from dynamo_core.transport.http import HttpPlane
from dynamo_core.transport.inprocess import InProcessPlane
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.transport.tls import PlaneTls

PAGE = (Path(__file__).parents[2] / "docs/contracts/request-plane.md").read_text()


def tables() -> list[dict[str, object]]:
    blocks = re.findall(r"(?m)^    \[request_plane[^\n]*\n(?:    [^\n]*\n)+", PAGE)
    return [tomllib.loads(textwrap.dedent(block))["request_plane"] for block in blocks]


def test_every_option_of_tcp_is_on_the_page_with_its_default() -> None:
    shown = {key: value for key, value in tables()[0].items() if key != "use"}
    assert shown == {field.name: field.default for field in attrs.fields(TcpPlane) if field.name != "tls"}


def test_every_tls_option_is_on_the_page() -> None:
    assert set(tables()[1]["tls"]) == {field.name for field in attrs.fields(PlaneTls)}  # type: ignore[call-overload]


def test_options_of_one_name_mean_the_same_on_every_plane() -> None:
    tcp = {field.name: field.default for field in attrs.fields(TcpPlane)}
    for plane in (HttpPlane, InProcessPlane):
        for field in attrs.fields(plane):
            assert field.default == tcp.get(field.name, field.default), field.name
