#!/bin/sh
# The first process of the lab's machine: brings up KVM and a writable view of
# the host's own root, then runs the jobs that arrive on the control port.
#
# Ports of the virtio-serial device, by number:
#   0 terminal (hvc0)   1 control: "job BYTES TOKEN tty|pipes" and a script in, "ending", "exit N" out
#   2 signals in        3 stdin    4 stdout    5 stderr
# Between "ending" and "exit" each stream of the job gets a NUL and the token, which end it.
# /shares lists read-write folders; /fresh names the folder that a kept machine must see anew for each job.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
	insmod "$module" || echo "lab: $module does not load"
done
hostname lab
# RAM of guests is shared memory (a memfd). In pages of 4 KiB each one that a guest touches is an exit, and
# the emulator looks addresses up in one step more: a boot of Linux then takes nearly twice as long.
echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled

port=/dev/vport0p
tries=0
until [ -c ${port}5 ] && [ -c /dev/hvc0 ]; do
	tries=$((tries + 1))
	[ $tries -lt 500 ] || { echo "lab: no virtio-serial ports"; poweroff -f; }
	sleep 0.02
done
exec 9<>${port}1
# Held open, because a terminal forgets its size when it is closed.
exec 8<>/dev/hvc0

fatal() {
	echo "lab: $1"
	echo "fatal $1" >&9
	sleep 1
	poweroff -f
}

wire=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $wire,cache=loose,ro,noatime root /lower || fatal "the host's root cannot be mounted by 9p"
mount -t tmpfs -o size=75% upper /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /new ||
	fatal "the writable layer over the host's root cannot be mounted"
mount -o bind /proc /new/proc
mount -o bind /sys /new/sys
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -o rbind /dev /new/dev
mount -t tmpfs run /new/run
mkdir -p /new/run/lab /new/run/lock
ip link set lo up
share() {
	while read -r tag folder; do
		mount -t 9p -o $wire,cache=mmap "$tag" "/new$folder" || fatal "$folder cannot be shared read-write"
	done </shares
}

# A file system mounted anew shows the files as they are now, while the root's cache goes on serving
# what seldom changes. The virtual environment is of that kind, so it is put back on top.
fresh=$(cat /fresh)
renew() {
	while read -r tag folder; do
		umount "/new$folder"
	done </shares
	umount "/new$fresh/.venv"
	umount "/new$fresh"
	umount /project
	rm -rf /upper/project
	mkdir -p /upper/project/files /upper/project/work
} 2>/dev/null
layer() {
	mount -t 9p -o $wire,cache=loose,ro,noatime project /project || fatal "$fresh cannot be mounted anew"
	mount -t overlay -o lowerdir=/project,upperdir=/upper/project/files,workdir=/upper/project/work \
		overlay "/new$fresh" || fatal "$fresh cannot be made writable"
	[ ! -d "/lower$fresh/.venv" ] || mount -o bind "/lower$fresh/.venv" "/new$fresh/.venv"
}
[ -n "$fresh" ] || share

# What a command left running, in whatever session, would hold the mounts and the next job's streams.
sweep() {
	tries=0
	while [ $tries -lt 200 ]; do
		left=
		for process in /proc/[0-9]*; do
			[ "$process/root" -ef /new ] || continue
			left=yes
			kill -KILL "${process#/proc/}"
		done
		[ -n "$left" ] || return 0
		tries=$((tries + 1))
		sleep 0.02
	done
} 2>/dev/null

# Signals have a port and a reader of their own, because this shell is inside the job while one runs.
while :; do
	while read -r name rows columns; do
		case $name in
		"") ;; # only to wake this machine
		WINCH) stty -F /dev/hvc0 rows "$rows" cols "$columns" ;;
		TELL) kill -USR2 "$(cat /new/run/lab/pid)" ;; # the command alone; its children may not know it
		*) kill -"$name" -- -"$(cat /new/run/lab/pid)" ;;
		esac
	done
	sleep 0.2
done <${port}2 >/dev/null 2>&1 &
# A command that has nothing to do says so by a file, and is then not taken for one that hangs.
while sleep 5; do
	[ ! -e /new/run/lab/resting ] && echo beat >&9 || echo beat resting >&9
done &

# A job has mounts of its own, with its root moved over this machine's. Merely entered by chroot, it could
# make no user namespace, which passt needs.
own_root='cd /new && mount --move . / && exec chroot . /bin/sh /run/lab/job'

read -r up idle </proc/uptime
echo "hello $up" >&9
while :; do
	if ! read -r verb bytes token tty <&9; then
		# Nobody is connected: an ordinary lab has lost its user, a kept one waits for the next.
		[ -n "$fresh" ] || poweroff -f
		sleep 0.1
		continue
	fi
	[ "$verb" = job ] || continue
	head -c "$bytes" <&9 >/new/run/lab/job
	[ -z "$fresh" ] || { renew; layer; share; }
	if [ "$tty" = tty ]; then
		stty -F /dev/hvc0 sane 2>/dev/null
		setsid -c unshare -m sh -c "$own_root" 8>&- 9>&- </dev/hvc0 >/dev/hvc0 2>&1
		status=$?
		[ -z "$fresh" ] || sweep
		echo ending >&9
		printf '\0%s' "$token" >/dev/hvc0
	else
		setsid unshare -m sh -c "$own_root" 8>&- 9>&- <${port}3 >${port}4 2>${port}5
		status=$?
		[ -z "$fresh" ] || sweep
		echo ending >&9
		printf '\0%s' "$token" >${port}4
		printf '\0%s' "$token" >${port}5
	fi
	rm -f /new/run/lab/pid /new/run/lab/resting
	sync
	echo "exit $status" >&9
done
