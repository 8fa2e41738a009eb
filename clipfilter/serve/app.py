"""The web server: routes to answers; nothing here computes."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipfilter.calibration import draw, find_rule, open_scored
from clipfilter.errors import ClipfilterError, RefusedError
from clipfilter.serve import answers
from clipfilter.serve.export import PolicyText, changed_text
from clipfilter.serve.guard import Guard, Handler
from clipfilter.serve.labels import LabelFile
from clipfilter.serve.pictures import Gallery, NoPictureError, Wanted
from clipfilter.serve.query import Changes, Name, Queries, RowsRequest, decode_picture
from clipfilter.serve.run import ServedRun

log = logging.getLogger("clipfilter.serve")

Asked = TypeVar("Asked", bound=BaseModel)

_MAX_BODY = 32 << 20
#: Files of the page: name -> (package, file, content type).
_STATIC = {
    "base.css": ("clipfilter.report", "style.css", "text/css"),
    "serve.css": ("clipfilter.serve", "static/serve.css", "text/css"),
    "icon.svg": ("clipfilter.serve", "static/icon.svg", "image/svg+xml"),
    **{
        name: ("clipfilter.serve", f"static/{name}", "text/javascript")
        for name in ("app.js", "dom.js", "detail.js", "grid.js", "labels.js", "rules.js", "state.js")
    },
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _EffectRequest(_Request):
    changes: Changes
    exact: bool = False


class _LabelRequest(_Request):
    position: Annotated[int, Field(ge=0)]
    rule: Name
    label: Literal[0, 1] | None


class _SampleRequest(_Request):
    rule: Name
    n: Annotated[int, Field(ge=1, le=100_000)]


class _ImageRequest(_Request):
    data: Annotated[str, Field(max_length=_MAX_BODY)]


class Server:
    """Serves one run to the browsers that hold the token."""

    def __init__(self, run: ServedRun, labels: LabelFile, policy: PolicyText | None, host: str) -> None:
        self._run = run
        self._labels = labels
        self._policy = policy
        self._queries = Queries(run, labels)
        self._pictures = Gallery(run.vectors)
        self.guard = Guard(host)
        self._stop = asyncio.Event()
        self.application = web.Application(
            middlewares=[self.guard.middleware, _sentences], client_max_size=_MAX_BODY + 4096
        )
        self.application.add_routes(
            [
                web.get("/", self._page),
                web.get("/static/{name}", self._static),
                web.get("/api/run", self._about),
                web.get(r"/api/row/{position:\d{1,10}}", self._row),
                web.get(r"/api/picture/{position:\d{1,10}}", self._picture),
                web.post("/api/rows", self._rows),
                web.post("/api/effect", self._effect),
                web.post("/api/export", self._export),
                web.post("/api/image", self._image),
                web.post("/api/label", self._label),
                web.post("/api/sample", self._sample),
            ]
        )

    async def run(self, port: int, ready: Callable[[str], None]) -> None:
        """Listen until SIGINT or SIGTERM. ready: told the address to open. Raises RefusedError when the port is taken."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._stop.set)
        runner = web.AppRunner(self.application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self.guard.host, port)
            try:
                await site.start()
            except OSError as error:
                raise RefusedError(
                    f"{self.guard.host}:{port} cannot be listened on ({error.strerror}); choose another --port or --host."
                ) from None
            self.guard.port = runner.addresses[0][1]
            shown = f"[{self.guard.host}]" if ":" in self.guard.host else self.guard.host
            ready(f"http://{shown}:{self.guard.port}/?token={self.guard.token}")
            self._run.warm()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _page(self, request: web.Request) -> web.Response:
        page = files("clipfilter.serve").joinpath("static/index.html").read_text(encoding="utf-8")
        response = web.Response(text=page, content_type="text/html")
        self.guard.admit(response)
        return response

    async def _static(self, request: web.Request) -> web.Response:
        found = _STATIC.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound
        package, name, kind = found
        return web.Response(body=files(package).joinpath(name).read_bytes(), content_type=kind, charset="utf-8")

    async def _about(self, request: web.Request) -> web.Response:
        return await _json(answers.about, self._run, self._labels)

    async def _row(self, request: web.Request) -> web.Response:
        return await _json(answers.row_explained, self._run, int(request.match_info["position"]))

    async def _rows(self, request: web.Request) -> web.Response:
        asked = await _body(request, RowsRequest)
        return await _json(lambda: answers.page_of(self._run, self._labels, asked, self._queries.find(asked)))

    async def _effect(self, request: web.Request) -> web.Response:
        asked = await _body(request, _EffectRequest)
        self._needs_policy()
        return await _json(lambda: answers.effect(self._run, asked.changes, exact=asked.exact))

    async def _export(self, request: web.Request) -> web.Response:
        asked = await _body(request, _EffectRequest)
        policy = self._needs_policy()

        def text() -> dict[str, Any]:
            assert self._run.plan.policy is not None
            changed = changed_text(policy, self._run.plan, asked.changes)
            return {"name": f"{self._run.plan.policy['policy']}.yaml", "text": changed.decode()}

        return await _json(text)

    async def _image(self, request: web.Request) -> web.Response:
        asked = await _body(request, _ImageRequest)
        return await _json(lambda: {"image": self._queries.add_image(decode_picture(asked.data))})

    async def _label(self, request: web.Request) -> web.Response:
        asked = await _body(request, _LabelRequest)

        def write() -> dict[str, Any]:
            row = answers.labelled_row(self._run, asked.position, asked.rule)
            self._labels.set(row, asked.rule, None if asked.label is None else bool(asked.label))
            return answers.label_state(self._run, self._labels, asked.rule)

        return await _json(write)

    async def _sample(self, request: web.Request) -> web.Response:
        asked = await _body(request, _SampleRequest)
        self._needs_policy()

        def start() -> dict[str, Any]:
            scored = open_scored(self._run.url)
            rule = find_rule(scored.policy, asked.rule)
            self._labels.start_sample(draw(scored, scored.policy, rule, n=asked.n, design="uniform", cut=None, seed=0))
            return answers.label_state(self._run, self._labels, asked.rule)

        return await _json(start)

    async def _picture(self, request: web.Request) -> web.Response:
        position = int(request.match_info["position"])
        columns = self._run.columns
        if position >= columns.rows:
            raise web.HTTPNotFound
        if columns.escalated[position]:
            return web.Response(status=403, text="Escalated pictures are never shown.\n")
        # Only what was kept, or asked for by a click, is shown clearly; a run that decided nothing hides nothing.
        clear = columns.decision[position] <= 0 or request.query.get("clear") == "1"
        size = "large" if request.query.get("size") == "large" else "small"
        try:
            jpeg = await self._pictures.get(Wanted(position, size, not clear))
        except NoPictureError as problem:
            return web.Response(status=404, text=f"{problem}\n")
        return web.Response(body=jpeg, content_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def _needs_policy(self) -> PolicyText:
        if self._policy is None:
            raise RefusedError("this run decides nothing; decide it with `clipfilter filter`, and serve that.")
        return self._policy


async def _body(request: web.Request, kind: type[Asked]) -> Asked:
    """The JSON body as this model. Raises RefusedError."""
    try:
        return kind.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RefusedError(f"{'.'.join(str(part) for part in first['loc'])[:80]}: {first['msg']}.") from None


async def _json(work: Callable[..., Any], *arguments: Any) -> web.Response:
    """The answer of `work`, which runs on a thread of its own."""
    return web.json_response(await asyncio.to_thread(work, *arguments), dumps=_dumps)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@web.middleware
async def _sentences(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as one sentence of JSON."""
    try:
        return await handler(request)
    except ClipfilterError as error:
        return web.json_response({"error": str(error)}, status=400)
    except web.HTTPException:
        raise
    except Exception as error:
        log.exception("%s %s", request.method, request.path)
        return web.json_response(
            {"error": f"this went wrong: {type(error).__name__} (the terminal says more)"}, status=500
        )
