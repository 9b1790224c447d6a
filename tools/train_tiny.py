"""Train the two models that the package ships, from nothing, on a CPU.

    python tools/train_tiny.py --out out/tiny                 # both, within an hour on two cores
    python tools/train_tiny.py --out out/tiny --resume        # goes on where it stopped

``tiny-full`` learns with everything visible that came before, short videos first, at last long ones
with more questions about the past; ``tiny`` goes on from there with what a bounded stream does to
it: pruning, windows and retrieval at random, and a loss that makes the mean of a question's
embeddings find the chunk that answers it. Two processes of one thread share every batch. A batch
comes from its step number and the seed alone, and the second stage starts from the weights of the
first as they are shipped, so a resumed run is the run. What it learns from is made on the fly.
``tiny/recipe.py`` says what is taught when.

Writes ``log.jsonl``, ``curve.png``, ``state.pt`` (tensors only) and the folders ``tiny_full`` and
``tiny``, which transformers loads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny import card, curve, files, workers
from tiny.batches import CHUNK, Batch, Views, bounded_views, full_views, make_batch
from tiny.losses import (
    answer_loss,
    answering_loss,
    change_loss,
    counting_loss,
    follow_loss,
    hue_loss,
    lookup_loss,
    naming_loss,
    retrieval_loss,
    similarity,
    trail_loss,
)
from tiny.muon import Muon
from tiny.net import Net
from tiny.recipe import BOUNDED, FULL, SHARES, Phase, Stage

_EVAL_SEED = 1
#: Muon's rate, in those of Adam.
_MUON = 4.0


#: Video steps and videos of a batch; questions of a video.
BUDGET, MOST_VIDEOS, QUESTIONS = 512, 32, 16


class Training:
    """The model, its optimizer, and the number of the next step."""

    def __init__(self, args: argparse.Namespace, rank: int = 0, count: int = 1) -> None:
        self.args, self.out = args, args.out
        self.rank, self.count = rank, count
        torch.manual_seed(args.seed)
        self.model = new_model()
        self.net = Net(self.model, args.dtype)
        self.optimizers = optimizers(self.model)
        self.step, self.wall_s, self.cpu_s = 0, 0.0, 0.0
        self.stages = ((FULL, args.full_steps), (BOUNDED, args.bounded_steps))
        if args.resume and (self.out / "state.pt").exists():
            self._load()

    def run(self) -> None:
        first = 0
        for stage, steps in self.stages:
            for at in range(max(0, self.step - first), steps):
                if at == 0 and first:
                    self._begin()
                self._one(stage, at, steps, first + at)
            first += steps

    def _begin(self) -> None:
        """From the weights as they are shipped, with nothing left of the stage before."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.bfloat16())
        self.optimizers = optimizers(self.model)

    def _one(self, stage: Stage, at: int, steps: int, number: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * stage.rate * schedule(at, steps, stage.warmup)
        figures = self._learn(stage, at / steps, number)
        self.step = number + 1
        done = at + 1 == steps
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += workers.total(time.process_time() - cpu, self.count)
        done |= self.step % self.args.eval_every == 0
        if done:
            workers.check_alike(self.model.parameters(), self.count)
        if self.rank:
            return
        line = {"step": number, "stage": stage.name, **figures}
        if done:
            wall, cpu = time.perf_counter(), time.process_time()
            line["eval"] = evaluate(self.net, stage.bounded, self.args.seed)
            # Before the files are written that name these sums.
            self.wall_s += time.perf_counter() - wall
            self.cpu_s += time.process_time() - cpu
            self._save()
            self._export(stage)
        line |= {"wall_s": round(self.wall_s, 1), "cpu_s": round(self.cpu_s, 1)}
        if done:
            print(json.dumps(line), flush=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def _learn(self, stage: Stage, share: float, number: int) -> dict[str, Any]:
        seed = [self.args.seed, 7, number]
        rng = np.random.Generator(np.random.PCG64(seed))
        phase = next(phase for phase in stage.phases if share < phase.end)
        steps, sparse = length(rng, phase)
        videos = max(1, min(MOST_VIDEOS, BUDGET // steps) // self.count)
        # The first process draws the numbers again that gave the length (a trailing 0 is no other
        # seed to NumPy): the shipped weights were made so.
        rng = np.random.Generator(np.random.PCG64([*seed, self.rank]))
        batch = make_batch(rng, videos, steps, QUESTIONS, phase.shares, sparse=sparse)
        self.net.refresh()
        tokens = self.net.encode(batch.frames).view(*batch.shapes.shape, -1)
        views = see(rng, stage.bounded, batch, tokens)
        inside = self.net.logits(tokens.flatten(1, 2), views.trunk, views.branches)
        looked = inside.looked
        answer, stop, said = answer_loss(inside.logits, views)
        lookup = lookup_loss(looked, batch, views)
        naming = naming_loss(tokens, self.net.words, batch)
        loss = answer + 0.2 * stop + stage.naming * naming + stage.lookup * lookup
        figures = {"T": steps, "answer": answer, "naming": naming, "lookup": lookup}
        if phase.again:
            again = lookup_loss(inside.again, batch, views)
            loss = loss + phase.again * again
            figures["again"] = again
        if phase.counting:
            counting = counting_loss(looked, batch, views, stage.bounded)
            loss = loss + phase.counting * counting
            figures["counting"] = counting
        if phase.answering:
            answering = answering_loss(inside.again, batch, views)
            loss = loss + phase.answering * answering
            figures["answering"] = answering
        if phase.following:
            following = follow_loss(inside.followed, batch, views, phase.hues > 0)
            loss = loss + phase.following * following
            figures["following"] = following
        if steps > 1:
            change = change_loss(tokens, batch)
            trail = trail_loss(inside.trails, self.net.words, batch, views)
            loss = loss + 0.3 * change + stage.trail * trail
            if phase.hues:
                hues = hue_loss(inside.trails, self.net.words, batch, views)
                loss = loss + phase.hues * hues
                figures["hues"] = hues
            figures |= {"change": change, "trail": trail}
        if steps > 8:
            retrieval, hit = retrieval_loss(tokens, self.net.words, batch, views)
            loss = loss + stage.retrieval * retrieval
            figures |= {"retrieval": retrieval, "hit": torch.tensor(hit)}
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)  # what this part of a batch does not use counts as well
        loss.backward()
        workers.mean_gradients(self.model.parameters(), self.count)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise RuntimeError(f"step {number}: the gradient is not finite")
        for optimizer in self.optimizers:
            optimizer.step()
        for form, right in by_form(batch, views, said).items():
            figures[form] = torch.tensor(sum(right) / len(right))
        return {
            k: v if isinstance(v, int) else round(float(v.detach()), 4) for k, v in figures.items()
        }

    # -- files -----------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "given": self._given(),
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
        }
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")

    def _given(self) -> dict[str, Any]:
        """What makes another run of it."""
        return {"seed": self.args.seed, "workers": self.count, "dtype": str(self.args.dtype)}

    def _load(self) -> None:
        state = torch.load(self.out / "state.pt", weights_only=True)
        if state["given"] != self._given():
            raise SystemExit(f"{self.out} was begun with {state['given']}, not {self._given()}")
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        self.step, self.wall_s, self.cpu_s = state["step"], state["wall_s"], state["cpu_s"]
        if self.rank:
            return
        lines = (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] < self.step]
        (self.out / "log.jsonl").write_text("\n".join([*kept, ""]), encoding="utf-8")

    def _export(self, stage: Stage) -> None:
        curve.plot(self.out / "log.jsonl", self.out / "curve.png")
        text = card.text(stage.name, self.args.seed, self.step, self.wall_s, self.cpu_s)
        files.export(self.model, self.out / stage.name, text)


def length(rng: np.random.Generator, phase: Phase) -> tuple[int, bool]:
    """Steps of the videos of a batch, and whether they are sparse."""
    if rng.random() < phase.sparse:
        return CHUNK * int(rng.integers(4, phase.longest // CHUNK + 1)), True
    steps = int(rng.integers(max(1, phase.longest // 4), phase.longest + 1))
    if rng.random() < phase.short:
        steps = int(rng.integers(1, 5))
    return (-(-steps // CHUNK) * CHUNK if steps > CHUNK else steps), False


def new_model() -> Any:
    """transformers' module with weights of standard deviation 1 / sqrt(inputs); residual outputs
    are smaller by sqrt(2 x layers)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**files.config()))
    model = model.float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            elif "embed_tokens" in name:
                p.normal_(0, 0.1)
            else:
                std = p[0].numel() ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                    std /= math.sqrt(2 * (2 if "visual" in name else 4))
                p.normal_(0, std)
                if "patch_embed" in name:  # the frames of a step weigh the same
                    p.copy_(p[:, :, :1].expand_as(p))
    return model.train()


def optimizers(model: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, Adam for the rest; ``share`` of a stage's rate."""
    layers, rest = [], []
    for name, p in model.named_parameters():
        (layers if p.dim() == 2 and "embed" not in name else rest).append(p)
    muon = Muon([{"params": layers, "share": _MUON, "weight_decay": 0.02}])
    adam = torch.optim.AdamW(
        [{"params": rest, "share": 1.0, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True
    )
    return muon, adam


def schedule(at: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    if at < warmup:
        return (at + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1, steps - warmup)))


def see(rng: np.random.Generator, bounded: bool, batch: Batch, tokens: torch.Tensor) -> Views:
    """The masks of a batch."""
    if not bounded:
        return full_views(batch)
    return bounded_views(rng, batch, similarity(tokens.detach()).numpy())


@torch.no_grad()
def evaluate(net: Net, bounded: bool, seed: int) -> dict[str, Any]:
    """Shares of right answers by length and form, on videos of the validation split."""
    net.refresh()
    result: dict[str, Any] = {}
    for steps, videos in ((32, 16), (96, 6)):
        rng = np.random.Generator(np.random.PCG64([seed, 9, _EVAL_SEED, steps]))
        batch = make_batch(rng, videos, steps, 32, SHARES, split="val")
        tokens = net.encode(batch.frames).view(*batch.shapes.shape, -1)
        for name, masked in (("full", False), ("bounded", True))[: 1 + bounded]:
            views = see(rng, masked, batch, tokens)
            inside = net.logits(tokens.flatten(1, 2), views.trunk, views.branches)
            _, _, said = answer_loss(inside.logits, views)
            result[f"{name}{steps}"] = {
                form: round(100 * sum(right) / len(right), 1)
                for form, right in by_form(batch, views, said).items()
            }
    return result


def by_form(batch: Batch, views: Views, said: torch.Tensor) -> dict[str, list[int]]:
    """For each form of question, 1 for a right and 0 for a wrong answer."""
    found: dict[str, list[int]] = {}
    for b, questions in enumerate(batch.questions):
        for i, q in enumerate(questions):
            if views.answers[b, i] >= 0:
                found.setdefault(str(q.form), []).append(int(said[b, i] == views.answers[b, i]))
    return dict(sorted(found.items()))


def _fast_bfloat16() -> bool:
    """Without instructions of its own bfloat16 is 30 times slower than float32 here, with them
    several times faster."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, test, bool)()) for test in tests)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-steps", type=int, default=2800)
    parser.add_argument("--bounded-steps", type=int, default=800)
    parser.add_argument(
        "--workers", type=int, default=2, help="processes; another number is another model"
    )
    parser.add_argument("--eval-every", type=int, default=300)
    parser.add_argument(
        "--dtype",
        type=lambda name: getattr(torch, name),
        default=torch.bfloat16 if _fast_bfloat16() else torch.float32,
        help="of the arithmetic; bfloat16 where this CPU multiplies it in hardware",
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    return parser.parse_args(words)


def train(rank: int, count: int, args: argparse.Namespace) -> None:
    Training(args, rank, count).run()


if __name__ == "__main__":
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.resume and (given.out / "log.jsonl").exists():
        raise SystemExit(f"{given.out} holds a run: --resume goes on with it")
    workers.run(given.workers, train, given)
