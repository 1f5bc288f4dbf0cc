package agent

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"path"
	"reflect"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"tsoagent/agent/netns"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/trust"
)

// OnStop says what happens to holds and locks when the agent is told to stop.
type OnStop string

// The choices of on_stop.
const (
	RestoreOnStop OnStop = "restore"
	KeepOnStop    OnStop = "keep"
)

// DefaultStateDir holds the result of a probe.
const DefaultStateDir = "/var/lib/tsoagent"

// DefaultMetrics is where Prometheus can scrape.
const DefaultMetrics = "127.0.0.1:15450"

// MetricsOff says that nobody can scrape.
const MetricsOff = "off"

// Config is the whole configuration. The zero value means the defaults.
type Config struct {
	// Mode is enforce or observe.
	Mode Mode `yaml:"mode"`
	// RunDir is the directory of the journal and the control socket.
	RunDir string `yaml:"run_dir"`
	// RestoreAfter is how long it must have been quiet before anything is given back.
	RestoreAfter Duration `yaml:"restore_after"`
	// StateDir holds what is to outlive a boot: the result of `tsoctl probe`.
	StateDir string `yaml:"state_dir"`
	// OnStop is what a graceful stop does with holds and locks.
	OnStop OnStop `yaml:"on_stop"`
	// ResyncEvery is how often all sources are read again, spread out by a tenth.
	ResyncEvery Duration `yaml:"resync_every"`
	// TCPKeysEvery is how often the keys of TCP sockets are looked at, of which the kernel tells
	// nobody.
	TCPKeysEvery Duration `yaml:"tcp_keys_every"`
	// TCPKeysTrust are the users, besides root, whose keys count like policies on shared NICs, by name or number.
	TCPKeysTrust []string `yaml:"tcp_keys_trust"`
	// Namespaces are those that are followed, each by an agent of its own.
	Namespaces Namespaces `yaml:"namespaces"`
	// Metrics is the address on which Prometheus can scrape, or off.
	Metrics string `yaml:"metrics"`
	// MetricsWebConfig is a web configuration file of Prometheus's exporter toolkit (TLS and
	// authentication), empty for none.
	MetricsWebConfig string `yaml:"metrics_web_config"`
	// Plan is what decisions depend on. Its keys stand at the top level of the file.
	Plan plan.Config `yaml:",inline"`
}

// Duration is a time.Duration that YAML writes as "1s".
type Duration time.Duration

// UnmarshalYAML reads a duration with its unit.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil {
		// The form of yaml.TypeError, so that all mistakes of a file are told at once.
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: %q is no duration with a unit such as 1s", n.Line, n.Value)}}
	}
	if v == 0 { // which means the default
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: %q is no duration above 0", n.Line, n.Value)}}
	}
	*d = Duration(v)
	return nil
}

// WithDefaults fills what is not set.
func (c Config) WithDefaults() Config {
	if c.Mode == "" {
		c.Mode = Enforce
	}
	if c.RunDir == "" {
		c.RunDir = DefaultRunDir
	}
	if c.StateDir == "" {
		c.StateDir = DefaultStateDir
	}
	if c.RestoreAfter == 0 {
		c.RestoreAfter = Duration(time.Second)
	}
	if c.OnStop == "" {
		c.OnStop = RestoreOnStop
	}
	if c.ResyncEvery == 0 {
		c.ResyncEvery = Duration(15 * time.Minute)
	}
	if c.TCPKeysEvery == 0 {
		c.TCPKeysEvery = Duration(10 * time.Second)
	}
	if len(c.TCPKeysTrust) == 0 {
		c.TCPKeysTrust = slices.Clone(defaultKeysTrust)
	}
	if c.Metrics == "" {
		c.Metrics = DefaultMetrics
	}
	if len(c.Namespaces) == 0 {
		c.Namespaces = Namespaces{netns.Host}
	}
	c.Plan = c.Plan.WithDefaults()
	return c
}

// SetNumbers sets the first routing table and the route protocol of our own, where not 0.
func (c *Config) SetNumbers(table, protocol uint) {
	if table != 0 {
		c.Plan.Table = routes.TableID(table)
	}
	if protocol != 0 {
		c.Plan.Protocol = routes.Protocol(protocol)
	}
}

// Keys are the configuration's keys that a flag or an environment variable can set: all but devices. Those of lists
// are with true.
func Keys() map[string]bool {
	out := map[string]bool{}
	var collect func(reflect.Type)
	collect = func(t reflect.Type) {
		for f := range t.Fields() {
			name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			switch {
			case opts == "inline":
				collect(f.Type)
			case name == "" || name == "-":
			case f.Type.Kind() != reflect.Slice:
				out[name] = false
			case f.Type.Elem().Kind() == reflect.String:
				out[name] = true
			}
		}
	}
	collect(reflect.TypeFor[Config]())
	return out
}

// Set sets a key as the file would, of a list with all of its values. The error is a *Mistake.
func (c *Config) Set(key string, values ...string) error {
	value := &yaml.Node{Kind: yaml.SequenceNode}
	for _, v := range values {
		value.Content = append(value.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: v})
	}
	list, known := Keys()[key]
	if !known {
		return &Mistake{Text: fmt.Sprintf("unknown key %q", key)}
	}
	if !list && len(values) == 1 {
		value = value.Content[0]
	}
	root := &yaml.Node{Kind: yaml.MappingNode, Content: []*yaml.Node{{Kind: yaml.ScalarNode, Value: key}, value}}
	if err := root.Decode(c); err != nil {
		m := mistakes("", err)[0]
		m.Line = 0
		return m
	}
	return nil
}

// Mistake is one thing that is wrong in a configuration, with its place.
type Mistake struct {
	File string
	Line int // 0 where a flag or the whole file is meant
	Text string
}

func (m *Mistake) Error() string {
	switch {
	case m.File == "":
		return m.Text
	case m.Line == 0:
		return m.File + ": " + m.Text
	}
	return fmt.Sprintf("%s:%d: %s", m.File, m.Line, m.Text)
}

// LoadConfig reads and validates a file. The error joins a Mistake for each thing that is
// wrong; an unreadable file is an *fs.PathError.
func LoadConfig(file string) (Config, error) {
	f, err := os.Open(file)
	if err != nil {
		return Config{}, fmt.Errorf("agent: read the configuration: %w", err)
	}
	defer f.Close()
	return ReadConfig(f, file)
}

// LoadOwnConfig is LoadConfig of what decides what root does: a regular file that somebody else can write to is refused
// (os.ErrPermission).
func LoadOwnConfig(file string) (Config, error) {
	f, err := os.Open(file)
	if err != nil {
		return Config{}, fmt.Errorf("agent: read the configuration: %w", err)
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
		if err := trust.Check(f); err != nil {
			return Config{}, fmt.Errorf("agent: read the configuration: %w", err)
		}
	}
	return ReadConfig(f, file)
}

// ReadConfig is LoadConfig from a reader; name stands in the mistakes' places.
func ReadConfig(r io.Reader, name string) (Config, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxConfig+1))
	if err != nil {
		return Config{}, fmt.Errorf("agent: read the configuration: %w", err)
	}
	if len(data) > maxConfig {
		return Config{}, &Mistake{File: name, Text: fmt.Sprintf("larger than %d bytes", maxConfig)}
	}
	var c Config
	var found []*Mistake
	var root yaml.Node
	if err := yaml.Unmarshal(data, &root); err != nil {
		return Config{}, mistakes(name, err)[0]
	}
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		found = append(found, mistakes(name, err)...)
	}
	var second yaml.Node
	switch err := dec.Decode(&second); {
	case err == nil:
		found = append(found, &Mistake{File: name, Line: second.Line, Text: "a second document: one file is one configuration"})
	case !errors.Is(err, io.EOF):
		found = append(found, mistakes(name, err)...)
	}
	for _, w := range c.Validate() {
		found = append(found, &Mistake{File: name, Line: lineOf(&root, w.Key, w.entry), Text: w.Key + ": " + w.Text})
	}
	if len(found) == 0 {
		return c, nil
	}
	sort.SliceStable(found, func(i, j int) bool { return found[i].Line < found[j].Line })
	errs := make([]error, len(found))
	for i, m := range found {
		errs[i] = m
	}
	return Config{}, errors.Join(errs...)
}

const maxConfig = 1 << 20

var (
	yamlLine    = regexp.MustCompile(`(?s)^(?:yaml: )?line (\d+): (.*)$`)
	yamlType    = regexp.MustCompile(`(?s)^cannot unmarshal !!(\w+) ?(.*) into (\S+)$`)
	yamlUnknown = regexp.MustCompile(`(?s)^field (.*) not found in type \S+$`)
)

// mistakes turns what the YAML decoder says into mistakes, in the words of the configuration.
func mistakes(file string, err error) []*Mistake {
	lines := []string{err.Error()}
	var te *yaml.TypeError
	if errors.As(err, &te) {
		lines = te.Errors
	}
	out := make([]*Mistake, 0, len(lines))
	for _, l := range lines {
		m := &Mistake{File: file, Text: strings.TrimPrefix(l, "yaml: ")}
		if g := yamlLine.FindStringSubmatch(l); g != nil {
			m.Line, _ = strconv.Atoi(g[1])
			m.Text = g[2]
		}
		if g := yamlUnknown.FindStringSubmatch(m.Text); g != nil {
			m.Text = fmt.Sprintf("unknown key %q (see the configuration reference in docs/configuration.md)", g[1])
		}
		if g := yamlType.FindStringSubmatch(m.Text); g != nil {
			value := strings.Trim(g[2], "`")
			if value == "" {
				value = map[string]string{"seq": "a list", "map": "a mapping"}[g[1]]
			}
			m.Text = fmt.Sprintf("%s is not %s", cmp.Or(value, `""`), kindOf(g[3]))
		}
		m.Text = printable(m.Text)
		out = append(out, m)
	}
	return out
}

// printable escapes what would break the line, or a terminal.
func printable(s string) string {
	if strings.ContainsFunc(s, unprintable) {
		q := strconv.Quote(s)
		return strings.NewReplacer(`\"`, `"`, string(utf8.RuneError), `\ufffd`).Replace(q[1 : len(q)-1])
	}
	return s
}

func unprintable(r rune) bool { return !strconv.IsPrint(r) || r == utf8.RuneError }

// kindOf names what a value of a Go type is called in a configuration.
func kindOf(goType string) string {
	switch {
	case strings.HasPrefix(goType, "[]"):
		return "a list"
	case strings.Contains(goType, "int"), strings.Contains(goType, "TableID"), strings.Contains(goType, "Protocol"):
		return "a number in range"
	case strings.HasSuffix(goType, "Config"):
		return "a mapping of keys to values"
	}
	return "a text"
}

// Wrong is a value that Validate refuses.
type Wrong struct {
	Key, Text string
	entry     int // of a list, from 1; 0 for the key itself
}

// longest bounds all durations: what is spread by a tenth, or doubled, must not wrap around to none at all.
const longest = 365 * 24 * time.Hour

// Validate returns what is wrong with the values.
func (c Config) Validate() []Wrong {
	var out []Wrong
	wrong := func(key, format string, args ...any) {
		out = append(out, Wrong{Key: key, Text: fmt.Sprintf(format, args...)})
	}
	oneOf := func(key, have string, allowed ...string) {
		if have != "" && !slices.Contains(allowed, have) {
			wrong(key, "%q is not one of %s", have, strings.Join(allowed, ", "))
		}
	}
	atLeast := func(key string, have, least int) {
		if have != 0 && have < least {
			wrong(key, "%d is less than %d", have, least)
		}
	}
	p := c.Plan
	oneOf("mode", string(c.Mode), string(Enforce), string(Observe))
	oneOf("on_stop", string(c.OnStop), string(RestoreOnStop), string(KeepOnStop))
	oneOf("dedicated", string(p.Dedicated), string(plan.Auto), string(plan.Off), string(plan.Keep))
	oneOf("mtu", string(p.MTU), string(plan.MTULock), string(plan.MTUAdvise), string(plan.MTUOff))
	oneOf("partial", string(p.Partial), string(plan.PartialTable), string(plan.PartialClamp), string(plan.PartialOff))
	oneOf("shared_nics", string(p.SharedNICs), string(plan.SharedKeep), string(plan.SharedLane), string(plan.SharedOff))
	oneOf("carrier_mtu", string(p.CarrierMTU), string(plan.CarrierRoute), string(plan.CarrierDevice))
	oneOf("source_less_lookups", string(p.SourceLess), string(plan.Serve), string(plan.ServeOff))
	atLeast("presume_mtu", p.PresumeMTU, 576)
	atLeast("max_clones_per_coverage", p.MaxClonesPerCoverage, 1)
	atLeast("max_clones", p.MaxClones, 1)
	out = append(out, c.Namespaces.wrong()...)
	duration := func(key string, have Duration, least time.Duration, less string) {
		switch d := time.Duration(have); {
		case d != 0 && d < least:
			wrong(key, "%s", less)
		case d > longest:
			wrong(key, "more than %.0fh, which is a year", longest.Hours())
		}
	}
	duration("restore_after", c.RestoreAfter, 0, "a negative duration")
	duration("resync_every", c.ResyncEvery, time.Minute, "less than 1m")
	duration("tcp_keys_every", c.TCPKeysEvery, 100*time.Millisecond, "less than 100ms")
	out = append(out, wrongUsers(c.TCPKeysTrust)...)
	if c.Metrics != "" && c.Metrics != MetricsOff {
		if host, port, err := net.SplitHostPort(c.Metrics); err != nil || !isHost(host) || !isPort(port) {
			wrong("metrics", "%q is neither off nor ADDRESS:PORT, as %s", c.Metrics, DefaultMetrics)
		}
	}
	if f := c.MetricsWebConfig; f != "" && (!path.IsAbs(f) || strings.ContainsFunc(f, unprintable)) {
		wrong("metrics_web_config", "%q is not an absolute path", f)
	}
	switch {
	case c.StateDir == "":
	case !path.IsAbs(c.StateDir):
		wrong("state_dir", "not an absolute path")
	case strings.ContainsFunc(c.StateDir, unprintable):
		wrong("state_dir", "%q has characters that can't be printed", c.StateDir)
	}
	switch {
	case c.RunDir == "":
	case !path.IsAbs(c.RunDir):
		wrong("run_dir", "not an absolute path")
	case strings.ContainsFunc(c.RunDir, unprintable):
		wrong("run_dir", "%q has characters that can't be printed", c.RunDir)
	case len(SocketPath(c.RunDir)) > maxSocketPath:
		wrong("run_dir", "too long for the path of a socket: %s may have %d bytes", SocketPath("…"), maxSocketPath)
	}
	switch t := p.Table; {
	case t != 0 && t <= 255 && t+plan.MaxRules > 252:
		wrong("table", "%d to %d reach the tables that the kernel itself uses (253, 254, 255)", t, t+plan.MaxRules-1)
	case t > math.MaxUint32-plan.MaxRules:
		wrong("table", "%d leaves no room for the %d tables from it on", t, plan.MaxRules)
	}
	if p.Protocol != 0 && p.Protocol <= 4 {
		wrong("protocol", "%d is one of the kernel's and iproute2's own (0 to 4)", p.Protocol)
	}
	features := func(key string, list []ethtool.Feature) {
		for _, f := range list {
			if !slices.Contains(holdable, f) {
				wrong(key, "%q is no feature that can be held: %v", f, holdable)
			}
		}
	}
	features("features", p.Features)
	for i, d := range p.Devices {
		n := len(out)
		if !isGlob(d.Match) {
			wrong("devices", "entry %d: %q is no glob for a device name", i+1, d.Match)
		}
		if d.Dedicated == "" && d.SharedNICs == "" && len(d.Features) == 0 {
			wrong("devices", "entry %d: dedicated, shared_nics or features is missing", i+1)
		}
		at := len(out)
		oneOf("devices", string(d.Dedicated), string(plan.Auto), string(plan.Off), string(plan.Keep))
		oneOf("devices", string(d.SharedNICs), string(plan.SharedKeep), string(plan.SharedLane), string(plan.SharedOff))
		features("devices", d.Features)
		for ; at < len(out); at++ {
			out[at].Text = fmt.Sprintf("entry %d: %s", i+1, out[at].Text)
		}
		for ; n < len(out); n++ {
			out[n].entry = i + 1
		}
	}
	return out
}

// isHost reports whether metrics can be served on a host: an IP address, or none for all of them. A name
// would have to be looked up, which can fail for reasons that come and go.
func isHost(s string) bool {
	_, err := netip.ParseAddr(s)
	return s == "" || err == nil
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// maxSocketPath is what sun_path holds besides its end (struct sockaddr_un, linux/un.h).
const maxSocketPath = 107

// isGlob reports whether a pattern can match the name of a device: the kernel has none with
// white space or a slash (dev_valid_name, net/core/dev.c).
func isGlob(pattern string) bool {
	_, err := path.Match(pattern, "x")
	return err == nil && pattern != "" && !strings.ContainsFunc(pattern, func(r rune) bool {
		return unprintable(r) || unicode.IsSpace(r) || r == '/'
	})
}

var holdable = []ethtool.Feature{
	ethtool.TCPSegmentation, ethtool.TCPECNSegmentation, ethtool.TCP6Segmentation,
	ethtool.UDPSegmentation, ethtool.GenericSegm,
}

// lineOf is the line of a top-level key, or of an entry of its list, 0 if it is not there.
func lineOf(root *yaml.Node, key string, entry int) int {
	if len(root.Content) == 0 || root.Content[0].Kind != yaml.MappingNode {
		return 0
	}
	m := root.Content[0].Content
	for i := 0; i+1 < len(m); i += 2 {
		if m[i].Value != key {
			continue
		}
		if list := m[i+1].Content; entry > 0 && entry <= len(list) {
			return list[entry-1].Line
		}
		return m[i].Line
	}
	return 0
}
