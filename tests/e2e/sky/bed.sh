#!/usr/bin/env bash
# A Slurm "cloud" on one machine, and a SkyPilot that knows no other (README.md beside this file).
#
#   bed.sh possible       whether this machine can have one: exit 0, or 1 and what is missing
#   bed.sh install        Debian packages, uv, wheels for the nodes, the account; once, about 3 minutes
#   bed.sh test [ARGS]    the tests marked `sky` on it; ARGS are pytest's
#   bed.sh run COMMAND    COMMAND on it, within $LIMIT; `bash` to try things by hand
#   bed.sh enter COMMAND  another COMMAND on the bed that runs
# and, on it:
#   bed.sh kill HOST      power cut of n1, n2, ... or login      bed.sh up HOST     boot it again
#   bed.sh cut HOST       packets to it get lost                 bed.sh join HOST   ... no longer
#   bed.sh kill-api       SIGKILL SkyPilot's API server and its executors, all of them
#   bed.sh log            the ends of the site's logs
#
# Everything runs in network, mount and process namespaces of its own, which end with this script, however it
# ends. Root on Linux (Debian 12 or newer, Ubuntu 24.04). State in $BED, nothing elsewhere.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)

BED=${BED:-/var/cache/skygate-bed}   # not under /tmp (nodes have one of their own), readable for all users
VENV=${VENV:-$root/.venv}            # where `sky` is, with the extra `slurm`
API_PORT=${API_PORT:-46591}          # SkyPilot's default is 46580
NODES=${NODES:-8}                    # a cluster has its nodes to itself, as on a cloud; the last is n9 at most
PROCESSES=${PROCESSES:-3}            # tests at a time
LIMIT=${LIMIT:-1800}                 # seconds
NET=10.77.0                          # .1 this machine, .10 login host, .11 .. nodes
ACCOUNT=skybed                       # who SkyPilot is on the cluster
SKY_VERSION=0.14.1
SKY_HOME=$BED/home-sky               # HOME of the SkyPilot client and its API server: .sky, .slurm
RUN=$BED/run

say() { echo "[bed] $*" >&2; }
die() { say "$*"; exit 1; }

environment() { # of everything that talks to the bed's SkyPilot
  export SKYGATE_BED=$BED HOME=$SKY_HOME SKYPILOT_API_SERVER_LOCAL_PORT=$API_PORT PATH=$VENV/bin:$PATH
  export SKYPILOT_DISABLE_USAGE_COLLECTION=1 SLURM_CONF=$BED/etc/slurm.conf
  # `import sky` takes 4 s of a core where nothing compiled is kept, and each command and process does it.
  export PYTHONPYCACHEPREFIX=$BED/pycache
  export PYTHONPATH=$here/preload${PYTHONPATH:+:$PYTHONPATH}
  unset SKYPILOT_API_SERVER_ENDPOINT TMPDIR PYTHONDONTWRITEBYTECODE
}

possible() { # what is missing here, a line each; nothing is installed to find out
  local missing=() trial
  [ "$(uname -s)" = Linux ] || missing+=("Linux (this is $(uname -s))")
  [ "$(id -u)" = 0 ] || missing+=("root, for network namespaces and Slurm's daemons")
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || missing+=("apt-get: Slurm comes from Debian's packages")
  if ! command -v unshare setpriv nsenter >/dev/null; then
    missing+=("unshare, setpriv, nsenter (util-linux)")
  elif [ ${#missing[@]} = 0 ]; then
    trial=$(unshare --net --mount --uts --pid --fork --kill-child --mount-proc true 2>&1) ||
      missing+=("network, mount, host name and process namespaces: $trial")
    # shellcheck disable=SC2016
    trial=$(unshare --mount bash -c 'd=$(mktemp -d); mount -t cgroup -o freezer cg $d; e=$?; umount $d; rmdir $d; exit $e' \
      2>&1) || missing+=("the v1 freezer cgroup, by which slurmd ends a job's processes: $trial")
    if command -v ip >/dev/null; then
      trial=$(unshare --net sh -c 'ip link add b0 type bridge && ip link add v0 type veth peer name v1' 2>&1) ||
        missing+=("bridges and veth pairs: $trial")
    fi
    [ "$(awk '/^MemTotal/ {print int($2 / 1048576)}' /proc/meminfo)" -ge 5 ] || missing+=("6 GB of memory")
    [ "$(df --output=avail -B1G "$(dirname "$BED")" | tail -n1)" -ge 4 ] || missing+=("4 GB free below $(dirname "$BED")")
  fi
  [ ${#missing[@]} = 0 ] || { printf 'missing: %s\n' "${missing[@]}"; return 1; }
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

install_skypilot() { # its wheel, which it would build at the first launch, and the nodes' environment with it
  mkdir -p "$SKY_HOME/.sky"; chmod 700 "$SKY_HOME"
  local wheel uid made image=$BED/image
  wheel=$(environment; cd "$SKY_HOME"; "$VENV/bin/python" -c '
from sky.backends import wheel_utils
print(next(wheel_utils.build_sky_wheel()[0].glob("*.whl")))' 2>"$BED/log/wheel.log") ||
    { tail -20 "$BED/log/wheel.log" >&2; die "no wheel of SkyPilot"; }
  touch "$SKY_HOME"/.sky/wheels/*/*.whl   # made again and the same, it keeps its old date and is made at each launch
  uid=$(id -u $ACCOUNT) made="$wheel $uid"
  [ "$(cat "$image/.done" 2>/dev/null)" != "$made" ] || return 0
  say "the nodes' image"
  rm -rf "$image" "$BED/node"; command install -d -o $ACCOUNT -m 755 "$image" "$image/scratch"
  cp "$wheel" "$image/scratch/"
  # Compiled: each new copy would be, at its first import, for 10 s of a core.
  # shellcheck disable=SC2016
  runuser -u $ACCOUNT -- env -i HOME="$image/scratch" UV_CACHE_DIR="$image/uv_cache_$uid" UV_OFFLINE=1 \
    UV_FIND_LINKS="$BED/wheels" bash -ec 'cd "$HOME/.."; uv=$1
      "$uv" -q venv --seed --relocatable --python /usr/bin/python3 .runtime
      "$uv" -q pip install --python .runtime/bin/python "$2[slurm,remote]" httptools
      .runtime/bin/python -m compileall -q -j 2 .runtime/lib || true' \
      _ "$BED/tools/bin/uv" "$image/scratch/$(basename "$wheel")" >"$BED/log/image.log" 2>&1 ||
    { tail -20 "$BED/log/image.log" >&2; die "uv failed"; }
  rm -rf "$image/scratch"
  basename "$(dirname "$wheel")" >"$image/.wheel"
  echo "$made" >"$image/.done"
}

install() {
  local missing; missing=$(possible) || die "no bed on this machine: $missing"
  mkdir -p "$BED/log"; chmod 755 "$BED" "$BED/log"
  install_packages
  "$VENV/bin/python" -c 'import hostlist, sky' 2>/dev/null || die "no skypilot[slurm] in $VENV (make test-sky installs it)"
  id $ACCOUNT >/dev/null 2>&1 || useradd -M -d "$BED/home/$ACCOUNT" -s /bin/bash $ACCOUNT
  usermod -p '*' $ACCOUNT   # no password, and not "locked" for sshd
  install_wheels
  install_skypilot
}

# --- the site ----------------------------------------------------------------------------------------------

template() { # template NAME [MODE]: site/NAME with its @WORDS@ filled in, to $BED/etc
  sed -e "s|@BED@|$BED|g" -e "s|@NET@|$NET|g" -e "s|@ACCOUNT@|$ACCOUNT|g" -e "s|@SKY_HOME@|$SKY_HOME|g" \
    "$here/site/$1" >"$BED/etc/$1"
  chmod "${2:-644}" "$BED/etc/$1"
}

configure() {
  rm -rf "${BED:?}"/{etc,ctld,home} "$BED/log/"*.log
  mkdir -p "$BED"/{etc,run,log,ctld,home,node}
  chmod 755 "$BED"/{etc,run,log,home,node}
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

  rm -rf "$BED/node"; mkdir "$BED/node"
  for i in $(seq "$NODES"); do mkdir "$BED/node/n$i"; cp -al "$BED/image" "$BED/node/n$i/tmp"; done   # hard links

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

up() { # boot a host: network, UTS, mount and PID namespace of its own, with its daemons
  local host=$1 ip; ip=$(host_ip "$1")
  if [ -e "$RUN/$host.pid" ] && kill -0 "$(cat "$RUN/$host.pid")" 2>/dev/null; then return 0; fi
  [ -e "/run/netns/$host" ] || {
    ip netns add "$host"
    ip link add "bed-$host" type veth peer name eth0 netns "$host"
    ip link set "bed-$host" master bed
    ip -n "$host" link set lo up; ip -n "$host" link set eth0 up
    ip -n "$host" addr add "$NET.$ip/24" dev eth0; }
  ip link set "bed-$host" up
  mkdir -p "$BED/node/$host/"{tmp,spool}; chmod 1777 "$BED/node/$host/tmp"
  SLURM_CONF=$BED/etc/slurm.conf setsid nsenter "--net=/run/netns/$host" \
    unshare --mount --uts --pid --fork --kill-child --mount-proc \
    bash "$here/site/boot.sh" "$host" "$BED" </dev/null >>"$BED/log/$host.log" 2>&1 &
  echo $! >"$RUN/$host.pid"
  disown   # its end is no news for this shell
}

kill_host() { # as a power cut: from one moment to the next nothing comes from it, no FIN and no RST either
  local pid; pid=$(cat "$RUN/$1.pid")
  ip link set "bed-$1" down
  kill -KILL "$pid" 2>/dev/null || return 0
  while kill -0 "$pid" 2>/dev/null && ! grep -q '^State:.Z' "/proc/$pid/status"; do sleep 0.05; done
}

# The neighbour's hardware address becomes one that nobody has.
cut() { ip neigh replace "$NET.$(host_ip "$1")" lladdr 02:00:00:00:00:01 dev bed nud permanent; }
join() { ip neigh del "$NET.$(host_ip "$1")" dev bed 2>/dev/null || true; }

start_site() {
  ip link set lo up
  ip link add bed type bridge; ip addr add "$NET.1/24" dev bed; ip link set bed up
  local host; up login; for i in $(seq "$NODES"); do up "n$i"; done
  export SLURM_CONF=$BED/etc/slurm.conf
  for _ in $(seq 240); do
    [ "$(runuser -u $ACCOUNT -- sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" -ge "$NODES" ] && return 0
    sleep 0.25
  done
  logs; die "the Slurm site does not come up"
}

# --- SkyPilot ----------------------------------------------------------------------------------------------

start_api() {
  ( environment; cd "$SKY_HOME"
    sky api start </dev/null >"$BED/log/api.log" 2>&1 ) || { tail -20 "$BED/log/api.log" >&2; die "no API server"; }
  ( environment; cd "$SKY_HOME"
    sky check slurm </dev/null >"$BED/log/check.log" 2>&1; grep -q "enabled" "$BED/log/check.log" ) ||
    { tail -20 "$BED/log/check.log" >&2; die "sky check slurm"; }
}

# /proc has the bed's processes alone. Executors and helpers are of the server's process group; what they call
# themselves is overwritten, and their parent may be dead.
kill_api() {
  local group
  for group in $(pgrep -f 'sky\.server\.server|^SkyPilot:' | xargs -r ps -o pgid= | sort -u); do kill -KILL -- "-$group"; done
}

# --- all ---------------------------------------------------------------------------------------------------

run() { # in namespaces that end with the first process in them, as that one does with this script
  local missing; missing=$(possible) || die "no bed on this machine: $missing"
  mkdir -p "$BED"; exec 9>"$BED/lock"
  flock -n 9 || die "another bed is in use here ($BED/lock)"
  local began=$SECONDS code=0
  install 9>&-
  say "installed after $((SECONDS - began)) s"
  freezer_tidy
  rm -rf "$RUN"; mkdir -p "$RUN/tmp"; chmod 755 "$RUN"; chmod 1777 "$RUN/tmp"
  trap 'exit 130' INT TERM HUP
  trap 'ended' EXIT
  exec 3<&0   # for a shell; what bash puts in the background would read nothing
  setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc \
    bash "$here/bed.sh" inside "$@" <&3 3<&- 9>&- &
  outermost=$!
  echo $outermost >"$RUN/pid"
  wait $outermost || code=$?
  say "ended after $((SECONDS - began)) s"
  [ $code = 0 ] || say "the site's logs are in $BED/log, what was in /tmp is in $RUN/tmp, until the next bed"
  return $code
}

ended() {
  local code=$?
  kill -KILL "$outermost" 2>/dev/null || true
  wait "$outermost" 2>/dev/null || true
  [ $code != 0 ] || rm -rf "$RUN/tmp"
  rm -f "$RUN/pid"
  freezer_tidy
}

freezer_tidy() { # empty directories that slurmd made for jobs; removable when the last process has gone
  # shellcheck disable=SC2016
  unshare --mount bash -c 'mount -t cgroup -o freezer cg "$1" && cd "$1" && [ -d skybed ] || exit 0
    for _ in $(seq 50); do find skybed -depth -type d -exec rmdir {} + 2>/dev/null; [ -d skybed ] || exit 0; sleep 0.1; done' \
    _ "$BED" || true
}

inside() { # the first process of the namespaces
  # SkyPilot leaves much in /tmp, ip and sshd in /run: both are the bed's own. A checkout below /tmp stays.
  local dir
  for dir in "$root" "$(realpath "$VENV")" "$(realpath "$(dirname "$(realpath "$VENV/bin/python")")/..")"; do
    case $dir in /tmp/*) mkdir -p "$RUN/tmp${dir#/tmp}"; mount --rbind "$dir" "$RUN/tmp${dir#/tmp}" ;; esac
  done
  mount --rbind "$RUN/tmp" /tmp
  mount -t tmpfs -o mode=755 run /run
  cd "$root"   # through the new mounts
  local began=$SECONDS
  configure
  start_site
  start_api
  say "$NODES nodes and SkyPilot $SKY_VERSION on port $API_PORT after $((SECONDS - began)) s"
  ( environment; exec timeout --foreground -k 30 "$LIMIT" "$@" ) || { local code=$?; logs; return $code; }
}

enter() { # its first process is the child of the one that made the namespaces
  local pid; pid=$(pgrep -P "$(cat "$RUN/pid" 2>/dev/null || echo 0)") || die "no bed is running"
  environment
  # shellcheck disable=SC2016
  exec nsenter --target "$pid" --net --mount --pid -- bash -c 'cd "$1"; shift; exec "$@"' _ "$root" "$@"
}

suite() { # the stories and the conformance suite side by side, then what the others could not live with
  local code=0 alone=0   # pytest's 5: ARGS chose none of these; of both, it is an error
  python -m pytest -m "sky and not alone" -n "$PROCESSES" --dist worksteal --durations=0 --durations-min=1 -rA \
    tests/e2e/sky tests/replicas/provisioners "$@" || code=$?
  python -m pytest -m "sky and alone" --durations=0 --durations-min=1 -rA tests/e2e/sky "$@" || alone=$?
  if [ $code = 5 ] || { [ $code = 0 ] && [ $alone != 5 ]; }; then code=$alone; fi
  say "seconds between the steps:"
  cat "$RUN/laps" >&2 || true
  [ $code = 0 ] || return $code
  local left; left="$(sky status | grep -E '^[a-z0-9-]+-gw-' || true)$(squeue -h)"
  [ -z "$left" ] || die "still there after all tests: $left"
  say "sky status and squeue: empty"
}

logs() { tail -n 15 "$BED"/log/*.log >&2 || true; }

case "${1:-}" in
  possible | install) "$1" ;;
  test) shift; run "$here/bed.sh" suite "$@" ;;
  run | enter | inside | suite) "$@" ;;
  kill) kill_host "${2:?which host}" ;;
  up | cut | join) "$1" "${2:?which host}" ;;
  kill-api) kill_api ;;
  log) logs ;;
  *) sed -n '2,19p' "$0"; exit 2 ;;
esac
