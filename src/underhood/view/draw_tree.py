"""The module tree of a model: folded, with shapes, sizes, and the addresses of its sites."""

from underhood.view.doc import Branch, Tree
from underhood.view.markup import Html, join, tag

_DRAWN = 2000  # modules; a page with more of them opens slowly and is not read


def tree(view: Tree) -> Html:
    """Nested `<details>`: the first two floors are open."""
    floors = _floors(view.root)
    depth, drawn = 0, 0
    while depth < len(floors) and (depth == 0 or drawn + floors[depth] <= _DRAWN):
        drawn += floors[depth]
        depth += 1
    body = tag("div", branch(view.root, depth), cls="uh-tree")
    hidden = sum(floors[depth:])
    if not hidden:
        return body
    note = f"{hidden:,} modules lie deeper than is drawn here; the saved file has them all."
    return join([body, tag("p", note, cls="uh-note")])


def _floors(root: Branch) -> list[int]:
    """How many modules lie at each depth."""
    found, level = [], [root]
    while level:
        found.append(len(level))
        level = [child for parent in level for child in parent.children]
    return found


def branch(found: Branch, depth: int, level: int = 0) -> Html:
    """One module and what is in it, down to a depth."""
    line = [tag("span", found.name, cls="uh-modname")]
    if found.many > 1:
        line.append(tag("span", f"{found.many} alike", cls="uh-count"))
    line += [tag("span", found.type, cls="uh-modtype")] * bool(found.type)
    if found.parameters:
        line.append(tag("span", size(found.parameters), cls="uh-modsize", title=_exact(found)))
    inside = _own(found)
    inner = [branch(child, depth - 1, level + 1) for child in found.children]
    if depth <= 1 and found.children:
        inner = [tag("p", f"{len(found.children)} modules inside", cls="uh-note")]
    if not inside and not inner:
        return tag("div", *line, cls="uh-mod uh-leaf")
    summary = tag("summary", *line)
    return tag("details", summary, *inside, *inner, cls="uh-mod", open=level < 2)


def _exact(found: Branch) -> str:
    return f"{found.parameters:,} parameters"


def _own(found: Branch) -> list[Html]:
    """Parameters of its own, and addresses."""
    parts = []
    if found.shapes:
        items = [
            tag("span", tag("span", name, cls="uh-modname"), f" {shape_text(shape)}")
            for name, shape in found.shapes.items()
        ]
        parts.append(tag("p", *items, cls="uh-shapes"))
    if found.sites:
        parts.append(tag("p", *[tag("code", site) for site in found.sites], cls="uh-sites"))
    return parts


def shape_text(shape: list[int]) -> str:
    """`768 × 3072`; `one number` for a scalar."""
    return " × ".join(map(str, shape)) or "one number"


def size(count: int) -> str:
    """A number of parameters in three digits: `124 M`."""
    for power, letter in ((9, " B"), (6, " M"), (3, " k")):
        if count >= 10**power:
            return f"{count / 10**power:.3g}{letter}"
    return str(count)
