"""What makes a static page come alive: one script, and the document beside each drawing.

The drawing stays where the script does not run (an untrusted notebook, a mail program, JavaScript
off). Where it runs, each drawing that carries its document is replaced by an element that draws the
same thing and can be pointed at. The script is built from `web/` by `scripts/build_web.py`.
"""

import base64
import hashlib
from functools import cache
from importlib import resources

from underhood.view.base import View
from underhood.view.markup import Html, tag


@cache
def script() -> str:
    """The script, ready to stand between `<script>` and its end."""
    return resources.files("underhood.view").joinpath("static/underhood.js").read_text("utf-8")


@cache
def policy() -> str:
    """The content security policy of a page with the script: this script, and no network at all."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline';"
        " img-src data:"
    )


def script_tag() -> Html:
    """The script as an element; a page needs it once, after its views."""
    return tag("script", Html(script()))


def document(view: View, level: int) -> Html:
    """The document of a view and the level of its heading, where the script finds them."""
    return data(view.to_json(), cls="uh-doc", data_level=level)


def data(json: str, **attrs: str | int) -> Html:
    """JSON inside a page: a `<` in it could end the element early, so none is written."""
    written = json.replace("<", "\\u003c")
    return tag("script", Html(written), type="application/json", **attrs)
