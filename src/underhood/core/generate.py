"""Generation with taps on: transformers' own loop, with the count of positions kept right.

The loop, its cache and its sampling are transformers'; what is added is the frame that says where
the prompt ends, the session that records and edits, and a watch for logits that are not numbers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.errors import NotFinite, NotOffered, UsageError
from underhood.core.provenance import describe
from underhood.core.run import Generation, Run
from underhood.core.taps import Read, Session
from underhood.core.taps.patches import evaluating
from underhood.core.tokens import Frame, Tokens

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["generate"]


def generate(
    model: "Model",
    prompts: str | Sequence[str] | Tensor | Tokens,
    max_new_tokens: int,
    *,
    edits: Plan | Edit | Iterable[Edit] | None,
    reads: list[Read],
    seed: int | None,
    options: dict[str, Any],
) -> Generation:
    """What `Model.generate` does; see there."""
    if not hasattr(model.module, "generate"):
        raise NotOffered("this model cannot generate", given=repr(model), do="use run")
    if edits or reads:
        _check_strategy(options)
    tokens, _ = model.batch(prompts, padding="left")
    assert tokens is not None
    model.text.room(tokens, max_new_tokens)
    if len(tokens) > 1 and type(model.module).__name__.startswith("Rwkv"):
        raise NotOffered(
            "this family generates one prompt at a time",
            given=f"{len(tokens)} prompts",
            why="its cached step mixes rows in transformers",
            do="generate in a loop",
        )
    plan = model.plan(edits, lengths=tokens.lengths, generating=True)
    columns = tokens.ids.shape[1]
    frame = Frame(len(tokens), columns, prompt=columns)
    if not bool(tokens.mask.all()):
        frame.offsets = torch.tensor(tokens.starts, device=model.device)
        frame.lengths = tokens.mask.sum(1)
    session = Session(model.module, model.anatomy, plan, reads, prompt=frame)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
    with evaluating(model.module), torch.no_grad(), _seeded(seed), session:
        out = _call(model, tokens, settings)
    recorded, fired = session.recordings(), session.close_report()
    new = out[:, columns:]
    run = Run(tokens, None, recorded, fired, describe(model, options=_plain(settings)))
    strings = [model.text.strings(row.tolist()) for row in new]
    texts = [model.text.decode(r.tolist()) for r in new] if model.tokenizer is not None else []
    return Generation(texts, new, strings, run)


def _call(model: "Model", tokens: Tokens, settings: dict[str, Any]) -> Tensor:
    module: Any = model.module
    if not settings["do_sample"]:  # sampling settings of the model's own file would only warn
        settings = {"temperature": None, "top_p": None, "top_k": None} | settings
    if model.text.pad_id is not None:
        settings = {"pad_token_id": model.text.pad_id} | settings
    elif getattr(module.generation_config, "pad_token_id", None) is None:
        settings = {"pad_token_id": _first(module.generation_config.eos_token_id)} | settings
    watch = _Finite()
    settings["logits_processor"] = [*(settings.get("logits_processor") or ()), watch]
    try:
        out = module.generate(input_ids=tokens.ids, attention_mask=tokens.mask.long(), **settings)
    except RuntimeError as error:  # sampling from logits that are not numbers
        watch.need(error)
        raise
    watch.need()
    return out if isinstance(out, Tensor) else out.sequences


def _check_strategy(options: Mapping[str, Any]) -> None:
    """Refuse ways of generating that reorder rows or take tokens back.

    Raises:
        UsageError: Such an option is given.
    """
    strategies = {
        "num_beams": "beam search reorders rows while it runs",
        "prompt_lookup_num_tokens": "tokens that were guessed ahead are taken back",
        "assistant_model": "tokens that were guessed ahead are taken back",
        "assistant_early_exit": "tokens that were guessed ahead are taken back",
        "custom_generate": "a loop of its own may feed tokens in any order",
    }
    for name, why in strategies.items():
        if options.get(name) not in (None, 1, False):
            raise UsageError(
                "edits and recordings cannot follow this way of generating",
                given=f"{name}={_short(options[name])}",
                why=f"{why}, so positions cannot be counted",
                do="generate greedily or by sampling",
            )


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__


class _Finite:
    """A logits processor that only looks; the flag is read once, at the end."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        # Processors forbid tokens with -inf; the largest logit must be a number.
        bad = ~torch.isfinite(scores.amax(-1)).all()
        self.bad = bad if self.bad is None else self.bad | bad
        return scores

    def need(self, cause: Exception | None = None) -> None:
        """Raise where a logit was not a number.

        Raises:
            NotFinite: Some step's logits were NaN or infinite.
        """
        if self.bad is not None and bool(self.bad):
            raise NotFinite(
                "the model's logits were not finite while it generated",
                given="NaN or infinite logits in some step",
                why="an edit is too strong, a weight is not a number, or the precision is too low",
                do="run the prompt with record=['resid_post'] to find the layer",
            ) from cause


def _first(value: Any) -> int | None:
    return value[0] if isinstance(value, (list, tuple)) else value


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
