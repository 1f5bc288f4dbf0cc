# libre-tunnel.sh NS: gives the namespace's pluto the tunnel between SRCNET and NET. CONN are more settings, with semicolons between them.
set -e
ns=$1
if [ $ns = left ]; then
	local=$L1 remote=$R1 near=$SRCNET far=$NET peer=right gw=$GWL
else
	local=$R1 remote=$L1 near=$NET far=$SRCNET peer=left gw=$GWR
fi
cat >$WORK/$ns/gw.conf <<CONF
conn gw
	ikev2=insist
	authby=secret
	auto=ignore
	left=$local
	leftid=@$ns
	leftsubnet=$near
	leftsourceip=$gw
	right=$remote
	rightid=@$peer
	rightsubnet=$far
	ike=aes128-sha2_256-modp2048
	esp=${ESP:-aes_gcm128-null}
$(echo "$CONN" | tr ';' '\n' | sed 's/^ */	/')
CONF
export IPSEC_EXECDIR=/mnt/bin/libreswan/usr/libexec/ipsec
exec $IPSEC_EXECDIR/addconn --config $WORK/$ns/gw.conf --ctlsocket $WORK/$ns/run/pluto.ctl gw
