"""What a guest's init does, in the words of busybox's shell.

Why: it mounts, loads modules and runs one command, on any kernel. Pure, any thread.

There are three ways to run the command. On the console (CONSOLE_SESSION) it has
the console for its terminal. With streams of its own (`stream_session`) its
standard input, output and error are pipes, which `cat` fills and empties: over
vsock if the guest has it, else over serial ports. They are no sockets, because a
program cannot open /dev/stderr again when that is a socket. With a terminal of
its own (TERMINAL_SESSION) it has serial port ttyS1 for one.

The init is START with one of CONSOLE_BEGIN, VSOCK_BEGIN and SERIAL_BEGIN behind it. A
warm guest has AWAIT there instead: it is saved while it waits, and each copy of it
takes what begins, the command and files from its host (`boot.guest_orders`).

`abi.guest_command` has the words that init and host exchange on fd 3.
"""

from __future__ import annotations

from hvkvm.abi import guest_command as abi

_END = """sync
guest-exit $status
poweroff -f
"""

START = r"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
read -r up idle </proc/uptime
echo "hvkvm: init $up"
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -s /proc/self/fd /dev/fd
for fd in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${fd%:*} /dev/${fd#*:}; done
for module in /modules/*.ko; do
	[ -e "$module" ] && { insmod "$module" || echo "hvkvm: ${module##*/} does not load"; }
done
ip link set lo up
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-linux}"
cd /root
"""

DHCP = r"""#!/bin/sh
case $1 in
deconfig)
	ip -4 addr flush dev "$interface"
	ip link set "$interface" up
	;;
bound | renew)
	ip addr replace "$ip/${mask:-24}" dev "$interface"
	for router in $router; do ip route replace default via "$router" dev "$interface" && break; done
	: >/etc/resolv.conf
	[ -z "$domain" ] || echo "search $domain" >>/etc/resolv.conf
	for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done
	;;
esac
"""
"""What Debian's busybox runs as udhcpc's script, with what it was given: address, route, name servers."""

ROOT_INIT = r"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
read -r up idle </proc/uptime
echo "hvkvm: init $up"
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
	[ -e "$module" ] && { insmod "$module" || echo "hvkvm: ${module##*/} does not load"; }
done
. /root-device
tries=0
until case $root in *=*) device=$(findfs "$root" 2>/dev/null) ;; *) device=$root && [ -b "$root" ] ;; esac; do
	tries=$((tries + 1))
	if [ $tries -ge 300 ]; then
		# The panic that follows ends the run, and the host shows what stands here.
		echo "hvkvm: no disk has root=$root; the guest sees these:"
		cat /proc/partitions
		[ -e /modules ] || echo "hvkvm: no modules were given; --modules-dir names their folder"
		exit 1
	fi
	sleep 0.1
done
if ! mount -o "$mode${flags:+,$flags}" ${type:+-t "$type"} "$device" /mnt; then
	echo "hvkvm: $device cannot be mounted as the root"
	exit 1
fi
umount /proc /sys
mount -o move /dev /mnt/dev
exec /bin/busybox switch_root -c /dev/console /mnt "$init" "$@"
"""
"""The init in front of a root file system on a disk: /root-device has `root`, `type`, `flags`, `mode` and
`init`."""

CONSOLE_BEGIN = (
    r"""# A session of its own with the console as its terminal: Ctrl-C then works in there.
setsid cttyhack /bin/sh /session
# Come here only if the session was killed: it ends the guest itself.
status=$?
"""
    + _END
)

# The leader of the session outlives the command: when a leader dies Linux hangs its terminal up, and drops
# what the terminal has not sent yet.
CONSOLE_SESSION = (
    r"""# These signals are the command's: trapped, not ignored, so that it gets them as ever.
trap : HUP INT QUIT TERM
/bin/sh /command
status=$?
# A shell that was killed leaves another process group in the foreground: wait for the output all the same.
trap '' TTOU
"""
    + _END
)

# The files are opened here, where no session leader opens them: a leader would get a terminal by that.
SERIAL_BEGIN = (
    r"""if [ ! -e /run/started ]; then
	if [ -c /dev/ttyS3 ]; then
		setsid /bin/sh /session serial 3<>/dev/ttyS3 4<>/dev/ttyS1 5<>/dev/ttyS2
		status=$?
	fi
	if [ ! -e /run/started ]; then
		# The panic that follows ends the run, and the host shows what stands here.
		echo "hvkvm: this kernel has neither vsock nor serial ports (8250) for the command's streams"
		exit 1
	fi
fi
"""
    + _END
)

VSOCK_BEGIN = (
    f"""setsid guest-vsock {abi.VSOCK_CONTROL} 3 /bin/sh /session vsock
# Come here if there is no vsock to the host, or if the session was killed: it ends the guest itself.
status=$?
"""
    + SERIAL_BEGIN
)

AWAIT = r"""if [ ! -c /dev/ttyS3 ]; then
	echo "hvkvm: this kernel has no serial ports (8250) by which to take a command"
	exit 1
fi
exec 3<>/dev/ttyS3 4<>/dev/ttyS1
stty raw -echo 115200 <&3
guest-orders >/dev/null && way=memory || way=serial
# What a session with streams makes, and any other does not mind: done here it costs no copy anything.
mkfifo /run/in /run/out /run/err
[ ! -c /dev/ttyS2 ] || stty raw -echo 115200 </dev/ttyS2 && : >/run/prepared
echo "warm $way" >&3
read -r orders <&3
# Each copy goes on here, and makes the time and its random numbers its own. Until a busy host has come
# so far, seconds may pass: so it asks for the time just before it sets its clock.
orders() {
	echo now >&3
	read -r now seed <&3
	case $way in
	memory) exec guest-orders ;;
	serial)
		date -s "@$now" >/dev/null
		echo "$seed" >/dev/urandom
		# As it was, when that is over: a command may have it for its terminal.
		modes=$(stty -g <&4)
		stty raw -echo 115200 <&4
		while echo piece >&3 && read -r size && [ "$size" -gt 0 ] && head -c "$size"; do :; done <&4
		stty "$modes" <&4
		;;
	esac
}
if ! orders | (cd / && exec cpio -idu 2>/run/orders); then
	cat /run/orders
	echo "hvkvm: the command cannot be taken"
	exit 1
fi
echo taken >&3
exec 3>&- 4>&-
. /begin
"""

STREAM_SESSION = (
    rf"""# fd 3 leads to the host, and so do 4 and 5 where they are serial ports.
: >/run/started
[ -p /run/in ] || mkfifo /run/in /run/out /run/err

pieces() {{
	while echo input >&3 && read -r size && [ "$size" -gt 0 ] && head -c "$size"; do :; done
}}

obey() {{
	while read -r verb value; do
		case $verb in
		signal)
			kill -"$value" "-$(cat /run/leader)" 2>/dev/null
			echo signaled >&3
			;;
		close)
			case $value in out) kill $out ;; err) kill $err ;; esac
			;;
		esac
	done
}}

# Processes outside this session: not those of the kernel, nor init, which have no session.
others() {{
	cat /proc/[0-9]*/stat 2>/dev/null |
		awk -v own=$$ '{{ pid = $1; sub(/^.*\) /, ""); if ($1 !~ /[ZX]/ && $4 > 0 && $4 != own) print pid }}'
}}

case $1 in
vsock)
	# Not cat: it has the kernel move what comes (sendfile), which holds the pipe locked while nothing comes.
	guest-vsock {abi.VSOCK_INPUT} 0 /bin/dd bs=65536 >/run/in 2>/dev/null 3>&- &
	guest-vsock {abi.VSOCK_OUTPUT} 1 /bin/cat </run/out 3>&- &
	out=$!
	guest-vsock {abi.VSOCK_ERROR} 1 /bin/cat </run/err 3>&- &
	err=$!
	;;
serial)
	[ -e /run/prepared ] && lines=4 || lines='3 4 5'
	for line in $lines; do stty raw -echo 115200 <&$line; done
	pieces <&4 >/run/in &
	cat </run/out >&4 &
	out=$!
	cat </run/err >&5 &
	err=$!
	;;
esac
obey <&3 &
setsid /bin/sh /launch </run/in >/run/out 2>/run/err 4>&- 5>&-
status=$?
# Like any command's end on a terminal of ours, it ends the guest: who runs on would keep the streams open.
tries=0
while [ $tries -lt 20 ] && left=$(others) && [ -n "$left" ]; do
	kill -9 $left 2>/dev/null
	tries=$((tries + 1))
done
wait $out $err
# stty waits until a serial port has sent everything.
[ $1 = vsock ] || for line in 4 5; do stty raw -echo <&$line; done
"""
    + _END
)

LAUNCH = """echo $$ >/run/leader
echo ready >&3
exec 3>&-
. /command
"""

TERMINAL_SESSION = (
    r"""# fd 3 leads to the host, fd 4 is the terminal.
: >/run/started
resize() {
	stty rows "$1" columns "$2" <&4
}

obey() {
	while read -r verb value more; do
		case $verb in
		signal)
			read -r line </proc/$(cat /run/leader)/stat
			set -- ${line##*) }
			# The terminal's foreground process group: a shell's job is one of its own.
			kill -"$value" "-$6" 2>/dev/null
			echo signaled >&3
			;;
		size) resize "$value" "$more" ;;
		esac
	done
}

stty raw -echo <&3
stty 115200 <&4
echo size >&3
read -r verb rows columns <&3
resize "$rows" "$columns"
obey <&3 &
setsid /bin/sh /terminal 4>&- 5>&-
# Come here only if the terminal's session was killed: it ends the guest itself.
status=$?
"""
    + _END
)

TERMINAL = (
    r"""exec 0<>/dev/ttyS1 1>&0 2>&0
echo $$ >/run/leader
echo ready >&3
exec 3>&-
"""
    + CONSOLE_SESSION
)
