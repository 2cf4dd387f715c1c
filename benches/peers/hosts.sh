#!/usr/bin/env bash
# Several hosts on one machine: network namespaces hvd-h1 … hvd-hN (10.77.0.1 … N) on a bridge, each link limited both ways.
# As root, with iproute2.
#
#   hosts.sh up 8 1gbit     |   ip netns exec hvd-h1 COMMAND     |   hosts.sh down
#
# HVD_HOSTS_PREFIX (default hvd-) keeps apart what several users of one machine make; at most 9 letters.
set -euo pipefail
action=$1 hosts=${2:-0} rate=${3:-1gbit} prefix=${HVD_HOSTS_PREFIX:-hvd-}
case $action in
up)
    ip link add "${prefix}br" type bridge && ip link set "${prefix}br" up
    for i in $(seq 1 "$hosts"); do
        ip netns add "${prefix}h$i"
        ip link add "${prefix}v$i" type veth peer name eth0 netns "${prefix}h$i"
        ip link set "${prefix}v$i" master "${prefix}br" up
        ip -n "${prefix}h$i" addr add "10.77.0.$i/24" dev eth0
        ip -n "${prefix}h$i" link set eth0 up
        ip -n "${prefix}h$i" link set lo up
        ip netns exec "${prefix}h$i" tc qdisc add dev eth0 root tbf rate "$rate" burst 256kb latency 50ms
        tc qdisc add dev "${prefix}v$i" root tbf rate "$rate" burst 256kb latency 50ms
    done
    ;;
down)
    ip netns list | awk -v prefix="${prefix}h" 'index($1, prefix) == 1 { print $1 }' | xargs -r -n 1 ip netns del
    ip link del "${prefix}br" 2>/dev/null || true
    ;;
*)
    echo "hosts.sh: '$action' is neither up nor down" >&2
    exit 2
    ;;
esac
