"""Direct logit attribution: who writes the logit difference.

The logits are linear in the stream once the final norm's scale is frozen at its actual value, and
the stream is a sum of what its parts wrote. So the difference between two logits splits exactly:

    logit(answer) - logit(wrong) = sum over parts <part, u> + biases,   u = gain * (W_a - W_w) / scale

with `u` centred where the norm is. The parts are the embedding, every head (or mixer) and every
MLP. Families that normalise a sub-layer's output before adding it (Gemma 2, OLMo 2, GLM 4) get that
norm's scale frozen as well. The sum is compared with the model's own difference in every call.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.errors import NotOffered, OutOfRange
from underhood.core.head import NormForm, norm_form
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Pairs, logit_diff
from underhood.methods.read._unembedding import head_of, tolerance
from underhood.methods.registry import method
from underhood.view import Result, View, bars, grid, group, sentences

if TYPE_CHECKING:
    import numpy as np
    import xarray

__all__ = ["direct_attribution"]

_ROWS = 32  # prompts per forward; the numbers do not depend on it
_SHOWN = 20
_NOISE = 1e-6  # an attention without biases leaves this much beside its heads, relative


@method
def direct_attribution(
    model: Model,
    pairs: Pairs,
    *,
    split: Literal["heads", "sublayers"] = "heads",
    random_pairs: int = 20,
    seed: int = 0,
) -> Result:
    """How much every head and MLP writes, directly, into the logit difference of the clean prompt.

    Args:
        pairs: Clean prompts with answers and wrong answers; contrasts are read only to fill in
            missing ones. Without answers: the model's own top token on the clean prompt, against
            its best other token on the contrast.
        split: "heads" takes attention apart where it has heads; "sublayers" keeps it whole.
        random_pairs: Pairs of random tokens for the control.
        seed: Of these random tokens.

    Returns:
        In logits before any soft cap, positive where a part supports the answer. Over `node` (such
        as `embed`, `L1.H2`, `L3.MLP`): `contribution` (mean over rows), `spread` (standard
        deviation over rows), `control` (mean magnitude for pairs of random tokens); `per_row`
        over `batch` and `node`. Over `layer` and `head`: `heads`; over `layer`: `attention` (all
        of it), `mlp`. Numbers: `total` (sum of all parts), `logit_diff` (the model's own), `gap`
        (the largest difference between the two, relative to the largest part).

    Raises:
        NotOffered: No unembedding; a model whose stream itself is normalised (BERT, BART); or
            parts that do not add up to the model's logit difference.
        PairError: Pairs that cannot be compared.
        AnswerError: An answer that is not one token.

    Cost: one forward over the clean prompts; one more over clean and contrast each if answers are
        missing.

    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits". Ours: norms
        after a sub-layer are frozen like the final one; the control on random tokens.

    Misleads: it shows direct effects only: a head that works through later layers gets nothing.
        Remove a large part and the frozen norm moves and backup heads step in, so the loss is not
        its contribution. Patching measures that.

    Example:
        >>> import underhood as uh
        >>> pair = Pairs.one("The capital of France is", "The capital of Norway is")
        >>> found = direct_attribution(uh.load(), pair)
        >>> bool(abs(found["total"] - found["logit_diff"]) < 1e-3)
        True
    """
    head = head_of(model)
    layout = _layout(model, heads=split == "heads")
    if random_pairs < 1:
        raise OutOfRange(
            "the control needs at least one random pair", given=random_pairs, do="use 20"
        )
    encoded, origin = _with_answers(model, pairs.encode(model))
    form = head.form()
    vocab = int(getattr(head.module, "out_features", 0)) or int(model.config.vocab_size)
    drawn = _random_tokens(vocab, random_pairs, seed)
    chunks = [
        _Chunk(layout, form, encoded.answers[i : i + _ROWS], encoded.wrong[i : i + _ROWS], drawn)
        .attribute(_part(encoded.clean, i, i + _ROWS))
        for i in range(0, len(encoded), _ROWS)
    ]  # fmt: skip
    found = _joined(chunks)
    found.check(model)
    data = found.dataset(model.n_layers, model.n_heads, pairs)
    return Result(
        name="direct_attribution",
        data=data,
        view=_view(found, data, origin),
        provenance=describe(
            model, split=split, rows=len(encoded), answers=origin, seed=seed,
            random_pairs=random_pairs,
            self_check=f"sum of parts = the model's logit difference within {found.gap:.1e}",
        ),
    )  # fmt: skip


# What is where -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one block adds to the stream, and how its attention is taken apart.

    Attributes:
        attn, mlp: Sites of what is added, None where there is none.
        heads: Site of the heads' outputs, None to keep attention whole.
        norm: Path and linear form of a norm between the heads and the stream.
        softmax: Whether `attn` is an attention (else a mixer of another kind).
    """

    attn: Site | None
    mlp: Site | None
    heads: Site | None
    norm: tuple[str, NormForm] | None
    softmax: bool


@dataclass(frozen=True, slots=True)
class _Layout:
    model: Model
    layers: tuple[_Layer, ...]

    @property
    def embed(self) -> Site:
        return Site("resid_pre", 0, stack=self.model.main)

    @property
    def final(self) -> Site:
        return Site("resid_post", self.model.n_layers - 1, stack=self.model.main)

    @property
    def sites(self) -> list[Site | str]:
        """Everything to record at the last position."""
        found: list[Site | str] = [self.embed, self.final]
        for layer in self.layers:
            found += [s for s in (layer.attn, layer.mlp, layer.heads) if s is not None]
            found += [Site("module_in", path=layer.norm[0])] if layer.norm else []
        return list(dict.fromkeys(found))


def _layout(model: Model, *, heads: bool) -> _Layout:
    """Refuse streams that are no sum; else name the parts of every layer."""
    blocks = model.anatomy.stacks[model.main].blocks
    if any(block.post_norms for block in blocks):
        raise NotOffered(
            "the stream of this model is not a sum of what its parts write",
            given=repr(model),
            why="each block normalises the stream itself (post-norm), so earlier parts are rescaled"
            " again and again",
            do="use activation patching, which needs no sum",
        )
    layers = []
    for number, block in enumerate(blocks):
        at = {n: Site(n, number, stack=model.main) for n in ("attn_out", "mlp_out", "head_out")}
        attn, mlp, split = (s if model.offers(s) else None for s in at.values())
        layer = _Layer(attn, mlp, split if heads else None, None, block.attention is not None)
        layers.append(_between(model, layer))
    return _Layout(model, tuple(layers))


def _between(model: Model, layer: _Layer) -> _Layer:
    """What lies between the heads and the stream: nothing, a norm, or another sub-layer."""
    if layer.heads is None or layer.attn is None:
        return replace(layer, heads=None)
    block = model.anatomy.stacks[model.main].blocks[layer.attn.layer or 0]
    path = block.points["attn_out"].path
    if block.attention and f"{block.attention.o_proj}.".startswith(f"{path}."):
        return layer
    module = model.module.get_submodule(path)
    if "norm" not in type(module).__name__.lower():
        # Zamba 2: the attention writes into the mixer, and only the mixer into the stream.
        return replace(layer, heads=None, softmax=False)
    return replace(layer, norm=(path, norm_form(module, model.d_model or 0)))


# Answers -----------------------------------------------------------------------------------------


def _with_answers(model: Model, encoded: EncodedPairs) -> tuple[EncodedPairs, str]:
    """Missing answers filled in with what the model says; and a sentence on where they come from."""
    answers, wrong, origin = encoded.answers, encoded.wrong, "as given"
    if answers.shape[1] == 0:
        answers = torch.cat([r.last_logits.argmax(-1) for r in _runs(model, encoded.clean)])
        answers = answers[:, None]
        origin = "answer: the model's top token on the clean prompt"
    if wrong.shape[1] == 0:
        logits = torch.cat([r.last_logits for r in _runs(model, encoded.contrast)])
        for row, own in enumerate(answers.tolist()):
            logits[row, [i for i in own if i >= 0]] = -torch.inf
        wrong = logits.argmax(-1)[:, None]
        origin += "; wrong: its top token on the contrast other than the answer"
    if bool((wrong < 0).all(1).any()) or bool((answers < 0).all(1).any()):
        raise OutOfRange(
            "some rows have answers and others have none",
            given=f"{len(encoded)} rows",
            do="give every row an answer and a wrong answer, or none at all",
        )
    return replace(encoded, answers=answers, wrong=wrong), origin


def _part(tokens: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(tokens.ids[start:stop], tokens.mask[start:stop], tokens.strings[start:stop])


def _runs(model: Model, tokens: Tokens) -> list[Run]:
    return [model.run(_part(tokens, i, i + _ROWS)) for i in range(0, len(tokens), _ROWS)]


def _random_tokens(vocab: int, n: int, seed: int) -> Int[Tensor, "n 2"]:
    """Pairs of different tokens."""
    make = torch.Generator().manual_seed(seed)
    first = torch.randint(0, vocab, (n,), generator=make)
    other = torch.randint(1, vocab, (n,), generator=make)
    return torch.stack([first, (first + other) % vocab], 1)


# The sum -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """Contributions of all parts.

    Attributes:
        labels: One per part.
        places: `(kind, layer, head)` per part; -1 where it has none.
        values: `[batch, node, 1 + random]`: the answers' difference, then those of random tokens.
        model_says: The model's own logit difference before any soft cap.
        capped: The same after it, None without one.
        broken: Name of the first block whose parts do not add up, if one was found.
    """

    labels: list[str]
    places: list[tuple[str, int, int]]
    values: Float[Tensor, "batch node pair"]
    model_says: Float[Tensor, " batch"]
    capped: Float[Tensor, " batch"] | None

    @property
    def mine(self) -> Float[Tensor, "batch node"]:
        return self.values[..., 0]

    @property
    def gap(self) -> float:
        """Largest difference between sum and model, relative to the row's largest part."""
        size = torch.maximum(self.mine.abs().amax(1), self.model_says.abs()).clamp(min=1e-12)
        return float(((self.mine.sum(1) - self.model_says).abs() / size).max())

    def check(self, model: Model) -> None:
        """Refuse a sum that is not the model's logit difference."""
        if self.gap <= tolerance(model.dtype):
            return
        raise NotOffered(
            "the parts of this model do not add up to its logit difference",
            given=f"{model!r}: sum {float(self.mine.sum(1).mean()):+.4g}, model"
            f" {float(self.model_says.mean()):+.4g} logits, relative gap {self.gap:.2g}",
            why="something else writes to the stream, rescales it, or stands before the logits",
            do="use activation patching, which needs no sum; model.check() shows which sum fails",
        )

    def where(self, kind: str) -> list[int]:
        return [i for i, place in enumerate(self.places) if place[0] == kind]

    def dataset(self, n_layers: int, n_heads: int, pairs: Pairs) -> "xarray.Dataset":
        import numpy as np
        import xarray

        mine = self.mine
        mean = mine.mean(0)
        table = {k: np.full(n_layers, np.nan) for k in ("attention", "mlp")}
        heads = np.full((n_layers, n_heads), np.nan)
        for value, (kind, layer, head) in zip(mean.tolist(), self.places, strict=True):
            if kind == "head":
                heads[layer, head] = value
            if kind == "mlp":
                table["mlp"][layer] = value
            elif layer >= 0:
                table["attention"][layer] = np.nansum([table["attention"][layer], value])
        variables = {
            "contribution": ("node", mean.numpy()),
            "spread": ("node", mine.std(0, correction=0).numpy()),
            "control": ("node", self.values[..., 1:].abs().mean((0, 2)).numpy()),
            "per_row": (("batch", "node"), mine.numpy()),
            "attention": ("layer", table["attention"]),
            "mlp": ("layer", table["mlp"]),
            "total": float(mean.sum()),
            "logit_diff": float(self.model_says.mean()),
            "gap": self.gap,
        }
        if self.capped is not None:
            variables["capped_logit_diff"] = float(self.capped.mean())
        if self.where("head"):
            variables["heads"] = (("layer", "head"), heads)
        coords = {
            "node": self.labels,
            "kind": ("node", [place[0] for place in self.places]),
            "layer": list(range(n_layers)),
            "prompt": ("batch", list(pairs.clean)),
        }
        return xarray.Dataset(variables, coords=coords)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows on their way: the directions to read, and the parts to read along them."""

    layout: _Layout
    form: NormForm | None
    answers: Int[Tensor, "batch n"]
    wrong: Int[Tensor, "batch m"]
    drawn: Int[Tensor, "random 2"]

    def attribute(self, tokens: Tokens) -> _Found:
        """One forward, and every part along every direction."""
        model, head = self.layout.model, head_of(self.layout.model)
        sites = list(self.layout.sites)
        if head.soft_cap:
            sites.append(Site("module", path=str(model.anatomy.head)))
        run = model.run(tokens, record=sites, at=-1)
        final = run[self.layout.final][:, 0].double()
        targets, unembedding_bias = self._targets()
        biases = {"unembedding bias": unembedding_bias}
        u = targets
        if self.form is not None:
            u = self.form.centre(self.form.gain.double() * targets) / self.form.scale(final)[:, None]
            biases["final norm bias"] = targets @ self.form.bias.double()
        parts: dict[tuple[str, int, int], Tensor] = {("embed", -1, -1): _along(run, self.layout.embed, u)}
        for number, layer in enumerate(self.layout.layers):
            parts |= self._layer(run, number, layer, u)
        labels = [_label(*place) for place in parts]
        for name, value in biases.items():
            if bool((value != 0).any()):
                parts[("bias", -1, len(labels))] = value
                labels.append(name)
        says, capped = self._model_says(run)
        return _Found(labels, list(parts), torch.stack(list(parts.values()), 1).cpu(), says, capped)

    def _targets(self) -> tuple[Float[Tensor, "batch pair d_model"], Float[Tensor, "batch pair"]]:
        """Directions answer minus wrong per row, then those of random tokens; and their biases."""
        head = head_of(self.layout.model)
        rows, biases = [], []
        for right, wrong in zip(self.answers.tolist(), self.wrong.tolist(), strict=True):
            ends = []
            for ids in (right, wrong):
                known = [i for i in ids if i >= 0]
                ends.append((head.directions(known).mean(0), head.biases(known).mean()))
            rows.append(ends[0][0] - ends[1][0])
            biases.append(ends[0][1] - ends[1][1])
        first, other = (self.drawn[:, i].tolist() for i in range(2))
        random = head.directions(first) - head.directions(other)
        random_bias = head.biases(first) - head.biases(other)
        n = len(rows)
        direction = torch.cat([torch.stack(rows)[:, None], random.expand(n, -1, -1)], 1)
        return direction, torch.cat([torch.stack(biases)[:, None], random_bias.expand(n, -1)], 1)

    def _layer(
        self, run: Run, number: int, layer: _Layer, u: Float[Tensor, "batch pair d_model"]
    ) -> dict[tuple[str, int, int], Tensor]:
        """What one block writes along the directions."""
        parts: dict[tuple[str, int, int], Tensor] = {}
        if layer.attn is not None:
            whole = _along(run, layer.attn, u)
            if layer.heads is None:
                parts["attn" if layer.softmax else "mixer", number, -1] = whole
            else:
                each = self._heads(run, layer, u)
                parts |= {("head", number, h): each[:, h] for h in range(each.shape[1])}
                parts["rest", number, -1] = whole - each.sum(1)
        if layer.mlp is not None:
            parts["mlp", number, -1] = _along(run, layer.mlp, u)
        return parts

    def _heads(
        self, run: Run, layer: _Layer, u: Float[Tensor, "batch pair d_model"]
    ) -> Float[Tensor, "batch head pair"]:
        """What each head writes, through a norm with frozen scale where one follows."""
        assert layer.heads is not None
        if layer.norm is not None:
            path, form = layer.norm
            entering = run[Site("module_in", path=path)]
            ends = _ends(run.tokens, entering.device)
            entering = entering[torch.arange(len(ends)), ends].double()
            # The norm is moved onto the direction: <linear(part), u> = <part, centre(gain u) / s>.
            u = form.centre(form.gain.double() * u) / form.scale(entering)[:, None]
        return torch.einsum("bhd,bpd->bhp", run[layer.heads][:, 0].double(), u)

    def _model_says(self, run: Run) -> tuple[Tensor, Tensor | None]:
        """The model's own logit difference before and, if there is one, after the soft cap."""
        head = head_of(self.layout.model)
        after = logit_diff(run.last_logits.double(), self.answers, self.wrong).cpu()
        if not head.soft_cap:
            return after, None
        raw = run[Site("module", path=str(self.layout.model.anatomy.head))]
        raw = raw[torch.arange(len(raw)), _ends(run.tokens, raw.device)] * head.factor
        return logit_diff(raw.double(), self.answers, self.wrong).cpu(), after


def _ends(tokens: Tokens | None, device: torch.device) -> Int[Tensor, " batch"]:
    """Column of each row's last token."""
    assert tokens is not None
    ends = [s + n - 1 for s, n in zip(tokens.starts, tokens.lengths, strict=True)]
    return torch.tensor(ends, device=device)


def _along(
    run: Run, site: Site, u: Float[Tensor, "batch pair d_model"]
) -> Float[Tensor, "batch pair"]:
    return torch.einsum("bd,bpd->bp", run[site][:, 0].double(), u)


def _label(kind: str, layer: int, head: int) -> str:
    if kind == "head":
        return f"L{layer}.H{head}"
    names = {"mlp": "MLP", "rest": "attn rest"}
    return f"L{layer}.{names.get(kind, kind)}" if layer >= 0 else kind


def _joined(chunks: list[_Found]) -> _Found:
    """All rows together, without remainders that are mere rounding."""
    first = chunks[0]
    values = torch.cat([c.values for c in chunks])
    labels = list(dict.fromkeys(label for c in chunks for label in c.labels))
    ...
    return first
