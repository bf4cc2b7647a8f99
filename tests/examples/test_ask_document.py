from __future__ import annotations

from pathlib import Path

import ask_document
import pytest

DOCUMENT = "import json\n\n\ndef read_json(path):\n    with open(path) as file:\n        return json.load(file)\n\n\n"


def test_reads_once_and_answers_as_if_it_had_read_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, question = tmp_path / "code.py", "def write_json("
    document.write_text(DOCUMENT)
    ask_document.main([str(document), question, "class File:", "--max-new-tokens", "8"])
    first = capsys.readouterr().out
    assert "tokens read in" in first
    ask_document.main([str(document), question, "--max-new-tokens", "8"])
    second = capsys.readouterr().out
    assert "tokens read in" not in second
    assert second.split("\n[")[0] in first
    document.write_text(DOCUMENT + "# changed\n")
    ask_document.main([str(document), question, "--max-new-tokens", "8"])
    assert "tokens read in" in capsys.readouterr().out

    model = ask_document.AutoModelForCausalLM.from_pretrained(ask_document.shipped_model_path()).eval()
    tokenizer = ask_document.AutoTokenizer.from_pretrained(ask_document.shipped_model_path())
    ids = tokenizer(DOCUMENT + question, return_tensors="pt").input_ids
    whole = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :])
    assert second.startswith(question + whole)
