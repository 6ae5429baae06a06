#!/usr/bin/env bash
# A Slurm "cloud" on one machine, and a SkyPilot that knows no other (README.md beside this file).
#
#   bed.sh install       Debian packages, uv and a wheelhouse for the nodes; once, about 2 minutes
#   bed.sh start         the site (login host and nodes), SkyPilot's API server, `sky check`
#   bed.sh stop          everything that `start`, and whoever used it, has left running; nothing else
#   bed.sh env           the exports that a test needs: eval "$(bed.sh env)"
#   bed.sh kill HOST     crash n1, n2, n3 or login        bed.sh up HOST     boot it again
#   bed.sh cut HOST      packets to it get lost           bed.sh join HOST   ... no longer
#   bed.sh kill-api      SIGKILL the API server and its executors, all of them
#   bed.sh log           the ends of the site's logs
#   bed.sh run COMMAND   install, start, COMMAND in that environment, stop (whatever happens, within $LIMIT)
#
# Root on Linux (Debian 12 or newer, Ubuntu 24.04), for network namespaces. State in $BED, nothing elsewhere.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)

BED=${BED:-/var/cache/skygate-bed}   # not under /tmp (nodes have one of their own), readable for all users
VENV=${VENV:-$root/.venv}            # where `sky` is, with the extra `slurm`
API_PORT=${API_PORT:-46591}          # SkyPilot's default is 46580
NODES=${NODES:-3}                    # a cluster has its nodes to itself, as on a cloud: 3 nodes, then no capacity
LIMIT=${LIMIT:-1800}                 # seconds
NET=10.77.0                          # .1 this machine, .10 login host, .11 .. nodes
ACCOUNT=skybed                       # who SkyPilot is on the cluster
SKY_VERSION=0.14.1
SKY_HOME=$BED/home-sky               # HOME of the SkyPilot client and its API server: .sky, .slurm
RUN=$BED/run

say() { echo "[bed] $*" >&2; }
die() { say "$*"; exit 1; }

need_root() {
  [ "$(uname -s)" = Linux ] || die "the bed needs Linux"
  [ "$(id -u)" = 0 ] || die "the bed needs root (network namespaces, Slurm's daemons)"
}

environment() { # of everything that talks to the bed's SkyPilot; SKYGATE_BED marks what `stop` may end
  cat <<E
export SKYGATE_BED=$BED HOME=$SKY_HOME SKYPILOT_API_SERVER_LOCAL_PORT=$API_PORT
export SKYPILOT_DISABLE_USAGE_COLLECTION=1 SLURM_CONF=$BED/etc/slurm.conf PATH=$VENV/bin:\$PATH
unset SKYPILOT_API_SERVER_ENDPOINT
E
}

# --- install -----------------------------------------------------------------------------------------------

PACKAGES="slurmctld slurmd slurm-client munge openssh-server openssh-client rsync iproute2 util-linux
  netcat-openbsd socat procps python3-venv curl ca-certificates"

install_packages() {
  local missing=() name policy=/usr/sbin/policy-rc.d made=
  for name in $PACKAGES; do dpkg -s "$name" >/dev/null 2>&1 || missing+=("$name"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "apt-get install ${missing[*]}"
  # The packages' own services must not start: the bed runs its own, from its own files.
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made=1; }
  local ok=0
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      -o DPkg::Lock::Timeout=120 "${missing[@]}"; } >"$BED/log/apt.log" 2>&1 || ok=1
  [ -z "$made" ] || rm -f $policy
  [ $ok = 0 ] || { tail -20 "$BED/log/apt.log" >&2; die "apt-get failed"; }
}

install_wheels() { # SkyPilot's runtime and the simulator's one dependency, for nodes that reach no index
  local done="$BED/wheels/.done-$SKY_VERSION" tools="$BED/tools"
  [ ! -e "$done" ] || return 0
  say "wheelhouse for the nodes"
  rm -rf "$BED/wheels" "$tools"
  /usr/bin/python3 -m venv "$tools"   # the nodes' interpreter, so that binary wheels fit it
  { "$tools/bin/pip" install -q uv wheel "setuptools<81"   # the last two: python-hostlist comes as source
    "$tools/bin/pip" wheel -q -w "$BED/wheels" "skypilot[slurm,remote]==$SKY_VERSION" \
      httptools pip "setuptools<81" wheel; } >"$BED/log/pip.log" 2>&1 || { tail -20 "$BED/log/pip.log" >&2; die "pip failed"; }
  rm -f "$BED"/wheels/skypilot-*.whl  # the nodes get the API server's own
  touch "$done"
}

install() {
  need_root
  command -v apt-get >/dev/null || die "the bed installs Debian packages; here is no apt-get"
  mkdir -p "$BED/log"; chmod 755 "$BED" "$BED/log"
  install_packages
  "$VENV/bin/python" -c 'import hostlist, sky' 2>/dev/null || die "no skypilot[slurm] in $VENV (make test-sky installs it)"
  install_wheels
}

# --- the site ----------------------------------------------------------------------------------------------

template() { # template NAME [MODE]: site/NAME with its @WORDS@ filled in, to $BED/etc
  sed -e "s|@BED@|$BED|g" -e "s|@NET@|$NET|g" -e "s|@ACCOUNT@|$ACCOUNT|g" -e "s|@SKY_HOME@|$SKY_HOME|g" \
    "$here/site/$1" >"$BED/etc/$1"
  chmod "${2:-644}" "$BED/etc/$1"
}

configure() {
  rm -rf "$BED"/{etc,ctld,home,run} "$BED/log/"*.log
  mkdir -p "$BED"/{etc,run,log,ctld,home,node}
  chmod 755 "$BED"/{etc,run,log,home,node}
  id $ACCOUNT >/dev/null 2>&1 || useradd -M -d "$BED/home/$ACCOUNT" -s /bin/bash $ACCOUNT
  usermod -p '*' $ACCOUNT   # no password, and not "locked" for sshd
  command install -d -o $ACCOUNT -g $ACCOUNT -m 755 "$BED/home/$ACCOUNT"
  command install -d -o $ACCOUNT -g $ACCOUNT -m 700 "$BED/home/$ACCOUNT/.ssh"
  command install -d -o slurm -g slurm "$BED/ctld"
  command install -d -o munge -g munge -m 755 "$BED/run/munge"
  command install -d -o munge -g munge -m 700 "$BED/etc/munge" "$BED/log/munge"
  head -c 1024 /dev/urandom >"$BED/etc/munge/key"
  chown munge:munge "$BED/etc/munge/key"; chmod 400 "$BED/etc/munge/key"

  template slurm.conf; template cgroup.conf; template sshd_config; template prolog.sh 755; template taskprolog.sh 755
  local i
  { echo "127.0.0.1 localhost"; echo "$NET.10 login"
    for i in $(seq "$NODES"); do echo "$NET.$((10 + i)) n$i"; done; } >"$BED/etc/hosts"
  for i in $(seq "$NODES"); do
    echo "NodeName=n$i NodeAddr=$NET.$((10 + i)) CPUs=8 RealMemory=16384 Gres=gpu:H100:4 State=UNKNOWN"
  done >>"$BED/etc/slurm.conf"
  for i in 0 1 2 3; do : >"$BED/etc/gpu$i"; done   # what Slurm counts as H100s; there is no device behind them
  echo "Name=gpu Type=H100 File=$BED/etc/gpu[0-3]" >"$BED/etc/gres.conf"

  # SkyPilot's side: it reads ~/.slurm/config, one Host per Slurm cluster. What it built and cached stays.
  mkdir -p "$SKY_HOME"/{.slurm,.sky,.ssh}; chmod 700 "$SKY_HOME"
  find "$SKY_HOME/.sky" -mindepth 1 -maxdepth 1 ! -name wheels -exec rm -rf -- {} +
  [ -s "$SKY_HOME/.slurm/id" ] || ssh-keygen -q -t ed25519 -N '' -f "$SKY_HOME/.slurm/id"
  [ -s "$BED/hostkey" ] || ssh-keygen -q -t ed25519 -N '' -f "$BED/hostkey"
  command install -o $ACCOUNT -g $ACCOUNT -m 600 "$SKY_HOME/.slurm/id.pub" "$BED/home/$ACCOUNT/.ssh/authorized_keys"
  template ssh.config; cp "$BED/etc/ssh.config" "$SKY_HOME/.slurm/config"
  template sky.yaml; cp "$BED/etc/sky.yaml" "$SKY_HOME/.sky/config.yaml"
  # GPU names: SkyPilot would download these two tables as soon as a task names an accelerator.
  local tables="$SKY_HOME/.sky/catalogs/v8/common"; mkdir -p "$tables"
  printf 'AcceleratorName,Clouds\nH100,"['\''Slurm'\'']"\n' >"$tables/accelerators.csv"
  printf 'GPU,MemoryGB,Manufacturer\nH100,80,NVIDIA\n' >"$tables/metadata.csv"
}

host_ip() { case $1 in login) echo 10 ;; n[1-9]) echo $((10 + ${1#n})) ;; *) die "no host $1" ;; esac; }
is_ours() { [ -n "$1" ] && grep -qzxF "SKYGATE_BED=$BED" "/proc/$1/environ" 2>/dev/null; }
host_pid() { # of a living host: its outermost process, with which all others of the host end
  local pid; pid=$(cat "$RUN/$1.pid" 2>/dev/null) || return 1
  is_ours "$pid" && echo "$pid"; }

up() { # boot a host: network, UTS, mount and PID namespace of its own, with its daemons
  local host=$1 ip; ip=$(host_ip "$1")
  host_pid "$host" >/dev/null && return 0
  ip netns list | grep -qw "skybed-$host" || {
    ip netns add "skybed-$host"
    ip link add "skyb-$host" type veth peer name eth0 netns "skybed-$host"
    ip link set "skyb-$host" master skybed up
    ip -n "skybed-$host" link set lo up; ip -n "skybed-$host" link set eth0 up
    ip -n "skybed-$host" addr add "$NET.$ip/24" dev eth0; }
  mkdir -p "$BED/node/$host/"{tmp,spool}; chmod 1777 "$BED/node/$host/tmp"
  SKYGATE_BED=$BED SLURM_CONF=$BED/etc/slurm.conf setsid nsenter "--net=/run/netns/skybed-$host" \
    unshare --mount --uts --pid --fork --kill-child --mount-proc \
    bash "$here/site/boot.sh" "$host" "$BED" </dev/null >>"$BED/log/$host.log" 2>&1 &
  echo $! >"$RUN/$host.pid"
  disown   # its end is no news for this shell
}

kill_host() { # all at once, as a power cut
  local pid; pid=$(host_pid "$1") || return 0
  kill -KILL "$pid"
  while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
}

# The neighbour's hardware address becomes one that nobody has.
cut() { ip neigh replace "$NET.$(host_ip "$1")" lladdr 02:00:00:00:00:01 dev skybed nud permanent; }
join() { ip neigh del "$NET.$(host_ip "$1")" dev skybed 2>/dev/null || true; }

start_site() {
  ip link show skybed >/dev/null 2>&1 || { ip link add skybed type bridge; ip addr add "$NET.1/24" dev skybed; }
  ip link set skybed up
  local host; up login; for i in $(seq "$NODES"); do up "n$i"; done
  export SLURM_CONF=$BED/etc/slurm.conf
  for _ in $(seq 120); do
    [ "$(runuser -u $ACCOUNT -- sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" -ge "$NODES" ] && return 0
    sleep 0.25
  done
  logs; die "the Slurm site does not come up"
}

# --- SkyPilot ----------------------------------------------------------------------------------------------

start_api() {
  ( eval "$(environment)"; cd "$SKY_HOME"
    sky api start </dev/null >"$BED/log/api.log" 2>&1 ) || { tail -20 "$BED/log/api.log" >&2; die "no API server"; }
  ( eval "$(environment)"; cd "$SKY_HOME"; sky check slurm </dev/null >"$BED/log/check.log" 2>&1 ) &&
    grep -q "enabled" "$BED/log/check.log" || { tail -20 "$BED/log/check.log" >&2; die "sky check slurm"; }
}

end_marked() { # end_marked [PATTERN]: SIGKILL what carries the bed's mark (and matches), but for this script's own
  local dir pid mine=" $$ $BASHPID $PPID "
  pid=$PPID
  while [ "$pid" -gt 1 ]; do pid=$(awk '/^PPid/{print $2}' "/proc/$pid/status" 2>/dev/null || echo 0); mine+="$pid "; done
  for dir in /proc/[0-9]*; do
    pid=${dir#/proc/}
    case $mine in *" $pid "*) continue ;; esac
    is_ours "$pid" || continue
    [ -z "${1:-}" ] || tr '\0' ' ' <"$dir/cmdline" 2>/dev/null | grep -qE -- "$1" || continue
    kill -KILL "$pid" 2>/dev/null || true
  done
}

kill_api() { end_marked 'sky\.server|SkyPilot:|multiprocessing|sky/server'; }

# --- all ---------------------------------------------------------------------------------------------------

start() {
  need_root
  stop quietly
  configure
  start_site
  start_api
  say "up: $NODES nodes, SkyPilot $SKY_VERSION on port $API_PORT"
}

stop() {
  need_root
  local pid ns dir
  for pid in "$RUN"/*.pid; do [ -e "$pid" ] && kill_host "$(basename "$pid" .pid)"; done
  end_marked
  for ns in $(ip netns list 2>/dev/null | awk '/^skybed-/{print $1}'); do ip netns del "$ns"; done
  ip link show skybed >/dev/null 2>&1 && ip link del skybed
  for dir in "$BED"/node/*/tmp; do   # the nodes' uv cache stays: it halves the time of a launch
    [ -d "$dir" ] && find "$dir" -mindepth 1 -maxdepth 1 ! -name 'uv_cache_*' -exec rm -rf -- {} +
  done
  local freezer; freezer=$(mktemp -d)
  if mount -t cgroup -o freezer cg "$freezer" 2>/dev/null; then
    find "$freezer"/skybed-* -depth -type d -exec rmdir {} \; 2>/dev/null || true
    umount "$freezer"
  fi
  rmdir "$freezer"
  [ -n "${1:-}" ] || say "stopped"
}

run() {
  local code=0
  need_root
  mkdir -p "$BED"; exec 9>"$BED/lock"
  flock -n 9 || die "another bed is in use here ($BED/lock)"
  trap 'stop 9>&-' EXIT
  trap 'exit 130' INT TERM HUP
  local began=$SECONDS
  install 9>&-
  say "installed after $((SECONDS - began)) s"
  start 9>&-
  say "started after $((SECONDS - began)) s"
  # In the background and waited for, so that a signal to this script is heard at once.
  ( eval "$(environment)"; exec timeout -k 30 "$LIMIT" "$@" ) 9>&- &
  wait $! || code=$?
  [ $code = 0 ] || logs
  say "ended after $((SECONDS - began)) s"
  return $code
}

logs() { tail -n 15 "$BED"/log/*.log >&2 || true; }

case "${1:-}" in
  install | start | stop) "$1" ;;
  env) environment ;;
  kill) kill_host "${2:?which host}" ;;
  up | cut | join) "$1" "${2:?which host}" ;;
  kill-api) kill_api ;;
  log) logs ;;
  run) shift; run "$@" ;;
  *) sed -n '2,15p' "$0"; exit 2 ;;
esac
