"""The standard comparisons: which arms each figure is made of.

All but ``models`` run one checkpoint; only one thing changes within a figure, the rest is the
``live`` preset or, for ``plane``, each method as published.
"""

from __future__ import annotations

from dataclasses import replace

from vicostream_kernels.evaluation.arms import Arm

_STUDIES = ("dropping", "window", "retrieval", "models", "live", "plane")


def names() -> tuple[str, ...]:
    """The standard comparisons."""
    return _STUDIES


def study(name: str, model: str, untuned: str) -> dict[str, list[Arm]]:
    """The arms of a comparison, by the line of the figure that they lie on.

    ``untuned`` is the checkpoint trained with full history only. Raises ``ValueError`` for an
    unknown name.
    """
    made = {
        "dropping": _dropping,
        "window": _window,
        "retrieval": _retrieval,
        "models": _models,
        "live": _live,
        "plane": _plane,
    }
    if name not in made:
        raise ValueError(f"study {name!r}: one of {', '.join(_STUDIES)}")
    return made[name](model, untuned)


def _dropping(model: str, _: str) -> dict[str, list[Arm]]:
    """Full history, so that only the dropped tokens are missing."""
    base = Arm(model, "full-history")
    thresholds = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)

    def line(preset: str, key: str, values: tuple) -> list[Arm]:
        return [
            replace(base, overrides={"prune": preset, key: value}, label=f"{preset} {key}={value}")
            for value in values
        ]

    return {
        "all tokens": [replace(base, label="all tokens")],
        "chunk-intra": line("vicostream", "prune.threshold", thresholds),
        "DTD": line("timechat-online", "prune.threshold", thresholds),
        "STC-Pruner": line("stc-pruner", "prune.k", (2, 3, 4, 5, 6, 7)),
        "random": [
            replace(base, keep=keep, label=f"random {keep:g}")
            for keep in (0.1, 0.25, 0.3, 0.4, 0.5, 0.75)
        ],
    }


def _window(model: str, _: str) -> dict[str, list[Arm]]:
    windows = (0, 1, 2, 4, 8, 16)

    def line(question: str, **fixed: object) -> list[Arm]:
        return [
            Arm(
                model,
                "full-history",
                {"engine.window_chunks": window, **fixed},
                label=f"window {window}, {question}",
            )
            for window in windows
        ]

    return {
        "video windowed, question sees all": line("question sees all"),
        "question windowed too": line("question too", **{"engine.history": "window"}),
    }


#: How each publication scores a chunk; what is chosen from, how many, and where it stands are the
#: same for all.
_SCORES = {
    "ViCoStream": {"retrieve.summary": "embedding", "retrieve.score": "cosine"},
    "ReKV": {
        "retrieve.summary": "raw_mean_key",
        "retrieve.score": "dot",
        "retrieve.query": "question",
        "retrieve.layers": "each",
    },
    "Quest": {
        "retrieve.summary": "minmax",
        "retrieve.score": "bound",
        "retrieve.layers": "each",
        "retrieve.scope": "query_head",
    },
}


def _retrieval(model: str, _: str) -> dict[str, list[Arm]]:
    def line(label: str, score: str, selector: str = "rule") -> list[Arm]:
        return [
            Arm(
                model,
                "live",
                # One more than k: the newest chunk is always among them. None goes by age.
                {
                    **_SCORES[score],
                    "retrieve.k": k + 1,
                    "retrieve.force_last": 1,
                    "retrieve.relevant": None,
                },
                selector,
                label=f"{label} k={k}",
            )
            for k in (1, 2, 4, 8, 16)
        ]

    return {
        "oracle": line("oracle", "ViCoStream", "oracle"),
        **{name: line(name, name) for name in _SCORES},
        "random": line("random", "ViCoStream", "random"),
    }


def _models(model: str, untuned: str) -> dict[str, list[Arm]]:
    presets = ("full-history", "vicostream", "live")
    return {
        name: [Arm(name, preset, label=f"{name} {preset}") for preset in presets]
        for name in (untuned, model)
    }


def _live(model: str, _: str) -> dict[str, list[Arm]]:
    """What the preset was chosen from: chunks read, for windows, thresholds, and what is always
    read. Its own values are one of the arms. Long clips (``--steps 1200``) part them."""
    settings = {
        "window 1": {"engine.window_chunks": 1},
        "window 2": {"engine.window_chunks": 2},
        "window 4": {"engine.window_chunks": 4},
        "window 4, eps 0.5": {"prune.threshold": 0.5},
        "window 4, newest not forced": {"retrieve.force_last": 0},
        "window 4, relevant 2": {"retrieve.relevant": 2.0},
        "window 4, relevant 5": {"retrieve.relevant": 5.0},
        "window 4, by score alone": {"retrieve.relevant": None},
        "window 4, steps of measured time": {"engine.seconds_per_step": None},
        "window 4, positions as written": {"retrieve.positions": "absolute"},
    }
    return {
        line: [
            Arm(model, "live", {**fixed, "retrieve.k": k}, label=f"{line}, k={k}")
            for k in (3, 6, 9, 17, 65)
        ]
        for line, fixed in settings.items()
    }


def _plane(model: str, _: str) -> dict[str, list[Arm]]:
    lines = {
        name: [Arm(model, name, label=name)] for name in ("full-history", "vicostream", "live")
    }
    lines["streaming-llm"] = [
        Arm(model, "streaming-llm", {"attention.window": 144}, label="streaming-llm 144 tokens")
    ]
    lines["live, other budgets"] = [
        Arm(model, "live", {"engine.window_chunks": w, "retrieve.k": k}, label=f"live W={w} k={k}")
        for w, k in ((1, 3), (2, 3), (4, 9), (8, 17))
    ]
    return lines
