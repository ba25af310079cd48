#!/usr/bin/env bash
# A primary and its shadow as plain processes, with no supervisor: kill the one that serves, and watch the other take over on the same port.
#
#     examples/shadow_failover/run.sh [MODEL [PORT]] [-- ENGINE OPTION...]
#
# MODEL and PORT can be set in the environment too. It kills nobody while it runs. Ctrl-C ends what it started, and nothing else.
#
# For an engine whose ranks are on several nodes it is run on each of them, the same but for NODE_RANK:
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 SECRET=/etc/gms/secret examples/shadow_failover/run.sh MODEL PORT -- -tp 16
#
# SECRET is a file with the same content on all nodes: (umask 077; head -c 32 /dev/urandom | base64 > FILE). Clients come to node 0.
set -euo pipefail

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit "$1"
}

model=${MODEL:-Qwen/Qwen3-0.6B}
port=${PORT:-8000}
case "${1-}" in -h | --help) usage 0 ;; esac
if [ $# -gt 0 ] && [ "$1" != -- ]; then model=$1 && shift; fi
if [ $# -gt 0 ] && [ "$1" != -- ]; then port=$1 && shift; fi
if [ $# -gt 0 ] && [ "$1" != -- ]; then usage 2 >&2; fi
if [ $# -gt 0 ]; then shift; fi
options=("$@")

patience=${PATIENCE:-1800} # seconds for an engine to become what it is to be; the first one may have to load the model from a disk
nodes=${NNODES:-1} node=${NODE_RANK:-0}
logs=${LOGS:-$(mktemp -d -t shadow_failover.XXXXXX)}
mkdir -p "$logs"

groups=() # process groups that this script has started, the latest first: the shadow is ended before the primary, the server last

say() { printf '%s %s\n' "$(date +%T)" "$*"; }

fail() {
    say "$*" >&2
    exit 1
}

# Look at a process: sets `state` and `group`. It fails if there is no such process.
look_at() {
    local line='' fields
    { read -r -d '' line <"/proc/$1/stat"; } 2>/dev/null || true # to the end of the file: a process may have any name
    [ -n "$line" ] || return 1
    read -r -a fields <<<"${line##*) }"
    state=${fields[0]} group=${fields[2]}
}

look_at $$
own_group=$group

# Start a command in a session and process group of its own, and record the group, in `started` and in `groups`. Its output goes to the log.
start() {
    local log=$1 state group='' told=
    shift
    trap 'told=yes' INT TERM HUP # a signal waits until the group is recorded: else it would be left behind
    setsid -- "$@" >>"$log" 2>&1 </dev/null &
    started=$!
    # Until setsid(1) has run, the new process is in the group of this script, and that is never recorded.
    until [ "$group" = "$started" ]; do
        look_at "$started" || fail "$* could not be started; see $log"
    done
    groups=("$started" ${groups[@]+"${groups[@]}"})
    trap 'exit 0' INT TERM HUP
    [ -z "$told" ] || exit 0
}

# Whether any process of a group is there. Zombies do not count: whoever has to reap them may take its time.
group_lives() {
    local process state group
    for process in /proc/[0-9]*; do
        if look_at "${process#/proc/}" && [ "$group" = "$1" ] && [ "$state" != Z ]; then return 0; fi
    done
    return 1
}

# End a group that was recorded: politely, then by SIGKILL. Never this script's own, and never all processes (which -1 would be).
end_group() {
    local ended=$1 waited=0
    if ! [[ $ended =~ ^[0-9]+$ ]] || [ "$ended" -le 1 ] || [ "$ended" = "$own_group" ]; then return; fi
    group_lives "$ended" || return 0
    # Its first process knows best in which order the others end; if that is gone, all of them are asked.
    kill -TERM "$ended" 2>/dev/null || kill -TERM -- "-$ended" 2>/dev/null || true
    while group_lives "$ended"; do
        if [ "$waited" -eq 150 ]; then kill -KILL -- "-$ended" 2>/dev/null || true; fi
        [ "$waited" -lt 300 ] || { say "process group $ended does not end" && return; }
        sleep 0.2
        waited=$((waited + 1))
    done
}

clean_up() {
    trap '' INT TERM HUP
    say "ending what was started here"
    local recorded
    for recorded in ${groups[@]+"${groups[@]}"}; do end_group "$recorded"; done
    say "logs are in $logs"
}
trap clean_up EXIT
trap 'exit 0' INT TERM HUP

# Role of a living engine as the servers know it; nothing if it has not joined one.
role_of() { gms failover status -o lines 2>/dev/null | awk -F '\t' -v name="$1" '$1 == name && $3 == "alive" { print $2 }'; }

# Wait until an engine has a role. Its state decides, not the time: it fails at once if the engine has ended.
wait_for_role() {
    local name=$1 engine=$2 wanted=$3 deadline=$((SECONDS + patience)) role=
    until [ "$role" = "$wanted" ]; do
        group_lives "$engine" || fail "$name has ended; see $logs/$name.log"
        [ "$SECONDS" -lt "$deadline" ] || fail "$name is still '${role:-starting}' after $patience s; see $logs/$name.log"
        sleep 0.2
        role=$(role_of "$name" || true) # a server that does not answer for a moment is no reason to end
    done
    say "$name is $wanted (process group $engine)"
}

# The failover block of an engine; its nodes meet at a port of its own.
block_of() {
    local number=$1
    if [ "$nodes" -eq 1 ]; then
        printf '%s' "${GMS_FAILOVER:-{\}}"
    else
        python3 -c 'import json, sys; print(json.dumps({**json.loads(sys.argv[1]), "nodes": {"secret_file": sys.argv[2], "port": int(sys.argv[3])}}))' \
            "${GMS_FAILOVER:-{\}}" "$SECRET" "$((${AGENTS_PORT:-29600} + number))"
    fi
}

start_engine() {
    local number=$1 name=engine-$1 block place=()
    block=$(block_of "$number")
    if [ "$nodes" -gt 1 ]; then
        place=(--nnodes "$nodes" --node-rank "$node" --master-addr "$MASTER_ADDR" --master-port "$((${MASTER_PORT:-29500} + number))")
        [ "$node" -eq 0 ] || place+=(--headless)
    fi
    start "$logs/$name.log" env GMS_ENGINE="$name" GMS_FAILOVER="$block" \
        vllm serve "$model" --load-format gms --port "$port" ${place[@]+"${place[@]}"} ${options[@]+"${options[@]}"}
    say "$name starts (process group $started); its log is $logs/$name.log"
}

command -v gms >/dev/null || fail "gms is not installed here"
command -v vllm >/dev/null || fail "vllm is not installed here"
if [ "$nodes" -gt 1 ]; then
    [ -n "${MASTER_ADDR-}" ] || fail "NNODES=$nodes needs MASTER_ADDR, the address of node 0"
    [ -n "${SECRET-}" ] || fail "NNODES=$nodes needs SECRET, a file that all nodes have"
fi

if gms status >/dev/null 2>&1; then
    say "using the server that runs"
else
    start "$logs/server.log" gms serve --device "${DEVICE:-all}"
    server=$started
    until gms status >/dev/null 2>&1; do
        group_lives "$server" || fail "the server has ended: $(tail -n 2 "$logs/server.log")"
        sleep 0.1
    done
    say "started a server (process group $server)"
fi

start_engine 0
primary=$started
wait_for_role engine-0 "$primary" primary
start_engine 1
shadow=$started
wait_for_role engine-1 "$shadow" standby

cat <<TEXT

engine-0 serves on port $port, engine-1 stands by on the same port. Ask:

    curl -s ${MASTER_ADDR:-localhost}:$port/v1/models

Kill all of engine-0 and ask again; or kill only some of its processes, which comes to the same:

    kill -KILL -- -$primary

Who serves now:

    gms failover status

Nobody starts the dead one again: that is what gms run does. Ctrl-C ends everything.

TEXT

# From here on only look, and tell each change.
before=
while true; do
    now=$(gms failover status -o lines 2>/dev/null | awk -F '\t' '{ printf "%s%s %s", (NR > 1 ? ", " : ""), $1, $2 }' || true)
    if [ "$now" != "$before" ]; then say "engines: ${now:-none}" && before=$now; fi
    living=()
    for recorded in ${groups[@]+"${groups[@]}"}; do
        if group_lives "$recorded"; then living+=("$recorded"); fi
    done
    groups=(${living[@]+"${living[@]}"}) # a number that is free again may become somebody else's
    case " ${groups[*]-} " in *" $primary "* | *" $shadow "*) ;; *) fail "both engines have ended" ;; esac
    sleep 0.5
done
