"""What is kept on disk: keys that change with what made a result, journals that are read back."""

from __future__ import annotations

import shutil

import pytest

from vicostream_kernels.evaluation.store import Journal, fingerprint
from vicostream_kernels.models import named


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_retrained_model_of_the_package_has_another_fingerprint(tmp_path, monkeypatch, name):
    folder = tmp_path / "tiny"
    shutil.copytree(named.FOLDERS["tiny"], folder)
    monkeypatch.setitem(named.FOLDERS, "tiny", folder)
    before = fingerprint("tiny")
    assert before == fingerprint("tiny") != fingerprint("tiny-full")
    changed = bytearray((folder / name).read_bytes())
    changed[-1] ^= 1
    (folder / name).write_bytes(changed)
    assert fingerprint("tiny") != before


def test_random_models_differ_by_name_and_by_their_tokenizer(tmp_path, monkeypatch):
    before = fingerprint("3b-random")
    assert before != fingerprint("7b-random")
    monkeypatch.setattr(named, "HOME", tmp_path)
    assert fingerprint("3b-random") != before


def test_an_answer_with_any_line_separator_is_read_back(tmp_path):
    answer = "one\u2028two\u2029three\u0085four\x0bfive\nsix\r\nseven"
    Journal(tmp_path, {}).add({"id": 1, "answer": answer})
    Journal(tmp_path, {}).add({"id": 2, "answer": ""})
    assert Journal(tmp_path, {}).rows == {
        1: {"id": 1, "answer": answer},
        2: {"id": 2, "answer": ""},
    }
