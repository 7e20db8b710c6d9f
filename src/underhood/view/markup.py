"""HTML that is escaped by construction, and tokens whose white space can be seen.

`Html` marks text that is already HTML. `tag` escapes every child and attribute that is not. A
renderer that only uses `tag` and `join` cannot leak a prompt such as `<script>` into the page.

`visible` turns a token into something a reader can see: a leading space, a newline and a tab have
glyphs; control and direction characters, which could reorder or hide the text around them, are
written out by number.
"""

import html
import unicodedata
from collections.abc import Iterable

SPACE, NEWLINE, TAB, EMPTY = "·", "↵", "→", "∅"

_VOID = {"img", "meta", "br"}
# Joiners and variation selectors are part of ordinary words and emoji.
_HARMLESS_FORMAT = {"\u200c", "\u200d", "\ufe0e", "\ufe0f", "\u00ad"}


_REACHING = {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(32), 127, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\t\n\r"
}


class Html(str):
    """Text that is HTML already and must not be escaped again."""

    __slots__ = ()


def esc(text: str) -> Html:
    """`text` with the characters that mean something in HTML written as entities.

    Direction and control characters, which would reach beyond the text, are written by number.
    """
    return text if isinstance(text, Html) else Html(html.escape(text.translate(_REACHING)))


def join(parts: Iterable[str], glue: str = "") -> Html:
    """The parts, each escaped unless it is `Html`, one after another."""
    return Html(glue.join(esc(part) for part in parts))


def tag(element: str, /, *children: str, **attrs: str | float | int | bool | None) -> Html:
    """One element.

    Args:
        element: its name, as `td`.
        *children: text (escaped) or `Html`.
        **attrs: attributes; `cls` is `class`, `_` becomes `-`, True writes the bare name, None and
            False leave it out.
    """
    written = []
    for key, value in attrs.items():
        if value is None or value is False:
            continue
        key = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{esc(str(value))}"')
    head = f"<{element}{''.join(written)}>"
    return Html(head) if element in _VOID else Html(f"{head}{join(children)}</{element}>")


def _safe(char: str) -> str:
    """The character, or its number in brackets when it is invisible or moves other text."""
    category = unicodedata.category(char)
    hidden = category in {"Cc", "Cf", "Cs", "Zl", "Zp"} and char not in _HARMLESS_FORMAT
    return f"⟨U+{ord(char):04X}⟩" if hidden else char


def visible(token: str) -> str:
    """The token as one line of text with its white space shown (for labels and terminals)."""
    if not token:
        return EMPTY
    body = token.lstrip(" ")
    lead = SPACE * (len(token) - len(body))
    trail = SPACE * (len(body) - len(body.rstrip(" ")))
    body = body.rstrip(" ")
    glyphs = {"\n": NEWLINE, "\t": TAB, "\r": "␍"}
    return lead + "".join(glyphs.get(c) or _safe(c) for c in body) + trail


def token_html(token: str) -> Html:
    """The token with its white space shown in a fainter ink."""
    text = visible(token)
    core = text.strip(SPACE)
    start = len(text) - len(text.lstrip(SPACE)) if core else len(text)
    parts = [_faint(text[:start])]
    run = ""
    for char in text[start : start + len(core)]:
        if char in (NEWLINE, TAB):
            parts += [esc(run), _faint(char)]
            run = ""
        else:
            run += char
    parts += [esc(run), _faint(text[start + len(core) :])]
    return join(parts)


def prose_html(token: str) -> Html:
    """The token inside running text: real spaces, newlines shown and also broken."""
    parts: list[str] = []
    for char in token:
        if char == "\n":
            parts.append(join([_faint(NEWLINE), Html("\n")]))
        else:
            parts.append(char if char in " \t" else _safe(char))
    return join(parts)


def _faint(glyphs: str) -> Html:
    return tag("span", glyphs, cls="ws") if glyphs else Html("")
