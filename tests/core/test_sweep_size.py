"""How big a sweep is: memory is measured and kept to, passes are counted, the time is honest."""

from pathlib import Path

import kit
import pytest
import torch
from test_sweep import batch, half, random_cells

import underhood as uh
from underhood.core import sweep_size
from underhood.core.edit import Edit
from underhood.core.errors import MemoryTooSmall, OutOfRange
from underhood.core.model import Model
from underhood.core.sweep import estimate, sweep
from underhood.core.tokens import Tokens

pytestmark = pytest.mark.usefixtures("always_share")


def grid(model: Model, name: str, length: int) -> list[Edit]:
    return [
        Edit(site, uh.scale(1.5), p) for site in model.resolve(name) for p in range(0, length, 3)
    ]


def peak(model: Model, tokens: Tokens, cells: list[Edit], **options: object) -> int:
    """What a sweep really held at its worst moment."""
    with sweep_size._Meter() as meter:
        sweep(model, tokens, cells, half, **options)  # type: ignore[arg-type]
    return meter.peak


def test_the_meter_counts_what_lives() -> None:
    with sweep_size._Meter() as meter:
        a = torch.zeros(1000)
        b = a + 1
        a.add_(b)  # in place: nothing new
        c = b.view(10, 100)  # the same memory
        del a, b
        d = c * 2
    assert meter.peak == 8000 and meter.live == 8000
    del c, d
    assert meter.live == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "bloom"])
@pytest.mark.parametrize("name", ["resid_pre", "attn_out"])
def test_the_estimate_bounds_what_a_sweep_takes(family: str, name: str) -> None:
    """Never less than what is used, nor much more; and passes are counted as they are made."""
    model = kit.model(family)
    tokens = batch(model, [24])
    cells = grid(model, name, 24)
    found = estimate(model, tokens, cells, batch_size=8)
    real = sweep(model, tokens, cells, half, batch_size=8)
    assert found.passes == real.passes and found.how in real.how
    used = peak(model, tokens, cells, batch_size=8)
    assert used < found.memory < 4 * used
    assert found.cells == len(cells) and 8 <= found.rows <= 9


@pytest.mark.parametrize("share", [True, False])
def test_passes_are_counted_for_any_prompts(share: bool) -> None:
    model = kit.model("gpt2")
    tokens = batch(model, [5, 9, 7])
    cells = random_cells(model, tokens, seed=2, n=12)
    for size in (1, 2, 7, 64):
        found = estimate(model, tokens, cells, batch_size=size, share=share)
        assert found.passes == sweep(
            model, tokens, cells, half, batch_size=size, share=share
        ).passes  # fmt: skip


@pytest.mark.parametrize("share", [True, False])
def test_a_cap_is_kept_and_changes_no_number(share: bool) -> None:
    model = kit.model("llama")
    tokens = batch(model, [24])
    cells = grid(model, "resid_pre", 24)
    free = sweep(model, tokens, cells, half, share=share)
    open_peak = peak(model, tokens, cells, share=share)
    cap = open_peak // 2
    capped = sweep(model, tokens, cells, half, share=share, memory=cap)
    assert peak(model, tokens, cells, share=share, memory=cap) <= cap < open_peak
    assert capped.passes > free.passes
    assert (capped.values - free.values).abs().max() < 1e-5
    assert "of memory" in estimate(model, tokens, cells, share=share, memory=cap).why


def test_patterns_count() -> None:
    """Cells that write attention out as a matrix need more, and get fewer rows."""
    model = kit.model("llama")
    tokens = batch(model, [48])
    plain = estimate(model, tokens, grid(model, "resid_pre", 48))
    wide = estimate(model, tokens, grid(model, "pattern", 48))
    assert wide.memory / wide.rows > 1.5 * plain.memory / plain.rows


def test_not_even_one_row() -> None:
    model = kit.model("gpt2")
    tokens = batch(model, [12])
    cells = grid(model, "resid_pre", 12)
    with pytest.raises(MemoryTooSmall, match="not even one row") as found:
        sweep(model, tokens, cells, half, memory=1000)
    need = int(str(found.value).split("give memory=")[1].split()[0])
    assert sweep(model, tokens, cells, half, memory=need).values.isfinite().all()
    with pytest.raises(OutOfRange):
        sweep(model, tokens, cells, half, memory=0)


def test_what_the_machine_has_free_bounds_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model("gpt2")
    tokens = batch(model, [24])
    cells = grid(model, "resid_pre", 24)
    usual = sweep(model, tokens, cells, half)
    need = peak(model, tokens, cells)
    for free, more in ((None, False), (10**12, False), (need, True)):
        monkeypatch.setattr(sweep_size, "free_memory", lambda device, free=free: free)
        found = sweep(model, tokens, cells, half)
        assert (found.passes > usual.passes) == more
        assert (found.values - usual.values).abs().max() < 1e-5
    monkeypatch.setattr(sweep_size, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryTooSmall, match="free"):
        sweep(model, tokens, cells, half)


def test_free_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert (sweep_size.free_memory(cpu) or 0) > 10**7
    (tmp_path / "info").write_text("MemTotal: 9 kB\nMemAvailable:   3000 kB\n")
    monkeypatch.setattr(sweep_size, "_MEMINFO", tmp_path / "info")
    monkeypatch.setattr(sweep_size, "_CGROUP", tmp_path)
    assert sweep_size.free_memory(cpu) == 3000 * 1024
    for name, text in (("max", "5000"), ("current", "4000"), ("stat", "inactive_file 500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert sweep_size.free_memory(cpu) == 1500  # a container with less than its machine
    assert sweep_size.free_memory(torch.device("meta")) is None


def test_the_estimate_reads_well_and_its_time_is_no_fiction() -> None:
    model = kit.model("gpt2")
    tokens = batch(model, [12])
    few, many = (grid(model, "resid_pre", 12) * n for n in (1, 40))
    short, long = (estimate(model, tokens, cells) for cells in (few, many))
    assert 0 < short.seconds < long.seconds
    text = str(long)
    for part in ("480 cells", f"{long.passes} passes", "shared prefix", "Because", "factor of two"):
        assert part in text
    columns = estimate(model, tokens, few, columns=torch.tensor([1, 2]))
    assert columns.memory <= short.memory
    assert "asked for" in estimate(model, tokens, few, share=False).why
    readable = sweep_size.readable_bytes
    assert [readable(n) for n in (7, 1500, 2.5e6, 7.7e10, 3e12)] == [
        "7 bytes", "1.5 kB", "2.5 MB", "77 GB", "3 TB",
    ]  # fmt: skip
