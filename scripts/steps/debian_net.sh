#!/bin/sh
# debian_net.sh console|ssh KEY COMMAND PROGRAM WORD OPTIONS...: a distribution with a user-mode network, where
# passt is, that lets KEY's owner in as root.
#
# "console": becomes the program, having said which command reaches the guest. "ssh": logs in by itself, for
# COMMAND or a shell, whose status is this script's; then the guest is powered off. Called by scripts/debian, on
# the machine that runs the guest.
set -eu
way=$1 key=$2 command=$3 program=$4 word=$5
shift 5

if ! command -v passt >/dev/null || ! command -v ssh >/dev/null; then
	missing="passt or ssh here (apt-get install passt openssh-client)"
	[ "$way" = console ] || { echo "debian: no $missing" >&2; exit 1; }
	echo "debian: no $missing, so nobody logs in over ssh" >&2
	exec "$program" "$word" --append quiet "$@"
fi
port=$("${program%/*}/python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
# A systemd puts what it is told of by this name into root's authorized_keys.
credential="systemd.set_credential=\"ssh.authorized_keys.root:$(cat "$key.pub")\""
set -- "$program" "$word" --append "quiet $credential" --net "user,forward=$port-22" "$@"
if [ "$way" = console ]; then
	where=${HVKVM_IN_LAB:+", from inside the lab only (make debian ARGS=--ssh logs in there)"}
	echo "debian: ssh -i $key -p $port root@127.0.0.1$where" >&2
	exec "$@"
fi

log=$(mktemp)
"$@" </dev/null >"$log" 2>&1 &
vm=$!
trap 'kill $vm 2>/dev/null || true; rm -f "$log"' EXIT
trap 'exit 130' INT TERM
reach() { # options of ssh, then --, then a command
	ssh -i "$key" -p "$port" -o IdentitiesOnly=yes -o LogLevel=ERROR -o StrictHostKeyChecking=no \
		-o UserKnownHostsFile=/dev/null -o ConnectTimeout=60 root@127.0.0.1 "$@"
}
echo "debian: booting; logging in over ssh when that answers" >&2
until reach -o BatchMode=yes -n true 2>/dev/null; do
	kill -0 $vm 2>/dev/null || { tail -n 20 "$log" >&2; echo "debian: the guest has ended" >&2; exit 1; }
	sleep 1
done
status=0
if [ -n "$command" ]; then
	reach "$command" || status=$?
else
	reach || status=$?
fi
reach -o BatchMode=yes -n poweroff 2>/dev/null || true
wait $vm || true
exit $status
