# whack.sh NS COMMAND…: whack with the namespace's pluto.
ns=$1; shift
exec /mnt/bin/libreswan/usr/libexec/ipsec/whack --rundir $WORK/$ns/run "$@"
