"""What is done with a trained bank: prompts are answered from disk, blocks are deleted."""

import io
import json
import shutil

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

import mneme
from mneme.harness.cli import report_errors
from mneme.harness.config.build import build
from mneme.harness.evaluate.evaluation import evaluate, restore_model
from mneme.harness.evaluate.serving import answer, load
from mneme.harness.run.checkpoints import checkpoint_config, read_checkpoint
from mneme.harness.run.run_directory import RunDirectory, RunError
from mneme.layers import GENERIC, BankShape
from mneme.models import generate
from mneme.models.bank import StoredBank
from scripts import delete_blocks, serve_bank
from tests.harness.test_banks import BANK, train
from tests.scripts.test_report import table

# Two objects, so that answers are one of them soon and differ by block.
OPTIONS = (
    *BANK,
    "task.library.objects=2",
    "optimizer.lr=0.03",
    "trainer.max_steps=40",
    "trainer.val_check_interval=40",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunDirectory:
    return train(tmp_path_factory.mktemp("runs") / "run", *OPTIONS)


@pytest.fixture(scope="module")
def asked(trained) -> tuple[list[str], list[int]]:
    """Questions about two facts of different leaves, and the leaves."""
    task = build(trained.read_config()["task"])
    batch = next(iter(task.eval_batches("val")))
    other = int((batch.route != batch.route[0]).nonzero()[0])
    prompts = [task.tokenizer.decode(batch.inputs[i].tolist()) for i in (0, other)]
    return prompts, batch.route[[0, other]].tolist()


def in_memory(run: RunDirectory):
    return restore_model(run.read_config(), read_checkpoint(run.last))


def serve(run: RunDirectory, *options: str) -> None:
    """As a program: a mistake of the user ends it with 2."""
    with report_errors():
        serve_bank.run([str(run.path), "--read", "pread", *options])


# Serving


def test_a_loaded_run_says_the_same(trained, asked):
    served = load(trained, trained.last, trained.bank, cache_bytes=2**20, read="pread")
    run, (prompts, leaves) = mneme.load(trained.path, checkpoint="last"), asked
    for prompt, leaf in zip(prompts, leaves, strict=True):
        given = answer(served, prompt, route=leaf, tokens=5, temperature=0)
        assert run.generate(prompt, 5, temperature=0) == f" {given.text}"
        given = answer(served, prompt, route=GENERIC, tokens=5, temperature=0)
        assert run.generate(prompt, 5, temperature=0, route=GENERIC) == f" {given.text}"
    with pytest.raises(RunError, match="did you mean"):
        run.generate(prompts[0][:-1])
    with pytest.raises(RunError, match="the bank has leaves 0 to 3"):
        run.generate(prompts[0], route=4)
    served.bank.close()


def test_answers_are_those_of_the_model_in_memory(trained, asked):
    served = load(trained, trained.last, trained.bank, cache_bytes=2**20, read="pread")
    model, (prompts, leaves) = in_memory(trained), asked
    assert served.router.route(prompts).tolist() == leaves
    for prompt in prompts:
        for route in (*leaves, GENERIC):
            given = answer(served, prompt, route=route, tokens=5, temperature=0)
            ids = torch.from_numpy(served.words.encode(prompt))[None]
            with torch.inference_mode():
                state = model.init_state(1, torch.tensor([route]))
                assert torch.equal(
                    served.model(ids, served.model.init_state(1, torch.tensor([route]))).y,
                    model(ids, state).y,
                )
            new, _ = generate(model, ids, 5, temperature=0, state=state)
            assert given.text == served.words.decode(new[0].tolist())


def test_no_block_is_in_memory(trained):
    served = load(trained, trained.last, trained.bank, cache_bytes=0, read="pread")
    tensors = dict(served.model.named_parameters()) | dict(served.model.named_buffers())
    assert not any(tensor.is_meta for tensor in tensors.values())
    assert [name for name in tensors if name.startswith("bank.")] == ["bank.generic"]
    expected = in_memory(trained)
    expected.bank = None
    assert sum(p.numel() for p in served.model.parameters()) == sum(
        p.numel() for p in expected.parameters()
    )


def test_it_is_said_what_was_read_and_what_it_took(trained, asked, capsys, monkeypatch):
    (first, second), leaves = asked
    closed, close = [], StoredBank.close
    monkeypatch.setattr(StoredBank, "close", lambda bank: closed.append(close(bank)))
    serve(trained, first, second, first, "--compare", "--tokens", "2")
    assert len(closed) == 1
    said = capsys.readouterr().out.splitlines()
    prompts = [line for line in said if line in (first, second)]
    assert prompts == [first, second, first]
    costs = [line.strip() for line in said if line.startswith("    ")]
    assert costs[0].startswith(f"route {leaves[0]}, path {leaves[0] // 2} > {leaves[0]}, cold (2 ")
    assert costs[2].startswith(f"route {leaves[1]}, path {leaves[1] // 2} > {leaves[1]}, cold (")
    assert costs[4].startswith(f"route {leaves[0]}, path {leaves[0] // 2} > {leaves[0]}, warm; ")
    assert all(cost.startswith("generic block; fetch ") for cost in costs[1::2])
    assert all("prefill" in cost and "tokens/s" in cost for cost in costs)
    read = 4 - (leaves[0] // 2 == leaves[1] // 2)
    assert said[-1].startswith(f"6 answers; {(6 - read) / 6:.0%} of blocks from the cache, ")
    assert "MiB of resident memory" in said[-1]


def test_prompts_are_lines_and_routes_may_be_given(trained, asked, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked[0][0]}\n\n{asked[0][1]}\n"))
    serve(trained, "--route", "3", "--cache-mib", "0", "--tokens", "1")
    costs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert [cost.split(";")[0].strip() for cost in costs] == [
        "route 3, path 1 > 3, cold (2 of 2 blocks read)"
    ] * 2
    assert not any("tokens/s" in cost for cost in costs), "the first word is part of the prefill"


def stop(run: RunDirectory, capsys, *options: str) -> str:
    """What is said of a mistake."""
    with pytest.raises(SystemExit) as stopped:
        serve(run, *options)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["the craft of nobody is"], "word 4 of the text, 'nobody', is none of the 223 known"),
        ([" "], "a prompt is empty"),
        (["the", "--route", "4"], "--route 4: the bank has leaves 0 to 3; or generic"),
        (["--bank", "nowhere", "the"], "there is no memory bank in nowhere"),
    ],
)
def test_a_mistake_is_one_line(trained, capsys, options, message):
    assert message in stop(trained, capsys, *options)


@pytest.fixture
def changed(trained, tmp_path) -> RunDirectory:
    """The run, to be changed."""
    return RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))


def test_a_bank_of_another_base_model_is_refused(changed, capsys):
    checkpoint = read_checkpoint(changed.last)
    checkpoint["state_dict"]["model.norm.weight"][0] += 1
    torch.save(checkpoint, changed.last)
    assert "use the weights of that base model" in stop(changed, capsys, "the")


def test_a_bank_of_another_router_is_refused(changed, capsys):
    task = {**changed.read_config()["task"], "seed": 5}
    build(task).routing.router.save(changed.router)
    assert "route with that router" in stop(changed, capsys, "the")


def test_a_run_without_a_router_needs_a_route(changed, capsys):
    shutil.rmtree(changed.router)
    assert "the run kept no router" in stop(changed, capsys, "the")
    serve(changed, "the", "--route", "generic")
    assert "generic block; fetch" in capsys.readouterr().out


def test_a_run_without_words_is_refused(changed, capsys):
    (changed.path / "words.txt").write_text("the\nother\n")
    assert "are not those that the model was trained on" in stop(changed, capsys, "the")
    (changed.path / "words.txt").unlink()
    assert "only runs of tasks with words" in stop(changed, capsys, "the")


# Deletion


def test_deleting_a_block_costs_those_that_read_it_alone(trained):
    model, task = in_memory(trained), build(trained.read_config()["task"])
    with torch.no_grad():
        for level in (1, 2):  # so that every block has a say
            model.bank.get_parameter(f"level{level}").mul_(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = evaluate(model, task, precision=Precision(), split="val").metrics["accuracy"]
    found = delete_blocks.measure(model, task, precision=Precision(), leaves=2, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for deletion, levels in zip(found, ([2], [1, 2]) * 2, strict=True):
        leaf, others = deletion.leaf, 80 - deletion.facts
        assert deletion.levels == levels
        for level in levels:
            model.bank.write(level, leaf if level == 2 else leaf // 2, torch.zeros(1, 4, 48))
        after = evaluate(model, task, precision=Precision(), split="val").metrics["accuracy"]
        model.load_state_dict(before)
        for i, expected in enumerate((whole, after)):
            right = deletion.own[i] * deletion.facts + deletion.others[i] * others
            assert right / 80 == pytest.approx(expected)
        assert deletion.others[0] == deletion.others[1] or len(levels) == 2
    assert any(deletion.own[0] != deletion.own[1] for deletion in found)


def test_leaves_are_drawn_from_those_of_most_facts():
    route = torch.tensor([0] * 5 + [1] * 2 + [2] * 7 + [-1] * 9)
    shape = BankShape(1, 2, (1, 1), 6)
    drawn = [tuple(delete_blocks.choose(route, shape, 1, seed)) for seed in range(20)]
    assert set(drawn) == {(0,), (2,)}
    assert drawn == [tuple(delete_blocks.choose(route, shape, 1, seed)) for seed in range(20)]
    assert sorted(delete_blocks.choose(route, shape, 9, 0)) == [0, 2]


def test_deletions_are_printed_and_published(trained, tmp_path, capsys):
    out = tmp_path / "page.md"
    delete_blocks.run([str(trained.path), "--leaves", "1", "--out", str(out), "--name", "gone"])
    printed = capsys.readouterr().out
    rows = table(printed)
    assert [row["deleted levels"] for row in rows] == ["2", "1, 2"]
    assert len({row["facts that read them"] for row in rows}) == 1
    assert "<!-- report: gone -->" in out.read_text()


def test_a_run_without_routes_has_nothing_to_delete(changed):
    checkpoint = read_checkpoint(changed.last)
    config = checkpoint_config(checkpoint)
    config["task"]["routes"] = "none"
    checkpoint["mneme"]["config"] = json.dumps(config)
    torch.save(checkpoint, changed.last)
    with pytest.raises(RunError, match="needs a run of task=rare_facts with routes"):
        delete_blocks.run([str(changed.path)])
