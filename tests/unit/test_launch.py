"""Who starts the processes of a training, and how many samples they take to a step."""

import pytest

from flextok_pl.runtime.launch import Launch, devices_per_node, require_processes

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "run", "SLURM_NTASKS": "8"}
SRUN = {**SBATCH, "SLURM_STEP_NUM_TASKS": "8"}
BY_HAND = {"MASTER_ADDR": "a", "NODE_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "num_nodes", "devices"),
    [
        ({}, 1, 8),
        ({}, 1, None),
        (TORCHRUN, 1, 8),
        (TORCHRUN, 2, 4),
        (TORCHRUN, 2, None),
        (SRUN, 8, 1),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, 1, 2),
        (BY_HAND, 2, 4),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, 2),
    ],
)
def test_what_can_start(environment: dict[str, str], num_nodes: int, devices: int | None) -> None:
    require_processes(num_nodes, devices, environment)


@pytest.mark.parametrize(
    ("environment", "num_nodes", "devices", "message"),
    [
        ({}, 2, 8, "trainer.num_nodes=2, but no launcher has started .* give --trainer.num_nodes 1"),
        ({"MASTER_ADDR": "a"}, 2, 8, "no launcher has started"),
        ({**SRUN, "SLURM_JOB_NAME": "interactive"}, 2, 8, "no launcher has started"),
        (TORCHRUN, 2, 8, r"num_nodes=2 x trainer.devices=8 needs 16 processes, but torchrun has started 8: "),
        (TORCHRUN, 1, 1, "needs 1 processes, but torchrun has started 8"),
        (TORCHRUN, 16, None, "trainer.num_nodes=16 needs 16 processes, but torchrun has started 8"),
        (SRUN, 2, 8, "needs 16 processes, but srun has started 8"),
        (SBATCH, 1, 8, r"needs 8 processes, but Slurm \(without srun\) has started 1"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, 4, "needs 4 processes, but the launcher has started 2"),
    ],
)
def test_what_would_wait_for_ever(
    environment: dict[str, str], num_nodes: int, devices: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_processes(num_nodes, devices, environment)


def test_the_global_batch() -> None:
    launch = Launch(num_nodes=2, devices=8, batch_size=64, accumulate=1)
    assert str(launch) == "global batch 1024 = batch_size 64 x 8 devices x 2 nodes x 1 accumulated"
    for stated in (None, 1024):
        launch.require_global_batch(stated)
    Launch(1, None, 64, 1).require_global_batch(2048)  # devices: auto is looked at again when they are known


@pytest.mark.parametrize(
    ("launch", "remedy"),
    [
        (Launch(1, 8, 64, 1), "give --trainer.accumulate_grad_batches 4"),
        (Launch(8, 8, 64, 1), "give --data.batch_size 32 --trainer.accumulate_grad_batches 1"),
        (Launch(1, 8, 48, 1), "give --data.batch_size 32 --trainer.accumulate_grad_batches 8"),
        (Launch(1, 3, 64, 1), "3 processes cannot share it evenly: take a number of them that divides it"),
    ],
)
def test_another_global_batch_is_refused(launch: Launch, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"global_batch_size=2048, but this is global batch .*: {remedy}; or change"):
        launch.require_global_batch(2048)


@pytest.mark.parametrize(
    ("devices", "number"), [("auto", None), (-1, None), ("-1", None), (8, 8), ("8", 8), ("0,1", 2), ([1, 3], 2)]
)
def test_devices_of_a_node(devices: int | str | list[int], number: int | None) -> None:
    assert devices_per_node(devices) == number
