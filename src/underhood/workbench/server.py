"""The server: a socket on this machine, an address with a secret in it, uvicorn."""

import contextlib
import logging
import re
import secrets
import socket
import threading
import webbrowser
from pathlib import Path

import uvicorn

from underhood.core.errors import UsageError
from underhood.workbench.app import make_app
from underhood.workbench.desk import Desk
from underhood.workbench.guard import Guard, loopback
from underhood.workbench.jobs import Worker
from underhood.workbench.models import Models
from underhood.workbench.shelf import Shelf

__all__ = ["PORT", "Server"]

PORT = 8470
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,}")
RESULTS = Path("underhood-results")


class Server:
    """A workbench that is ready to run.

    Args:
        model: What to load first; None: the built-in model.
        results: Folder of results; made when the first one is kept.
        host: Address to bind to.
        port: Port; 0 takes a free one. None: the usual one, or a free one where it is taken.
        token: Secret of the address; None makes one.
        device: Where models run.
        dtype: Their precision.

    Raises:
        UsageError: The port is taken, the address is not this machine's, or a host that others can
            reach without a token of one's own.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        results: Path = RESULTS,
        host: str = "127.0.0.1",
        port: int | None = None,
        token: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        if token is None and not loopback(host):
            raise UsageError(
                "others can reach this address, so it needs a token that you chose",
                given=f"--host {host}",
                why="whoever has the token can run the model and read the results",
                do="add --token SECRET, or leave --host out and use an SSH tunnel",
            )
        if token is not None and not _TOKEN.fullmatch(token):
            raise UsageError(
                "this cannot be a token",
                given=f"{len(token)} characters",
                why="it stands in an address: eight or more letters, digits and . _ ~ -",
                do="choose another, or leave --token out",
            )
        self.host, self.token = host, token or secrets.token_urlsafe(24)
        self.socket = _bound(host, port)
        self.port: int = self.socket.getsockname()[1]
        models = Models(model, device=device, dtype=dtype)
        self.desk = Desk(models, Shelf(results.resolve()))
        guard = Guard(make_app(self.desk), token=self.token, port=self.port, host=host)
        self._uvicorn = _Uvicorn(self.desk.worker, uvicorn.Config(
            guard, log_level="warning", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=1,
        ))  # fmt: skip

    @property
    def url(self) -> str:
        """The address to open, secret included."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/?token={self.token}"

    def run(self, *, browser: bool = False) -> None:
        """Load the first model, and serve until Ctrl-C or `stop`."""
        self.desk.submit({"do": "load"})
        if browser:
            threading.Thread(target=webbrowser.open, args=(self.url,), daemon=True).start()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self._uvicorn.run(sockets=[self.socket])
        finally:
            self.desk.worker.close()
            self.socket.close()

    def stop(self) -> None:
        """Ask it to end, from another thread."""
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Lets go of pages that follow a job before it waits for connections to end."""

    def __init__(self, worker: Worker, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Jobs are cancelled, streams end, then the server does."""
        self._worker.leave()
        await super().shutdown(sockets)


def _bound(host: str, port: int | None) -> socket.socket:
    """A listening socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = [PORT, 0] if port is None else [port]
    for number in ports:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, number))
        except (OSError, OverflowError) as error:
            found.close()
            if number == ports[-1]:
                raise UsageError(
                    "the server cannot listen there", given=f"{host}, port {number}",
                    why=getattr(error, "strerror", None) or str(error),
                    do="choose another --port (0 takes a free one), or another --host",
                ) from None  # fmt: skip
            continue
        found.listen(128)
        return found
    raise AssertionError("unreachable")


logging.getLogger("underhood.workbench").addHandler(logging.StreamHandler())
