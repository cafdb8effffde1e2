# What is particular to a cluster, in one place. `train.sbatch` reads this file on each job's first node; what `sbatch` itself
# needs is read by the shell that submits: source experiments/cluster/site.sh, and then sbatch ...

# Where jobs go. sbatch, and with it `flextok sweep`, takes any of its options from SBATCH_<OPTION>.
# export SBATCH_ACCOUNT=project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal

# What a node needs to know before it trains: modules, and a virtual environment if it is not .venv.
# module load cuda/12.8
# source /path/to/venv/bin/activate

# The network between nodes: which interface, and what NCCL says about it.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

# A container: the words before `flextok`, on each node.
# inside=(apptainer exec --nv --bind "$PWD" /path/to/flextok.sif)
