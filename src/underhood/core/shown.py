"""How core's objects look to a person: in a notebook, and with `.show()`.

Views are made a floor above, and core imports nothing from above. So the maker of views is looked
up by name, when a person first wants to see one.
"""

from importlib import import_module
from typing import Any

__all__ = ["Shown"]


class Shown:
    """Something that `underhood.view.view_of` can draw."""

    __slots__ = ()

    def show(self) -> None:
        """Display it: as HTML in a notebook, as text in a terminal."""
        self._view().show()

    def _view(self) -> Any:
        return import_module("underhood.view.of").view_of(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._view().html()}
