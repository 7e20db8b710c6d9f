"""Sweeps that are stopped: nothing finished is lost, nothing is left behind, and they go on."""

import copy
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from test_sweep import batch, half, random_cells
from torch import Tensor
from typer.testing import CliRunner

import underhood as uh
from underhood.core.edit import Edit, Plan
from underhood.core.errors import FileProblem, NotFinite, Stopped, UsageError
from underhood.core.model import Model
from underhood.core.sweep import Swept, sweep, watched
from underhood.core.sweep_tail import _ROWS
from underhood.core.taps import current_session
from underhood.core.taps.patches import active_patches
from underhood.core.tokens import Tokens

pytestmark = pytest.mark.usefixtures("always_share")


def made(share: bool = True) -> tuple[Model, Tokens, list[Edit | Plan], dict[str, Any]]:
    model = kit.model("llama")
    tokens = batch(model, [6, 6])
    return model, tokens, random_cells(model, tokens, n=20), {"batch_size": 4, "share": share}


def after(n: int) -> Callable[[], bool]:
    """Says stop at the n-th question."""
    asked = iter(range(n))
    return lambda: next(asked, None) is None


@pytest.mark.parametrize("share", [True, False])
def test_a_stopped_sweep_goes_on(share: bool, tmp_path: Path) -> None:
    model, tokens, cells, options = made(share)
    expected = sweep(model, tokens, cells, half, **options)
    path = tmp_path / "sweep.jsonl"
    known, passes = 0, 0
    for _ in range(50):
        try:
            found = sweep(
                model, tokens, cells, half, store=path, cancel=after(9 if share else 4), **options
            )
            break
        except Stopped as stop:
            assert f"{stop.done} of 20" in str(stop) and "same call" in str(stop)
            assert stop.done > known and stop.total == 20  # each call gets somewhere
            known, passes = stop.done, passes + 1
    else:
        pytest.fail("it never ended")
    assert passes > 1
    assert (found.values - expected.values).abs().max() < 1e-5
    assert torch.allclose(found.moved, expected.moved, atol=1e-5)
    assert found.values.dtype == expected.values.dtype
    assert f"{known} of 20 cells from sweep.jsonl" in found.how
    again = sweep(model, tokens, cells, half, store=path, **options)
    assert again.passes == 0 and torch.equal(again.values, found.values)


def test_an_event_stops_from_another_thread(tmp_path: Path) -> None:
    model, tokens, cells, options = made()
    stop = threading.Event()
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            threading.Thread(target=stop.set).start()
            stop.wait(5)

    with pytest.raises(Stopped, match="was stopped") as found:
        sweep(model, tokens, cells, half, progress=progress, cancel=stop, **options)
    assert seen[-1] == (found.value.done, 20) and len(seen) == 2
    assert "give store=FILE" in str(found.value)
    with pytest.raises(Stopped, match="0 of 20"):
        sweep(model, tokens, cells, half, cancel=stop, **options)


class Breaker:
    """Raises where it is called for the n-th time: an interrupt may come anywhere."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.left, self.error = n, error

    def __call__(self, *_: object, **__: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("place", ["module", "attention", "head", "read", "progress"])
@pytest.mark.parametrize("n", [2, 5])
def test_an_interrupt_leaves_nothing_behind(
    share: bool, place: str, n: int, tmp_path: Path
) -> None:
    """In the middle of a forward, of reading or of showing: no hooks, no patches, no lost cells."""
    model, tokens, cells, options = made(share)
    columns = torch.tensor([4, 9])
    expected = sweep(model, tokens, cells, lambda x: x[:, 4] - x[:, 9].double()).values
    breaker = Breaker(n, KeyboardInterrupt)
    spots = {"module": "", "attention": "model.layers.1.self_attn", "head": "model.norm"}
    handle = None
    if place in spots:
        handle = model.module.get_submodule(spots[place]).register_forward_hook(breaker)

    def read(logits: Tensor) -> Tensor:
        if place == "read" and len(logits) > 2:  # not the call that recognises the reader
            breaker()
        return logits[:, 0].double() - logits[:, 1]

    path = tmp_path / "kept.jsonl"
    with pytest.raises(Stopped, match="interrupt") as found:
        sweep(
            model, tokens, cells, read, columns=columns, store=path,
            progress=breaker if place == "progress" else None, **options,
        )  # fmt: skip
    if handle is not None:
        handle.remove()
    assert active_patches() == 0 and current_session() is None and _ROWS.get() is None
    assert kit.hooks(model.module) == kit.HOOKS[id(model)]
    lines = path.read_text().splitlines()[1:]
    assert sum(len(json.loads(line)["cells"]) for line in lines) == found.value.done
    resumed = sweep(model, tokens, cells, read, columns=columns, store=path, **options)
    assert (resumed.values - expected).abs().max() < 1e-5


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Python's own handling of Ctrl-C; a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize(("at", "times", "done"), [(3, 1, 6), (3, 2, 4), (10, 1, 20)])
def test_ctrl_c_waits_for_the_pass_under_way(
    at: int, times: int, done: int, tmp_path: Path
) -> None:
    """A second one does not wait; one in the last pass is not swallowed."""
    model, tokens, cells, options = made(share=False)
    passes: list[int] = []

    def press(*_args: object) -> None:
        passes.append(1)
        for _ in range(times if len(passes) == at else 0):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    handle = model.module.register_forward_hook(press)
    try:
        with pytest.raises(Stopped, match="interrupt") as found:
            sweep(model, tokens, cells, half, store=tmp_path / "kept.jsonl", **options)
    finally:
        handle.remove()
    assert found.value.done == done and len(passes) == at
    assert signal.getsignal(signal.SIGINT) is before
    rest = sweep(model, tokens, cells, half, store=tmp_path / "kept.jsonl", **options)
    assert rest.passes == (20 - done) / 2


def test_any_other_error_keeps_what_was_done(tmp_path: Path) -> None:
    model, tokens, _, _ = made()
    good = [Edit("resid_pre.0", uh.scale(1.5), p) for p in range(4)]
    bad = Edit("resid_post.2", uh.scale(float("nan")), 5)
    path = tmp_path / "kept.jsonl"
    with pytest.raises(NotFinite, match="cell 4"):
        sweep(model, tokens, [*good, bad], half, store=path, batch_size=4, share=False)
    assert len(path.read_text().splitlines()) == 3  # what it is, and two passes
    assert active_patches() == 0


def test_another_sweeps_file_is_refused(tmp_path: Path) -> None:
    model, tokens, cells, options = made()
    path = tmp_path / "kept.jsonl"
    first = cells[:3]
    sweep(model, tokens, first, half, store=path, **options)
    text = path.read_bytes()

    def column(logits: Tensor) -> Tensor:
        return logits[:, 3]

    def refused(what: str, *args: Any, **more: Any) -> None:
        with pytest.raises(FileProblem, match="another sweep") as found:
            sweep(*args, store=path, **more)
        assert what in str(found.value) and str(path) in str(found.value)
        assert path.read_bytes() == text

    other = uh.load("random/llama")
    with torch.no_grad():
        next(other.module.parameters()).mul_(1.01)
    refused("the model's weights", other, tokens, first, half)
    refused("the prompts", model, batch(model, [6, 6], 3), first, half)
    refused("the cells", model, tokens, cells[:2], half)
    refused("the cells", model, tokens, [*cells[:2], cells[4]], half)
    refused("what is read", model, tokens, first, column)
    # The same function with another answer inside is another reader.
    refused("what is read", model, tokens, first, lambda x: half(x), columns=torch.tensor([1, 2]))
    assert sweep(model, tokens, first, half, store=path).passes == 0


def test_readers_are_known_by_what_they_read(tmp_path: Path) -> None:
    model, tokens, cells, options = made()

    def reader(token: int) -> Callable[[Tensor], Tensor]:
        return lambda logits: logits[:, token]

    path = tmp_path / "kept.jsonl"
    sweep(model, tokens, cells[:2], reader(3), store=path, **options)
    with pytest.raises(FileProblem, match="another sweep"):
        sweep(model, tokens, cells[:2], reader(4), store=path, **options)
    folder = tmp_path / "folder"
    folder.mkdir()
    found: list[Swept] = []
    for token in (3, 4, 3):
        found.append(sweep(model, tokens, cells[:2], reader(token), store=folder, **options))
    assert len(list(folder.glob("sweep-*.jsonl"))) == 2
    assert found[1].passes and not found[2].passes
    assert torch.equal(found[0].values, found[2].values)


def test_a_change_inside_a_cells_tensor_is_another_sweep(tmp_path: Path) -> None:
    model, tokens, _, options = made()
    values = torch.randn(1, 6, model.d_model or 0, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "kept.jsonl"
    cell = Edit("resid_pre.1", uh.patch(values), 2)
    before = sweep(model, tokens, [cell], half, store=path, **options).values
    again = Edit("resid_pre.1", uh.patch(values.clone()), 2)
    assert sweep(model, tokens, [again], half, store=path, **options).passes == 0
    values[0, 2, 0] += 3
    with pytest.raises(FileProblem, match="the cells"):
        sweep(model, tokens, [cell], half, store=path, **options)
    after_change = sweep(model, tokens, [cell], half, **options).values
    assert (after_change - before).abs().max() > 1e-4


def test_a_python_function_cannot_be_recognised(tmp_path: Path) -> None:
    model, tokens, _, options = made()
    cell = Edit("resid_pre.1", uh.call(lambda h: h * 2), 2)
    with pytest.raises(UsageError, match="Python function"):
        sweep(model, tokens, [cell], half, store=tmp_path / "kept.jsonl", **options)
    with watched(folder=tmp_path):
        assert sweep(model, tokens, [cell], half, **options).passes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_cut_short_costs_only_itself(cut: int, tmp_path: Path) -> None:
    """As a crash in the middle of writing leaves it."""
    model, tokens, cells, options = made(share=False)
    path = tmp_path / "kept.jsonl"
    whole = sweep(model, tokens, cells, half, store=path, **options)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    found = sweep(model, tokens, cells, half, store=path, **options)
    assert found.passes == 1 and (found.values - whole.values).abs().max() < 1e-6
    assert sweep(model, tokens, cells, half, store=path, **options).passes == 0
    path.write_bytes(data[:30])  # not even what it is
    assert sweep(model, tokens, cells, half, store=path, **options).passes == whole.passes


@pytest.mark.parametrize(
    "text", ["hello\n", "{}\n", '{"schema": "sweep/9"}\n', "[1]\n", "hello", b"\xff\xfe\n"]
)
def test_other_files_are_refused_and_left_alone(text: str | bytes, tmp_path: Path) -> None:
    model, tokens, cells, options = made()
    path = tmp_path / "notes.txt"
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(data)
    with pytest.raises(FileProblem, match="not a readable file"):
        sweep(model, tokens, cells[:2], half, store=path, **options)
    assert path.read_bytes() == data
    with pytest.raises(FileProblem, match="cannot be written"):
        sweep(model, tokens, cells[:2], half, store=tmp_path / "no" / "where.jsonl", **options)


def test_a_change_in_the_middle_of_the_weights_is_another_model(tmp_path: Path) -> None:
    """Half of what was kept would be of other weights."""
    shared, tokens, cells, options = made()
    model = Model(copy.deepcopy(shared.module), name="copy")
    path = tmp_path / "sweep.jsonl"
    sweep(model, tokens, cells, half, store=path, **options)
    weight = max(model.module.parameters(), key=lambda w: w.numel()).data.view(-1)
    weight[len(weight) // 2] += 0.5
    with pytest.raises(FileProblem, match="the model's weights"):
        sweep(model, tokens, cells, half, store=path, **options)


def test_a_file_of_the_first_form_is_refused_with_the_reason(tmp_path: Path) -> None:
    model, tokens, cells, options = made()
    path = tmp_path / "sweep.jsonl"
    sweep(model, tokens, cells, half, store=path, **options)
    path.write_text(path.read_text().replace("sweep/2", "sweep/1"))
    with pytest.raises(FileProblem, match="all of the model's weights"):
        sweep(model, tokens, cells, half, store=path, **options)


def test_looking_on_at_a_method_that_knows_nothing_of_it() -> None:
    """Progress and cancel reach every sweep made inside the block, in this thread only."""
    model, tokens, cells, options = made()
    seen: list[tuple[int, int]] = []
    with watched(progress=lambda *state: seen.append(state)):
        thread = threading.Thread(target=lambda: sweep(model, tokens, cells[:3], half, **options))
        thread.start()
        thread.join()
        assert not seen
        with watched(cancel=after(1000)):
            sweep(model, tokens, cells[:3], half, **options)
            sweep(model, tokens, cells[:2], half, **options)
    assert seen[-1] == (2, 2) and (3, 3) in seen
    assert all(0 < done <= total for done, total in seen)
    stop = threading.Event()
    stop.set()
    with watched(cancel=stop), pytest.raises(Stopped):
        sweep(model, tokens, cells[:2], half, **options)
    length = len(seen)
    sweep(model, tokens, cells[:2], half, **options)
    assert len(seen) == length


def test_the_command_line_keeps_a_sweep(tmp_path: Path) -> None:
    from underhood.cli.app import app

    words = ["run", "activation_patching", "-p", "The capital of France is"]
    words += ["--vs", "The capital of Norway is", "--set", "positions=last"]
    words += ["--keep", str(tmp_path / "kept"), "--json"]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output
    files = list((tmp_path / "kept").glob("sweep-*.jsonl"))
    assert files
    hows = [json.loads(r.stdout)["provenance"]["how"] for r in (first, again)]
    assert "cells from sweep-" not in hows[0] and "cells from sweep-" in hows[1]
