"""Views of models, runs, generations, edits and plans; widgets."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import underhood as uh
from underhood.core.errors import UsageError
from underhood.core.model import Model
from underhood.organisms.tiny import tiny
from underhood.view import View, view_of
from underhood.view.doc import Branch, Group, Tree
from underhood.view.text import to_string


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load()


def _all(branch: Branch) -> list[Branch]:
    return [branch, *(b for child in branch.children for b in _all(child))]


def _tree(model: Model) -> Tree:
    found = view_of(model)
    assert isinstance(found, Tree)
    return found


# Models ------------------------------------------------------------------------------------------


def test_tree_holds_every_module_parameter_and_site(town: Model) -> None:
    branches = _all(_tree(town).root)
    modules = dict(town.module.named_modules(remove_duplicate=False))
    assert {b.path for b in branches} == set(modules)
    for branch in branches:
        module = modules[branch.path]
        assert branch.type == type(module).__name__
        assert branch.parameters == sum(p.numel() for p in module.parameters())
        own = {n: list(p.shape) for n, p in module.named_parameters(recurse=False)}
        assert branch.shapes == own
    sites = [site for branch in branches for site in branch.sites]
    assert sorted(sites) == sorted(map(str, town.sites())), "each address stands at one module"


def test_addresses_stand_at_modules_that_see_them(town: Model) -> None:
    """A site read as the output of its module is what that module gives back."""
    homes = {site: town.known.home(uh.Site.parse(site)) for site in ("embed", "ln1.1", "mlp_out.0")}
    run = town.run("The capital of France is",
                   record=[*homes, *(f"module:{path}" for path in homes.values())])  # fmt: skip
    for site, path in homes.items():
        assert torch.equal(run[site], run[f"module:{path}"]), site
    assert town.known.home(uh.Site.parse("z.1")).endswith("self_attn")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "mamba", "t5", "vit"])
def test_tree_of_other_families(family: str) -> None:
    model = Model(tiny(family).module)
    branches = _all(_tree(model).root)
    sites = [site for branch in branches for site in branch.sites]
    assert sorted(sites) == sorted(map(str, model.sites()))
    total = sum(p.numel() for p in model.module.parameters())
    assert branches[0].parameters == total, "tied weights count once"


def test_alike_modules_without_addresses_become_one() -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(3, 2) for _ in range(100)])
            self.odd = torch.nn.ModuleList([torch.nn.Linear(3, n) for n in (1, 1, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[0](x)

    root = _tree(Model(Wide())).root
    experts, odd = root.children
    assert [(b.name, b.many, b.parameters) for b in experts.children] == [("0-99", 100, 800)]
    assert [(b.name, b.many) for b in odd.children] == [("0-1", 2), ("2", 1)]
    assert root.parameters == 800 + 8 + 8


def test_model_shows_itself_quickly_and_without_a_forward(town: Model) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a forward ran")

    handle = town.module.register_forward_pre_hook(refuse)
    try:
        start = time.perf_counter()
        bundle = town._repr_mimebundle_()
        assert time.perf_counter() - start < 5
    finally:
        handle.remove()
    assert bundle["text/plain"] == repr(town)
    assert "resid_post.1" in bundle["text/html"] and "<script" not in bundle["text/html"]


# Runs and edits ----------------------------------------------------------------------------------


def test_run_tells_tokens_next_words_recordings_and_edits(town: Model) -> None:
    prompt = "The capital of France is"
    run = town.run(prompt, record=["resid_post", "z.1", "pattern.0.1"],
                   edits=uh.Edit("z.0.1", uh.zero()))  # fmt: skip
    view = view_of(run)
    assert isinstance(view, Group)
    words, following, held, edits = view.views
    assert words.to_dict()["tokens"] == list(town.tokens(prompt).strings[0])
    best = run.last_logits[0].softmax(-1).topk(8)
    assert following.to_dict()["labels"] == [town.token_text(i) for i in best.indices.tolist()]
    assert following.to_dict()["values"] == pytest.approx(best.values.tolist(), rel=1e-5)
    rows = {row[0]: row for row in held.to_dict()["rows"]}
    n, width = len(words.to_dict()["tokens"]), town.d_model
    assert rows[f"resid_post.0 to resid_post.{town.n_layers - 1}"][1:] == [
        town.n_layers, f"batch 1, pos {n}, d_model {width}", "float32",
    ]  # fmt: skip
    assert rows["pattern.0.1"][2] == f"batch 1, query {n}, key {n}"
    (row,) = edits.to_dict()["rows"]
    assert row[0] == "Edit(z.0.1, zero)" and row[1] == n and row[2] == pytest.approx(1.0)
    assert "text/html" in run._repr_mimebundle_()


def test_run_without_text_or_logits_still_shows(town: Model) -> None:
    ids = town.tokens("The capital of France is").ids
    bare = Model(town.module)
    views: list[View] = [
        view_of(bare.run(ids)),
        view_of(
            Model(torch.nn.Sequential(torch.nn.Linear(3, 2))).run(
                torch.zeros(1, 3), record=["module:0"]
            )
        ),
        view_of(town.run(["The capital of France is"] * 5)),
    ]
    for view in views:
        assert view.html() and to_string(view)
    assert "Nothing. Ask for it" in to_string(views[0])
    assert "2 more prompts" in to_string(views[2])


def test_generation_shows_what_was_written(town: Model) -> None:
    made = town.generate("The capital of France is", max_new_tokens=3)
    (column,) = view_of(made).to_dict()["columns"]
    assert column["tokens"] == list(made.strings[0])


def test_edits_and_plans_say_what_where_and_how_strongly() -> None:
    gate = uh.Gate("resid_post.0", torch.ones(4), 0.5)
    plan = uh.Plan(
        [
            uh.Edit("z.0.1", uh.zero(), uh.Where(-1)),
            uh.Edit("resid_post.1", uh.add(torch.ones(4)), strength=2.0, unit="sigma", sigma=0.25,
                    gate=gate, schedule=uh.Schedule(((0, 1.0), (10, 0.0)))),
        ]
    )  # fmt: skip
    rows = view_of(plan).to_dict()["rows"]
    assert rows[0] == ["z.0.1", "zero", "pos=(-1,)", "1", "always"]
    assert rows[1][1:4] == ["add (vector 4)", "all real tokens", "2 sigma of 0.25"]
    assert "resid_post.0 reads above 0.5" in rows[1][4] and "0 at step 10" in rows[1][4]
    assert view_of(plan[0]).to_dict()["rows"] == [rows[0]]
    for thing in (plan, plan[0]):
        assert thing._repr_mimebundle_()["text/plain"] == repr(thing)


def test_results_and_views_give_their_view_and_other_things_are_refused(town: Model) -> None:
    result = uh.read.logit_lens(town, "The capital of France is")
    assert view_of(result) is result.view and view_of(result.view) is result.view
    with pytest.raises(UsageError, match="no view of this"):
        view_of(3)


def test_show_prints_in_a_terminal(town: Model, capsys: pytest.CaptureFixture[str]) -> None:
    town.show()
    assert town.name in capsys.readouterr().out
    uh.read.logit_lens(town, "The capital of France is").show()
    assert "What each layer would say" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="no IPython here")
def test_show_displays_html_in_a_notebook() -> None:
    """In a process of its own: IPython's shell is one per process."""
    code = """
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
import underhood as uh
shell = InteractiveShell.instance()
plan = uh.Plan([uh.Edit("z.0.1", uh.zero())])
with capture_output() as seen:
    plan.show()
    plan[0].show()
assert seen.stdout == "", seen.stdout
print([sorted(out.data) for out in seen.outputs], "uh-rows" in seen.outputs[0].data["text/html"])
print(sorted(shell.display_formatter.format(plan)[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    shown = "['text/html', 'text/plain']"
    assert done.stdout.splitlines() == [f"[{shown}, {shown}] True", shown], done.stderr


# Widgets -----------------------------------------------------------------------------------------

needs_anywidget = pytest.mark.skipif(
    importlib.util.find_spec("anywidget") is None,
    reason="the extra `notebook` (anywidget) is not installed",
)


def test_widget_without_anywidget_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from underhood import notebook

    notebook._widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(UsageError, match=r"underhood\[notebook\]"):
        notebook.widget(View.from_dict({"schema": "view/1", "kind": "sentences", "items": []}))
    notebook._widget_class.cache_clear()


@needs_anywidget
def test_widget_holds_the_document(samples: dict[str, View]) -> None:
    from underhood.notebook import widget

    panel = widget(samples["grid"])
    assert View.from_json(panel.document) == samples["grid"]
    assert panel.selection == {} and panel.picked == {}


@needs_anywidget
@pytest.mark.browser
@pytest.mark.skipif(
    shutil.which("chromium") is None and os.environ.get("UNDERHOOD_REQUIRE_BROWSER") != "1",
    reason="chromium is not installed",
)
def test_widget_draws_and_answers_back(samples: dict[str, View], tmp_path: Path) -> None:
    """The widget's own script in a page, with a stand-in for the notebook's side of the traits."""
    from underhood.notebook import widget

    playwright = pytest.importorskip("playwright.sync_api")
    panel = widget(samples["heads_grid"])
    (tmp_path / "widget.mjs").write_text(str(panel._esm), encoding="utf-8")
    (tmp_path / "page.html").write_text(
        f"""<!doctype html><style>{panel._css}</style><div id="here"></div><script type="module">
        const source = {json.dumps(str(panel._esm)).replace("<", chr(92) + "u003c")};
        const url = URL.createObjectURL(new Blob([source], {{type: "text/javascript"}}));
        const made = await import(url);
        const listeners = {{}};
        window.traits = {{document: {json.dumps(panel.document).replace("<", chr(92) + "u003c")},
                          selection: {{}}, picked: {{}}}};
        window.told = 0;
        const model = {{
          get: (name) => window.traits[name],
          set: (name, value) => {{
            window.traits[name] = value;
            for (const f of listeners["change:" + name] ?? []) f();
          }},
          save_changes: () => {{ window.told += 1; }},
          on: (name, f) => (listeners[name] ??= []).push(f),
          off: (name, f) => {{ listeners[name] = listeners[name].filter((g) => g !== f); }},
        }};
        window.model = model;
        window.stop = made.default.render({{model, el: document.getElementById("here")}});
        window.ready = true;
        </script>""",
        encoding="utf-8",
    )
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page()
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto((tmp_path / "page.html").as_uri())
        tab.wait_for_function("window.ready")
        tab.locator("uh1-grid td[data-at='3,2']").first.click()
        picked = tab.evaluate("window.traits.picked")
        chosen = tab.evaluate("window.traits.selection")
        assert (picked["row"], picked["col"], picked["kind"]) == (3, 2, "grid")
        assert chosen == {"layer": 3, "head": 2}
        told = tab.evaluate("window.told")
        tab.evaluate("window.model.set('selection', {layer: 5, head: 1})")
        assert tab.locator("uh1-grid td.uh-linked").first.get_attribute("data-at") == "5,1"
        assert tab.evaluate("window.traits.selection") == {"layer": 5, "head": 1}
        assert tab.evaluate("window.told") == told, "what Python asked for is not told back to it"
        tab.locator("uh1-grid .uh-scroll").first.press("Escape")
        assert tab.evaluate("window.traits.selection") == {}
        text = samples["bars"].to_json()
        tab.evaluate("(text) => window.model.set('document', text)", text)
        assert tab.locator("uh1-bars").count() == 1
        browser.close()
    assert wrong == []
