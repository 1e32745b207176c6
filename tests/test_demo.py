"""The demo's documents, tokenizer, training loop and shipped reader."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from atman_triton.demo import (
    MODEL_FOLDER,
    demo_document,
    demo_prompt,
    load_demo_model,
    make_document,
    prompt,
)
from atman_triton.demo import facts as data
from atman_triton.demo.bm25 import bm25_best, bm25_scores
from atman_triton.demo.documents import KINDS, Document, unfinished_statement
from atman_triton.demo.evaluate import exact_match, fresh_cases, generate_answers, keyword_match
from atman_triton.demo.model import make_model
from atman_triton.demo.packing import draw_batch, pack, sample_texts
from atman_triton.demo.tokenizer import train_tokenizer
from atman_triton.demo.train import SMOKE, Trainer, main, run

MEGABYTE = 2**20
documents = st.builds(make_document, st.integers(0, 2**32), st.sampled_from(KINDS))


@pytest.fixture(scope="module")
def reader():
    return load_demo_model()


@pytest.fixture(scope="module")
def small_tokenizer():
    return train_tokenizer(sample_texts(0, 100), SMOKE.vocabulary)


class TestDocuments:
    @settings(max_examples=60, deadline=None)
    @given(documents)
    def test_each_answer_stands_in_its_sentence_alone(self, document: Document):
        assert 8 <= len(document.sentences) <= 12
        assert len(document.questions) == len(document.facts)
        for stated, question in zip(document.facts, document.questions, strict=True):
            holders = [i for i, s in enumerate(document.sentences) if _states(s, stated.value)]
            assert holders == [question.evidence] == [stated.sentence]
            if question.form == "plain":
                assert question.answer == f" {stated.value}"

    @settings(max_examples=60, deadline=None)
    @given(documents)
    def test_each_question_has_three_distractors_of_its_type(self, document: Document):
        for question in document.questions:
            others = [
                fact
                for fact in document.facts
                if fact.value_type == question.value_type and fact.name != question.fact
            ]
            assert len(others) >= 3
            assert question.evidence not in {fact.sentence for fact in others}
            assert len({fact.value for fact in others}) == len(others)

    @settings(max_examples=30, deadline=None)
    @given(documents)
    def test_spans_cut_the_sentences_out_of_the_prompt(self, document: Document):
        text = prompt(document, document.questions[0])
        assert text.endswith(f" Q: {document.questions[0].text} A:")
        cut = tuple(text[start:stop] for start, stop in document.spans)
        assert cut == document.sentences

    def test_a_seed_makes_the_same_document_again(self):
        assert make_document(7) == make_document(7) == make_document(random.Random(7))
        assert make_document(7) != make_document(8)

    def test_answers_in_another_form(self):
        forms = {}
        for seed in range(200):
            document = make_document(seed)
            for stated, question in zip(document.facts, document.questions, strict=True):
                forms.setdefault((question.value_type, question.form), (stated.value, question))
        text, question = forms["date", "digits"]
        _, day, _, month, year = text.split()
        expected = f" {year}-{data.MONTHS.index(month) + 1:02d}-{data.ORDINALS.index(day) + 1:02d}"
        assert question.answer == expected and "digits" in question.text
        text, question = forms["region", "country"]
        assert text in data.REGIONS[question.answer.strip()] and "country" in question.text
        text, question = forms["duration", "digits"]
        assert (
            question.answer == f" {data.NUMBER_WORDS.index(text.split()[0]) + 2} {text.split()[1]}"
        )

    def test_wording_varies_within_a_fact(self):
        for types in data.FACTS.values():
            for group in types.values():
                assert len(group) >= 5
                for fact in group:
                    assert len(fact.statements) >= 3 and len(fact.questions) >= 3
                    assert all(pattern.count("{}") == 1 for pattern in fact.statements)

    def test_unfinished_statement_asks_for_the_same_value(self):
        rng = random.Random(0)
        document = make_document(3, "product")
        for stated, question in zip(document.facts, document.questions, strict=True):
            asked = unfinished_statement(rng, document, question)
            assert asked.evidence == stated.sentence
            assert asked.answer in (f" {stated.value}", question.answer)
            assert stated.value not in asked.text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "poem"}, "kind must be one of contract, cv, product, got 'poem'."),
            ({"sentences": 13}, "sentences must be from 1 to 12, got 13."),
        ],
    )
    def test_refuses_what_it_cannot_make(self, arguments, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            make_document(0, **arguments)

    def test_demo_asks_a_contract_for_the_pay_per_hour(self):
        document = demo_document()
        assert document.kind == "contract"
        assert demo_prompt() == prompt(document, "What is the pay per hour?")
        money = [fact.name for fact in document.facts if fact.value_type == "money"]
        assert "hourly pay" in money and len(money) >= 4


class TestKeywordBaseline:
    def test_scores_a_worked_example(self):
        # One of two equally long sentences holds the word: its weight is log(1 + 1.5 / 1.5).
        scores = bm25_scores("Cats?", ["the cats sleep", "a dog barks"])
        assert scores == pytest.approx([torch.log(torch.tensor(2.0)).item(), 0.0])
        assert bm25_best("dog", ["the cats sleep", "a dog barks"]) == 1

    def test_keywords_do_not_find_the_evidence(self):
        share = keyword_match(fresh_cases(1000))
        print(f"BM25 finds the evidence sentence in {share}")
        assert share.value <= 0.5


class TestTokenizer:
    @settings(max_examples=200, deadline=None)
    @given(st.text().filter(lambda text: "<|" not in text))
    def test_any_text_survives(self, reader, text):
        tokenizer = reader[1]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text

    @settings(max_examples=50, deadline=None)
    @given(documents)
    def test_offsets_tile_the_text(self, reader, document):
        text = prompt(document, document.questions[0])
        encoded = reader[1](text, return_offsets_mapping=True)
        edges = encoded["offset_mapping"]
        assert edges[0][0] == 0 and edges[-1][1] == len(text)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        pieces = [reader[1].decode([token]) for token in encoded["input_ids"]]
        assert pieces == [text[start:stop] for start, stop in edges]

    def test_packed_rows_equal_the_tokens_of_a_prompt(self, reader):
        tokenizer = reader[1]
        document = make_document(1)
        question = document.questions[0]
        batch = pack([(document, [question])], tokenizer, random.Random(0))
        expected = tokenizer(prompt(document, question) + question.answer)["input_ids"]
        assert batch.ids[0].tolist() == [*expected, tokenizer.eos_token_id]
        answer = batch.labels[batch.answer == 0].tolist()
        assert answer == [*tokenizer(question.answer)["input_ids"], tokenizer.eos_token_id]

    def test_answers_are_short(self, reader):
        for _, question in fresh_cases(300):
            assert 1 <= len(reader[1](question.answer)["input_ids"]) <= 6


class TestTraining:
    def test_a_resumed_run_equals_an_unbroken_one(self, tmp_path: Path, small_tokenizer):
        whole = Trainer(SMOKE, tmp_path / "whole", small_tokenizer)
        run(whole, steps=6)
        first = Trainer(SMOKE, tmp_path / "parts", small_tokenizer)
        run(first, steps=6, stop=3)
        assert first.progress.step == 3
        second = Trainer(SMOKE, tmp_path / "parts", small_tokenizer)
        second.load()
        run(second, steps=6)
        assert second.progress.step == whole.progress.step == 6
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(weight, second.model.state_dict()[name]), name

    def test_the_loss_falls(self, tmp_path: Path, small_tokenizer):
        trainer = Trainer(SMOKE, tmp_path, small_tokenizer)
        run(trainer, steps=120, log_every=20)
        rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows]
        print(losses)
        assert losses[-1] < 0.8 * losses[0]

    def test_a_batch_depends_on_its_step_alone(self, small_tokenizer):
        one, same, other, rank = (
            draw_batch(small_tokenizer, tokens=256, seed=0, step=step, level=1, rank=rank)
            for step, rank in ((5, 0), (5, 0), (6, 0), (5, 1))
        )
        assert torch.equal(one.ids, same.ids)
        assert not torch.equal(one.ids, other.ids)
        assert not torch.equal(one.ids, rank.ids)

    def test_the_command_trains_and_resumes(self, tmp_path: Path):
        options = ["--smoke", "--workers", "1", "--out", str(tmp_path)]
        for more in (["--steps", "2"], ["--steps", "4", "--resume"]):
            result = _command([*options, *more])
            assert result.exit_code == 0, result.output
        model, tokenizer = load_demo_model(tmp_path / "model")
        assert len(tokenizer) == model.config.vocab_size
        training = json.loads((tmp_path / "model" / "training.json").read_text())
        assert training["progress"]["step"] == 4

    def test_two_workers_train_one_model(self, tmp_path: Path):
        spawn(_train_as_one_of_two, (tmp_path,), nprocs=2)
        assert load_demo_model(tmp_path / "model")[0].config.hidden_size == SMOKE.width

    @pytest.mark.parametrize(("exists", "options"), [(False, ["--resume"]), (True, [])])
    def test_the_command_refuses_to_guess_about_a_checkpoint(self, tmp_path, exists, options):
        if exists:
            (tmp_path / "checkpoint.pt").touch()
        result = _command(["--out", str(tmp_path), *options])
        assert result.exit_code == 2
        assert "checkpoint.pt" in result.stderr

    def test_refuses_a_checkpoint_of_another_recipe(self, tmp_path: Path, small_tokenizer):
        Trainer(SMOKE, tmp_path, small_tokenizer).save()
        other = replace(SMOKE, seed=1)
        with pytest.raises(ValueError, match="was made with another recipe"):
            Trainer(other, tmp_path, small_tokenizer).load()


class TestShippedReader:
    def test_fits_in_five_megabytes(self):
        total = sum(file.stat().st_size for file in MODEL_FOLDER.rglob("*") if file.is_file())
        print(f"{total / MEGABYTE:.2f} MB")
        assert total <= 5 * MEGABYTE

    def test_loads_through_the_auto_classes(self, reader):
        model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
        assert type(model) is type(reader[0])
        assert model.dtype == torch.float32
        assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
        assert AutoTokenizer.from_pretrained(MODEL_FOLDER).get_vocab() == reader[1].get_vocab()

    def test_reads_fresh_documents(self, reader):
        share = exact_match(reader[0], reader[1], fresh_cases(200, "test"))
        print(f"exact match {share}")
        assert share.value >= 0.95

    def test_an_untrained_model_does_not(self, reader):
        torch.manual_seed(0)
        share = exact_match(make_model(reader[1]).eval(), reader[1], fresh_cases(32, "test"))
        print(f"exact match, untrained {share}")
        assert share.value <= 0.05

    def test_answers_the_demo_prompt(self, reader):
        document = demo_document()
        answers = generate_answers(reader[0], reader[1], [demo_prompt()])
        pay = next(fact for fact in document.facts if fact.name == "hourly pay")
        assert answers == [f" {pay.value}"]

    def test_reads_a_foreign_text_without_error(self, reader):
        text = "Zürich — 東京 — Ω. " * 40
        (answer,) = generate_answers(reader[0], reader[1], [prompt(text, "Where?")])
        assert isinstance(answer, str)


def _command(arguments: list[str]) -> Any:
    """Run the training command in this process."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def _train_as_one_of_two(rank: int, folder: Path) -> None:
    """What each of two worker processes does: average, train, and compare the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    tokenizer = train_tokenizer(sample_texts(0, 30), 400)
    trainer = Trainer(replace(SMOKE, workers=2, vocabulary=400), folder, tokenizer, rank)
    for parameter in trainer.parameters:
        parameter.grad = torch.full_like(parameter, float(rank))
    assert trainer._average(torch.tensor([2.0 * rank])).tolist() == [1.0]
    assert all(bool((p.grad == 0.5).all()) for p in trainer.parameters)
    for parameter in trainer.parameters:
        parameter.grad = None
    run(trainer, steps=2)
    for parameter in trainer.parameters:
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(parameter, first)
    dist.destroy_process_group()


def _states(sentence: str, value: str) -> bool:
    """Whether a sentence holds a value as whole words."""
    return f" {value} " in f"{sentence.removesuffix('.')} "
