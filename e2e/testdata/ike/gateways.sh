# Two gateways, left and right, with two wires between them, and behind each a host: client and server. One net behind each is for the tunnel,
# the other one is not. The variables are those of the scenarios' variants.
set -e
# The gateways' secret, which lives as long as the machine.
(umask 077; od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >$WORK/secret)
for ns in client left right server; do
	ip netns add $ns
	ip -n $ns link set lo up
done
ip -n left link add nic1 type veth peer name nic1 netns right
ip -n left link add nic2 type veth peer name nic2 netns right
ip -n left link add lan type veth peer name lan netns client
ip -n right link add lan type veth peer name lan netns server
address() { ip -n $1 addr add $2/$P dev $3 $NODAD; }
address left $L1 nic1
address left $L2 nic2
address left $GWL lan
address left $GWPLAIN lan
address right $R1 nic1
address right $R2 nic2
address right $GWR lan
address client $IN lan
address client $PLAIN lan
address server $FAR lan
for ns in left right; do
	ip netns exec $ns sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
	for d in nic1 nic2 lan; do ip -n $ns link set $d up; done
done
ip -n client link set lan up
ip -n server link set lan up
ip $F -n client route add default via $GWL
ip $F -n server route add default via $GWR
ip $F -n left route add default via $R1 dev nic1
ip $F -n right route add default via $L1 dev nic1
