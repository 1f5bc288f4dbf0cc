package api

// DeviceList are the devices of a namespace that concern the agent, or all.
type DeviceList struct {
	Version int            `json:"version"`
	Netns   string         `json:"netns,omitempty"`
	Live    bool           `json:"live"` // false where no agent was asked
	Devices []DeviceReport `json:"devices"`
}

// DeviceReport is one network device.
type DeviceReport struct {
	Device string `json:"device"`
	Index  int32  `json:"ifindex"`
	Kind   string `json:"kind,omitempty"` // as `ip -d link` has it; none for hardware
	Up     bool   `json:"up"`
	MTU    int    `json:"mtu"` // bytes
	// WasMTU is its owner's MTU in bytes, where the agent has set the device's own.
	WasMTU int `json:"was_mtu,omitempty"`
	// Driver, Bus, Firmware and PermAddr identify the hardware, as ethtool -i and -P tell it.
	Driver   string `json:"driver,omitempty"`
	Bus      string `json:"bus,omitempty"`
	Firmware string `json:"firmware,omitempty"`
	PermAddr string `json:"perm_addr,omitempty"`
	// Carries are the coverages whose flows leave by it.
	Carries []string `json:"carries"`
	// Features are those that can be held off.
	Features []FeatureReport `json:"features"`
	// Lane is the ifb that its covered flows take, and LaneState how that is.
	Lane      string `json:"lane,omitempty"`
	LaneState string `json:"lane_state,omitempty"`
	// Locks are the routes by it that are locked in place, and Clones those in a table of ours.
	Locks  int `json:"locks"`
	Clones int `json:"clones"`
}

// FeatureReport is one offload of a device.
type FeatureReport struct {
	Feature string `json:"feature"` // as `ethtool -k` has it
	// Active is what the device does, Wanted what was asked of it, and Fixed that it can't be changed.
	Active bool `json:"active"`
	Wanted bool `json:"wanted"`
	Fixed  bool `json:"fixed,omitempty"`
	// Hold is the state of the hold on it, as in the report; empty for none.
	Hold    string   `json:"hold,omitempty"`
	Why     string   `json:"why,omitempty"`
	Because []string `json:"because,omitempty"`
}

// LockList is everything that gives covered flows an MTU.
type LockList struct {
	Version int    `json:"version"`
	Netns   string `json:"netns,omitempty"`
	Live    bool   `json:"live"` // false where no agent was asked
	// Locks are routes that are locked in place; Rules and Clones are in tables of ours.
	Locks      []LockReport      `json:"locks"`
	Rules      []RuleReport      `json:"rules"`
	Clones     []CloneReport     `json:"clones"`
	Clamps     []ClampReport     `json:"clamps"`
	DeviceMTUs []DeviceMTUReport `json:"device_mtus"`
}

// LocksOf are the locks of a report.
func LocksOf(r *Report) *LockList {
	return &LockList{
		Version: Version, Netns: r.Netns, Live: r.Live, Locks: some(r.Locks), Rules: some(r.Rules), Clones: some(r.Clones),
		Clamps: some(r.Clamps), DeviceMTUs: some(r.DeviceMTUs),
	}
}

// some is never nil, so that JSON has [] and not null.
func some[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
