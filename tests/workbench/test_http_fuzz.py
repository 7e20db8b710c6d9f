"""Any request gets an answer: no 500, no traceback, no file outside the results folder touched."""

import copy
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web_client import Client

from underhood.view import sentences
from underhood.workbench.app import ROUTES
from underhood.workbench.desk import actions
from underhood.workbench.palette import builders
from underhood.workbench.server import Server

WAYS = sorted({(route.path, method) for route in ROUTES for method in route.methods or ()})
QUICK = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PROMPT = "When Mary and John went to the store, John gave a drink to"
words = st.text(max_size=30) | st.sampled_from(
    [
        "../../secret",
        "/etc/passwd",
        "a" * 300,
        "\x00",
        "..",
        "village",
        "town",
        "wired/xor",
        "-1",
        "1e9",
        "<script>",
    ]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | words
value = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


sites = st.sampled_from(
    ["resid_post.1", "z.1.0", "z", "scores.0", "pattern.1", "logits", "embed", "module:model",
     "module:", "z.-1", "resid_post.99", "mlp_post.0.3", "expert_out.0.0", "*", "resid_*", ""]
) | words  # fmt: skip
edit = st.fixed_dictionaries(
    {"site": sites, "op": st.sampled_from(sorted(builders())) | words},
    optional={
        "fields": st.dictionaries(
            st.sampled_from(["factor", "vector", "value", "source", "directions", "block", "only",
                             "weight", "bias", "encoder", "decoder", "forbid", "force", "shift"]),
            value | st.just({"prompts": [PROMPT]}) | st.just({"prompt": PROMPT}), max_size=3,
        ),
        "pos": st.lists(st.integers(-20, 20), max_size=3), "phase": words,
        "strength": st.floats(), "unit": st.sampled_from(["raw", "sigma", "norm", "kl"]),
        "saved": words, "index": st.integers(),
    },
)  # fmt: skip
edits = st.lists(edit, max_size=2)
BASES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "look": {"prompt": st.just(PROMPT) | words},
    "site": {"prompt": st.just(PROMPT), "site": sites},
    "generate": {
        "prompt": st.just(PROMPT), "max_new_tokens": st.integers(1, 3), "sample": st.booleans(),
        "columns": st.lists(st.fixed_dictionaries({"edits": edits}), max_size=2),
    },
    "plan": {"name": words, "prompt": st.just(PROMPT), "edits": edits},
    "method": {
        "name": st.sampled_from(["logit_lens", "attention", "sinks", "direct_attribution"]) | words,
        "prompts": st.lists(st.just(PROMPT) | words, max_size=2), "contrasts": st.lists(words),
        "options": st.dictionaries(st.sampled_from(["top", "layers", "seed", "heads"]), words),
    },
}  # fmt: skip


def nearly(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """A request that could be right, often with one field that is not."""
    good = st.fixed_dictionaries(BASES.get(name, {}))
    fields = st.sampled_from([*actions()[name].asks.model_fields, "other"])
    wrong = st.just({}) | st.dictionaries(fields, value, max_size=1)
    return st.tuples(good, wrong).map(lambda both: {"do": name, **both[0], **both[1]})


requests = st.one_of(value, *[nearly(n) for n in actions() if n not in ("load", "methods")])


def census(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with size and time."""
    found = {}
    for root, _, files in os.walk(folder):
        for name in files:
            state = (Path(root) / name).stat()
            found[f"{root}/{name}"] = (state.st_size, state.st_mtime_ns)
    return found


def sound(status: int, body: bytes) -> None:
    assert status < 500 or status == 503, body[:500]
    for mark in (b"Traceback", b'File "', b"site-packages"):
        assert mark not in body, body[:500]


@QUICK
@given(route=st.sampled_from(WAYS), inside=words, query=st.dictionaries(words, words, max_size=3),
       body=st.none() | value | st.binary(max_size=50))  # fmt: skip
def test_any_address(
    client: Client, route: tuple[str, str], inside: str, query: dict[str, str], body: Any
) -> None:
    path, method = route
    for name in ("{id}", "{name}"):
        path = path.replace(name, quote(inside, safe=""))
    asked = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in query.items())
    raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    answer = client.ask(method, f"{path}?{asked}", raw=raw)
    sound(answer.status, answer.body)
    if answer.status >= 400 and method != "HEAD":
        assert answer.error["what"]


@QUICK
@given(said=requests)
def test_any_job(server: Server, client: Client, said: Any) -> None:
    """A request is refused, or its job ends in words; either way the next one is served."""
    around = server.desk.shelf.folder.parent
    before = {k: v for k, v in census(around).items() if "/results/" not in k}
    answer = client.ask("POST", "/api/jobs", raw=json.dumps(said).encode())
    sound(answer.status, answer.body)
    if answer.status == 202:
        job = answer.json["id"]
        if isinstance(said, dict) and said.get("model") not in (None, "village"):
            client.ask("DELETE", f"/api/jobs/{job}")  # loading others takes long
        list(client.events(job))
        ended = client.get(f"/api/jobs/{job}")
        assert ended["state"] in ("done", "failed", "cancelled")
        sound(200, json.dumps(ended).encode())
        if ended["error"]:
            assert "nobody foresaw" not in ended["error"]["what"], (said, ended["error"])
    after = {k: v for k, v in census(around).items() if "/results/" not in k}
    assert after == before
    assert client.ask("GET", "/api/models").status == 200


@pytest.fixture(scope="module")
def documents(client: Client) -> dict[str, Any]:
    """One good file of each kind; the explanation is a short one."""
    edit = {"site": "z.1.0", "op": "scale", "fields": {"factor": 0.5}}
    ids = [
        client.parts("method", name="sinks", prompts=[PROMPT])[-1]["result"],
        client.parts("plan", prompt=PROMPT, edits=[edit])[-1]["result"],
    ]
    views = [sentences(["It is."], title="t").to_dict()]
    section = {"id": "a", "number": 1, "title": "t", "question": "q", "answer": "It is.",
               "folded": False, "views": views}  # fmt: skip
    short = {"schema": "explanation/1", "prompt": PROMPT, "answer": "Mary", "sections": [section],
             "sentences": ["So.", "It is."], "provenance": {"call": "x"}}  # fmt: skip
    (client.results / "short.json").write_text(json.dumps(short))
    assert client.get("/api/results/short")["lead"] == ["So."]
    return {k: json.loads((client.results / f"{k}.json").read_text()) for k in [*ids, "short"]}


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a document, at most four deep."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, inner in list(items)[:12]:
        found.append((*at, key))
        if isinstance(inner, dict | list) and len(at) < 3:
            found += places(inner, (*at, key))
    return found


@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_any_damage_to_a_file(
    client: Client, documents: dict[str, Any], data: st.DataObject
) -> None:
    """A part of a kept file is replaced or taken out: it opens, or says what is wrong."""
    key = data.draw(st.sampled_from(sorted(documents)))
    document = copy.deepcopy(documents[key])
    *way, last = data.draw(st.sampled_from(places(document)))
    inner = document
    for step in way:
        inner = inner[step]
    if data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(value)
    damaged = client.results / "damaged.json"
    damaged.write_text(json.dumps(document))
    arrays = client.results / f"{key}.safetensors"
    if arrays.exists():
        (client.results / "damaged.safetensors").write_bytes(arrays.read_bytes())
    try:
        for path in ("", "/report"):
            answer = client.ask("GET", f"/api/results/damaged{path}")
            sound(answer.status, b"" if answer.status == 200 else answer.body)
        listed = client.ask("GET", "/api/results")
        assert listed.status == 200 and "damaged" in listed.body.decode()
        assert client.ask("GET", f"/api/compare?a=damaged&b={key}").status < 500
    finally:
        damaged.unlink()
