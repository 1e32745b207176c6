"""What is done stays done, whatever ended the run, and nothing else is taken for it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from eval_cases import example, result
from PIL import Image
from toy_models import llama

from atman_triton.evaluate import journal as journals
from atman_triton.evaluate.journal import Busy, Journal, Mixed, digest, run_facts, weights_digest

FACTS = dict.fromkeys(journals.FACTS, "x") | {"commit": "abc"}
EXAMPLES = [example("a"), example("b")]
DIGESTS = {one.id: digest(one) for one in EXAMPLES}


def opened(folder, process=0, facts=FACTS, digests=DIGESTS):
    return Journal(folder, digests, facts, process)


def test_what_was_added_is_read_again_by_every_process(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path, 1)
    first.add(EXAMPLES[0], [result("a"), result("a", "exact", notes=["“x”\n"])])
    assert set(second.read()) == {("a", "direct"), ("a", "exact")}
    assert second.read()["a", "exact"] == result("a", "exact", notes=["“x”\n"])
    second.add(EXAMPLES[1], [result("b", precision=0.25)])
    assert set(first.read()) == {("a", "direct"), ("a", "exact"), ("b", "direct")}
    first.close()
    second.close()
    # One header a process, written with its first results; measured again, the last one counts.
    again = opened(tmp_path)
    again.add(EXAMPLES[0], [result("a", seconds=9.0)])
    assert again.read()["a", "direct"].seconds == 9.0
    assert len(again.runs) == 3
    again.close()
    assert len(opened(tmp_path, None).read()) == 3


def test_every_cut_leaves_whole_lines(tmp_path):
    """As if the run had been killed after any byte of what it wrote."""
    journal = opened(tmp_path)
    journal.add(EXAMPLES[0], [result("a"), result("a", "exact")])
    journal.close()
    path = tmp_path / "0.jsonl"
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for stop in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:stop])
        journal = opened(tmp_path)
        done = sum(end <= stop for end in ends[1:])
        assert len(journal.read()) == done
        journal.add(EXAMPLES[1], [result("b")])
        journal.close()
        assert all(map(json.loads, path.read_text().splitlines()))
        assert len(opened(tmp_path, None).read()) == done + 1


def test_a_line_that_another_process_is_writing_is_waited_for(tmp_path):
    reader = opened(tmp_path, None)
    writer = opened(tmp_path)
    writer.add(EXAMPLES[0], [result("a")])
    writer.close()
    whole = (tmp_path / "0.jsonl").read_bytes()
    (tmp_path / "0.jsonl").write_bytes(whole[:-5])
    assert reader.read() == {}
    (tmp_path / "0.jsonl").write_bytes(whole)
    assert set(reader.read()) == {("a", "direct")}


def test_other_runs_are_refused(tmp_path):
    journal = opened(tmp_path)
    journal.add(EXAMPLES[0], [result("a")])
    journal.close()
    with pytest.raises(Mixed, match=r"0\.jsonl was measured with weights x \(now y\);.*--out"):
        opened(tmp_path, facts=FACTS | {"weights": "y"})
    with pytest.raises(Mixed, match=r"code x \(now y\), torch x \(now 3\)"):
        opened(tmp_path, facts=FACTS | {"torch": "3", "code": "y"})
    opened(tmp_path, facts=FACTS | {"commit": "def"}).close()
    other = {"a": digest(example("a", target="6"))}
    with pytest.raises(Mixed, match="results of another example 'a' than there is now"):
        opened(tmp_path, digests=other)
    # Examples that are not asked for now stay where they are.
    kept = opened(tmp_path, digests={"b": DIGESTS["b"]})
    assert kept.read() == {}
    kept.close()
    assert len(opened(tmp_path, None).read()) == 1


def test_two_runs_do_not_write_to_one_file(tmp_path):
    pytest.importorskip("fcntl")
    first = opened(tmp_path)
    with pytest.raises(Busy, match=r"0\.jsonl is in use: another run .*--out"):
        opened(tmp_path)
    opened(tmp_path, 1).close()
    first.close()
    opened(tmp_path).close()
    with pytest.raises(ValueError, match="only reads"):
        opened(tmp_path, None).add(EXAMPLES[0], [])


def test_digests():
    one = example("a")
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    mask = np.array([[True, False], [False, False]])
    several = [
        one,
        *(
            dataclasses.replace(one, **change)
            for change in (
                {"prompt": one.prompt + " "},
                {"target": "6"},
                {"labels": ((1, 2),)},
                {"region": (0, 4)},
                {"reworded": "How?"},
                {"prompt": [picture, "a"]},
                {"prompt": [picture.transpose(Image.Transpose.ROTATE_90), "a"]},
                {"mask": mask},
                {"mask": ~mask},
            )
        ),
    ]
    assert len({digest(each) for each in several}) == len(several)
    assert digest(one) == digest(dataclasses.replace(one, group="g", facts={"n": 1}))


def test_facts_tell_models_apart(monkeypatch):
    model = llama()
    facts = run_facts(model, "contracts", "chip", "abc")
    assert set(journals.FACTS) < set(facts) and set(map(type, facts.values())) == {str}
    assert facts == run_facts(model, "contracts", "chip", "abc")
    before = weights_digest(model)
    weight = next(model.parameters()).detach()
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert weights_digest(model) != before
    code = journals.code_digest()
    monkeypatch.setattr(journals, "_SHOWS", (*journals._SHOWS, "kernels/"))
    assert journals.code_digest() != code  # so kernels are in it
