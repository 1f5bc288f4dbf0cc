# pluto.sh NS: runs libreswan's pluto in the namespace, in the foreground, with its files in $WORK/NS.
set -e
ns=$1
dir=$WORK/$ns
exe=/mnt/bin/libreswan/usr/libexec/ipsec
mkdir -p $dir/run $dir/ipsec.d
cat >$dir/ipsec.conf <<CONF
config setup
	nhelpers=0
	dumpdir=$dir
CONF
(umask 077; echo ": PSK 0x$(cat $WORK/secret)" >$dir/ipsec.secrets)
certutil -N -d sql:$dir --empty-password
export PATH=/mnt/bin/libreswan/usr/sbin:$PATH IPSEC_EXECDIR=/usr/libexec/ipsec IPSEC_SBINDIR=/mnt/bin/libreswan/usr/sbin
export IPSEC_CONF=$dir/ipsec.conf IPSEC_RUNDIR=$dir/run IPSEC_NSSDIR=$dir IPSEC_CONFDDIR=$dir/ipsec.d
# It has the path of its programs compiled in. The mounts are of the mount namespace that ip netns exec makes.
exec ip netns exec $ns sh -c "mount -t tmpfs none /usr/libexec && mkdir /usr/libexec/ipsec && mount --bind $exe /usr/libexec/ipsec && exec \
	/usr/libexec/ipsec/pluto --nofork --config $dir/ipsec.conf --secretsfile $dir/ipsec.secrets --nssdir $dir --rundir $dir/run \
	--ipsecdir $dir/ipsec.d --logfile $dir/pluto.log"
