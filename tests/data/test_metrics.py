"""Metrics against their formulas, their gradients, and their refusals."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from word_model import calm, says

from underhood.core.errors import NotFinite, OutOfRange, PairError, ShapeMismatch, UsageError
from underhood.data import METRICS, Metric, kl, logit_diff, metric_named, normalised, rank, reindex

NUMBER = st.floats(-20, 20, allow_nan=False, width=32)
V = 6


@st.composite
def asked(draw):
    """Logits, reference, answers and wrong answers as plain lists (rows of unequal length)."""
    batch = draw(st.integers(1, 3))
    row = st.lists(NUMBER, min_size=V, max_size=V)
    logits, reference = ([draw(row) for _ in range(batch)] for _ in range(2))
    answers, wrong = [], []
    for _ in range(batch):
        ids = draw(st.permutations(range(V)))
        cut = draw(st.integers(1, V - 1))
        answers.append(ids[:cut])
        wrong.append(ids[cut:])
    return logits, reference, answers, wrong


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    return [x / sum(exps) for x in exps]


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


FORMULAS = {
    "logit_diff": lambda x, r, a, w: mean([x[i] for i in a]) - mean([x[i] for i in w]),
    "logit": lambda x, r, a, w: mean([x[i] for i in a]),
    "prob": lambda x, r, a, w: sum(probabilities(x)[i] for i in a),
    "log_prob": lambda x, r, a, w: log_softmax(
        [math.log(sum(math.exp(x[i] - max(x)) for i in a) or 1e-300) + max(x)]
        + [x[i] for i in range(V) if i not in a]
    )[0],
    "prob_diff": lambda x, r, a, w: (
        sum(probabilities(x)[i] for i in a) - sum(probabilities(x)[i] for i in w)
    ),
    "cross_entropy": lambda x, r, a, w: mean([log_softmax(x)[i] for i in a]),
    "kl": lambda x, r, a, w: (
        -sum(
            p * (b - n)
            for p, b, n in zip(probabilities(r), log_softmax(r), log_softmax(x), strict=True)
        )
    ),
    "rank": lambda x, r, a, w: -sum(x[i] >= max(x[j] for j in a) for i in range(V) if i not in a),
}


def test_every_metric_has_a_formula_here():
    assert set(FORMULAS) == set(METRICS)


@pytest.mark.parametrize("name", sorted(METRICS))
@calm
@given(asked())
def test_metrics_equal_their_formulas(name, case):
    logits, reference, answers, wrong = case
    got = METRICS[name](
        torch.tensor(logits, dtype=torch.float32),
        padded(answers),
        padded(wrong),
        reference=torch.tensor(reference, dtype=torch.float32),
    )
    expected = [FORMULAS[name](*row) for row in zip(logits, reference, answers, wrong, strict=True)]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected).float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in sorted(METRICS) if METRICS[n].differentiable])
def test_gradients_equal_finite_differences(name):
    torch.manual_seed(0)
    logits = torch.randn(2, V, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, V, dtype=torch.float64)
    answers, wrong = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[3], [4]])

    def value(x):
        return METRICS[name](x, answers, wrong, reference=reference)

    assert torch.autograd.gradcheck(value, logits)
    (grad,) = torch.autograd.grad(value(logits).sum(), logits)
    step = 1e-5
    for row in range(2):
        for column in range(V):
            moved = torch.zeros_like(logits)
            moved[row, column] = step
            slope = (value(logits + moved) - value(logits - moved)).sum().detach() / (2 * step)
            assert abs(float(slope - grad[row, column])) < 1e-7


@pytest.mark.parametrize("name", sorted(METRICS))
def test_more_logit_for_the_answer_is_never_worse(name):
    torch.manual_seed(1)
    logits, answers, wrong = torch.randn(4, V), torch.full((4, 1), 2), torch.full((4, 1), 3)
    reference = logits.clone()
    reference[:, 2] += 5  # kl supports whatever the reference supports
    better = logits.clone()
    better[:, 2] += 1
    before = METRICS[name](logits, answers, wrong, reference=reference)
    after = METRICS[name](better, answers, wrong, reference=reference)
    assert bool((after >= before).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_run_in_float32(dtype):
    logits = torch.randn(3, 50, dtype=torch.float32).to(dtype)
    ids = torch.tensor([[1]])
    for metric in METRICS.values():
        got = metric(logits, ids, ids + 1, reference=logits[:1])
        assert got.dtype == torch.float32 and got.shape == (3,)
        wide = metric(logits.float(), ids, ids + 1, reference=logits[:1].float())
        assert torch.equal(got, wide)


def test_ties_count_against_the_answer():
    assert rank(torch.zeros(1, V), torch.tensor([[2]])).tolist() == [-(V - 1)]
    assert rank(torch.tensor([[1.0, 0.0]]), torch.tensor([[0]])).tolist() == [0]


def test_kl_of_a_pass_with_itself_is_zero():
    logits = torch.randn(3, V)
    assert float(kl(logits, reference=logits).abs().max()) < 1e-6


@calm
@given(asked())
def test_selected_columns_give_the_same(case):
    logits, _, answers, wrong = case
    x, a, w = torch.tensor(logits), padded(answers[:1]), padded([wrong[0][:1]])
    for metric in METRICS.values():
        columns = metric.needs_columns(a, w)
        assert (columns is None) == metric.uses_all
        if columns is not None:
            few = x[:, columns]
            other = reindex(w, columns) if metric.uses_wrong else None
            assert torch.equal(metric(few, reindex(a, columns), other), metric(x, a, w))


def test_columns_of_the_answers_only():
    a, w = torch.tensor([[5, -1], [1, 5]]), torch.tensor([[0], [5]])
    columns = {name: metric.needs_columns(a, w) for name, metric in METRICS.items()}
    assert columns["logit"] is not None and columns["logit"].tolist() == [1, 5]
    assert columns["logit_diff"] is not None and columns["logit_diff"].tolist() == [0, 1, 5]
    assert all(columns[name] is None for name in ("kl", "rank", "prob", "cross_entropy"))


def test_your_own_metric():
    best = Metric("best", lambda asked: asked.logits.amax(1), "logits", "top", uses_answers=False)
    assert best(torch.tensor([[1.0, 4.0]])).tolist() == [4.0]
    assert metric_named(best) is best and str(best) == "best"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(METRICS))
def test_logits_that_are_not_finite(name, bad):
    logits, good = torch.zeros(3, V), torch.zeros(3, V)
    logits[1, 5] = bad
    ids = torch.tensor([[0]])
    with pytest.raises(NotFinite) as error:
        METRICS[name](logits, ids, ids + 1, reference=good)
    says(error, name, "1 of 3", "row 1")


def test_a_reference_that_is_not_finite():
    with pytest.raises(NotFinite) as error:
        kl(torch.zeros(1, V), reference=torch.full((1, V), math.nan))
    says(error, "reference")


ONE = torch.tensor([[0]])


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        (lambda x: logit_diff(x, ONE), PairError, ["logit_diff", "wrong=None", "log_prob"]),
        (lambda x: logit_diff(x), PairError, ["logit_diff", "answers=None", "with_answers"]),
        (
            lambda x: logit_diff(x, ONE, torch.tensor([[1], [-1]])),
            PairError,
            ["row 1", "1 of 2 rows empty"],
        ),
        (
            lambda x: logit_diff(x, torch.full((2, 0), -1), ONE),
            PairError,
            ["row 0", "2 of 2", "with_answers"],
        ),
        (lambda x: kl(x), PairError, ["kl", "reference=clean_logits"]),
        (lambda x: rank(x, ONE + V), OutOfRange, [f"id {V}", f"{V} columns", "reindex"]),
        (lambda x: metric_named("logitdif"), UsageError, ["logitdif", "logit_diff"]),
        (lambda x: reindex(ONE, torch.tensor([1])), OutOfRange, ["id 0", "needs_columns"]),
    ],
)
def test_refusals(call, kind, parts):
    with pytest.raises(kind) as error:
        call(torch.zeros(2, V))
    says(error, *parts)


@pytest.mark.parametrize(
    ("args", "reference", "parts"),
    [
        ((torch.zeros(1, 2, V), ONE, ONE), None, ["[1, 2, 6]", "logits[:, -1]"]),
        ((torch.zeros(2, V), ONE.repeat(3, 1), ONE), None, ["3 rows of answers", "2 rows"]),
        ((torch.zeros(2, V), ONE, ONE), torch.zeros(3, V), ["[3, 6]", "[2, 6]"]),
    ],
)
def test_shapes_are_refused_without_the_type_checker(args, reference, parts):
    # Under the tests' checker jaxtyping is faster; users run without it and get our message.
    call = inspect.unwrap(Metric.__call__)
    metric = kl if reference is not None else logit_diff
    with pytest.raises(ShapeMismatch) as error:
        call(metric, *args, reference=reference)
    says(error, *parts)


def test_normalised():
    assert normalised(2.0, 3.0, -1.0) == 0.75
    value = torch.tensor([[3.0, 1.0], [-1.0, 0.0]])
    got = normalised(value, torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 0.0]))
    assert got.tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("clean", "contrast", "parts"),
    [
        (1.5, 1.5, ["clean 1.5, contrast 1.5", "another metric"]),
        (1e6, 1e6 + 0.01, ["1e+06"]),
        (math.nan, 1.0, ["nan"]),
        (
            torch.tensor([1.0, 2.0]),
            torch.tensor([0.0, 2.0]),
            ["1 of 2 entries, first 1", "clean 2"],
        ),
    ],
)
def test_a_constant_metric_has_no_scale(clean, contrast, parts):
    with pytest.raises(PairError) as error:
        normalised(torch.tensor([1.0, 1.0]), clean, contrast)
    says(error, *parts)
