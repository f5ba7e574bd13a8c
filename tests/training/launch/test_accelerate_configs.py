"""The shipped configs of accelerate come to what their headers say, also from a wheel."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from instructft.recipe.shipped import shipped_recipes
from tests.conftest import OWN_PORT

REPO = Path(__file__).resolve().parents[3]
ACCELERATE = REPO / "recipes" / "accelerate"
CLUSTER = REPO / "recipes" / "cluster"
NAMES = sorted(path.stem for path in ACCELERATE.iterdir())
AS_THEY_ARE = ("--fsdp_state_dict_type", "--parallelism_config_cp_comm_strategy")  # no words of YAML
ENVIRONMENT = {**os.environ, **OWN_PORT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = lines[lines[0].startswith("#!") :]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("# ") and line != "#")])


def validated(name: str, *options: str) -> Any:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = str(ACCELERATE / f"{name}.yaml")
    words = ["--config_file", file, *options, "-m", "instructft", "train", "quickstart"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def test_all_are_there_and_none_is_taken_for_a_recipe() -> None:
    assert set(NAMES) == {"single", "ddp", "fsdp2", "zero2", "zero3", "fp8", "multi_node", "fsdp2_context"}
    assert {path.name for path in CLUSTER.iterdir()} == {"slurm.sh", "kubernetes.yaml", "skypilot.yaml"}
    files = {path.relative_to(REPO / "recipes").parts[0] for path in (REPO / "recipes").rglob("*") if path.is_file()}
    assert files == {"accelerate", "cluster", *(path.name for path in shipped_recipes().values())}


@pytest.mark.parametrize("path", [*ACCELERATE.iterdir(), *CLUSTER.iterdir()], ids=lambda path: path.name)
def test_a_header_says_when_how_and_on_what(path: Path) -> None:
    said = header(path)
    for word in ["Launch:", "Hardware:", *(["Costs:"] if path.parent == ACCELERATE else ["Stopping:", "Tried:"])]:
        assert re.search(rf"^# {word} +\S", said, re.M), word
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert config.mixed_precision == "no"
    parser = launch_command_parser()
    for section, prefix in (("fsdp_config", "fsdp_"), ("deepspeed_config", ""), ("parallelism_config", "")):
        for key, value in getattr(config, section).items():
            # accelerate takes any key of a section without a word; as an option it is checked, and its value too
            option = f"--{key if key.startswith(prefix) else prefix + key}"
            parser.parse_args([option, str(value).lower() if option not in AS_THEY_ARE else value, "x"])
    args = validated(name)
    kinds = ("multi_gpu", "use_fsdp", "use_deepspeed")
    kind = {
        "single": None,
        "fsdp2": "use_fsdp",
        "fsdp2_context": "use_fsdp",
        "zero2": "use_deepspeed",
        "zero3": "use_deepspeed",
    }
    assert {key for key in kinds if getattr(args, key)} == {kind.get(name, "multi_gpu")} - {None}
    assert args.num_processes == {"single": 1, "multi_node": 16}.get(name, 2)
    assert validated(name, "--num_processes", "8").num_processes == 8


def test_what_fsdp2_comes_to() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
    from accelerate.utils.launch import prepare_multi_gpu_env

    environment = prepare_multi_gpu_env(validated("fsdp2"))
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert (environment["ACCELERATE_USE_FSDP"], plugin.fsdp_version) == ("true", 2)
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


def test_what_rows_that_are_divided_come_to() -> None:
    """The same as fsdp2, and who shares a row with whom."""
    from accelerate import ParallelismConfig
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import patch_environment
    from accelerate.utils.launch import prepare_multi_gpu_env

    from instructft.training.launch.context import context_size, options

    plain, divided = (load_config_from_file(str(ACCELERATE / f"{name}.yaml")) for name in ("fsdp2", "fsdp2_context"))
    assert (plain.fsdp_config, plain.parallelism_config) == (divided.fsdp_config, {})
    for more, size, groups in (([], 2, 1), (["--num_processes", "12", *options(4, 12)], 4, 3)):
        environment = prepare_multi_gpu_env(validated("fsdp2_context", *more))
        with patch_environment(**environment):
            config = ParallelismConfig()
        assert (config.cp_size, config.dp_shard_size, config.total_size) == (size, groups, size * groups)
        assert config.cp_handler.cp_comm_strategy == "allgather"
        assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
        assert context_size(environment) == size
    assert context_size(prepare_multi_gpu_env(validated("fsdp2"))) == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_what_zero_comes_to(stage: int) -> None:
    from accelerate.utils import DeepSpeedPlugin, patch_environment
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args = validated(f"zero{stage}")
    args.deepspeed_fields_from_accelerate_config = ""
    command, environment = prepare_deepspeed_cmd_env(args)
    assert command is None  # torch starts the processes, with no pdsh
    with patch_environment(**environment):
        config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config[key] == "auto", key  # the recipe says it


def test_several_machines_come_to_the_same_meeting_point() -> None:
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = validated("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.7")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert (args.rdzv_endpoint, args.rdzv_backend) == ("10.0.0.7:29500", "static")


def test_an_installed_wheel_finds_them(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPO, capture_output=True, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(installed)}

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "instructft", *words]
        return subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
        ).stdout

    line = said("launch", "quickstart", "train.use_cpu=true", "--processes", "2", "--dry-run")
    file = Path(shlex.split(line)[3])
    assert file == installed / "instructft" / "recipes" / "accelerate" / "ddp.yaml"
    assert file.read_bytes() == (ACCELERATE / "ddp.yaml").read_bytes()
    assert {row.split()[0] for row in said("recipes").splitlines()} == set(shipped_recipes())
