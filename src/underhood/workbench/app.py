"""The routes. Each parses, asks the desk, and answers with JSON; no torch here.

An error of ours is an answer: what, given, why, do. Anything else is said in one line, and its
traceback goes to the server's own log. `docs/workbench.md` lists the routes; a test says that it
lists all of them.
"""

import json
import logging
from collections.abc import AsyncIterator
from functools import cache
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from underhood.core.errors import FileProblem, NotOffered, UnderhoodError, UsageError
from underhood.view.clean import clean
from underhood.workbench.asking import Asked, Prompt, Short, validated
from underhood.workbench.desk import Desk
from underhood.workbench.guard import BODY
from underhood.workbench.jobs import QueueFull, refusal
from underhood.workbench.palette import palette
from underhood.workbench.shelf import compared

__all__ = ["ROUTES", "make_app"]

log = logging.getLogger("underhood.workbench")

TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css",
         ".html": "text/html", ".svg": "image/svg+xml"}  # fmt: skip
SHARED = {"underhood.mjs": "static/underhood.mjs", "style.css": "style.css"}
"""Files of `underhood.view` that the pages use: the elements, and the drawings' style sheet."""


class Text(Asked):
    """A text to cut into tokens."""

    model: Short | None = None
    text: Prompt


def make_app(desk: Desk) -> Starlette:
    """The routes over a desk."""
    handlers: dict[Any, Any] = {
        UnderhoodError: _refused, HTTPException: _unknown, ClientDisconnect: _too_much,
        Exception: _unforeseen,
    }  # fmt: skip
    app = Starlette(routes=ROUTES, exception_handlers=handlers)
    app.state.desk = desk
    return app


# Answers ----------------------------------------------------------------------------------------


def _json(value: Any, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return JSONResponse(clean(value), status_code=status, headers=headers)


def _status(error: UnderhoodError) -> int:
    if isinstance(error, QueueFull):
        return 503
    if isinstance(error, FileProblem):
        return 404
    return 422 if isinstance(error, NotOffered) else 400


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, UnderhoodError)
    return _json({"error": refusal(error)}, _status(error))


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = error.status_code == 404
    wrong = UsageError(
        "there is no such address" if missing else "this address takes no such request",
        given=f"{request.method} {request.url.path}"[:200],
        do="see docs/workbench.md",
    )  # fmt: skip
    headers = dict(error.headers or {})
    return JSONResponse({"error": refusal(wrong)}, status_code=error.status_code, headers=headers)


async def _too_much(request: Request, error: Exception) -> Response:
    return _json(
        {
            "error": refusal(
                UsageError("the request is too large", do=f"send at most {BODY:,} bytes")
            )
        },
        413,
    )


async def _unforeseen(request: Request, error: Exception) -> Response:
    return _json({"error": refusal(error)}, 500)


async def _said(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        UsageError: It carries none.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    raw = await request.body()
    try:
        value = json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            "the request is not JSON", given=f"{len(raw)} bytes", why=str(error)[:200],
            do='send an object, such as {"do": "look", "prompt": "..."}',
        ) from None  # fmt: skip
    if not isinstance(value, dict):
        raise UsageError(
            "the request is not a JSON object", given=type(value).__name__,
            do='send an object, such as {"do": "look", "prompt": "..."}',
        )  # fmt: skip
    return value


def _desk(request: Request) -> Desk:
    return request.app.state.desk


def _number(request: Request, name: str, words: str | None) -> int:
    """A count in an address or a header, 0 where there is none."""
    if words is None or words == "":
        return 0
    if not words.isascii() or not words.isdecimal() or len(words) > 12:
        raise UsageError(f"{name} is a number", given=words[:80], do="write digits only")
    return int(words)


# Pages ------------------------------------------------------------------------------------------


@cache
def _files() -> dict[str, Any]:
    """Every file that is served, by name. A name that is not here is not served."""
    own = resources.files("underhood.workbench").joinpath("static")
    found: dict[str, Any] = {p.name: p for p in own.iterdir() if p.is_file()}
    view = resources.files("underhood.view")
    return found | {name: view.joinpath(path) for name, path in SHARED.items()}


def _file(name: str) -> Response:
    place = _files().get(name)
    kind = TYPES.get(name[name.rfind(".") :])
    if place is None or kind is None or not place.is_file():
        raise HTTPException(404)
    headers = {"cache-control": "no-cache"}
    return Response(place.read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)


async def _page(request: Request) -> Response:
    return _file("index.html")


async def _static(request: Request) -> Response:
    return _file(request.path_params["name"])


# Models -----------------------------------------------------------------------------------------


async def _models(request: Request) -> Response:
    models = _desk(request).models
    rows = [{"name": name, "loaded": models.known(name) is not None} for name in models.names]
    return _json({"first": models.first, "models": rows})


async def _model(request: Request) -> Response:
    models = _desk(request).models
    name = models.check(request.query_params.get("model"))
    loaded = models.known(name)
    return _json({"name": name, "loaded": loaded is not None, **(loaded.facts if loaded else {})})


async def _methods(request: Request) -> Response:
    loaded = _desk(request).models.known(request.query_params.get("model"))
    return _json({"methods": loaded.methods if loaded is not None else None})


async def _palette(request: Request) -> Response:
    return _json(palette())


async def _tokens(request: Request) -> Response:
    asked = validated(Text, await _said(request))
    loaded = _desk(request).models.known(asked.model)
    if loaded is None:
        raise UsageError("the model is not loaded yet", given=asked.model, do="load it first")
    return _json(await run_in_threadpool(loaded.tokens, asked.text))


# Jobs -------------------------------------------------------------------------------------------


async def _jobs(request: Request) -> Response:
    return _json({"jobs": [job.public() for job in _desk(request).worker.jobs()]})


async def _submit(request: Request) -> Response:
    said = await _said(request)
    return _json(_desk(request).submit(said).public(), 202)


async def _job(request: Request) -> Response:
    return _json(_desk(request).worker.find(request.path_params["id"]).public())


async def _cancel(request: Request) -> Response:
    job = _desk(request).worker.find(request.path_params["id"])
    job.cancel()
    return _json(job.public())


async def _events(request: Request) -> Response:
    job = _desk(request).worker.find(request.path_params["id"])
    last = request.headers.get("last-event-id") or request.query_params.get("after")
    after = _number(request, "the last event", last)

    async def stream() -> AsyncIterator[str]:
        async for event in job.events(after):
            if event is None:
                yield ": still here\n\n"
                continue
            data = json.dumps(event.data, ensure_ascii=False, allow_nan=False, default=str)
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {data}\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)


# Results ----------------------------------------------------------------------------------------


async def _results(request: Request) -> Response:
    return _json({"results": await run_in_threadpool(_desk(request).shelf.entries)})


async def _result(request: Request) -> Response:
    return _json(await run_in_threadpool(_desk(request).shelf.open, request.path_params["id"]))


async def _drop(request: Request) -> Response:
    key = request.path_params["id"]
    await run_in_threadpool(_desk(request).shelf.drop, key)
    return _json({"deleted": key})


async def _report(request: Request) -> Response:
    key = request.path_params["id"]
    page = await run_in_threadpool(_desk(request).shelf.report, key)
    # As a file: the report brings a policy of its own, and is not a page of this server.
    headers = {"content-disposition": f'attachment; filename="{key}.html"'}
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


async def _compare(request: Request) -> Response:
    shelf = _desk(request).shelf
    keys = [request.query_params.get(name, "") for name in ("a", "b")]

    def both() -> dict[str, Any]:
        return compared(*[shelf.open(key) for key in keys])

    return _json(await run_in_threadpool(both))


ROUTES = [
    Route("/", _page),
    Route("/static/{name}", _static),
    Route("/api/models", _models),
    Route("/api/model", _model),
    Route("/api/methods", _methods),
    Route("/api/palette", _palette),
    Route("/api/tokens", _tokens, methods=["POST"]),
    Route("/api/jobs", _jobs),
    Route("/api/jobs", _submit, methods=["POST"]),
    Route("/api/jobs/{id}", _job),
    Route("/api/jobs/{id}", _cancel, methods=["DELETE"]),
    Route("/api/jobs/{id}/events", _events),
    Route("/api/results", _results),
    Route("/api/results/{id}", _result),
    Route("/api/results/{id}", _drop, methods=["DELETE"]),
    Route("/api/results/{id}/report", _report),
    Route("/api/compare", _compare),
]
