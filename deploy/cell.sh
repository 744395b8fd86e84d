#!/usr/bin/env bash
# Runs one cell: one command of this repository, alike on every machine. All launchers of this folder end here.
#
#     COMMAND='python b3_grpo_verifier.py --task gsm8k --seed 3' bash deploy/cell.sh
#     CELLS=cells.txt CELL=3 bash deploy/cell.sh        # line 3 of a file with one command a line
#
# A command is words, quoted as for a shell, after NAME=value where need be; of it no pipe and no second command is made.
# A script b?_*.py is given, where its command lacks them: --resume, so that a restart goes on; OUT_DIR as --out_dir; and
# --hosts on several nodes of SkyPilot or Vertex. VENV is a virtual environment to run in, SCRATCH a folder for temporary
# files, which is made, SECRETS a file of mode 600 with lines NAME=value, taken as they are: quotes belong to the value.
# DRY_RUN=1 prints the command and runs nothing.
# The exit code is the command's: 0 done, 2 bad input, 143 stopped with a checkpoint and to be started again.
set -euo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

has() { [[ " $COMMAND " =~ [[:space:]]--$1([[:space:]]|=) ]]; }

# ADDRESS:PORT,COUNT,INDEX of this node, where it is one of several and JAX does not find the others by itself
hosts() {
    if ((${SKYPILOT_NUM_NODES:-1} > 1)) && ! compgen -G '/dev/accel*' >/dev/null &&
        ! compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
        echo "${SKYPILOT_NODE_IPS%%$'\n'*}:${PORT:-8476},$SKYPILOT_NUM_NODES,$SKYPILOT_NODE_RANK"
    elif [[ -n ${CLUSTER_SPEC:-} ]]; then
        python3 -c '
import json, os
spec = json.loads(os.environ["CLUSTER_SPEC"])
pools, task = spec["cluster"], spec["task"]
nodes = [(pool, i) for pool in sorted(pools) for i in range(len(pools[pool]))]
if len(nodes) > 1:
    print(pools["workerpool0"][0], len(nodes), nodes.index((task["type"], task["index"])), sep=",")'
    fi
}

if [[ -n ${CELLS:-} ]]; then
    [[ -r $CELLS ]] || refuse "CELLS=$CELLS cannot be read; give a file with one command a line"
    [[ ${CELL:-} =~ ^[1-9][0-9]*$ ]] || refuse "CELL=${CELL:-}: give the number of a line of $CELLS"
    COMMAND=$(sed -n "${CELL}p" "$CELLS")
    [[ -n $COMMAND ]] || refuse "CELL=$CELL: $CELLS has no such line"
    if [[ $COMMAND =~ ^[[:space:]]*# ]]; then
        echo "line $CELL of $CELLS is a comment: nothing to run" >&2
        exit 0
    fi
fi
[[ -n ${COMMAND:-} ]] || refuse "COMMAND is not set; give a command, or CELLS and CELL"
COMMAND=${COMMAND#"${COMMAND%%[![:space:]]*}"}
COMMAND=${COMMAND%"${COMMAND##*[![:space:]]}"}
[[ $COMMAND != *$'\n'* ]] || refuse "COMMAND has several lines; give one command, or a file as CELLS"
bare=$(sed -E "s/\\\\.|'[^']*'|\"(\\\\.|[^\"\\\\])*\"/%/g" <<<"$COMMAND") # without what is quoted
[[ ! $bare =~ [\;\&\|\<\>\(\)\`\'\"]|(^|[[:space:]])# ]] ||
    refuse "COMMAND has an unquoted ${BASH_REMATCH[0]#[[:space:]]}; give one command, its arguments quoted: $COMMAND"
[[ $bare != *'$%'* ]] || refuse "COMMAND has a \$ before a quote, which only bash reads; write plain quotes: $COMMAND"
# what is unquoted or in "": of all that a shell expands there, $NAME and ${NAME} alone run nothing
bare=$(sed -E "s/\\\\.|'[^']*'|(\"(\\\\.|[^\"\\\\])*\")/_\1/g; s/\\\\.|\\$\{[A-Za-z_][A-Za-z0-9_]*\}/_/g" <<<"$COMMAND")
[[ ! $bare =~ \$[\(\[\{]|\` ]] ||
    refuse "COMMAND has a ${BASH_REMATCH[0]}, which may run something; write it in single quotes: $COMMAND"

if [[ $COMMAND =~ (^|[[:space:]/])b[0-9]+_[a-z0-9_]+\.py([[:space:]]|$) ]]; then
    has resume || COMMAND+=" --resume"
    [[ -z ${OUT_DIR:-} ]] || has 'out[_-]dir' || COMMAND+=" --out_dir $(printf %q "$OUT_DIR")"
    here=$(hosts)
    [[ -z $here ]] || has hosts || COMMAND+=" --hosts $here"
fi

# under Slurm JAX takes one GPU a task; a task that has its node alone takes all of them
if ((${SLURM_STEP_NUM_TASKS:-1} > 1)) && [[ -n ${SLURM_GPUS_ON_NODE:-} && ${SLURM_STEP_TASKS_PER_NODE%%(*} == 1 ]]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
fi

set -f +u # no names of files, and a variable that is not set is empty, as for a shell
eval "set -- $COMMAND"
set +f -u
program=
for word; do
    [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || { program=$word && break; }
done
[[ -n $program && $program != -* ]] || refuse "COMMAND names no program to run"

if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "$COMMAND"
    exit 0
fi
if [[ -n ${SECRETS:-} ]]; then
    [[ -r $SECRETS ]] || refuse "SECRETS=$SECRETS cannot be read; give a file with lines NAME=value"
    [[ $(stat -Lc %a "$SECRETS") =~ ^[46]00$ ]] || refuse "SECRETS=$SECRETS can be read by others; chmod 600 it"
    number=0
    while IFS= read -r line || [[ -n $line ]]; do # as docker --env-file reads them: nothing is unquoted or expanded
        ((++number))
        line=${line%$'\r'}
        [[ -n $line && $line != \#* ]] || continue
        [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "SECRETS=$SECRETS: line $number is not NAME=value"
        # shellcheck disable=SC2163
        export "$line" 2>/dev/null || refuse "SECRETS=$SECRETS: line $number cannot be set"
    done <"$SECRETS"
fi
if [[ -n ${SCRATCH:-} ]]; then
    mkdir -p "$SCRATCH" || refuse "SCRATCH=$SCRATCH cannot be made"
    export TMPDIR=$SCRATCH
fi
if [[ -n ${VENV:-} ]]; then
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CTS_LAUNCHER=cell.sh # by which a run begins that is not there yet, whatever other runs are unfinished
echo "cell: $COMMAND" >&2
exec env "$@" # the command takes this process's place, and so its signals
