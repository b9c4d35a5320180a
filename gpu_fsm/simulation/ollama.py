"""The simulated Ollama: the routes of a server over the scheduler's runners, driven by appointments on a clock.

It knows nothing of sockets: a front (`transport.py` in virtual time, `http.py` on loopback) hands it an `Exchange` and
reads the answer as it comes.  Every method runs under the clock's `turn`.  What it imitates are the observable rules of
Ollama 0.24 and 0.32: one load at a time, an unload that is acknowledged before it happens and lost while the model
loads, a load that dies with its client, eviction, finite and infinite keep_alive, runners that die and stay listed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from attrs import define, evolve

from gpu_fsm.simulation import openai, speech
from gpu_fsm.simulation.card import Card
from gpu_fsm.simulation.clock import WorldClock
from gpu_fsm.simulation.faults import Fault, Faults
from gpu_fsm.simulation.pull import pull
from gpu_fsm.simulation.scheduler import (
    BUSY_TEXT,
    MIB,
    RUNNER_OPTIONS,
    Job,
    Runner,
    Scheduler,
    SimulatedModel,
    Work,
)
from gpu_fsm.simulation.wire import (
    CutExchange,
    DeafExchange,
    Exchange,
    Refusal,
    check_kinds,
    decode_images,
    dumps,
    fitting,
    go_kind,
    is_local_host,
    parse_keep_alive,
    read_json,
    short_name,
    string_of,
    timestamp,
)

_INTEGER_OPTIONS = frozenset(
    {"num_ctx", "num_gpu", "num_batch", "main_gpu", "num_thread", "draft_num_predict", "num_predict", "seed", "top_k"}
)

Responder = Callable[[str, str, list[bytes]], str]
"""(model, prompt, images) -> the text of the answer."""


def _say_ok(_model: str, _prompt: str, _images: list[bytes]) -> str:
    return "ok"


@define(eq=False)
class LogEntry:
    """One request as the server saw it."""

    at: float
    client: str
    op: str
    method: str
    path: str
    body: Any = None
    status: int | None = None
    outcome: str = "pending"
    """`ok`, `HTTP nnn`, `client left`, `connection cut`; with `fault KIND` before it where one fired."""
    ended_at: float | None = None
    fault: str = ""


class SimulatedOllama(Scheduler):
    """An Ollama server without sockets.  Times in seconds of its clock, sizes in MiB.

    `card` None is a machine without a GPU: models run in `host_mib` of main memory and `size_vram` is 0.
    """

    def __init__(
        self,
        models: Iterable[SimulatedModel],
        *,
        clock: WorldClock,
        card: Card | None = None,
        faults: Faults | None = None,
        version: str = "0.32.15",
        reclaim_s: float = 0.3,
        unload_s: float = 0.08,
        latency_s: float = 0.001,
        generate_s: float = 0.5,
        default_keep_alive_s: float = 300.0,
        max_loaded: int = 3,
        max_queue: int = 512,
        num_parallel: int = 1,
        fit_margin_mib: float = 0.0,
        host_mib: float = 32768.0,
        epoch_s: float = 1767225600.0,
        frozen: bool = False,
        registry: Iterable[SimulatedModel] = (),
        pull_s: float = 2.0,
        responder: Responder | None = None,
    ) -> None:
        self.version = {"0.32": "0.32.15", "0.24": "0.24.0"}.get(version, version)
        super().__init__(
            clock=clock,
            card=card,
            faults=faults or Faults(),
            old=self.version.startswith("0.24"),
            reclaim_s=reclaim_s,
            unload_s=unload_s,
            default_keep_alive_s=default_keep_alive_s,
            max_loaded=max_loaded,
            max_queue=max_queue,
            fit_margin_mib=fit_margin_mib,
            host_mib=host_mib,
        )
        self.latency_s = latency_s
        self.generate_s = generate_s
        self.num_parallel = num_parallel
        self.epoch_s = epoch_s
        """The wall clock at 0 of `clock`, in seconds since 1970."""
        self.frozen = frozen
        """Answers tell one moment and no durations, so that equal requests get equal bytes."""
        self.responder: Responder = responder or _say_ok
        self.log: list[LogEntry] = []
        self.unreachable = False
        """True: packets vanish, a client waits for its connect time-out."""
        self._open: set[Exchange] = set()
        self._starting: list[Exchange] | None = None
        self._orphans: list[str] = []
        self.registry = {(m := model.normal()).name.casefold(): m for model in registry}
        """What `/api/pull` can fetch; with nothing here the server has no network."""
        self.pull_s = pull_s
        self.fetched: dict[str, int] = {}
        """Bytes of each blob that pulls have brought so far."""
        for model in models:
            self.add_model(model)

    # --- what tests and other programs do -----------------------------------------------------------------------------

    def transport(self, client: str = "us") -> Callable[[], Any]:
        """A factory of `requests` adapters that reach this server without sockets, in virtual time."""
        from gpu_fsm.simulation.transport import SimulatedAdapter

        return lambda: SimulatedAdapter(self, client=client)

    def foreign_load(self, name: str, *, keep_alive: Any = None, options: dict[str, Any] | None = None) -> Exchange:
        """Another program loads a model.  Returns at once; the load takes its time."""
        body: dict[str, Any] = {"model": name, "stream": False}
        if keep_alive is not None:
            body["keep_alive"] = keep_alive
        if options:
            body["options"] = options
        return self.request("POST", "/api/generate", body, client="foreign")

    def foreign_unload(self, name: str) -> Exchange:
        """Another program unloads a model."""
        return self.request("POST", "/api/generate", {"model": name, "keep_alive": 0}, client="foreign")

    def foreign_generate(self, name: str, prompt: str = "hello", **body: Any) -> Exchange:
        """Another program asks a model something."""
        return self.request(
            "POST", "/api/generate", {"model": name, "prompt": prompt, "stream": False, **body}, client="foreign"
        )

    def request(self, method: str, path: str, body: Any = None, *, client: str = "test") -> Exchange:
        """Send a request and do not wait for the answer; a server that is down leaves it broken."""
        data = body if isinstance(body, bytes) else b"" if body is None else dumps(body)
        exchange = Exchange(method, path, data, client=client)
        try:
            self.submit(exchange)
        except ConnectionRefusedError:
            exchange.snap("connection refused")
        return exchange

    def stop(self, *, kill: bool = False) -> None:
        """End the server: connections are cut and refused.  With `kill` its runners live on as orphans."""
        with self.clock.turn:
            self.up = False
            self._starting = None
            load, self._load = self._load, None
            runners = [*self._runners, *([load.runner] if load else [])]
            if load is not None and load.next is not None:
                load.next.cancel()
            self._runners.clear()
            self._queue.clear()
            self._ps_waiting.clear()
            self._recovery = None
            self._touch()
            for runner in runners:
                runner.alive = False
                self._forget_timers(runner)
                if kill and runner.held_mib:
                    self._orphans.append(runner.owner)
                else:
                    self._release(runner)
                    self.counts["unloads"] += 1
            for exchange in tuple(self._open):
                exchange.snap("server stopped")

    def start(self, *, starting_s: float = 0.0) -> None:
        """Start it again, with nothing resident.  For `starting_s` it accepts connections and answers none."""
        with self.clock.turn:
            if self.up:
                return
            self.up = True
            if starting_s > 0:
                parked: list[Exchange] = []
                self._starting = parked
                self.clock.after(starting_s, lambda: self._started(parked))

    def reap_orphans(self) -> None:
        """Somebody kills the runners that a killed server left behind."""
        with self.clock.turn:
            orphans, self._orphans = self._orphans, []
            for owner in orphans:
                if self.card is not None:
                    self.card.release_after(owner, self.reclaim_s)

    # --- one request --------------------------------------------------------------------------------------------------

    def submit(self, exchange: Exchange) -> None:
        """Take a request in; the answer comes in the exchange.  Raises ConnectionRefusedError when stopped."""
        with self.clock.turn:
            if not self.up:
                raise ConnectionRefusedError("connection refused")
            self._open.add(exchange)
            exchange.note = lambda outcome: self._open.discard(exchange)
            if self._starting is not None:
                self._starting.append(exchange)
            elif self.latency_s > 0:
                self.clock.after(self.latency_s, lambda: self._handle(exchange))
            else:
                self._handle(exchange)

    def _started(self, parked: list[Exchange]) -> None:
        if self._starting is parked:
            self._starting = None
            for exchange in parked:
                self._handle(exchange)

    def _handle(self, exchange: Exchange) -> None:
        if exchange.closed:
            return
        path = exchange.path.partition("?")[0]
        body, refusal = None, None
        if exchange.method in ("POST", "DELETE", "PUT"):
            body, refusal = read_json(exchange.body)
        op = self._operation(exchange.method, path, body)
        entry = LogEntry(
            self.clock.monotonic(),
            exchange.client,
            op,
            exchange.method,
            exchange.path,
            exchange.body if body is None else body,
        )
        self.log.append(entry)
        exchange.note = lambda outcome: self._note(exchange, entry, outcome)
        fault = self.faults.take(op)
        if fault is None:
            self._route(exchange, path, body, refusal, None)
            return
        entry.fault = fault.kind
        self._misbehave(exchange, path, body, refusal, fault)

    def _note(self, exchange: Exchange, entry: LogEntry, outcome: str) -> None:
        self._open.discard(exchange)
        entry.status = exchange.status if not exchange.left else 499
        entry.outcome = f"fault {entry.fault}: {outcome}" if entry.fault else outcome
        entry.ended_at = self.clock.monotonic()

    def classify(self, exchange: Exchange) -> str:
        """The operation (one of `faults.OPERATIONS`) that a request is, as things stand now."""
        body = read_json(exchange.body)[0] if exchange.method == "POST" else None
        return self._operation(exchange.method, exchange.path.partition("?")[0], body)

    def _operation(self, method: str, path: str, body: Any) -> str:
        if path == "/api/ps":
            return "ollama.ps"
        if method == "POST" and path in ("/api/generate", "/api/chat", "/api/embed") and isinstance(body, dict):
            if path == "/api/embed":
                return "ollama.generate" if body.get("input") else "ollama.load"
            if body.get("messages") if path == "/api/chat" else body.get("prompt"):
                return "ollama.generate"
            if body.get("keep_alive") in (0, "0", "0s") and not isinstance(body["keep_alive"], bool):
                return "ollama.unload"
            runner = self._runner_named(body.get("model"))
            return "ollama.renew" if runner is not None and runner.alive and not runner.exiting else "ollama.load"
        if method == "POST" and path.startswith("/v1/"):
            return "ollama.generate"
        return {"/api/tags": "ollama.tags", "/api/show": "ollama.show", "/api/version": "ollama.version"}.get(
            path, "ollama.other"
        )

    def _misbehave(self, exchange: Exchange, path: str, body: Any, refusal: Refusal | None, fault: Fault) -> None:
        kind = fault.kind
        if kind == "before":
            exchange.snap()
        elif kind == "after":
            self._route(DeafExchange(exchange), path, body, refusal, None)
        elif kind == "late" and fault.op != "ollama.unload":
            self.clock.after(fault.delay_s, lambda: self._route(exchange, path, body, refusal, None))
        elif kind == "hang":
            self.faults.on_heal(lambda: self._route(exchange, path, body, refusal, None))
        elif kind == "silent":
            self._pretend(exchange, path, body)
        elif kind == "http_500":
            exchange.json(500, {"error": fault.args.get("text", "internal server error")})
        elif kind == "http_503":
            exchange.json(503, {"error": fault.args.get("text", BUSY_TEXT)})
        elif kind == "http_404":
            name = body.get("model", "") if isinstance(body, dict) else ""
            exchange.json(404, {"error": fault.args.get("text", f"model '{name}' not found")})
        elif kind == "html":
            page = (
                b"<!DOCTYPE html><html><head><title>Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>"
            )
            given = fault.args
            exchange.answer(given.get("status", 502), given.get("body", page), given.get("content_type", "text/html"))
        elif kind == "truncated":
            self._route(CutExchange(exchange), path, body, refusal, None)
        else:
            self._route(exchange, path, body, refusal, fault)

    def _pretend(self, exchange: Exchange, path: str, body: Any) -> None:
        name = body.get("model", "") if isinstance(body, dict) else ""
        if path in ("/api/ps", "/api/tags"):
            exchange.json(200, {"models": []})
        elif path in ("/api/generate", "/api/chat"):
            reason = "stop" if body.get("prompt") or body.get("messages") else "load"
            if body.get("keep_alive") in (0, "0", "0s") and reason == "load":
                reason = "unload"
            exchange.json(200, self._reply(name, path == "/api/chat", speech.Said(), done_reason=reason))
        else:
            exchange.json(200, {})

    # --- routes -------------------------------------------------------------------------------------------------------

    def _route(self, exchange: Exchange, path: str, body: Any, refusal: Refusal | None, fault: Fault | None) -> None:
        if exchange.closed:
            return
        host = exchange.request_headers.get("Host", "")
        if host and not is_local_host(host):
            exchange.answer(403, b"", "")
            return
        methods = _ROUTES.get("/v1/models/" if path.startswith("/v1/models/") else path)
        if methods is None:
            exchange.answer(404, b"404 page not found", "text/plain")
            return
        handler = methods.get(exchange.method)
        if handler is None:
            exchange.answer(405, b"405 method not allowed", "text/plain")
            return
        try:
            if exchange.method in ("POST", "DELETE"):
                if refusal is not None:
                    raise refusal
                if not isinstance(body, dict):
                    struct = _STRUCTS.get(path, "Request")
                    raise Refusal(400, f"json: cannot unmarshal {go_kind(body)} into Go value of type api.{struct}")
                check_kinds(body)
            handler(self, exchange, body, fault)
        except Refusal as no:
            exchange.json(no.status, {"error": no.text})

    def _get_root(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        exchange.answer(200, b"Ollama is running", "text/plain; charset=utf-8")

    def _get_version(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        exchange.json(200, {"version": self.version})

    def _get_status(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        exchange.json(200, {"cloud": {"disabled": True, "source": "env"}})

    def _get_tags(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        exchange.json(200, {"models": [self._tag(model) for model in self._newest_first()]})

    def _newest_first(self) -> list[SimulatedModel]:
        return list(reversed(self.models.values()))

    def _get_v1_models(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        data = [openai.listed(m.name, self.epoch_s) for m in self._newest_first()]
        exchange.json(200, {"object": "list", "data": data}, content_type=_JSON_STREAM)

    def _get_v1_model(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        name = exchange.path.partition("?")[0].removeprefix("/v1/models/")
        model = self.models.get(short_name(name).casefold())
        if model is None:
            exchange.json(404, openai.error(404, f"model '{name}' not found"), content_type=_JSON_STREAM)
            return
        exchange.json(200, openai.listed(model.name, self.epoch_s), content_type=_JSON_STREAM)

    def _post_v1_chat(self, exchange: Exchange, body: dict[str, Any], fault: Fault | None) -> None:
        self._translate(openai.Chat(exchange, body, self._created_s()), _S._post_chat, fault)

    def _post_v1_completion(self, exchange: Exchange, body: dict[str, Any], fault: Fault | None) -> None:
        self._translate(openai.Text(exchange, body, self._created_s()), _S._post_generate, fault)

    def _post_v1_embedding(self, exchange: Exchange, body: dict[str, Any], fault: Fault | None) -> None:
        self._translate(openai.Embedding(exchange, body, self._created_s()), _S._post_embed, fault)

    def _created_s(self) -> int:
        return int(self.epoch_s if self.frozen else self.epoch_s + self.clock.monotonic())

    def _translate(self, inner: openai.Translated, handler: _Handler, fault: Fault | None) -> None:
        try:
            try:
                native = inner.native()
            except (AttributeError, KeyError, TypeError):
                raise Refusal(400, "invalid message format") from None
            handler(self, inner, native, fault)
        except Refusal as no:
            inner.json(no.status, {"error": no.text})

    def _get_ps(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        if not self.old and any(runner.exiting or runner.pinged for runner in self._runners):
            self._ps_waiting.append(exchange)  # the scheduler holds its lock while a runner goes
            return
        if self._ps_body is None:
            runners = list(self._runners)
            if self._load is not None and self._load.listed:
                runners.append(self._load.runner)
            # By whole seconds, as the server compares them.
            runners.sort(key=lambda r: -(int(self.epoch_s * 1e9) + r.expires_ns) // 10**9)
            self._ps_body = dumps({"models": [self._listing(runner) for runner in runners]})
        exchange.answer(200, self._ps_body, _JSON)

    def _answer_ps(self, exchange: Exchange) -> None:
        self._get_ps(exchange, None, None)

    def _post_show(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        name = string_of(body, "model", "ShowRequest") or string_of(body, "name", "ShowRequest")
        if not name:
            raise Refusal(400, "model is required")
        model = self.models.get(short_name(name).casefold())
        if model is None:
            raise Refusal(404, f"model '{name if self.old else short_name(name)}' not found")
        exchange.begin(200, _JSON)
        exchange.push(dumps(self._card_of(model)))
        exchange.finish()

    def _card_of(self, model: SimulatedModel) -> dict[str, Any]:
        tensors, arch = model.tensors(), model.family
        return {
            "modelfile": '# Modelfile generated by "ollama show"\n'
            "# To build a new Modelfile based on this, replace FROM with:\n"
            f"# FROM {model.name}\n\nFROM /var/lib/ollama/models/blobs/sha256-{model.blob}\n"
            "TEMPLATE {{ .Prompt }}\n",
            "template": "{{ .Prompt }}",
            "details": self._details(model),
            "model_info": {
                "general.architecture": arch,
                "general.file_type": 0,
                "general.parameter_count": sum(math.prod(shape) for shape in tensors.values()),
                "general.quantization_version": 2,
                f"{arch}.attention.head_count": model.heads,
                f"{arch}.attention.head_count_kv": model.kv_heads,
                f"{arch}.attention.layer_norm_rms_epsilon": 1e-05,
                f"{arch}.block_count": model.layers,
                f"{arch}.context_length": model.trained_context,
                f"{arch}.embedding_length": model.width,
                f"{arch}.feed_forward_length": model.feed_forward,
                f"{arch}.rope.dimension_count": model.width // model.heads,
                f"{arch}.vocab_size": model.vocabulary,
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.model": arch,
                "tokenizer.ggml.scores": None,
                "tokenizer.ggml.token_type": None,
                "tokenizer.ggml.tokens": None,
                "tokenizer.ggml.unknown_token_id": 0,
            }
            | ({f"{arch}.vision.block_count": 32} if "vision" in model.capabilities else {}),
            "tensors": [{"name": name, "type": "F32", "shape": shape} for name, shape in tensors.items()],
            "capabilities": list(model.capabilities),
            "modified_at": timestamp(self.epoch_s, 0),
        }

    def _post_pull(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        name = short_name(string_of(body, "model", "PullRequest") or string_of(body, "name", "PullRequest"))
        pull(self, exchange, name, stream=body.get("stream") is not False)

    def _post_create(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        """Only `from` a model that is there: the weights are its own, the manifest is new."""
        name = short_name(string_of(body, "model", "CreateRequest") or string_of(body, "name", "CreateRequest"))
        source = self._named(string_of(body, "from", "CreateRequest"))
        self.add_model(evolve(source, name=name, digest=hashlib.sha256(dumps(body)).hexdigest()))
        lines = [f"using existing layer sha256:{source.blob}", "writing manifest", "success"]
        if body.get("stream") is False:
            exchange.json(200, {"status": lines[-1]})
            return
        exchange.begin(200, _NDJSON)
        for line in lines:
            exchange.push(dumps({"status": line}) + b"\n")
        exchange.finish()

    def _post_copy(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        source = self._named(string_of(body, "source", "CopyRequest"))
        self.add_model(evolve(source, name=short_name(string_of(body, "destination", "CopyRequest"))))
        exchange.answer(200, b"", "")

    def _named(self, name: str) -> SimulatedModel:
        model = self.models.get(short_name(name).casefold())
        if model is None:
            raise Refusal(404, f"model {json.dumps(name)} not found")
        return model

    def _delete(self, exchange: Exchange, body: Any, fault: Fault | None) -> None:
        name = string_of(body, "model", "DeleteRequest") or string_of(body, "name", "DeleteRequest")
        if self.models.pop(short_name(name).casefold(), None) is None:
            raise Refusal(404, f"model '{name}' not found")
        exchange.answer(200, b"", "")

    def _post_generate(self, exchange: Exchange, body: dict[str, Any], fault: Fault | None) -> None:
        name = string_of(body, "model", "GenerateRequest")
        prompt = string_of(body, "prompt", "GenerateRequest")
        keep_s = parse_keep_alive(body.get("keep_alive"))
        images = decode_images(body.get("images"))
        if not name:
            raise Refusal(404, "model '' not found")
        self._complete(exchange, body, name, prompt, images, keep_s, fault, chat=False, idle=not prompt)

    def _post_chat(self, exchange: Exchange, body: dict[str, Any], fault: Fault | None) -> None:
        name = string_of(body, "model", "ChatRequest")
        keep_s = parse_keep_alive(body.get("keep_alive"))
        messages = body.get("messages") or []
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise Refusal(400, "json: cannot unmarshal into Go struct field ChatRequest.messages of type []api.Message")
        images = [image for message in messages for image in decode_images(message.get("images"))]
        prompt = "\n".join(str(message.get("content", "")) for message in messages)
        if not name:
            raise Refusal(400, "model is required")
        self._complete(exchange, body, name, prompt, images, keep_s, fault, chat=True, idle=not messages)

    def _complete(
        self,
        exchange: Exchange,
        body: dict[str, Any],
        name: str,
        prompt: str,
        images: list[bytes],
        keep_s: float | None,
        fault: Fault | None,
        *,
        chat: bool,
        idle: bool,
    ) -> None:
        model = self._find(name, f"model '{name}' not found")
        if idle and keep_s == 0:
            self._unload(exchange, name, model, chat, fault)
            return
        verb = "chat" if chat else "generate"
        if "completion" not in model.capabilities:
            raise Refusal(400, f'"{name}" does not support {verb}')
        if body.get("think") and "thinking" not in model.capabilities:
            raise Refusal(400, f'"{name}" does not support thinking')
        for asked, capability in (("suffix", "insert"), ("tools", "tools")):
            if body.get(asked) and capability not in model.capabilities:
                raise Refusal(400, f"registry.ollama.ai/library/{model.name} does not support {capability}")
        options = _options(body.get("options"), model)
        stream = body.get("stream") is not False
        if idle:

            def ready(runner: Runner) -> None:
                exchange.json(200, self._reply(name, chat, speech.Said(), done_reason="load"))
                self._done(runner)

        else:
            arrived = self.clock.monotonic()

            def ready(runner: Runner) -> None:
                self._generate(exchange, runner, body, name, prompt, images, arrived, chat, stream, fault)

        self._need(Job(exchange, model, options, keep_s, ready, fault))

    def _post_embed(self, exchange: Exchange, body: dict[str, Any], fault: Fault | None) -> None:
        name = string_of(body, "model", "EmbedRequest")
        keep_s = parse_keep_alive(body.get("keep_alive"))
        value = body.get("input")
        if value is not None and not isinstance(value, str | list):
            raise Refusal(400, "invalid input type")
        texts = [value] if isinstance(value, str) else list(value or [])
        model = self._find(name, f'model "{name}" not found, try pulling it first')

        def ready(runner: Runner) -> None:
            if texts and "embedding" not in model.capabilities:
                exchange.json(501, {"error": "This server does not support embeddings. Start it with `--embeddings`"})
            else:
                vectors = [
                    [b / 255 for b in hashlib.sha256(str(text).encode(errors="replace")).digest()] for text in texts
                ]
                exchange.json(200, {"model": name, "embeddings": vectors})
            self._done(runner)

        self._need(Job(exchange, model, _options(body.get("options"), model), keep_s, ready, fault))

    def _post_embeddings(self, exchange: Exchange, body: dict[str, Any], fault: Fault | None) -> None:
        name = string_of(body, "model", "EmbeddingRequest")
        model = self._find(name, f'model "{name}" not found, try pulling it first')

        def ready(runner: Runner) -> None:
            if "embedding" in model.capabilities:
                digest = hashlib.sha256(str(body.get("prompt", "")).encode(errors="replace")).digest()
                exchange.json(200, {"embedding": [b / 255 for b in digest]})
            else:
                exchange.json(500, {"error": "This server does not support embeddings. Start it with `--embeddings`"})
            self._done(runner)

        keep_s = parse_keep_alive(body.get("keep_alive"))
        self._need(Job(exchange, model, _options(body.get("options"), model), keep_s, ready, fault))

    def _unload(self, exchange: Exchange, name: str, model: SimulatedModel, chat: bool, fault: Fault | None) -> None:
        def acknowledge() -> None:
            exchange.json(200, self._reply(name, chat, speech.Said(), done_reason="unload"))
            self._expire(model, fault)

        load = self._load
        if self.old and load is not None and load.listed and load.runner.model.blob == model.blob:
            load.unloads.append(acknowledge)
            return
        acknowledge()

    # --- answering ----------------------------------------------------------------------------------------------------

    def _generate(
        self,
        exchange: Exchange,
        runner: Runner,
        body: dict[str, Any],
        name: str,
        prompt: str,
        images: list[bytes],
        arrived: float,
        chat: bool,
        stream: bool,
        fault: Fault | None,
    ) -> None:
        def over() -> None:
            if work in runner.running:
                runner.running.remove(work)
            elif work in runner.waiting:
                runner.waiting.remove(work)
            if runner.waiting and len(runner.running) < self.num_parallel:
                following = runner.waiting.popleft()
                runner.running.append(following)
                following.start()
            self._done(runner)

        def left() -> None:
            if work.next is not None:
                work.next.cancel()
            over()

        def error(status: int, text: str) -> None:
            if exchange.status is not None:
                exchange.push(dumps({"error": text}) + b"\n")
                exchange.finish(text)
            elif stream:
                exchange.begin(status, _JSON_STREAM)
                exchange.push(dumps({"error": text}))
                exchange.finish(f"HTTP {status}")
            else:
                exchange.json(status, {"error": text})

        def refuse(status: int, text: str) -> None:
            error(status, text)
            over()

        def start() -> None:
            wanted_format = body.get("format")
            if isinstance(wanted_format, str) and wanted_format not in ("", "json"):
                text = json.dumps(json.dumps(wanted_format))
                refuse(500, f'invalid format: {text}; expected "json" or a valid JSON Schema object')
                return
            if images and "vision" not in runner.model.capabilities and not self.old:
                message = "Multimodal data provided, but model does not support multimodal requests."
                inner = {"error": {"code": 400, "message": message, "type": "invalid_request_error"}}
                refuse(400, dumps(inner).decode())
                return
            text = self.responder(runner.model.name, prompt, images)
            if isinstance(wanted_format, dict) and self.responder is _say_ok:
                text = fitting(wanted_format, text, images)
            words = [w + " " for w in text.split(" ")]
            words[-1] = words[-1][:-1]
            limit = int(runner_limit) if (runner_limit := (body.get("options") or {}).get("num_predict")) else 0
            cut = 0 < limit < len(words)
            words = words[:limit] if cut else words
            size = max(1, math.ceil(len(words) / 8))
            parts = speech.pieces(body, ["".join(words[i : i + size]) for i in range(0, len(words), size)])
            began = self.clock.monotonic()
            self.counts["generations"] += 1

            def facts() -> dict[str, Any]:
                now = self.clock.monotonic()
                load_s, run_s = (0.0, 0.0) if self.frozen else (began - arrived, now - began)
                # Token numbers of prompt and answer, for the next request; not where the prompt went in raw.
                context = {"context": list(range(259, 259 + len(prompt.split()) + len(words)))}
                return ({} if chat or body.get("raw") else context) | {
                    "total_duration": int((load_s + run_s) * 1e9),
                    "load_duration": int(load_s * 1e9),
                    "prompt_eval_count": len(prompt.split()) + 256 * len(images),
                    "prompt_eval_duration": int(run_s * 5e8),
                    "eval_count": len(words),
                    "eval_duration": int(run_s * 5e8),
                }

            reason = "length" if cut else "stop"

            def say(index: int) -> None:
                if fault is not None and fault.kind == "runner_dies" and index == (len(parts) + 1) // 2:
                    self._die(runner)
                    return
                if stream:
                    if index == 0:
                        exchange.begin(200, _NDJSON)
                    if index < len(parts):
                        exchange.push(dumps(self._reply(name, chat, parts[index], done=False)) + b"\n")
                        work.next = self.clock.after(self.generate_s / len(parts), lambda: say(index + 1))
                        return
                    last = self._reply(name, chat, speech.Said(), done_reason=reason) | facts()
                    exchange.push(dumps(last) + b"\n")
                    exchange.finish()
                else:
                    if index < len(parts):
                        work.next = self.clock.after(self.generate_s / len(parts), lambda: say(index + 1))
                        return
                    exchange.json(200, self._reply(name, chat, speech.whole(parts), done_reason=reason) | facts())
                over()

            say(0)

        work = Work(exchange, runner, start, lambda: error(500, self._texts.eof))
        exchange.on_leave = left
        if len(runner.running) < self.num_parallel:
            runner.running.append(work)
            start()
        else:
            runner.waiting.append(work)

    def _reply(
        self, name: str, chat: bool, said: speech.Said, *, done: bool = True, done_reason: str | None = None
    ) -> dict[str, Any]:
        now_ns = 0 if self.frozen else self._now_ns()
        reply: dict[str, Any] = {"model": name, "created_at": timestamp(self.epoch_s, now_ns)}
        reply |= said.fields(chat=chat)
        reply["done"] = done
        if done_reason is not None:
            reply["done_reason"] = done_reason
        if said.logprobs:
            reply["logprobs"] = list(said.logprobs)
        return reply

    def _find(self, name: str, missing: str) -> SimulatedModel:
        if name.endswith((":cloud", "-cloud")):
            raise Refusal(403, "ollama cloud is disabled: remote model is unavailable")
        model = self.models.get(short_name(name).casefold())
        if model is None:
            raise Refusal(404, missing)
        return model

    def _details(self, model: SimulatedModel) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": model.family,
            "families": [model.family],
            "parameter_size": model.parameter_size,
            "quantization_level": model.quantization,
        }

    def _tag(self, model: SimulatedModel) -> dict[str, Any]:
        details = self._details(model)
        tag: dict[str, Any] = {
            "name": model.name,
            "model": model.name,
            "modified_at": timestamp(self.epoch_s, 0),
            "size": int((model.disk_mib or 0.0) * MIB),
            "digest": model.digest,
            "details": details,
        }
        if not self.old:
            details["context_length"] = model.trained_context
            details["embedding_length"] = model.width
            tag["capabilities"] = list(model.capabilities)
        return tag

    def _listing(self, runner: Runner) -> dict[str, Any]:
        model = runner.model
        return {
            "name": model.name,
            "model": model.name,
            "size": int(runner.size_mib * MIB),
            "digest": model.digest,
            "details": self._details(model),
            "expires_at": timestamp(self.epoch_s, runner.expires_ns),
            "size_vram": int(runner.vram_mib * MIB),
            "context_length": runner.context,
        }

    def __repr__(self) -> str:
        state = "up" if self.up else "down"
        return f"<SimulatedOllama {self.version} {state}: {', '.join(self.loaded()) or 'nothing'} loaded>"


def _options(value: Any, model: SimulatedModel) -> dict[str, Any]:
    """Read the options that make a runner; raises `Refusal` for a wrong type, ignores what is unknown."""
    options: dict[str, Any] = {}
    for key, entry in (value or {}).items():
        if entry is None:
            continue
        if key in _INTEGER_OPTIONS:
            if isinstance(entry, bool) or not isinstance(entry, int | float) or not math.isfinite(entry):
                raise Refusal(500, f'option "{key}" must be of type integer')
        elif key in ("use_mmap", "shift") and not isinstance(entry, bool):
            raise Refusal(500, f'option "{key}" must be of type boolean')
        if key in RUNNER_OPTIONS:
            options[key] = int(entry) if key in _INTEGER_OPTIONS else entry
    return options


_JSON = "application/json; charset=utf-8"
_JSON_STREAM = "application/json"
_NDJSON = "application/x-ndjson"
_STRUCTS = {"/api/generate": "GenerateRequest", "/api/chat": "ChatRequest", "/api/show": "ShowRequest"}

_Handler = Callable[[SimulatedOllama, Exchange, Any, Fault | None], None]
_S = SimulatedOllama
_ROUTES: dict[str, dict[str, _Handler]] = {
    "/": {"GET": _S._get_root, "HEAD": _S._get_root},
    "/api/version": {"GET": _S._get_version, "HEAD": _S._get_version},
    "/api/tags": {"GET": _S._get_tags, "HEAD": _S._get_tags},
    "/api/status": {"GET": _S._get_status},
    "/api/ps": {"GET": _S._get_ps},
    "/api/show": {"POST": _S._post_show},
    "/api/pull": {"POST": _S._post_pull},
    "/api/create": {"POST": _S._post_create},
    "/api/copy": {"POST": _S._post_copy},
    "/api/delete": {"DELETE": _S._delete},
    "/api/generate": {"POST": _S._post_generate},
    "/api/chat": {"POST": _S._post_chat},
    "/api/embed": {"POST": _S._post_embed},
    "/api/embeddings": {"POST": _S._post_embeddings},
    "/v1/models": {"GET": _S._get_v1_models},
    "/v1/models/": {"GET": _S._get_v1_model},
    "/v1/chat/completions": {"POST": _S._post_v1_chat},
    "/v1/completions": {"POST": _S._post_v1_completion},
    "/v1/embeddings": {"POST": _S._post_v1_embedding},
}

__all__ = ["LogEntry", "SimulatedModel", "SimulatedOllama"]
