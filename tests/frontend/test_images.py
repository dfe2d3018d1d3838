"""Images in messages: what is fetched and what is refused, with a real server on this machine, and what the fleet gets to see."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import pytest
from fake_catalog import FakeModel

from dynamo_core.config.schema import Frontend, Media
from dynamo_core.errors import RequestError
from dynamo_core.frontend.media import MediaFetcher, _public

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/image.png":
                self.answer(200, PNG)
            case "/large.png":
                self.answer(200, PNG + b"x" * 5000)
            case "/endless.png":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(PNG * 100)
                except OSError:
                    pass
            case "/page.html":
                self.answer(200, b"<html>")
            case "/slow.png":
                threading.Event().wait(3)
            case "/round":
                self.answer(302, b"", location="/round")
            case "/file":
                self.answer(302, b"", location="file:///etc/passwd")
            case "/on":
                self.answer(307, b"", location="/image.png")
            case _:
                self.answer(404, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


OPEN = Media(schemes=("https", "http"), allow_private=True, max_bytes=4096, timeout=1.0, max_items=2)


async def fetch(url: str, **changes: Any) -> dict[str, Any]:
    return (await MediaFetcher(attrs.evolve(OPEN, **changes)).images([url]))[0]


@pytest.mark.parametrize("path", ["/image.png", "/image.png?signed=1", "/on"])
async def test_an_image_is_fetched_and_known_by_its_content(site: str, path: str) -> None:
    assert await fetch(site + path) == {"type": "image", "mime": "image/png", "data": PNG, "digest": hashlib.sha256(PNG).hexdigest()}


@pytest.mark.parametrize(("path", "says"), [
    ("/large.png", "larger than 4096 bytes"), ("/endless.png", "larger than 4096 bytes"), ("/page.html", "no PNG"), ("/slow.png", "not complete after 1 s"),
    ("/round", "more than 3 redirects"), ("/file", "only data URIs and https, http"), ("/nothing?secret=1", "/nothing' answers with status 404"),
])  # fmt: skip
async def test_what_is_no_image_or_too_much_of_one_is_refused(site: str, path: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        await fetch(site + path)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/image.png", "http://localhost:{port}/image.png", "http://[::1]:{port}/image.png",
                                 "http://127.0.0.1/image.png", "http://localhost/x", "http://2130706433/x", "http://[::ffff:127.0.0.1]/x",
                                 "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "http://[64:ff9b::7f00:1]/", "http://0.0.0.0/"])  # fmt: skip
async def test_nothing_private_is_reached(site: str, url: str) -> None:
    with pytest.raises(RequestError, match="not on the public internet|port|cannot be fetched"):
        await fetch(url.format(port=site.rpartition(":")[2]), allow_private=False)


@pytest.mark.parametrize(("url", "says"), [
    ("ftp://example.com/x", "only data URIs"), ("file:///etc/passwd", "only data URIs"), ("https://u:p@example.com/x", "user name"),
    ("http://[", "not a URL"), ("https:///x", "only data URIs"), ("data:image/png;base64,????", "not valid base64"), ("data:image/png", "comma"),
    ("data:text/plain,hello", "no PNG"), ("data:image/png;base64," + "A" * 20_000, "larger than"), ("data:image/png," + "A" * 5000, "larger than"),
])  # fmt: skip
async def test_odd_urls_are_refused(url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        await fetch(url)


async def test_only_hosts_of_the_list_are_asked_and_redirects_are_held_to_it(site: str) -> None:
    assert (await fetch(site + "/image.png", hosts=("127.0.0.1",)))["data"] == PNG
    with pytest.raises(RequestError, match="not among those"):
        await fetch(site + "/image.png", hosts=("example.com",))


async def test_http_is_refused_unless_it_is_allowed(site: str) -> None:
    with pytest.raises(RequestError, match="only data URIs and https are fetched"):
        await fetch(site + "/image.png", schemes=("https",))


async def test_data_uris_need_no_network() -> None:
    assert (await fetch(URI, schemes=(), allow_private=False))["data"] == PNG
    assert (await fetch("data:,%89PNG%0D%0A%1A%0A"))["mime"] == "image/png"


@pytest.mark.parametrize(("address", "public"), [("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("::ffff:10.1.2.3", False),
                                                 ("2002:7f00:1::", False), ("fe80::1%eth0", False), ("100.64.0.1", False), ("224.0.0.1", False)])  # fmt: skip
def test_addresses_inside_addresses_are_seen(address: str, public: bool) -> None:
    assert _public(address) is public


# ------------------------------------------------------------------ in a chat


def seeing(**card: Any) -> FakeModel:
    return FakeModel("m", capabilities=("media",), **card)


def message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


IMAGE = {"type": "image_url", "image_url": {"url": URI, "detail": "low"}}


async def test_a_model_that_sees_gets_the_images_in_order_with_their_digests(start):
    async with start(model=seeing()) as site:
        answer = await site.chat(messages=message({"type": "text", "text": "a"}, IMAGE, {"type": "image_url", "image_url": URI}))
        assert answer.status_code == 200, answer.text
        media = site.model.starts[0][0].media
        assert [(item["digest"], item["data"]) for item in media] == [(hashlib.sha256(PNG).hexdigest(), PNG)] * 2
        assert {(item["start"], item["length"]) for item in media} == {(0, len(site.model.starts[0][0].token_ids))}


async def test_a_model_that_reads_text_refuses_images(start):
    async with start() as site:
        answer = await site.chat(messages=message(IMAGE))
        assert answer.status_code == 400
        assert "this model reads text" in answer.text


@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": "image_url", "image_url": {}}, {"type": "image_url", "image_url": {"url": ""}},
                                  {"type": "image_url", "image_url": {"url": "https://127.0.0.1/x"}}, {"type": "input_audio", "input_audio": {}}])  # fmt: skip
async def test_what_cannot_be_an_image_is_a_400(start, part):
    async with start(model=seeing()) as site:
        assert (await site.chat(messages=message(part))).status_code == 400


async def test_more_images_than_the_limit_are_refused(start):
    async with start(config=Frontend(media=Media(max_items=1)), model=seeing()) as site:
        answer = await site.chat(messages=message(IMAGE, IMAGE))
        assert answer.status_code == 400
        assert "2 images are more than 1" in answer.text
