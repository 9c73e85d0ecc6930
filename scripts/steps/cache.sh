#!/bin/sh
# cache.sh: prints the folder where boot material is kept, the same as root() of hvkvm/boot/cache.py. A job of cron
# or systemd may have no HOME.
home=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
cache=${HVKVM_CACHE:-${home:-/nonexistent}/.cache/hvkvm}
case $cache in
/*) ;;
*) cache=$(pwd)/$cache ;;
esac
printf '%s\n' "$cache"
