#!/usr/bin/env bash
# Stands in for a program under whose name it lies on PATH: records its call in the file CALLS as a launcher prints it,
# and does what the first line of the file RULES says that fits: PATTERN|TIMES|EXIT CODE|OUTPUT (TIMES 0: always).
# OUTPUT goes to stderr where it fails.
call="+ ${0##*/}$(printf ' %q' "$@")"
printf '%s\n' "$call" >>"$CALLS"
number=0
while IFS='|' read -r pattern times code output; do
    ((++number))
    [[ $call == *"$pattern"* ]] || continue
    used=$(grep -c "^$number\$" "$CALLS.used" 2>/dev/null)
    ((times == 0 || used < times)) || continue
    echo "$number" >>"$CALLS.used"
    [[ $code == 0 || -z $output ]] || printf '%b\n' "$output" >&2
    [[ $code != 0 || -z $output ]] || printf '%b\n' "$output"
    [[ $code != hang ]] || exec sleep 600
    exit "$code"
done <"$RULES"
exit 0
