"""Contextual decomposition: what one node writes, followed through all that comes after it.

Every activation is split in two, beta (what is due to the node) and gamma (the rest):

    start       beta = what the node writes - a reference, gamma = everything else in the stream
    linear      each part by itself; the bias is shared in proportion |beta| : |gamma|
    norm        each part centred and divided by the scale of the whole; the bias likewise
    attention   the whole's pattern applied to each part's values
    MLP         gamma' = mlp(gamma), beta' = mlp(whole) - mlp(gamma)

So beta + gamma is the model's own activation everywhere, and a beta of 0 stays 0, except where
biases are shared. Both parts are carried on their own and never fixed up by subtraction, so that
their sum tests the whole walk (`Followed.errors`).

The paper splits an MLP at its activation function. Here the MLP is one function, which holds for
gated MLPs and mixtures too (a mixture routes gamma as gamma asks). In a plain MLP the two differ
only in who gets the biases: gamma has them here.

No gradients, no second run: one recorded pass of each prompt, then one walk in which nodes are rows
of a batch.

Source: CD-T (Hsu et al., 2024), here for any family whose heads can be told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.circuits.wiring import Wiring, Writes, last_logits
from underhood.core.errors import NotOffered, UsageError
from underhood.core.families import NAMES
from underhood.core.head import Head, NormForm
from underhood.core.parts import Reader
from underhood.core.site import Site
from underhood.core.tokens import Tokens

__all__ = ["Decomposition", "Followed"]

BUDGET = 1 << 28  # bytes that both parts of one chunk of nodes may take
CLOSE = {torch.float32: 2e-3, torch.float64: 1e-6}  # of an activation's size; else 0.3
Parts = tuple[Float[Tensor, "node rows pos ..."], Float[Tensor, "node rows pos ..."]]
"""Beta and gamma."""


@dataclass(slots=True)
class Followed:
    """Where beta and gamma have come to.

    Attributes:
        beta: At the stream before the final norm, every position.
        gamma: The same.
        errors: For each point that was passed, the largest |beta + gamma - activation| as a share
            of the activation's root mean square, padding left out.
    """

    beta: Float[Tensor, "node rows pos d"]
    gamma: Float[Tensor, "node rows pos d"]
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Mlp:
    """An MLP as a function from what it reads (after the norm) to what it adds."""

    module: nn.Module
    after: nn.Module | None
    scale: float

    def __call__(self, normed: Tensor) -> Tensor:
        out = self.module(normed)
        out = out[0] if isinstance(out, tuple) else out
        return (out if self.after is None else self.after(out)) * self.scale


class Decomposition:
    """Follows nodes of a graph through the model's run of some prompts.

    Args:
        wiring: The model and its graph.
        tokens: The prompts; they are run once, here.
        biases: "shared": in proportion |beta| : |gamma|, as in the paper; "rest": all to gamma, so
            that beta holds nothing but the node's own change.
        collapse: After each step, where the parts have opposite signs, the larger takes both (as
            the paper's code does).

    Raises:
        NotOffered: A block whose heads cannot be told apart, or that does something else to values
            or to the MLP's input than what is written above.
        UsageError: An unknown way with biases.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> parts = Decomposition(Wiring(model), model.tokens("the capital of France is"))
        >>> zero = [torch.zeros_like(v[:1]) for v in parts.writes.values]
        >>> found = parts.follow([3], zero)  # all that the third head of the first layer writes
        >>> max(found.errors.values()) < 1e-4
        True
    """

    def __init__(
        self, wiring: Wiring, tokens: Tokens, *, biases: str = "shared", collapse: bool = False
    ) -> None:
        if biases not in ("shared", "rest"):
            raise UsageError("no such way with biases", given=biases, do="use 'shared' or 'rest'")
        self.wiring, self.model, self.graph = wiring, wiring.model, wiring.graph
        self.biases, self.collapse = biases, collapse
        self.readers = {(r.kind, r.layer): n for n, r in enumerate(self.graph.readers)}
        self._refuse()
        self.forms = {n: r.form(self.model, self.model.d_model or 0)
                      for n, r in enumerate(self.graph.readers)}  # fmt: skip
        self.mask = tokens.mask.to(self.model.device)
        self._record(tokens)
        self.mlps = {w.layer: self._mlp(w.layer) for w in self.graph.writers if w.kind == "mlp"}
        self._prove()

    # What is known before ------------------------------------------------------------------------

    def _refuse(self) -> None:
        for writer in self.graph.writers:
            known = writer.kind in ("input", "mlp") or (
                writer.kind == "heads" and ("v", writer.layer) in self.readers
            )
            if not known:
                raise _not_offered(writer.layer, "its mixer or mixture is not split into parts"
                                   " whose values can be made one by one")  # fmt: skip

    def _record(self, tokens: Tokens) -> None:
        """One run: streams where they are read, patterns, and all that is written."""
        taps = {n: _stream(r) for n, r in enumerate(self.graph.readers)}
        layers = [w.layer for w in self.graph.writers if w.kind == "heads"]
        main = self.model.main
        self._pattern_sites = {n: Site("pattern", n, stack=main) for n in layers}
        self._added = {n: Site("attn_out", n, stack=main) for n in layers}
        missing = [n for n, site in self._pattern_sites.items() if not self.model.offers(site)]
        if missing:
            raise _not_offered(missing[0], "its attention pattern cannot be read")
        written = [site for w in self.graph.writers for site in w.sites]
        sites = {*taps.values(), *self._pattern_sites.values(), *self._added.values(), *written}
        with torch.no_grad():
            logits, run = last_logits(self.model, tokens, record=sorted(sites, key=str))
        rows = len(tokens)
        self.writes = Writes([w.written(run) for w in self.graph.writers], logits)
        self.writes.values = [v.view(rows, -1, v.shape[-1]) for v in self.writes.values]
        self.streams = {n: run[site].view(rows, -1, run[site].shape[-1])
                        for n, site in taps.items()}  # fmt: skip
        self.patterns = {n: run[site] for n, site in self._pattern_sites.items()}
        self.scales = {
            n: form.scale(self.streams[n]).to(self.streams[n].dtype)
            for n, form in self.forms.items() if form is not None
        }  # fmt: skip
        self.whole, self.rest = dict[int, Tensor](), dict[int, Tensor]()
        for number, writer in enumerate(self.graph.writers):
            if writer.kind != "heads":
                continue
            added = run[self._added[writer.layer]].view(rows, -1, self.streams[0].shape[-1])
            self.whole[number] = self._summed(number)
            # What is added besides the heads (biases of the projection and of a norm): gamma's.
            self.rest[number] = added - self._through(number, self.writes.values[number]).sum(2)

    def _summed(self, number: int) -> Tensor:
        """The scale of a norm between heads and stream."""
        writer = self.graph.writers[number]
        whole = self.wiring.split(number, self.writes.values[number]).sum(2)
        if writer.norm is None:
            return torch.ones_like(whole[..., :1])
        bias = getattr(self.model.module.get_submodule(writer.o_proj), "bias", None)
        whole = whole if bias is None else whole + bias * writer.scale
        return writer.norm[1].scale(whole).to(whole.dtype)

    def _mlp(self, layer: int) -> _Mlp:
        block = self.model.anatomy.stacks[self.model.main].blocks[layer]
        modules = dict(self.model.module.named_modules())
        paths = [f"{block.path}.{n}" for n in NAMES["mlp"]]
        path = next((p for p in paths if p in modules), None)
        point = block.points["mlp_out"]
        if path is None or point.chunk is not None:
            raise _not_offered(layer, "its MLP is not one module")
        apart = not point.path.startswith(path)
        return _Mlp(modules[path], modules[point.path] if apart else None, point.scale)

    def _prove(self) -> None:
        """The recorded activations follow from the recorded streams by these rules."""
        for number, writer in enumerate(self.graph.writers):
            if writer.kind == "input":
                continue
            reader = self.readers["v" if writer.kind == "heads" else "mlp", writer.layer]
            stream = self.streams[reader][None]
            with torch.no_grad():
                zero, normed = self._normed(reader, (torch.zeros_like(stream), stream))
                if writer.kind == "heads":
                    made = self._mixed(number, reader, (zero, normed))[1]
                else:
                    made = self._run_mlp(writer.layer, normed)
            if self._error(made, self.writes.values[number]) > CLOSE.get(made.dtype, 0.3):
                raise _not_offered(
                    writer.layer, "what its values or its MLP make of the stream is not what the"
                    " rules of the decomposition make of it (a gate, a clip, a norm on values)",
                )  # fmt: skip

    def _error(self, made: Tensor, true: Tensor) -> float:
        size = true[self.mask].double().pow(2).mean().sqrt().clamp(min=1e-30)
        if made.shape[1:] != true.shape:
            return torch.inf
        worst = float((made - true).double()[:, self.mask].abs().max() / size)
        return torch.inf if worst != worst else worst

    # The steps -----------------------------------------------------------------------------------

    def _shared(self, parts: Parts, bias: Tensor | None) -> Parts:
        """Both parts with their share of a bias."""
        beta, gamma = parts
        if bias is not None:
            bias = bias.to(beta.dtype)
            if self.biases == "shared":
                size = beta.abs() + gamma.abs()
                share = torch.where(size > 0, beta.abs() / size, 0.0)
                beta, gamma = beta + bias * share, gamma + bias * (1 - share)
            else:
                gamma = gamma + bias
        return self._collapsed((beta, gamma))

    def _collapsed(self, parts: Parts) -> Parts:
        if not self.collapse:
            return parts
        beta, gamma = parts
        apart, first = beta * gamma < 0, beta.abs() >= gamma.abs()
        both = beta + gamma
        return (
            torch.where(apart, torch.where(first, both, 0.0), beta),
            torch.where(apart, torch.where(first, 0.0, both), gamma),
        )

    def _normed(self, reader: int, parts: Parts) -> Parts:
        form: NormForm | None = self.forms[reader]
        if form is None:
            return parts
        scale, gain = self.scales[reader], form.gain.to(parts[0].dtype)
        beta, gamma = (form.centre(part) / scale * gain for part in parts)
        return self._shared((beta, gamma), form.bias if bool(form.bias.any()) else None)

    def _mixed(self, number: int, reader: int, normed: Parts) -> Parts:
        """What heads take to the output projection: `[node, rows, pos, head*d_head]`."""
        writer, read = self.graph.writers[number], self.graph.readers[reader]
        weight, bias = self.wiring.columns(read)
        beta, gamma = (torch.einsum("nbpm,hmd->nbphd", part, weight) for part in normed)
        values = self._shared((beta, gamma), bias)
        pattern = self.patterns[writer.layer].to(weight.dtype)
        times = pattern.shape[1] // weight.shape[0]
        mixed = (
            torch.einsum("bhqk,nbkhd->nbqhd", pattern, part.repeat_interleave(times, 3)).flatten(-2)
            for part in values
        )
        beta, gamma = mixed
        return beta, gamma

    def _through(self, number: int, z: Tensor) -> Float[Tensor, "*rows pos head d_model"]:
        """What heads add to the stream, scale frozen; nothing but what is linear in z."""
        writer, weight = self.graph.writers[number], self.wiring.outputs[number]
        assert weight is not None
        each = torch.einsum("...hd,hdm->...hm", z.unflatten(-1, (len(weight), -1)), weight)
        if writer.norm is None:
            return each
        form = writer.norm[1]
        return form.centre(each) / self.whole[number][..., None, :] * form.gain.to(each.dtype)

    def _run_mlp(self, layer: int, normed: Tensor) -> Tensor:
        """Node by node: a mixture may want three axes."""
        return self.mlps[layer](normed.flatten(0, 1)).view(*normed.shape[:-1], -1)

    def _step(self, number: int, sums: Sequence[Parts], errors: dict[str, float]) -> Parts:
        """What a writer makes of the parts of the stream that it reads."""
        writer = self.graph.writers[number]
        reader = self.readers["v" if writer.kind == "heads" else "mlp", writer.layer]
        parts = sums[self.graph.before(reader)]
        name = f"{writer.kind}{writer.layer}"
        errors[f"{name}.stream"] = self._error(parts[0] + parts[1], self.streams[reader])
        normed = self._normed(reader, parts)
        if writer.kind == "mlp":
            whole = self._run_mlp(writer.layer, normed[0] + normed[1])
            gamma = self._run_mlp(writer.layer, normed[1])
            made = whole - gamma, gamma
            errors[f"{name}.out"] = self._error(whole, self.writes.values[number])
        else:
            mixed = self._mixed(number, reader, normed)
            errors[f"{name}.z"] = self._error(mixed[0] + mixed[1], self.writes.values[number])
            beta, gamma = (self._through(number, part).sum(-2) for part in mixed)
            made = beta, gamma + self.rest[number]
        return self._collapsed(made)

    # The walk ------------------------------------------------------------------------------------

    def delta(self, source: int, reference: Sequence[Tensor]) -> Float[Tensor, "rows pos d"]:
        """What a node writes more than in the reference, as the stream gets it."""
        number = next(n for n in range(len(self.graph.writers)) if source in self.graph.written(n))
        writer, place = self.graph.writers[number], source - self.graph.written(number).start
        change = self.writes.values[number] - reference[number].to(self.writes.values[number].dtype)
        return self._through(number, change)[..., place, :] if writer.kind == "heads" else change

    @torch.no_grad()
    def follow(
        self,
        sources: Sequence[int],
        reference: Sequence[Tensor],
        *,
        random: int | None = None,
    ) -> Followed:
        """Split the stream by each of some nodes and carry both parts to the end.

        Args:
            sources: Numbers of the nodes, all rows of one batch.
            reference: What each writer writes in the reference (as `Writes.values`; rows of 1 are
                repeated). A node's beta is what it writes beyond it.
            random: A control: each beta replaced by a random direction of equal norm, the same
                at every position, drawn with this seed and the node's number.
        """
        start = torch.stack([self.delta(source, reference) for source in sources])
        if random is not None:
            drawn = torch.stack([_direction(random, source, start) for source in sources])
            start = drawn * start.norm(dim=-1, keepdim=True)
        zero = torch.zeros_like(start)
        sums: list[Parts] = [(zero, zero)]
        errors: dict[str, float] = {}
        begun = False
        for number, writer in enumerate(self.graph.writers):
            if begun:
                beta, gamma = self._step(number, sums, errors)
            else:  # nothing has a beta yet: the whole is gamma, as it was recorded
                added = self.writes.values[number]
                if writer.kind == "heads":
                    added = self._through(number, added).sum(2) + self.rest[number]
                beta, gamma = zero, added.expand_as(zero)
            mine = [i for i, source in enumerate(sources) if source in self.graph.written(number)]
            if mine:
                begun = True
                own = torch.zeros_like(start)
                own[mine] = start[mine]
                beta, gamma = beta + own, gamma - own
            # Padding attends to anything, by kernel: nothing is followed there, lest it overflow.
            beta, gamma = (torch.where(self.mask[..., None], p, 0.0) for p in (beta, gamma))
            sums.append((sums[-1][0] + beta, sums[-1][1] + gamma))
            sums[: max(0, len(sums) - 3)] = [(zero, zero)] * max(0, len(sums) - 3)
        beta, gamma = sums[-1]
        last = len(self.graph.readers) - 1
        errors["logits.stream"] = self._error(beta + gamma, self.streams[last])
        return Followed(beta, gamma, errors)

    def nodes_per_pass(self) -> int:
        """How many nodes fit into `BUDGET` bytes."""
        return max(1, BUDGET // (self.streams[0].numel() * 4 * 24))

    def shares(
        self, part: Float[Tensor, "node rows pos d"], answers: Tensor, wrong: Tensor
    ) -> Float[Tensor, "node rows"]:
        """What a part of the final stream adds to the logit difference at the last token.

        The final norm's scale is that of the whole; its bias and a soft cap are left out.
        """
        final = len(self.graph.readers) - 1
        last = _last(self.mask)
        rows = torch.arange(len(last), device=part.device)
        ends = part[:, rows, last].double()
        form = self.forms[final]
        if form is not None:
            ends = form.linear(ends, form.scale(self.streams[final][rows, last]))
        head = Head(self.model)
        mean = [
            torch.stack([head.directions([i for i in row if i >= 0]).mean(0) for row in ids])
            for ids in (answers.tolist(), wrong.tolist())
        ]
        return torch.einsum("nbd,bd->nb", ends, mean[0] - mean[1]).detach().cpu()


def _last(mask: Tensor) -> Tensor:
    """Each row's last real column."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def _direction(seed: int, source: int, like: Tensor) -> Float[Tensor, "1 1 d"]:
    """A unit vector that depends on nothing but the seed and the node, not on the batch."""
    make = torch.Generator().manual_seed(1_000_003 * seed + source)
    drawn = torch.randn(1, 1, like.shape[-1], generator=make)
    return (drawn / drawn.norm()).to(like)


def _stream(reader: Reader) -> Site:
    """Where the stream passes before a reader's norm."""
    return Site("module_in", path=reader.norm) if reader.inside and reader.norm else reader.tap


def _not_offered(layer: int, why: str) -> NotOffered:
    return NotOffered(
        f"layer {layer} cannot be decomposed",
        why=why,
        do="use edge_attribution or path_patching, which need no such rules",
    )
