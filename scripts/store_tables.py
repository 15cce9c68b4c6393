"""Stores the tables of a trained run in few bits, and measures what that loses and saves.

RUN/tables/8bit and RUN/tables/4bit each get a file per table and the rest of the model: all that
serving it needs. Each form, and fp32 in memory, is evaluated in a process of its own. With
--verify, the files that are there are read once and compared with what was written.
"""

import argparse
import gc
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mneme.harness.cli import number, report_errors
from mneme.harness.config.build import build
from mneme.harness.config.schema import check_config
from mneme.harness.evaluate.evaluation import Evaluation, check_fit, evaluate, restore_model
from mneme.harness.run.checkpoints import (
    AtomicCheckpointIO,
    checkpoint_config,
    checkpoint_vocabulary,
    read_checkpoint,
)
from mneme.harness.run.precision import run_precision
from mneme.harness.run.run_directory import RunDirectory, RunError, find_run
from mneme.harness.run.training import build_model
from mneme.layers.sparse.stored_table import RowReads, StoredTable, replace_tables, store_tables
from mneme.layers.sparse.table import Table
from mneme.models import LanguageModel
from mneme.storage.files import StorageError
from mneme.storage.quantized_rows import TableFile
from mneme.tasks.base import EvalSplit, Task
from scripts.benchmarks.peak import resident
from scripts.reporting.measured import measured, publish

MODEL = "model.ckpt"  # beside the tables: the rest of the model, and the checksum of each table
CHECKSUMS = "table_checksums"  # in it, by the name of the file
MIB = 2**20


@dataclass(frozen=True)
class ServingCosts:
    """What a process that served a model has measured.

    Attributes:
        evaluation: on the task of the run.
        table_bytes: of its tables, in memory or in files.
        reads: of stored tables, all together; none of tables in memory.
        before: MiB of its resident memory by kind, the libraries loaded and no model.
        after: the same, evaluation done and the model still there.
    """

    evaluation: Evaluation
    table_bytes: int
    reads: RowReads
    before: dict[str, float]
    after: dict[str, float]


def export(run: RunDirectory, checkpoint: Path, bits: int) -> Path:
    """Writes a folder that serves a checkpoint's model from stored tables.

    The model is written last, and that of an earlier export deleted first, so that a folder with a
    model has all of its tables.

    Raises:
        RunError: the model has no table, or one that is not finite.
    """
    folder = _folder(run, bits)
    (folder / MODEL).unlink(missing_ok=True)
    read = read_checkpoint(checkpoint)
    config = checkpoint_config(read)
    check_config(config)
    model = restore_model(config, read)
    try:
        files = store_tables(model, folder, bits=bits)
    except ValueError as error:
        raise RunError(f"{checkpoint}: {error}") from error
    weights = model.state_dict()
    for name in files:
        del weights[f"{name}.weight"]
    kept = {k: v for k, v in read.items() if k not in ("state_dict", "optimizer_states")}
    kept |= {"weights": dict(weights), "buffers": dict(model.named_buffers())}
    kept[CHECKSUMS] = {file.name: TableFile(file).checksum for file in files.values()}
    AtomicCheckpointIO().save_checkpoint(kept, folder / MODEL)
    return folder


def damages(folder: Path) -> list[str]:
    """Reads all tables of an exported folder and says what is wrong, a line per file.

    Raises:
        RunError: the folder has no model.
    """
    checksums = _checksums(read_checkpoint(folder / MODEL))
    found = []
    for name in sorted({*checksums, *(file.name for file in folder.glob("*.table"))}):
        try:
            table = TableFile(folder / name)
            _check_own(table, checksums)
            table.verify()
        except StorageError as error:
            found.append(str(error))
    return found


def _folder(run: RunDirectory, bits: int) -> Path:
    return run.path / "tables" / f"{bits}bit"


def _checksums(model: Mapping[str, Any]) -> dict[str, int]:
    return dict(model.get(CHECKSUMS, {}))  # an older export has none: it must be made again


def _check_own(table: TableFile, checksums: Mapping[str, int]) -> None:
    """Raises StorageError for a table of the same shape that is another model's."""
    if checksums.get(table.path.name) != table.checksum:
        raise StorageError(
            f"{table.path} is not the table that was stored with {MODEL}; store both again"
        )


def served_model(folder: Path, *, cache_bytes: int) -> LanguageModel:
    """The model of an exported folder, ready to evaluate; its tables are never in memory.

    It is built without memory, gets its tables from their files, and then all else from its own.

    Raises:
        RunError: the folder has no model.
        StorageError: a table's file cannot be used, or was not stored with this model.
    """
    read = read_checkpoint(folder / MODEL)
    config = checkpoint_config(read)
    task = build(config["task"])
    with torch.device("meta"):
        model = build_model(config, task)
    for table in replace_tables(model, folder, cache_bytes=cache_bytes).values():
        _check_own(table.file, _checksums(read))
    model.load_state_dict(read["weights"], assign=True)
    for name, value in read["buffers"].items():  # also those that a state_dict leaves out
        owner, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(owner), buffer, value)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval()


def measure(where: Path, *, split: EvalSplit, cache_bytes: int) -> ServingCosts:
    """Serves and evaluates a model in this process.

    Args:
        where: an exported folder, or a checkpoint for fp32 tables in memory.
        split: of the run's task.
        cache_bytes: for all stored tables together.
    """
    before = _memory()
    stored = where.is_dir()
    read = read_checkpoint(where / MODEL if stored else where)
    config, vocabulary = checkpoint_config(read), checkpoint_vocabulary(read)
    model = served_model(where, cache_bytes=cache_bytes) if stored else restore_model(config, read)
    del read
    task: Task = build(config["task"])
    task.prepare_data()
    check_fit(vocabulary, model, task)
    evaluation = evaluate(model, task, precision=run_precision(config), split=split)
    gc.collect()
    after = _memory()
    return ServingCosts(evaluation, _table_bytes(model), _reads(model), before, after)


def _table_bytes(model: LanguageModel) -> int:
    stored = {m.file.path: m.file.layout.file_bytes for m in _stored(model)}
    held = [m.weight.nbytes for m in model.modules() if isinstance(m, Table)]
    return sum(stored.values()) + sum(held)


def _reads(model: LanguageModel) -> RowReads:
    total = RowReads()
    for table in _stored(model):
        for name, value in vars(table.reads).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def _stored(model: LanguageModel) -> list[StoredTable]:
    return [module for module in model.modules() if isinstance(module, StoredTable)]


def _memory() -> dict[str, float]:
    """MiB of this process's memory: `RssAnon`, its own, and `RssFile`, which mapped files fill."""
    return {kind: resident(kind) for kind in ("RssAnon", "RssFile")}


def run(arguments: Sequence[str]) -> None:
    """Exports, measures, and prints the table or puts it into a file; or verifies.

    Raises:
        RunError: no run there, or one without tables, or with damaged ones.
    """
    options = _parser().parse_args(arguments)
    directory, file = find_run(options.run)
    if options.verify:
        _verify([f for bits in options.bits if (f := _folder(directory, bits)).exists()], directory)
        return
    checkpoint = file or directory.best
    forms = {"fp32 in memory": checkpoint}
    for bits in options.bits:
        forms[f"{bits} bits in a file"] = export(directory, checkpoint, bits)
    served = {
        name: _in_a_process(where, options.split, int(options.cache_mb * MIB))
        for name, where in forms.items()
    }
    config = checkpoint_config(read_checkpoint(checkpoint))
    task: Task = build(config["task"])
    report = measured(
        _rows(served, task, options.split), _remarks(served, options), [config["seed"]]
    )
    publish(report, options)


def _verify(folders: Sequence[Path], directory: RunDirectory) -> None:
    """Prints which folders are as they were written, and raises RunError for what is not."""
    if not folders:
        raise RunError(f"{directory.path} has no stored tables of these bits; store them first")
    found = []
    for folder in folders:
        wrong = damages(folder)
        found += wrong
        if not wrong:
            print(f"{folder}: as written")
    if found:
        raise RunError("\n".join(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/store_tables.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument("--bits", type=int, nargs="+", choices=[8, 4], default=[8, 4])
    parser.add_argument(
        "--verify", action="store_true", help="only read the files that are there, and compare"
    )
    parser.add_argument(
        "--cache-mb",
        type=number(0),
        default=16,
        help="MiB for the rows of all tables that were read",
    )
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("--name", default="stored", help="of the table, in the file's markers")
    return parser


def _in_a_process(where: Path, split: EvalSplit, cache_bytes: int) -> ServingCosts:
    """`measure` in a new process, whose memory nothing else has used."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, where, split=split, cache_bytes=cache_bytes).result()


def _rows(served: Mapping[str, ServingCosts], task: Task, split: str) -> list[dict[str, str]]:
    sign = {"max": 1.0, "min": -1.0}[task.monitor_mode]
    exact, *_ = served.values()

    def lost(form: ServingCosts, metric: str, better: float) -> str:
        change = exact.evaluation.metrics[metric] - form.evaluation.metrics[metric]
        return "" if form is exact else f"{better * change:+.4f}"

    directions = {"loss": -1.0, task.monitor: sign}
    rows = []
    for name, form in served.items():
        metrics, reads = form.evaluation.metrics, form.reads
        quality = {}
        for metric, better in directions.items():
            quality[f"{metric} ({split})"] = f"{metrics[metric]:.4f}"
            quality[f"lost in {metric}"] = lost(form, metric, better)
        rows.append(
            {
                "tables": name,
                **quality,
                "MiB of tables": f"{form.table_bytes / MIB:.2f}",
                "tokens/s": f"{form.evaluation.tokens_per_second:,.0f}",
                "rows read/s": f"{reads.rows / reads.seconds:,.0f}" if reads.rows else "",
                "from the cache": f"{reads.cached / reads.rows:.1%}" if reads.rows else "",
                "RssAnon, MiB": f"{form.after['RssAnon']:.0f}",
                "RssFile, MiB": f"{form.after['RssFile']:.0f}",
            }
        )
    return rows


def _remarks(served: Mapping[str, ServingCosts], options: argparse.Namespace) -> list[str]:
    befores = [form.before for form in served.values()]
    anonymous, mapped = (max(b[kind] for b in befores) for kind in ("RssAnon", "RssFile"))
    return [
        "Lost: against fp32, above 0 where it is worse.",
        "Rows read: distinct ones of a call, by the time that looking them up, reading and "
        f"decoding them took; caches of {options.cache_mb:g} MiB, at first empty. Files had just "
        "been written, so that the system had them in memory still.",
        "RssAnon and RssFile: resident memory of a process that has served the evaluation, its own "
        "and that of mapped files, which the system takes back when it needs to; before the model "
        f"they were at most {anonymous:.0f} and {mapped:.0f} MiB.",
    ]


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
