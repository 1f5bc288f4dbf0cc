package kill

import (
	"testing"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

// A world is a network namespace with some devices, addresses and routes.
type world struct {
	*harness.Netns
	// listener has a TCP-MD5 key.
	listener int
}

// base is what each world has. Nothing of it is random: two worlds are alike but for the time at which they were made.
const base = `link set lo up
link add nic0 address 02:00:00:00:00:10 type veth peer name far0 address 02:00:00:00:00:20
link add nic1 address 02:00:00:00:00:11 type veth peer name far1 address 02:00:00:00:00:21
link add nic2 address 02:00:00:00:00:12 type veth peer name far2 address 02:00:00:00:00:22
link set nic2 addrgenmode none
link set far0 up
link set far1 up
link set far2 up
link set nic0 up
link set nic1 up
link set nic2 up
addr add 192.0.2.1/24 dev nic0
addr add 198.51.100.1/24 dev nic1
addr add 10.9.0.1/32 dev nic2
addr add fd00:2::1/64 dev nic0 nodad
addr add fd00:3::1/64 dev nic1 nodad
route add default via 192.0.2.9
route add default via fd00:2::9 dev nic0
route add 10.8.0.0/16 dev nic2 scope link
`

// newWorld makes a world, and waits until the kernel has done with it what it does by itself.
func newWorld(t testing.TB) *world {
	t.Helper()
	return &world{Netns: harness.NewNetns(t, base, "ipv4/ip_forward 1", "ipv6/conf/all/forwarding 1")}
}

// An event is a line of ip, or one of ethtool. Some fail, as what they delete is not there.
type event string

// do has an event happen.
func (w *world) do(e event) error { return w.Do(string(e)) }

// close ends what runs in the world for us.
func (w *world) close() {
	w.mute()
	w.Close()
}

// mute ends who listens.
func (w *world) mute() {
	if w.listener > 0 {
		_ = unix.Close(w.listener)
		w.listener = 0
	}
}

// listen has somebody listen with a TCP-MD5 key, for as long as the world is there.
func (w *world) listen() error {
	return w.In(func() (err error) {
		w.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			key := unix.TCPMD5Sig{Keylen: 6}
			key.Addr.Family = unix.AF_INET
			copy(key.Addr.Data[2:], []uint8{192, 0, 2, 8}) // behind the port
			copy(key.Key[:], "secret")
			err = unix.SetsockoptTCPMD5Sig(w.listener, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &key)
		}
		if err == nil {
			err = unix.Bind(w.listener, &unix.SockaddrInet4{Port: 179})
		}
		if err == nil {
			err = unix.Listen(w.listener, 1)
		}
		return err
	})
}

// snapshot is all that an agent could change.
func (w *world) snapshot() (string, error) { return w.Snapshot("nic0", "nic1", "nic2") }
