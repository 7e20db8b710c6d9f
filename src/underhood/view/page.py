"""One self-contained HTML file from sections of views: the page that people send each other.

The file opens from disk, on any machine, in ten years: no font, no picture, no address outside
itself. It is complete without its one script, which only lets the views be pointed at. Its content
security policy allows that script and no network call, even by mistake.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from underhood.core.errors import UsageError
from underhood.view import upgrade
from underhood.view.clean import clean
from underhood.view.doc import View
from underhood.view.html import code, facts, render, style
from underhood.view.markup import Html, join, tag

_ID = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One step of the story.

    Attributes:
        id: the anchor, lower case letters, digits and hyphens, unique in the page.
        number: printed before the title and in the table of contents.
        title: a few words.
        question: the plain one-line question that the section answers.
        answer: the answer in a sentence or two, read before the views.
        views: the evidence, in reading order.
        folded: closed until the reader opens it; title and answer stay in sight.
    """

    id: str
    title: str
    number: int | str = ""
    question: str = ""
    answer: str = ""
    views: Sequence[View] = ()
    folded: bool = False


def page(
    title: str,
    sections: Iterable[Section],
    *,
    lead: str | Sequence[str] = "",
    provenance: Mapping[str, Any] | None = None,
    python: str | None = None,
) -> str:
    """The whole page as one string of HTML.

    Args:
        title: what was looked into.
        sections: in reading order.
        lead: the answer in plain sentences, before everything else.
        provenance: how it was made; printed once at the end, and not again in views that agree.
        python: the call that makes this page.

    Raises:
        UsageError: two sections share an id, or an id cannot be an anchor.
    """
    listed = list(sections)
    _check_ids(listed)
    made = clean(dict(provenance or {}))
    says = [lead] if isinstance(lead, str) else list(lead)
    top = tag(
        "header",
        tag("p", "underhood report", cls="uh-kicker"),
        tag("h1", title),
        tag("div", *[tag("p", line) for line in says if line], cls="uh-lead"),
        cls="uh-top",
    )
    body = [_section(section, made) for section in listed]
    sheet = tag(
        "div",
        top,
        _contents(listed),
        tag("main", *body, id="content"),
        _foot(made, python),
        cls="uh-sheet",
    )
    skip = tag("a", "Skip to the content", href="#content", cls="uh-skip")
    told = upgrade.data(json.dumps(made), cls="uh-told")
    script = upgrade.script_tag()
    return _document(title, tag("body", skip, sheet, told, script, cls="uh uh-page"))


def _document(title: str, body: Html) -> str:
    sheets = style() + "\n" + _page_style()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=upgrade.policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="underhood"),
        tag("title", title),
        tag("style", Html(sheets)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _page_style() -> str:
    text = resources.files("underhood.view").joinpath("page.css").read_text("utf-8")
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _check_ids(sections: Sequence[Section]) -> None:
    seen: set[str] = {"content"}
    for section in sections:
        if not _ID.fullmatch(section.id) or section.id in seen:
            raise UsageError(
                "a section needs an id of its own",
                given=repr(section.id),
                why="it is the anchor in the page's address: a-z, 0-9 and -, each used once",
            )
        seen.add(section.id)


def _contents(sections: Sequence[Section]) -> Html:
    if len(sections) < 2:
        return Html("")
    items = [
        tag(
            "li",
            tag("span", str(section.number), cls="uh-no"),
            tag("a", section.title, href=f"#{section.id}"),
        )
        for section in sections
    ]
    return tag("nav", tag("ol", *items), cls="uh-toc", aria_label="Contents")


def _section(section: Section, made: dict[str, Any]) -> Html:
    number = tag("span", str(section.number), cls="uh-no") if section.number != "" else Html("")
    heading = tag("h2", number, tag("span", section.title))
    question = tag("p", section.question, cls="uh-question") if section.question else Html("")
    answer = tag("p", section.answer, cls="uh-answer") if section.answer else Html("")
    views = join([render(view, level=3, skip=made, live=True) for view in section.views])
    if not section.folded:
        return tag("section", heading, question, answer, views, id=section.id, cls="uh-section")
    # The anchor lies inside: browsers open what is folded around the target of a link.
    body = tag("div", question if answer else "", views, id=section.id, cls="uh-body")
    summary = tag("summary", heading, answer or question)
    return tag("details", summary, body, cls="uh-section uh-fold")


def _foot(made: dict[str, Any], python: str | None) -> Html:
    parts = []
    if made or python:
        parts.append(tag("h2", "How this page was made"))
    if made:
        parts.append(facts(made))
    if python:
        parts.append(code(python))
    return tag("footer", *parts, cls="uh-foot") if parts else Html("")
