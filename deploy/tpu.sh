#!/usr/bin/env bash
# One cell, or all of a file of cells in turn, on a TPU of one's own: reserves it, installs, runs, deletes it, whatever
# happens. Where it is preempted it is reserved anew and goes on from the bucket.
#
#     NAME=me-cts PROJECT=my-project ZONE=us-east5-b TYPE=v6e-8 RUNTIME=v2-alpha-tpuv6e BUCKET=gs://me-cts \
#         COMMAND='python b5_cts.py --task gsm8k --seed 3' bash deploy/tpu.sh
#     CELLS=cells.txt ...                 # one command a line, in the place of COMMAND
#     MODEL=on-demand ...                 # spot (the default), on-demand or reserved
#     WORKERS=4 TYPE=v6e-16 ...           # hosts of the slice; several see the bucket as a folder
#     DRY_RUN=1 ...                       # every command in order; none is executed
#
# Needs gcloud, logged in, with the TPU and Storage APIs on. SECRETS: a file of mode 600 with lines NAME=value, which is
# copied to the machine; its content is never printed.
set -euo pipefail

MODEL=${MODEL:-spot}
WORKERS=${WORKERS:-1}
TRIES=${TRIES:-20}         # reservations, in all: stock-outs, failures and preemptions
WAIT=${WAIT:-60}           # seconds between two looks at the reservation, and before another one
PATIENCE=${PATIENCE:-6h}   # how long a reservation may wait in the queue
SECRETS=${SECRETS:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
    echo "error: $*" >&2
    exit 2
}

missing=()
for variable in NAME PROJECT ZONE TYPE RUNTIME BUCKET; do
    [[ -n ${!variable:-} ]] || missing+=("$variable")
done
[[ -n ${COMMAND:-} || -n ${CELLS:-} ]] || missing+=("COMMAND or CELLS")
((${#missing[@]} == 0)) || refuse "not set: ${missing[*]}; the head of deploy/tpu.sh has an example"
# shellcheck disable=SC2153 # they are set: the loop has just looked
[[ $BUCKET == gs://?* ]] || refuse "BUCKET=$BUCKET: give gs://NAME"
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || refuse "NAME=$NAME: lower-case letters, digits and hyphens"
[[ -z ${CELLS:-} || -r $CELLS ]] || refuse "CELLS=$CELLS cannot be read"
[[ -z $SECRETS || $(stat -Lc %a "$SECRETS" 2>/dev/null) =~ ^[46]00$ ]] ||
    refuse "SECRETS=$SECRETS is not there, or can be read by others; chmod 600 it"
case $MODEL in
    spot) tier=(--spot) ;;
    on-demand) tier=() ;;
    reserved) tier=(--reserved) ;;
    *) refuse "MODEL=$MODEL: spot, on-demand or reserved" ;;
esac
if [[ -n ${CELLS:-} ]]; then
    mapfile -t cells < <(grep -v '^[[:space:]]*$' "$CELLS")
else
    cells=("$COMMAND")
fi
((${#cells[@]})) || refuse "CELLS=$CELLS holds no command"
where=(--project="$PROJECT" --zone="$ZONE")
if ((WORKERS > 1)); then out=/tmp/cts-bucket/runs; else out=$BUCKET/runs; fi
package=${TMPDIR:-/tmp}/cts-$NAME.tgz

# ---- what is printed is what is called ----
exec 3>&1
show() {
    printf '+' >&3
    printf ' %q' "$@" >&3
    printf '\n' >&3
}

child=
run() { # a command for its effect; in the background, so that a signal is heard while it runs
    show "$@"
    [[ -z ${DRY_RUN:-} ]] || return 0
    "$@" </dev/null &
    child=$!
    local code=0
    wait "$child" || code=$?
    child=
    return "$code"
}

ask() { # ask ANSWER COMMAND...: what the command says; ANSWER if nothing is executed
    local answer=$1
    shift
    show "$@"
    if [[ -n ${DRY_RUN:-} ]]; then echo "$answer"; else "$@" </dev/null 2>&1; fi
}

pause() { [[ -n ${DRY_RUN:-} ]] || sleep "$WAIT"; }

# ---- the machine ----
state() {
    ask "$1" gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
}

created=
delete() {
    [[ -n $created ]] || return 0
    local try
    for try in 1 2 3; do
        if run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet; then
            created=
            return 0
        fi
        echo "deleting failed ($try of 3)" >&2
        ((try == 3)) || pause
    done
    echo "NOT DELETED, it goes on costing: gcloud compute tpus queued-resources delete $NAME ${where[*]} --force --quiet" >&2
    return 1
}

# shellcheck disable=SC2317,SC2329 # the trap reaches it
cleanup() {
    local code=$?
    trap - EXIT
    [[ -z $child ]] || kill "$child" 2>/dev/null || true
    rm -f "$package"
    trap '' INT TERM HUP # a second Ctrl-C is not to leave the machine behind
    delete || code=1
    exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

reserve() { # until it is ACTIVE; 1 where it is not to be had this time
    created=yes # before it is known: a create that fails halfway may have created
    run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${tier[@]}" --valid-until-duration="$PATIENCE" --async ||
        return 1
    local now
    while true; do
        now=$(state ACTIVE) || now=unknown
        case $now in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING) # of these none comes back
                echo "the reservation is $now" >&2
                return 1
                ;;
        esac
        pause
    done
}

on_all() { run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }

copy() { run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${where[@]}" --worker=all; }

install() {
    run tar -C "$here" --exclude=./.git --exclude=./runs --exclude=./data --exclude=./wandb -czf "$package" . || return 1
    copy "$package" /tmp/cts.tgz || return 1
    if [[ -n $SECRETS ]]; then
        on_all 'install -m 600 /dev/null /tmp/cts.env' || return 1
        copy "$SECRETS" /tmp/cts.env || return 1
        on_all 'chmod 600 /tmp/cts.env' || return 1
    fi
    on_all 'set -e; mkdir -p ~/cts; tar -C ~/cts -xzf /tmp/cts.tgz; pip install --user -q uv
~/.local/bin/uv venv -q --python 3.11 --clear ~/cts-venv
VIRTUAL_ENV=~/cts-venv ~/.local/bin/uv pip install -q -r ~/cts/requirements.txt -r ~/cts/deploy/buckets.txt "jax[tpu]==0.10.2"' ||
        return 1
    if ((WORKERS > 1)); then
        on_all "set -e; command -v gcsfuse >/dev/null || { echo 'gcsfuse is missing on this runtime' >&2; exit 1; }
mkdir -p /tmp/cts-bucket; mountpoint -q /tmp/cts-bucket || gcsfuse --implicit-dirs $(printf %q "${BUCKET#gs://}") /tmp/cts-bucket" ||
            return 1
    fi
}

# The exit codes of all workers, the worst one first; 143 where a worker does not say its own: it is gone.
cell() {
    local command=$1 log codes code said remote
    remote="cd ~/cts; COMMAND=$(printf %q "$command") OUT_DIR=$(printf %q "$out") VENV=~/cts-venv"
    [[ -z $SECRETS ]] || remote+=" SECRETS=/tmp/cts.env"
    remote+=' bash deploy/cell.sh; echo "cts-exit $?"'
    if [[ -n ${DRY_RUN:-} ]]; then
        on_all "$remote"
        return 0
    fi
    log=$(mktemp)
    exec 5> >(tee "$log")
    local copier=$!
    on_all "$remote" >&5 2>&1 || true
    exec 5>&-
    wait "$copier" || true
    mapfile -t codes < <(sed -n 's/^.*cts-exit \([0-9]*\).*$/\1/p' "$log" | sort -rnu)
    said=$(grep -c 'cts-exit [0-9]' "$log" || true)
    rm -f "$log"
    for code in "${codes[@]}"; do
        ((code == 0 || code == 143)) || return "$code"
    done
    ((said == WORKERS && ${codes[0]:-143} == 0)) || return 143
}

# ---- all of it ----
if before=$(state 'NOT_FOUND'); then
    [[ -n ${DRY_RUN:-} ]] ||
        refuse "$NAME is there already, and may be somebody's ($before): choose another NAME, or delete it"
elif [[ $before != *NOT_FOUND* && $before != *"not found"* ]]; then
    echo "error: gcloud does not say whether $NAME is there: $before" >&2
    exit 1
fi
next=0
for ((try = 1; try <= TRIES; try++)); do
    if reserve; then
        if install; then
            code=0
            while ((next < ${#cells[@]} && code == 0)); do
                cell "${cells[next]}" || code=$?
                ((code)) || ((++next))
            done
            if ((code == 0)); then
                delete
                [[ -n ${DRY_RUN:-} ]] || echo "done: results are in $BUCKET/runs"
                exit 0
            elif ((code != 143)); then
                echo "cell $((next + 1)) of ${#cells[@]} ended with $code: ${cells[next]}" >&2
                exit "$code"
            fi
            echo "cell $((next + 1)) of ${#cells[@]} was stopped; on with another machine" >&2
        elif [[ $(state ACTIVE) == ACTIVE ]]; then
            echo "error: the machine is there, but installing failed; see above" >&2
            exit 1
        fi
    fi
    delete
    pause
done
echo "given up after $TRIES reservations; the same command goes on from $BUCKET/runs" >&2
exit 143
