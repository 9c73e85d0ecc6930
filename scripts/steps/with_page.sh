#!/bin/sh
# with_page.sh BUSYBOX PORT PAGE PROGRAM WORD OPTIONS...: `hvkvm run`, or another program that takes its options
# first, with a user-mode network, where passt works.
#
# The file PAGE is then at http://10.0.2.2:PORT/ for the guest, for as long as hvkvm runs. Called by scripts/run,
# on the machine that runs the guest.
busybox=$1 port=$2 page=$3 program=$4 word=$5
shift 5

# Whether passt can have what it needs here: with nobody behind its fd it starts, and ends at once. It is told of
# an interface and addresses, as hvkvm does, since it finds none by itself on a host without a default route.
here="-i lo -a 10.0.2.15 -n 24 -g 10.0.2.2 -M 52:55:0a:00:02:02"
if ! command -v passt >/dev/null; then
	echo "run: no passt here, so the guest has no network (apt-get install passt)" >&2
elif ! : | passt --foreground --quiet $here --fd 3 3<&0 >/dev/null 2>&1; then
	echo "run: passt does not work here, so the guest has no network; try passt --foreground" >&2
else
	set -- --net user --module hv_netvsc "$@"
	# This shell becomes hvkvm, and the server ends with its parent, however that ends.
	setpriv --pdeathsig KILL "$busybox" httpd -f -p "127.0.0.1:$port" -h "${page%/*}" </dev/null >/dev/null 2>&1 &
fi
exec "$program" "$word" "$@"
