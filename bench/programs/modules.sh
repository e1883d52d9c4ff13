# Load and unload kernel modules in a loop, while other CPUs run and the kernel's own code is being patched.
# sh modules.sh ROUNDS MODULE …
set -e
rounds=$1
shift
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null || true
trace=/sys/kernel/tracing

# Each CPU has something that forks, executes, switches and makes system calls all the time: it runs into what is being patched.
for cpu in $(seq 0 $(($(nproc) - 1))); do
    nice taskset -c "$cpu" sh -c 'while :; do /usr/bin/true; : "$(echo x | cat)"; done' &
    pids="$pids $!"
done
trap 'kill $pids' EXIT

before=$(wc -l </proc/modules)
loads=0
for round in $(seq "$rounds"); do
    for module in "$@"; do
        modprobe "$module"
        loads=$((loads + 1))
    done
    for module in "$@"; do grep -q "^$module " /proc/modules; done
    echo $((round % 2)) >/proc/sys/kernel/sched_schedstats         # a jump label in the scheduler
    echo $((round % 2)) >$trace/events/sched/sched_switch/enable   # and a tracepoint's
    echo $((round % 2)) >$trace/events/raw_syscalls/enable
    case $((round % 4)) in
    0) echo >$trace/kprobe_events ;;                               # int3, and then a jump, in a function's middle
    1) echo 'p:opened do_sys_openat2' >$trace/kprobe_events
        echo 1 >$trace/events/kprobes/opened/enable ;;
    3) echo 0 >$trace/events/kprobes/opened/enable ;;
    esac
    if [ $((round % 10)) = 0 ]; then                               # every function's entry
        echo function >$trace/current_tracer
        echo nop >$trace/current_tracer
    fi
    removal=
    for module in "$@"; do removal="$module $removal"; done
    for module in $removal; do modprobe -r "$module"; done
done
after=$(wc -l </proc/modules)
echo "modules $before before, $after after $loads loads"
[ "$before" = "$after" ]
