"""Words of other tools are answered with ours, in a line that works as it stands."""

from __future__ import annotations

import shlex

import pytest

from instructft import cli
from instructft.commands.peers import command_of, keys_of

COMMANDS = sorted(function.__name__ for functions in cli.GROUPS.values() for function in functions)


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("sft", "instructft train RECIPE"),
        ("fit", "instructft train RECIPE"),
        ("finetune", "instructft train RECIPE"),
        ("fine_tune", "instructft train RECIPE"),
        ("preprocess", "instructft prepare RECIPE"),
        ("infer", "instructft generate MODEL --input FILE --output FILE"),
        ("merge-lora", "instructft merge MODEL OUTPUT"),
        ("merge_lora", "instructft merge MODEL OUTPUT"),
        ("export-lora", "instructft merge MODEL OUTPUT"),
        ("webchat", "instructft ui MODEL"),
        ("eval", "instructft evaluate MODEL"),
        ("upload", "instructft push MODEL REPO_ID"),
        ("my.yaml", "instructft train my.yaml"),
    ],
)
def test_verbs(word, ours):
    assert command_of(word, COMMANDS).endswith(ours)
    assert ours.split()[1] in COMMANDS


@pytest.mark.parametrize("word", ["trian", "evalute", "xyzzy", "--foo"])
def test_a_mistyped_command_of_ours_is_left_to_the_parser(word):
    assert command_of(word, COMMANDS) == ""


def test_what_is_done_elsewhere():
    assert "SFT" in command_of("dpo", COMMANDS)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("my.yaml --train.learning_rate 1e-4", "my.yaml train.learning_rate=1e-4"),
        ("my.yaml --learning-rate=1e-4 data.packing=true", "my.yaml data.packing=true train.learning_rate=1e-4"),
        (
            "--config my.yaml --lr 1 --lora_r 8 --bf16",
            "my.yaml train.learning_rate=1 adapter.r=8 train.bf16=true",
        ),
        ("my.yaml --output_dir runs/x --max_seq_length 512", "my.yaml output_dir=runs/x data.max_length=512"),
        ("my.yaml --resume never --num_train_epochs 2", "my.yaml --resume never train.num_train_epochs=2"),
        ("my.yaml --model_name_or_path 'my model'", "my.yaml 'model.name_or_path=my model'"),
    ],
)
def test_keys_written_as_options(typed, ours):
    said = keys_of("train", shlex.split(typed), {"--resume"})
    assert said.endswith(f"write: instructft train {ours}")


def test_what_is_no_key_is_left_to_the_parser():
    assert keys_of("train", ["my.yaml", "--foo", "1"], set()) == ""


def test_the_command_line_says_so(monkeypatch, capsys):
    for typed, said in (("sft my.yaml", "here it is: instructft train"), ("train a --lr 1", "train.learning_rate=1")):
        monkeypatch.setattr("sys.argv", ["instructft", *typed.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert said in err
