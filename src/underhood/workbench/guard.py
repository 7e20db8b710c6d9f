"""Who may ask, and what a browser may do with the answer. Plain ASGI, around everything.

- The *Host* header must name this server: a page elsewhere whose name was pointed at this machine
  (DNS rebinding) sends its own name.
- The *token* comes once in the address, then in a cookie that scripts cannot read and other sites
  cannot send; a program may send it as a bearer.
- The *Origin*, where a browser sends one, must be this server's.
- A *body* has a size, whatever its header claims.
- The *policy* header lets a page load scripts, data and pictures from this server only.
"""

import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ["Guard", "POLICY"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY = 2_000_000  # bytes
# Elements set inline styles (a bar's length); scripts are files of this server, without exception.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
CLOSED = """<!doctype html><html lang="en"><meta charset="utf-8"><title>underhood</title>
<h1>This address needs its token</h1>
<p>Open the whole address that <code>underhood serve</code> printed in its terminal
(it ends in <code>?token=...</code>).</p></html>"""


class Guard:
    """Wraps an app.

    Args:
        app: What answers when all is well.
        token: The secret of this server.
        port: Its port; with the host it makes the names that it answers to.
        host: The address it is bound to.
    """

    def __init__(self, app: App, *, token: str, port: int, host: str = "127.0.0.1") -> None:
        self.app, self.token, self.port = app, token, port
        self.names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self.anywhere = not loopback(host)
        # Cookies know no ports: without it, two servers of one machine would log each other out.
        self.cookie = f"underhood-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        entering = self._entering(scope)
        if (refused := self._refused(scope, headers, entering)) is not None:
            await _answer(send, *refused, page=scope["path"] == "/")
            return
        body = _Body(receive, send)
        await self.app(scope, body.receive, _dressed(body, self._pass() if entering else None))

    def _refused(
        self, scope: Scope, headers: dict[str, str], entering: bool
    ) -> tuple[int, str, str] | None:
        """Status, what is wrong and what to do; None lets the request through."""
        host = headers.get("host", "")
        if not self._named(host):
            return 421, "this server does not answer to that name", "use the address it printed"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "another site may not ask this server", "open the page itself"
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] != "GET":
            return 403, "another site may not ask this server", "open the page itself"
        if not entering and not self._known(headers):
            do = "open the whole address that `underhood serve` printed"
            return 401, "the token is missing or wrong", do
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > BODY:
            return 413, f"a request may have {BODY:,} bytes", "send less"
        return None

    def _named(self, host: str) -> bool:
        """Whether a Host header names this server."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            return False
        if (port or 80) != self.port or parts.username is not None or parts.path:
            return False
        # A number cannot be pointed elsewhere; a name can.
        return name in self.names or (self.anywhere and _numeric(name))

    def _known(self, headers: dict[str, str]) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._same(bearer.strip()):
            return True
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and self._same(found.value)

    def _same(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())

    def _entering(self, scope: Scope) -> bool:
        """Whether this is the address that was printed."""
        if scope["path"] != "/" or scope["method"] != "GET":
            return False
        said = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        return len(said) == 1 and self._same(said[0])

    def _pass(self) -> tuple[bytes, bytes]:
        words = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        return b"set-cookie", words.encode("latin-1")


class _Body:
    """Counts what a request sends, whatever its length header says."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self.send, self.size, self.over = receive, send, 0, False

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self.size += len(message.get("body", b""))
        if self.size > BODY:
            self.over = True
            return {"type": "http.disconnect"}
        return message


def _dressed(body: _Body, cookie: tuple[bytes, bytes] | None) -> Send:
    """`send` with the headers that every answer has."""

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in message.get("headers", ())}
            extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
            message["headers"] = [
                *message.get("headers", ()),
                *extra,
                *([cookie] if cookie else []),
            ]
        await body.send(message)

    return send


async def _answer(send: Send, status: int, what: str, do: str, *, page: bool) -> None:
    """A refusal: JSON for programs; for a person who opens the page, a sentence."""
    error = {"type": "Refused", "what": what, "given": None, "why": None, "do": do}
    text, kind = json.dumps({"error": error}), b"application/json"
    if page and status == 401:
        text, kind = CLOSED, b"text/html; charset=utf-8"
    headers = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
    start = {"type": "http.response.start", "status": status}
    await send(start | {"headers": [(b"content-type", kind), *headers]})
    await send({"type": "http.response.body", "body": text.encode()})


def loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _numeric(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
