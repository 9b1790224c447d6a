"""One run of the command in this process, and what came of it."""

from __future__ import annotations

import io
import json

import pytest
from pipeline_kit import SMALL

from vicostream_kernels.pipeline.report import SCHEMA_FILE
from vicostream_kernels.pipeline.run import RunOptions, run
from vicostream_kernels.pipeline.screen import Screen

SMALL_SET = [f"{key}={value}" for key, value in SMALL.items()]


class Outcome:
    def __init__(self, tmp_path, video, *questions, settings=(), **options):
        self.folder = tmp_path / "report"
        out, err = io.StringIO(), io.StringIO()
        self.code = run(
            RunOptions(
                video=str(video),
                questions=questions,
                settings=[*SMALL_SET, *settings],
                report=str(self.folder),
                **{"model": "tiny-random", **options},
            ),
            Screen(out, err),
        )
        self.out, self.err = out.getvalue(), err.getvalue()
        self.lines = [line for line in self.err.splitlines() if "error:" in line]

    @property
    def report(self):
        report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.Draft202012Validator(schema).validate(report)
        return report
