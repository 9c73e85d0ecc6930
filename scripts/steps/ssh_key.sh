#!/bin/sh
# ssh_key.sh: prints the path of the key that guests of these scripts let in, made first when the cache lacks it.
set -eu
key=$("${0%/*}/cache.sh")/ssh/id_ed25519
if [ ! -e "$key" ]; then
	command -v ssh-keygen >/dev/null || { echo "ssh: no ssh-keygen here (apt-get install openssh-client)" >&2; exit 1; }
	echo "ssh: making a key for guests, $key" >&2
	mkdir -p "${key%/*}"
	chmod 700 "${key%/*}"
	# One at a time, or the two halves could be of two keys. A file system without locks goes without.
	exec 9<"${key%/*}"
	flock 9 || true
	if [ ! -e "$key" ]; then
		rm -f "$key.new" "$key.new.pub"
		ssh-keygen -q -t ed25519 -N '' -C hvkvm -f "$key.new"
		# Whoever sees the private half finds the other, too.
		mv "$key.new.pub" "$key.pub"
		mv "$key.new" "$key"
	fi
fi
echo "$key"
