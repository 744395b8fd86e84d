#!/usr/bin/env bash
# Builds deploy/Dockerfile without Docker and without its registry, and runs the README's first command in the image as
# its user, who is not root. Needs Debian's packages buildah, crun and mmdebstrap, and root; takes 10 to 20 minutes.
#
#     bash tests/image.sh [FOLDER FOR WHAT IS MADE]
#
# The base is made from Debian's packages in the place of the pinned one. Where pip has a certificate of its own
# (PIP_CERT), the base is told of it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot # as a user without privileges would, and in a container

[[ -f $work/base.tar ]] || mmdebstrap --variant=minbase bookworm "$work/base.tar"
base=$(buildah from scratch)
buildah add -q "$base" "$work/base.tar" /
if [[ -n ${PIP_CERT:-} ]]; then
    printf '[global]\ncert = /etc/pip.crt\n' >"$work/pip.conf"
    buildah copy -q "$base" "$PIP_CERT" /etc/pip.crt
    buildah copy -q "$base" "$work/pip.conf" /etc/pip.conf
fi
buildah commit -q --rm "$base" localhost/cts-base
buildah bud --build-arg BASE=localhost/cts-base -f "$here/deploy/Dockerfile" -t localhost/cts:cpu "$here"

image=$(buildah from localhost/cts:cpu)
trap 'buildah rm "$image" >/dev/null' EXIT
inside() { buildah run --user cts --workingdir /app "$image" -- "$@"; }
inside id -un
inside python -c 'from common.sandbox import Sandbox, check_sandbox
check_sandbox()
for kind in ("namespaces", "namespaces-user", "landlock"):
    try:
        Sandbox(kind).close()
        print(f"programs of code tasks: {kind} works")
    except Exception as e:
        print(f"programs of code tasks: {kind} does not: {e}")'
# the entry point as it stands in the Dockerfile, on the README's first command with fewer steps
inside tini -g -- bash -c "COMMAND=\${COMMAND:-\$*} exec bash deploy/cell.sh" cell \
    'python b5_cts.py --steps 3 --eval_problems 16 --wandb disabled'
code=0
inside tini -g -- bash -c "COMMAND=\${COMMAND:-\$*} exec bash deploy/cell.sh" cell \
    'python b5_cts.py --steps 0' || code=$?
[[ $code == 2 ]] || {
    echo "bad input ended with $code" >&2
    exit 1
}
echo "the image works"
