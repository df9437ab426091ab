import json

import pytest

from data_prep.chat import prompt_tokens
from data_prep.prompts import read_prompts
from data_prep.source.files import Files


def source(tmp_path, rows, name="bench"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Files(path=str(path))


def test_first_turns_with_categories(target, tmp_path):
    rows = [{"turns": ["a cat", "a dog"], "category": "pets"}, {"question": "two ?", "answer": "4"}]
    prompts = read_prompts([source(tmp_path, rows)], target.tokenizer)
    assert [(p.id, p.category) for p in prompts] == [("bench/0", "pets"), ("bench/1", "bench")]
    asked = [{"role": "user", "content": "a cat"}]
    assert prompts[0].tokens == prompt_tokens(target.tokenizer, asked)


def test_limits(target, tmp_path, capsys):
    rows = [{"prompt": f"cat {i} " + "dog " * i} for i in range(20)]
    bench = source(tmp_path, rows)
    assert len(read_prompts([bench], target.tokenizer, limit=5)) == 5
    everything = read_prompts([bench], target.tokenizer)
    longest = sorted(len(p.tokens) for p in everything)[9]
    short = read_prompts([bench], target.tokenizer, max_prompt_tokens=longest)
    assert max(len(p.tokens) for p in short) == longest
    assert f"{20 - len(short)} prompts of more than {longest} tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="No prompt is left"):
        read_prompts([bench], target.tokenizer, max_prompt_tokens=1)


def test_equal_names_are_refused(target, tmp_path):
    bench = source(tmp_path, [{"prompt": "cat"}])
    with pytest.raises(ValueError, match="both call a record 'bench/0'"):
        read_prompts([bench, bench], target.tokenizer)
