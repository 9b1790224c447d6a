"""Sessions survive: the same bits after a restore, whole files or none, and what is refused."""

from __future__ import annotations

import collections
import errno
import itertools
import json
import os
import random
import signal
import time

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.models import load_model
from vicostream_kernels.pipeline import saving as saving_module
from vicostream_kernels.pipeline.block_facts import BlockFacts, to_columns
from vicostream_kernels.pipeline.engine import StreamEngine
from vicostream_kernels.pipeline.errors import InputError, PipelineError
from vicostream_kernels.pipeline.report import SCHEMA_FILE
from vicostream_kernels.pipeline.snapshot import Snapshot, SnapshotError

jsonschema = pytest.importorskip("jsonschema")

#: Each keeps state of another kind: the step before, keys per layer and pages, bounds of keys, a
#: running mean, a scorer's mean, the ViT's reference, sinks that move, tiers.
PRESETS = {
    "vicostream": {"prune__threshold": 0.9, "retrieve__k": 3, "engine__window_chunks": 2},
    "livevlm": {"attention__window": 60, "retrieve__ratio": 0.2},
    "rekv": {"attention__window": 60, "retrieve__k": 2},
    "quest": {"retrieve__token_budget": 64, "retrieve__dense_layers": 1},
    "lserve": {"retrieve__token_budget": 64},
    "stc": {"engine__window_chunks": 2},
    "stc-pruner-as-released": {"engine__window_chunks": 2},
    "streaming-llm": {"attention__window": 50},
    "tiers": {"retrieve__k": 3, "engine__window_chunks": 2, "engine__history_bytes": 3 * 2**19},
}


def engine(preset, **more):
    changes = PRESETS[preset] | more
    return small_engine("vicostream" if preset == "tiers" else preset, **changes)


def go_on(stream):
    """Answers and tokens of what follows: a question, more video, questions now and then."""
    texts = ["".join(stream.ask("What happened?"))]
    stream.ingest(pictures(31, start=8))
    answers = [stream.ask("And now?"), stream.ask("What was first?", 6.0)]
    texts += ["".join(answer) for answer in answers]
    return texts, [a.figures.blocks for a in answers], stream.recorder.tokens_kept, stream.time_s


@pytest.mark.parametrize("preset", PRESETS)
def test_what_follows_a_restore_has_the_same_bits(preset, tmp_path):
    path = tmp_path / "session.safetensors"
    frames = 203 if preset == "tiers" else 43
    with engine(preset) as made, made.open(fps=2) as stream:
        for start in range(0, frames, 40):
            stream.ingest(pictures(40)[: min(40, frames - start)])
        said = "".join(stream.ask("What is there?"))
        open_answer = stream.ask("Still open?")
        stream.save(path)
        expected = go_on(stream)
        open_answer.close()
        held = [stream.history.cache.contents(b).clone() for b in stream.history.cache.chunks]
    with engine(preset) as made, made.restore(path) as stream:
        report = stream.report()
        assert [q["answer"] for q in report["questions"]][:1] == [said]
        assert report["frames"]["read"] == frames
        jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(
            json.loads(json.dumps(report))
        )
        assert go_on(stream) == expected
        blocks = list(stream.history.cache.chunks)
        assert len(blocks) == len(held)
        for block, contents in zip(blocks, held):
            assert torch.equal(stream.history.cache.contents(block), contents)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_session_fits_smaller_budgets_and_what_was_forgotten_stays_so(tmp_path):
    path = tmp_path / "s"
    with engine("vicostream") as made, made.open(fps=2) as stream:
        for _ in range(4):
            stream.ingest(pictures(40))
        stream.history.cache.evict(stream.history.cache.chunks[0])
        stream.save(path)
        expected = go_on(stream)
    budgets = {"engine__history_bytes": 2**20, "engine__max_new_tokens": 8}
    with engine("vicostream", **budgets) as made, made.restore(path) as stream:
        assert {b.tier for b in stream.history.cache.chunks} == {"memory", "disk"}
        assert go_on(stream) == expected
        assert stream.report()["forgotten"]["spans"] == [[0.0, 3.5]]


def test_what_a_restore_has_no_room_for_joins_what_was_forgotten(tmp_path):
    with engine("tiers") as made, made.open(fps=2) as stream:
        for _ in range(4):
            stream.ingest(pictures(40))
        stream.history.cache.evict(stream.history.cache.chunks[5])
        stream.save(tmp_path / "s")
    budgets = {"engine__history_bytes": 2**20, "engine__disk_bytes": 2**17}
    with engine("tiers", **budgets) as made, made.restore(tmp_path / "s") as stream:
        forgotten, first = stream.report()["forgotten"], stream.history.cache.chunks[0]
        assert forgotten["chunks"] == first._number > 6
        assert forgotten["spans"] == [[0.0, first.start_s - 0.5]]


def test_a_session_before_the_first_frame_can_be_saved(tmp_path):
    with engine("vicostream") as made, made.open(fps=2) as stream:
        stream.save(tmp_path / "s")
        expected = go_on(stream)
    with engine("vicostream") as made, made.restore(tmp_path / "s") as stream:
        assert go_on(stream) == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "s"
    with engine("vicostream") as made, made.open(fps=2) as stream:
        stream.ingest(pictures(20))
        stream.save(path)
    return path


def refused(path, match, **changes):
    with engine("vicostream", **changes) as made:
        with pytest.raises(SnapshotError, match=match):
            made.restore(path)
        assert made.cache.streams == [] and made.cache.used_pages == 0


def test_one_weight_and_what_is_no_weight_tell_models_apart(monkeypatch):
    with engine("vicostream") as made:
        runner, identity = made.runner, made.identity()
    weight = next(w for w in runner.model.parameters() if w.numel() > 100).data.view(-1)
    before = weight[1].clone()
    try:
        weight[1] += 1
        with engine("vicostream") as made:
            assert made.identity()["weights"] != identity["weights"]
    finally:
        weight[1] = before
    config = runner.model.config
    for owner, name, value in (
        (config.vision_config, "tokens_per_second", 99),
        (config.vision_config, "window_size", 56),
        (config.text_config, "num_attention_heads", 99),
        (runner, "image_mean", (0.1, 0.2, 0.3)),
        (runner.tokenizer, "chat_template", "other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with engine("vicostream") as made:
                assert made.identity()["settings"] != identity["settings"], name
    with engine("vicostream") as made:
        assert made.identity() == identity


def test_a_lost_block_is_forgotten_by_a_save_where_that_is_allowed(tmp_path):
    spill = {"engine__spill_dir": str(tmp_path), "engine__allow_missing": True}
    with engine("tiers", **spill) as made, made.open(fps=2) as stream:
        for _ in range(5):
            stream.ingest(pictures(40))
        made.cache.settle()
        min(tmp_path.rglob("*.safetensors")).unlink()
        stream.save(tmp_path / "s")
        assert "0-3.5 s" in stream.report()["errors"][0]["what"]
    with Snapshot(tmp_path / "s") as kept:
        assert kept.state["forgotten"]["chunks"] == 1
        assert "0-3.5 s" in kept.state["recorder"]["errors"][0]["what"]


def test_every_flipped_byte_and_every_cut_is_found(saved, tmp_path):
    whole, path = saved.read_bytes(), tmp_path / "s"
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(5)
    places = [0, 3, 8, 9, header - 1, header, len(whole) - 32, len(whole) - 1]
    places += [draw.randrange(header) for _ in range(40)]
    places += [draw.randrange(len(whole)) for _ in range(20)]
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match="cannot be restored"):
            Snapshot(path)
    for cut in (0, 7, 100, header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(SnapshotError, match="damaged"):
            Snapshot(path)
    path.write_bytes(whole + b"x")
    refused(path, "damaged")


def test_foreign_files_are_refused_with_the_reason(saved, tmp_path, monkeypatch):
    refused(tmp_path / "none", "No such file")
    refused(tmp_path, "Is a directory")
    (tmp_path / "text").write_text("not a session, but long enough to look at")
    refused(tmp_path / "text", "damaged, or not a session")
    refused(saved, r"other settings: prune.threshold=0.9 \(here 0.5\)", prune__threshold=0.5)
    refused(saved, "engine.page_size=16 .here 8.", engine__page_size=8)
    other = StreamEngine(load_model("tiny-random", seed=1), engine("vicostream").method)
    with other, pytest.raises(SnapshotError, match="computed by another model: weights"):
        other.restore(saved)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    refused(tmp_path / "weights", "not a session of vicostream")
    for version, said in ((3, "3, written by a newer"), (1, "1, written by an older")):
        monkeypatch.setattr(saving_module, "VERSION", version)
        with engine("vicostream") as made, made.open(fps=2) as stream:
            stream.save(tmp_path / "other")
        refused(tmp_path / "other", f"format {said} version; this one reads 2")


def written(path, tensors):
    with open(path, "wb", buffering=0) as file:
        saving_module._write(file, [saving_module._whole(*named) for named in tensors.items()])


@pytest.mark.parametrize(
    "change,said",
    [
        ({"state": None}, "state"),
        ({"state": b"{"}, "damaged"),
        ({"state": b"[]"}, "its state is no object"),
        ({"blocks/tokens": None}, "its blocks' tokens is missing"),
        (
            {"blocks/tokens": torch.tensor([3.0, 2.0])},
            "its blocks' tokens is missing or of another",
        ),
        ({"blocks/tokens": torch.tensor([6, -1], dtype=torch.int32)}, "its blocks' tokens is neg"),
        ({"blocks/kind": torch.tensor([1, 9], dtype=torch.uint8)}, "its blocks' kind is unknown"),
        ({"blocks/number": torch.tensor([1])}, "facts differ in number"),
        ({"contents": torch.zeros(4, 1)}, "its contents are not those of its blocks"),
        ({"summaries": None}, "its summaries are not those of its blocks"),
        ({"rows/kmin": torch.zeros(3, 1)}, "its rows/kmin are not those of its blocks"),
    ],
)
def test_what_no_save_writes_is_refused_though_its_digest_fits(tmp_path, change, said):
    facts = BlockFacts("chunk", "", 3, 0, 0, 0.5, 0.9, False, 0, 7, 104, 2, True)
    two = to_columns([facts, facts._replace(tokens=2, rows=0)])
    good = {"state": b"{}", "contents": torch.zeros(5, 1), "summaries": torch.zeros(2, 1)}
    good |= {"rows/kmin": torch.zeros(2, 1)} | {f"blocks/{k}": v for k, v in two.items()}
    for tensors, fits in ((good, True), ({**good, **change}, False)):
        made = {
            name: torch.frombuffer(bytearray(x), dtype=torch.uint8) if isinstance(x, bytes) else x
            for name, x in tensors.items()
            if x is not None
        }
        written(tmp_path / "s", made)
        if fits:
            Snapshot(tmp_path / "s").__exit__()
            continue
        with pytest.raises(SnapshotError, match=said):
            Snapshot(tmp_path / "s")


def test_a_stream_of_a_million_chunks_fits_a_file(tmp_path):
    """Facts alone, read back; keys and values are one tensor however many there are."""
    few = [
        BlockFacts("sink", "preamble", 7, 0, 0, 0.0, 0.0, True, -1, 0, 7, 0, False),
        BlockFacts("chunk", "", 97, 1, 1, 0.5, 0.9, False, 0, 7, 104, 3, True),
        BlockFacts("chunk", "", 2, 1, 1, 2e6 / 3, 1e6, False, 10**6, 2**33, 2**33 + 2, 0, False),
    ]  # fmt: skip
    tensors = {"state": torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)}
    for name, column in to_columns(few).items():
        tensors[f"blocks/{name}"] = torch.cat((column, column[2:].expand(10**6)))
    total = {name: int(tensors[f"blocks/{name}"].sum()) for name in ("tokens", "summarised")}
    tensors |= {"contents": torch.zeros(total["tokens"], 0), "summaries": torch.zeros(1, 0)}
    assert total["summarised"] == 1
    path = tmp_path / "s"
    written(path, tensors)
    with Snapshot(path) as snapshot:
        found = snapshot.blocks()
        assert list(itertools.islice(found, 3)) == few
        assert collections.Counter(found) == {few[2]: 10**6}
    assert header_bytes(path) < 2000


def header_bytes(path):
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("preset", ["vicostream", "livevlm"])
def test_the_header_does_not_grow_with_the_history(preset, tmp_path):
    with engine(preset) as made, made.open(fps=2) as stream:
        sizes = []
        for name in ("few", "many"):
            for _ in range(2 if name == "few" else 10):
                stream.ingest(pictures(40))
            stream.save(tmp_path / name)
            sizes.append(header_bytes(tmp_path / name))
        assert len(stream.history.cache.chunks) == 60
    assert sizes[1] <= sizes[0] + 100  # offsets have more digits


def test_all_blocks_that_are_lost_are_forgotten_by_one_more_pass(tmp_path, monkeypatch):
    passes = []
    write = saving_module._write
    monkeypatch.setattr(saving_module, "_write", lambda *args: (passes.append(0), write(*args)))
    spill = {"engine__spill_dir": str(tmp_path), "engine__allow_missing": True}
    with engine("tiers", **spill) as made, made.open(fps=2) as stream:
        for _ in range(8):
            stream.ingest(pictures(40))
        made.cache.settle()
        files = sorted(tmp_path.rglob("*.safetensors"))
        assert len(files) > 2
        for file in files:
            file.unlink()
        stream.save(tmp_path / "s")
        assert stream.report()["forgotten"]["chunks"] >= len(files)
    assert len(passes) == 2


def test_what_a_killed_save_left_goes_whatever_the_name(tmp_path):
    left = tmp_path / ".cam[1].999999999.partial"  # no process has such a number
    left.touch()
    with engine("vicostream") as made, made.open(fps=2) as stream:
        stream.save(tmp_path / "cam[1]")
    assert [p.name for p in tmp_path.iterdir()] == ["cam[1]"]


def test_the_file_is_safetensors(saved):
    safe_open = pytest.importorskip("safetensors").safe_open
    with safe_open(saved, "pt") as file:
        assert file.metadata()["format"] == "vicostream-session"
        state = json.loads(bytes(file.get_tensor("state").numpy()))
        assert state["history"]["chunks_seen"] == 2
        tokens = file.get_tensor("blocks/tokens")
        assert file.get_tensor("contents").shape[0] == tokens.sum()
        assert file.get_tensor("summaries").shape[0] == len(tokens) - 1  # all but the prompt's
        assert file.get_tensor("frames/0").shape == (4, 48, 80, 3)


@pytest.mark.parametrize("path", ["", ".", "a\0b"])
def test_a_path_that_names_no_file_is_refused(path):
    with engine("vicostream") as made, made.open() as stream:
        with pytest.raises(InputError, match="save: .* names no file"):
            stream.save(path)
        with pytest.raises(SnapshotError, match="cannot be restored: "):
            made.restore(path)


def test_a_save_that_fails_leaves_the_one_before(saved, tmp_path, monkeypatch):
    path = tmp_path / "s"
    path.write_bytes(saved.read_bytes())

    def write_all(file, data):
        file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with engine("vicostream") as made, made.restore(path) as stream:
        stream.ingest(pictures(8))
        monkeypatch.setattr(saving_module, "write_all", write_all)
        with pytest.raises(PipelineError, match="cannot be saved to .*: No space left on device"):
            stream.save(path)
        stream.ingest(pictures(8))
    assert path.read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def killed_while_saving(path, stream, kills):
    """Forks processes that save over and over, and kills each at a random moment, so many times
    and until some were fast enough to save; the numbers of the sessions found afterwards, and how
    many kills left half a file beside them."""
    draw, found, torn = random.Random(3), [], 0
    stream.recorder.frames_ingested = 0
    began = time.perf_counter()
    stream.save(path)
    one = time.perf_counter() - began
    while len(found) < kills or (found[-1] == found[0] and len(found) < 20 * kills):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    stream.recorder.frames_ingested += 1
                    stream.save(path)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0, 4 * one))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        # The next save takes away what a killed process left.
        torn += any(path.parent.glob(f".{path.name}.{child}.partial"))
        with Snapshot(path) as snapshot:  # verifies every byte
            found.append(snapshot.state["recorder"]["totals"]["frames_ingested"])
        stream.recorder.frames_ingested = found[-1]
    return found, torn


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_a_kill_during_a_save_leaves_a_whole_session(kills, tmp_path):
    path = tmp_path / "s"
    with engine("vicostream") as made, made.open(fps=2) as stream:
        stream.ingest(pictures(20))
        found, torn = killed_while_saving(path, stream, kills)
        assert found == sorted(found) and found[-1] > found[0]
        stream.save(path)
        assert [p.name for p in tmp_path.iterdir()] == ["s"]
        expected = go_on(stream)
    assert torn or kills < 20
    with engine("vicostream") as made, made.restore(path) as stream:
        assert go_on(stream) == expected
