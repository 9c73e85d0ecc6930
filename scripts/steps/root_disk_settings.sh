# What makes packages a system that boots from its disk: run by mmdebstrap with the root folder as $1.
set -eu
cd "$1"
echo hvkvm >etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 hvkvm\n::1 localhost\n' >etc/hosts
echo 'LABEL=hvkvm-root / ext4 errors=remount-ro 0 1' >etc/fstab
# root logs in on the console without a password; sshd lets nobody in without one.
sed -i 's/^root:[^:]*:/root::/' etc/shadow
printf '[Match]\nType=ether\n\n[Network]\nDHCP=yes\n' >etc/systemd/network/80-dhcp.network
chroot . systemctl --quiet enable systemd-networkd.service
chroot . systemctl --quiet mask systemd-networkd-wait-online.service
# sshd starts with the first connection, which keeps it out of every boot.
chroot . systemctl --quiet disable ssh.service
chroot . systemctl --quiet enable ssh.socket
# An emulated host that is busy with others takes minutes for what systemd gives 90 seconds.
mkdir -p etc/systemd/system.conf.d
printf '[Manager]\nDefaultTimeoutStartSec=15min\nDefaultDeviceTimeoutSec=15min\n' >etc/systemd/system.conf.d/slow.conf
# Nothing of these is wanted in a guest that lives for minutes.
chroot . systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
	e2scrub_all.timer e2scrub_reap.service fstrim.timer getty@tty1.service
