# swanctl.sh NS COMMAND…: swanctl with the namespace's charon. What it says of plugins and folders that are not there is left out.
ns=$1; shift
export STRONGSWAN_CONF=$WORK/$ns/strongswan.conf SWANCTL_DIR=$WORK/$ns
swanctl "$@" --uri unix://$WORK/$ns/vici 2>$WORK/$ns/swanctl.err || { s=$?; grep -v -e '^plugin ' -e '^opening directory' $WORK/$ns/swanctl.err >&2; exit $s; }
