# swan-tunnel.sh NS: gives the namespace's charon the tunnel between SRCNET and NET. CONN and CHILD are more settings of the connection and of its
# child, with semicolons between them.
set -e
ns=$1
if [ $ns = left ]; then
	local=$L1 remote=$R1 near=$SRCNET far=$NET peer=right
else
	local=$R1 remote=$L1 near=$NET far=$SRCNET peer=left
fi
(umask 077; cat >$WORK/$ns/swanctl.conf) <<CONF
connections {
	gw {
		version = 2
		local_addrs = ${LOCALS:-$local}
		remote_addrs = ${REMOTES:-$remote}
		proposals = aes128gcm16-prfsha256-ecp256
		local {
			auth = psk
			id = $ns
		}
		remote {
			auth = psk
			id = $peer
		}
		$(echo "$CONN" | tr ';' '\n')
		children {
			net {
				local_ts = ${NEAR:-$near}
				remote_ts = ${FARNET:-$far}
				esp_proposals = ${ESP:-aes128gcm16}
				$(echo "$CHILD" | tr ';' '\n')
			}
		}
	}
}
secrets {
	ike-gw {
		secret = 0x$(cat $WORK/secret)
	}
}
CONF
exec sh $IKE/swanctl.sh $ns --load-all --noprompt
