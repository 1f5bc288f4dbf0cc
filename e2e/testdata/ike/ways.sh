# Which way 3,000 packets go at the left gateway, as the kernel says (RTM_GETROUTE): those of the tunnel, of its neighbours and of nobody, forwarded and
# its own, with and without a mark, a port or a device. Without MTUs, MSS, and what tells a route from its clone (table, protocol, metric).
set -e
[ "$F" = -4 ] && nets='10.3.0. 10.3.200. 10.9.0. 10.8.0. 10.1.1. 10.1.2. 192.0.2.' || nets='fd03::3: fd03:0:1:: fd09:: fd08:: fd00:1:1:: fd00:1:2:: 2001:db8::'
awk -v nets="$nets" -v near="$FAR $GWR $IN $PLAIN $GWL $GWPLAIN $L1 $L2 $R1 $R2" 'BEGIN {
	srand(7)
	n = split(nets, net); m = split(near, at)
	for (i = 0; i < 3000; i++) {
		to = rand() < 0.4 ? at[1 + int(rand() * m)] : net[1 + int(rand() * n)] (1 + int(rand() * 99))
		line = "route get " to
		if (rand() < 0.8) line = line " from " (rand() < 0.8 ? at[3 + int(rand() * (m - 2))] : net[1 + int(rand() * n)] (1 + int(rand() * 99)))
		if (line ~ / from / && rand() < 0.6) line = line " iif " (rand() < 0.7 ? "lan" : "nic" (1 + int(rand() * 2)))
		else if (rand() < 0.2) line = line " oif " (rand() < 0.3 ? "lan" : "nic" (1 + int(rand() * 2)))
		if (rand() < 0.3) line = line " mark " int(rand() * 4)
		if (rand() < 0.3) line = line " ipproto " (rand() < 0.5 ? "tcp" : "udp") " sport 4096 dport " (rand() < 0.5 ? 443 : 5002)
		print line
	}
}' >$WORK/questions
# What has no way is an error with the number of its line.
ip netns exec left ip $F -force -oneline -batch $WORK/questions 2>&1 | sed -E 's/ (table|proto|metric|mtu lock|mtu|advmss|expires) [^ ]+//g; s/\\ +cache( |$)/ /' | sort
