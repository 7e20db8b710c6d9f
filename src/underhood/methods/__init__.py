"""The methods: one paper's idea, one function, one file.

`underhood.methods.FAMILY.NAME` holds a function of the same name, decorated with `@method`. Nothing
else registers it: the folders are the list.
"""

from typing import Any

from underhood.methods.registry import FAMILIES, Method, find, method, names

__all__ = ["FAMILIES", "Method", "find", "method", "names"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in FAMILIES:
        return importlib.import_module(f"underhood.methods.{name}")
    raise AttributeError(f"module 'underhood.methods' has no attribute {name!r}")
