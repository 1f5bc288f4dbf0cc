package agent

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/ethtool"
)

// hookedClient has something happen ahead of the first write of a device's features.
type hookedClient struct {
	featureClient
	before func(ethtool.Device)
	writes []ethtool.Device
}

// Set writes, after what is to happen ahead of it.
func (c *hookedClient) Set(dev ethtool.Device, want map[ethtool.Feature]bool) (*ethtool.Features, error) {
	c.writes = append(c.writes, dev)
	if before := c.before; before != nil {
		c.before = nil
		before(dev)
	}
	return c.featureClient.Set(dev, want)
}

const pair = "link add n2 index 100 address 02:00:00:00:00:02 type veth peer name n3 index 101\n"

// TestHostDeviceIsAnotherOneWhenItIsWritten has a device go, or come again as another one, between the decision to hold features off on it and the
// write. What is there in the end has all of its features, and nothing is remembered of it.
func TestHostDeviceIsAnotherOneWhenItIsWritten(t *testing.T) {
	for name, lines := range map[string]string{
		"gone":                           "link del n2",
		"another index":                  "link del n2\nlink add n2 index 200 type veth peer name n3 index 201\nlink set n2 up",
		"another name":                   "link del n2\nlink add m2 index 100 type veth peer name n3 index 101\nlink set m2 up",
		"renamed":                        "link set n2 down\nlink set n2 name m2",
		"same index and name":            "link del n2\nlink add n2 index 100 type veth peer name n3 index 101\nlink set n2 up",
		"same index, name and address":   "link del n2\n" + pair + "link set n2 up",
		"same index and name, up late":   "link del n2\nlink add n2 index 100 type veth peer name n3 index 101",
		"two names changed places":       "link set n2 down\nlink set n2 name x2\nlink set n3 name n2\nlink set n2 up",
		"same index and name, no longer": "link del n2\nlink add n2 index 100 type veth peer name n3 index 101\nlink del n2",
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			ns := newNS(t)
			ns.ip(pair + "link set n2 addrgenmode none\nlink set n3 addrgenmode none\nlink set n2 up\nlink set n3 up\nroute add 192.0.2.2/32 dev n2")
			cfg := hostConfig(t)
			cfg.Plan.SharedNICs = "off"
			a := ns.start(cfg)
			done := make(chan struct{})
			c := &hookedClient{featureClient: a.et, before: func(dev ethtool.Device) {
				defer close(done)
				if dev.Name != "n2" {
					t.Errorf("the first device that is written is %s", dev)
				}
				ns.ip(lines)
			}}
			if err := a.call(t.Context(), func() { a.et = c }); err != nil {
				t.Fatal(err)
			}
			ns.policy("add", "0.0.0.0/0", "10.3.0.0/16", "")
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Fatalf("nothing is written: %+v", a.Report())
			}
			ns.policy("delete", "0.0.0.0/0", "10.3.0.0/16", "")
			within(t, 20*time.Second, "nothing is held", func() bool {
				r := a.Report()
				return r.Policies == 0 && len(r.Holds) == 0 && len(r.Locks) == 0
			})
			a.stop()
			got := ns.wanted()
			for dev, on := range got {
				if !on {
					t.Errorf("%s has lost TSO", dev)
				}
			}
			if d := cmp.Diff(Left{}, LeftOver(cfg.RunDir)); d != "" {
				t.Errorf("the journal (-want +got):\n%s", d)
			}
		})
	}
}

// TestHostFeaturesOfADeviceThatIsGone has the event of a device's last features come behind its end, as two sockets tell of them. Another device with
// its index and name, as one that is moved back has, is read all the same.
func TestHostFeaturesOfADeviceThatIsGone(t *testing.T) {
	for name, back := range map[string]bool{"behind its end": false, "behind the next one": true} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			ns := newNS(t)
			up := pair + "link set n2 addrgenmode none\nlink set n3 addrgenmode none\nlink set n2 up\nlink set n3 up\nroute add 192.0.2.2/32 dev n2"
			ns.ip(up)
			cfg := hostConfig(t)
			cfg.Plan.SharedNICs = "off"
			a := ns.start(cfg)
			features := func() (link bool, f *ethtool.Features) {
				if err := a.call(t.Context(), func() { link, f = a.st.fib.Link(100) != nil, a.st.features[100] }); err != nil {
					t.Fatal(err)
				}
				return link, f
			}
			known := func() bool { link, f := features(); return link && f != nil && f.Name == "n2" }
			within(t, 20*time.Second, "n2 is known", known)
			_, last := features()
			s, _ := last.Get(tso)
			s.Active, s.Wanted = false, false
			ns.ip("link del n2")
			within(t, 20*time.Second, "n2 is gone", func() bool { link, f := features(); return !link && f == nil })
			if back {
				ns.ip(up)
				within(t, 20*time.Second, "n2 is known again", known)
			}
			late := ethtool.FeaturesSet{Features: ethtool.NewFeatures(100, "n2", map[ethtool.Feature]ethtool.State{tso: s})}
			if err := a.call(t.Context(), func() { a.apply(batch{features: []ethtool.Event{late}}) }); err != nil {
				t.Fatal(err)
			}
			if !back {
				ns.ip(up)
			}
			ns.policy("add", "0.0.0.0/0", "10.3.0.0/16", "")
			within(t, 20*time.Second, "TSO is held off on n2", func() bool { return !ns.wanted()["n2"] })
			ns.policy("delete", "0.0.0.0/0", "10.3.0.0/16", "")
			within(t, 20*time.Second, "and given back", func() bool { return ns.wanted()["n2"] })
			a.stop()
		})
	}
}

// wanted is whether TSO is wanted on each veth.
func (ns *testNS) wanted() map[string]bool {
	ns.t.Helper()
	c, err := ethtool.Dial()
	if err != nil {
		ns.t.Fatal(err)
	}
	defer c.Close()
	out := map[string]bool{}
	err = c.All(func(f *ethtool.Features) error {
		if s, ok := f.Get(tso); ok && f.Name != "lo" && s.Changeable {
			out[f.Name] = s.Wanted
		}
		return nil
	})
	if err != nil {
		ns.t.Fatal(err)
	}
	return out
}
