"""Conversations: written as published templates write them, answers alone counted, packed whole."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_records import write_lines
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training.data.chat import TEMPLATES, render, take_messages
from training.data.config import Chat, DataConfig
from training.data.packing import WholeDocuments
from training.data.prepare import Prepared, prepare
from training.data.tokenizer import load_tokenizer
from training.data.tokens import split_flags

EOS = "<|endoftext|>"
BEGIN = {Chat.chatml: None, Chat.llama3: "<|begin_of_text|>", Chat.deepseek: "<｜begin▁of▁sentence｜>"}
# As the models' own tokenizer_config.json have them.
JINJA = {
    Chat.chatml: (
        "{% for message in messages %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    ),
    Chat.llama3: (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
        "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
    ),
    Chat.deepseek: (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    ),
}
MARKS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", EOS]


def talk(number: int) -> list[dict[str, str]]:
    """One to three questions and answers, every other behind a word of the system's."""
    told = [{"role": "system", "content": f"be brief {number}"}] if number % 2 else []
    for turn in range(1 + number % 3):
        told += [
            {"role": "user", "content": f"what is {number} + {turn}? 漢字"},
            {"role": "assistant", "content": f"{number + turn}, naïvely" + " x" * (number % 5)},
        ]
    return told


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tokenizer of bytes that has all marks as tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("chat", Chat)
def test_tokens_are_those_of_the_published_template(chat: Chat, saved: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(saved), chat_template=JINJA[chat], bos_token=BEGIN[chat])
    ours = load_tokenizer(str(saved), EOS)
    for number in range(7):
        messages = take_messages(chat, talk(number))
        assert isinstance(messages, tuple)
        parts = render(messages[0], chat)
        rows = [ours.encode_mark(part.text) if part.mark else ours.encode(part.text) for part in parts]
        assert np.concatenate(rows).tolist() == theirs.apply_chat_template(talk(number), return_dict=False)


def test_what_somebody_says_cannot_speak_for_another(saved: Path) -> None:
    tokenizer = load_tokenizer(str(saved), EOS)
    assert len(tokenizer.encode_mark("<|im_start|>user\n")) == 6
    assert len(tokenizer.encode("<|im_start|>")) == len("<|im_start|>")


def make(place: Path, chat: Chat, tokenizer: str = "bytes", count: int = 300) -> Prepared:
    write_lines(place / "talks.jsonl", ({"messages": talk(i)} for i in range(count)))
    words: dict[str, Any] = {"corpus": (str(place / "talks.jsonl"),), "folder": str(place), "tokenizer": tokenizer}
    eos = None if tokenizer == "bytes" else EOS
    return prepare(DataConfig(sequence_length=8, held_out=0.2, chat=chat, eos=eos, **words), lambda line: None)


@pytest.mark.parametrize("own", [False, True], ids=["bytes", "a tokenizer.json"])
@pytest.mark.parametrize("chat", Chat)
def test_answers_alone_count(chat: Chat, own: bool, tmp_path: Path, saved: Path) -> None:
    found = make(tmp_path, chat, str(saved) if own else "bytes")
    inner, seen = Tokenizer.from_file(str(saved)), set()
    closed = TEMPLATES[chat].behind["assistant"]
    for row in (found.train, found.held_out):
        ids, counted = split_flags(row.read(0, row.tokens)[0])
        for start, stop in itertools.pairwise([*row.starts().tolist(), row.tokens]):
            kept = [token for token in ids[start : stop - 1][counted[start : stop - 1]].tolist()]
            text = inner.decode(kept, skip_special_tokens=False) if own else bytes(kept).decode()
            seen.add(text)
            assert (ids[stop - 1], counted[stop - 1]) == (found.tokenizer.eos, TEMPLATES[chat].end == "")
    said = ([m["content"] for m in talk(i) if m["role"] == "assistant"] for i in range(300))
    assert seen == {"".join(content + closed for content in contents) for contents in said}
    assert found.train.documents + found.held_out.documents == 300


def test_documents_are_packed_whole(tmp_path: Path) -> None:
    row = make(tmp_path, Chat.chatml).train
    ids, flags = split_flags(row.read(0, row.tokens)[0])
    ends = [*row.starts().tolist(), row.tokens]
    wanted = [(ids[a:b].tolist(), flags[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]
    longest = max(len(part) for part, _ in wanted)
    packed = WholeDocuments(row, sequence_length=longest + 300, lookahead=2)
    assert packed.cut == 0 and packed.sequences < row.documents / 2
    batch = packed.read(0, packed.sequences)
    assert batch.documents is not None and batch.ids.shape == (packed.sequences, longest + 302)
    found = []
    for sequence, counted, documents in zip(batch.ids, batch.counted, batch.documents, strict=True):
        for number in documents.unique():
            places = (documents == number).nonzero().flatten()
            if counted[places].any():
                found.append((sequence[places].tolist(), counted[places[1:]].tolist()))
                assert not counted[places[0]]
            else:
                assert (sequence[places] == row.eos).all()  # padding
    # Each once, none cut, none in two; what pads the last one of a row is no part of it.
    assert sorted(found) == sorted(wanted)
    again = packed.read(packed.sequences, packed.sequences)
    assert not torch.equal(again.ids, batch.ids)
    assert sorted(map(tuple, again.ids.tolist())) == sorted(map(tuple, batch.ids.tolist()))
    assert torch.equal(packed.read(3, 2).ids, batch.ids[3:5])


def test_a_document_longer_than_a_sequence_is_cut_and_said(tmp_path: Path) -> None:
    row = make(tmp_path, Chat.llama3, count=40).train
    lengths = np.diff([*row.starts(), row.tokens])
    packed = WholeDocuments(row, sequence_length=int(lengths.min()))
    assert packed.cut == int((lengths > lengths.min()).sum()) > 0 and packed.sequences == row.documents
    assert packed.read(0, 3).ids.shape == (3, int(lengths.min()) + 1)


BAD: dict[str, tuple[Any, str]] = {
    "text": ("hello", "is no list of messages"),
    "nothing": ([], "is no list of messages"),
    "another role": ([{"role": "boss", "content": "x"}], "has no role and content in message 0"),
    "no content": ([*talk(0), {"role": "user", "content": None}], "has no role and content in message 2"),
    "a word": (["x"], "has no role and content in message 0"),
    "no answer": ([{"role": "user", "content": "x"}], "has nothing that the assistant says"),
    "half a pair": ([{"role": "assistant", "content": "\ud800"}], "has half a surrogate pair in message 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation_is_named(name: str) -> None:
    value, why = BAD[name]
    found = take_messages(Chat.chatml, value)
    assert isinstance(found, str) and found.startswith(why)


def test_mistakes(tmp_path: Path) -> None:
    told = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert isinstance(take_messages(Chat.chatml, told), tuple)
    refused = take_messages(Chat.deepseek, told)
    assert isinstance(refused, str) and refused.endswith("a role is one of system, user, assistant, content is text")
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text("a text\n")
    with pytest.raises(ValueError, match=r"^data\.chat=chatml needs records of conversations"):
        prepare(DataConfig(sequence_length=8, corpus=(str(tmp_path / "text"),), chat=Chat.chatml, held_out=0.3))
    with pytest.raises(ValueError, match=r"^data\.fim=0\.1 must be 0 with data\.chat=chatml"):
        DataConfig(sequence_length=8, chat=Chat.chatml, fim=0.1)
    inner = Tokenizer(models.BPE({"a": 0, EOS: 1}, []))
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"data\.chat writes <\|im_start\|>, and data\.tokenizer=.* has no such token"):
        make(tmp_path, Chat.chatml, str(tmp_path / "tokenizer.json"))


def test_a_prepared_folder_stays_what_it_was_made_for(tmp_path: Path) -> None:
    made = make(tmp_path, Chat.chatml)
    words: dict[str, Any] = {"sequence_length": 8, "corpus": (str(made.folder),), "held_out": 0.2}
    assert prepare(DataConfig(**words, chat=Chat.chatml)).digest == made.digest
    with pytest.raises(ValueError, match=r"^data\.chat=None, but data\.corpus=.* was prepared with chatml"):
        prepare(DataConfig(**words))
    with pytest.raises(ValueError, match=r"^data\.fim=0\.1, but data\.corpus=.* was prepared with 0\.0"):
        prepare(DataConfig(**words, fim=0.1))
