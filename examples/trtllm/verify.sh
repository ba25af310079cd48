#!/usr/bin/env bash
# The whole story with a TensorRT-LLM that is installed: writer, reader, sleep, shadow, kill. A line for each part: PASS, FAIL or SKIP.
#
#     examples/trtllm/verify.sh MODEL [RANKS [PORT]] [-- OPTION...]
#
# MODEL is a folder or a name; OPTIONs are further ones of gms-trtllm-serve. It starts a GMS server of its own, in a directory of its own, and ends all
# that it has started. The exit code is 1 if a part has failed. What the engines say is in the directory that it names at the end. The environment may
# have PATIENCE (seconds for an engine to come up), PYTHON, LOGS (a directory) and DEVICE (what the server serves; all GPUs otherwise).
# shellcheck disable=SC2329 # functions are handed to others by their names
set -uo pipefail

usage() {
    sed -n '2,/^# shellcheck /s/^# \{0,1\}//p' "$0" | sed '$d'
    exit "$1"
}

case "${1-}" in -h | --help) usage 0 ;; '' | --*) usage 2 >&2 ;; esac
model=$1 ranks=1 port=8000
shift
if [ $# -gt 0 ] && [ "$1" != -- ]; then ranks=$1 && shift; fi
if [ $# -gt 0 ] && [ "$1" != -- ]; then port=$1 && shift; fi
if [ $# -gt 0 ] && [ "$1" != -- ]; then usage 2 >&2; fi
if [ $# -gt 0 ]; then shift; fi
options=("$@")

here=$(cd "$(dirname "$0")" && pwd)
patience=${PATIENCE:-1800}
python=${PYTHON:-python3}
logs=${LOGS:-$(mktemp -d -t gms-verify.XXXXXX)}
mkdir -p "$logs"
runtime=$(mktemp -d -t gms.XXXXXX)
export GMS_RUNTIME_DIR=$runtime TLLM_LOG_LEVEL=${TLLM_LOG_LEVEL:-INFO} # in every rank
failed=0
groups=()

verdict() { # verdict PASS|FAIL|SKIP WHAT [WHY]
    printf '%-4s  %s%s\n' "$1" "$2" "${3:+: $3}"
    if [ "$1" = FAIL ]; then failed=1; fi
}

part() { # part WHAT COMMAND...: PASS if it works
    local what=$1
    shift
    if "$@" >>"$logs/verify.log" 2>&1; then verdict PASS "$what"; else verdict FAIL "$what"; fi
}

start() { # start LOG COMMAND...: in a session of its own; sets `started`
    local log=$logs/$1.log
    shift
    setsid -- "$@" >>"$log" 2>&1 </dev/null &
    started=$!
    groups+=("$started")
}

end_all() {
    local group
    for group in ${groups[@]+"${groups[@]}"}; do kill -TERM -- "-$group" 2>/dev/null; done
    for group in ${groups[@]+"${groups[@]}"}; do
        for _ in $(seq 600); do
            kill -0 -- "-$group" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$group" 2>/dev/null
    done
    rm -rf "$runtime"
    printf 'the logs are in %s\n' "$logs"
}
trap 'exit 130' INT TERM HUP
trap end_all EXIT

engine() { # engine NAME [OPTION...]
    local name=$1
    shift
    start "$name" env GMS_ENGINE="$name" gms-trtllm-serve "$model" --host 127.0.0.1 --port "$port" --tp_size "$ranks" --load-format gms ${options[@]+"${options[@]}"} "$@"
}

answer() { # the engine's answer to a request, once it can be reached
    "$python" "$here/ask.py" "$port" "$patience"
}

until_true() { # until_true COMMAND...
    local end=$((SECONDS + patience))
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}

has_role() { [ "$(gms failover status -o lines | awk -F '\t' -v name="$1" '$1 == name {print $2}')" = "$2" ]; }

is_gone() { ! kill -0 -- "-$1" 2>/dev/null; }

answers_or_is_gone() { gms status || is_gone "$server"; }

ends() { # ends GROUP: in order
    kill -TERM -- "$1"
    until_true is_gone "$1"
}

part "the installed TensorRT-LLM is as the adapter knows it" gms patches check --engine trtllm

start server gms serve ${DEVICE:+--device "$DEVICE"}
server=$started
until_true answers_or_is_gone
if gms status >>"$logs/verify.log" 2>&1; then verdict PASS "a server of GMS runs"; else verdict FAIL "a server of GMS runs" "see $logs/server.log"; exit 1; fi

engine writer
first=$(answer) || first=
writer=$started
if [ -n "$first" ]; then verdict PASS "a writer answers"; else verdict FAIL "a writer answers" "see $logs/writer.log"; exit 1; fi
part "its log says that it has published" grep -q "published generation" "$logs/writer.log"
part "it ends when it is told to" ends "$writer"

engine reader --gms-config mode=ro
second=$(answer) || second=
reader=$started
if [ "$second" = "$first" ]; then verdict PASS "a reader answers the same"; else verdict FAIL "a reader answers the same" "see $logs/reader.log"; fi
part "its log says that it has attached" grep -q "attached to generation" "$logs/reader.log"
part "its log says that it has read nothing of the checkpoint" grep -q " 0 bytes read from the checkpoint" "$logs/reader.log"
part "it ends when it is told to" ends "$reader"

if "$python" "$here/sleep.py" "$model" "$ranks" >"$logs/sleep.log" 2>&1; then
    verdict PASS "an engine answers the same when it has slept"
elif [ $? -eq 3 ]; then
    verdict SKIP "an engine answers the same when it has slept" "this version does not sleep"
else
    verdict FAIL "an engine answers the same when it has slept" "see $logs/sleep.log"
fi

export GMS_FAILOVER=${GMS_FAILOVER:-{\}}
engine one
one=$started
part "an engine that fails over becomes the primary" until_true has_role one primary
third=$(answer) || third=
if [ "$third" = "$first" ]; then verdict PASS "it answers the same"; else verdict FAIL "it answers the same" "see $logs/one.log"; fi
engine two
two=$started
part "its shadow stands by at the same port" until_true has_role two standby
kill -KILL "$one"
before=$(date +%s%N)
fourth=$(answer) || fourth=
after=$(date +%s%N)
if [ "$fourth" = "$first" ]; then
    verdict PASS "the shadow answers the same $(((after - before) / 1000000)) ms after a SIGKILL of the primary"
else
    verdict FAIL "the shadow answers the same after a SIGKILL of the primary" "see $logs/two.log"
fi
part "nothing of the primary is left" until_true is_gone "$one"
part "the shadow ends when it is told to" ends "$two"
exit "$failed"
