"""Exact effects of single edges against masks, whatever columns of the logits the metric reads."""

import pytest
import torch

from underhood.circuits.exact import edge_effects
from underhood.data import metric_named

READ = {"logit_diff": "2 columns", "logit": "1 columns", "prob": "", "kl": ""}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_effects_are_those_of_masks_whatever_is_read(family, name, wiring_of, pairs_of):
    wiring, pairs, metric = wiring_of(family), pairs_of(family, 2), metric_named(name)
    edges = [(int(u), int(v)) for u, v in wiring.graph.real.nonzero()[::37].tolist()]
    found = edge_effects(wiring, pairs, metric, edges)
    clean, contrast = (wiring.writes(side) for side in (pairs.clean, pairs.contrast))

    def value(logits: torch.Tensor, row: int) -> torch.Tensor:
        some = pairs.rows([row] * len(logits))
        reference = clean.logits[[row] * len(logits)] if metric.uses_reference else None
        return metric(logits, some.answers, some.wrong, reference=reference).double()

    keep = torch.ones(len(edges), *wiring.graph.real.shape)
    for number, edge in enumerate(edges):
        keep[number][edge] = 0
    for row in range(2):
        rows = [row] * len(edges)
        logits = wiring.logits(pairs.clean.rows(rows), contrast.rows(rows), keep)
        truth = value(clean.logits[[row]], row) - value(logits, row)
        torch.testing.assert_close(found.values[:, row], truth, atol=3e-5, rtol=1e-3)
    assert READ[name] in found.how and ("columns" in found.how) == bool(READ[name])
