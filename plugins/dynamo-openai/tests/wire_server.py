"""A server that speaks as `vllm serve` does (0.32), in this process, with a toy for a model: `test_openai_alike.py` holds it against the real one.

Its model is a hash: the next token follows from the last eight. All else is real: HTTP, event streams, a prefix cache, KV events over ZeroMQ.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import attrs
import msgspec
import zmq
import zmq.asyncio

from dynamo_core.engines import byte_tokenizer

EOS = byte_tokenizer.TURN_END
VOCABULARY = byte_tokenizer.VOCAB_SIZE
BLOCK = 16


class Refused(Exception):
    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        kind = {404: "NotFoundError", 401: "Unauthorized"}.get(status, "BadRequestError")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@attrs.define(eq=False)
class WireServer:
    root: str = "/models/wire"
    names: list[str] = attrs.field(factory=lambda: ["wire"])
    adapters: list[str] = attrs.field(factory=list)
    max_model_len: int = 512
    step: float = 0.0
    """Seconds before each token."""
    api_key: str | None = None
    priorities: bool = True
    token_ids: bool = True
    """Knows `return_token_ids`."""
    details: bool = True
    """--enable-prompt-tokens-details."""
    metrics: bool = True
    ranks: int = 1
    kv: tuple[int, int] | None = None
    """The ports on which it publishes KV events, and replays them."""
    tls: ssl.SSLContext | None = None
    trouble: dict[str, Any] | None = None
    """What goes wrong with completions: {status, body}, or {after: tokens} and one of `error`, `finish`, `cut`, `silence`."""
    seen: list[tuple[dict[str, str], dict[str, Any]]] = attrs.field(factory=list)
    """Headers and body of each completion."""
    hung_up: int = 0
    """Streams whose reader left."""
    running: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = attrs.field(factory=set)
    _cache: set[int] = attrs.field(factory=set)
    _publisher: KvPublisher | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        if self.kv is not None:
            self._publisher = KvPublisher()
            await self._publisher.listen(*self.kv)

    async def stop(self) -> None:
        """As if killed: every connection is reset, and the cache is lost."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._cache.clear()
        if self._publisher is not None:
            await self._publisher.close()
            self._publisher = None

    # -------------------------------------------------------------- HTTP

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                try:
                    await self._answer(writer, method, path, headers, body)
                except Refused as e:
                    _send(writer, e.status, e.body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    async def _answer(self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        if path.startswith("/v1") and self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            _send(writer, 401, {"error": "Unauthorized"})
        elif (method, path) == ("GET", "/v1/models"):
            _send(writer, 200, {"object": "list", "data": [*self._models()]})
        elif (method, path) == ("GET", "/version"):
            _send(writer, 200, {"version": "0.32.0"})
        elif (method, path) == ("GET", "/kv_event_sources"):
            _send(writer, 200, self._sources())
        elif (method, path) == ("GET", "/metrics") and self.metrics:
            _send(writer, 200, self._metrics())
        elif (method, path) == ("POST", "/v1/completions"):
            await self._complete(writer, headers, json.loads(body))
        else:
            _send(writer, 404, {"detail": "Not Found"})

    def _models(self) -> Iterator[dict[str, Any]]:
        permission = {"id": "modelperm-1", "object": "model_permission", "created": 1, "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True,
                      "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False}  # fmt: skip
        common = {"object": "model", "created": 1, "owned_by": "vllm"}
        for name in self.names:
            yield {"id": name, **common, "root": self.root, "parent": None, "max_model_len": self.max_model_len, "permission": [permission]}
        for name in self.adapters:
            yield {"id": name, **common, "root": f"/adapters/{name}", "parent": self.names[0], "max_model_len": None, "permission": [permission]}

    def _sources(self) -> dict[str, Any]:
        if self.kv is None:
            return {}
        return {"0": {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{self.kv[0]}", "replay_endpoint": f"tcp://*:{self.kv[1]}",
                      "buffer_steps": 10000, "hwm": 100000, "max_queue_size": 100000, "topic": "kv-events"}}  # fmt: skip

    def _metrics(self) -> str:
        lines = ["# HELP vllm:num_requests_running Number of requests in model execution batches.", "# TYPE vllm:num_requests_running gauge"]
        for rank in range(self.ranks):
            labels = f'{{engine="{rank}",model_name="{self.names[0]}"}}'
            lines += [f"vllm:num_requests_running{labels} {self.running if not rank else 0}.0", f"vllm:num_requests_waiting{labels} 0.0",
                      f"vllm:kv_cache_usage_perc{labels} {min(1.0, self.running / 100)}",
                      f'vllm:cache_config_info{{block_size="{BLOCK}",enable_prefix_caching="True",engine="{rank}",num_gpu_blocks="{1000 * self.ranks}"}} 1.0']  # fmt: skip
        return "\n".join(lines) + "\n"

    # -------------------------------------------------------------- completions

    async def _complete(self, writer: asyncio.StreamWriter, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.seen.append((headers, body))
        trouble = self.trouble or {}
        if "status" in trouble:
            return _send(writer, trouble["status"], trouble["body"])
        self._check(body)
        self.running += 1
        try:
            if body.get("stream"):
                await self._stream(writer, body, trouble)
            else:
                _send(writer, 200, await self._whole(body))
        finally:
            self.running -= 1
            self.hung_up += writer.transport.is_closing()
        return None

    def _check(self, body: dict[str, Any]) -> None:
        if body["model"] not in [*self.names, *self.adapters]:
            raise Refused(404, f"The model `{body['model']}` does not exist. Valid aliases: {', '.join(self.names)}.", "model")
        if not body["prompt"]:
            raise Refused(400, "You must pass at least one prompt")
        for name, low, high in (("temperature", 0, 1e9), ("top_p", 1e-9, 1), ("min_p", 0, 1), ("repetition_penalty", 1e-9, 1e9)):
            if not low <= body.get(name, 1) <= high:
                raise Refused(400, f"{name} must be from {low} to {high}, got {body[name]}. (parameter={name}, value={body[name]})", name)
        if body.get("priority") and not self.priorities:
            raise Refused(400, "Got priority but Priority scheduling is not enabled.")
        if body.get("prompt_logprobs") and body.get("stream"):
            raise Refused(400, "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], trouble: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
        base = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        told: set[int] = set()
        sent = 0
        cached = self._store(body)
        async for index, token, best, reason, stop_reason in self._tokens(body):
            if writer.transport.is_closing():
                return
            if trouble and sent == trouble["after"]:
                if "error" in trouble:
                    _event(writer, {"error": trouble["error"]})
                    break
                if "cut" in trouble:
                    writer.transport.abort()
                    return
                if "silence" in trouble:
                    await asyncio.sleep(3600)
                reason = trouble.get("finish", reason)
            ids = {"prompt_token_ids": None if index in told else body["prompt"], "token_ids": [token]} if self.token_ids and body.get("return_token_ids") else {}
            told.add(index)
            choice = {"index": index, "text": chr(97 + token % 26), "logprobs": _logprobs([best], body) if body.get("logprobs") is not None else None,
                      "finish_reason": reason, "stop_reason": stop_reason, "prompt_token_ids": None, "token_ids": None, **ids}  # fmt: skip
            counted = (body.get("stream_options") or {}).get("include_usage")
            _event(writer, {**base, "choices": [choice], **({} if reason is None or counted else {"system_fingerprint": "vllm-0.32.0-28d85aa3"})})
            await writer.drain()
            sent += 1
            if reason == "abort":
                break
        else:
            if (body.get("stream_options") or {}).get("include_usage"):
                _event(writer, {**base, "choices": [], "usage": self._usage(body, sent, cached), "system_fingerprint": "vllm-0.32.0-28d85aa3"})
        _piece(writer, b"data: [DONE]\n\n")
        _piece(writer, b"")

    async def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        cached, made = self._store(body), 0
        choices: list[dict[str, Any]] = []
        found = [entry async for entry in self._tokens(body)]
        for index in range(body.get("n", 1)):
            mine = [entry for entry in found if entry[0] == index]
            made += len(mine)
            k = body.get("prompt_logprobs")
            prompt = body["prompt"]
            about = None if k is None else [None] + [{str(t): {"logprob": -1.0 - r, "rank": 1 + r, "decoded_token": "x"} for r, t in enumerate([token, *((token + 1 + i) % VOCABULARY for i in range(k - 1))])} for token in prompt[1:]]
            choices.append({"index": index, "text": "", "logprobs": _logprobs([m[2] for m in mine], body) if body.get("logprobs") is not None else None,
                            "finish_reason": mine[-1][3], "stop_reason": mine[-1][4], "token_ids": [m[1] for m in mine] if body.get("return_token_ids") else None,
                            "prompt_logprobs": about, "prompt_token_ids": prompt if body.get("return_token_ids") else None, "routed_experts": None})  # fmt: skip
        usage = self._usage(body, made, cached)
        if self.details:
            usage["prompt_tokens_details"] |= {"created_cache_tokens": None, "multimodal_tokens": None}
        return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices, "service_tier": None,
                "system_fingerprint": "vllm-0.32.0-28d85aa3", "usage": {**usage, "completion_tokens_details": None}, "kv_transfer_params": None,
                "ec_transfer_params": None, "metrics": None}  # fmt: skip

    def _usage(self, body: dict[str, Any], made: int, cached: int) -> dict[str, Any]:
        prompt = len(body["prompt"])
        return {"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made, **({"prompt_tokens_details": {"cached_tokens": cached}} if self.details else {})}

    async def _tokens(self, body: dict[str, Any]) -> AsyncIterator[tuple[int, int, list[int], str | None, int | None]]:
        """Choice, token, candidates from the chosen one on, finish reason, stop reason; the choices in step."""
        stops, ends = body.get("stop_token_ids") or [], [] if body.get("ignore_eos") else [EOS]
        limit = min(body["max_tokens"], self.max_model_len - len(body["prompt"]))
        forced = _forced(body)
        texts = {index: list(body["prompt"]) for index in range(body.get("n", 1))}
        for made in range(limit):
            await asyncio.sleep(self.step)
            for index, text in list(texts.items()):
                banned = {int(token) for token, bias in (body.get("logit_bias") or {}).items() if bias <= -100} | ({EOS} if not ends else set())
                if made < body.get("min_tokens", 0):
                    banned |= {*stops, EOS}
                luck = (body.get("seed"), index) if body.get("temperature", 1.0) else None
                best = [forced[made]] if forced is not None else _candidates(text[-8:], luck, body["model"], banned)
                token = best[0]
                text.append(token)
                reason: str | None = None
                if made >= body.get("min_tokens", 0) and token in (*stops, *ends):
                    reason = "stop"
                elif made + 1 == limit:
                    reason = "length"
                if reason is not None:
                    del texts[index]
                yield index, token, best, reason, token if reason == "stop" and token in stops and token not in ends else None
            if not texts:
                return

    # -------------------------------------------------------------- the cache


    def _store(self, body: dict[str, Any]) -> int:
        """How much of the prompt was there already. Afterwards, all its whole blocks are."""
        prompt, cached, new, parent, first = body["prompt"], 0, [], None, None
        for end in range(BLOCK, len(prompt) + 1, BLOCK):
            block = zlib.crc32(repr((body["model"], body.get("cache_salt"), prompt[:end])).encode())
            if block in self._cache:
                cached, parent = end, block
            else:
                first = end - BLOCK if first is None else first
                self._cache.add(block)
                new.append(block)
        if new and self._publisher is not None:
            salt = body.get("cache_salt")
            keys = [[salt] if salt and not first else None, *([None] * (len(new) - 1))]
            self._publisher.publish({"type": "BlockStored", "block_hashes": new, "parent_block_hash": parent, "token_ids": prompt[first : first + BLOCK * len(new)], "block_size": BLOCK,
                              "lora_id": None, "medium": "GPU", "lora_name": body["model"] if body["model"] in self.adapters else None, "extra_keys": keys, "group_idx": 0,
                              "kv_cache_spec_kind": "full_attention"})  # fmt: skip
        return min(cached, len(prompt) - 1)


class KvPublisher:
    """vLLM's publisher: PUB with numbered batches, ROUTER with all of them again."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._pub, self._router = self._context.socket(zmq.PUB), self._context.socket(zmq.ROUTER)
        self._kept: list[bytes] = []
        self._task = asyncio.create_task(self._replay())
        self._sending: set[asyncio.Future[Any]] = set()

    async def listen(self, port: int, replay: int) -> None:
        async with asyncio.timeout(20):
            for socket, number in ((self._pub, port), (self._router, replay)):
                while True:
                    try:
                        socket.bind(f"tcp://127.0.0.1:{number}")
                        break
                    except zmq.ZMQError:  # the one before lets go of it a moment after its end
                        await asyncio.sleep(0.02)

    def publish(self, *events: dict[str, Any]) -> None:
        self._kept.append(msgspec.msgpack.encode((1.0, events, 0)))
        self._sending.add(self._pub.send_multipart([b"kv-events", (len(self._kept) - 1).to_bytes(8, "big"), self._kept[-1]]))

    async def _replay(self) -> None:
        while True:
            client, _, start = await self._router.recv_multipart()
            for number in range(int.from_bytes(start, "big"), len(self._kept)):
                await self._router.send_multipart([client, b"", b"kv-events", number.to_bytes(8, "big"), self._kept[number]])
            await self._router.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[WireServer]:
    server = WireServer(**options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.contextmanager
def apart(**options: Any) -> Iterator[WireServer]:
    """The same with an event loop of its own, so that its tasks are not among the test's."""
    server, loop = WireServer(**options), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


# ------------------------------------------------------------------ small print


def _candidates(text: list[int], luck: Any, model: str, banned: set[int]) -> list[int]:
    """Tokens by falling probability."""
    found: list[int] = []
    turn = 0
    while len(found) < 5:
        token = zlib.crc32(repr((text, luck, model, turn)).encode()) % VOCABULARY
        turn += 1
        if token not in banned and token not in found:
            found.append(token)
    return found


def _forced(body: dict[str, Any]) -> list[int] | None:
    """What a constraint leaves, byte by byte."""
    wanted = body.get("structured_outputs")
    if wanted is None:
        return None
    return [*(wanted["choice"][0] if "choice" in wanted else "{}").encode(), EOS, *[EOS] * body["max_tokens"]]


def _logprobs(steps: list[list[int]], body: dict[str, Any]) -> dict[str, Any]:
    name = (lambda token: f"token_id:{token}") if body.get("return_tokens_as_token_ids") else (lambda token: chr(97 + token % 26))
    return {"text_offset": [0] * len(steps), "token_logprobs": [-0.5] * len(steps), "tokens": [name(best[0]) for best in steps],
            "top_logprobs": [{name(token): -0.5 - rank for rank, token in enumerate(best[: max(1, body["logprobs"])])} for best in steps]}  # fmt: skip


def _send(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _piece(writer, b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")


def _piece(writer: asyncio.StreamWriter, raw: bytes) -> None:
    writer.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
