"""A row is shown as it is trained: every token, its mask, its documents; and what the data says is never obeyed."""

from __future__ import annotations

import html.parser
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import instructft
from instructft import cli
from instructft.check.rows import draw, html_page, inspect_rows
from instructft.prompt.loss_mask import encode_conversation
from instructft.prompt.templates import TEMPLATES
from instructft.prompt.token_view import coloured, documents, pieces, show, visible

SIGNS = "reading my.yaml …\nloading torch and transformers …\n"  # of life
REPO = Path(__file__).resolve().parents[2]
EVIL = (
    "[bold red]x[/] [/nothing] :smile: <script>alert(1)</script> &amp; \"'"
    " \x1b[31m\x1b]0;title\x07 \x9b1m \u202eback \r\x00 end"
)


def chat(*turns):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def encoded(tokenizer, *turns):
    return encode_conversation(chat(*turns), tokenizer)


def packed(*rows):
    """The rows as one pack, as `instructft.data.packing` makes it."""
    labels = [label for row in rows for label in [-100, *row["labels"][1:]]]
    ids = [token for row in rows for token in row["input_ids"]]
    return {"input_ids": ids, "labels": labels, "seq_lengths": [len(row["input_ids"]) for row in rows]}


def flat(row, tokenizer):
    return [piece for document in pieces(row, tokenizer) for piece in document]


def accounted(row, tokenizer):
    """Every token of the row, with its label, and every character of its text stand in its pieces, in order."""
    found = flat(row, tokenizer)
    assert [i for piece in found for i in piece.ids] == list(row["input_ids"])
    assert [label for piece in found for label in piece.labels] == list(row["labels"])
    assert "".join(piece.text for piece in found) == tokenizer.decode(row["input_ids"])
    return found


def printed(thing, **how):
    console = Console(file=io.StringIO(), width=60, **how)
    console.print(thing, soft_wrap=True)
    return console.file.getvalue()


COLOUR = {"force_terminal": True, "color_system": "standard"}


@pytest.fixture
def chatml(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"].text()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


# --------------------------------------------------------------------------------------------------------------------
# Pieces
# --------------------------------------------------------------------------------------------------------------------


def test_what_carries_loss_is_what_the_labels_say(tokenizer):
    found = accounted(encoded(tokenizer, "Add 1 and 1.", "2", "And 2?", "4\n"), tokenizer)
    eos = tokenizer.eos_token
    assert "".join(piece.text for piece in found if piece.loss) == f"2{eos}4\n{eos}"
    assert [(piece.text, piece.loss) for piece in found if piece.special] == [(eos, True)] * 2
    assert all(len(piece.ids) == 1 for piece in found)


def test_special_tokens_stand_alone(chatml):
    found = accounted(encoded(chatml, "Hi", "Yes"), chatml)
    assert [(p.text, p.loss) for p in found if p.special] == [
        ("<|im_start|>", False),
        ("<|im_end|>", False),
        ("<|im_start|>", False),
        ("<|im_end|>", True),
    ]


@pytest.mark.parametrize("text", ["日本語の文", "🙂👍🏽👨‍👩‍👧", "naïve Ünï", "שלום", "a\ufffd\ufffdb 日\ufffd日"])
def test_a_character_of_several_tokens_is_shown_whole(tokenizer, text):
    found = accounted(encoded(tokenizer, text, f"{text}."), tokenizer)
    assert any(len(piece.ids) > 1 for piece in found)
    assert max(len(piece.ids) for piece in found) <= 8
    shown = "".join(piece.text for piece in found if piece.loss)
    assert shown == f"{text}.{tokenizer.eos_token}"
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece.text for piece in found)


def test_a_character_that_was_cut_is_not_finished_by_the_next_document(tokenizer):
    whole = encoded(tokenizer, "Say sun", "日")
    start = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    cut = {name: values[: start + 1] for name, values in whole.items()}
    rest = {name: values[start + 1 :] for name, values in whole.items()}
    first, second = pieces(packed(cut, rest), tokenizer)
    assert (first[-1].text, first[-1].ids) == ("\ufffd", (whole["input_ids"][start],))
    assert second[0].ids[0] == whole["input_ids"][start + 1]
    assert sum(len(piece.ids) for piece in second) == len(rest["input_ids"])


def test_bytes_that_are_no_text_are_all_shown(tokenizer):
    byte = tokenizer("日", add_special_tokens=False)["input_ids"][0]
    hello = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    ids = [byte] * 100 + hello
    found = flat({"input_ids": ids, "labels": ids}, tokenizer)
    assert [i for piece in found for i in piece.ids] == ids
    assert "".join(piece.text for piece in found).strip("\ufffd") == "Hello"
    assert max(len(piece.ids) for piece in found) <= 32
    found = flat({"input_ids": [byte, *hello], "labels": [byte, *hello]}, tokenizer)
    assert (found[0].text, found[0].ids) == ("\ufffd", (byte,))  # what follows is no part of it


def test_a_mask_that_parts_a_character_counts_each_token(tokenizer):
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    row = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    (piece,) = accounted(row, tokenizer)
    assert piece.loss
    assert show(row, tokenizer).counts == (len(ids), len(ids) - 1)
    assert f'data-l="-100 {" ".join(map(str, ids[1:]))}"' in html_page([row], tokenizer)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_vocabulary_that_drops_the_space_of_a_first_word(scheme):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁thesumiwo", "th", "▁t", "▁th"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    merges = [("t", "h"), ("▁", "th"), ("▁", "t")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    for text in ("the sum is two", "<s>the sum 日本 is  two</s>the sum", "日</s>🙂 the"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = accounted({"input_ids": ids, "labels": ids}, tokenizer)
        assert {"日", "🙂"} & set(text) <= {piece.text.strip() for piece in found}


def test_documents_of_a_pack(tokenizer):
    rows = [encoded(tokenizer, "Add 1.", "2"), encoded(tokenizer, "Hi", "Hello there"), encoded(tokenizer, "a", "b")]
    pack = packed(*rows)
    accounted(pack, tokenizer)
    parts = pieces(pack, tokenizer)
    assert [[i for piece in part for i in piece.ids] for part in parts] == [row["input_ids"] for row in rows]
    text = printed(coloured(pack, tokenizer))
    for number, row in enumerate(rows, start=1):
        loss = sum(label != -100 for label in row["labels"])
        assert f"document {number} of 3 · {len(row['input_ids'])} tokens, {loss} with loss ─" in text
    assert text.index("document 2") < text.index("Hello there") < text.index("document 3")
    assert "document" not in printed(coloured(rows[0], tokenizer))


def test_branches_are_told_from_documents(tokenizer):
    first, second = tokenizer("one two three")["input_ids"], tokenizer(" two four")["input_ids"]
    ids = [*first, *second]
    row = {"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [len(first), len(second)], "seq_starts": [0, 2]}
    out = printed(coloured(row, tokenizer))
    assert "trunk · " in out
    assert "branch behind the first 2 tokens · " in out
    shown = show(row, tokenizer)
    assert shown.parts_in_words == ["1 branch"]
    assert [part["name"] for part in shown.parts] == ["Trunk", "Branch behind the first 2 tokens"]
    full = show({**row, "seq_starts": [0, 20]}, tokenizer, max_length=20 + len(second))
    assert full.cut  # a branch ends where its turn does


def test_a_pack_that_is_shown_in_part():
    row = {"input_ids": list(range(5)), "labels": [-100] * 5}
    assert documents({**row, "seq_lengths": [3, 4, 2]}) == [range(0, 3), range(3, 5)]
    assert documents({**row, "seq_lengths": [3]}) == [range(0, 3), range(3, 5)]
    assert documents(row) == [range(5)]


# --------------------------------------------------------------------------------------------------------------------
# Terminal
# --------------------------------------------------------------------------------------------------------------------


def test_without_colour_brackets_say_all(chatml):
    assert printed(coloured(encoded(chatml, "Hi\tyou", "Yes\n\n  sir"), chatml)) == (
        "⟨<|im_start|>⟩user⏎\nHi⇥   you⟨<|im_end|>⟩⏎\n⟨<|im_start|>⟩assistant⏎\n⟦Yes⏎\n⏎\n  sir⟨<|im_end|>⟩⟧⏎\n"
    )
    no_color = printed(coloured(encoded(chatml, "Hi", "Yes"), chatml), force_terminal=True, no_color=True)
    assert "⟦" in no_color
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", no_color)


def test_the_brackets_of_the_data_are_told_from_ours(tokenizer):
    text = printed(coloured(encoded(tokenizer, "⟦a⟧", "⟨b⟩"), tokenizer))
    assert "\\u27e6a\\u27e7" in text
    assert f"⟦\\u27e8b\\u27e9⟨{tokenizer.eos_token}⟩⟧" in text


def test_a_loss_that_ends_with_a_new_line(tokenizer):
    row = encoded(tokenizer, "Hi", "Yes\nNo")
    cut = {name: values[:-2] for name, values in row.items()}
    assert tokenizer.decode(cut["input_ids"]).endswith("Yes\n")
    assert printed(coloured(cut, tokenizer)).endswith("⟦Yes⏎⟧\n")


def test_with_colour_the_styles_say_all(tokenizer):
    text = printed(coloured(encoded(tokenizer, "Hi", "Yes"), tokenizer), **COLOUR)
    assert "⟦" not in text
    assert "\x1b[1;32mYes" in text  # bold green
    assert f"\x1b[1;7;32m{tokenizer.eos_token}" in text  # reversed
    assert "\x1b[2mHi" in text.replace("\x1b[2mH\x1b[0m\x1b[2mi", "\x1b[2mHi")  # dim


def test_ids_stand_below_their_tokens(tokenizer):
    row = encoded(tokenizer, "Hi you " * 20, "Yes 日")
    lines = printed(coloured(row, tokenizer, ids=True)).splitlines()
    assert [int(i) for line in lines[1::3] for i in re.split(r"[ +]+", line.strip())] == row["input_ids"]
    assert max(map(len, lines)) <= 60
    for tokens, ids, marks in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        if "日" not in tokens:  # two columns wide
            starts = [m.start() for m in re.finditer(r"\S+", tokens)]
            assert starts == [m.start() for m in re.finditer(r"\S+", ids)]
            assert {m.start() for m in re.finditer(r"\S+", marks)} <= set(starts)
    loss = [label for label in row["labels"] if label != -100]
    assert sum(len(line.split()) for line in lines[2::3]) == len([p for p in flat(row, tokenizer) if p.loss])
    assert str(loss[-1]) in lines[-2]
    assert "^" not in printed(coloured(row, tokenizer, ids=True), **COLOUR)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("how", [{}, COLOUR])
def test_what_the_data_says_is_not_obeyed_in_a_terminal(tokenizer, how, ids):
    text = printed(coloured(encoded(tokenizer, EVIL, EVIL), tokenizer, ids), **how)
    ours = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not set(ours) & set("\x1b\x07\x9b\u202e\r\x00")
    assert "\x1b[31m" not in text
    if not ids:
        assert visible(EVIL) in ours
        assert "[bold red]x[/] [/nothing] :smile:" in ours
        assert "\\x1b[31m\\x1b]0;title\\x07 \\x9b1m \\u202eback \\r\\x00" in ours


# --------------------------------------------------------------------------------------------------------------------
# Page
# --------------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Reads the tokens of each document off the page, and insists that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.documents, self.text = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        self.links += [name for name in attributes if name.startswith("on")]
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "section":
            self.documents.append([])
            self.text.append("")
        if "data-i" in attributes:
            self.documents[-1].append((attributes["class"].split(), [int(i) for i in attributes["data-i"].split()]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "section" in self.open and "h3" not in self.open:
            self.text[-1] += data


def test_the_page_shows_every_token(tokenizer):
    rows = [encoded(tokenizer, "日\n\tx", "Yes\n🙂\n"), encoded(tokenizer, "a < b & c", "<b>")]
    page = Page(html_page([packed(*rows), rows[0]], tokenizer))
    for found, text, row in zip(page.documents, page.text, [*rows, rows[0]], strict=True):
        assert [i for _, ids in found for i in ids] == row["input_ids"]
        assert text.strip("\n") == tokenizer.decode(row["input_ids"])
        loss = [i for kind, ids in found for i in ids if "l" in kind]
        assert loss == [label for label in row["labels"] if label != -100]
        assert [kind for kind, _ in found if "s" in kind] == [["l", "s"]]


def test_the_page_is_self_contained_and_obeys_no_data(tokenizer):
    tokenizer.add_tokens(["<script>alert(1)</script>", "&amp;"])  # one token may hold all of a tag
    tokenizer.chat_template += "{# </pre><script>alert(2)</script> #}"
    text = html_page([encoded(tokenizer, EVIL, EVIL)], tokenizer, EVIL, {EVIL: EVIL})
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert page.links == []
    assert not re.search(r"https?:|url\(|@import", text)
    assert not set(text) & set("\x1b\x07\x9b\u202e\r\x00")
    assert page.tags.count("style") == 1
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert visible(EVIL) in page.text[0]


def test_the_page_tells_of_documents_and_cut_rows(tokenizer):
    row = encoded(tokenizer, "Hi", "It is a long answer")
    cut = {name: values[:-2] for name, values in row.items()}
    length = len(cut["input_ids"])
    assert show(cut, tokenizer, max_length=length).cut
    assert not show(cut, tokenizer, max_length=length + 1).cut
    assert not show(row, tokenizer, max_length=length + 2).cut
    assert "its end is missing" in html_page([show(cut, tokenizer, max_length=length)], tokenizer)
    text = html_page([packed(row, row)], tokenizer)
    assert "2 documents" in text
    assert text.count("<h3>") == 2
    assert "its end is missing" not in text


# --------------------------------------------------------------------------------------------------------------------
# Command
# --------------------------------------------------------------------------------------------------------------------

RECIPE = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}, tokenizer: quickstart}
data:
  datasets: [{path: rows.jsonl}]
  template: instruction
  max_length: 40
  splits: {validation: 0.1}
output_dir: run
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs `inspect` on a recipe of 40 rows, in this process: exit code, stdout, stderr. No weights may be loaded."""
    from transformers import AutoModelForCausalLM

    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(AutoModelForCausalLM, name, lambda *args, **kwargs: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(RECIPE, encoding="utf-8")
    rows = [{"instruction": f"Name number {i}.", "output": f"It is {i}, {'very ' * (i % 12)}sure."} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["instructft", "inspect", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_inspect_shows_rows_as_they_are_trained(run):
    code, out, err = run("my.yaml")
    assert (code, err) == (0, SIGNS)
    heads = re.findall(r"row (\d+) of 36 · (\d+) tokens · (\d+) with loss \(([\d.]+)%\)", out)
    assert len(heads) == 3
    recipe = instructft.load_recipe("my.yaml")
    tokenizer = instructft.load_tokenizer(recipe)
    split = instructft.prepare_dataset(recipe, tokenizer)["train"]
    for number, tokens, loss, share in heads:
        row = split[int(number) - 1]
        supervised = sum(label != -100 for label in row["labels"])
        assert (int(tokens), int(loss)) == (len(row["input_ids"]), supervised)
        assert share == f"{supervised / len(row['input_ids']):.1%}"[:-1]
        assert printed(coloured(row, tokenizer)) in out
    assert "responses: " in out
    assert not Path("run").exists()


def test_inspect_draws_by_the_seed_or_takes_what_is_named(run):
    assert run("my.yaml")[1] == run("my.yaml")[1]
    _, out, _ = run("my.yaml", "data.seed=7")
    assert [int(n) for n in re.findall(r"row (\d+) of 36", out)] == [i + 1 for i in draw(36, 3, 7)]
    assert draw(36, 3, 7) != draw(36, 3, 42)
    assert set(draw(36, 3, 42)) < set(draw(36, 5, 42))
    assert draw(2, 5, 42) == [0, 1]
    _, out, _ = run("my.yaml", "--row", 7, "--row", 2)
    assert re.findall(r"row (\d+) of 36", out) == ["7", "2"]
    _, out, _ = run("my.yaml", "-n", 1, "--split", "validation")
    assert len(re.findall(r"row \d of 4 ", out)) == 1


def test_inspect_says_which_rows_were_cut(run):
    _, out, _ = run("my.yaml", "-n", 99)
    heads = re.findall(r"row \d+ of .*?\)(.*?)━", out)
    assert len(heads) == 36
    recipe = instructft.load_recipe("my.yaml", ["data.splits.validation=0.0"])
    from instructft.data.prepare import prepare

    _, out, _ = run("my.yaml", "data.splits.validation=0.0", "-n", 99)
    assert out.count("its end is missing") == prepare(recipe, instructft.load_tokenizer(recipe)).cut > 0


def test_inspect_shows_packs(run):
    _, out, _ = run("my.yaml", "data.packing=true", "data.max_length=96", "-n", 2)
    heads = [int(n) for n in re.findall(r"row \d+ of .* (\d+) documents", out)]
    assert len(heads) == 2
    assert len(re.findall(r"document \d+ of \d+ · \d+ tokens, \d+ with loss", out)) == sum(heads)
    assert "packs of 96 tokens" in out


def test_inspect_writes_a_page(run):
    code, out, err = run("my.yaml", "data.packing=true", "data.max_length=96", "-n", 2, "--html", "rows.html")
    assert (code, err) == (0, SIGNS)
    assert out.startswith("Wrote rows.html: 2 of ")
    text = Path("rows.html").read_text(encoding="utf-8")
    for part in ("my · train", "instruction", "quickstart", "responses: ", "with loss", "Document 2"):
        assert part in text
    assert len(Page(text).documents) > 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.train_on=answers"], ["data.train_on", "answers", "responses"]),
        (["--split", "test"], ["--split", "'test'", "train, validation"]),
        (["--row", "37"], ["--row: 37", "1 to 36"]),
        (["--row", "0"], ["--row: 0", "1 to 36"]),
        (["-n", "0"], ["-n", "1"]),
        (["--html", "rows.jsonl"], ["--html: rows.jsonl", ".html"]),
        (["--html", "nowhere/rows.html"], ["--html: nowhere/rows.html", "folder"]),
        (["data.datasets[0].path=gone.jsonl"], ["gone.jsonl"]),
    ],
)
def test_inspect_says_what_is_wrong(run, arguments, said):
    before = Path("rows.jsonl").read_bytes()
    code, out, err = run("my.yaml", *arguments)
    assert (code, out) == (2, "")
    assert all(part in err for part in said), err
    assert "Traceback" not in err
    assert Path("rows.jsonl").read_bytes() == before


def test_inspect_prints_where_the_encoding_knows_no_such_character(run):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-m", "instructft", "inspect", "my.yaml", "-n", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, SIGNS.replace("…", "..."))
    assert "with loss" in done.stdout


def test_a_recipe_name_is_no_markup(tmp_path, write_recipe):
    recipe = instructft.load_recipe(write_recipe(name="[red]x.yaml"))
    console = Console(file=io.StringIO(), width=100)
    inspect_rows(recipe, limit=1, console=console)
    assert "[red]x" in console.file.getvalue()
