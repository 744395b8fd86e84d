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
# Needs gcloud, logged in, with the TPU and Storage APIs on. What goes to the machine is what git tracks here, as it
# stands now. SECRETS: a file of mode 600 with lines NAME=value, which is copied there; its content is never printed.
set -euo pipefail

MODEL=${MODEL:-spot}
WORKERS=${WORKERS:-1}
TRIES=${TRIES:-20}         # reservations, in all: stock-outs, failures and preemptions
WAIT=${WAIT:-60}           # seconds between two looks at the reservation (0: none while a cell runs), and to another one
PATIENCE=${PATIENCE:-6h}   # how long a reservation may wait in the queue
SECRETS=${SECRETS:-}
LOOKS=10                   # unanswered in a row: then somebody has to look at gcloud
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
began=$PWD

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
[[ $BUCKET =~ ^gs://[a-z0-9][a-z0-9._-]*$ ]] || refuse "BUCKET=$BUCKET: give gs://NAME, without a path"
[[ $WORKERS =~ ^[1-9][0-9]*$ && $TRIES =~ ^[1-9][0-9]*$ && $WAIT =~ ^(0|[1-9][0-9]*)$ ]] ||
    refuse "WORKERS=$WORKERS TRIES=$TRIES WAIT=$WAIT: give whole numbers, the first two from 1"
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
    mapfile -t cells < <(grep -Ev '^[[:space:]]*(#|$)' "$CELLS")
else
    cells=("$COMMAND")
fi
((${#cells[@]})) || refuse "CELLS=$CELLS holds no command"
for command in "${cells[@]}"; do # what a worker would refuse is refused before it costs anything
    env -u CELLS -u SECRETS DRY_RUN=1 COMMAND="$command" bash "$here/deploy/cell.sh" >/dev/null || exit 2
done
[[ -n ${DRY_RUN:-} ]] || type -P gcloud >/dev/null || refuse "gcloud is not on PATH"
[[ -z $SECRETS ]] || SECRETS=$(realpath "$SECRETS")
where=(--project="$PROJECT" --zone="$ZONE")
if ((WORKERS > 1)); then out=/tmp/cts-bucket/runs; else out=$BUCKET/runs; fi

# ---- what is printed is what is called ----
exec 3>&1
show() {
    printf '+' >&3
    printf ' %q' "$@" >&3
    printf '\n' >&3
}

start() { # a command in the background; the files of calls lie in the folder that we are in
    show "$@"
    if [[ -z ${DRY_RUN:-} ]]; then "$@" </dev/null & fi
}

run() { # to its end; a signal is heard while it runs, as it would not be in the foreground
    start "$@"
    [[ -n ${DRY_RUN:-} ]] || wait $!
}

pause() {
    [[ -z ${DRY_RUN:-} ]] || return 0
    sleep "$WAIT" &
    wait $!
}

end() { # a process and its children, as the ssh of gcloud
    local children
    mapfile -t children < <(pgrep -P "$1" 2>/dev/null)
    kill "$1" "${children[@]}" 2>/dev/null || true
}

# ---- the machine ----
is_gone() { LC_ALL=C grep -qiE 'NOT_FOUND|not found' said; }

look() { # the reservation's state in `now`; 1 where gcloud does not tell, and `said` has why
    now=ACTIVE # what a dry run goes on with
    if run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' \
        >answer 2>said; then
        [[ -n ${DRY_RUN:-} ]] || now=$(<answer)
    else
        is_gone || return 1
        now=NOT_FOUND
    fi
}

look_again() { # until gcloud tells
    local failed=0
    until look; do
        if ((++failed == LOOKS)); then
            echo "error: gcloud does not say whether $NAME is there: $(<said)" >&2
            exit 1
        fi
        pause
    done
}

created=
delete() {
    [[ -n $created ]] || return 0
    local try
    for try in 1 2 3; do
        # its output goes to a file: a terminal that is gone is not to end it
        if run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet >said 2>&1 ||
            { is_gone && look && [[ $now == NOT_FOUND ]]; }; then
            created=
            [[ -n ${DRY_RUN:-} ]] || rm -f "$began/$NAME.not-deleted" # of a try before
            return 0
        fi
        cat said >&2 || true
        echo "deleting failed ($try of 3)" >&2
        ((try == 3)) || pause
    done
    # whoever reads may be gone as well
    echo "NOT DELETED, it goes on costing: gcloud compute tpus queued-resources delete $NAME ${where[*]} --force --quiet" |
        tee "$began/$NAME.not-deleted" >&2
    return 1
}

work=
# shellcheck disable=SC2317,SC2329 # the traps reach them
cleanup() { # whoever reads the output may be gone, and a second Ctrl-C is not to leave the machine behind
    trap '' INT TERM HUP PIPE
    set +e
    local code=$1 child
    for child in $(jobs -p); do end "$child"; done
    delete || code=1
    cd / && rm -rf "$work"
    trap - EXIT
    exit "$code"
}
# shellcheck disable=SC2317,SC2329
stop() {
    trap '' INT TERM HUP PIPE
    exit "$1"
}
trap 'cleanup $?' EXIT
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
trap 'stop 141' PIPE
work=$(mktemp -d "${TMPDIR:-/tmp}/cts.XXXXXX")
cd "$work"

reserve() { # until it is ACTIVE; 1 where it is not to be had this time
    local code=0 lost=0
    created=yes # before it is known: a create that fails halfway may have created
    run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${tier[@]}" --valid-until-duration="$PATIENCE" --async \
        2>said || code=$?
    cat said >&2
    if ((code)) && LC_ALL=C grep -qiE 'ALREADY_EXISTS|already exists' said; then
        created=
        refuse "$NAME was created by somebody else meanwhile, and is left alone: choose another NAME, or delete it"
    fi
    ((code == 0)) || return 1
    while true; do
        look_again
        case $now in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING) lost=3 ;; # of these none comes back
            NOT_FOUND) ((++lost)) ;;                              # right after its creation it may be
            *) lost=0 ;;
        esac
        if ((lost == 3)); then
            echo "the reservation is $now" >&2
            return 1
        fi
        pause
    done
}

on_all() { # run or start
    "$1" gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$2" -- -o ServerAliveInterval=30
}

copy() { run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${where[@]}" --worker=all; }

pack() {
    run git -C "$here" ls-files -z >files || true
    [[ -n ${DRY_RUN:-} || -s files ]] || refuse "$here is not a checkout of git, which says what to copy"
    run tar --ignore-failed-read --null -C "$here" -T files -czf cts.tgz
}

install() {
    copy cts.tgz /tmp/cts.tgz || return 1
    if [[ -n $SECRETS ]]; then
        on_all run 'install -m 600 /dev/null /tmp/cts.env' || return 1
        copy "$SECRETS" /tmp/cts.env || return 1
        on_all run 'chmod 600 /tmp/cts.env' || return 1
    fi
    on_all run 'set -e; mkdir -p ~/cts; tar -C ~/cts -xzf /tmp/cts.tgz; pip install --user -q uv
~/.local/bin/uv venv -q --python 3.11 --clear ~/cts-venv
VIRTUAL_ENV=~/cts-venv ~/.local/bin/uv pip install -q -r ~/cts/requirements.txt -r ~/cts/deploy/buckets.txt "jax[tpu]==0.10.2"' ||
        return 1
    if ((WORKERS > 1)); then
        on_all run "set -e; command -v gcsfuse >/dev/null || { echo 'gcsfuse is missing on this runtime' >&2; exit 1; }
mkdir -p /tmp/cts-bucket; mountpoint -q /tmp/cts-bucket || gcsfuse --implicit-dirs $(printf %q "${BUCKET#gs://}") /tmp/cts-bucket" ||
            return 1
    fi
}

watch() { # beside a cell: ends the process $1, which may hang, where the machine is gone
    ((WAIT)) || return 0
    while sleep "$WAIT"; do
        if look && [[ $now != ACTIVE ]]; then
            echo "the machine is $now" >>log
            end "$1"
            return
        fi
    done
}

# The exit codes of all workers, the worst one first; 143 where a worker does not say its own: it is gone.
cell() {
    local command=$1 codes code said remote ssh=0
    remote="cd ~/cts; COMMAND=$(printf %q "$command") OUT_DIR=$(printf %q "$out") VENV=~/cts-venv"
    [[ -z $SECRETS ]] || remote+=" SECRETS=/tmp/cts.env"
    remote+=' bash deploy/cell.sh; echo "cts-exit $?"'
    on_all start "$remote" >log 2>&1
    [[ -z ${DRY_RUN:-} ]] || return 0
    local going=$! follower watcher
    tail -n +1 -f -s 0.2 --pid="$going" log &
    follower=$!
    watch "$going" >/dev/null 2>&1 3>&1 &
    watcher=$!
    wait "$going" || ssh=$?
    end "$watcher"
    wait "$follower" || true
    mapfile -t codes < <(LC_ALL=C sed -n 's/^.*cts-exit \([0-9]*\).*$/\1/p' log | sort -rnu)
    said=$(LC_ALL=C grep -ac 'cts-exit [0-9]' log || true)
    for code in "${codes[@]}"; do
        ((code == 0 || code == 143)) || return "$code"
    done
    ((${codes[0]:-143} == 0)) || return 143
    ((said == WORKERS || ssh)) || refuse "$TYPE has $said hosts, all of which have ended with 0: give WORKERS=$said"
    ((said == WORKERS)) || return 143
}

send_rest() { # what a run could not send to its bucket, which it has said, before its disk is deleted
    local rest
    # shellcheck disable=SC2016
    rest=$(LC_ALL=C sed -n 's/^.*`\(python -m common\.buckets [^`]*\)` sends it.*$/\1/p' log | tail -n 1)
    [[ -z $rest ]] || on_all run "cd ~/cts && . ~/cts-venv/bin/activate && $rest </dev/null" ||
        echo "not all is in the bucket, and the disk that has it goes" >&2
}

# ---- all of it ----
if ! look; then
    echo "error: gcloud does not say whether $NAME is there: $(<said)" >&2
    exit 1
fi
[[ -n ${DRY_RUN:-} || $now == NOT_FOUND ]] ||
    refuse "$NAME is there already, and may be somebody's ($now): choose another NAME, or delete it"
pack
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
                ((code != 1)) || send_rest
                exit "$code"
            fi
            echo "cell $((next + 1)) of ${#cells[@]} was stopped; on with another machine" >&2
        else
            look_again
            if [[ $now == ACTIVE ]]; then
                echo "error: the machine is there, but installing failed; see above" >&2
                exit 1
            fi
        fi
    fi
    delete
    pause
done
echo "given up after $TRIES reservations; the same command goes on from $BUCKET/runs" >&2
exit 143
