"""Telemetry of a trained model along one text: which tokens surprised its memories.

T tokens, H heads.
"""

import codecs
import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

from mneme.harness.evaluate.surprise_page import Section, Token, page
from mneme.harness.run.run_directory import TaskMismatchError, write_atomically
from mneme.layers import recording
from mneme.models import LanguageModel
from mneme.tasks import Text
from mneme.tasks.base import IGNORE, EvalSplit, Task
from mneme.tasks.metrics import score

SURPRISE = "surprise"  # what a layer with a memory that learns at test time reports
CURVES = (SURPRISE, "forget", "memory_norm")  # drawn over position; the table has all reports

CORRELATED = "Pearson's r of surprise with the loss of the token itself (own) and of its target"

# Tokens a call: a memory's norm is known once a call. A multiple of all chunks that configs name.
PIECE = 64


@dataclass(frozen=True)
class Trace:
    """What happened along one sequence.

    Attributes:
        ids: `[T]`, the tokens read.
        bits: `[T]`, what the target at each position cost the model, NaN where there is none.
        own_bits: `[T]`, what each token had cost the model before it was read: `bits` of the
            position before it, where targets are the tokens that follow; otherwise all NaN.
        layers: name of a layer to name of a report to `[T, H]`.
    """

    ids: Tensor
    bits: Tensor
    own_bits: Tensor
    layers: dict[str, dict[str, Tensor]]

    def correlations(self) -> dict[str, dict[str, float]]:
        """By layer, Pearson's r of the surprise of tokens with the loss: see `CORRELATED`."""
        costs = {"own loss": self.own_bits, "target's loss": self.bits}
        return {
            layer: {name: _pearson(reports[SURPRISE].mean(-1), b) for name, b in costs.items()}
            for layer, reports in self.layers.items()
            if SURPRISE in reports
        }


def check_surprise(model: LanguageModel, precision: Precision, mixers: Sequence[str]) -> None:
    """Raises TaskMismatchError unless some layer of the model reports its surprise.

    Args:
        model: on any device.
        precision: the run's, `run_precision`.
        mixers: those that do, for the message.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.inference_mode(), precision.forward_context(), recording() as record:
        model(token)
    if not any(SURPRISE in reports for reports in record.by_layer(model).values()):
        raise TaskMismatchError(
            "telemetry: no layer of this model reports its surprise; those with a TestTimeMemory "
            f"do: train one with mixer={', '.join(mixers)}"
        )


def record_trace(
    model: LanguageModel, task: Task, *, precision: Precision, split: EvalSplit, count: int
) -> Trace:
    """Reads the first sequence of a split, with the state carried all along.

    Args:
        model: in eval mode, on the device to use.
        task: prepared, one that fits the model.
        precision: the run's, `run_precision`.
        split: which set.
        count: tokens to read. Where batches continue each other the sequence goes on through them;
            it may be shorter than asked for.
    """
    ids, targets, route = _first_sequence(task, split, count)
    device = next(model.parameters()).device
    bits = []
    with torch.inference_mode(), precision.forward_context():
        # not recorded: some memories read before the first token
        state = model.init_state(1, None if route is None else route.to(device))
        with recording() as record:
            for piece, wanted in zip(ids.split(PIECE), targets.split(PIECE), strict=True):
                logits, state, _ = model(piece[None].to(device), state)
                bits.append(_bits(logits, wanted[None].to(device)))
    reports = record.by_layer(model)
    layers = {
        layer: {name: value[0].flatten(1) for name, value in named.items()}
        for layer, named in reports.items()
    }
    cost = torch.cat(bits)
    return Trace(ids, cost, _own_bits(ids, targets, cost), layers)


def write_telemetry(folder: Path, trace: Trace, task: Task, title: str) -> list[Path]:
    """Writes telemetry.csv and surprise.html, and returns their paths."""
    tokens, correlations = tokens_of(task, trace.ids), trace.correlations()
    sections = [
        Section(
            title=layer,
            note=f"{CORRELATED}: {in_words(correlations[layer])}",
            values=reports[SURPRISE].mean(-1).tolist(),
            curves={name: reports[name].mean(-1).tolist() for name in CURVES if name in reports}
            | {"loss of the target (bits)": trace.bits.tolist()},
        )
        for layer, reports in trace.layers.items()
        if SURPRISE in reports
    ]
    folder.mkdir(parents=True, exist_ok=True)
    files = {"telemetry.csv": _table(trace, tokens), "surprise.html": page(title, tokens, sections)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def in_words(correlations: dict[str, float]) -> str:
    """Each correlation by name, without those that do not exist."""
    known = [f"{name} {r:.3f}" for name, r in correlations.items() if not math.isnan(r)]
    return ", ".join(known) or "none (fewer than three targets, or nothing varies)"


def tokens_of(task: Task, ids: Tensor) -> list[Token]:
    """The tokens as text where the task is text, as ids otherwise.

    A character of several tokens stands with the last of them, and the others show a dot; bytes
    that are no UTF-8 together show U+FFFD. Tokens that stand for no text show their ids.
    """
    if not isinstance(task, Text):
        return [Token(str(i), str(i)) for i in ids.tolist()]
    pieces = [task.tokenizer.pieces[i] for i in ids.tolist()]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = [decoder.decode(piece) for piece in pieces]
    return [
        Token(text or "·", _escaped(piece)) if piece else Token(f"⟨{i}⟩", f"⟨{i}⟩")
        for i, piece, text in zip(ids.tolist(), pieces, shown, strict=True)
    ]


def _escaped(piece: bytes) -> str:
    r"""A token's bytes on one line: printable characters, and `\n` or `\xc3` for the others."""
    text = piece.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _table(trace: Trace, tokens: Sequence[Token]) -> str:
    """One row per token: means over heads, then each head; empty where there is no value."""
    columns = {"bits": trace.bits, "own_bits": trace.own_bits} | dict(_columns(trace.layers))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["position", "id", "token", *columns])
    rows = zip(trace.ids.tolist(), tokens, *(c.tolist() for c in columns.values()), strict=True)
    for position, (token_id, token, *values) in enumerate(rows):
        numbers = ("" if math.isnan(value) else f"{value:.6g}" for value in values)
        writer.writerow([position, token_id, token.label, *numbers])
    return out.getvalue()


def _columns(layers: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for layer, reports in layers.items():
        for name, value in reports.items():
            yield f"{layer}/{name}", value.mean(-1)
        for name, value in reports.items():
            for head, column in enumerate(value.unbind(-1)):
                yield f"{layer}/{name}/head{head}", column


def _first_sequence(
    task: Task, split: EvalSplit, count: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids and targets, `[T]`, of the first row of the first batch and of those continuing it.

    And its route, `[1]`, where the task has routes.
    """
    rows: list[Tensor] = []
    held, route = 0, None
    for batch in task.eval_batches(split):
        route = batch.route[:1] if batch.route is not None and not rows else route
        rows.append(torch.stack([batch.inputs[0], batch.targets[0]]))
        held += batch.inputs.shape[1]
        if held >= count or not task.continues:
            break
    ids, targets = torch.cat(rows, 1)[:, :count]
    if task.continues:  # what follows the last target only pads the last batch
        end = int((targets != IGNORE).nonzero().max()) + 1
        ids, targets = ids[:end], targets[:end]
    return ids, targets, route


def _bits(logits: Tensor, targets: Tensor) -> Tensor:
    """What each target cost, `[T]`, NaN where there is none."""
    scores = score(logits, targets)
    bits = torch.full((targets.numel(),), torch.nan, dtype=torch.float64)
    bits[scores.where] = scores.nll / math.log(2)
    return bits


def _own_bits(ids: Tensor, targets: Tensor, bits: Tensor) -> Tensor:
    """Moves each cost to the token that was paid for, if targets are the tokens that follow."""
    wanted = targets[:-1]
    own = torch.full_like(bits, torch.nan)
    if bool(((wanted == ids[1:]) | (wanted == IGNORE)).all()):
        own[1:] = bits[:-1]
    return own


def _pearson(a: Tensor, b: Tensor) -> float:
    """Over the positions where both are known; NaN if there are fewer than three."""
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < 3:
        return math.nan
    return float(torch.corrcoef(torch.stack([a[both].double(), b[both].double()]))[0, 1])
