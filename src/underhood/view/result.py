"""A result: numbers with named axes, where they came from, and how to show them.

Every method returns one. The numbers are an xarray Dataset whose dimensions carry the names used
everywhere in underhood (`AXES`, and a few more in `MORE_AXES`), so two results can be aligned
without reading either method. The provenance says how to make the result again; the view draws it.

On disk a result is two files: `NAME.json` (schema `result/1`: dimensions, labels, attributes,
provenance, view) and `NAME.safetensors` (every numeric array, exact). The JSON holds the digest of
the arrays, so files of two different results are never mixed up.

Example:
    >>> import numpy as np, xarray as xr
    >>> from underhood.view import Result, grid
    >>> effect = np.zeros((2, 3))
    >>> result = Result(
    ...     name="activation_patching",
    ...     data=xr.Dataset({"effect": (("layer", "pos"), effect)}),
    ...     view=grid(effect, rows=range(2), cols=range(3)),
    ...     provenance={"model": "gpt2"},
    ... )
    >>> result
    Result activation_patching of gpt2: effect[layer 2, pos 3] (grid view)
"""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from underhood.core.errors import UsageError, nearest
from underhood.view.clean import clean
from underhood.view.doc import View

if TYPE_CHECKING:
    import pandas
    import xarray

AXES = frozenset({
    "batch", "prompt", "pos", "query", "key", "layer", "head", "d_head", "d_model", "neuron",
    "expert", "feature", "vocab", "step", "checkpoint", "edge", "node",
})  # fmt: skip
"""The axis names of the project: one name for one thing."""

MORE_AXES = frozenset({
    "channel", "height", "width", "part", "site", "rank", "task", "circuit", "draw", "random",
})  # fmt: skip
"""Axes that only some methods need: image axes, parts of a sum, sites, singular values, tasks,
circuits of several sizes, draws of a control, random circuits."""

_FRAME_ROWS = 5_000_000


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a method returns.

    Attributes:
        name: the method's name.
        data: the numbers; each dimension is one of `AXES` or `MORE_AXES`.
        view: how to show them.
        provenance: model, revision, weight hash, dtype, device, seed, versions, call, date.
    """

    name: str
    data: "xarray.Dataset"
    view: View
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import xarray

        if not isinstance(self.data, xarray.Dataset):
            raise UsageError(
                "the data of a result is an xarray Dataset",
                given=type(self.data).__name__,
                do="xarray.Dataset({'effect': (('layer', 'pos'), values)})",
            )
        for dim in map(str, self.data.dims):
            if dim not in AXES | MORE_AXES:
                raise UsageError(
                    f"no axis is called {dim!r}",
                    given=", ".join(map(str, self.data.dims)),
                    why="axes have one name each, so that results can be compared",
                    do=f"nearest: {nearest(dim, AXES | MORE_AXES)}",
                )
        object.__setattr__(self, "provenance", clean(self.provenance))

    def __getitem__(self, name: str) -> "xarray.DataArray":
        """One variable or coordinate of the data."""
        if name not in self.data.variables:
            known = [str(key) for key in self.data.variables]
            raise UsageError(
                f"this result has no variable {name!r}",
                given=repr(self),
                do=f"nearest: {nearest(name, known)}",
            )
        return self.data[name]

    def frame(self, *names: str) -> "pandas.DataFrame":
        """The data as a tidy pandas table: one row per combination of coordinates.

        Args:
            *names: variables to take; none takes all, repeated along the axes they lack.

        Raises:
            UsageError: a name is unknown, or the table would exceed five million rows.
        """
        for name in names:
            self[name]
        data = self.data[list(names)] if names else self.data
        rows = 1
        for size in data.sizes.values():
            rows *= size
        if rows > _FRAME_ROWS:
            raise UsageError(
                "this table would be too long",
                given=f"{rows:,} rows from {dict(data.sizes)}",
                why="variables of different axes are repeated along the axes they lack",
                do=f"name the variables: frame({str(next(iter(data.data_vars)))!r})",
            )
        if not data.sizes:  # scalars only: pandas needs at least one row label
            import pandas

            return pandas.DataFrame({str(k): [v.values.item()] for k, v in data.variables.items()})
        return data.to_dataframe().reset_index()

    def save(self, path: str | PathLike[str]) -> Path:
        """Write `NAME.json` and `NAME.safetensors`; old files stay whole if this is interrupted.

        Args:
            path: `NAME` or `NAME.json`. With `.html`, `.csv`, `.txt` or `.png` the view is saved
                instead.

        Returns:
            The file written (the JSON one of the two).

        Raises:
            UsageError: the data hold something that neither file can (dates, complex numbers).
            FileProblem: the place cannot be written to.
        """
        from underhood.view.store import save

        return save(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> "Result":
        """A saved result, equal in data, provenance and view.

        Raises:
            FileProblem: a file is missing, truncated, of a newer schema, or of another result.
        """
        from underhood.view.store import load

        return load(path)

    def show(self) -> None:
        """Display the view: as HTML in a notebook, as text in a terminal."""
        self.view.show()

    def __repr__(self) -> str:
        parts = []
        for name, array in self.data.data_vars.items():
            axes = ", ".join(f"{dim} {size}" for dim, size in array.sizes.items())
            parts.append(f"{name}[{axes}]" if axes else f"{name}={array.item()!r}")
        model = self.provenance.get("model")
        of = f" of {model}" if model else ""
        return f"Result {self.name}{of}: {', '.join(parts) or 'empty'} ({self.view.kind} view)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.view.html()}
