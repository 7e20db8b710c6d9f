"""What the server finds is what Python finds; what is wrong is said, and nothing else suffers."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from web_client import Client

import underhood as uh
from underhood.core.edit import Plan
from underhood.view import View
from underhood.workbench.changing import KL, SURPRISE
from underhood.workbench.server import Server


def part(parts: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(p for p in parts if p["name"] == name)


# Looking ----------------------------------------------------------------------------------------


def test_the_model_is_told_as_it_is(client: Client, model: uh.Model) -> None:
    client.parts("load")
    facts = client.get("/api/model")
    assert facts["layers"] == model.n_layers and facts["heads"] == model.n_heads
    assert facts["examples"] and facts["sites"]
    assert {s.name for s in model.sites() if s.kind.writable} == set(facts["writable"])
    tokens = client.ask("POST", "/api/tokens", {"text": facts["examples"][0]["prompt"]}).json
    assert tokens["ids"] == model.tokens(facts["examples"][0]["prompt"]).ids[0].tolist()


def test_methods_say_whether_they_are_offered(client: Client, server: Server) -> None:
    """An organism without attention: what needs heads says why not; the rest is offered."""
    client.parts("methods")
    cards = {m["name"]: m for m in client.get("/api/methods")["methods"]}
    from underhood.methods import names

    assert set(cards) == {n for found in names().values() for n in found}
    assert not [n for n, card in cards.items() if card["refused"]], "village offers everything"
    client.parts("methods", model="stream")
    plain = {m["name"]: m for m in client.get("/api/methods?model=stream")["methods"]}
    refused = {n for n, card in plain.items() if card["refused"]}
    stream = uh.load("stream")
    for name in ("attention", "logit_lens"):
        prompt = client.get("/api/model?model=stream")["examples"][0]["prompt"]
        try:
            getattr(uh.read, name)(stream, prompt)
        except uh.UnderhoodError as error:
            assert name in refused and error.what in plain[name]["refused"]
        else:
            assert name not in refused


def test_look_shows_what_the_model_says(client: Client, model: uh.Model, pair: dict) -> None:
    parts = client.parts("look", prompt=pair["prompt"])
    chance = model.run(pair["prompt"]).last_logits[0].softmax(-1)
    view = part(parts, "next")["view"]
    assert view["labels"][0] == model.token_text(int(chance.argmax()))
    assert view["values"][0] == pytest.approx(float(chance.max()), abs=1e-5)
    lens = uh.read.logit_lens(model, pair["prompt"])
    assert (
        part(parts, "lens")["view"]["views"][0]["values"]
        == lens.view.to_dict()["views"][0]["values"]
    )
    readings = part(parts, "readings")
    assert readings["tokens"] == lens["top_token"].values.tolist()
    strip = part(parts, "tokens")["view"]["values"]
    ids = model.tokens(pair["prompt"]).ids[0]
    after = model.run(pair["prompt"]).logits[0].softmax(-1)
    assert strip[0] is None
    assert strip[3] == pytest.approx(float(after[2, ids[3]]), abs=1e-5)


@pytest.mark.parametrize("site", ["resid_post.1", "pattern.0", "scores.0", "z.1.0", "logits"])
def test_statistics_of_a_site(client: Client, model: uh.Model, pair: dict, site: str) -> None:
    view = part(client.parts("site", prompt=pair["prompt"], site=site), "site")["view"]
    rows = next(v for v in view["views"] if v["kind"] == "table")["rows"]
    run = model.run(pair["prompt"], record=site)
    axes, value = run.axes(site), run[site].double()
    axis = next(i for i, a in enumerate(axes) if a in ("pos", "query"))
    last = value.select(axis, -1).flatten()
    last = last[torch.isfinite(last)].numpy()
    kurtosis = ((last - last.mean()) ** 4).mean() / last.var() ** 2
    wanted = [np.linalg.norm(last), last.mean(), last.std(), abs(last).max(), kurtosis]
    assert rows[-1][2:] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_a_site_of_all_layers_is_a_grid(client: Client, model: uh.Model, pair: dict) -> None:
    view = part(client.parts("site", prompt=pair["prompt"], site="resid_post"), "site")["view"]
    values = model.run(pair["prompt"], record="resid_post")["resid_post"][:, 0].norm(dim=-1)
    assert torch.tensor(view["values"]) == pytest.approx(values.numpy(), rel=1e-4)


def test_any_method_and_its_file(client: Client, model: uh.Model, pair: dict) -> None:
    parts = client.parts(
        "method", name="logit_lens", prompts=[pair["prompt"]], options={"top": "3"}
    )
    kept = parts[-1]["result"]
    found = uh.Result.load(client.results / f"{kept}.json")
    assert found.data.equals(uh.read.logit_lens(model, pair["prompt"], top=3).data)
    opened = client.get(f"/api/results/{kept}")
    assert opened["views"] == [json.loads(found.view.to_json())]
    assert opened["views"] == [part(parts, "view")["view"]]
    page = client.ask("GET", f"/api/results/{kept}/report")
    assert page.body.startswith(b"<!doctype html>")
    assert page.headers["content-disposition"].startswith("attachment")


COLUMNS = {"prompts": "prompt", "contrasts": "contrast", "answers": "answer", "wrong": "wrong"}


def columns(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """Rows of an example as a page sends them."""
    return {column: [row[name] for row in rows] for column, name in COLUMNS.items()}


def test_a_second_set_of_pairs(client: Client, model: uh.Model) -> None:
    """`other` is filled in like the first set, and means what `uh.Pairs` means."""
    shown = client.get("/api/model")["examples"]
    first, second = [columns(e["rows"][:2]) for e in shown if len(e["rows"]) > 1][:2]
    options = {"by": "eap", "draws": "2"}
    asked = {"name": "circuit_overlap", **first, "options": options | {"other": second}}
    kept = client.parts("method", **asked)[-1]["result"]
    one, two = (uh.Pairs(*said.values()) for said in (first, second))
    wanted = uh.locate.circuit_overlap(model, one, other=two, by="eap", draws=2)
    assert uh.Result.load(client.results / f"{kept}.json").data.equals(wanted.data)
    listed = next(r for r in client.get("/api/results")["results"] if r["id"] == kept)
    assert listed["prompt"] == f"{first['prompts'][0]} (first of 2)"
    half = second | {"contrasts": []}
    for other in (half, {}, {"prompts": []}):
        error = client.refused("method", **(asked | {"options": options | {"other": other}}))
        assert error["type"] == "UsageError" and "other" in error["what"]
    wrong = {"name": "logit_lens", "prompts": first["prompts"], "options": {"top": second}}
    assert "no set of pairs" in client.refused("method", **wrong)["what"]
    unknown = {"do": "method"} | asked | {"options": {"other": {"rows": []}}}
    answer = client.ask("POST", "/api/jobs", unknown)
    assert answer.status == 400, "no unknown column"


def test_a_saved_plan_as_an_option(client: Client, model: uh.Model, pair: dict) -> None:
    edits = [{"site": "z.0.0", "op": "zero"}]
    plan = client.parts("plan", name="no head", prompt=pair["prompt"], edits=edits)[-1]["result"]
    asked = {"name": "attention", "prompts": [pair["prompt"]], "options": {"edits": plan}}
    kept = client.parts("method", **asked)[-1]["result"]
    wanted = uh.read.attention(
        model, pair["prompt"], edits=Plan.load(client.results / f"{plan}.json")
    )
    assert uh.Result.load(client.results / f"{kept}.json").data.equals(wanted.data)
    assert not wanted.data.equals(uh.read.attention(model, pair["prompt"]).data)
    other = client.refused("method", **asked, model="stream")
    assert other["type"] in ("PlanError", "NotOffered"), "made for another model"


# Explaining -------------------------------------------------------------------------------------


def test_explain_tells_each_part_also_to_who_went_away(client: Client, pair: dict) -> None:
    """A client leaves in the middle; the work goes on, and the next one hears the rest."""
    job = client.submit("explain", prompt=pair["prompt"], contrast=pair["contrast"])
    events, parts, last = client.events(job), [], 0
    while not parts:
        last, kind, data = next(events)
        parts += [data] if kind == "part" and data["name"] == "section" else []
    assert client.get(f"/api/jobs/{job}")["state"] == "running", "the first part is there already"
    events.close()  # type: ignore[attr-defined]
    rest = list(client.events(job, after=last))
    numbers = [number for number, _, _ in rest]
    assert numbers == sorted(set(numbers)) and min(numbers) > last
    parts += [d for _, k, d in rest if k == "part" and d["name"] == "section"]
    assert [p["number"] for p in parts] == list(range(1, 9))
    kept = client.get(f"/api/jobs/{job}")["result"]
    document = json.loads((client.results / f"{kept}.json").read_text())
    assert document["schema"] == "explanation/1"
    opened = client.get(f"/api/results/{kept}")
    assert opened["sentences"] == document["sentences"]
    assert [s["views"] for s in opened["sections"]] == [p["views"] for p in parts]
    page = client.ask("GET", f"/api/results/{kept}/report")
    assert all(line.encode()[:30] in page.body for line in opened["lead"])


def test_cancelling_is_at_once_and_costs_nothing_else(client: Client, pair: dict) -> None:
    data = {"name": "masks", "prompts": [pair["prompt"]], "contrasts": [pair["contrast"]],
            "answers": [pair["answer"]], "wrong": [pair["wrong"]],
            "options": {"steps": "100000"}}  # fmt: skip
    job = client.submit("method", **data)
    while (now := client.get(f"/api/jobs/{job}"))["passes"] < 10:
        assert now["state"] in ("queued", "running"), now["error"]
        time.sleep(0.02)
    began = time.monotonic()
    assert client.ask("DELETE", f"/api/jobs/{job}").status == 200
    list(client.events(job))
    assert client.get(f"/api/jobs/{job}")["state"] == "cancelled"
    assert time.monotonic() - began < 5
    assert part(client.parts("look", prompt=pair["prompt"]), "next")


# Changing ---------------------------------------------------------------------------------------

ZERO = {"site": "z.1.0", "op": "zero"}


def test_columns_are_what_generate_writes(client: Client, model: uh.Model, pair: dict) -> None:
    asked = {"prompt": pair["prompt"], "max_new_tokens": 6, "keep": True,
             "columns": [{"label": "without head 1.0", "edits": [ZERO]}]}  # fmt: skip
    parts = client.parts("generate", **asked)
    plain = model.generate(pair["prompt"], max_new_tokens=6)
    edited = model.generate(pair["prompt"], max_new_tokens=6, edits=uh.Edit("z.1.0", uh.zero()))
    for column, made in enumerate((plain, edited)):
        streamed = [p for p in parts if p["name"] == "token" and p["column"] == column]
        assert [p["text"] for p in streamed] == list(made.strings[0])
        done = [p for p in parts if p["name"] == "column_done"][column]
        assert done["tokens"] == list(made.strings[0])
    arms = part(parts, "view")["view"]["arms"]
    assert [a["label"] for a in arms] == ["unedited", "without head 1.0"]
    ids = torch.cat([model.tokens(pair["prompt"]).ids, plain.ids], 1)
    log = model.run({"input_ids": ids}).logits[0].log_softmax(-1)
    start = ids.shape[1] - plain.ids.shape[1]
    chosen = log[start - 1 : -1].gather(-1, plain.ids[0][:, None])[:, 0]
    assert arms[0]["values"] == pytest.approx(chosen.exp().tolist(), abs=1e-4)
    assert arms[0]["effects"][SURPRISE] == pytest.approx(-float(chosen.mean()), abs=1e-4)
    assert arms[0]["effects"][KL] == 0
    p = log[start - 1]
    q = model.run(pair["prompt"], edits=uh.Edit("z.1.0", uh.zero())).last_logits[0].log_softmax(-1)
    assert arms[1]["effects"][KL] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
    kept = uh.Result.load(client.results / f"{parts[-1]['result']}.json")
    assert kept["label"].values.tolist() == ["unedited", "without head 1.0"]


def test_the_same_seed_and_only_what_changed(client: Client, pair: dict) -> None:
    asked = {"prompt": pair["prompt"], "max_new_tokens": 5, "sample": True, "seed": 3}
    edit = {"site": "z.0.0", "op": "scale", "fields": {"factor": 0.5}}
    first = client.parts("generate", **asked, columns=[{"edits": [edit]}])
    moved = edit | {"strength": 0.25}
    second = client.parts("generate", **asked, columns=[{"edits": [moved]}])
    written = [
        [p for p in parts if p["name"] == "token" and p["column"] == 0] for parts in (first, second)
    ]
    assert written[0] and not written[1], "the unedited column is not written again"
    done = [[p for p in parts if p["name"] == "column_done"] for parts in (first, second)]
    assert done[0][0]["tokens"] == done[1][0]["tokens"]
    same = [{"edits": [{"site": "z.0.0", "op": "scale", "fields": {"factor": 1.0}}]}]
    third = [
        p for p in client.parts("generate", **asked, columns=same) if p["name"] == "column_done"
    ]
    assert third[0]["tokens"] == third[1]["tokens"], "the same noise in each column"


def test_a_column_that_is_refused_leaves_the_others(client: Client, pair: dict) -> None:
    columns = [{"edits": [{"site": "z.99.0", "op": "zero"}]}, {"edits": [ZERO]}]
    parts = client.parts("generate", prompt=pair["prompt"], max_new_tokens=2, columns=columns)
    refused = part(parts, "refused")
    assert refused["column"] == 1 and refused["refused"]["type"] == "OutOfRange"
    assert [p["column"] for p in parts if p["name"] == "column_done"] == [0, 2]


def test_plans_are_kept_and_taken_up_again(client: Client, model: uh.Model, pair: dict) -> None:
    vector = {"prompts": [pair["contrast"]], "minus": [pair["prompt"]], "pos": -1}
    edit = {"site": "resid_post.1", "op": "add", "fields": {"vector": vector}, "pos": [-1],
            "strength": 2.0}  # fmt: skip
    kept = client.parts("plan", name="towards", prompt=pair["prompt"], edits=[edit])[-1]["result"]
    plan = Plan.load(client.results / f"{kept}.json")
    runs = [model.run(pair[name], record="resid_post.1")["resid_post.1"][0, -1]
            for name in ("contrast", "prompt")]  # fmt: skip
    assert torch.allclose(plan[0].op.tensors()["vector"], runs[0] - runs[1], atol=1e-6)
    opened = client.get(f"/api/results/{kept}")
    assert opened["kind"] == "plan" and opened["edits"][0]["text"] == repr(plan[0])
    saved = [{"edits": [{"saved": kept, "index": 0, "strength": 2.0}]}]
    parts = client.parts("generate", prompt=pair["prompt"], max_new_tokens=4, columns=saved)
    wanted = model.generate(pair["prompt"], max_new_tokens=4, edits=plan)
    assert [p for p in parts if p["name"] == "column_done"][1]["tokens"] == list(wanted.strings[0])
    other = client.refused("plan", model="town", prompt="the", edits=saved[0]["edits"])
    assert other["type"] == "PlanError", "a plan for another model is refused"


# Circuits ---------------------------------------------------------------------------------------


def test_a_circuit_is_edited_and_judged_again(client: Client, model: uh.Model, pair: dict) -> None:
    found = part(client.parts("circuit", **pair), "circuit")
    assert View.from_dict(found["view"]).kind == "graph"
    node = next(n for n in found["nodes"] if n != "input")
    edge = found["edges"][-1]
    less = part(client.parts("circuit", **pair, drop=[node, edge]), "circuit")
    assert node not in less["nodes"] and edge not in less["edges"]
    from underhood.circuits import Circuit, Graph, Judge, Wiring
    from underhood.data import metric_named
    from underhood.explanation.question import ask

    pairs = ask(model, pair["prompt"], pair["contrast"], answer=pair["answer"] or None,
                wrong=pair["wrong"] or None).pairs.encode(model)  # fmt: skip
    judge = Judge(Wiring(model, Graph.of(model)), pairs, metric_named("logit_diff"))
    for one in (found, less):
        circuit = Circuit.of(judge.wiring.graph, one["edges"])
        f = judge.faithfulness([circuit, circuit.complement()]).tolist()
        assert [one["f"], one["rest"]] == pytest.approx(f, abs=1e-4)
    back = part(client.parts("circuit", **pair, drop=[edge], add=[edge]), "circuit")
    assert edge not in back["edges"], "dropped is dropped"
    wrong = client.refused("circuit", **pair, drop=["a99.h0"])
    assert wrong["type"] == "SiteNotFound" and "nearest" in wrong["do"]


# Results ----------------------------------------------------------------------------------------


def test_results_are_listed_compared_and_deleted(client: Client, pair: dict) -> None:
    keys = [
        client.parts("method", name="activation_patching", prompts=[a], contrasts=[b],
                     answers=[pair["answer"]], wrong=[pair["wrong"]],
                     options={"draws": "1"})[-1]["result"]
        for a, b in ((pair["prompt"], pair["contrast"]), (pair["prompt"], pair["contrast"]))
    ]  # fmt: skip
    listed = [r["id"] for r in client.get("/api/results")["results"]]
    assert listed[:2] == keys[::-1], "newest first"
    both = client.get(f"/api/compare?a={keys[0]}&b={keys[1]}")
    assert [r["id"] for r in both["results"]] == keys
    shown = View.from_dict(both["difference"])
    assert shown.kind in ("grid", "diff")
    assert client.ask("DELETE", f"/api/results/{keys[0]}").status == 200
    assert client.ask("GET", f"/api/results/{keys[0]}").status == 404
    assert not list(client.results.glob(f"{keys[0]}*"))
    assert (client.results / f"{keys[1]}.json").exists()


def test_damaged_and_newer_files_are_said(client: Client) -> None:
    client.results.mkdir(exist_ok=True)
    cases = {"truncated": '{"schema": "result/1", "na', "newer": '{"schema": "result/2"}',
             "foreign": '{"some": "thing"}', "list": "[1, 2]", "nothing": ""}  # fmt: skip
    for name, text in cases.items():
        (client.results / f"{name}.json").write_text(text)
    listed = {r["id"]: r for r in client.get("/api/results")["results"]}
    for name in cases:
        answer = client.ask("GET", f"/api/results/{name}")
        assert answer.status == 404 and answer.error["type"] == "FileProblem", name
        assert name in listed
        (client.results / f"{name}.json").unlink()
    assert "truncated" in listed["truncated"]["problem"]


@pytest.mark.parametrize("how", ["../secret", "..%2Fsecret", "%2e%2e%2fsecret", "secret.json",
                                 "a/../../secret", "%00", "x" * 300, ".hidden"])  # fmt: skip
def test_no_id_leads_out_of_the_folder(client: Client, how: str) -> None:
    client.results.mkdir(exist_ok=True)
    secret = client.results.parent / "secret.json"
    secret.write_text('{"schema": "result/1"}')
    for method, tail in (("GET", ""), ("GET", "/report"), ("DELETE", "")):
        assert client.ask(method, f"/api/results/{how}{tail}").status in (404, 405)
    assert client.ask("GET", f"/api/compare?a={how}&b={how}").status == 404
    assert secret.exists()


def test_a_link_in_the_folder_is_not_followed(client: Client, outside: Path) -> None:
    client.results.mkdir(exist_ok=True)
    link = client.results / "link.json"
    link.symlink_to(outside)
    assert client.ask("GET", "/api/results/link").status == 404
    assert client.ask("DELETE", "/api/results/link").status == 404
    assert "link" not in [r["id"] for r in client.get("/api/results")["results"]]
    link.unlink()
    assert outside.exists()


# Bad input --------------------------------------------------------------------------------------


def test_ten_thousand_tokens(client: Client, pair: dict) -> None:
    word = pair["prompt"].split()[0]
    long = " ".join([word] * 10_000)
    for do in ("look", "explain", "generate"):
        error = client.refused(do, prompt=long)
        assert error["type"] == "PromptTooLong" and error["do"]
    told = client.ask("POST", "/api/tokens", {"text": long}).json
    assert told["count"] > told["context"]
    assert part(client.parts("look", prompt=pair["prompt"]), "next")


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\N{FAMILY}\u200d مرحبا \u202e",
                                  "\ufffd\u2028",
                                  "\t\n", "a\u0000b"])  # fmt: skip
def test_any_text_is_data(client: Client, text: str) -> None:
    """It is looked at or refused in words, and comes back as it was."""
    job = client.submit("look", prompt=text)
    list(client.events(job))
    state = client.get(f"/api/jobs/{job}")
    assert state["state"] in ("done", "failed")
    if state["state"] == "failed":
        assert state["error"]["type"] not in ("Exception", "RuntimeError", "ValueError")
    answer = client.ask("POST", "/api/tokens", {"text": text})
    assert answer.headers["content-type"].startswith("application/json")


def test_two_at_once_do_not_mix(client: Client, model: uh.Model, pair: dict) -> None:
    prompts = [pair["prompt"], pair["contrast"]] * 3
    found: dict[int, list[dict[str, Any]]] = {}

    def one(i: int) -> None:
        found[i] = client.parts("look", prompt=prompts[i])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        assert part(found[i], "prompt")["tokens"] == list(model.tokens(prompt).strings[0])
        top = float(model.run(prompt).last_logits[0].softmax(-1).max())
        assert part(found[i], "next")["view"]["values"][0] == pytest.approx(top, abs=1e-5)


def test_a_model_that_fails_to_load(tmp_path: Path) -> None:
    """The page has a server, the server says why, and another model can be chosen."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt2"')
    server = Server(str(broken), results=tmp_path / "results", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        client = Client(server)
        assert client.ask("GET", "/").status == 200
        error = client.refused("load")
        assert error["type"] in ("ModelNotFound", "FileProblem") and str(broken) in str(error)
        assert client.get("/api/model")["loaded"] is False
        assert client.parts("load", model="village")[-1]["state"] == "done"
    finally:
        server.stop()
        thread.join(20)


def test_a_page_names_no_folder_and_no_hub(client: Client, tmp_path: Path) -> None:
    for name in (str(tmp_path), "gpt2", "../x", "/etc"):
        answer = client.ask("POST", "/api/jobs", {"do": "load", "model": name})
        assert answer.status == 404 and answer.error["type"] == "ModelNotFound"


def test_a_method_reads_no_file(client: Client, outside: Path, pair: dict) -> None:
    """Options that are files on a command line are no files for a page."""
    data = {column: [pair[name]] for column, name in COLUMNS.items()}
    error = client.refused(
        "method", name="circuit_overlap", options={"other": str(outside)}, **data
    )
    assert error["type"] == "UsageError" and "Python" in error["do"]
    prompts = [pair["prompt"]]
    for path in (str(outside), "../secret", outside.stem):
        error = client.refused("method", name="sinks", prompts=prompts, options={"edits": path})
        assert error["type"] == "FileProblem", error
