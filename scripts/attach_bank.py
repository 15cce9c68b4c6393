"""Trains a memory bank on a pretrained language model, whose own weights stay as they are.

The file of texts has one per line. Each is routed to a leaf of the router's tree, and trains the
blocks on the way there to predict its tokens. Every tenth text is held out: the losses printed at
the end are those of the held-out texts with the blocks of their routes, with the generic block, and
with the model alone. Needs requirements-hf.txt.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from mneme.harness.cli import number, report_errors, whole_number
from mneme.harness.run.run_directory import RunError
from mneme.layers.bank.memory_bank import GENERIC, BankOptions
from mneme.models import Cosine, make_optimizer
from mneme.models.bank.attach import AttachedBank, attach_bank
from mneme.routers import Router

HELD_OUT = 10  # one text of so many
UNITS = 64  # of a block of the first level; those below have a quarter of the units above, each
NO_TARGET = -100  # the label of padding
REPORTS = 10  # lines about training


class Example(NamedTuple):
    """A text.

    Attributes:
        tokens: two or more.
        route: its leaf.
    """

    tokens: list[int]
    route: int


class Losses(NamedTuple):
    """Of all tokens of some texts, in nats per token.

    Attributes:
        fetched: with the blocks of their routes.
        generic: with the generic block.
        base_model: of the model alone.
    """

    fetched: float
    generic: float
    base_model: float


def read_examples(path: Path, tokenizer: Any, router: Router, length: int) -> list[Example]:
    """The texts of a file, each with its route; those of one token have nothing to predict.

    Args:
        path: a text per line; empty lines do not count.
        tokenizer: of transformers.
        router: places whole texts.
        length: tokens at most; the rest of a text is cut off.

    Raises:
        RunError: there are less than two texts.
    """
    texts = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not texts:
        raise RunError(f"{path} has no texts; it needs one per line, and two or more")
    tokens = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    routes = router.route(texts).tolist()
    found = [Example(t, route) for t, route in zip(tokens, routes, strict=True) if len(t) > 1]
    if len(found) < 2:
        raise RunError(f"{path} has {len(found)} texts of two tokens or more; it needs two or more")
    return found


def train(
    attached: AttachedBank, examples: Sequence[Example], *, steps: int, lr: float, batch: int
) -> None:
    """Trains the bank by next-token loss, and prints how that falls.

    As in arXiv 2510.02375 the learning rate rises linearly and falls by half a cosine to a tenth.
    The base model stays in evaluation mode, without dropout.

    Args:
        attached: its base model is frozen.
        examples: in a new random order for each time that they are used up.
        steps: updates.
        lr: peak learning rate of Adam.
        batch: texts of a step.
    """
    optimizer = make_optimizer(attached.bank, partial(torch.optim.AdamW, lr=lr))
    schedule = LambdaLR(optimizer, partial(Cosine(floor=0.1), total=steps))
    attached.eval()
    attached.bank.train()
    for step, some in enumerate(itertools.islice(_forever(examples, batch), steps), start=1):
        inputs, labels, route = _collate(some, attached.base_model.device)
        nats, count = _nats(attached(**inputs, route=route).logits, labels)
        loss = nats / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // REPORTS) == 0:
            print(f"step {step:>6,} of {steps:,}: loss {loss.item():.4f}", flush=True)


def measure(attached: AttachedBank, examples: Sequence[Example], batch: int) -> Losses:
    """The losses of texts with and without the bank."""
    attached.eval()

    def loss(logits: Callable[..., Tensor]) -> float:
        total, count = 0.0, 0
        for start in range(0, len(examples), batch):
            some = examples[start : start + batch]
            inputs, labels, route = _collate(some, attached.base_model.device)
            with torch.no_grad():
                nats, targets = _nats(logits(inputs, route), labels)
            total, count = total + nats.item(), count + targets
        return total / count

    return Losses(
        fetched=loss(lambda inputs, route: attached(**inputs, route=route).logits),
        generic=loss(lambda inputs, route: attached(**inputs, route=route.fill_(GENERIC)).logits),
        base_model=loss(lambda inputs, route: attached.base_model(**inputs).logits),
    )


def run(arguments: Sequence[str]) -> Losses:
    """Trains a bank, saves it and prints the losses.

    Raises:
        RunError: a file or the model cannot be used, or options do not fit them.
    """
    options = _parser().parse_args(arguments)
    torch.manual_seed(options.seed)
    with _blamed():
        router = Router.load(options.router)
        bank = BankOptions(router.branching, _units(options.hidden, router.depth))
        model, tokenizer = _load(options.model)
        examples = read_examples(options.texts, tokenizer, router, options.length)
        attached = attach_bank(model, bank)
        options.out.mkdir(parents=True, exist_ok=True)  # not only after training
    print(attached.bank, flush=True)
    training = [e for i, e in enumerate(examples) if i % HELD_OUT]
    train(attached, training, steps=options.steps, lr=options.lr, batch=options.batch)
    with _blamed():
        attached.save(options.out, router=router.hash)
    held_out = examples[::HELD_OUT]
    losses = measure(attached, held_out, options.batch)
    print(f"saved to {options.out}. Loss of {len(held_out)} held-out texts, nats per token:")
    for name, value in losses._asdict().items():
        print(f"  {name:<8} {value:.4f}")
    return losses


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/attach_bank.py", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--texts", required=True, type=Path, metavar="FILE")
    parser.add_argument("--router", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="of the bank")
    units = f"units of each level, such as 64,16; default {UNITS}, then a quarter each"
    parser.add_argument("--hidden", type=_comma_separated, help=units)
    parser.add_argument("--steps", type=whole_number(1), default=1000)
    parser.add_argument(
        "--lr", type=number(0), default=1e-3, help="the paper has 1e-4 for long runs"
    )
    parser.add_argument("--batch", type=whole_number(1), default=16, help="texts of a step")
    parser.add_argument(
        "--length", type=whole_number(2), default=512, help="tokens of a text at most"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0)
    return parser


def _comma_separated(text: str) -> tuple[int, ...]:
    return tuple(map(whole_number(1), text.split(",")))


@contextmanager
def _blamed() -> Iterator[None]:
    """What is wrong with files and options, as an error that ends the program with one message."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error


def _units(given: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """Units of each level."""
    if given is None:
        return tuple(max(1, UNITS // 4**level) for level in range(depth))
    if len(given) != depth:
        raise ValueError(f"--hidden names {len(given)} levels, and the router's tree has {depth}")
    return given


def _load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer, on a GPU if there is one."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise RunError("this needs transformers: pip install -r requirements-hf.txt") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name)
    return model.to(device), AutoTokenizer.from_pretrained(name)


def _forever(examples: Sequence[Example], batch: int) -> Iterator[list[Example]]:
    """Batches without end, each example as often as any other."""
    orders = (torch.randperm(len(examples)).tolist() for _ in itertools.count())
    endless = (examples[i] for order in orders for i in order)
    while True:
        yield list(itertools.islice(endless, batch))


def _collate(
    examples: Sequence[Example], device: torch.device
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the model is given, padded after the end; labels `[B, T]`; routes `[B]`."""
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        mask[row, : len(example.tokens)] = 1
    labels = tokens.masked_fill(mask == 0, NO_TARGET)
    route = torch.tensor([example.route for example in examples])
    inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
    return inputs, labels.to(device), route.to(device)


def _nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The loss of all next tokens together, and their number."""
    scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    nats = F.cross_entropy(scores, targets, ignore_index=NO_TARGET, reduction="sum")
    return nats, int((targets != NO_TARGET).sum())


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
