"""The recipes for Slurm, Kubernetes and SkyPilot start what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import OWN_PORT

REPO = Path(__file__).resolve().parents[3]
CLUSTER = REPO / "recipes" / "cluster"
ENVIRONMENT = {**os.environ, **OWN_PORT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


class Stage:
    """A PATH with stand-ins; `instructft` really prints its line, or ends with END where that is set."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.put("instructft", f'[ "$END" ] && exit "$END"; "{sys.executable}" -m instructft "$@" --dry-run >>"$LOG"')

    def put(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, command: list[str], **environment: str) -> tuple[int, list[str], str]:
        """(exit code, the lines that would have been run, stderr)"""
        log = self.folder / "log"
        log.write_text("")
        environment = {**ENVIRONMENT, "PATH": f"{self.bin}:{os.environ['PATH']}", "LOG": str(log), **environment}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, log.read_text().splitlines(), done.stderr


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_slurm_starts_one_launcher_a_node_and_queues_a_stopped_job_again(stage: Stage) -> None:
    script = str(CLUSTER / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    stage.put("scontrol", '[ "$1" = show ] && printf "n7\\nn8\\n" || echo "$@" >>requeued')
    stage.put("squeue", 'echo "$STATE"')
    # a task on each node, told which it is, like the real one
    loop = 'shift; code=0; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || code=$?; done; exit $code'
    stage.put("srun", loop)
    job = {"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "40123", "STATE": "RUNNING"}

    typed = ["bash", script, "quickstart", 'samples=["a b"]', "--strategy", "fsdp2", "--processes", "4"]
    code, lines, err = stage.run(typed, **job)
    assert code == 0, err
    for rank, line in enumerate(lines):
        assert "fsdp2.yaml --num_processes 8 --num_machines 2 " in line
        assert f"--machine_rank {rank} --main_process_ip n7 --main_process_port 20123 " in line
        assert line.endswith("""-m instructft train quickstart 'samples=["a b"]'""")
    assert len(lines) == 2
    assert not (stage.folder / "requeued").exists()

    assert stage.run(typed, **job, END="1")[0] == 1
    assert stage.run(typed, **{**job, "STATE": "COMPLETING"}, END="143")[0] == 143  # what scancel leaves
    assert not (stage.folder / "requeued").exists()
    assert stage.run(typed, **job, END="143")[0] == 143
    assert (stage.folder / "requeued").read_text() == "requeue 40123\n"
    code, lines, err = stage.run(["bash", script], **job)
    assert (code, lines) == (2, [])
    assert err.startswith(f"usage: sbatch {script} RECIPE")


def test_slurm_asks_for_what_its_script_needs() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", (CLUSTER / "slurm.sh").read_text(encoding="utf-8"), re.M))
    assert asked["ntasks-per-node"] == "1"
    assert re.fullmatch(r"TERM@\d{3}", asked["signal"])  # to the steps, not to the script
    assert {"requeue", "nodes", "gpus-per-node", "time"} <= set(asked)
    assert asked["open-mode"] == "append"


def test_kubernetes_tells_each_node_which_it_is(stage: Stage) -> None:
    claim, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert set(trainer) == {"image", "numNodes", "command", "args", "env", "resourcesPerNode"}
    # what the runtime sets on every node, as kubeflow/trainer's plugin for torch writes it
    given = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "instructft-node-0-0.instructft", "MASTER_PORT": "29400"}
    assert not any(variable["name"].startswith("PET_") for variable in trainer["env"])  # it refuses them
    words = [re.sub(r"\$\(PET_(\w+)\)", lambda found: given[found[1]], word) for word in trainer["args"]]
    code, lines, err = stage.run([*trainer["command"], *words, "--processes=8"])
    assert code == 0, err
    (line,) = lines
    assert "--num_processes 16 --num_machines 2 --machine_rank 1 " in line
    assert "--main_process_ip instructft-node-0-0.instructft --main_process_port 29400 " in line
    # the volume reaches the container of the runtime, and the run folder lies on it
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert (node["name"], container["name"]) == ("node", "node")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert f"output_dir={mount['mountPath']}/runs/tinyllama-lora" in trainer["args"]
    assert pod["terminationGracePeriodSeconds"] > 30


def test_skypilot_keeps_the_run_in_a_bucket(stage: Stage) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    known = {"name", "num_nodes", "resources", "envs", "secrets", "workdir", "file_mounts", "setup", "run"}
    assert set(task) == known
    assert set(task["resources"]) == {"accelerators", "use_spot", "disk_size"}
    (folder,) = task["file_mounts"]
    assert task["file_mounts"][folder]["mode"] == "MOUNT_CACHED"
    assert "constraints.txt ." in task["setup"]
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    (stage.folder / "instructft" / "bin").mkdir(parents=True)
    (stage.folder / "instructft" / "bin" / "activate").touch()
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.1.1.1\n10.1.1.2"}
    code, lines, err = stage.run(["bash", "-c", task["run"]], HOME=str(stage.folder), **task["envs"], **given)
    assert code == 0, err
    (line,) = lines
    assert "--num_machines 2 --machine_rank 1 --main_process_ip 10.1.1.1 " in line
    assert f"output_dir={folder}/{task['envs']['RECIPE']}" in line
