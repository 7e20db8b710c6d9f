"""A real server in a thread."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_client import Client

import underhood as uh
from underhood.workbench.server import Server

MODEL = "village"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(MODEL, results=tmp_path_factory.mktemp("server") / "results", port=0)
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    list(Client(made).events(Client(made).submit("load")))
    yield made
    made.stop()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    return Client(server)


@pytest.fixture(scope="session")
def model() -> uh.Model:
    """The server's model, loaded a second time: tests compare with what Python finds."""
    return uh.load(MODEL)


@pytest.fixture(scope="session")
def pair(client: Client) -> dict[str, str]:
    """The model's first example."""
    facts = next(p for p in client.parts("load") if p["name"] == "model")["facts"]
    example = dict(facts["examples"][0])
    return {column: example[column] for column in ("prompt", "contrast", "answer", "wrong")}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that no request may reach."""
    place = tmp_path / "secret.json"
    place.write_text('{"schema": "result/1"}', encoding="utf-8")
    return place
