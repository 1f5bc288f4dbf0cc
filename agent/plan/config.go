package plan

import (
	"path"
	"slices"

	"tsoagent/ethtool"
	"tsoagent/routes"
)

// Choice is what the configuration asks for a device or a feature.
type Choice string

// The choices of `dedicated`.
const (
	// Auto takes TSO off dedicated carriers unless a probe has shown on this kernel that their
	// kind carries super-packets correctly and at least as fast.
	Auto Choice = "auto"
	// Off takes TSO off dedicated carriers.
	Off Choice = "off"
	// Keep leaves devices alone.
	Keep Choice = "keep"
)

// MTUMode says how route MTUs are set.
type MTUMode string

// The modes of `mtu`.
const (
	// MTULock sets `mtu lock N`: lower PMTU news is ignored and DF is cleared on IPv4.
	MTULock MTUMode = "lock"
	// MTUAdvise sets `mtu N` without the lock: DF is kept, PMTU is still learnt.
	MTUAdvise MTUMode = "advise"
	// MTUOff sets no route MTU.
	MTUOff MTUMode = "off"
)

// PartialMode says what is done where only a part of a route's flows are covered.
type PartialMode string

// The modes of `partial`.
const (
	// PartialTable locks clones of the routes in a table of our own.
	PartialTable PartialMode = "table"
	// PartialClamp clamps the MSS of forwarded connections in an nftables table of our own.
	PartialClamp PartialMode = "clamp"
	// PartialOff leaves such flows without a lock.
	PartialOff PartialMode = "off"
)

// SharedMode says what is done on a NIC that covered flows share with others.
type SharedMode string

// The modes of `shared_nics`.
const (
	// SharedKeep leaves the NIC alone.
	SharedKeep SharedMode = "keep"
	// SharedLane sends exactly the covered flows through a segmenting ifb.
	SharedLane SharedMode = "lane"
	// SharedOff takes TSO off the NIC, from everybody, while coverage leaves by it.
	SharedOff SharedMode = "off"
)

// CarrierMTU says where the MTU of a carrier's flows is set.
type CarrierMTU string

// The modes of `carrier_mtu`.
const (
	// CarrierRoute locks the carrier's routes.
	CarrierRoute CarrierMTU = "route"
	// CarrierDevice sets the carrier's own MTU where all of its SAs agree.
	CarrierDevice CarrierMTU = "device"
)

// SourceLess says whether lookups without a source address are served (MSS clamps).
type SourceLess string

// The modes of `source_less_lookups`.
const (
	Serve    SourceLess = "serve"
	ServeOff SourceLess = "off"
)

// Config is the part of the configuration that decisions depend on. The zero value means the
// defaults.
type Config struct {
	// Dedicated is the choice for dedicated carriers, Auto by default.
	Dedicated Choice `yaml:"dedicated" json:"dedicated"`
	// SharedNICs is what is done on NICs that covered flows share with others, SharedKeep by
	// default.
	SharedNICs SharedMode `yaml:"shared_nics" json:"shared_nics"`
	// Devices overrides Dedicated, SharedNICs and Features for devices by name globs (path.Match);
	// of those that match, the first that has the key holds.
	Devices []DeviceConfig `yaml:"devices" json:"devices"`
	// Features are the features that a hold takes; by default TSO of both families with ECN.
	Features []ethtool.Feature `yaml:"features" json:"features"`
	// CarrierMTU is where the MTU of a carrier's flows is set, CarrierRoute by default.
	CarrierMTU CarrierMTU `yaml:"carrier_mtu" json:"carrier_mtu"`
	// MTU is how route MTUs are set, MTULock by default.
	MTU MTUMode `yaml:"mtu" json:"mtu"`
	// PresumeMTU is the inner MTU in bytes for a policy that never had a valid SA, 0 for none.
	PresumeMTU int `yaml:"presume_mtu" json:"presume_mtu"`
	// Partial is what is done where only a part of a route's flows are covered.
	Partial PartialMode `yaml:"partial" json:"partial"`
	// SourceLess is whether lookups without a source are served where the host forwards.
	SourceLess SourceLess `yaml:"source_less_lookups" json:"source_less_lookups"`
	// Table is the number of the first routing table of our own, 5450 by default. As many
	// numbers after it are used as there are shapes of selectors.
	Table routes.TableID `yaml:"table" json:"table"`
	// Protocol is the route protocol of our routes and rules, 84 by default.
	Protocol routes.Protocol `yaml:"protocol" json:"protocol"`
	// MaxClonesPerCoverage and MaxClones limit the routes in our tables.
	MaxClonesPerCoverage int `yaml:"max_clones_per_coverage" json:"max_clones_per_coverage"`
	MaxClones            int `yaml:"max_clones" json:"max_clones"`
}

// DeviceConfig is what differs for the devices whose name matches a glob. What is empty is left
// to the next that matches, and at last to the whole configuration.
type DeviceConfig struct {
	Match      string            `yaml:"match" json:"match"`
	Dedicated  Choice            `yaml:"dedicated" json:"dedicated,omitempty"`
	SharedNICs SharedMode        `yaml:"shared_nics" json:"shared_nics,omitempty"`
	Features   []ethtool.Feature `yaml:"features" json:"features,omitempty"`
}

// MaxRules is how many rules of ours a family may have: each costs a packet about 8 ns.
const MaxRules = 64

// WithDefaults fills what is not set.
func (c Config) WithDefaults() Config {
	def := func(have, want string) string {
		if have == "" {
			return want
		}
		return have
	}
	c.Dedicated = Choice(def(string(c.Dedicated), string(Auto)))
	c.MTU = MTUMode(def(string(c.MTU), string(MTULock)))
	c.Partial = PartialMode(def(string(c.Partial), string(PartialTable)))
	c.SharedNICs = SharedMode(def(string(c.SharedNICs), string(SharedKeep)))
	c.CarrierMTU = CarrierMTU(def(string(c.CarrierMTU), string(CarrierRoute)))
	c.SourceLess = SourceLess(def(string(c.SourceLess), string(Serve)))
	if len(c.Features) == 0 {
		c.Features = []ethtool.Feature{ethtool.TCPSegmentation, ethtool.TCPECNSegmentation, ethtool.TCP6Segmentation}
	}
	if c.Table == 0 {
		c.Table = 5450
	}
	if c.Protocol == 0 {
		c.Protocol = routes.ProtoTSOAgent
	}
	if c.MaxClonesPerCoverage == 0 {
		c.MaxClonesPerCoverage = 1024
	}
	if c.MaxClones == 0 {
		c.MaxClones = 65536
	}
	return c
}

// dedicated is the choice for a dedicated device.
func (c Config) dedicated(name string) Choice {
	d, ok := c.device(name, func(d DeviceConfig) bool { return d.Dedicated != "" })
	if ok {
		return d.Dedicated
	}
	return c.Dedicated
}

// SharedMode is the mode for a shared device.
func (c Config) SharedMode(name string) SharedMode {
	d, ok := c.device(name, func(d DeviceConfig) bool { return d.SharedNICs != "" })
	if ok {
		return d.SharedNICs
	}
	return c.SharedNICs
}

// shares reports whether something is done on any shared device.
func (c Config) shares() bool {
	return c.SharedNICs != SharedKeep || slices.ContainsFunc(c.Devices, func(d DeviceConfig) bool {
		return d.SharedNICs != "" && d.SharedNICs != SharedKeep
	})
}

// features are what a hold on a device takes.
func (c Config) features(name string) []ethtool.Feature {
	d, ok := c.device(name, func(d DeviceConfig) bool { return len(d.Features) > 0 })
	if ok {
		return d.Features
	}
	return c.Features
}

// device is the first entry that matches a name and has what is asked for.
func (c Config) device(name string, has func(DeviceConfig) bool) (DeviceConfig, bool) {
	for _, d := range c.Devices {
		if ok, err := path.Match(d.Match, name); err == nil && ok && has(d) {
			return d, true
		}
	}
	return DeviceConfig{}, false
}

// OwnTable reports whether the number is one of our tables.
func (c Config) OwnTable(id routes.TableID) bool {
	return id >= c.Table && id < c.Table+MaxRules
}

// OwnRule reports whether the rule is ours.
func (c Config) OwnRule(r *routes.Rule) bool {
	return r.Protocol == c.Protocol && r.Action == routes.RuleToTable && c.OwnTable(r.Table)
}

// OwnRoute reports whether the route is a clone or a throw of ours.
func (c Config) OwnRoute(r routes.Route) bool {
	return r.Body.Protocol == c.Protocol && c.OwnTable(r.Body.Table)
}
