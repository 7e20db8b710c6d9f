"""A model, as it is.

`Model` wraps a Hugging Face or plain PyTorch module without copying its weights or reimplementing
its forward. It answers three questions: what sites are there (`sites`, `resolve`), what happens in
a pass (`run`, `generate`), and what happens when something is changed (`edits=`, `edited`). When
you let go of it, the module is what it was.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.core.discovery import find_anatomy
from underhood.core.edit import Edit, Fired, Plan, as_plan, check_keys, check_width
from underhood.core.errors import (
    NotFinite,
    NotOffered,
    OutOfRange,
    PaddingError,
    PlanError,
    UsageError,
)
from underhood.core.offers import Sites
from underhood.core.provenance import describe, fingerprint
from underhood.core.run import Generation, Run
from underhood.core.shown import Shown
from underhood.core.site import Site, parse_many
from underhood.core.taps import Read, Session
from underhood.core.taps.modules import first_tensor
from underhood.core.taps.patches import evaluating
from underhood.core.tokenizer import Text
from underhood.core.tokens import Tokens, Where

__all__ = ["Inputs", "Model"]

# Families whose recurrence does not look at the attention mask.
READS_PADDING = ("Rwkv", "RecurrentGemma", "xLSTM")

Sited = str | Site | Sequence[str | Site]
Inputs = str | Sequence[str] | Tensor | Tokens | Mapping[str, Any]


class Model(Shown):
    """A model with addresses.

    Args:
        module: The torch module; it is not copied.
        tokenizer: Its tokenizer, if it reads text.
        name: What to call it in reports.
        pad_id: Padding token, when the tokenizer has none.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> run = model.run("The capital of France is", record=["resid_post"])
        >>> run["resid_post", 1].ndim
        3
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any = None, *, name: str = "", pad_id: int | None = None
    ) -> None:
        self.module = module
        self.config = getattr(module, "config", None)
        self.name = name or type(module).__name__
        self.anatomy = find_anatomy(module)
        text = getattr(self.config, "text_config", None) or self.config
        self.text = Text(tokenizer, pad_id=pad_id, context=_context(text))
        latent = getattr(text, "kv_lora_rank", None) is not None
        paths = frozenset(n for n, _ in module.named_modules())
        self.known = Sites(self.anatomy, paths, latent)

    def __repr__(self) -> str:
        shape = f", {self.n_layers} layers" if self.anatomy.stacks else ""
        return f"Model({self.name}: {type(self.module).__name__}{shape})"

    # What it is ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None."""
        return self.text.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies (inputs go there)."""
        return next(self.module.parameters(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the first floating parameter."""
        floats = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    @property
    def main(self) -> str:
        """Prefix of the stack that predicts tokens ("dec" in encoder-decoder models)."""
        stacks = self.anatomy.stacks
        return (
            "" if "" in stacks or not stacks else ("dec" if "dec" in stacks else next(iter(stacks)))
        )

    @property
    def n_layers(self) -> int:
        """Blocks of the main stack (0 for plain modules)."""
        stack = self.anatomy.stacks.get(self.main)
        return len(stack.blocks) if stack else 0

    @property
    def n_heads(self) -> int:
        """Query heads of the main stack's attention (0 without attention)."""
        stack = self.anatomy.stacks.get(self.main)
        blocks = stack.blocks if stack else ()
        return max((b.attention.heads or 0 for b in blocks if b.attention), default=0)

    @cached_property
    def d_model(self) -> int | None:
        """Width of the main residual stream, where the config or the embedding tells."""
        config = getattr(self.config, "text_config", None) or self.config
        return getattr(config, "hidden_size", None) or getattr(config, "d_model", None)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the weights."""
        return fingerprint(self.module)

    @cached_property
    def forward_names(self) -> frozenset[str]:
        """Arguments that the module's forward knows by name, such as `logits_to_keep`."""
        return frozenset(inspect.signature(self.module.forward).parameters)

    def identity(self) -> dict[str, Any]:
        """What a plan file remembers of the model that it was made for."""
        return {
            "name": self.name,
            "class": type(self.module).__name__,
            "layers": self.n_layers,
            "heads": self.n_heads,
            "d_model": self.d_model,
        }

    # Text ----------------------------------------------------------------------------------------

    def tokens(self, prompts: str | Sequence[str], *, padding: str = "right") -> Tokens:
        """Prompts as a padded batch of ids."""
        return self.text.batch(prompts, padding=padding)

    def token_id(self, text: str) -> int:
        """The id of a one-token text (`AnswerError` otherwise)."""
        return self.text.token_id(text)

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return self.text.token_text(token)

    # Sites ---------------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        """Every named site that the model offers (any `module:PATH` besides)."""
        return self.known.all()

    def offers(self, site: str | Site) -> bool:
        """Whether a site can be read here."""
        try:
            return bool(self.resolve(site))
        except (UsageError, NotOffered):
            return False

    def resolve(self, sites: Sited) -> list[Site]:
        """Concrete sites for a request; `*` in a name stands for every offered name that fits.

        Raises:
            SiteNotFound, OutOfRange, NotOffered: See `core.offers`.
        """
        found: list[Site] = []
        for entry in [sites] if isinstance(sites, (str, Site)) else sites:
            if isinstance(entry, str) and "*" in entry and ":" not in entry:
                found += self._expand(entry)
                continue
            if isinstance(entry, str) and entry.endswith("mlp.hook_pre"):
                entry = self._pre_activation(entry)
            for site in parse_many(entry):
                found += self.known.resolve(site)
                self._check_unit(site)
        return list(dict.fromkeys(found))

    def _pre_activation(self, name: str) -> Site:
        """What enters the nonlinearity (`hook_pre` to TransformerLens): the gate, if any."""
        site = self.known.resolve(Site.parse(name))[0]
        gate = Site("mlp_gate", site.layer, stack=site.stack)
        return gate if self.known.why_not(gate) is None else site

    def _expand(self, pattern: str) -> list[Site]:
        from fnmatch import fnmatchcase

        hits = [s for s in self.sites() if fnmatchcase(str(s), pattern) or
                fnmatchcase(".".join(p for p in (s.stack, s.name) if p), pattern)]  # fmt: skip
        if not hits:
            raise OutOfRange(
                f"no site of this model fits {pattern!r}",
                given=pattern,
                do="see model.sites()",
            )
        return hits

    def _check_unit(self, site: Site) -> None:
        size = self.size(site, site.kind.unit) if site.unit is not None else None
        if size is not None and site.unit is not None and site.unit >= size:
            raise OutOfRange(
                f"this model has no {site.kind.unit} {site.unit} there",
                given=str(site),
                why=f"{site.whole} has {size}",
                do=f"use 0 to {size - 1}",
            )

    def size(self, site: Site, axis: str | None) -> int | None:
        """Length of one of a site's axes, where it is known without running the model."""
        if site.path or axis is None or site.stack not in self.anatomy.stacks:
            return None
        if site.name == "logits":
            return getattr(self.config, "vocab_size", None) if axis == "vocab" else None
        if not site.kind.layered:
            return self.d_model if site.stack == self.main and axis == "d_model" else None
        block = self.anatomy.stacks[site.stack].blocks[site.layer or 0]
        attention = block.cross if site.name.startswith("cross_") else block.attention
        if axis == "head" and attention is not None:
            key_side = site.name.removeprefix("cross_") in ("k", "v", "k_rot")
            return attention.kv_heads if key_side else attention.heads
        if axis == "expert" and block.experts is not None:
            return block.experts.count
        if axis == "neuron" and site.name == "mlp_post" and "mlp_post" in block.points:
            module = self.module.get_submodule(block.points["mlp_post"].path)
            return getattr(module, "in_features", None)
        return self.d_model if axis == "d_model" and site.stack == self.main else None

    # Running -------------------------------------------------------------------------------------

    def plan(
        self,
        edits: Plan | Edit | Iterable[Edit] | None,
        *,
        lengths: Sequence[int] | None,
        generating: bool,
    ) -> Plan:
        """Edits made concrete for this model, or a refusal before anything runs.

        Args:
            edits: The edits.
            lengths: Prompt tokens of each row; None when the batch is not known yet.
            generating: Whether tokens will be generated.
        """
        given = as_plan(edits)
        if given.model is not None:
            self._check_origin(given)
        concrete: list[Edit] = []
        for edit in given:
            edit.where.validate(lengths=lengths, generating=generating)
            if not generating:
                check_keys(edit, lengths)
            sites = self.resolve(edit.site)
            if edit.gate is not None:
                self.resolve(edit.gate.site)
            for site in sites:
                # One unit of the last axis (a neuron) has no width of its own.
                last = site.kind.axes[-1]
                single = site.unit is not None and site.kind.unit == last
                check_width(edit, None if single else self.size(site, last))
                concrete.append(edit if site == edit.site else edit.at(site))
        return Plan(concrete)

    def _check_origin(self, plan: Plan) -> None:
        mine, theirs = self.identity(), plan.model or {}
        for key in ("class", "layers", "heads", "d_model"):
            if key in theirs and theirs[key] != mine[key]:
                raise PlanError(
                    f"the plan was made for another model ({theirs.get('name')})",
                    given=f"{key} {theirs[key]!r}",
                    why=f"this model has {key} {mine[key]!r}",
                    do="make the plan for this model, or load the one it was made for",
                )

    def reads(
        self,
        record: Sited,
        *,
        at: Where | int | Sequence[int] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Read]:
        """Recordings made concrete for this model."""
        where = at if isinstance(at, Where) else Where(at)
        place = torch.device(device) if device is not None else None
        sites = self.resolve(record) if record else []
        return [Read(site, where, place, dtype) for site in sites]

    def batch(
        self, inputs: Inputs, *, padding: str = "right"
    ) -> tuple[Tokens | None, dict[str, Any]]:
        """Whatever a caller passes, as the arguments of the module's forward."""
        if isinstance(inputs, Mapping):
            return self._mapping(inputs)
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            return None, {"": inputs.to(self.device)}
        if self.main == "dec":
            raise UsageError(
                "an encoder-decoder model reads two sequences, and one was given",
                given=repr(inputs)[:80],
                do="pass {'input_ids': ids, 'decoder_input_ids': ids}; to generate, call"
                " model.module.generate inside `with model.edited(...)`",
            )
        if isinstance(inputs, Tensor):
            tokens = self.text.of_ids(inputs, None)
        elif isinstance(inputs, Tokens):
            tokens = inputs
        else:
            tokens = self.tokens(inputs, padding=padding)
        self._check_padding(self.text.checked(tokens, vocabulary=self._vocabulary))
        tokens = tokens.to(self.device)
        given: dict[str, Any] = {"input_ids": tokens.ids}
        if not bool(tokens.mask.all()):
            given["attention_mask"] = tokens.mask.long()
            # Absolute positions are not derived from the mask by every family.
            if any(tokens.starts) and "position_ids" in self.forward_names:
                given["position_ids"] = tokens.position_ids + self._first_position
        return tokens, given

    def _check_padding(self, tokens: Tokens) -> None:
        """Some recurrent families read left padding as text; that would be silently wrong."""
        if any(tokens.starts) and type(self.module).__name__.startswith(READS_PADDING):
            raise PaddingError(
                "this family cannot take padding on the left",
                given=f"{len(tokens)} prompts of lengths {tokens.lengths[:8]}",
                why="its recurrence ignores the attention mask and would read padding as text",
                do="run prompts of one length together, or one by one",
            )

    def _mapping(self, inputs: Mapping[str, Any]) -> tuple[Tokens | None, dict[str, Any]]:
        given = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        names = ("decoder_input_ids", "input_ids") if self.main == "dec" else ("input_ids",)
        ids = next((given[n] for n in names if n in given), None)
        mask = given.get("decoder_attention_mask" if self.main == "dec" else "attention_mask")
        tokens = self.text.of_ids(ids, mask) if ids is not None else None
        if tokens is not None:
            self._check_padding(self.text.checked(tokens, vocabulary=self._vocabulary))
        starts = tokens is not None and any(tokens.starts)
        if starts and tokens is not None and "position_ids" not in given:
            if "position_ids" in self.forward_names and self.main == "":
                given["position_ids"] = tokens.position_ids + self._first_position
        return tokens, given

    @cached_property
    def _vocabulary(self) -> int | None:
        """Rows of the token embedding, where there is one."""
        point = self.anatomy.stacks[self.main].points.get("embed") if self.anatomy.stacks else None
        module = self.module.get_submodule(point.path) if point else None
        return getattr(module, "num_embeddings", None)

    @cached_property
    def _first_position(self) -> int:
        """Number of the first position: RoBERTa starts after its padding index."""
        for name, module in self.module.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return 0 if module.padding_idx is None else module.padding_idx + 1
        return 0

    def run(
        self,
        inputs: Inputs,
        *,
        record: Sited = (),
        edits: Plan | Edit | Iterable[Edit] | None = None,
        at: Where | int | Sequence[int] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        grad: bool = False,
        padding: str = "right",
    ) -> Run:
        """One forward pass.

        Args:
            inputs: Text, several texts, ids `[batch, pos]`, a float tensor for plain modules, or
                the forward's keyword arguments.
            record: Sites to keep; a name without a layer means every layer, `*` is a wildcard.
            edits: What to change, in order.
            at: Positions to keep, counted in each row's own tokens (-1: its last token).
            device: Where to keep recordings; default where they arise.
            dtype: Precision of recordings; default as they arise.
            grad: Keep the autograd graph (recordings stay attached).
            padding: Side of the padding for prompts of different length.

        Raises:
            UsageError: A request that cannot be met, before the forward.
            NotOffered: A site that this model lacks, before the forward.
            EditNeverFired: An edit that acted nowhere.
            NotFinite: Logits that are not numbers; the first bad recording is named.

        Cost: one forward; recording all residuals adds under 3 percent.
        """
        tokens, given = self.batch(inputs, padding=padding)
        reads = self.reads(record, at=at, device=device, dtype=dtype)
        lengths = tokens.lengths if tokens is not None else None
        for read in reads:
            read.where.validate(lengths=lengths, generating=False)
        plan = self.plan(edits, lengths=lengths, generating=False)
        session = Session(self.module, self.anatomy, plan, reads, grad=grad)
        with evaluating(self.module), torch.set_grad_enabled(grad), session:
            output = self._forward(given)
        recorded, fired = session.recordings(), session.close_report()
        self._check_finite(output, recorded)
        return Run(tokens, output, recorded, fired, describe(self), self.text)

    def _forward(self, given: dict[str, Any]) -> Any:
        if "" in given:
            return self.module(given[""])
        if "use_cache" in self.forward_names and "use_cache" not in given:
            given = given | {"use_cache": False}
        return self.module(**given)

    def _check_finite(self, output: Any, recorded: dict[Read, Tensor]) -> None:
        logits = getattr(output, "logits", None)
        final = logits if isinstance(logits, Tensor) else first_tensor(output)
        if final is None or not final.is_floating_point():
            return
        # A stream that is not finite makes all its logits so: some columns of every position and
        # all of the last one tell, at a hundredth of the cost of all. Sums may overflow: then ask.
        seen = final.detach()
        total = seen[..., :64].sum(dtype=torch.float32)
        if seen.ndim == 3:
            total = total + seen[:, -1].sum(dtype=torch.float32)
        if bool(torch.isfinite(total)) or bool(torch.isfinite(final).all()):
            return
        bad = next(
            (r.site for r, v in recorded.items()
             if not r.site.name.endswith("scores") and not bool(torch.isfinite(v).all())), None,
        )  # fmt: skip
        raise NotFinite(
            "the model's output is not finite",
            given=f"{int((~torch.isfinite(final)).sum())} of {final.numel()} values",
            why=f"the first recorded site that is not finite is {bad}"
            if bad
            else "an edit is too strong, a weight is not a number, or the precision is too low",
            do="check the edits' strength and the precision; record resid_post to find the layer",
        )

    @contextmanager
    def edited(self, *edits: Edit | Plan) -> Iterator[list[Fired]]:
        """Edits for code that calls the Hugging Face model itself.

        Yields the report, which is complete when the block ends. Cached generation inside the block
        counts generated positions; a forward that starts without a cache is a new prompt.

        Raises:
            EditNeverFired: At the end, when an edit acted nowhere.
        """
        flat = [e for item in edits for e in (item if isinstance(item, Plan) else [item])]
        plan = self.plan(flat, lengths=None, generating=True)
        session = Session(self.module, self.anatomy, plan)
        with session:
            yield session.fired
        session.close_report()

    def generate(
        self,
        prompts: str | Sequence[str] | Tensor | Tokens,
        *,
        max_new_tokens: int = 20,
        edits: Plan | Edit | Iterable[Edit] | None = None,
        record: Sited = (),
        at: Where | int | Sequence[int] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Generation:
        """Generate text; greedy and without penalties unless `options` say otherwise.

        Args:
            prompts: Text, several texts, or ids.
            max_new_tokens: How many tokens to write at most.
            edits: What to change; `Where(phase=...)` and `steps` choose prompt or generation. An
                edit in the prompt persists through the cache.
            record: Sites to keep, over prompt and generated positions.
            at: Positions to keep.
            seed: Seed for sampling; leaves the global generator as it was.
            options: Anything that transformers' `generate` takes.

        Raises:
            UsageError: Beam search or guessing ahead together with edits or recordings.
            PromptTooLong: Prompt and new tokens together exceed the context.
            NotFinite: Logits that are not numbers.
        """
        from underhood.core.generate import generate

        reads = self.reads(record, at=at)
        return generate(
            self, prompts, max_new_tokens, edits=edits, reads=reads, seed=seed, options=options
        )

    # Reading the head ----------------------------------------------------------------------------

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Final norm and head applied to residual vectors, as the model applies them.

        The model's own modules run; a scale or soft cap between head and logits is applied too.

        Raises:
            NotOffered: The model has no unembedding.
        """
        from underhood.core.head import Head

        return Head(self).logits(resid)

    def sigma(self, site: str | Site, prompts: Inputs) -> float:
        """The site's standard deviation over prompts: the length that strength 1 sigma means.

        Root of the mean squared distance from the mean vector, over all real positions after the
        first (the first token's activation is often hundreds of times longer).

        Cost: one forward.
        """
        place = self.resolve(site)[0]
        run = self.run(prompts, record=place)
        value = run[place].float()
        if run.tokens is not None and value.ndim >= 3:
            keep = run.tokens.mask.clone()
            for row, start in enumerate(run.tokens.starts):
                keep[row, start] = False
            value = value[keep] if bool(keep.any()) else value.flatten(0, 1)
        flat = value.flatten(0, -2)
        return float((flat - flat.mean(0)).pow(2).sum(-1).mean().sqrt())

    def strength(self, edit: Edit, prompts: Inputs, *, kl: float) -> float:
        """The strength at which an edit moves the next token by so many nats (`core.budget`)."""
        from underhood.core.budget import strength

        return strength(self, edit, prompts, kl)

    def check(self, inputs: Inputs | None = None) -> Any:
        """Prove that every site means what its name says in this model (`core.check`)."""
        from underhood.core.check import check

        return check(self, inputs)


def _context(config: Any) -> int | None:
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
