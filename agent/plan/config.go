package plan

import (
	"path"

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
	// PartialOff leaves such flows without a lock.
	PartialOff PartialMode = "off"
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
	// Devices overrides Dedicated for devices by name globs (path.Match); the first that
	// matches holds.
	Devices []DeviceConfig `yaml:"devices" json:"devices"`
	// Features are the features that a hold takes; by default TSO of both families with ECN.
	Features []ethtool.Feature `yaml:"features" json:"features"`
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

// DeviceConfig is the choice for the devices whose name matches a glob.
type DeviceConfig struct {
	Match     string `yaml:"match" json:"match"`
	Dedicated Choice `yaml:"dedicated" json:"dedicated"`
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

// dedicated is the choice for a device.
func (c Config) dedicated(name string) Choice {
	for _, d := range c.Devices {
		if ok, err := path.Match(d.Match, name); err == nil && ok {
			return d.Dedicated
		}
	}
	return c.Dedicated
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
