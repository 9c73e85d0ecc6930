#!/bin/sh
# ssh_key.sh: prints the path of the key that guests of these scripts let in, made first when the cache lacks it.
set -eu
key=$("${0%/*}/cache.sh")/ssh/id_ed25519
if [ ! -e "$key" ]; then
	command -v ssh-keygen >/dev/null || { echo "ssh: no ssh-keygen here (apt-get install openssh-client)" >&2; exit 1; }
	echo "ssh: making a key for guests, $key" >&2
	mkdir -p "${key%/*}"
	chmod 700 "${key%/*}"
	ssh-keygen -q -t ed25519 -N '' -C hvkvm -f "$key.$$"
	# Whoever sees the private half finds the other, too.
	mv "$key.$$.pub" "$key.pub"
	mv "$key.$$" "$key"
fi
echo "$key"
