"""A client that says to a real server exactly what a test wants said."""

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from underhood.workbench.server import Server


@dataclass
class Answer:
    """What the server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What was refused."""
        return self.json["error"]


class Client:
    """Speaks to a server as a program with the token does, unless told otherwise."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.results = server.desk.shelf.folder

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own."""
        return http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)

    def ask(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Answer:  # fmt: skip
        """One request."""
        sent = {"Authorization": f"Bearer {self.server.token}"} if headers is None else headers
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        line = self.connect()
        try:
            line.request(method, path, data, sent)
            answer = line.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            line.close()

    def get(self, path: str) -> Any:
        """A GET that must succeed."""
        answer = self.ask("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    def submit(self, do: str, **fields: Any) -> str:
        """The id of a job that must be accepted."""
        answer = self.ask("POST", "/api/jobs", {"do": do, **fields})
        assert answer.status == 202, answer.body
        return answer.json["id"]

    def events(self, job: str, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Numbered events of a job until it has ended."""
        line = self.connect()
        sent = {"Authorization": f"Bearer {self.server.token}", "Last-Event-ID": str(after)}
        line.request("GET", f"/api/jobs/{job}/events", headers=sent)
        answer = line.getresponse()
        assert answer.status == 200
        found: dict[str, str] = {}
        try:
            for raw in answer:
                text = raw.decode().rstrip("\n")
                if text:
                    name, _, value = text.partition(": ")
                    found[name] = value
                elif "data" in found:
                    yield int(found["id"]), found["event"], json.loads(found["data"])
                    found = {}
        finally:
            line.close()

    def parts(self, do: str, **fields: Any) -> list[dict[str, Any]]:
        """All parts that a job tells; it must end well."""
        job = self.submit(do, **fields)
        found = [data for _, kind, data in self.events(job) if kind == "part"]
        ended = self.get(f"/api/jobs/{job}")
        assert ended["state"] == "done", ended["error"]
        return [*found, {"name": "end", **ended}]

    def refused(self, do: str, **fields: Any) -> dict[str, Any]:
        """The error of a job that must fail."""
        job = self.submit(do, **fields)
        list(self.events(job))
        ended = self.get(f"/api/jobs/{job}")
        assert ended["state"] == "failed", ended
        return ended["error"]
