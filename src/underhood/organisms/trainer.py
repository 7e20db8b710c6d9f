"""The one trainer of all organisms: seeded, resumable, and it writes the folder and the card."""

import logging
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from underhood.core.errors import FileProblem, OutOfRange
from underhood.organisms import PUNCTUATION, Organism, Row, organism
from underhood.organisms.card import PROMPTS, Card, measure

_log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
# Steps between checkpoints and log lines.
_EVERY = 200
# Rows up to this many words are padded together; longer ones form a second group.
_SHORT = 24
# Fraction of the peak learning rate that the cosine ends at.
_FLOOR = 0.02


def train(
    name: str,
    *,
    out: Path,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> Card:
    """Train an organism, measure it on held-out prompts, and write its folder and card.

    A run that was stopped goes on from `out/checkpoint.pt` and ends with the same weights as one
    that was not. Cost: `town` takes some ten minutes on one free CPU core.

    Args:
        name: The organism.
        out: Folder to write; made when missing.
        steps: Optimizer steps; by default the recipe's.
        seed: Seeds the weights and the rows.
        resume: Continue from a checkpoint when there is one; otherwise start afresh.
        progress: Show a bar on stderr, if that is a terminal.

    Raises:
        ModelNotFound: no such organism.
        FileProblem: the checkpoint belongs to another recipe, seed or number of steps.
    """
    run = Run(organism(name), out=out, steps=steps, seed=seed, resume=resume)
    run.advance(progress=progress)
    return run.finish()


class Run:
    """One training run.

    Everything random is drawn from (seed, step), and the checkpoint holds both, so it need not
    hold the state of a generator: step n draws the same whether or not the run was interrupted.
    """

    def __init__(
        self,
        what: Organism,
        *,
        out: Path,
        steps: int | None = None,
        seed: int = 0,
        resume: bool = True,
    ) -> None:
        self.organism = what
        self.out = Path(out)
        self.steps = what.recipe.steps if steps is None else steps
        if self.steps < 1:
            raise OutOfRange("Training needs a step.", given=self.steps, do="Use steps >= 1.")
        self.seed, self.step, self.seconds = seed, 0, 0.0
        self.ids = {word: i for i, word in enumerate(what.words)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = build_model(what)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), weight_decay=what.recipe.decay
        )
        self.out.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        """Where the unfinished run is kept."""
        return self.out / CHECKPOINT

    def advance(self, until: int | None = None, *, progress: bool = False) -> None:
        """Train up to step `until` (default: all of them).

        A checkpoint is kept at the end and every 200 steps; not on Ctrl-C, which may come in the
        middle of a step, when some weights have moved and others have not.
        """
        last = self.steps if until is None else min(until, self.steps)
        shown = progress and sys.stderr.isatty()
        self.model.train()
        with _bar() if shown else nullcontext() as bar:
            if bar is not None:
                bar.add_task(self.organism.name, total=self.steps, loss="")
            while self.step < last:
                loss = self._one()
                if self.step % _EVERY == 0:
                    self.save()
                    _log.info("step %d loss %.3f %.0f s", self.step, loss, self.seconds)
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=self.step, loss=f"{loss:.3f}")
        self.save()

    def finish(self, prompts: int = PROMPTS) -> Card:
        """Write the Hugging Face folder, and the card measured on so many prompts per task.

        Removes the checkpoint.
        """
        from underhood.core.loading import no_bars

        tokenizer = build_tokenizer(self.organism)
        self.model.eval()
        with no_bars():
            self.model.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        for path in self.out.glob("*.safetensors"):
            # It is written for its owner only, and would be packaged so.
            path.chmod(0o644)
        what = self.organism
        card = Card(
            name=what.name,
            summary=what.summary,
            parameters=sum(p.numel() for p in self.model.parameters()),
            architecture=_architecture(self.model),
            recipe=asdict(what.recipe) | {"steps": self.steps, "seed": self.seed},
            seconds=round(self.seconds, 1),
            tasks=measure(what, self.model, tokenizer, n=prompts),
            limits=list(what.limits),
        )
        card.save(self.out)
        self.checkpoint.unlink(missing_ok=True)
        return Card.load(self.out)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "what": self._identity(),
                "step": self.step,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        try:
            kept: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
            same = kept["what"] == self._identity()
        except Exception as error:  # torch raises many kinds for a damaged file
            raise FileProblem(
                "The checkpoint cannot be read.",
                given=self.checkpoint,
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                do="Delete it, or train with resume=False.",
            ) from error
        if not same:
            raise FileProblem(
                "The checkpoint is of another run.",
                given=self.checkpoint,
                why="its organism, recipe, seed or number of steps differ from what was asked.",
                do="Use the same arguments, another folder, or resume=False.",
            )
        self.step, self.seconds = kept["step"], kept["seconds"]
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])

    def _identity(self) -> str:
        what = self.organism
        return repr((what.name, what.words, what.recipe, self.steps, self.seed))

    def _one(self) -> float:
        """One optimizer step; returns the weighted mean loss in nats."""
        start = time.perf_counter()
        # The same draws whether or not the run was interrupted.
        rng = Random(f"{self.seed}:{self.step}")
        phase = self.organism.phase(self.step, self.steps)
        rows = [self.organism.row(task, rng) for task, count in phase.rows for _ in range(count)]
        short = [row for row in rows if len(row.words) <= _SHORT]
        long = [row for row in rows if len(row.words) > _SHORT]
        weight = sum(sum(row.weights[1:]) for row in rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad()
        total = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(32))
            for group in (short, long):
                if group:
                    loss = self._loss(group) / weight
                    loss.backward()
                    total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - start
        return total

    def _loss(self, rows: list[Row]) -> torch.Tensor:
        """Weighted sum of the losses of predicting each word, in nats."""
        # Padding on the right needs no mask: attention is causal, and padding has weight 0.
        width = max(len(row.words) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        weights = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            ids[i, : len(row.words)] = torch.tensor([self.ids[word] for word in row.words])
            weights[i, : len(row.words)] = torch.tensor(row.weights)
        logits = self.model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        return (losses * weights[:, 1:]).sum()

    def _rate(self) -> float:
        """Learning rate: linear warm-up, a cosine that goes down slowly, linear cool-down."""
        recipe = self.organism.recipe
        warm = min(1.0, (self.step + 1) / recipe.warmup)
        curve = 0.5 * (1 + math.cos(math.pi * self.step / (recipe.stretch * self.steps)))
        cool = min(1.0, (self.steps - self.step) / (recipe.cooldown * self.steps))
        return recipe.lr * warm * cool * (_FLOOR + (1 - _FLOOR) * curve)


def build_model(what: Organism) -> LlamaForCausalLM:
    """An untrained model of the organism's size (float32), from torch's global generator."""
    recipe = what.recipe
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(what.words),
            hidden_size=recipe.width,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=False,
            pad_token_id=what.words.index("<pad>"),
            bos_token_id=what.words.index("<bos>"),
            eos_token_id=what.words.index("<eos>"),
        )
    )


def build_tokenizer(what: Organism) -> PreTrainedTokenizerFast:
    """The word-level tokenizer: `<bos>` first, punctuation apart, digits in twos."""
    vocab = {word: i for i, word in enumerate(what.words)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    marks = "".join(PUNCTUATION)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(f"[{marks}]"), "isolated"),
            # "1732" is the two words "17 32".
            pre_tokenizers.Split(Regex("[0-9]{2}"), "isolated"),
        ]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    # Not for its "##": this decoder is the one that puts spaces between words, none before marks.
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=what.recipe.context,
        model_input_names=["input_ids", "attention_mask"],
    )


def _architecture(model: LlamaForCausalLM) -> dict[str, Any]:
    """The configuration's numbers that say what the model is."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    keys += ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
    return {"class": type(model).__name__} | {key: getattr(model.config, key) for key in keys}


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
