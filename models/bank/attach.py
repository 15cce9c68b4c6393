"""A memory bank on a pretrained language model of transformers, whose own weights stay as they are.

B sequences, as in `mneme.layers.bank.memory_bank`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mneme.layers.bank.bank_blocks import unit_width
from mneme.layers.bank.memory_bank import Bank, BankOptions, BankShape, MemoryBank
from mneme.models.bank.feed_forwards import common_width, decoder_layers, gated_feed_forwards
from mneme.models.bank.manifest import BankFiles, Manifest, model_hash, write_bank
from mneme.models.bank.stored import CACHE_BYTES, StoredBank
from mneme.models.bank.widening import (
    Widening,
    checkpoint_contexts,
    install_hooks,
    reading,
    require_checkpoints_read_blocks,
)
from mneme.storage.files import StorageError
from mneme.storage.reading import Read
from mneme.storage.record_file import Dtype

_PROMPTS = ("inputs", "input_ids", "inputs_embeds")  # how `generate` calls what it continues


class AttachedBank(nn.Module):
    """A language model whose gated feed-forwards are widened by the blocks of each sequence.

        y = down(act(gate x) * (up x)) + M3 (act(M1 x) * (M2 x))

    with the activation `act` of the model, called the base model. M1, M2 and M3 are the blocks on
    the way to the leaf of the sequence (`mneme.layers.bank.hierarchical_ffn`). This is how arXiv
    2510.02375 adds knowledge to open weights. A new bank changes no logit, as its M3 are zero.

    The base model keeps its class, its parameters and their names, and without a route it computes
    what it did before: blocks come in through hooks, for the calls below and inside of
    `routed`. What was fetched belongs to a call, not to a module. Threads and tasks do not see each
    other's, and a thread that is started inside of `routed` sees none.

    In training mode the bank replaces some routes by the generic block (`BankOptions`).

    Args:
        base_model: a language model of transformers.
        bank: of the kind "ffn", for this width and number of layers; moved to the model's device.
        layers: which layers of the decoder read it, from 0; None for all.
        freeze: gradients reach the bank only.

    Attributes:
        base_model: the model itself. Call it for what it does without the bank.
        bank: what is trained and saved. Give it, or all of this, to `mneme.models.make_optimizer`.
        layers: those that are widened, in the order of the bank's places.

    Raises:
        ValueError: the model has no such feed-forwards, or the bank does not fit them.
    """

    base_model: Any
    bank: Bank

    def __init__(
        self,
        base_model: nn.Module,
        bank: Bank,
        *,
        layers: Sequence[int] | None = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        found = gated_feed_forwards(base_model, layers)
        _require_fit(bank.shape, len(found), common_width(found))
        self.base_model, self.layers = base_model, tuple(found)
        self.bank = bank.to(self.base_model.device)
        self._frozen = [p for p in base_model.parameters() if p.requires_grad and freeze]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._key = object()
        self._hooks = install_hooks(self._key, found.values())

    @contextmanager
    def routed(self, route: Int[Tensor, " b"]) -> Iterator[None]:
        """Widens the base model, for calls on B sequences inside of the `with`.

        Args:
            route: a leaf for each sequence, or -1 for the generic block.

        Raises:
            ValueError: there is no such leaf, the bank was detached, or the base model recomputes
                activations without `enable_checkpointing`. A call of the base model raises it for
                another number of sequences.
        """
        with self._widened(route, repeats=False):
            yield

    def forward(self, *inputs: Any, route: Int[Tensor, " b"], **options: Any) -> Any:
        """What the base model returns for these arguments, its feed-forwards widened."""
        with self.routed(route):
            return self.base_model(*inputs, **options)

    @torch.no_grad()
    def generate(self, *inputs: Any, route: Int[Tensor, " b"], **options: Any) -> Any:
        """The base model's `generate`, widened: beams and samples share their prompt's blocks.

        Put the bank in eval mode first, or some prompts get the generic block.

        Raises:
            ValueError: the number of routes is not that of prompts.
        """
        prompts = [*inputs[:1], *(options.get(name) for name in _PROMPTS)]
        prompt = next((p for p in prompts if p is not None), None)
        if prompt is not None and len(prompt) != len(route):
            raise ValueError(f"{len(prompt)} prompts and {len(route)} routes: give one for each")
        with self._widened(route, repeats=True):
            return self.base_model.generate(*inputs, **options)

    def enable_checkpointing(self) -> None:
        """Recomputes activations in backward, to save memory, with the blocks of the forward pass.

        That is, while the base model is in training mode. Its own `activation_checkpointing_enable`
        would recompute after `routed` has ended, and therefore without blocks.
        """
        options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        self.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)

    def save(
        self, folder: Path, *, router: str | None = None, dtype: Dtype = "float32"
    ) -> Manifest:
        """Writes the bank, which names the base model by the hash of its weights as they are.

        Args:
            folder: see `write_bank`, as for its errors.
            router: hash of the router that gave the routes of training.
            dtype: of stored elements; that of the model is enough to serve it as it is now.

        Raises:
            ValueError: the bank is one that is read from files.
        """
        bank = self.bank
        if not isinstance(bank, MemoryBank):
            raise ValueError("blocks of this bank lie in files already; copy its folder instead")
        return write_bank(
            folder,
            bank.shape,
            bank.records,
            dtype=dtype,
            router=router,
            base_model=model_hash(self.base_model),
            facts={"layers": self.layers, "options": asdict(bank.options)},
        )

    def detach(self) -> nn.Module:
        """Takes the bank off again; returns the base model, as trainable as it was."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._hooks, self._frozen = [], []
        return self.base_model

    def extra_repr(self) -> str:
        """The widened layers, for `print`."""
        return f"layers={list(self.layers)}"

    def _widened(self, route: Tensor, *, repeats: bool) -> AbstractContextManager[None]:
        if not self._hooks:
            raise ValueError("this bank was detached from its model; attach it again")
        if self.base_model.training and torch.is_grad_enabled():
            require_checkpoints_read_blocks(decoder_layers(self.base_model))
        blocks = self.bank.fetch(route.to(self.bank.generic.device)).to(self.base_model.dtype)
        return reading(self._key, Widening(blocks.unbind(1), repeats))


def attach_bank(
    model: nn.Module,
    options: BankOptions,
    *,
    layers: Sequence[int] | None = None,
    freeze: bool = True,
) -> AttachedBank:
    """Attaches a new bank to a pretrained model.

    The bank is in float32 on the device of the model, so that small updates are not lost in a model
    of half precision; blocks are rounded to the model's dtype when they are fetched.

    Args:
        model: a language model of transformers with gated feed-forwards.
        options: of the bank; the kind must be "ffn".
        layers: which layers to widen, from 0; None for all. In arXiv 2510.02375 all of them and the
            last ones were equally good, and the first ones of little use.
        freeze: gradients reach the bank only; otherwise the model is trained too.

    Raises:
        ValueError: the model or the kind is another.
    """
    found = gated_feed_forwards(model, layers)
    d_model, k, hidden = common_width(found), options.branching, options.hidden
    width = unit_width("ffn", d_model, hidden=0)
    shape = BankShape(len(found), k, hidden, width, options.kind)
    _require_fit(shape, len(found), d_model)
    return AttachedBank(model, MemoryBank(shape, d_model, options), layers=layers, freeze=freeze)


def attach_saved(
    model: nn.Module, folder: Path, *, router: str | None = None, freeze: bool = True
) -> AttachedBank:
    """Attaches a bank that `AttachedBank.save` wrote, in memory, to be trained on.

    Args:
        model: with the weights that it had then.
        folder: of the bank.
        router: hash of the router that will give routes; None does not compare.
        freeze: as in `attach_bank`.

    Raises:
        StorageError: there is no such bank, it is damaged, or is of another model or router.
    """
    with BankFiles(folder, router=router, base_model=model_hash(model)) as files:
        manifest = files.manifest
        layers = _fact(manifest, "layers", folder)
        options = _fact(manifest, "options", folder)
        options = BankOptions(**{**options, "hidden": tuple(options["hidden"])})
        with torch.device("meta"):
            bank = MemoryBank(manifest.shape, manifest.shape.width // 3, options)
        bank.to_empty(device="cpu")
        for level in manifest.levels:
            for node in range(manifest.shape.nodes(level)):
                bank.write(level, node, files.read(level, node))
    return AttachedBank(model, bank, layers=layers, freeze=freeze)


def attach_stored(
    model: nn.Module,
    folder: Path,
    *,
    router: str | None = None,
    cache_bytes: int | Mapping[int, int] = CACHE_BYTES,
    read: Read = "auto",
) -> AttachedBank:
    """Attaches a bank that `AttachedBank.save` wrote, and leaves it on disk: for serving.

    Args:
        model: with the weights that it had then.
        folder: of the bank.
        router: hash of the router that will give routes; None does not compare.
        cache_bytes: see `StoredBank`.
        read: likewise.

    Raises:
        StorageError: as `attach_saved`.
    """
    bank = StoredBank(
        folder,
        router=router,
        base_model=model_hash(model),
        cache_bytes=cache_bytes,
        read=read,
    )
    attached = AttachedBank(model, bank, layers=_fact(bank.manifest, "layers", folder))
    bank.to(attached.base_model.dtype)
    return attached


def _require_fit(shape: BankShape, layers: int, d_model: int) -> None:
    if shape.kind != "ffn":
        raise ValueError(
            f'a bank that is attached to a model has the kind "ffn", not {shape.kind!r}'
        )
    width = unit_width("ffn", d_model, hidden=0)
    if (shape.places, shape.width) != (layers, width):
        raise ValueError(
            f"the bank has blocks of {shape.width} elements a unit for {shape.places} layers; "
            f"{layers} layers of width {d_model} need {width} elements a unit"
        )


def _fact(manifest: Manifest, name: str, folder: Path) -> Any:
    if name not in manifest.facts:
        raise StorageError(
            f"the bank in {folder} does not say its {name}, as one that AttachedBank.save wrote "
            "does; if it was merged, give merge_banks the facts of its parts"
        )
    return manifest.facts[name]
