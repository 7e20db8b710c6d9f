"""Results: named axes only, exact on disk, never half saved."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from underhood.core.errors import FileProblem, UsageError
from underhood.view import Result, grid

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_]


def make(values: np.ndarray | None = None) -> Result:
    effect = np.array([[0.5, np.nan, -1.25], [2.0, 0.0, np.inf]], dtype=np.float32)
    effect = effect if values is None else values
    rows, cols = effect.shape
    data = xr.Dataset(
        {"effect": (("layer", "pos"), effect, {"unit": "logits"}), "baseline": ((), 3.5)},
        coords={
            "layer": np.arange(rows),
            "pos": np.arange(cols),
            "token": ("pos", [f" t{i}" for i in range(cols)]),
            "special": ("pos", np.arange(cols) == 0),
        },
        attrs={"metric": "logit difference"},
    )
    view = grid(effect, rows=range(rows), cols=range(cols), title="Effect")
    provenance = {"model": "gpt2", "seed": 0, "call": "patch(...)"}
    return Result(name="activation_patching", data=data, view=view, provenance=provenance)


def same(a: Result, b: Result) -> None:
    assert (a.name, a.provenance, a.view) == (b.name, b.provenance, b.view)
    xr.testing.assert_identical(a.data, b.data)
    for name, variable in a.data.variables.items():
        assert variable.dtype.kind == b.data[name].dtype.kind
        if variable.dtype.kind != "U":
            assert variable.dtype == b.data[name].dtype


@pytest.mark.parametrize("name", ["x", "x.json", "gpt2.small"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    result = make()
    written = result.save(tmp_path / name)
    assert written.suffix == ".json"
    assert len(list(tmp_path.iterdir())) == 2
    same(Result.load(written), result)
    same(Result.load(tmp_path / name), result)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=2, max_dims=2, max_side=4))
    )
)
def test_any_array_is_exact(tmp_path: Path, values: np.ndarray) -> None:
    result = make(values)
    result.save(tmp_path / "x")
    same(Result.load(tmp_path / "x"), result)


def test_transposed_arrays_are_stored_in_order(tmp_path: Path) -> None:
    result = make(np.arange(6.0).reshape(3, 2).T)
    result.save(tmp_path / "x")
    same(Result.load(tmp_path / "x"), result)


def test_bad_files(tmp_path: Path) -> None:
    at = make().save(tmp_path / "x")
    arrays = tmp_path / "x.safetensors"
    whole, blob = at.read_text(), arrays.read_bytes()
    document = json.loads(whole)

    def refused(part: str) -> None:
        with pytest.raises(FileProblem, match=part):
            Result.load(at)

    with pytest.raises(FileProblem):
        Result.load(tmp_path / "none")
    at.write_text(whole[: len(whole) // 2])
    refused("JSON")
    at.write_text(json.dumps(document | {"schema": "result/2"}))
    refused("another schema")
    at.write_text(json.dumps(document | {"view": document["view"] | {"schema": "view/9"}}))
    refused("another schema")
    at.write_text(json.dumps({k: v for k, v in document.items() if k != "variables"}))
    refused("lacks parts")
    at.write_text("[]")
    refused("not a result")
    at.write_text(whole)
    arrays.write_bytes(blob[:-3])
    refused("cannot be read")
    make(np.ones((2, 3))).save(tmp_path / "y")
    arrays.write_bytes((tmp_path / "y.safetensors").read_bytes())
    refused("another result")
    arrays.unlink()
    refused("missing")
    arrays.write_bytes(blob)
    same(Result.load(at), make())


def test_interrupted_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = make().save(tmp_path / "x")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileProblem, match="cannot be written"):
        make(np.ones((2, 3))).save(at)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    same(Result.load(at), make())


def test_only_known_axes() -> None:
    data = xr.Dataset({"effect": (("layr",), np.zeros(2))})
    with pytest.raises(UsageError, match="layr") as caught:
        Result(name="x", data=data, view=make().view)
    assert "layer" in str(caught.value)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    for values in (np.array([1j]), np.array(["2026-01-01"], dtype="datetime64[ns]")):
        data = xr.Dataset({"x": (("layer",), values)})
        with pytest.raises(UsageError, match="cannot be saved"):
            Result(name="x", data=data, view=make().view).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_frame_is_tidy() -> None:
    frame = make().frame("effect")
    assert len(frame) == 6
    assert {"layer", "pos", "token", "effect"} <= set(frame.columns)
    assert make().frame().shape[0] == 6
    with pytest.raises(UsageError, match="effect"):
        make().frame("efect")
    huge = xr.Dataset({"a": (("vocab",), np.zeros(3000)), "b": (("neuron",), np.zeros(3000))})
    with pytest.raises(UsageError, match="too long"):
        Result(name="x", data=huge, view=make().view).frame()
    scalar = xr.Dataset({"a": ((), 2.5)})
    assert Result(name="x", data=scalar, view=make().view).frame()["a"].tolist() == [2.5]


def test_repr_and_mimebundle(tmp_path: Path) -> None:
    result = make()
    text = repr(result)
    assert text == (
        "Result activation_patching of gpt2: effect[layer 2, pos 3], baseline=3.5 (grid view)"
    )
    bundle = result._repr_mimebundle_()
    assert bundle["text/plain"] == text
    assert "uh-cells" in bundle["text/html"]
    result.save(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")


def test_show_prints(capsys: pytest.CaptureFixture[str]) -> None:
    make().show()
    assert "Effect" in capsys.readouterr().out
