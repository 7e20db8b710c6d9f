"""Who may ask, and what a browser may do with the answer."""

import re
from pathlib import Path

import pytest
from web_client import Client

from underhood.core.errors import UsageError
from underhood.workbench.app import make_app
from underhood.workbench.guard import BODY, Guard
from underhood.workbench.server import Server


def bearer(client: Client, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {client.server.token}", **more}


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/models", "/api/jobs", "/nothing"])
def test_nothing_without_the_token(client: Client, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "underhood-1=x"}):
        answer = client.ask("GET", path, headers=headers)
        assert answer.status == 401
        assert client.server.token not in answer.body.decode()


def test_the_token_comes_once_and_then_as_a_cookie(client: Client) -> None:
    entered = client.ask("GET", f"/?token={client.server.token}", headers={})
    assert entered.status == 200
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    again = client.ask("GET", "/api/models", headers={"Cookie": cookie.partition(";")[0]})
    assert again.status == 200
    wrong = client.ask("GET", "/?token=wrong", headers={})
    assert wrong.status == 401 and "set-cookie" not in wrong.headers
    elsewhere = client.ask("GET", f"/api/models?token={client.server.token}", headers={})
    assert elsewhere.status == 401, "the token opens the page only"


HOSTS = ("evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "",
         "localhost:{port}@evil.example", "[::1", "a b:{port}")  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_other_names_are_not_answered(client: Client, host: str) -> None:
    named = host.format(port=client.server.port)
    assert client.ask("GET", "/api/models", headers=bearer(client, Host=named)).status in (400, 421)


def test_own_names_are_answered(client: Client) -> None:
    for name in ("127.0.0.1", "localhost", "LOCALHOST"):
        headers = bearer(client, Host=f"{name}:{client.server.port}")
        assert client.ask("GET", "/api/models", headers=headers).status == 200


def test_other_sites_may_not_ask(client: Client) -> None:
    own = f"http://127.0.0.1:{client.server.port}"
    for origin, status in (
        (own, 400),
        ("http://evil.example", 403),
        ("null", 403),
        (f"{own}9", 403),
    ):
        headers = bearer(client, Origin=origin)
        assert client.ask("POST", "/api/jobs", {}, headers=headers).status == status
    headers = bearer(client, **{"Sec-Fetch-Site": "cross-site"})
    assert client.ask("POST", "/api/jobs", {}, headers=headers).status == 403


def test_bodies_have_a_size(client: Client) -> None:
    assert client.ask("POST", "/api/jobs", raw=b"x" * (BODY + 1)).status == 413
    line = client.connect()
    line.putrequest("POST", "/api/jobs")
    for name, value in bearer(client, **{"Transfer-Encoding": "chunked"}).items():
        line.putheader(name, value)
    line.endheaders()
    for _ in range(3):  # no length is claimed; it is counted
        line.send(b"%x\r\n" % (BODY // 2) + b"y" * (BODY // 2) + b"\r\n")
    line.send(b"0\r\n\r\n")
    assert line.getresponse().status == 413
    line.close()
    assert client.ask("GET", "/api/models").status == 200


def test_every_answer_carries_the_policy(client: Client) -> None:
    for path in ("/", "/static/app.js", "/api/models", "/nothing"):
        policy = client.ask("GET", path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "http" not in policy, "no foreign host"
    closed = client.ask("GET", "/", headers={})
    assert "content-security-policy" in closed.headers


def test_pages_name_no_foreign_host_and_no_inline_script(client: Client) -> None:
    page = client.ask("GET", "/").body.decode()
    assert re.findall(r"<script(?![^>]*src=)", page) == []
    from underhood.workbench.app import _files

    for name in _files():
        answer = client.ask("GET", f"/static/{name}")
        assert answer.status == 200, name
        text = answer.body.decode()
        assert not re.search(r"""(?:src|href|url\(|import|from)\s*=?\s*["'(]https?:""", text), name


PLACES = ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", "%2fetc%2fpasswd",
          "app.js%00", "__init__.py", "static/app.js")  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_only_listed_files_are_served(client: Client, name: str) -> None:
    answer = client.ask("GET", f"/static/{name}")
    assert answer.status == 404
    assert b"import" not in answer.body


def test_others_need_a_token_that_was_chosen(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="token"):
        Server("village", host="0.0.0.0", results=tmp_path, port=0)
    for token in ("", "short", "with a space", "with&and", "with;semicolon", "schlüssel"):
        with pytest.raises(UsageError, match="cannot be a token"):
            Server("village", token=token, results=tmp_path, port=0)


def test_a_taken_port_is_said(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot listen"):
        Server("village", port=client.server.port, results=tmp_path)


def test_a_server_for_others_answers_to_numbers_only(client: Client) -> None:
    guard = Guard(make_app(client.server.desk), token="t", port=80, host="0.0.0.0")
    assert guard._named("192.168.1.7:80") and guard._named("192.168.1.7")
    assert not guard._named("evil.example:80")
