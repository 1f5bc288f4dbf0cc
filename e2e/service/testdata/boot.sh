# boot.sh STAGE WORK: the first process of a machine of its own, in new namespaces of every kind. Its root is this host's, with the files of
# STAGE over it, and forgets what is written. It becomes systemd, which knows few units beside the agent's.
set -eu
stage=$1 work=$2
mount --make-rprivate /
mount -t tmpfs tmpfs "$work"
mkdir "$work/up" "$work/wk" "$work/root"
cp -a "$stage" "$work/stage" # overlayfs wants its layers apart
mount -t overlay overlay -o "lowerdir=$work/stage:/,upperdir=$work/up,workdir=$work/wk" "$work/root"
cd "$work/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do
	touch "dev/$node"
	mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for dir in run tmp var/log; do mount -t tmpfs -o mode=755 tmpfs "$dir"; done
chmod 1777 tmp
mkdir -p run/old
pivot_root . run/old
umount -l /run/old
: >/run/console
: >/dev/console
mount --bind /run/console /dev/console

# A policy without an SA under the default route: presume_mtu has it locked, on any kernel with XFRM.
ip link set lo up
ip link add n0 type veth peer name n1
ip link set n0 up
ip link set n1 up
ip addr add 192.0.2.1/24 dev n0
ip addr add 10.1.0.1/16 dev n0
ip route add default via 192.0.2.254
ip xfrm policy add src 10.1.0.0/16 dst 10.3.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel

mkdir -p /run/units/multi-user.target.wants
for unit in sysinit.target basic.target multi-user.target shutdown.target umount.target network-pre.target sockets.target \
	systemd-journald.service systemd-journald.socket; do
	cp "/usr/lib/systemd/system/$unit" /run/units/
done
ln -s ../systemd-journald.service /run/units/multi-user.target.wants/
path=/run/units
if [ -e /usr/sbin/tsoagent ]; then
	# What a package does.
	systemd-sysusers tsoagent.conf
	systemd-tmpfiles --create tsoagent.conf
	tsoagent init >/run/init
	printf 'presume_mtu: 1400\nrestore_after: 100ms\n' >>/etc/tsoagent/tsoagent.yaml
	ln -s /usr/lib/systemd/system/tsoagent.service /run/units/
else
	# One will be installed here: its unit comes beside those, and can be enabled.
	mount --bind /run/units /usr/lib/systemd/system
	mount -t tmpfs -o mode=755 tmpfs /etc/systemd/system
	path=/etc/systemd/system:/usr/lib/systemd/system
fi
# As a machine that is no container has it: what is mounted later, namespaces' names for one, services see, too.
mount --make-rshared /
export SYSTEMD_UNIT_PATH=$path container=tsoagent-test PATH=/usr/sbin:/usr/bin:/sbin:/bin
unset NOTIFY_SOCKET
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --log-level=info --show-status=no
