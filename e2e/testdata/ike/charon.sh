# charon.sh NS [OPTION=VALUE…]: runs strongSwan's charon in the namespace, in the foreground, with its files in $WORK/NS. The options are those of
# its plugin kernel-netlink.
set -e
ns=$1; shift
mkdir -p $WORK/$ns
options=
for o in "$@"; do options="$options
			$o"; done
cat >$WORK/$ns/strongswan.conf <<CONF
charon-systemd {
	load = random nonce openssl kdf kernel-netlink socket-default updown vici
	# It keeps the new IKE_SA ahead of the old one's end, and does not wait long for a peer that is not there.
	make_before_break = yes
	retransmit_tries = 3
	delete_rekeyed_delay = 1
	install_routes = ${ROUTES:-yes}
	filelog {
		log {
			path = $WORK/$ns/charon.log
			flush_line = yes
			default = 1
		}
	}
	plugins {
		vici {
			socket = unix://$WORK/$ns/vici
		}
		kernel-netlink {$options
		}
	}
}
CONF
export STRONGSWAN_CONF=$WORK/$ns/strongswan.conf
# It does not listen to SIGINT, with which a script that fails ends what it started.
ip netns exec $ns charon-systemd &
pid=$!
trap 'kill -TERM $pid' INT TERM
wait $pid || wait $pid
