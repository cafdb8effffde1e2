# Settings of your cluster, in one place. `train.sbatch` reads this file on each job's first node. The settings of `sbatch`
# must be in the shell that submits: source experiments/cluster/site.sh, and then sbatch ...

# Where jobs go. sbatch and `flextok sweep` take every option of sbatch from SBATCH_<OPTION>.
# export SBATCH_ACCOUNT=project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal

# Modules, and a virtual environment if yours is not .venv.
# module load cuda/12.8
# source /path/to/venv/bin/activate

# The network interface between nodes, and how much NCCL logs.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

# A container: the words before `flextok`, on each node.
# inside=(apptainer exec --nv --bind "$PWD" /path/to/flextok.sif)
